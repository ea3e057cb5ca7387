package fusefs

import (
	"sync"
	"sync/atomic"

	"lamina/state"
	"lamina/union"

	"golang.org/x/sys/unix"
)

// handle is one open file description of the kernel's.
type handle struct {
	*union.Handle
	id       uint64 // of the node
	fh       uint64
	rec      state.Rec // see journal.go
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
	size uint64 // places used so far, free ones included
	ages uint64 // how often a place was used again
}

// A handle's number is 1 more than its place, and in the upper half how often a place had been used again before: a
// RELEASE that comes twice, because this process took over from another, must not close somebody else's file.
const ageShift = 32

// A process that takes over begins its ages behind the next multiple of 1<<agesAhead.
const agesAhead = 20

func placeOf(fh uint64) uint64 { return fh&(1<<ageShift-1) - 1 }

// get returns nil for a number that was never given out or was released.
func (t *handles) get(fh uint64) *handle {
	chunks := t.chunks.Load()
	i := placeOf(fh) // 0 is never given out: it is what the kernel sends where it has no handle
	if chunks == nil || i/handleChunk >= uint64(len(*chunks)) {
		return nil
	}
	h := (*chunks)[i/handleChunk][i%handleChunk].Load()
	if h == nil || h.fh != fh {
		return nil
	}
	return h
}

// add stores h and returns its number.
func (t *handles) add(h *handle) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	var i uint64
	if n := len(t.free); n > 0 {
		i, t.free = t.free[n-1], t.free[:n-1]
		t.ages++
	} else {
		i = t.size
		t.size++
		t.grow(i)
	}
	h.fh = t.ages<<ageShift | (i + 1)
	t.slot(i).Store(h)
	return h.fh
}

// put stores a handle under the number that another process gave it. Others are free as soon as putDone was called.
func (t *handles) put(fh uint64, h *handle) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := placeOf(fh)
	for ; t.size <= i; t.size++ {
		t.grow(t.size)
	}
	t.ages = max(t.ages, fh>>ageShift)
	h.fh = fh
	t.slot(i).Store(h)
}

// putDone frees the places that no handle was put to.
func (t *handles) putDone() {
	t.mu.Lock()
	defer t.mu.Unlock()
	// What the process before gave out and took back is not known here, and its RELEASE may come again: no number of these
	// ages is given out.
	t.ages = (t.ages>>agesAhead + 1) << agesAhead
	for i := range t.size {
		if t.slot(i).Load() == nil {
			t.free = append(t.free, i)
		}
	}
}

// remove takes a number back; nil if it was not given out.
func (t *handles) remove(fh uint64) *handle {
	h := t.get(fh)
	if h == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.slot(placeOf(fh)).Store(nil)
	t.free = append(t.free, placeOf(fh))
	return h
}

// takeAll removes and returns every handle.
func (t *handles) takeAll() []*handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*handle
	for i := range t.size {
		if h := t.slot(i).Swap(nil); h != nil {
			all = append(all, h)
			t.free = append(t.free, i)
		}
	}
	return all
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
