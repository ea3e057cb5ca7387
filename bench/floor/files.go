package floor

import (
	"math"
	"strconv"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Open files. A handle is the number of a descriptor.

const writing = unix.O_WRONLY | unix.O_RDWR | unix.O_TRUNC

func (f *loopback) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	f.enter()
	defer f.leave()
	n, err := f.node(in.NodeId)
	if err != nil {
		return status(err)
	}
	flags := int(in.Flags) & (unix.O_ACCMODE | unix.O_TRUNC)
	n.mu.Lock()
	defer n.mu.Unlock()
	if flags&writing != 0 && n.kind < whole {
		n.written(flags&unix.O_TRUNC != 0, func() int64 { return f.size(n) })
	}
	fd, err := f.openFile(n, flags)
	if err != nil {
		return status(err)
	}
	f.admit(n, fd, flags, out)
	return fuse.OK
}

// written decides what a file is from its first opening for writing on. The caller holds n.mu.
func (n *node) written(complete bool, size func() int64) {
	switch {
	case complete:
		n.kind = whole
	case n.kind >= whole:
	case size() <= wholeMax:
		n.kind = whole
	default:
		n.kind = partly
	}
}

func (f *loopback) size(n *node) int64 {
	parent, name, err := f.parent(n)
	if err != nil {
		return math.MaxInt64
	}
	var st unix.Stat_t
	if unix.Fstatat(parent, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return math.MaxInt64
	}
	return st.Size
}

// openFile opens a file. The caller holds n.mu.
func (f *loopback) openFile(n *node, flags int) (int, error) {
	parent, name, err := f.parent(n)
	if err == nil {
		return unix.Openat(parent, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}
	if len(n.open) == 0 {
		return -1, err
	}
	return unix.Open("/proc/self/fd/"+strconv.Itoa(n.open[0]), flags|unix.O_CLOEXEC, 0)
}

// admit says how the kernel is to treat a descriptor. As long as one is open, all are treated alike (fusefs, iomode.go).
// The caller holds n.mu.
func (f *loopback) admit(n *node, fd, flags int, out *fuse.OpenOut) {
	n.open = append(n.open, fd)
	out.Fh = uint64(fd)
	if n.passed == 0 && n.cached == 0 && f.mayPass(n, fd) {
		if id, errno := f.server.RegisterBackingFd(&fuse.BackingMap{Fd: int32(fd)}); errno == 0 {
			n.backing = id
		}
	}
	if n.backing != 0 {
		n.passed++
		out.OpenFlags, out.BackingID = fuse.FOPEN_PASSTHROUGH|fuse.FOPEN_NOFLUSH, n.backing
		return
	}
	n.cached++
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	if flags&writing == 0 {
		out.OpenFlags |= fuse.FOPEN_NOFLUSH
	}
}

func (f *loopback) mayPass(n *node, fd int) bool {
	switch f.pass {
	case PassAll:
		return true
	case PassNone:
		return false
	}
	if n.kind == lower {
		var magic [4]byte
		if _, err := unix.Pread(fd, magic[:], 0); err == nil && string(magic[:]) == "\x7fELF" {
			n.kind = image
		}
	}
	return n.kind == whole || n.kind == image
}

func (f *loopback) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	return f.create(in, name, out, int(in.Flags)&(unix.O_ACCMODE|unix.O_TRUNC|unix.O_EXCL)|unix.O_CREAT|unix.O_NOFOLLOW)
}

func (f *loopback) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	return f.create(in, "", out, int(in.Flags)&(unix.O_ACCMODE|unix.O_EXCL)|unix.O_TMPFILE)
}

// create makes a file; without a name a nameless one.
func (f *loopback) create(in *fuse.CreateIn, name string, out *fuse.CreateOut, flags int) fuse.Status {
	f.enter()
	defer f.leave()
	dir, parent, err := f.dirOf(in.NodeId)
	if err != nil {
		return status(err)
	}
	at := name
	if at == "" {
		at = "."
	}
	fd, err := unix.Openat(parent, at, flags|unix.O_CLOEXEC, in.Mode&^in.Umask&0o7777)
	if err != nil {
		return status(err)
	}
	if in.Uid != 0 || in.Gid != 0 {
		err = unix.Fchown(fd, int(in.Uid), int(in.Gid))
	}
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err != nil {
		unix.Close(fd)
		return status(err)
	}
	n := f.seen(dir, name, &st)
	describe(n, &st, &out.EntryOut)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.kind = whole
	f.admit(n, fd, flags, &out.OpenOut)
	return fuse.OK
}

func (f *loopback) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	fd := int(in.Fh)
	if n, err := f.node(in.NodeId); err == nil {
		n.mu.Lock()
		for i := range n.open {
			if n.open[i] == fd {
				n.open = append(n.open[:i], n.open[i+1:]...)
				break
			}
		}
		switch {
		case n.backing == 0:
			n.cached--
		case n.passed == 1:
			_ = f.server.UnregisterBackingFd(n.backing)
			n.passed, n.backing = 0, 0
		default:
			n.passed--
		}
		n.mu.Unlock()
	}
	unix.Close(fd)
}

func (f *loopback) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, code := f.ReadInto(cancel, in, buf)
	return fuse.ReadResultData(buf[:n]), code
}

// ReadInto is Read for a transport whose buffer is the answer (uring.Reader).
func (f *loopback) ReadInto(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (int, fuse.Status) {
	n, err := unix.Pread(int(in.Fh), buf, int64(in.Offset))
	return max(n, 0), status(err)
}

func (f *loopback) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n, err := unix.Pwrite(int(in.Fh), data, int64(in.Offset))
	return uint32(max(n, 0)), status(err)
}

func (f *loopback) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	from, to := int64(in.OffIn), int64(in.OffOut)
	n, err := unix.CopyFileRange(int(in.FhIn), &from, int(in.FhOut), &to, int(min(in.Len, math.MaxInt32&^4095)), 0)
	return uint32(max(n, 0)), status(err)
}

// fdatasync is FUSE_FSYNC_FDATASYNC.
const fdatasync = 1

func (f *loopback) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if in.FsyncFlags&fdatasync != 0 {
		return status(unix.Fdatasync(int(in.Fh)))
	}
	return status(unix.Fsync(int(in.Fh)))
}

func (f *loopback) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	return status(unix.Fallocate(int(in.Fh), in.Mode, int64(in.Offset), int64(in.Length)))
}

func (f *loopback) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	off, err := unix.Seek(int(in.Fh), int64(in.Offset), int(in.Whence))
	out.Offset = uint64(off)
	return status(err)
}

func (f *loopback) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Ioctl: ENOTTY is what the kernel says of a filesystem without ioctls.
func (f *loopback) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(unix.ENOTTY)
}
