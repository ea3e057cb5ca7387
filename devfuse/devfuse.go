// Package devfuse serves a FUSE connection over a descriptor of /dev/fuse that outlives the process.
//
// go-fuse's Server expects to answer INIT, and ends the connection with itself. Here the descriptor is somebody else's: the
// first process answers INIT ([Conn.Negotiate]), and one that comes after its death is told what was negotiated and has
// the kernel send again what was read and never answered ([Conn.Resume], Linux 6.9). Such requests carry [Resent].
//
// One descriptor is read by several threads. It is not cloned (FUSE_DEV_IOC_CLONE): the kernel aborts the requests that
// were read from a clone when that is closed, which is what the death of a process does.
package devfuse

import (
	"errors"
	"fmt"
	"log"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Resent is set in the number of a request that the kernel has sent before (FUSE_UNIQUE_RESEND).
const Resent = uint64(1) << 63

// Opcodes and notices of include/uapi/linux/fuse.h.
const (
	opInit      = 26
	opInterrupt = 36

	notifyInvalInode = 2
	notifyInvalEntry = 3
	notifyResend     = 7
	notifyPrune      = 9
)

const (
	sizeOfIn  = int(unsafe.Sizeof(fuse.InHeader{}))
	sizeOfOut = int(unsafe.Sizeof(fuse.OutHeader{}))
	// room is what a request or an answer has besides its data.
	room = 8192
	// MaxInit is the longest INIT request that is kept, in bytes.
	MaxInit = 256
	// idle readers wait for requests; others end.
	idle = 2
	// keepSpare buffers stay for the next burst of requests. Others are given back when trimAfter has passed without need of
	// them.
	keepSpare = 2
	trimAfter = 10 * time.Second
	// maxReaders bounds the threads, and so the requests that are worked on at a time. The rest waits in the kernel.
	maxReaders = 16
	// MaxWrite is the largest MountOptions.MaxWrite: every reader has twice that in memory that is always there.
	MaxWrite = 256 << 10
)

// Options of a connection.
type Options struct {
	Mount *fuse.MountOptions
	// Answered is called after the answer to a request was given to the kernel, which so will not send it again. It gets the
	// request's number without Resent.
	Answered func(unique uint64)
}

// Conn is the connection as one process sees it.
type Conn struct {
	fd       int
	opt      Options
	protocol *fuse.ProtocolServer
	log      *log.Logger

	mu      sync.Mutex
	readers int
	waiting int // of the readers, those that wait in read(2)
	wg      sync.WaitGroup
	ended   atomic.Bool
	spare   []buffers // under mu

	// Under mu: gives back what a burst of requests has left.
	trimmer *time.Timer // nil: there is nothing to give back
	least   int         // spare buffers that nobody has needed since the trimmer was set
}

// buffers are for requests and answers. The kernel copies into and out of them, and if a page is not there, and the process
// is being killed, the copy fails, and whoever waits for the request gets EIO. So they are not of Go's heap, which gives
// pages back, but always mapped.
type buffers struct{ in, out []byte }

// New serves fs over a descriptor of /dev/fuse that is mounted or about to be. The descriptor stays the caller's.
func New(fd int, fs fuse.RawFileSystem, opt Options) *Conn {
	if opt.Mount.MaxWrite > MaxWrite {
		panic("devfuse: MaxWrite")
	}
	c := &Conn{fd: fd, opt: opt, protocol: fuse.NewProtocolServer(fs, opt.Mount), log: opt.Mount.Logger}
	if c.log == nil {
		c.log = log.Default()
	}
	return c
}

// Negotiate waits for INIT and answers it. Before that it calls keep with the request, which is what Resume needs.
func (c *Conn) Negotiate(keep func(init []byte)) error {
	b, err := c.takeBuffers()
	if err != nil {
		return err
	}
	defer c.putBuffers(b)
	in, out := b.in, b.out
	n, err := c.read(in)
	if err != nil {
		return fmt.Errorf("waiting for INIT: %w", err)
	}
	h := header(in)
	if h.Opcode != opInit {
		return fmt.Errorf("waiting for INIT: request %d came", h.Opcode)
	}
	if n > MaxInit {
		return fmt.Errorf("INIT of %d bytes: this kernel is newer than lamina knows", n)
	}
	keep(in[:n])
	size, status := c.protocol.HandleRequest([][]byte{in[:n]}, [][]byte{out})
	if !status.Ok() {
		return fmt.Errorf("INIT: %v", status)
	}
	if err := c.write(out[:size]); err != nil {
		return fmt.Errorf("answering INIT: %w", err)
	}
	if s := (*fuse.OutHeader)(unsafe.Pointer(&out[0])).Status; s != 0 {
		return fmt.Errorf("INIT: %v", fuse.Status(-s))
	}
	return nil
}

// Resume takes over a connection for which another process has negotiated. Serve must follow.
func (c *Conn) Resume(init []byte) error {
	out := make([]byte, room)
	if len(init) < int(unsafe.Sizeof(fuse.InHeader{})) {
		return errors.New("the process before has not left what it negotiated")
	}
	if _, status := c.protocol.HandleRequest([][]byte{init}, [][]byte{out}); !status.Ok() {
		return fmt.Errorf("repeating INIT: %v", status)
	}
	err := c.notify(notifyResend, nil)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) { // unmounted meanwhile: Serve will find out
		return nil
	}
	if errors.Is(err, unix.EINVAL) {
		return errors.New("this kernel cannot send requests again: Linux 6.9 can")
	}
	return err
}

