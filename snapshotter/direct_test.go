package snapshotter_test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"

	"lamina/pool"
	"lamina/snapshotter"

	"golang.org/x/sys/unix"
)

// With --direct containerd mounts containers by the helper, and a commit waits for its server. With survive=on a container
// notices nothing when that is killed.
func TestDirect(t *testing.T) {
	run := t.TempDir() + "/run" // the log says that a server was killed, and stays
	t.Setenv(pool.RuntimeDirVariable, run)
	s := newStore(t, snapshotter.Config{Direct: true, Options: []string{"survive=on"}})
	s.image()
	mounts, err := s.Prepare(s.ctx, "c", "top", gcRoot)
	must(t, err)
	if len(mounts) != 1 || mounts[0].Type != "fuse3.lamina" {
		t.Fatalf("mounts: %+v", mounts)
	}
	target := t.TempDir()
	helper := func() {
		t.Helper()
		args := []string{mounts[0].Source, target}
		for _, o := range mounts[0].Options {
			args = append(args, "-o", o)
		}
		out, err := lamina(args...).CombinedOutput() // as mount.fuse3 -t lamina does
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	helper()
	overwrite(t, target+"/big", "XYZ", 500_000)
	text, err := lamina("status", "--json", target).Output()
	must(t, err)
	var st pool.Status
	must(t, json.Unmarshal(text, &st))
	must(t, unix.Kill(st.PID, unix.SIGKILL))
	overwrite(t, target+"/big", "abc", 600_000)
	changed := big[:500_000] + "XYZ" + big[500_003:600_000] + "abc" + big[600_003:]
	want(t, target+"/big", changed)
	must(t, unix.Unmount(target, 0))
	must(t, s.Commit(s.ctx, "committed", "c", gcRoot))
	mounts, err = s.View(s.ctx, "v", "committed")
	must(t, err)
	helper()
	want(t, target+"/big", changed)
	must(t, unix.Unmount(target, 0))
	must(t, s.Remove(s.ctx, "v"))
	must(t, eventually(func() error {
		left, err := filepath.Glob(run + "/*.sock")
		if len(left) > 0 {
			err = fmt.Errorf("servers still there: %v", left)
		}
		return err
	}))
}
