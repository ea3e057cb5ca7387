package uring

import (
	"bytes"
	"encoding/binary"
	"maps"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// forgetFS counts what is forgotten. Node 13 brings bad luck.
type forgetFS struct {
	fuse.RawFileSystem
	forgot map[uint64]uint64
}

func (f *forgetFS) Forget(node, n uint64) {
	if node == 13 {
		panic("node 13")
	}
	f.forgot[node] += n
}

// message is a request as it is read from /dev/fuse.
func message(op uint32, node uint64, body ...uint64) []byte {
	in := fuse.InHeader{Length: uint32(inHeaderSize + 8*len(body)), Opcode: op, Unique: 99, NodeId: node}
	b := bytes.Clone(unsafe.Slice((*byte)(unsafe.Pointer(&in)), inHeaderSize))
	for _, v := range body {
		b = binary.NativeEndian.AppendUint64(b, v)
	}
	return b
}

func TestForgetMessages(t *testing.T) {
	for name, c := range map[string]struct {
		msg    []byte
		forgot map[uint64]uint64
	}{
		"one":                          {message(opForget, 5, 7), map[uint64]uint64{5: 7}},
		"several":                      {message(opBatchForget, 0, 2, 5, 7, 6, 1), map[uint64]uint64{5: 7, 6: 1}},
		"one several times":            {message(opBatchForget, 0, 3, 5, 7, 6, 1, 5, 2), map[uint64]uint64{5: 9, 6: 1}},
		"none":                         {message(opBatchForget, 0, 0), nil},
		"more than there are":          {message(opBatchForget, 0, 1000, 5, 7, 6), map[uint64]uint64{5: 7}},
		"fewer than there are":         {message(opBatchForget, 0, 1, 5, 7, 6, 1), map[uint64]uint64{5: 7}},
		"one without a count":          {message(opForget, 5), nil},
		"several without a count":      {message(opBatchForget, 0), nil},
		"an interrupt":                 {message(opInterrupt, 0, 4), nil},
		"one that makes the FS panic":  {message(opForget, 13, 1), nil},
		"all but what makes it panics": {message(opBatchForget, 0, 3, 5, 7, 13, 1, 6, 1), map[uint64]uint64{5: 7}},
	} {
		fs := &forgetFS{fuse.NewDefaultRawFileSystem(), map[uint64]uint64{}}
		testHandler(t, fs).unasked(-1, c.msg)
		if !maps.Equal(fs.forgot, c.forgot) {
			t.Errorf("%s: forgot %v, want %v", name, fs.forgot, c.forgot)
		}
	}
}

// A request that comes over /dev/fuse is answered there.
func TestRequestAmongForgets(t *testing.T) {
	var p [2]int
	must(t, unix.Pipe2(p[:], unix.O_CLOEXEC))
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	h := testHandler(t, &forgetFS{fuse.NewDefaultRawFileSystem(), map[uint64]uint64{}})
	if h.unasked(p[1], message(opGetattr, 5, 0, 0)) {
		t.Error("taken for a FORGET")
	}
	b := make([]byte, 1<<10)
	n, err := unix.Read(p[0], b)
	must(t, err)
	out := (*fuse.OutHeader)(unsafe.Pointer(&b[0]))
	if n != outHeaderLen || out.Unique != 99 || out.Status != -int32(unix.ENOSYS) {
		t.Errorf("answered with %d bytes, %+v; want ENOSYS to request 99", n, *out)
	}
}
