package block

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/hostfs"
	"lamina/tests/probe"
)

// onEveryFilesystem are the tests whose outcome depends on what the upper filesystem does with holes, preallocation,
// lengths and attributes.
var onEveryFilesystem = []struct {
	name string
	test func(*testing.T)
}{
	{"space", TestSpace},
	{"fsx sparse", func(t *testing.T) { runFsx(t, Options{Format: Sparse}, *opsFlag/2) }},
	{"fsx bcow", func(t *testing.T) { runFsx(t, Options{Format: BCoW}, *opsFlag/2) }},
	{"completion", TestCompletionInPlace},
	{"holes", TestCompleteKeepsHoles},
	{"errnos", TestFallocateErrnos},
	{"copy", TestCopyFrom},
	{"collapse", TestCollapseUnknown},
}

// TestFilesystems runs them on the filesystems that container hosts use besides the one below the tests' own directory.
func TestFilesystems(t *testing.T) {
	for _, fs := range []struct {
		name  string
		since [2]int
		mkfs  []string
	}{
		{"xfs", [2]int{2, 6}, []string{"mkfs.xfs", "-q", "-m", "reflink=1"}},
		{"btrfs", [2]int{2, 6}, []string{"mkfs.btrfs", "-q"}},
		{"tmpfs", [2]int{6, 6}, nil}, // trusted and user attributes on tmpfs
	} {
		t.Run(fs.name, func(t *testing.T) {
			probe.Filesystem(fs.name, fs.since).Need(t)
			t.Setenv("TMPDIR", scratch(t, fs.name, fs.mkfs))
			for _, x := range onEveryFilesystem {
				t.Run(x.name, x.test)
			}
		})
	}
}

// scratch mounts a new filesystem for the time of the test, and returns where.
func scratch(t *testing.T, name string, mkfs []string) string {
	t.Helper()
	dir := t.TempDir()
	at, img := dir+"/fs", dir+"/image"
	args := []string{"-t", name, "-o", "size=1g", "lamina-test", at}
	if err := errors.Join(os.Mkdir(at, 0o755), os.WriteFile(img, nil, 0o644), os.Truncate(img, 1<<30)); err != nil {
		t.Fatal(err)
	}
	if mkfs != nil {
		cmd := hostfs.Mkfs(append(mkfs, img)...)
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s (make test installs it)", mkfs[0], err, out)
		}
		args = []string{"-t", name, "-o", "loop", img, at}
	}
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Fatalf("mounting %s: %v: %s (run the tests as root)", name, err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmounting %s: %v", at, err)
			unix.Unmount(at, unix.MNT_DETACH)
		}
	})
	return at
}

// TestCollapseUnknown: where the filesystem cannot collapse or insert, the sketch says so without being completed first.
func TestCollapseUnknown(t *testing.T) {
	for _, mode := range []uint32{unix.FALLOC_FL_COLLAPSE_RANGE, unix.FALLOC_FL_INSERT_RANGE} {
		s := openUpper(t, t.TempDir()+"/probe")
		known := s.Fallocate(mode, 1, 1) != unix.EOPNOTSUPP
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		want := testContent(100_000)
		r := newRig(t, Options{}, want)
		err := r.f.Fallocate(mode, 4096, 8192)
		if known {
			if err != nil || r.f.Sketch() {
				t.Errorf("mode %#x: %v, sketch %v", mode, err, r.f.Sketch())
			}
			continue
		}
		if lower, _, _ := r.f.States(); err != unix.EOPNOTSUPP || lower != 25 {
			t.Errorf("mode %#x: %v, %d blocks still Lower", mode, err, lower)
		}
		r.expect(want)
	}
}
