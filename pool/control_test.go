package pool

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A runtime directory whose sockets' paths do not fit into an address serves as well as a short one.
func TestLongRuntimeDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv(RuntimeDirVariable, dir)
	c, err := listen("/some/where", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "snapshotter.sock"), nil, 0o600); err != nil { // somebody else's
		t.Fatal(err)
	}
	c.serve(func() Status { return Status{Mountpoint: "/some/where"} })
	all, err := MountsOn("/some/where")
	if err != nil || len(all) != 1 || all[0].Mountpoint != "/some/where" {
		t.Errorf("asked: %+v, %v", all, err)
	}
	if all, err := MountsOn(""); err != nil || len(all) != 1 {
		t.Errorf("asked for all: %+v, %v", all, err)
	}
	c.close()
	if err := os.Remove(filepath.Join(dir, "snapshotter.sock")); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
