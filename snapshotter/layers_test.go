package snapshotter_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/pool"
	"lamina/snapshotter"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"golang.org/x/sys/unix"
)

var big = strings.Repeat("the lower file's\n", 1<<16) // 1 MiB and a bit: written to, it is a sketch

// image is what most tests start from: two layers.
func (s *store) image() {
	s.t.Helper()
	old := time.Now()
	s.layer("base", "", func(dir string) {
		write(s.t, dir+"/big", big)
		write(s.t, dir+"/etc/passwd", "root:x:0:0\n")
		write(s.t, dir+"/gone", "gone")
		write(s.t, dir+"/tree/a", "a")
		write(s.t, dir+"/tree/sub/b", "b")
		write(s.t, dir+"/links/one", big)
		must(s.t, os.Link(dir+"/links/one", dir+"/links/two"))
		must(s.t, os.Symlink("passwd", dir+"/etc/link"))
		must(s.t, os.Mkdir(dir+"/empty", 0o700))
		fixTimes(s.t, dir, old)
	})
	s.layer("top", "base", func(dir string) {
		write(s.t, dir+"/etc/hosts", "localhost\n")
		must(s.t, os.Remove(dir+"/gone"))
		fixTimes(s.t, dir, old)
	})
}

// An image layer is unpacked without FUSE, and a view of an image is not Lamina's.
func TestUnpackIsPlain(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	mounts, err := s.Prepare(s.ctx, "default/7/extract-123-abc sha256:top", "top")
	must(t, err)
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		t.Errorf("unpacking: %+v", mounts)
	}
	mounts, err = s.View(s.ctx, "view", "top")
	must(t, err)
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		t.Errorf("view: %+v", mounts)
	}
	if served := s.served(); len(served) > 0 {
		t.Errorf("served: %v", served)
	}
}

// A committed container is a delta of blocks, below another container and below an image layer that is unpacked on it.
func TestCommitKeepsSketches(t *testing.T) {
	for _, format := range []string{"sparse", "bcow"} {
		t.Run(format, func(t *testing.T) {
			s := newStore(t, snapshotter.Config{Options: []string{"format=" + format}})
			s.image()
			s.container("c1", "top", func(dir string) {
				overwrite(t, dir+"/big", "XYZ", 500_000)
				overwrite(t, dir+"/links/one", "LINK", 9)
				write(t, dir+"/new", "new")
				must(t, os.RemoveAll(dir+"/tree/sub"))
				must(t, os.Rename(dir+"/etc", dir+"/conf"))
			})
			must(t, s.Commit(s.ctx, "committed", "c1", gcRoot))
			if served := s.served(); len(served) > 0 {
				t.Errorf("still served: %v", served)
			}
			u, err := s.Usage(s.ctx, "committed")
			must(t, err)
			if u.Size == 0 || u.Size > 200_000 {
				t.Errorf("three bytes in each of two files of %d take %d bytes", len(big), u.Size)
			}
			changed := big[:500_000] + "XYZ" + big[500_003:]
			linked := big[:9] + "LINK" + big[13:]
			check := func(dir string) {
				t.Helper()
				want(t, dir+"/big", changed)
				want(t, dir+"/links/one", linked)
				want(t, dir+"/links/two", linked)
				want(t, dir+"/new", "new")
				want(t, dir+"/conf/hosts", "localhost\n")
				for _, gone := range []string{"gone", "etc", "tree/sub"} {
					if _, err := os.Lstat(dir + "/" + gone); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("%s: %v", gone, err)
					}
				}
			}
			s.view("committed", check)
			s.container("c2", "committed", func(dir string) {
				check(dir)
				overwrite(t, dir+"/big", "abc", 500_002)
				changed = changed[:500_002] + "abc" + changed[500_005:]
				check(dir)
			})
			must(t, s.Commit(s.ctx, "twice", "c2", gcRoot))
			s.view("twice", check)
			// An image layer on top of sketches is written through Lamina.
			s.layer("unpacked", "twice", func(dir string) {
				check(dir)
				must(t, os.Remove(dir+"/new"))
				write(t, dir+"/new", "newer")
				must(t, os.Chmod(dir+"/big", 0o600))
			})
			s.view("unpacked", func(dir string) {
				want(t, dir+"/big", changed)
				want(t, dir+"/new", "newer")
				if st, err := os.Stat(dir + "/big"); err != nil || st.Mode() != 0o600 {
					t.Errorf("big: %v, %v", st.Mode(), err)
				}
			})
			s.clean()
		})
	}
}

