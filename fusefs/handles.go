package fusefs

import (
	"sync"
	"sync/atomic"

	"lamina/union"

	"golang.org/x/sys/unix"
)

// handle is one open file description of the kernel's.
type handle struct {
	*union.Handle
	id       uint64 // of the node
	modes    *modes
	passed   bool          // reads and writes do not come here
	mappable bool          // passed, and can be written through a shared mapping
	mtime    unix.Timespec // when mappable: of the backing file when it was opened
}

const handleChunk = 512

// handles gives numbers to open files. Finding one takes no lock: every read and write does it.
type handles struct {
	chunks atomic.Pointer[[]*[handleChunk]atomic.Pointer[handle]]

	mu   sync.Mutex
	free []uint64
	size uint64 // numbers given out so far, free ones included
}

// get returns nil for a number that was never given out or was released.
func (t *handles) get(fh uint64) *handle {
	chunks := t.chunks.Load()
	i := fh - 1 // 0 is never given out: it is what the kernel sends where it has no handle
	if chunks == nil || i/handleChunk >= uint64(len(*chunks)) {
		return nil
	}
	return (*chunks)[i/handleChunk][i%handleChunk].Load()
}

// add stores h and returns its number.
func (t *handles) add(h *handle) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	var i uint64
	if n := len(t.free); n > 0 {
		i, t.free = t.free[n-1], t.free[:n-1]
	} else {
		i = t.size
		t.size++
		t.grow(i)
	}
	t.slot(i).Store(h)
	return i + 1
}

// remove takes a number back; nil if it was not given out.
func (t *handles) remove(fh uint64) *handle {
	h := t.get(fh)
	if h == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.slot(fh - 1).Store(nil)
	t.free = append(t.free, fh-1)
	return h
}

// takeAll removes and returns every handle.
func (t *handles) takeAll() []*handle {
	var all []*handle
	for fh := uint64(1); t.known(fh); fh++ {
		if h := t.remove(fh); h != nil {
			all = append(all, h)
		}
	}
	return all
}

func (t *handles) known(fh uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return fh <= t.size
}

// open counts the handles in use.
func (t *handles) open() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return int(t.size) - len(t.free)
}

func (t *handles) slot(i uint64) *atomic.Pointer[handle] {
	return &(*t.chunks.Load())[i/handleChunk][i%handleChunk]
}

// grow makes room for number i. Readers keep using the old slice, which shares the chunks.
func (t *handles) grow(i uint64) {
	var chunks []*[handleChunk]atomic.Pointer[handle]
	if old := t.chunks.Load(); old != nil {
		chunks = *old
	}
	if i/handleChunk < uint64(len(chunks)) {
		return
	}
	grown := append(chunks[:len(chunks):len(chunks)], new([handleChunk]atomic.Pointer[handle]))
	t.chunks.Store(&grown)
}
