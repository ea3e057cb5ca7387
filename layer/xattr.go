package layer

import (
	"bytes"
	"strconv"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxXattr is the kernel's bound on one attribute's value (XATTR_SIZE_MAX) and on a list of names (XATTR_LIST_MAX).
const maxXattr = 64 << 10

var xattrBufs = sync.Pool{New: func() any { return new([maxXattr]byte) }}

// struct xattr_args of linux/xattr.h, on a 64-bit machine.
type xattrArgs struct {
	value unsafe.Pointer
	size  uint32
	flags uint32
}

// hasXattrAt tells whether the kernel has getxattrat(2) and its family (Linux 6.13). Before that, or where a sandbox
// forbids them, a name in a directory is reached as /proc/self/fd/DIR/NAME.
var hasXattrAt = sync.OnceValue(func() bool {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		return false
	}
	_, err := getxattrat(unix.AT_FDCWD, ".", "user.lamina.probe", nil)
	return err != unix.ENOSYS && err != unix.EPERM
})

// atPath names an entry of an open directory for system calls that know no *at form.
func atPath(dirfd int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name
}

// fdPath names an open file.
func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func getxattrat(dirfd int, name, attr string, buf []byte) (int, error) {
	n, err := unix.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	a, err := unix.BytePtrFromString(attr)
	if err != nil {
		return 0, err
	}
	args := xattrArgs{value: unsafe.Pointer(unsafe.SliceData(buf)), size: uint32(len(buf))}
	r, _, e := unix.Syscall6(unix.SYS_GETXATTRAT, uintptr(dirfd), uintptr(unsafe.Pointer(n)), unix.AT_SYMLINK_NOFOLLOW,
		uintptr(unsafe.Pointer(a)), uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args))
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

func listxattrat(dirfd int, name string, buf []byte) (int, error) {
	n, err := unix.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	r, _, e := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(dirfd), uintptr(unsafe.Pointer(n)), unix.AT_SYMLINK_NOFOLLOW,
		uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// lgetxattr reads the attribute of an entry of dirfd, never following it.
func lgetxattr(dirfd int, name, attr string, buf []byte) (int, error) {
	if hasXattrAt() {
		return getxattrat(dirfd, name, attr, buf)
	}
	return unix.Lgetxattr(atPath(dirfd, name), attr, buf)
}

func llistxattr(dirfd int, name string, buf []byte) (int, error) {
	if hasXattrAt() {
		return listxattrat(dirfd, name, buf)
	}
	return unix.Llistxattr(atPath(dirfd, name), buf)
}

// readXattr returns the whole value, in memory of its own.
func readXattr(dirfd int, name, attr string) ([]byte, error) {
	var small [256]byte
	n, err := lgetxattr(dirfd, name, attr, small[:])
	if err == nil {
		return bytes.Clone(nonNil(small[:n])), nil
	}
	if err != unix.ERANGE {
		return nil, err
	}
	big := xattrBufs.Get().(*[maxXattr]byte)
	defer xattrBufs.Put(big)
	if n, err = lgetxattr(dirfd, name, attr, big[:]); err != nil {
		return nil, err
	}
	return bytes.Clone(nonNil(big[:n])), nil
}

// nonNil keeps the difference between an empty value and none through bytes.Clone.
func nonNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// eachXattr calls f with every attribute name of an entry, valid only during the call.
func eachXattr(dirfd int, name string, f func(attr []byte)) error {
	buf := xattrBufs.Get().(*[maxXattr]byte)
	defer xattrBufs.Put(buf)
	n, err := llistxattr(dirfd, name, buf[:512]) // the kernel allocates as much as it is offered
	if err == unix.ERANGE {
		n, err = llistxattr(dirfd, name, buf[:])
	}
	if err != nil {
		return err
	}
	for rest := buf[:n]; len(rest) > 0; {
		end := bytes.IndexByte(rest, 0)
		if end < 0 {
			return unix.EIO // a list that is not a list of terminated names
		}
		f(rest[:end])
		rest = rest[end+1:]
	}
	return nil
}
