package uring

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// fabricated gives an entry as the kernel fills it: header, the opcode's structure, payload. Around its memory lie
// guard bytes that nobody may touch.
type fabricated struct {
	*entry
	memory []byte
}

const guard = 64

func fabricate(payload int) *fabricated {
	f := &fabricated{memory: bytes.Repeat([]byte{0xa5}, guard+headerArea+guard+payload+guard)}
	head := f.memory[guard:][:headerArea:headerArea]
	body := f.memory[guard+headerArea+guard:][:payload:payload]
	clear(head)
	clear(body)
	f.entry = &entry{conn: &Conn{}, head: head, payload: body}
	return f
}

// fill puts a request into the entry: in is the opcode's structure without the header.
func (f *fabricated) fill(h fuse.InHeader, in, payload []byte) {
	h.Length = uint32(inHeaderSize + len(in) + len(payload))
	*(*fuse.InHeader)(unsafe.Pointer(&f.head[0])) = h
	copy(f.head[opAt:opAt+128], in)
	copy(f.payload, payload)
	binary.NativeEndian.PutUint32(f.head[sizeAt:], uint32(len(payload)))
}

// reply is the answer in the entry: header and payload.
func (f *fabricated) reply() (fuse.OutHeader, []byte) {
	size := binary.NativeEndian.Uint32(f.head[sizeAt:])
	return *(*fuse.OutHeader)(unsafe.Pointer(&f.head[0])), f.payload[:size]
}

// intact says whether the guards are, and the answer's sizes agree.
func (f *fabricated) intact() error {
	for i, b := range f.memory {
		inHead := i >= guard && i < guard+headerArea
		inBody := i >= guard+headerArea+guard && i < len(f.memory)-guard
		if !inHead && !inBody && b != 0xa5 {
			return fmt.Errorf("byte %d of %d lies outside of the entry and was written", i, len(f.memory))
		}
	}
	size := binary.NativeEndian.Uint32(f.head[sizeAt:])
	if int(size) > len(f.payload) {
		return fmt.Errorf("an answer of %d bytes in a buffer of %d", size, len(f.payload))
	}
	if out := (*fuse.OutHeader)(unsafe.Pointer(&f.head[0])); int(out.Length) != outHeaderLen+int(size) || out.Status > 0 {
		return fmt.Errorf("an answer of %d bytes says that it is %d long, status %d", size, out.Length, out.Status)
	}
	return nil
}

func testHandler(t testing.TB, fs fuse.RawFileSystem) *handler {
	t.Helper()
	h, err := newHandler(fs, Options{
		Mount: &fuse.MountOptions{MaxWrite: 64 << 10, Logger: log.New(io.Discard, "", 0), Name: "test"},
		Init:  &fuse.InitIn{Major: 7, Minor: 45, MaxReadAhead: 1 << 17},
	})
	must(t, err)
	return h
}

// after is a structure's bytes behind its header.
func after[T any](in T) []byte {
	return bytes.Clone(unsafe.Slice((*byte)(unsafe.Pointer(&in)), unsafe.Sizeof(in))[inHeaderSize:])
}

// request is one request of each kind that is answered without go-fuse's help.
type request struct {
	name    string
	header  fuse.InHeader
	in      []byte
	payload []byte
}

