package hostfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMkfsBesideDeadMount: a mount whose source cannot be looked at keeps no image from being made.
func TestMkfsBesideDeadMount(t *testing.T) {
	dir := t.TempDir()
	dead, on, image := filepath.Join(dir, "dead"), filepath.Join(dir, "on"), filepath.Join(dir, "image")
	for _, d := range []string{dead, on} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	err = unix.Mount("dead", dead, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd))
	unix.Close(fd) // the server's death
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dead, 0); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount(filepath.Join(dead, "source"), on, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(on, 0); err != nil {
			t.Error(err)
		}
	})
	if _, err := os.Stat(filepath.Join(dead, "source")); !errors.Is(err, unix.ENOTCONN) {
		t.Fatalf("the mount is not dead: %v", err)
	}
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := os.Truncate(image, 256<<20); err != nil {
		t.Fatal(err)
	}
	cmd := Mkfs("mkfs.btrfs", "-q", image)
	run(t, cmd[0], cmd[1:]...)
	magic := make([]byte, 8)
	if f, err = os.Open(image); err == nil {
		_, err = f.ReadAt(magic, 64<<10+64)
		f.Close()
	}
	if err != nil || string(magic) != "_BHRfS_M" {
		t.Errorf("the image's magic is %q, %v", magic, err)
	}
}
