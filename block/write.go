package block

import (
	"golang.org/x/sys/unix"
)

// WriteAt writes p at off. The application gets the errno of a write that failed; what was written before it counts.
//
// The way of a write: fits makes sure that the table is not in the way. Bytes for blocks that are all Upper go straight
// to the upper file. Otherwise the bytes are written first, and then the states follow: a block whose live bytes are all
// new becomes Upper, a block of which only a part is new becomes InTransit and the copier brings the rest.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	end := off + int64(len(p))
	if off < 0 {
		return 0, unix.EINVAL
	}
	if end < off {
		return 0, unix.EFBIG
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := f.lockFor(end, end); err != nil {
		return 0, err
	}
	defer f.shape.RUnlock()
	if f.plain.Load() {
		return f.writeUpper(p, off)
	}
	n, err := f.write(p, off)
	if n > 0 { // a write that was refused does not move the end
		f.grow(off + int64(n))
		f.written.Add(int64(n))
	}
	return n, err
}

// lockFor read-locks shape with room for bytes up to end, and for a logical size of size. Without error it is locked.
func (f *File) lockFor(end, size int64) error {
	for {
		f.shape.RLock()
		if f.closed.Load() {
			f.shape.RUnlock()
			return unix.EBADF
		}
		if f.plain.Load() || f.fits(end, size) {
			return nil
		}
		f.shape.RUnlock()
		if err := f.makeRoom(end, size); err != nil {
			return err
		}
	}
}

// fits: bytes up to end do not touch the table, and growing to size uncovers nothing but zeros.
func (f *File) fits(end, size int64) bool {
	return end <= f.bound && end <= f.maxSize() && (f.tailClean || size <= f.size.Load())
}

// maxSize is the largest logical size of a sketch, bytes.
func (f *File) maxSize() int64 { return maxBlocks << f.shift }

// grow raises the logical size to end if it is smaller.
func (f *File) grow(end int64) {
	for {
		old := f.size.Load()
		if end <= old {
			return
		}
		if f.size.CompareAndSwap(old, end) {
			break
		}
	}
	m := f.mem.Load()
	if m == nil && (f.format != Sparse || f.bound != unbounded) { // otherwise the upper file's length says it
		m = f.known()
	}
	if m != nil {
		m.grow(end)
	}
}

// writeUpper is one write into the upper file for an application.
func (f *File) writeUpper(p []byte, at int64) (int, error) {
	f.times.RLock()
	defer f.times.RUnlock()
	return f.s.WriteAt(p, at)
}

// write stores p and advances the states. The caller holds shape.
func (f *File) write(p []byte, off int64) (int, error) {
	end := off + int64(len(p))
	upper, err := f.allUpper(off, end)
	if err != nil {
		return 0, err
	}
	if f.format == Sparse {
		if upper {
			return f.writeUpper(p, off)
		}
		return f.writeSparse(p, off)
	}
	if upper {
		return f.overwritePhys(p, off)
	}
	return f.appendPhys(p, off)
}

// allUpper says whether every block of [off, end) is Upper. It loads every region that the range touches.
func (f *File) allUpper(off, end int64) (bool, error) {
	if f.format == Sparse {
		end = min(end, f.limit)
	}
	all := true
	for b, last := off>>f.shift, ceilDiv(end, f.bs); b < last; {
		n := b / regionBlocks
		r, err := f.region(n)
		if err != nil {
			return false, err
		}
		stop := min(last, (n+1)*regionBlocks)
		if !f.overwritable(r, b-n*regionBlocks, stop-n*regionBlocks) {
			all = false
			for i := b; i < stop; i++ {
				if r.state(i-n*regionBlocks) == stateDamaged {
					return false, f.damaged(i)
				}
			}
		}
		b = stop
	}
	return all, nil
}

// overwritable: blocks [i, end) of r are Upper and have a place of their own.
func (f *File) overwritable(r *region, i, end int64) bool {
	if r.runEnd(i, end, stateUpper) != end {
		return false
	}
	if r.phys != nil {
		for ; i < end; i++ {
			if r.phys[i].Load() == physZero {
				return false
			}
		}
	}
	return true
}

