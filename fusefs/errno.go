package fusefs

import (
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// status makes the answer of an error. See "Errors" in the package comment for what it keeps from the kernel.
func (s *server) status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	errno, ok := err.(unix.Errno)
	if !ok && !errors.As(err, &errno) {
		s.opt.Logf("unexpected error, answered as EIO: %v", err)
		errno = unix.EIO
	}
	switch errno {
	case 0:
		return fuse.OK
	case unix.ENOSYS:
		errno = unix.EOPNOTSUPP
	case unix.EINTR:
		s.opt.Logf("interrupted system call, answered as EIO: %v", err)
		errno = unix.EIO
	}
	if errno == unix.EIO || errno == unix.EUCLEAN {
		s.errors.Add(1)
	}
	return fuse.Status(errno)
}

// errnoOf strips the operation and path that package os adds, which the caller's message names already.
func errnoOf(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
