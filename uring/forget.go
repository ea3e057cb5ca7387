package uring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// What the kernel sends over /dev/fuse although requests come over io_uring is nearly all FORGET: one for each inode that it
// drops, nobody waits for them, and the sender goes on. A reader that waits for them is woken by each, mostly on another
// CPU, and is asleep again before the next comes: whoever removes a tree pays for a wake-up a file. The kernel puts those
// that nobody has read yet into one message (FUSE_BATCH_FORGET). So after one was read, the next read comes a moment later.
const gather = 2 * time.Millisecond

// Opcodes that only come over /dev/fuse.
const (
	opForget      = 2
	opInterrupt   = 36
	opBatchForget = 42
)

// forgetSize is that of struct fuse_forget_one.
const forgetSize = 16

// ServeForgets reads what comes over fd, a descriptor of the connection, until the mount is gone: FORGET, which it hands to
// the file system up to two milliseconds late, and whatever else there is. Those who come after it find nothing left to
// read; on an error nothing has changed, and fuse.Server.Serve can go on in its place. fd stays the caller's.
func (c *Conn) ServeForgets(fd int) error {
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("duplicating the connection's descriptor: %w", err)
	}
	defer unix.Close(fd)
	// The kernel wants room for the largest request, whatever comes. Nothing of it is in use before it is filled.
	buf, err := unix.Mmap(-1, 0, payloadSize(c.handler.opts.MaxWrite)+4096, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(buf)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT):
			continue // ENOENT: it was interrupted before it was read
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED):
			return nil
		case err != nil:
			return fmt.Errorf("reading /dev/fuse: %w", err)
		case n < inHeaderSize:
			return fmt.Errorf("reading /dev/fuse: a request of %d bytes", n)
		}
		if c.handler.unasked(fd, buf[:n]) {
			time.Sleep(gather)
		}
	}
}

// unasked does what a message from /dev/fuse says. It tells whether that was to forget.
func (h *handler) unasked(fd int, msg []byte) bool {
	defer func() {
		if r := recover(); r != nil {
			h.panicked(r)
		}
	}()
	in := (*fuse.InHeader)(unsafe.Pointer(&msg[0]))
	body := msg[inHeaderSize:]
	switch in.Opcode {
	case opForget:
		if len(body) >= 8 {
			h.fs.Forget(in.NodeId, binary.NativeEndian.Uint64(body))
		}
	case opBatchForget:
		h.forgetAll(body)
	case opInterrupt: // it wants no answer, and no request is ended early
		return false
	default:
		h.answerOver(fd, msg)
		return false
	}
	return true
}

// forgetAll does a FUSE_BATCH_FORGET: struct fuse_batch_forget_in, and then a struct fuse_forget_one each.
func (h *handler) forgetAll(body []byte) {
	if len(body) < 8 {
		return
	}
	count := int(binary.NativeEndian.Uint32(body))
	for body = body[8:]; count > 0 && len(body) >= forgetSize; count-- {
		h.fs.Forget(binary.NativeEndian.Uint64(body), binary.NativeEndian.Uint64(body[8:]))
		body = body[forgetSize:]
	}
}

// answerOver answers a request that came over /dev/fuse after all. None does on the kernels known to us.
func (h *handler) answerOver(fd int, msg []byte) {
	out := make([]byte, payloadSize(h.opts.MaxWrite)+4096)
	n, status := h.rest.HandleRequest([][]byte{msg}, [][]byte{out})
	if !status.Ok() {
		n = outHeaderLen
		*(*fuse.OutHeader)(unsafe.Pointer(&out[0])) = fuse.OutHeader{
			Length: uint32(n), Status: -int32(status), Unique: (*fuse.InHeader)(unsafe.Pointer(&msg[0])).Unique}
	}
	if n > 0 {
		_, _ = unix.Write(fd, out[:n]) // whoever asked may be gone
	}
}