// writeSparse writes to blocks of which some are not Upper. In the sparse format every byte has its place, so this is
// one write whatever the states are.
func (f *File) writeSparse(p []byte, off int64) (int, error) {
	f.mu.Lock()
	n, err := f.writeUpper(p, off)
	partial := f.mark(off, off+int64(n))
	f.mu.Unlock()
	return n, f.follow(partial, off, off+int64(n), err)
}

// mark advances the states after the bytes [off, end) became new, and says whether a block went InTransit. The caller
// holds mu and shape.
func (f *File) mark(off, end int64) (partial bool) {
	if f.format == Sparse {
		end = min(end, f.limit)
	}
	if off < end {
		f.remember(bytesNew, off, end, 0)
	}
	for off < end {
		b := off >> f.shift
		if off == b<<f.shift {
			if full := f.fullBlocks(b, end); full > b {
				f.markFull(b, full)
				off = full << f.shift
				continue
			}
		}
		next := min(end, (b+1)<<f.shift)
		if f.markPartial(b, off, next) {
			partial = true
		}
		off = next
	}
	return partial
}

// fullBlocks returns the block behind the last one, counted from b, whose live bytes all lie below end.
func (f *File) fullBlocks(b, end int64) int64 {
	full := end >> f.shift
	if end >= f.limit {
		full = max(full, ceilDiv(end, f.bs)) // what is left of the last block lies behind the limit
	}
	return max(full, b)
}

// markFull makes blocks [b, end) Upper.
func (f *File) markFull(b, end int64) {
	for b < end {
		n := b / regionBlocks
		stop := min(end, (n+1)*regionBlocks)
		if r := f.mutable(n); r != fullRegion {
			f.forgetTransit(b, stop)
			r.setRun(b-n*regionBlocks, stop-n*regionBlocks, stateUpper)
			r.dirty.Store(true)
		}
		b = stop
	}
}

// forgetTransit drops what is remembered of blocks [b, end), which are Upper now or gone.
func (f *File) forgetTransit(b, end int64) {
	if len(f.transit) == 0 {
		return
	}
	if end-b > int64(len(f.transit)) {
		for k := range f.transit {
			if k >= b && k < end {
				f.dropTransit(k)
			}
		}
		return
	}
	for ; b < end; b++ {
		f.dropTransit(b)
	}
}

func (f *File) dropTransit(b int64) {
	if _, ok := f.transit[b]; ok {
		delete(f.transit, b)
		f.e.inTransit.Add(-1)
	}
}

// markPartial remembers that [off, end), a part of block b, is new.
func (f *File) markPartial(b, off, end int64) (partial bool) {
	r := f.mutable(b / regionBlocks)
	i := b % regionBlocks
	if r.state(i) == stateUpper {
		return false
	}
	start := b << f.shift
	live := min(start+f.bs, f.limit) - start
	spans, known := f.transit[b]
	if lo, hi := off-start, min(end-start, live); lo < hi {
		spans = addSpan(spans, span{uint32(lo), uint32(hi)})
	}
	if live <= 0 || len(spans) == 1 && int64(spans[0].lo) == 0 && int64(spans[0].hi) == live {
		f.dropTransit(b)
		r.set(i, stateUpper)
		r.dirty.Store(true)
		return false
	}
	if !known {
		f.e.inTransit.Add(1)
	}
	f.transit[b] = spans
	r.set(i, stateTransit)
	return true
}

// follow does what the CaW mode wants after a write of [off, end) left blocks InTransit. err is the write's own.
func (f *File) follow(partial bool, off, end int64, err error) error {
	if !partial || err != nil {
		return err
	}
	switch {
	case f.e.opts.CaW == CaWSync, f.e.inTransit.Load() > maxInTransit:
		return f.completeRange(off, end)
	case f.e.opts.CaW == CaWEager:
		f.e.enqueue(f)
	}
	return nil
}
