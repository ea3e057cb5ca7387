package block

import (
	"slices"
	"time"
)

const (
	// copyDelay lets the writes that follow a partial one arrive first: sequential small writes then fill their blocks
	// by themselves, and nothing is copied.
	copyDelay = 5 * time.Millisecond
	// retryDelay is how long blocks that could not be copied wait for the next attempt; it doubles maxRetryShift times.
	retryDelay    = 2 * time.Second
	maxRetryShift = 5
	// hurryBlocks InTransit blocks of a mount make the copier start at once; at maxInTransit writers copy for themselves.
	hurryBlocks  = 4096
	maxInTransit = 1 << 16
)

// completeRange completes the InTransit blocks that [off, end) touches. The caller holds shape.
func (f *File) completeRange(off, end int64) error {
	var list []int64
	f.mu.Lock()
	first, last := off>>f.shift, ceilDiv(end, f.bs)
	if last-first > int64(len(f.transit)) {
		for b := range f.transit {
			if b >= first && b < last {
				list = append(list, b)
			}
		}
	} else {
		for b := first; b < last; b++ {
			if _, ok := f.transit[b]; ok {
				list = append(list, b)
			}
		}
	}
	f.mu.Unlock()
	return f.completeBlocks(list)
}

// completeAll completes the blocks that are InTransit now. It returns the first error, having tried all.
func (f *File) completeAll() error {
	f.mu.Lock()
	list := make([]int64, 0, len(f.transit))
	for b := range f.transit {
		list = append(list, b)
	}
	f.mu.Unlock()
	slices.Sort(list)
	var first error
	for len(list) > 0 {
		n := min(len(list), f.chunkBlocks())
		f.shape.RLock()
		err := f.completeBlocks(list[:n])
		f.shape.RUnlock()
		if first == nil {
			first = err
		}
		list = list[n:]
	}
	return first
}

// chunkBlocks is how many blocks are copied at once.
func (f *File) chunkBlocks() int { return int(max(1, copyChunk>>f.shift)) }

// completeBlocks completes the blocks of a list, adjacent ones together. It returns the first error, having tried all.
// The caller holds shape, and not mu.
func (f *File) completeBlocks(list []int64) error {
	if f.plain.Load() || f.closed.Load() {
		return nil
	}
	slices.Sort(list)
	var first error
	for len(list) > 0 {
		n := 1
		for n < len(list) && n < f.chunkBlocks() && list[n] == list[0]+int64(n) {
			n++
		}
		if err := f.completeRun(list[0], list[0]+int64(n)); err != nil && first == nil {
			first = err
		}
		list = list[n:]
	}
	return first
}

