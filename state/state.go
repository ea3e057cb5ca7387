// Package state is memory that outlives the process which writes it: records without Go pointers in a memfd that a
// supervisor holds too. A server puts there what it knows and the disk does not, and when it is killed another process
// maps the same memory and goes on.
//
// A record is invisible to a successor until Publish, and gone with Free: each is one atomic store, so that at whatever
// instruction the writer dies, a reader finds the record whole or not at all. Fields that change afterwards are changed
// by single atomic stores, in an order that the owner of the record chooses such that every prefix of it makes sense.
//
// The memory is as trustworthy as the process that wrote it: it comes from a descriptor that only the supervisor and its
// children have. What is in it is checked for its layout's version and nothing else.
package state

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kind says what a published record is. The kinds belong to the packages that write them; they are listed here so that no
// two are the same.
type Kind uint32

const (
	free    Kind = iota
	Node         // package union
	Link         // package union
	Below        // package union
	Handle       // package fusefs
	Request      // package fusefs
	Sketch       // package block
	Chunk        // package block
	kinds
)

const (
	magic      = 0x6c616d696e61_0002 // "lamina", and the layout's version: to be raised when any record changes
	headerSize = 4096
	recordHead = 8
	// RootSize is the room that Root has, in bytes.
	RootSize = 2048
)

// A class is an array of records of one size. Its place in the file is fixed, and only what was touched takes memory.
type class struct {
	size  uint64 // of a record, its head included
	start uint64
	count uint64 // at most
	free  []uint64
}

// Sizes of the classes, and how much address space each may grow to.
var (
	classSize = [...]uint64{64, 256, 512, 4096}
	classMax  = [...]uint64{4 << 30, 8 << 30, 8 << 30, 16 << 30}
)

// MaxRecord is the largest record, in bytes.
const MaxRecord = 4096 - recordHead

type header struct {
	magic uint64
	used  [len(classSize)]atomic.Uint64 // records of each class that were ever given out
	root  [RootSize]byte
}

// Arena is the whole memory. All methods are safe for concurrent use.
type Arena struct {
	file   *os.File
	mem    []byte
	mu     sync.Mutex
	class  [len(classSize)]class
	inUse  [kinds]atomic.Int64
	closed bool
}

// Create makes an empty arena. Its descriptor is File's.
func Create(name string) (*Arena, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(int64(total())); err != nil {
		f.Close()
		return nil, fmt.Errorf("memfd: %w", err)
	}
	a, err := mapFile(f)
	if err != nil {
		return nil, err
	}
	a.header().magic = magic
	return a, nil
}

// Open maps what another process has written. It owns f from then on, also when it fails.
func Open(f *os.File) (*Arena, error) {
	st, err := f.Stat()
	if err == nil && st.Size() != int64(total()) {
		err = errors.New("of another version of lamina")
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("state of the process before: %w", err)
	}
	a, err := mapFile(f)
	if err != nil {
		return nil, err
	}
	if a.header().magic != magic {
		a.Close()
		return nil, errors.New("state of the process before: of another version of lamina")
	}
	for i := range a.class {
		c := &a.class[i]
		for n := range min(a.header().used[i].Load(), c.count) {
			r := Rec{a, c.start + n*c.size}
			if k := r.kind(); k == free {
				c.free = append(c.free, r.off)
			} else if k < kinds {
				a.inUse[k].Add(1)
			}
		}
	}
	return a, nil
}

func total() uint64 {
	n := uint64(headerSize)
	for _, m := range classMax {
		n += m
	}
	return n
}

func mapFile(f *os.File) (*Arena, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, int(total()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("mapping a memfd: %w", err)
	}
	a := &Arena{file: f, mem: mem}
	start := uint64(headerSize)
	for i, size := range classSize {
		a.class[i] = class{size: size, start: start, count: classMax[i] / size}
		start += classMax[i]
	}
	return a, nil
}

func (a *Arena) header() *header { return (*header)(unsafe.Pointer(&a.mem[0])) }