// Flags are the capabilities that the kernel offered in an INIT request.
func Flags(init []byte) uint64 {
	var in fuse.InitIn
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in)), init)
	return in.Flags64()
}

// Serve answers requests until the mount is gone.
func (c *Conn) Serve() {
	c.mu.Lock()
	c.start()
	c.start()
	c.mu.Unlock()
	c.wg.Wait()
}

// start starts a reader. The caller holds mu.
func (c *Conn) start() {
	c.readers++
	c.waiting++
	c.wg.Go(c.run)
}

// run is one reader.
func (c *Conn) run() {
	b, err := c.takeBuffers()
	if err != nil {
		c.log.Printf("a thread less reads /dev/fuse: %v", err)
		c.mu.Lock()
		c.readers, c.waiting = c.readers-1, c.waiting-1
		c.mu.Unlock()
		return
	}
	defer c.putBuffers(b)
	in, out := b.in, b.out
	for {
		n, err := c.read(in)
		if err != nil {
			if !errors.Is(err, unix.ENODEV) && !c.ended.Swap(true) {
				c.log.Printf("reading /dev/fuse: %v", err)
			}
			return
		}
		c.mu.Lock()
		if c.waiting--; c.waiting == 0 && c.readers < maxReaders {
			c.start() // somebody has to wait while this one works
		}
		c.mu.Unlock()
		c.handle(in[:n], out)
		c.mu.Lock()
		if c.waiting >= idle {
			c.readers--
			c.mu.Unlock()
			return
		}
		c.waiting++
		c.mu.Unlock()
	}
}

func (c *Conn) handle(in, out []byte) {
	h := header(in)
	if h.Opcode == opInterrupt {
		// The work is local and short: nothing is interrupted. ENOSYS keeps the kernel from asking again.
		*(*fuse.OutHeader)(unsafe.Pointer(&out[0])) = fuse.OutHeader{Length: uint32(sizeOfOut), Status: -int32(unix.ENOSYS), Unique: h.Unique}
		_ = c.write(out[:sizeOfOut]) // the request may have been answered meanwhile
		return
	}
	unique := h.Unique
	n, status := c.protocol.HandleRequest([][]byte{in}, [][]byte{out})
	if !status.Ok() {
		n = sizeOfOut
		*(*fuse.OutHeader)(unsafe.Pointer(&out[0])) = fuse.OutHeader{Length: uint32(n), Status: -int32(status), Unique: unique}
	}
	if n > 0 {
		if err := c.write(out[:n]); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			c.log.Printf("answering request %d (opcode %d): %v", unique, h.Opcode, err)
		}
	}
	if c.opt.Answered != nil {
		c.opt.Answered(unique &^ Resent)
	}
}

func header(in []byte) *fuse.InHeader { return (*fuse.InHeader)(unsafe.Pointer(&in[0])) }

func (c *Conn) takeBuffers() (buffers, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.spare); n > 0 {
		b := c.spare[n-1]
		c.spare = c.spare[:n-1]
		c.least = min(c.least, n-1)
		return b, nil
	}
	n := max(c.opt.Mount.MaxWrite, 1<<17) + room // 128 KiB: directories, and attributes of 64 KiB
	mem, err := unix.Mmap(-1, 0, 2*n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return buffers{}, fmt.Errorf("mmap: %w", err)
	}
	_ = unix.Mlock(mem)                         // against swapping; it may not be allowed
	_ = unix.Madvise(mem, unix.MADV_NOHUGEPAGE) // which would be moved
	return buffers{mem[:n], mem[n:]}, nil
}

