package uring

import (
	"bytes"
	"fmt"
	"log"
	"runtime"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Opcodes of include/uapi/linux/fuse.h that are answered without go-fuse's help, or have to be known.
const (
	opLookup        = 1
	opGetattr       = 3
	opSetattr       = 4
	opUnlink        = 10
	opOpen          = 14
	opRead          = 15
	opWrite         = 16
	opRelease       = 18
	opFsync         = 20
	opGetxattr      = 22
	opInit          = 26
	opReadDir       = 28
	opFsyncDir      = 30
	opSetLkw        = 33
	opCreate        = 35
	opIoctl         = 39
	opFallocate     = 43
	opReadDirPlus   = 44
	opCopyFileRange = 47
	opSyncFS        = 50
)

// Reader is what a file system may have besides fuse.RawFileSystem: a Read that puts the bytes into buf and says how many
// they are. It saves an allocation a request.
type Reader interface {
	ReadInto(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (int, fuse.Status)
}

// handler turns requests into calls of a file system. The ones that matter for speed are turned by itself, straight from
// and into the memory shared with the kernel, without allocating; fuse.ProtocolServer turns the rest.
type handler struct {
	fs     fuse.RawFileSystem
	reader Reader // nil: fs has none
	rest   *fuse.ProtocolServer
	opts   *fuse.MountOptions
	log    *log.Logger
	cancel chan struct{} // never closed: INTERRUPT does not reach what comes over io_uring
}

func newHandler(fs fuse.RawFileSystem, opt Options) (*handler, error) {
	switch {
	case opt.Mount.SingleThreaded:
		return nil, fmt.Errorf("%w: MountOptions.SingleThreaded: requests come on many threads", ErrNotSupported)
	case opt.Mount.EnableLocks:
		// Who waits for a lock keeps an entry meanwhile, and no INTERRUPT reaches him: some that wait on one CPU would keep
		// the lock's owner there from giving it back.
		return nil, fmt.Errorf("%w: MountOptions.EnableLocks: a request may wait for ever", ErrNotSupported)
	}
	h := &handler{fs: fs, rest: fuse.NewProtocolServer(fs, opt.Mount), opts: opt.Mount, log: opt.Mount.Logger, cancel: make(chan struct{})}
	h.reader, _ = fs.(Reader)
	if h.log == nil {
		h.log = log.Default()
	}
	return h, h.init(opt.Init)
}

// init tells the ProtocolServer what has been negotiated, by repeating the negotiation.
func (h *handler) init(in *fuse.InitIn) error {
	request := *in
	request.Length, request.Opcode = uint32(unsafe.Sizeof(request)), opInit
	var reply [256]byte
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&request)), unsafe.Sizeof(request))
	if _, status := h.rest.HandleRequest([][]byte{raw}, [][]byte{reply[:]}); !status.Ok() {
		return fmt.Errorf("repeating INIT: %v", status)
	}
	if out := (*fuse.OutHeader)(unsafe.Pointer(&reply)); out.Status != 0 {
		return fmt.Errorf("repeating INIT: %v", fuse.Status(-out.Status))
	}
	return nil
}

// handle answers the request in e.
func (h *handler) handle(e *entry) {
	unique := e.header().Unique
	in, size, payload := e.request()
	if h.opts.Debug || e.header().TotalExtlen > 0 || isPollHack(e.header(), payload) {
		h.other(e, unique, size, payload)
		return
	}
	defer h.recovered(e, unique)
	n, status, known := h.fast(e, in, payload)
	if !known {
		h.other(e, unique, size, payload)
		return
	}
	e.answer(unique, status, n)
}

// go-fuse answers for one file itself, which no file system has: to open and poll it teaches the kernel that there is no
// POLL here, before a runtime's poller has to wait for the answer (poll.go in go-fuse).
const (
	pollHackName  = ".go-fuse-epoll-hack"
	pollHackInode = ^uint64(0)
)

func isPollHack(in *fuse.InHeader, payload []byte) bool {
	return in.NodeId == pollHackInode || in.NodeId == fuse.FUSE_ROOT_ID && string(trimName(payload)) == pollHackName
}

// recovered answers for a file system that panicked. Other requests go on.
func (h *handler) recovered(e *entry, unique uint64) {
	if r := recover(); r != nil {
		e.answer(unique, h.panicked(r), 0)
	}
}

// panicked says what to answer for a file system that panicked, and tells of it.
func (h *handler) panicked(r any) fuse.Status {
	if h.opts.PanicHandler != nil {
		if s := h.opts.PanicHandler(r); !s.Ok() {
			return s
		}
		return fuse.EIO
	}
	stack := make([]byte, 64<<10)
	h.log.Printf("panic in a request: %v\n%s", r, stack[:runtime.Stack(stack, false)])
	return fuse.EIO
}

