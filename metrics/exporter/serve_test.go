package exporter

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := Listen("unix:" + path)
	must(t, err)
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if _, err := Listen("unix:" + path); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second one: %v", err)
	}
	// One that was killed leaves its socket.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	must(t, l.Close())
	l, err = Listen("unix:" + path)
	must(t, err)
	must(t, l.Close())
	must(t, os.WriteFile(path, nil, 0o600))
	for _, address := range []string{"unix:" + path, "unix:", "unix:" + dir + "/none/s", "nonsense"} {
		if l, err := Listen(address); err == nil {
			l.Close()
			t.Errorf("%s: listens", address)
		}
	}
}