func (c *Conn) putBuffers(b buffers) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spare = append(c.spare, b)
	if c.trimmer == nil && len(c.spare) > keepSpare {
		c.least = len(c.spare)
		c.trimmer = time.AfterFunc(trimAfter, c.trim)
	}
}

// trim gives back the buffers that nobody has needed since it was last called.
func (c *Conn) trim() {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := max(0, min(c.least, len(c.spare)-keepSpare))
	for _, b := range c.spare[:n] {
		b.unmap()
	}
	c.spare = slices.Delete(c.spare, 0, n)
	c.least = len(c.spare)
	if len(c.spare) > keepSpare {
		c.trimmer.Reset(trimAfter)
	} else {
		c.trimmer = nil
	}
}

func (b buffers) unmap() { _ = unix.Munmap(b.in[:2*len(b.in)]) } // in and out are one mapping

// Close gives the memory back. Serve has returned.
func (c *Conn) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.spare {
		b.unmap()
	}
	c.spare = nil
	if c.trimmer != nil {
		c.trimmer.Stop() // one that is just called finds nothing
	}
}

// read waits for a request.
func (c *Conn) read(buf []byte) (int, error) {
	for {
		n, err := unix.Read(c.fd, buf)
		switch {
		case err == unix.EINTR || err == unix.EAGAIN || err == unix.ENOENT: // ENOENT: it was interrupted before it was read
		case err != nil:
			return 0, err
		case n < sizeOfIn:
			return 0, fmt.Errorf("a request of %d bytes", n)
		default:
			return n, nil
		}
	}
}

func (c *Conn) write(b []byte) error {
	for {
		_, err := unix.Write(c.fd, b)
		if err != unix.EINTR {
			return err
		}
	}
}

func (c *Conn) notify(code int32, body []byte) error {
	b := make([]byte, sizeOfOut+len(body))
	*(*fuse.OutHeader)(unsafe.Pointer(&b[0])) = fuse.OutHeader{Length: uint32(len(b)), Status: code}
	copy(b[sizeOfOut:], body)
	return c.write(b)
}

func bytesOf[T any](v *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v)) }

// InvalAttr makes the kernel ask for a node's attributes again. Its pages stay.
func (c *Conn) InvalAttr(node uint64) error {
	return c.notify(notifyInvalInode, bytesOf(&struct {
		node     uint64
		off, len int64
	}{node, -1, 0}))
}

// InvalEntry makes the kernel look a name up again. It must not be called while answering a request: the kernel may hold a
// lock on the directory that it needs.
func (c *Conn) InvalEntry(dir uint64, name string) error {
	return c.notify(notifyInvalEntry, append(append(bytesOf(&struct {
		dir        uint64
		len, flags uint32
	}{dir, uint32(len(name)), 0}), name...), 0))
}

// Prune makes the kernel look the unused names of a node up again (Linux 6.18).
func (c *Conn) Prune(node uint64) error {
	return c.notify(notifyPrune, bytesOf(&struct {
		count, padding uint32
		spare          uint64
		node           uint64
	}{count: 1, node: node}))
}

const (
	iocBackingOpen  = 0x4010e501 // _IOW(229, 1, struct fuse_backing_map)
	iocBackingClose = 0x4004e502 // _IOW(229, 2, uint32_t)
)

// RegisterBacking makes a file known to the connection, for passing opens through to it. The number lives as long as the
// connection, or until UnregisterBacking.
func (c *Conn) RegisterBacking(fd int) (int32, error) {
	m := struct {
		fd    int32
		flags uint32
		pad   uint64
	}{fd: int32(fd)}
	id, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), iocBackingOpen, uintptr(unsafe.Pointer(&m)))
	if errno != 0 {
		return 0, errno
	}
	return int32(id), nil
}

// UnregisterBacking forgets a file. Opens that were passed through to it go on.
func (c *Conn) UnregisterBacking(id int32) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), iocBackingClose, uintptr(unsafe.Pointer(&id)))
	if errno != 0 {
		return errno
	}
	return nil
}