// changes is what a container may do to its image, some of each kind.
func changes(t testing.TB, dir string) {
	began := time.Now()
	overwrite(t, dir+"/big", "changed in place", 123_456)
	must(t, os.Remove(dir+"/links/two")) // two names of one file become two files on overlayfs, which Lamina does not imitate
	write(t, dir+"/etc/passwd", "root:x:0:0\nuser:x:1:1\n")
	write(t, dir+"/new/deep/file", strings.Repeat("new\n", 10_000))
	must(t, os.Chmod(dir+"/etc/hosts", 0o600))
	must(t, os.Chown(dir+"/tree/a", 5, 6))
	must(t, os.RemoveAll(dir+"/tree/sub"))
	must(t, os.Mkdir(dir+"/tree/sub", 0o750)) // opaque
	write(t, dir+"/tree/sub/other", "other")
	must(t, os.Remove(dir+"/etc/link"))
	must(t, os.Symlink("/nowhere", dir+"/etc/link"))
	must(t, os.Link(dir+"/new/deep/file", dir+"/new/hard"))
	must(t, unix.Mkfifo(dir+"/fifo", 0o640))
	must(t, os.Chmod(dir+"/fifo", 0o640))
	must(t, unix.Mknod(dir+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must(t, unix.Setxattr(dir+"/big", "user.note", []byte("x"), 0))
	must(t, unix.Setxattr(dir+"/etc/hosts", "security.capability", []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	must(t, os.Truncate(dir+"/links/one", 700_000))
	must(t, os.Remove(dir+"/empty"))
	fixTimes(t, dir, began)
}

// What an engine exports of a container is byte for byte what it exports of one on kernel overlayfs, before the commit, and
// after it.
func TestDiffIsOverlayfs(t *testing.T) {
	ours := newStore(t, snapshotter.Config{Options: []string{"format=bcow"}})
	theirs := &store{t: t, ctx: ours.ctx, dir: t.TempDir()}
	theirs.c.Root = theirs.dir
	var err error
	theirs.Snapshotter, err = overlay.NewSnapshotter(theirs.dir)
	must(t, err)
	defer theirs.Close()
	var diffs [2][2][]byte
	for i, s := range []*store{theirs, ours} {
		s.image()
		s.container("c", "top", func(dir string) { changes(t, dir) })
		upper, err := s.Mounts(s.ctx, "c")
		must(t, err)
		diffs[i][0] = s.diff("top", upper)
		must(t, s.Commit(s.ctx, "committed", "c", gcRoot))
		upper, err = s.View(s.ctx, "v", "committed", gcRoot)
		must(t, err)
		diffs[i][1] = s.diff("top", upper)
		must(t, s.Remove(s.ctx, "v"))
	}
	for j, when := range []string{"of the container", "of its commit"} {
		if !bytes.Equal(diffs[0][j], diffs[1][j]) {
			t.Errorf("the export %s differs:\noverlayfs:\n%s\nlamina:\n%s", when, tarList(diffs[0][j]), tarList(diffs[1][j]))
		}
	}
	// It is complete: unpacked elsewhere it gives the same tree.
	ours.layer("imported", "top", func(dir string) {
		_, err := archive.Apply(ours.ctx, dir, bytes.NewReader(diffs[1][1]))
		must(t, err)
	})
	ours.view("imported", func(dir string) {
		b, err := os.ReadFile(dir + "/big")
		must(t, err)
		if string(b) != big[:123_456]+"changed in place"+big[123_472:] {
			t.Error("the imported layer's big file is not the container's")
		}
	})
}

// A mount that another process has in use cannot be committed; nothing is lost by trying.
func TestCommitInUse(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	s.container("c", "top", func(dir string) {
		overwrite(t, dir+"/big", "XYZ", 500_000)
		err := s.Commit(s.ctx, "early", "c")
		if err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("commit while mounted on %s: %v", dir, err)
		}
		overwrite(t, dir+"/big", "abc", 0)
	})
	must(t, s.Commit(s.ctx, "late", "c"))
	s.view("late", func(dir string) { want(t, dir+"/big", "abc"+big[3:500_000]+"XYZ"+big[500_003:]) })
}

// The snapshotter may end and begin anew: mounts stay, and it finds them. After a reboot it makes them again.
func TestRestart(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	s.container("c", "top", func(dir string) {
		f, err := os.OpenFile(dir+"/big", os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		s.stop()
		_, err = f.WriteAt([]byte("alone"), 700_000)
		must(t, err)
		s.open()
		_, err = f.WriteAt([]byte("again"), 700_005)
		must(t, err)
		before := s.served()
		s.again("c", func(dir string) { want(t, dir+"/big", big[:700_000]+"aloneagain"+big[700_010:]) })
		if after := s.served(); len(before) != 1 || len(after) != 1 {
			t.Errorf("served before: %v, after: %v", before, after)
		}
	})
	// A reboot: no mounts, no servers.
	s.stop()
	must(t, endPools(s.c.Root))
	s.open()
	if served := s.served(); len(served) > 0 {
		t.Errorf("served before anybody asked: %v", served)
	}
	s.again("c", func(dir string) { want(t, dir+"/big", big[:700_000]+"aloneagain"+big[700_010:]) })
	must(t, s.Remove(s.ctx, "c"))
	s.clean()
}

// Pools are the containerd namespaces, or what the label says.
func TestPools(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	label := snapshots.WithLabels(map[string]string{snapshotter.LabelPool: "tenant-7"})
	s.container("c1", "top", func(string) {})
	s.container("c2", "top", func(string) {}, label)
	_, err := s.Prepare(namespaces.WithNamespace(s.ctx, "k8s.io"), "c3", "top")
	must(t, err)
	sockets, err := filepath.Glob(s.path("run", "*.sock"))
	must(t, err)
	if got := fmt.Sprint(sockets); got != fmt.Sprint([]string{s.path("run/k8s.io.sock"), s.path("run/tenant-7.sock"), s.path("run/test.sock")}) {
		t.Errorf("pools: %v", got)
	}
	for _, bad := range []string{"../x", ".x", "a/b", strings.Repeat("x", 65)} {
		if _, err := s.Prepare(s.ctx, "bad", "top", snapshots.WithLabels(map[string]string{snapshotter.LabelPool: bad})); err == nil || !strings.Contains(err.Error(), snapshotter.LabelPool) {
			t.Errorf("pool %q: %v", bad, err)
		}
	}
	s.clean()
}

// A removed container whose mount is still in use is served until it is not.
func TestRemoveInUse(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	s.container("c", "top", func(dir string) {
		f, err := os.OpenFile(dir+"/big", os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		must(t, s.Remove(s.ctx, "c"))
		if _, err := s.Mounts(s.ctx, "c"); err == nil {
			t.Error("a removed snapshot has mounts")
		}
		b := make([]byte, 17)
		if _, err := f.ReadAt(b, 0); err != nil || string(b) != big[:17] {
			t.Errorf("reading on: %q, %v", b, err)
		}
	})
	s.clean()
	s.container("c", "top", func(dir string) { want(t, dir+"/big", big) })
}

// tarList shows what is in an archive.
func tarList(b []byte) string {
	var out strings.Builder
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err != nil {
			return out.String()
		}
		fmt.Fprintf(&out, "%c %s -> %q mode %o owner %d:%d size %d time %v %v\n", h.Typeflag, h.Name, h.Linkname, h.Mode, h.Uid, h.Gid, h.Size, h.ModTime.UTC(), h.PAXRecords)
	}
}

// killServer kills the server of the pool, and waits until it is gone.
func (s *store) killServer() {
	s.t.Helper()
	c := pool.Client{Socket: s.path("run", "test.sock")}
	defer c.Close()
	reply, err := c.Do(s.ctx, pool.Request{Op: pool.OpList})
	must(s.t, err)
	must(s.t, unix.Kill(reply.PID, unix.SIGKILL))
	must(s.t, eventually(func() error {
		if _, err := c.Do(s.ctx, pool.Request{Op: pool.OpList}); !errors.Is(err, pool.ErrNoServer) {
			return fmt.Errorf("the server is still there: %w", err)
		}
		return nil
	}))
}

// When a pool's server was killed, the next request mounts anew, and what was synced is there.
func TestServerKilled(t *testing.T) {
	t.Setenv(pool.RuntimeDirVariable, t.TempDir()+"/run") // where who is killed leaves his sockets
	s := newStore(t, snapshotter.Config{})
	s.image()
	s.container("c", "top", func(dir string) {
		f, err := os.OpenFile(dir+"/big", os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		_, err = f.WriteAt([]byte("XYZ"), 500_000)
		must(t, errors.Join(err, f.Sync()))
	})
	changed := big[:500_000] + "XYZ" + big[500_003:]
	s.killServer()
	s.again("c", func(dir string) { want(t, dir+"/big", changed) })
	s.killServer()
	must(t, s.Commit(s.ctx, "committed", "c", gcRoot))
	s.view("committed", func(dir string) { want(t, dir+"/big", changed) })
	s.container("c", "top", func(string) {})
	s.killServer()
	must(t, s.Remove(s.ctx, "c"))
	s.clean()
}