func fastRequests() []request {
	header := func(op uint32, node uint64) fuse.InHeader {
		return fuse.InHeader{Opcode: op, Unique: 0x1122334455667788, NodeId: node, Caller: fuse.Caller{Owner: fuse.Owner{Uid: 5, Gid: 6}, Pid: 7}}
	}
	var rs []request
	for _, node := range []uint64{1, 2} {
		rs = append(rs,
			request{"lookup", header(opLookup, node), nil, []byte("file\x00")},
			request{"lookup without an end", header(opLookup, node), nil, []byte("file")},
			request{"lookup nothing", header(opLookup, node), nil, []byte("nothing\x00")},
			request{"getattr", header(opGetattr, node), after(fuse.GetAttrIn{Flags_: 1, Fh_: 9}), nil},
			request{"setattr", header(opSetattr, node), after(fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{Valid: fuse.FATTR_MODE | fuse.FATTR_SIZE, Size: 999, Mode: 0o600}}), nil},
			request{"open", header(opOpen, node), after(fuse.OpenIn{Flags: unix.O_RDWR}), nil},
			request{"create", header(opCreate, node), after(fuse.CreateIn{Mode: unix.S_IFREG | 0o644}), []byte("new\x00")},
			request{"create what exists", header(opCreate, node), after(fuse.CreateIn{Mode: unix.S_IFREG | 0o644}), []byte("file\x00")},
			request{"unlink", header(opUnlink, node), nil, []byte("file\x00")},
			request{"unlink nothing", header(opUnlink, node), nil, []byte("nothing\x00")},
			request{"release", header(opRelease, node), after(fuse.ReleaseIn{Fh: 9}), nil},
			request{"read", header(opRead, node), after(fuse.ReadIn{Fh: 9, Size: 4096}), nil},
			request{"read the end", header(opRead, node), after(fuse.ReadIn{Fh: 9, Offset: 9990, Size: 4096}), nil},
			request{"read nothing", header(opRead, node), after(fuse.ReadIn{Fh: 9, Offset: 1 << 40, Size: 4096}), nil},
			request{"read the most", header(opRead, node), after(fuse.ReadIn{Fh: 9, Size: 64 << 10}), nil},
			request{"write", header(opWrite, node), after(fuse.WriteIn{Fh: 9, Offset: 100, Size: 5000}), pattern(3, 5000)},
			request{"write the most", header(opWrite, node), after(fuse.WriteIn{Fh: 9, Size: 64 << 10}), pattern(4, 64<<10)},
			request{"write nothing", header(opWrite, node), after(fuse.WriteIn{Fh: 9}), nil},
			request{"getxattr", header(opGetxattr, node), after(fuse.GetXAttrIn{Size: 100}), []byte("user.a\x00")},
			request{"getxattr, too small", header(opGetxattr, node), after(fuse.GetXAttrIn{Size: 2}), []byte("user.a\x00")},
			request{"getxattr, how long?", header(opGetxattr, node), after(fuse.GetXAttrIn{}), []byte("user.a\x00")},
			request{"getxattr, how long is none?", header(opGetxattr, node), after(fuse.GetXAttrIn{}), []byte("user.b\x00")},
			request{"getxattr, none", header(opGetxattr, node), after(fuse.GetXAttrIn{Size: 100}), []byte("user.b\x00")},
			request{"go-fuse's own", header(opLookup, node), nil, []byte(pollHackName + "\x00")},
		)
	}
	return rs
}

func fileSystemOfHandler() *memFS {
	m := newMemFS()
	m.file("file", pattern(1, 10_000))
	m.nodes[2].xattrs["user.a"] = []byte("value")
	return m
}

// What the fast path answers is byte for byte what go-fuse answers, and the file system sees the same request.
func TestFastAnswersAreGoFuses(t *testing.T) {
	for i, r := range fastRequests() {
		t.Run(fmt.Sprint(r.name, "/", i), func(t *testing.T) {
			var headers [2]fuse.OutHeader
			var payloads [2][]byte
			var asked [2]string
			for side := range 2 {
				fs := fileSystemOfHandler()
				h := testHandler(t, fs)
				e := fabricate(68 << 10)
				e.fill(r.header, r.in, r.payload)
				if side == 0 {
					h.handle(e.entry)
				} else {
					_, size, payload := e.request()
					h.other(e.entry, r.header.Unique, size, bytes.Clone(payload))
				}
				must(t, e.intact())
				headers[side], payloads[side] = e.reply()
				asked[side] = fs.took()
			}
			if headers[0] != headers[1] || !bytes.Equal(payloads[0], payloads[1]) {
				t.Errorf("answered %+v and %d bytes (%s), go-fuse %+v and %d bytes (%s)", headers[0], len(payloads[0]),
					sum(payloads[0]), headers[1], len(payloads[1]), sum(payloads[1]))
			}
			if asked[0] != asked[1] {
				t.Errorf("the file system was asked\n%s, by go-fuse\n%s", asked[0], asked[1])
			}
		})
	}
}