// completeRun brings what is missing of the InTransit blocks [first, last). The lower file is read without a lock, and
// what is missing is asked again before it is written: a write in between wins over the copy.
func (f *File) completeRun(first, last int64) error {
	from, to := f.missing(first, last)
	if from >= to {
		return nil
	}
	buf := getBuf(int(to - from))
	defer putBuf(buf)
	if err := f.readLower(*buf, from); err != nil {
		f.e.errs.Add(1)
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.plain.Load() {
		return nil
	}
	err := f.quietly(func() error {
		for b := first; b < last; {
			end := f.transitRun(b, last)
			if err := f.bring(b, end, *buf, from); err != nil {
				return err
			}
			b = end
		}
		return nil
	})
	if err != nil {
		f.e.errs.Add(1)
	}
	return err
}

// transitRun returns the end, at most last, of the blocks from b on that are InTransit and adjacent in the upper file. If b
// itself is not InTransit any more, because a write has filled it meanwhile, it is alone: its writers need no mu, and so it
// must not be written back with others. The caller holds mu.
func (f *File) transitRun(b, last int64) int64 {
	end := b
	for ; end < last && (end == b || f.format == Sparse); end++ {
		if _, ok := f.transit[end]; !ok {
			break
		}
	}
	return max(end, b+1)
}

// bring writes the gaps of blocks [first, last) out of lower, which holds the lower file's bytes from from on. Of several
// adjacent blocks the new bytes are read and everything is written back at once, which costs two system calls instead of
// one for every gap. Nobody can write to them meanwhile: who writes to a block that is not Upper needs mu. The caller holds
// mu and shape.
func (f *File) bring(first, last int64, lower []byte, from int64) error {
	if last-first == 1 {
		return f.fillGaps(first, lower, from)
	}
	lo, hi := f.gapsOf(first, last)
	if lo >= hi {
		return nil
	}
	whole := getBuf(int(hi - lo))
	defer putBuf(whole)
	if err := readZeroFilled(f.s, *whole, lo); err != nil {
		return err
	}
	copied := int64(0)
	for b := first; b < last; b++ {
		_ = f.eachGap(b, func(gap, end int64) error {
			copied += int64(copy((*whole)[gap-lo:end-lo], lower[gap-from:]))
			return nil
		})
	}
	if _, err := f.s.WriteAt(*whole, lo); err != nil {
		return err
	}
	f.e.copied.Add(copied)
	f.remember(blocksUpper, first, last, 0)
	f.markFull(first, last)
	return nil
}

// missing returns the smallest byte range that holds all gaps of the InTransit blocks in [first, last).
func (f *File) missing(first, last int64) (from, to int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.gapsOf(first, last)
}

// gapsOf is missing for a caller that holds mu.
func (f *File) gapsOf(first, last int64) (from, to int64) {
	from = f.limit
	for b := first; b < last; b++ {
		f.eachGap(b, func(lo, hi int64) error {
			from, to = min(from, lo), max(to, hi)
			return nil
		})
	}
	return from, to
}

// eachGap calls do for every byte range of block b that still has to be copied. The caller holds mu and shape.
func (f *File) eachGap(b int64, do func(lo, hi int64) error) error {
	spans, ok := f.transit[b]
	if !ok {
		return nil
	}
	start := b << f.shift
	live := min(f.bs, f.limit-start)
	if live <= 0 {
		return nil
	}
	return gaps(spans, uint32(live), func(lo, hi uint32) error { return do(start+int64(lo), start+int64(hi)) })
}

// fillGaps writes the gaps of block b out of buf, which holds the lower file's bytes from from on, and makes it Upper.
// The caller holds mu and shape.
func (f *File) fillGaps(b int64, buf []byte, from int64) error {
	if _, ok := f.transit[b]; !ok {
		return nil
	}
	move := f.upperAt(b) - b<<f.shift
	err := f.eachGap(b, func(lo, hi int64) error {
		n, err := f.s.WriteAt(buf[lo-from:hi-from], lo+move)
		f.e.copied.Add(int64(n))
		return err
	})
	if err != nil {
		return err
	}
	f.remember(blocksUpper, b, b+1, 0)
	f.dropTransit(b)
	r := f.mutable(b / regionBlocks)
	r.set(b%regionBlocks, stateUpper)
	r.dirty.Store(true)
	return nil
}

// upperAt is where block b, which has a place, lies in the upper file, bytes.
func (f *File) upperAt(b int64) int64 {
	if f.format == Sparse {
		return b << f.shift
	}
	r := f.dir.at(b / regionBlocks).Load()
	return int64(r.phys[b%regionBlocks].Load()) << f.shift
}

// copyQueued is one turn of the background copier.
func (f *File) copyQueued() {
	if f.closed.Load() {
		return
	}
	err := f.completeAll()
	if f.closed.Load() {
		return
	}
	f.report("copying to", err)
	if err == nil {
		f.retries.Store(0)
		return
	}
	delay := retryDelay << min(f.retries.Add(1)-1, maxRetryShift)
	time.AfterFunc(delay, func() { f.e.enqueue(f) })
}