// File is the arena's descriptor, for a supervisor to keep.
func (a *Arena) File() *os.File { return a.file }

// Root is memory that always exists, zeros at first.
func (a *Arena) Root() unsafe.Pointer { return unsafe.Pointer(&a.header().root) }

// Close unmaps. No record may be used afterwards.
func (a *Arena) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil
	}
	a.closed = true
	return errors.Join(unix.Munmap(a.mem), a.file.Close())
}

// Count is how many records of a kind are published.
func (a *Arena) Count(k Kind) int64 { return a.inUse[k].Load() }

// Rec is a record. The zero value is none.
type Rec struct {
	a   *Arena
	off uint64
}

// None says that it is no record.
func (r Rec) None() bool { return r.a == nil }

// Ref is the record's number, for storing it in another one; 0 for none.
func (r Rec) Ref() uint64 { return r.off }

// At is the record with a number.
func (a *Arena) At(ref uint64) Rec {
	if ref == 0 {
		return Rec{}
	}
	return Rec{a, ref}
}

func (r Rec) head() *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&r.a.mem[r.off])) }

func (r Rec) kind() Kind { return Kind(r.head().Load()) }

// Bytes are the record's, as many as its class has: at least as many as were asked for.
func (r Rec) Bytes() []byte {
	size := r.a.class[r.a.classOf(r.off)].size
	return r.a.mem[r.off+recordHead : r.off+size : r.off+size]
}

// As gives the record as a T, which must be without Go pointers, and not larger than was asked for.
func As[T any](r Rec) *T { return (*T)(unsafe.Pointer(&r.a.mem[r.off+recordHead])) }

func (a *Arena) classOf(off uint64) int {
	for i := len(a.class) - 1; ; i-- {
		if off >= a.class[i].start {
			return i
		}
	}
}

// New makes a record of n bytes, all zeros, that nobody sees yet. It panics if n is more than MaxRecord, or if the arena
// is full: that is 2^26 files, long after other memory has run out.
func (a *Arena) New(n int) Rec {
	i := 0
	for classSize[i] < uint64(n)+recordHead {
		i++
	}
	a.mu.Lock()
	c := &a.class[i]
	var r Rec
	if k := len(c.free); k > 0 {
		r = Rec{a, c.free[k-1]}
		c.free = c.free[:k-1]
	} else {
		used := &a.header().used[i]
		if used.Load() == c.count {
			a.mu.Unlock()
			panic("state: no room for another record")
		}
		r = Rec{a, c.start + used.Load()*c.size}
		used.Add(1)
	}
	a.mu.Unlock()
	clear(r.Bytes())
	return r
}

// Publish makes the record part of the state.
func (r Rec) Publish(k Kind) {
	r.a.inUse[k].Add(1)
	r.head().Store(uint32(k))
}

// Free takes the record out of the state. It may not have been published.
func (r Rec) Free() {
	if r.None() {
		return
	}
	if k := Kind(r.head().Swap(uint32(free))); k != free {
		r.a.inUse[k].Add(-1)
	}
	r.a.mu.Lock()
	c := &r.a.class[r.a.classOf(r.off)]
	c.free = append(c.free, r.off)
	r.a.mu.Unlock()
}

// All returns the published records of a kind, in no order that means anything.
func (a *Arena) All(k Kind) []Rec {
	var all []Rec
	for i := range a.class {
		c := &a.class[i]
		for n := range a.header().used[i].Load() {
			if r := (Rec{a, c.start + n*c.size}); r.kind() == k {
				all = append(all, r)
			}
		}
	}
	return all
}

// Memory is how much the arena takes at most, in bytes, rounded up to pages.
func (a *Arena) Memory() int64 {
	n := uint64(headerSize)
	for i := range a.class {
		n += (a.header().used[i].Load()*a.class[i].size + 4095) &^ 4095
	}
	return int64(n)
}

var _ = [1]struct{}{}[bits.OnesCount(headerSize)-1] // a whole page
