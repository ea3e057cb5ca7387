package block

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Complete copies every block that is still in the lower file. A sparse sketch becomes an ordinary file in place, holes
// staying holes. A bcow sketch keeps its format, but needs its lower file no more; FlattenTo makes an ordinary file of it.
func (f *File) Complete() error {
	if err := f.bringUp(0, unbounded); err != nil {
		return err
	}
	if err := f.commit(); err != nil || f.format == Sparse {
		return err
	}
	return f.leaveLower()
}

// leaveLower lowers the limit of a bcow sketch that holds all its blocks to 0.
func (f *File) leaveLower() error {
	f.commitMu.Lock()
	defer f.commitMu.Unlock()
	f.shape.Lock()
	defer f.shape.Unlock()
	if f.plain.Load() || f.closed.Load() || f.limit == 0 {
		return nil
	}
	h := f.hdr
	h.Limit = 0
	if err := f.setHeader(h); err != nil {
		return err
	}
	f.limit = 0
	f.closeLower()
	f.mu.Lock()
	defer f.mu.Unlock()
	for b := range f.transit { // written to since bringUp saw a hole of the lower file: the rest is zeros, and so it is here
		f.remember(blocksUpper, b, b+1, 0)
		f.dropTransit(b)
		r := f.mutable(b / regionBlocks)
		r.set(b%regionBlocks, stateUpper)
		r.dirty.Store(true)
	}
	return nil
}

// bringUp copies the blocks of [off, end) that are in the lower file, piece by piece: others may use the file meanwhile.
func (f *File) bringUp(off, end int64) error {
	for {
		next, err := f.bringPiece(off, end)
		if err != nil || next <= off {
			return err
		}
		off = next
	}
}

// bringPiece brings up a run of blocks that begins at off and returns where it ends; off when nothing is left to do.
func (f *File) bringPiece(off, end int64) (int64, error) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	off, end = off&^(f.bs-1), min(end, f.limit)
	if f.closed.Load() {
		return off, unix.EBADF
	}
	if f.plain.Load() || off >= end {
		return off, nil
	}
	end = min(roundUp(end, f.bs), f.limit)
	return f.fillRange(off, end)
}

// fillRange is one step of bringing [off, end) up. The caller holds shape.
func (f *File) fillRange(off, end int64) (next int64, err error) {
	x, err := f.extent(off, end)
	if err != nil {
		return off, err
	}
	switch x.src {
	case fromTransit:
		return x.end, f.completeRange(off, x.end)
	case fromLower:
		return f.fill(off, x.end)
	}
	return x.end, nil
}

// fill brings up Lower blocks from off on, at most to end: one run of data or one hole. The caller holds shape.
func (f *File) fill(off, end int64) (next int64, err error) {
	l, err := f.lowerFor()
	if err != nil {
		return off, err
	}
	start, stop, err := l.SeekData(off)
	switch {
	case errors.Is(err, unix.ENXIO):
		return end, f.fillHole(off, end)
	case err != nil:
		return off, err
	}
	if start &^= f.bs - 1; start > off {
		next = min(start, end)
		return next, f.fillHole(off, next)
	}
	next = min(end, max(roundUp(stop, f.bs), off+f.bs), off+max(copyChunk, f.bs))
	return next, f.fillData(off, next)
}

// fillData copies those blocks of [off, end) that are Lower. A write that comes in between wins: its blocks are not
// Lower any more when the copy is written.
func (f *File) fillData(off, end int64) error {
	buf := getBuf(int(end - off))
	defer putBuf(buf)
	if err := f.readLower(*buf, off); err != nil {
		f.e.errs.Add(1)
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.quietly(func() error {
		return f.lowerRuns(off, end, func(lo, hi int64) error {
			at := lo
			if f.format != Sparse {
				b, err := f.bcow.take(ceilDiv(hi-lo, f.bs))
				if err != nil {
					return err
				}
				at = b << f.shift
			}
			if _, err := f.s.WriteAt((*buf)[lo-off:hi-off], at); err != nil {
				return err
			}
			if f.format != Sparse {
				f.mutable(lo >> f.shift / regionBlocks)
				f.place(lo>>f.shift, ceilDiv(hi, f.bs), at>>f.shift)
			}
			f.mark(lo, hi)
			f.e.copied.Add(hi - lo)
			return nil
		})
	})
}

// fillHole makes those blocks of [off, end) that are Lower zeros without space. A bcow file needs nothing for that: once
// the lower limit is 0, a block that it does not hold is zeros.
func (f *File) fillHole(off, end int64) error {
	if f.format != Sparse {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.quietly(func() error {
		return f.lowerRuns(off, end, func(lo, hi int64) error {
			// A write that a crash left without its table entry may have put bytes here.
			if err := f.discard(lo, hi); err != nil {
				return err
			}
			f.mark(lo, hi)
			return nil
		})
	})
}

// placeZero makes blocks [b, end) of one region zeros without a place. The caller holds mu.
func (f *File) placeZero(b, end int64) {
	f.remember(blocksZero, b, end, 0)
	r := f.mutable(b / regionBlocks)
	for ; b < end; b++ {
		r.phys[b%regionBlocks].Store(physZero)
	}
	r.dirty.Store(true)
}

// lowerRuns calls do for every run of Lower blocks in [off, end), which begins with a block, cut at regions. The
// caller holds mu and shape.
func (f *File) lowerRuns(off, end int64, do func(lo, hi int64) error) error {
	for b, last := off>>f.shift, ceilDiv(end, f.bs); b < last; {
		n := b / regionBlocks
		r, err := f.region(n)
		if err != nil {
			return err
		}
		stop := min(last, (n+1)*regionBlocks)
		if r.state(b%regionBlocks) != stateLower {
			b++
			continue
		}
		run := n*regionBlocks + r.runEnd(b%regionBlocks, stop-n*regionBlocks, stateLower)
		if err := do(b<<f.shift, min(end, run<<f.shift)); err != nil {
			return err
		}
		b = run
	}
	return nil
}
