package snapshotter_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/pool"
	"lamina/snapshotter"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
)

// store is a snapshotter on a root of its own, whose mounts and servers are gone when the test ends.
type store struct {
	t   testing.TB
	ctx context.Context
	dir string
	c   snapshotter.Config
	snapshots.Snapshotter
}

func newStore(t testing.TB, c snapshotter.Config) *store {
	t.Helper()
	dir := c.Root
	if dir == "" {
		dir = t.TempDir()
	}
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "test"), 20*time.Minute)
	s := &store{t: t, ctx: ctx, dir: dir, c: c}
	s.c.Root, s.c.Logf = filepath.Join(dir, "root"), t.Logf
	t.Cleanup(func() {
		defer cancel()
		s.stop()
		must(t, endPools(s.c.Root))
		if left := mountsBelow(t, dir); len(left) > 0 {
			t.Errorf("left mounted: %v", left)
			for _, m := range left {
				_ = unix.Unmount(m, unix.MNT_DETACH)
			}
		}
	})
	s.open()
	return s
}

// open starts a snapshotter in this process.
func (s *store) open() {
	s.t.Helper()
	sn, err := snapshotter.New(s.c)
	must(s.t, err)
	s.Snapshotter = sn
}

func (s *store) stop() {
	if s.Snapshotter != nil {
		must(s.t, s.Close())
		s.Snapshotter = nil
	}
}

func (s *store) path(elem ...string) string {
	return filepath.Join(append([]string{s.c.Root}, elem...)...)
}

func mountsBelow(t testing.TB, dir string) (below []string) {
	t.Helper()
	info, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); strings.HasPrefix(f[1], dir+"/") {
			below = append(below, f[1])
		}
	}
	return below
}

var gcRoot = snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"})

// layer unpacks a layer as an image's, and commits it under its name.
func (s *store) layer(name, parent string, fill func(dir string)) {
	s.t.Helper()
	key := snapshots.UnpackKeyPrefix + "-1 " + name
	mounts, err := s.Prepare(s.ctx, key, parent, gcRoot)
	must(s.t, err)
	s.with(mounts, fill)
	must(s.t, s.Commit(s.ctx, name, key, gcRoot))
}

// with mounts as an engine does, and unmounts.
func (s *store) with(mounts []mount.Mount, do func(dir string)) {
	s.t.Helper()
	target, err := os.MkdirTemp(s.dir, "mounted-")
	must(s.t, err)
	defer os.Remove(target)
	must(s.t, mount.All(mounts, target))
	defer func() { must(s.t, mount.UnmountAll(target, 0)) }()
	do(target)
}

// container prepares one, and has do something in it.
func (s *store) container(key, parent string, do func(dir string), opts ...snapshots.Opt) {
	s.t.Helper()
	mounts, err := s.Prepare(s.ctx, key, parent, append(opts, gcRoot)...)
	must(s.t, err)
	s.with(mounts, do)
}

// again has something done in a container that was prepared.
func (s *store) again(key string, do func(dir string)) {
	s.t.Helper()
	mounts, err := s.Mounts(s.ctx, key)
	must(s.t, err)
	s.with(mounts, do)
}

// view has something done with a layer.
func (s *store) view(parent string, do func(dir string)) {
	s.t.Helper()
	mounts, err := s.View(s.ctx, "view of "+parent, parent, gcRoot)
	must(s.t, err)
	s.with(mounts, do)
	must(s.t, s.Remove(s.ctx, "view of "+parent))
}

// diff is the layer that an engine would export for a snapshot.
func (s *store) diff(parent string, upper []mount.Mount) []byte {
	s.t.Helper()
	var b bytes.Buffer
	s.view(parent, func(lower string) {
		s.with(readOnly(upper), func(dir string) { must(s.t, archive.WriteDiff(s.ctx, &b, lower, dir)) })
	})
	return b.Bytes()
}

// readOnly mounts are what containerd's differ makes of a container's.
func readOnly(mounts []mount.Mount) []mount.Mount {
	out := []mount.Mount{}
	for _, m := range mounts {
		m.Options = append([]string(nil), m.Options...)
		for i, o := range m.Options {
			if o == "rw" {
				m.Options[i] = "ro"
			}
		}
		out = append(out, m)
	}
	return out
}

// served lists the mount points of the pools' servers.
func (s *store) served() (mounts []string) {
	s.t.Helper()
	sockets, err := filepath.Glob(s.path("run", "*.sock"))
	must(s.t, err)
	for _, socket := range sockets {
		c := pool.Client{Socket: socket}
		reply, err := c.Do(s.ctx, pool.Request{Op: pool.OpList})
		c.Close()
		if !errors.Is(err, pool.ErrNoServer) {
			must(s.t, err)
		}
		mounts = append(mounts, reply.Mounts...)
	}
	return mounts
}

// clean fails if the root holds anything that no snapshot is known for, or a snapshot is not complete.
func (s *store) clean() {
	s.t.Helper()
	known := 0
	must(s.t, s.Walk(s.ctx, func(context.Context, snapshots.Info) error { known++; return nil }))
	dirs, err := os.ReadDir(s.path("snapshots"))
	must(s.t, err)
	if len(dirs) != known {
		s.t.Errorf("%d snapshots are known, and there are %v", known, dirs)
	}
	for _, d := range dirs {
		if _, err := os.Stat(s.path("snapshots", d.Name(), "fs")); err != nil {
			s.t.Errorf("a snapshot is not complete: %v", err)
		}
	}
	mnts, err := os.ReadDir(s.path("mnt"))
	must(s.t, err)
	for _, m := range mnts {
		if _, err := os.Stat(s.path("snapshots", m.Name())); err != nil {
			s.t.Errorf("a mount point without a snapshot: %v", err)
		}
	}
}

func write(t testing.TB, path, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), 0o644))
}

// overwrite changes bytes in place.
func overwrite(t testing.TB, path, text string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte(text), off)
	must(t, err)
}

func want(t testing.TB, path, text string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || string(b) != text {
		t.Errorf("%s: %d bytes %.40q, %v; want %d bytes %.40q", path, len(b), b, err, len(text), text)
	}
}

// fixTimes makes what was changed look the same whenever it was.
func fixTimes(t testing.TB, dir string, since time.Time) {
	t.Helper()
	fixed := unix.NsecToTimeval(time.Date(2020, 2, 2, 2, 2, 2, 0, time.UTC).UnixNano())
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil || info.ModTime().Before(since) {
			return err
		}
		return unix.Lutimes(path, []unix.Timeval{fixed, fixed})
	}))
}
