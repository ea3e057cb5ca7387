package union

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"lamina/block"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// A mount ends also when a file cannot be saved: with the error, and with nothing left running.
func TestCloseWhenAFileCannotSettle(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), strings.Repeat("a", 20000)) })
	s.umount()
	routines := runtime.NumGoroutine()
	s.change = func(c *Config) {
		c.Engine.Close()
		c.Engine = block.NewEngine(block.Options{CaW: block.CaWLazy, SettleDelay: time.Hour, Logf: t.Logf})
	}
	s.mount()
	s.write("f", "X", 5000)                                    // the rest of the block is still below,
	must(t, os.Truncate(filepath.Join(s.lowers[0], "f"), 100)) // and then it is not
	err := s.fs.Close()
	s.fs = nil
	wantErr(t, err, unix.EIO)
	for i := 0; runtime.NumGoroutine() > routines; i++ {
		if i == 100 {
			t.Fatalf("%d goroutines after Close, %d before the mount", runtime.NumGoroutine(), routines)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A filesystem that cannot hold an upper layer is refused at once, by what it lacks. Kernel overlayfs is one: it cannot
// rename with a whiteout.
func TestUpperWithoutWhiteoutRenamesIsRefused(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"lower", "u", "w", "mnt"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	mnt := filepath.Join(dir, "mnt")
	must(t, unix.Mount("overlay", mnt, "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/u,workdir=%[1]s/w", dir)))
	t.Cleanup(func() { must(t, unix.Unmount(mnt, 0)) })
	for _, d := range []string{"upper", "work"} {
		must(t, os.Mkdir(filepath.Join(mnt, d), 0o755))
	}
	cfg := Config{Engine: newTestEngine(t.Logf),
		Lowers: []layer.Layer{openDir(t, filepath.Join(dir, "lower"), layer.Options{ReadOnly: true})},
		Upper:  openDir(t, filepath.Join(mnt, "upper"), layer.Options{}),
		Work:   openDir(t, filepath.Join(mnt, "work"), layer.Options{})}
	defer closeAll(cfg)
	_, err := New(cfg)
	if err == nil || !strings.Contains(err.Error(), "ext4, XFS, btrfs or tmpfs") {
		t.Fatalf("New on an upper of kernel overlayfs says %v", err)
	}
	t.Log(err)
}

// Without O_TMPFILE new objects are made under a temporary name.
func TestUpperWithoutTmpfile(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "f"), strings.Repeat("f", 9000))
		put(t, p(0, "l1"), "link")
		must(t, os.Link(p(0, "l1"), p(0, "l2")))
	})
	s.fs.noTmpfile = true
	s.write("f", "X", 0)
	s.write("l2", "X", 0)
	s.wantRead("l1", "Xink")
	list, err := os.ReadDir(filepath.Join(s.work(), tmpDir))
	must(t, err)
	if len(list) > 0 {
		t.Errorf("left in %s: %v", tmpDir, list)
	}
	s.remount()
	s.wantRead("f", "X"+strings.Repeat("f", 8999))
	s.wantRead("l1", "Xink")
}
