package block

import (
	"golang.org/x/sys/unix"
)

const (
	keepSize = unix.FALLOC_FL_KEEP_SIZE
	punch    = unix.FALLOC_FL_PUNCH_HOLE | keepSize
)

// Fallocate is fallocate(2) on the logical file, with ext4's errnos.
func (f *File) Fallocate(mode uint32, off, n int64) error {
	if off < 0 || n <= 0 {
		return unix.EINVAL
	}
	if off+n < off {
		return unix.EFBIG
	}
	if done, err := f.fallocatePlain(mode, off, n); done {
		return err
	}
	switch mode {
	case 0, keepSize:
		return f.preallocate(mode, off, off+n)
	case punch:
		return f.zeroRange(punch, off, off+n)
	case unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | keepSize:
		return f.zeroRange(mode, off, off+n)
	case unix.FALLOC_FL_COLLAPSE_RANGE, unix.FALLOC_FL_INSERT_RANGE:
		return f.shiftBytes(mode, off, n)
	case unix.FALLOC_FL_UNSHARE_RANGE, unix.FALLOC_FL_UNSHARE_RANGE | keepSize:
		return f.unshare(mode, off, n)
	}
	return unix.EOPNOTSUPP
}

// fallocatePlain passes the call on if the file is an ordinary one.
func (f *File) fallocatePlain(mode uint32, off, n int64) (done bool, err error) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	if f.closed.Load() {
		return true, unix.EBADF
	}
	if !f.plain.Load() {
		return false, nil
	}
	f.times.RLock()
	defer f.times.RUnlock()
	return true, f.s.Fallocate(mode, off, n)
}

// sizeAfter is the logical size that an operation up to end asks for.
func (f *File) sizeAfter(mode uint32, end int64) int64 {
	if mode&keepSize != 0 {
		return 0
	}
	return end
}

// upperMode adds KEEP_SIZE where the upper file's length is not the logical size.
func (f *File) upperMode(mode uint32) uint32 {
	if f.bound != unbounded {
		mode |= keepSize
	}
	return mode
}

// preallocate reserves space for [off, end). In the sparse format it lies under the blocks, which stay Lower.
func (f *File) preallocate(mode uint32, off, end int64) error {
	size := f.sizeAfter(mode, end)
	if err := f.lockFor(end, size); err != nil {
		return err
	}
	defer f.shape.RUnlock()
	if f.plain.Load() {
		return f.s.Fallocate(mode, off, end-off)
	}
	if f.format != Sparse {
		return f.preallocatePhys(off, end, size)
	}
	if err := f.allocateUpper(mode, off, end); err != nil {
		return err
	}
	f.grow(size)
	return nil
}

// zeroRange makes [off, end) zeros: FALLOC_FL_PUNCH_HOLE or FALLOC_FL_ZERO_RANGE. To the states it is a write.
func (f *File) zeroRange(mode uint32, off, end int64) error {
	size := f.sizeAfter(mode, end)
	if err := f.lockFor(max(size, 0), size); err != nil {
		return err
	}
	defer f.shape.RUnlock()
	if f.plain.Load() {
		return f.s.Fallocate(mode, off, end-off)
	}
	if f.bound != unbounded {
		end = min(end, max(size, f.size.Load()))
	}
	if off >= end {
		return nil
	}
	if _, err := f.allUpper(off, end); err != nil {
		return err
	}
	if f.format != Sparse {
		return f.zeroPhys(off, end, size)
	}
	f.mu.Lock()
	err := f.allocateUpper(mode, off, end)
	partial := err == nil && f.mark(off, min(end, max(size, f.size.Load())))
	f.mu.Unlock()
	if err == nil {
		f.grow(size)
	}
	return f.follow(partial, off, end, err)
}

// allocateUpper is fallocate on the upper file of a sparse sketch, for an application. Filesystems that run out of space
// half-way keep what they have done, the new length too: where that is the logical size, it is taken over.
func (f *File) allocateUpper(mode uint32, off, end int64) error {
	f.times.RLock()
	defer f.times.RUnlock()
	mode = f.upperMode(mode)
	err := f.s.Fallocate(mode, off, end-off)
	if err != nil && mode&keepSize == 0 {
		if st, serr := f.s.Stat(); serr == nil {
			f.grow(st.Size)
		}
	}
	return err
}

