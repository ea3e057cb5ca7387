package uring

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What follows is as much of io_uring as FUSE needs: one submission entry at a time, waiting, completion entries. Numbers
// and layouts are those of include/uapi/linux/io_uring.h, Linux 6.14.

const (
	setupCQSize       = 1 << 3
	setupClamp        = 1 << 4
	setupSubmitAll    = 1 << 7
	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1

	enterGetEvents = 1 << 0

	offSQRing = 0
	offSQEs   = 0x10000000

	sqeRead     = 22
	sqeURingCmd = 46

	sqeSize = 128
	cqeSize = 16
)

// sqe is struct io_uring_sqe of a ring with 128-byte entries.
type sqe struct {
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64 // for URING_CMD: the command in the low half
	addr     uint64
	len      uint32
	opFlags  uint32
	userData uint64
	bufIndex uint16
	_        uint16
	_        uint32
	cmd      [80]byte
}

// cqe is struct io_uring_cqe.
type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

type ringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	_                                                                      [3]uint32
	sq                                                                     struct {
		head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
		_                                                           uint64
	}
	cq struct {
		head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
		_                                                           uint64
	}
}

// ring is one io_uring. All methods but close belong to the thread that made it (IORING_SETUP_SINGLE_ISSUER): work that
// the kernel has for it runs in that thread when it waits, and nowhere else (IORING_SETUP_DEFER_TASKRUN).
type ring struct {
	fd      int
	rings   []byte // both rings: IORING_FEAT_SINGLE_MMAP, Linux 5.4
	entries []byte // the submission entries

	sqTail, sqHead *uint32
	sqMask         uint32
	tail           uint32 // of submissions, also those the kernel has not been told of

	cqHead, cqTail *uint32
	cqMask         uint32
	cqes           unsafe.Pointer
}

// newRing makes a ring for submissions of 8 entries at a time and completions of size entries before the kernel has to
// keep some aside. The calling thread becomes its owner.
func newRing(size uint32) (*ring, error) {
	p := ringParams{
		flags:     setupCQSize | setupClamp | setupSubmitAll | setupSQE128 | setupSingleIssuer | setupDeferTaskrun,
		cqEntries: size,
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 8, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, setupError(errno)
	}
	r := &ring{fd: int(fd)}
	if p.features&(featSingleMmap|featNoDrop) != featSingleMmap|featNoDrop {
		r.close()
		return nil, fmt.Errorf("%w: io_uring lacks single mapping or lossless completions: Linux 6.14 has them", ErrNotSupported)
	}
	if err := r.mmap(&p); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// setupError explains a refused io_uring_setup(2).
func setupError(errno unix.Errno) error {
	switch errno {
	case unix.ENOSYS:
		return fmt.Errorf("%w: this kernel has no io_uring", ErrNotSupported)
	case unix.EINVAL:
		return fmt.Errorf("%w: this kernel's io_uring is too old: Linux 6.14 is needed", ErrNotSupported)
	case unix.EPERM:
		return fmt.Errorf("%w: io_uring is forbidden here: look at the sysctl kernel.io_uring_disabled and at the seccomp profile", ErrNotSupported)
	}
	return fmt.Errorf("io_uring_setup: %w", errno)
}

func (r *ring) mmap(p *ringParams) error {
	size := max(int(p.sq.array+p.sqEntries*4), int(p.cq.cqes+p.cqEntries*cqeSize))
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	var err error
	if r.rings, err = unix.Mmap(r.fd, offSQRing, size, prot, flags); err != nil {
		return fmt.Errorf("mapping an io_uring: %w", err)
	}
	if r.entries, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries)*sqeSize, prot, flags); err != nil {
		return fmt.Errorf("mapping an io_uring: %w", err)
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqHead, r.sqTail, r.sqMask = word(p.sq.head), word(p.sq.tail), *word(p.sq.ringMask)
	r.cqHead, r.cqTail, r.cqMask = word(p.cq.head), word(p.cq.tail), *word(p.cq.ringMask)
	r.cqes = unsafe.Pointer(&r.rings[p.cq.cqes])
	for i := range p.sqEntries { // submission n is always entry n
		*word(p.sq.array + 4*i) = i
	}
	r.tail = *r.sqTail
	return nil
}

// close may be called by any thread once nothing uses the ring.
func (r *ring) close() {
	if r.entries != nil {
		_ = unix.Munmap(r.entries)
	}
	if r.rings != nil {
		_ = unix.Munmap(r.rings)
	}
	unix.Close(r.fd)
}

// next gives a zeroed entry to fill in. It is submitted by the next enter.
func (r *ring) next() (*sqe, error) {
	for r.queued() > r.sqMask {
		if err := r.enter(0); err != nil {
			return nil, err
		}
	}
	e := (*sqe)(unsafe.Pointer(&r.entries[(r.tail&r.sqMask)*sqeSize]))
	*e = sqe{}
	r.tail++
	return e, nil
}

// queued is how many submissions the kernel has not taken yet.
func (r *ring) queued() uint32 { return r.tail - atomic.LoadUint32(r.sqHead) }

// enter submits what is queued and waits until at least wait completions are there. It may return early: a signal ended
// the wait, or the kernel could not take everything. Both are seen at the next call.
func (r *ring) enter(wait uint32) error {
	atomic.StoreUint32(r.sqTail, r.tail)
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.queued()), uintptr(wait), enterGetEvents, 0, 0)
	switch errno {
	case 0, unix.EINTR:
		return nil
	case unix.EAGAIN, unix.EBUSY: // short of memory, or completions have to be taken first
		runtime.Gosched()
		return nil
	}
	return fmt.Errorf("io_uring_enter: %w", errno)
}

// pending says whether a completion is there.
func (r *ring) pending() bool { return *r.cqHead != atomic.LoadUint32(r.cqTail) }

// take removes the oldest completion. The caller has seen one pending.
func (r *ring) take() cqe {
	head := *r.cqHead
	c := *(*cqe)(unsafe.Add(r.cqes, uintptr(head&r.cqMask)*cqeSize))
	atomic.StoreUint32(r.cqHead, head+1)
	return c
}

// ErrNotSupported says that FUSE over io_uring cannot be had here. The error that wraps it says why, and what would help.
var ErrNotSupported = errors.New("FUSE over io_uring is not available")