// A file system that has been asked must not see what an earlier request left in the entry.
func TestAnswersStartEmpty(t *testing.T) {
	h := testHandler(t, quietFS{fuse.NewDefaultRawFileSystem()})
	for _, op := range []uint32{opLookup, opGetattr, opSetattr, opOpen, opCreate} {
		e := fabricate(8192)
		for i := range e.payload {
			e.payload[i] = 0xcc
		}
		e.fill(fuse.InHeader{Opcode: op, NodeId: 1}, make([]byte, 100), []byte("x\x00"))
		h.handle(e.entry)
		out, b := e.reply()
		if out.Status != 0 || len(b) == 0 || len(bytes.Trim(b, "\x00")) > 0 {
			t.Errorf("opcode %d: status %d, %x", op, out.Status, b)
		}
	}
}

// quietFS says yes to everything, and nothing else. It does not allocate.
type quietFS struct{ fuse.RawFileSystem }

func (quietFS) Lookup(<-chan struct{}, *fuse.InHeader, string, *fuse.EntryOut) fuse.Status {
	return fuse.OK
}
func (quietFS) GetAttr(<-chan struct{}, *fuse.GetAttrIn, *fuse.AttrOut) fuse.Status { return fuse.OK }
func (quietFS) SetAttr(<-chan struct{}, *fuse.SetAttrIn, *fuse.AttrOut) fuse.Status { return fuse.OK }
func (quietFS) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status       { return fuse.OK }
func (quietFS) Release(<-chan struct{}, *fuse.ReleaseIn)                            {}
func (quietFS) Unlink(<-chan struct{}, *fuse.InHeader, string) fuse.Status          { return fuse.OK }
func (quietFS) Create(<-chan struct{}, *fuse.CreateIn, string, *fuse.CreateOut) fuse.Status {
	return fuse.OK
}
func (quietFS) Write(_ <-chan struct{}, in *fuse.WriteIn, b []byte) (uint32, fuse.Status) {
	return uint32(len(b)), fuse.OK
}
func (quietFS) GetXAttr(_ <-chan struct{}, _ *fuse.InHeader, _ string, b []byte) (uint32, fuse.Status) {
	return uint32(len(b)), fuse.OK
}
func (quietFS) ReadInto(_ <-chan struct{}, in *fuse.ReadIn, b []byte) (int, fuse.Status) {
	return len(b), fuse.OK
}

// The fast path does not allocate, but for the name that it hands to the file system.
func TestFastPathDoesNotAllocate(t *testing.T) {
	h := testHandler(t, quietFS{fuse.NewDefaultRawFileSystem()})
	e := fabricate(68 << 10)
	for i, r := range fastRequests() {
		names := 0.0
		switch r.header.Opcode {
		case opLookup, opCreate, opUnlink, opGetxattr:
			names = 1
		}
		if bytes.HasPrefix(r.payload, []byte(pollHackName)) {
			continue // go-fuse answers
		}
		n := testing.AllocsPerRun(100, func() {
			e.fill(r.header, r.in, r.payload)
			h.handle(e.entry)
		})
		if n > names {
			t.Errorf("request %d, %s: %v allocations, want %v at most", i, r.name, n, names)
		}
		if out, _ := e.reply(); out.Status != 0 {
			t.Errorf("%s: status %d: this measured nothing", r.name, out.Status)
		}
	}
}

