package snapshotter_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"lamina/snapshotter"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func idLabels(uids, gids string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: uids, snapshots.LabelSnapshotGIDMapping: gids})
}

func owner(t *testing.T, path string) [2]uint32 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return [2]uint32{st.Uid, st.Gid}
}

// With --remap-ids a container sees its own owners, and the layer that it is committed to has the image's.
func TestRemapIDs(t *testing.T) {
	s := newStore(t, snapshotter.Config{RemapIDs: true})
	s.image()
	labels := idLabels("0:100000:1000,1000:500000:10", "0:200000:65536")
	s.container("c", "top", func(dir string) {
		for _, path := range []string{"", "/big", "/etc/passwd"} {
			if got := owner(t, dir+path); got != [2]uint32{100000, 200000} {
				t.Errorf("%s is owned by %v", path, got)
			}
		}
		must(t, os.Chmod(dir, 0o777))
		cmd := exec.Command("setpriv", "--reuid", "500003", "--regid", "200007", "--clear-groups", "sh", "-c", "echo mine >mine")
		cmd.Dir = dir // no other user could come this way
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got := owner(t, dir+"/mine"); got != [2]uint32{500003, 200007} {
			t.Errorf("a new file is owned by %v", got)
		}
	}, labels)
	must(t, s.Commit(s.ctx, "committed", "c", gcRoot))
	s.view("committed", func(dir string) {
		if got := owner(t, dir+"/mine"); got != [2]uint32{1003, 7} {
			t.Errorf("in the layer the new file is owned by %v", got)
		}
	})
}

// Without, containerd has changed the owners of the layers below, and the container's root owns its root directory.
func TestOwnersChangedBelow(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	s.container("c", "top", func(dir string) {
		if got := owner(t, dir); got != [2]uint32{100000, 200000} {
			t.Errorf("the root directory is owned by %v", got)
		}
		if got := owner(t, dir+"/big"); got != [2]uint32{} {
			t.Errorf("a file is owned by %v", got)
		}
	}, idLabels("0:100000:65536", "0:200000:65536"))
	s.layer("owned", "top", func(dir string) { must(t, os.Chown(dir, 7, 8)) })
	s.container("child", "owned", func(dir string) {
		if got := owner(t, dir); got != [2]uint32{7, 8} {
			t.Errorf("above a root directory of 7:8 one is owned by %v", got)
		}
	})
}

// Labels that ask for what cannot be done are refused by name, and make no snapshot.
func TestLabelsRefused(t *testing.T) {
	s := newStore(t, snapshotter.Config{RemapIDs: true})
	s.image()
	for _, c := range []struct {
		label string
		opt   snapshots.Opt
	}{
		{snapshots.LabelSnapshotUIDMapping, idLabels("0:100000", "0:1:2")},
		{snapshots.LabelSnapshotUIDMapping, idLabels("", "0:1:2")},
		{snapshots.LabelSnapshotUIDMapping, idLabels("5:100000:65536", "0:1:2")}, // root is not mapped
		{snapshots.LabelSnapshotGIDMapping, idLabels("0:1:2", "0:1:4294967295")},
		{snapshots.LabelSnapshotMaxSize, snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: "1000000"})},
	} {
		_, err := s.Prepare(s.ctx, "bad", "top", c.opt)
		if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), c.label) {
			t.Errorf("label %s: %v", c.label, err)
		}
		if s.exists("bad") {
			t.Error("there is a snapshot")
		}
	}
	s.clean()
}
