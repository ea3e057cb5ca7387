package block

import (
	"iter"
	"math/bits"
	"sync/atomic"
)

// State of one block.
type State uint8

const (
	stateLower   State = 0 // not touched: its bytes below the lower limit are the lower file's
	stateTransit State = 1 // partly written; the rest still has to be copied
	stateUpper   State = 2
	// stateDamaged: a damaged piece of the table speaks for the block. Nothing but truncation gets it out of this state.
	stateDamaged State = 3
)

const (
	regionBlocks  = 1024 // blocks a region: 4 MiB of 4 KiB blocks
	statesPerWord = 32
	regionWords   = regionBlocks / statesPerWord
	chunkRegions  = 512
)

// words are the states of one region, two bits a block: flat, without Go pointers, changed by atomic operations alone.
type words [regionWords]atomic.Uint64

// pattern[s] is a word whose blocks are all in state s.
var pattern = [...]uint64{stateLower: 0, stateTransit: 0x5555555555555555, stateUpper: 0xaaaaaaaaaaaaaaaa, stateDamaged: ^uint64(0)}

// region is the in-memory state of regionBlocks blocks. Readers load states without a lock; all changes happen under
// File.mu.
type region struct {
	words words
	phys  *[regionBlocks]atomic.Uint32 // bcow only: where each block lies; 0 = nowhere
	dirty atomic.Bool                  // holds Upper blocks that no table page has been told of
}

// emptyRegion and fullRegion stand for every region whose blocks are all Lower, or all Upper for good (sparse only).
// They are shared and never changed.
var (
	emptyRegion = &region{}
	fullRegion  = func() *region {
		r := &region{}
		for i := range r.words {
			r.words[i].Store(pattern[stateUpper])
		}
		return r
	}()
)

func (r *region) state(i int64) State {
	return State(r.words[i/statesPerWord].Load() >> (i % statesPerWord * 2) & 3)
}

// set changes one block's state. The caller holds File.mu.
func (r *region) set(i int64, s State) {
	w, shift := &r.words[i/statesPerWord], i%statesPerWord*2
	w.Store(w.Load()&^(3<<shift) | uint64(s)<<shift)
}

// setRun changes blocks [i, end) to s. The caller holds File.mu.
func (r *region) setRun(i, end int64, s State) {
	for i < end {
		if i%statesPerWord == 0 && end-i >= statesPerWord {
			r.words[i/statesPerWord].Store(pattern[s])
			i += statesPerWord
			continue
		}
		r.set(i, s)
		i++
	}
}

// runEnd returns the first block at or after i, at most end, that is not in state s.
func (r *region) runEnd(i, end int64, s State) int64 {
	for i < end {
		w := r.words[i/statesPerWord].Load() ^ pattern[s]
		w >>= i % statesPerWord * 2
		if w != 0 {
			return min(i+int64(bits.TrailingZeros64(w)/2), end)
		}
		i += statesPerWord - i%statesPerWord
	}
	return end
}

// count returns how many of the first n blocks are in state s.
func (r *region) count(n int64, s State) (c int64) {
	for i := int64(0); i < n; i++ {
		if r.state(i) == s {
			c++
		}
	}
	return c
}

// chunk is a second level of the region directory, so that a long file costs memory only where it is touched.
type chunk [chunkRegions]atomic.Pointer[region]

// directory finds a file's regions.
type directory struct{ chunks []atomic.Pointer[chunk] }

func newDirectory(blocks int64) directory {
	return directory{make([]atomic.Pointer[chunk], ceilDiv(blocks, regionBlocks*chunkRegions))}
}

// grow makes room for more blocks. Nobody else may use the directory meanwhile.
func (d *directory) grow(blocks int64) {
	n := ceilDiv(blocks, regionBlocks*chunkRegions)
	if n <= int64(len(d.chunks)) {
		return
	}
	bigger := make([]atomic.Pointer[chunk], n)
	for i := range d.chunks {
		bigger[i].Store(d.chunks[i].Load())
	}
	d.chunks = bigger
}

// at returns the place of region n, making its chunk if need be.
func (d *directory) at(n int64) *atomic.Pointer[region] {
	p := &d.chunks[n/chunkRegions]
	c := p.Load()
	if c == nil {
		c = &chunk{}
		if !p.CompareAndSwap(nil, c) {
			c = p.Load()
		}
	}
	return &c[n%chunkRegions]
}

// inMemory returns the first region in [n, end) that is in memory and not empty; end if there is none.
func (d *directory) inMemory(n, end int64) int64 {
	for n < end && n/chunkRegions < int64(len(d.chunks)) {
		c := d.chunks[n/chunkRegions].Load()
		if c == nil {
			n = (n/chunkRegions + 1) * chunkRegions
			continue
		}
		if r := c[n%chunkRegions].Load(); r != nil && r != emptyRegion {
			return n
		}
		n++
	}
	return max(n, end)
}

// all yields every region in memory, in order.
func (d *directory) all() iter.Seq2[int64, *atomic.Pointer[region]] {
	return func(yield func(int64, *atomic.Pointer[region]) bool) {
		for i := range d.chunks {
			c := d.chunks[i].Load()
			if c == nil {
				continue
			}
			for k := range c {
				if c[k].Load() != nil && !yield(int64(i)*chunkRegions+int64(k), &c[k]) {
					return
				}
			}
		}
	}
}
