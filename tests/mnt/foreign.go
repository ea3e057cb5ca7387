package mnt

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// HungFUSE mounts a FUSE filesystem that answers nobody on dir, until the test ends: whoever looks at it waits.
func HungFUSE(t testing.TB, dir string) {
	t.Helper()
	fd := mountFUSE(t, dir)
	t.Cleanup(func() { unix.Close(fd) }) // who waits gets ENOTCONN
}

// DeadFUSE mounts a FUSE filesystem whose server is gone on dir, until the test ends: whoever looks at it gets ENOTCONN.
func DeadFUSE(t testing.TB, dir string) {
	t.Helper()
	unix.Close(mountFUSE(t, dir))
}

func mountFUSE(t testing.TB, dir string) (fd int) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("foreign", dir, "fuse.foreign", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("%s: %v", dir, err)
		}
	})
	return fd
}