// shiftBytes is FALLOC_FL_COLLAPSE_RANGE and FALLOC_FL_INSERT_RANGE, which move every byte behind off: the sketch is
// completed first.
func (f *File) shiftBytes(mode uint32, off, n int64) error {
	if f.format != Sparse {
		return unix.EOPNOTSUPP
	}
	// No filesystem moves single bytes: this changes nothing and says whether it knows the operation.
	if err := f.s.Fallocate(mode, 1, 1); err != unix.EINVAL {
		return err
	}
	st, err := f.s.Stat()
	if err != nil {
		return err
	}
	size := f.Size()
	if blk := int64(st.Blksize); off%blk != 0 || n%blk != 0 || off >= size ||
		mode == unix.FALLOC_FL_COLLAPSE_RANGE && off+n >= size {
		return unix.EINVAL
	}
	if err := f.Complete(); err != nil {
		return err
	}
	_, err = f.fallocatePlain(mode, off, n)
	return err
}

// unshare gives [off, off+n) its own space, if the filesystem knows that operation.
func (f *File) unshare(mode uint32, off, n int64) error {
	if f.format != Sparse {
		return unix.EOPNOTSUPP
	}
	size := f.sizeAfter(mode, off+n)
	if err := f.lockFor(off+n, size); err != nil {
		return err
	}
	err := f.allocateUpper(mode, off, off+n) // which zeroes nothing: it is the same call with this mode
	f.shape.RUnlock()
	if err != nil {
		return err
	}
	f.grow(size)
	return f.bringUp(off, off+n)
}

// preallocatePhys gives every block of [off, end) a place. The caller holds shape.
func (f *File) preallocatePhys(off, end, size int64) error {
	if _, err := f.allUpper(off, end); err != nil {
		return err
	}
	for o := off &^ (f.bs - 1); o < min(end, f.limit); {
		next, err := f.fillRange(o, min(roundUp(end, f.bs), f.limit))
		if err != nil {
			return err
		}
		o = next
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	last := ceilDiv(end, f.bs)
	for b := off >> f.shift; b < last; {
		r := f.mutable(b / regionBlocks)
		run := f.unplacedRun(r, b, last)
		if run == 0 {
			b++
			continue
		}
		at, err := f.bcow.take(run)
		if err != nil {
			return err
		}
		if err := f.s.Fallocate(0, at<<f.shift, run<<f.shift); err != nil {
			return err
		}
		f.place(b, b+run, at)
		f.remember(blocksUpper, b, b+run, 0)
		r.setRun(b%regionBlocks, b%regionBlocks+run, stateUpper)
		b += run
	}
	f.grow(size)
	return nil
}

// zeroPhys makes [off, end) zeros in a bcow file. The caller holds shape, and has loaded the regions.
func (f *File) zeroPhys(off, end, size int64) error {
	partial, err := f.zeroBlocks(off, end, size)
	if err != nil {
		return err
	}
	f.times.Lock()
	err = f.s.SetTimes(omitTime, nowTime)
	f.times.Unlock()
	return f.follow(partial, off, end, err)
}

// zeroBlocks is zeroPhys but for the times and for what follows a write.
func (f *File) zeroBlocks(off, end, size int64) (partial bool, err error) {
	zeros := getBuf(int(f.bs))
	defer putBuf(zeros)
	clear(*zeros)
	whole := max(size, f.size.Load())
	f.mu.Lock()
	defer f.mu.Unlock()
	for o := off; o < end; {
		b := o >> f.shift
		start, next := b<<f.shift, min(end, (b+1)<<f.shift)
		r := f.mutable(b / regionBlocks)
		i := b % regionBlocks
		switch full := o == start && (next == start+f.bs || next >= whole); {
		case f.placed(r, i):
			at := int64(r.phys[i].Load()) << f.shift
			if err := f.discard(at+o-start, at+next-start); err != nil {
				return partial, err
			}
			partial = f.mark(o, next) || partial
		case r.state(i) == stateUpper || start >= f.limit: // zeros already
		case full:
			f.placeZero(b, b+1)
			f.remember(blocksUpper, b, b+1, 0)
			f.markFull(b, b+1)
		default:
			_, p, err := f.appendRuns((*zeros)[:next-o], o)
			if err != nil {
				return partial, err
			}
			partial = partial || p
		}
		o = next
	}
	f.grow(size)
	return partial, nil
}
