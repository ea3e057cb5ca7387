package uring

import (
	"encoding/binary"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Layout of an entry's header area: struct fuse_uring_req_header and struct fuse_uring_ent_in_out of
// include/uapi/linux/fuse.h, Linux 6.14. The kernel is on the same machine: its byte order is ours.
const (
	opAt       = 128 // the opcode's own structure; before it, at 0, is the request's or the answer's header
	commitAt   = 256 + 8
	sizeAt     = 256 + 16 // of the payload
	headerArea = 288

	headerStride = 320 // headers lie behind each other, each on cache lines of its own

	inHeaderSize = int(unsafe.Sizeof(fuse.InHeader{}))

	// The kernel keeps a request's header apart from the opcode's structure; go-fuse has them in one piece. The header
	// area has room for a copy of the header right before the structure.
	inAt = opAt - inHeaderSize

	cmdRegister       = 1 // enum fuse_uring_cmd
	cmdCommitAndFetch = 2
)

// entry is one place for a request: the kernel fills it, the server puts the answer into the same memory.
type entry struct {
	conn    *Conn
	lane    *lane
	queue   uint16
	slot    int
	head    []byte // headerArea bytes
	payload []byte // of the kernel's largest request
	iov     [2]unix.Iovec

	resident int  // bytes of payload that may have memory behind them
	used     bool // since the last trim
	away     bool // being answered outside of the lane

	readsAhead bool // the request is likely one that nobody waits for, see lane.roam

	in, out [2][]byte // for fuse.ProtocolServer
}

// command makes s a command on e.
func (e *entry) command(s *sqe, op uint64) {
	s.opcode = sqeURingCmd
	s.fd = int32(e.conn.fd)
	s.off = op
	s.userData = uint64(e.slot) + 1
	// struct fuse_uring_cmd_req: flags, commit_id, qid
	binary.NativeEndian.PutUint64(s.cmd[8:], binary.NativeEndian.Uint64(e.head[commitAt:]))
	binary.NativeEndian.PutUint16(s.cmd[16:], e.queue)
}

func (e *entry) header() *fuse.InHeader { return (*fuse.InHeader)(unsafe.Pointer(&e.head[0])) }

// request gives the request's structure, from the header on, and its payload: names, values, bytes to write.
func (e *entry) request() (in unsafe.Pointer, size int, payload []byte) {
	copy(e.head[inAt:opAt], e.head[:inHeaderSize])
	e.readsAhead = false
	n := min(int(binary.NativeEndian.Uint32(e.head[sizeAt:])), len(e.payload))
	e.note(n)
	size = min(max(int(e.header().Length)-n, inHeaderSize), 2*opAt-inAt)
	return unsafe.Pointer(&e.head[inAt]), size, e.payload[:n]
}

// answer completes the answer whose size bytes lie in the payload.
func (e *entry) answer(unique uint64, status fuse.Status, size int) {
	if !status.Ok() {
		size = 0
	}
	e.note(size)
	out := (*fuse.OutHeader)(unsafe.Pointer(&e.head[0]))
	*out = fuse.OutHeader{Length: uint32(outHeaderLen + size), Status: -int32(status), Unique: unique}
	binary.NativeEndian.PutUint32(e.head[sizeAt:], uint32(size))
}

// slow says that the request takes so long that it should not hold the lane, which other connections share: what waits
// for a disk to confirm, or may move any amount of data.
func (e *entry) slow() bool {
	switch e.header().Opcode {
	case opFsync, opFsyncDir, opSyncFS, opFallocate, opCopyFileRange, opSetLkw:
		return true
	}
	return false
}

// keep is how much of an entry's buffer stays in memory when it is idle.
const keep = 64 << 10

// bulk is from which size, in bytes, a read through the page cache is taken for one of the kernel's reading ahead. It asks
// for little more than the program does until the program has read some of a file in order.
const bulk = 128 << 10

// note remembers that n bytes of the buffer were filled.
func (e *entry) note(n int) {
	if n > keep {
		e.resident, e.used = max(e.resident, n), true
	}
}

// trim gives back what is more than to keep, unless it was used since the last time: then it says true.
func (e *entry) trim() bool {
	if e.used {
		e.used = false
		return true
	}
	if e.resident > keep {
		_ = unix.Madvise(e.payload[keep:], unix.MADV_DONTNEED)
		e.resident = 0
	}
	return false
}