// Sizes that no kernel sends are refused, not believed.
func TestImpossibleSizes(t *testing.T) {
	for _, r := range []request{
		{"a read of more than the buffer holds", fuse.InHeader{Opcode: opRead, NodeId: 2}, after(fuse.ReadIn{Size: 1 << 30}), nil},
		{"a write of more than has come", fuse.InHeader{Opcode: opWrite, NodeId: 2}, after(fuse.WriteIn{Size: 100}), pattern(1, 99)},
		{"a write of less than has come", fuse.InHeader{Opcode: opWrite, NodeId: 2}, after(fuse.WriteIn{Size: 98}), pattern(1, 99)},
		{"an xattr of more than the buffer holds", fuse.InHeader{Opcode: opGetxattr, NodeId: 2}, after(fuse.GetXAttrIn{Size: 1 << 20}), []byte("user.a\x00")},
	} {
		h := testHandler(t, fileSystemOfHandler())
		e := fabricate(8192)
		e.fill(r.header, r.in, r.payload)
		h.handle(e.entry)
		must(t, e.intact())
		if out, b := e.reply(); out.Status != -int32(unix.EIO) || len(b) > 0 {
			t.Errorf("%s: status %d, %d bytes", r.name, out.Status, len(b))
		}
	}
}

// Whatever the header says, nothing is read or written outside of the entry, nothing panics, and there is an answer.
func FuzzHandle(f *testing.F) {
	for _, r := range fastRequests() {
		head := make([]byte, headerArea)
		*(*fuse.InHeader)(unsafe.Pointer(&head[0])) = r.header
		binary.NativeEndian.PutUint32(head, uint32(inHeaderSize+len(r.in)+len(r.payload)))
		copy(head[opAt:], r.in)
		binary.NativeEndian.PutUint32(head[sizeAt:], uint32(len(r.payload)))
		f.Add(head, r.payload[:min(len(r.payload), 100)])
	}
	f.Add(bytes.Repeat([]byte{0xff}, headerArea), bytes.Repeat([]byte{0xff}, 300))
	f.Add([]byte{}, []byte{})
	h := testHandler(f, careful{quietFS{fuse.NewDefaultRawFileSystem()}})
	f.Fuzz(func(t *testing.T, head, payload []byte) {
		e := fabricate(8192)
		copy(e.head, head)
		copy(e.payload, payload)
		unique := e.header().Unique
		if op := e.header().Opcode; op == opInit {
			return // changes what has been negotiated, and never comes this way
		}
		_ = e.slow()
		h.handle(e.entry)
		if err := e.intact(); err != nil {
			t.Error(err)
		}
		if out, _ := e.reply(); out.Unique != unique {
			t.Errorf("answers %d, was asked %d", out.Unique, unique)
		}
		s := sqe{}
		e.command(&s, cmdCommitAndFetch)
	})
}

// careful reads all that it is handed.
type careful struct{ quietFS }

var sink byte

func (c careful) Write(_ <-chan struct{}, in *fuse.WriteIn, b []byte) (uint32, fuse.Status) {
	for _, x := range b {
		sink += x
	}
	return in.Size, fuse.OK
}

func (c careful) ReadInto(_ <-chan struct{}, in *fuse.ReadIn, b []byte) (int, fuse.Status) {
	for i := range b {
		b[i] = 1
	}
	return len(b), fuse.OK
}

func (c careful) GetXAttr(_ <-chan struct{}, _ *fuse.InHeader, _ string, b []byte) (uint32, fuse.Status) {
	for i := range b {
		b[i] = 1
	}
	return uint32(len(b)), fuse.OK
}

func (c careful) SetXAttr(_ <-chan struct{}, _ *fuse.SetXAttrIn, _ string, b []byte) fuse.Status {
	for _, x := range b {
		sink += x
	}
	return fuse.OK
}

func (c careful) Ioctl(_ <-chan struct{}, _ *fuse.IoctlIn, in []byte, _ *fuse.IoctlOut, out []byte) fuse.Status {
	for _, x := range in {
		sink += x
	}
	for i := range out {
		out[i] = 1
	}
	return fuse.OK
}

func (c careful) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for out.AddDirEntry(fuse.DirEntry{Name: "name", Ino: 1, Mode: unix.S_IFREG}) {
	}
	return fuse.OK
}

func (c careful) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for out.AddDirLookupEntry(fuse.DirEntry{Name: "name", Ino: 1, Mode: unix.S_IFREG}) != nil {
	}
	return fuse.OK
}

func (c careful) ListXAttr(_ <-chan struct{}, _ *fuse.InHeader, b []byte) (uint32, fuse.Status) {
	return uint32(len(b)), fuse.OK
}