// fast answers what it knows and gives the number of bytes it put into e.payload. Names are copied out of the payload,
// which the answer will overwrite.
func (h *handler) fast(e *entry, in unsafe.Pointer, payload []byte) (n int, status fuse.Status, known bool) {
	switch (*fuse.InHeader)(in).Opcode {
	case opLookup:
		name := name(payload)
		out, n := result[fuse.EntryOut](e)
		return n, h.fs.Lookup(h.cancel, (*fuse.InHeader)(in), name, out), true
	case opGetattr:
		out, n := result[fuse.AttrOut](e)
		return n, h.fs.GetAttr(h.cancel, (*fuse.GetAttrIn)(in), out), true
	case opSetattr:
		out, n := result[fuse.AttrOut](e)
		return n, h.fs.SetAttr(h.cancel, (*fuse.SetAttrIn)(in), out), true
	case opOpen:
		out, n := result[fuse.OpenOut](e)
		return n, h.fs.Open(h.cancel, (*fuse.OpenIn)(in), out), true
	case opCreate:
		name := name(payload)
		out, n := result[fuse.CreateOut](e)
		return n, h.fs.Create(h.cancel, (*fuse.CreateIn)(in), name, out), true
	case opUnlink:
		return 0, h.fs.Unlink(h.cancel, (*fuse.InHeader)(in), name(payload)), true
	case opRelease:
		h.fs.Release(h.cancel, (*fuse.ReleaseIn)(in))
		return 0, fuse.OK, true
	case opRead:
		r := (*fuse.ReadIn)(in)
		e.readsAhead = r.Size >= bulk && r.Flags&unix.O_DIRECT == 0
		n, status := h.read(r, e.payload)
		return n, status, true
	case opWrite:
		if uint64(len(payload)) != uint64((*fuse.WriteIn)(in).Size) {
			return 0, fuse.EIO, true
		}
		written, status := h.fs.Write(h.cancel, (*fuse.WriteIn)(in), payload)
		if status == fuse.ENOSYS {
			written, status = h.fs.Writev(h.cancel, (*fuse.WriteIn)(in), [][]byte{payload})
		}
		out, n := result[fuse.WriteOut](e)
		out.Size = written
		return n, status, true
	case opGetxattr:
		if size := int((*fuse.GetXAttrIn)(in).Size); size <= len(e.payload) && !h.opts.DisableXAttrs && !h.opts.IgnoreSecurityLabels {
			n, status := h.getxattr(e, (*fuse.InHeader)(in), name(payload), size)
			return n, status, true
		}
	}
	return 0, fuse.OK, false
}

// getxattr answers with the value, or with its size if size is 0: so the kernel asks for security.capability before a new
// file's first write and before each change of an owner.
func (h *handler) getxattr(e *entry, in *fuse.InHeader, name string, size int) (int, fuse.Status) {
	n, status := h.fs.GetXAttr(h.cancel, in, name, e.payload[:size])
	if size > 0 {
		if status.Ok() && int(n) > size {
			return 0, fuse.EIO // more than was asked for
		}
		return int(n), status
	}
	if status == fuse.ERANGE { // it does not fit into nothing
		status = fuse.OK
	}
	out, room := result[fuse.GetXAttrOut](e)
	out.Size = n
	return room, status
}

func (h *handler) read(in *fuse.ReadIn, buf []byte) (int, fuse.Status) {
	if uint64(in.Size) > uint64(len(buf)) {
		return 0, fuse.EIO
	}
	buf = buf[:in.Size]
	if h.reader != nil {
		return h.reader.ReadInto(h.cancel, in, buf)
	}
	r, status := h.fs.Read(h.cancel, in, buf)
	if r == nil || !status.Ok() {
		return 0, status
	}
	defer r.Done()
	b, status := r.Bytes(buf)
	if len(b) > len(buf) {
		return 0, fuse.EIO
	}
	return copy(buf, b), status // onto itself, unless the file system has the bytes elsewhere
}

// other has fuse.ProtocolServer answer.
func (h *handler) other(e *entry, unique uint64, size int, payload []byte) {
	var answer [outHeaderLen]byte
	if e.header().Opcode == opIoctl {
		payload = bytes.Clone(payload) // go-fuse hands input and output out together
	}
	e.in[0], e.in[1] = e.head[inAt:inAt+size], payload
	e.out[0], e.out[1] = answer[:], e.payload
	n, status := h.rest.HandleRequest(e.in[:], e.out[:])
	if !status.Ok() || n < outHeaderLen {
		e.answer(unique, fuse.EIO, 0)
		return
	}
	out := (*fuse.OutHeader)(unsafe.Pointer(&answer))
	e.answer(unique, fuse.Status(-out.Status), n-outHeaderLen)
}

const outHeaderLen = int(unsafe.Sizeof(fuse.OutHeader{}))

// result gives a cleared T at the start of e's payload, and its size.
func result[T any](e *entry) (*T, int) {
	out := (*T)(unsafe.Pointer(&e.payload[0]))
	clear(unsafe.Slice((*byte)(unsafe.Pointer(out)), unsafe.Sizeof(*out)))
	return out, int(unsafe.Sizeof(*out))
}

// name copies a name that ends with a zero byte.
func name(payload []byte) string { return string(trimName(payload)) }

func trimName(payload []byte) []byte {
	if i := bytes.IndexByte(payload, 0); i >= 0 {
		return payload[:i]
	}
	return payload
}
