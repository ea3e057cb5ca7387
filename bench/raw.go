package bench

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The loops that are measured to the microsecond enter the kernel without telling Go's scheduler, as a C program would.
// Otherwise its watchdog takes the processor away from a call that lasts longer than 20 us, and the time to get it back is
// measured too. What can last long, such as a copy-up, goes through package unix.

// rawFile opens and closes one path again and again.
type rawFile struct{ path *byte }

func newRawFile(path string) (rawFile, error) {
	p, err := unix.BytePtrFromString(path)
	return rawFile{p}, err
}

func (f rawFile) open(flags int) (int, error) {
	dir := unix.AT_FDCWD
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(f.path)), uintptr(flags|unix.O_CLOEXEC), 0, 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

func rawClose(fd int) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func rawSeek(fd int, off int64) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_LSEEK, uintptr(fd), uintptr(off), unix.SEEK_SET); errno != 0 {
		return errno
	}
	return nil
}

// rawWrite writes all of b; less is an error.
func rawWrite(fd int, b []byte) error {
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	switch {
	case errno != 0:
		return errno
	case int(n) != len(b):
		return unix.EIO
	}
	return nil
}

// rawPread fills b; less is an error.
func rawPread(fd int, b []byte, off int64) error {
	n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(off), 0, 0)
	switch {
	case errno != 0:
		return errno
	case int(n) != len(b):
		return unix.EIO
	}
	return nil
}
