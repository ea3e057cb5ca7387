package block

import (
	"errors"
	"io"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fdStore is the Store over a kernel descriptor. Every call is retried on EINTR: the Go runtime's own SIGURG must not
// become an application's error.
type fdStore struct {
	num            atomic.Int32 // the descriptor; -1 once closed, so that a late call meets EBADF and never another file
	header, origin string       // xattr names
}

var _ Store = (*fdStore)(nil)

// OpenStore wraps the descriptor of an upper file, which it owns from then on. headerXattr and originXattr are the full
// names of the attributes that hold the sketch's header and, once it is complete, its origin.
func OpenStore(fd int, headerXattr, originXattr string) Store {
	s := &fdStore{header: headerXattr, origin: originXattr}
	s.num.Store(int32(fd))
	return s
}

func retry(op func() error) error {
	for {
		if err := op(); err != unix.EINTR {
			return err
		}
	}
}

func (s *fdStore) FD() int { return int(s.num.Load()) }

// Close closes the descriptor. A second Close is EBADF and harmless.
func (s *fdStore) Close() error { return unix.Close(int(s.num.Swap(-1))) }

func (s *fdStore) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pread(s.FD(), p[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, err
		case m == 0:
			return n, io.EOF
		default:
			n += m
		}
	}
	return n, nil
}

func (s *fdStore) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pwrite(s.FD(), p[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, err
		case m == 0:
			return n, unix.EIO
		default:
			n += m
		}
	}
	return n, nil
}

func (s *fdStore) Stat() (st unix.Stat_t, err error) {
	err = retry(func() error { return unix.Fstat(s.FD(), &st) })
	return st, err
}

func (s *fdStore) Truncate(size int64) error {
	return retry(func() error { return unix.Ftruncate(s.FD(), size) })
}

func (s *fdStore) Fallocate(mode uint32, off, n int64) error {
	return retry(func() error { return unix.Fallocate(s.FD(), mode, off, n) })
}

func (s *fdStore) Seek(off int64, whence int) (pos int64, err error) {
	err = retry(func() error { pos, err = unix.Seek(s.FD(), off, whence); return err })
	return pos, err
}

func (s *fdStore) Sync() error { return retry(func() error { return unix.Fsync(s.FD()) }) }

func (s *fdStore) SyncData() error { return retry(func() error { return unix.Fdatasync(s.FD()) }) }

// Order writes every dirty page out and waits until the device has taken them. All three flags together make the kernel
// write pages, too, that were changed while somebody else wrote them.
func (s *fdStore) Order() error {
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	return retry(func() error { return unix.SyncFileRange(s.FD(), 0, 0, all) })
}

func (s *fdStore) Header() ([]byte, error) {
	var buf [headerMax]byte
	for b := buf[:]; ; {
		n, err := unix.Fgetxattr(s.FD(), s.header, b)
		switch {
		case err == unix.EINTR:
		case err == unix.ENODATA, errors.Is(err, unix.EOPNOTSUPP):
			return nil, nil
		case err == unix.ERANGE && len(b) < 1<<16:
			b = make([]byte, 1<<16)
		case err != nil:
			return nil, err
		default:
			return append(make([]byte, 0, n), b[:n]...), nil
		}
	}
}

func (s *fdStore) SetHeader(b []byte) error {
	return retry(func() error { return unix.Fsetxattr(s.FD(), s.header, b, 0) })
}

func (s *fdStore) SetOrigin(b []byte) error {
	return retry(func() error { return unix.Fsetxattr(s.FD(), s.origin, b, 0) })
}

func (s *fdStore) RemoveHeader() error {
	err := retry(func() error { return unix.Fremovexattr(s.FD(), s.header) })
	if err == unix.ENODATA {
		return nil
	}
	return err
}

// SetTimes is futimens(3), which is utimensat(2) without a path.
func (s *fdStore) SetTimes(atime, mtime unix.Timespec) error {
	ts := [2]unix.Timespec{atime, mtime}
	return retry(func() error {
		_, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(s.FD()), 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
		if e != 0 {
			return e
		}
		return nil
	})
}
