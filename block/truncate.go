package block

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Truncate sets the logical size. Shrinking lowers the lower limit for ever: what grows back is zeros.
func (f *File) Truncate(size int64) error {
	if size < 0 {
		return unix.EINVAL
	}
	f.commitMu.Lock()
	defer f.commitMu.Unlock()
	f.shape.Lock()
	defer f.shape.Unlock()
	if f.closed.Load() {
		return unix.EBADF
	}
	if f.plain.Load() {
		return f.s.Truncate(size)
	}
	if m := f.known(); m != nil { // from here on it is carried through, even if this process is killed
		m.cutTo.Store(size + 1)
		defer func() {
			if f.mem.Load() == m { // it goes when the file becomes an ordinary one
				m.cutTo.Store(0)
			}
		}()
	}
	var err error
	switch old := f.size.Load(); {
	case size == 0:
		return f.empty()
	case size < old:
		err = f.shrink(size)
	case size > old:
		err = f.extendTo(size)
	}
	return errors.Join(err, f.s.SetTimes(omitTime, nowTime))
}

// empty makes the sketch an ordinary file of length 0: nothing of the lower file is visible any more. The caller holds
// commitMu and shape.
func (f *File) empty() error {
	old := f.hdr
	if err := f.setOrigin(); err != nil { // while nothing is changed yet
		return err
	}
	if !old.Kernel {
		h := old
		h.Complete, h.Size, h.Limit, h.TablePages, h.TablePos, h.Addendum = true, 0, 0, 0, 0, ""
		if err := f.setHeader(h); err != nil {
			return err
		}
	}
	if err := f.s.Truncate(0); err != nil {
		return errors.Join(err, f.restoreHeader(old))
	}
	return f.becomePlain()
}

// restoreHeader takes back a header whose next step was refused. If that is refused too, memory and disk say different
// things of the file: nothing is committed any more.
func (f *File) restoreHeader(old Header) error {
	if old == f.hdr {
		return nil
	}
	err := f.setHeader(old)
	if err != nil {
		f.hdr = old
		f.breaks(err)
	}
	return err
}

// shrink cuts the sketch to size, which is less than the logical size. The header is written before anything is thrown
// away: after a crash in between, the bytes behind size are gone logically, and recover or cleanTail removes them. The
// caller holds commitMu and shape.
func (f *File) shrink(size int64) error {
	h := f.hdr
	h.Limit = min(f.limit, size)
	natural := h.Size == naturalSize
	if natural && h.Limit < f.limit {
		h.Size = size
	} else if !natural {
		h.Size = min(h.Size, size)
	}
	if h != f.hdr {
		if err := f.setHeader(h); err != nil {
			return err
		}
	}
	f.limit = h.Limit
	f.setSize(size)
	f.tailClean = false
	f.forgetBehindLimit()
	if !natural {
		return f.cleanTail()
	}
	if err := f.s.Truncate(size); err != nil {
		return err
	}
	f.tailClean = true
	if f.hdr.Size == naturalSize {
		return nil
	}
	h.Size = naturalSize
	return f.setHeader(h)
}

// forgetBehindLimit makes the states agree with a limit that was lowered: nothing behind it is InTransit any more, and
// the last block may have become whole. The caller holds shape.
func (f *File) forgetBehindLimit() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for b, spans := range f.transit {
		start := b << f.shift
		r := f.mutable(b / regionBlocks)
		switch live := f.limit - start; {
		case live <= 0:
			if f.format != Sparse {
				f.makeLower(b, b+1)
				continue
			}
			f.dropTransit(b)
			r.set(b%regionBlocks, stateLower)
		case live < f.bs:
			spans = clip(spans, uint32(live))
			f.transit[b] = spans
			if len(spans) == 1 && spans[0] == (span{0, uint32(live)}) {
				f.remember(blocksUpper, b, b+1, 0)
				f.dropTransit(b)
				r.set(b%regionBlocks, stateUpper)
				r.dirty.Store(true)
			}
		}
	}
}

// extendTo raises the logical size. The caller holds commitMu and shape.
func (f *File) extendTo(size int64) error {
	if err := f.roomLocked(size, size); err != nil {
		return err
	}
	if f.format == Sparse && f.bound == unbounded {
		if err := f.s.Truncate(size); err != nil {
			return err
		}
	}
	f.setSize(size)
	return nil
}

// makeRoom moves the table out of the way of bytes up to end, and makes sure that growing to size uncovers zeros.
func (f *File) makeRoom(end, size int64) error {
	f.commitMu.Lock()
	defer f.commitMu.Unlock()
	f.shape.Lock()
	defer f.shape.Unlock()
	if f.plain.Load() || f.closed.Load() {
		return nil
	}
	return f.roomLocked(end, size)
}

// roomLocked is makeRoom with commitMu and shape held.
func (f *File) roomLocked(end, size int64) error {
	if max(end, size) > f.maxSize() {
		return fmt.Errorf("a sketch of %d bytes: %w", max(end, size), unix.EFBIG)
	}
	if size > f.size.Load() && !f.tailClean {
		if err := f.cleanTail(); err != nil {
			return err
		}
	}
	if end <= f.bound {
		return nil
	}
	if f.format == Sparse {
		err := f.moveTable(tablePlace(end, end), f.tab.npages)
		if errors.Is(err, unix.EFBIG) { // the filesystem's longest file is near
			err = f.moveTable(tablePlace(end, minSlack), f.tab.npages)
		}
		return err
	}
	need := tablePages(f.format, ceilDiv(end, f.bs))
	pages := max(need, min(2*f.tab.npages, tablePages(f.format, maxBlocks)))
	f.mu.Lock()
	at, err := f.bcow.take(ceilDiv(pages*slotsSize, f.bs))
	f.mu.Unlock()
	if err != nil {
		return err
	}
	return f.moveTable(at<<f.shift, pages)
}

// moveTable writes the table at pos with room for npages, and only when it is on disk there points the header to it and
// frees the old place. On failure the old table stays in force. The caller holds commitMu and shape.
func (f *File) moveTable(pos, npages int64) error {
	if f.broken != nil {
		return f.broken
	}
	f.tab.mu.Lock()
	moved, err := f.tab.movedTo(f.s, pos, npages)
	f.tab.mu.Unlock()
	if err != nil {
		return err
	}
	return f.quietly(func() error {
		if f.format == Sparse {
			// Nothing of ours lies behind the old table, but an earlier move that did not get to its header may have left
			// pages there.
			if err := f.s.Truncate(f.tab.end()); err != nil {
				return err
			}
			if err := f.s.Truncate(moved.end()); err != nil {
				return err
			}
		}
		if _, err := moved.flush(f.s); err != nil {
			return err
		}
		if err := f.syncStore(false); err != nil {
			return err
		}
		h := f.hdr
		h.TablePos, h.TablePages = pos, npages
		if err := f.setHeader(h); err != nil {
			return err
		}
		old := f.tab
		f.tab = moved
		if f.format == Sparse {
			f.bound = pos
		} else {
			f.bound = npages * entriesPerPage(f.format) * f.bs
			f.dir.grow(npages * entriesPerPage(f.format))
		}
		// If this fails the old table's bytes would be read as data one day: have them cleaned before the size grows.
		if err := f.discard(old.pos, min(old.end(), pos)); err != nil {
			f.tailClean = false
			return err
		}
		return nil
	})
}

// cleanTail makes everything from the logical size to bound zeros. The caller holds commitMu and shape.
func (f *File) cleanTail() error {
	size := f.size.Load()
	err := f.quietly(func() error {
		if f.bound == unbounded {
			return f.s.Truncate(size) // no table behind the data: the upper file ends where the sketch does
		}
		if f.format == Sparse {
			return f.discard(size, min(f.bound, max(f.tab.pos, size)))
		}
		return f.dropBehind(size)
	})
	f.tailClean = err == nil
	return err
}

// dropBehind withdraws the table entries of all blocks behind size, frees their space, and zeroes the rest of the last
// block. An entry that survives a crash on disk then leads to a hole: zeros, which is what it should read as. The caller
// holds commitMu and shape.
func (f *File) dropBehind(size int64) error {
	first := ceilDiv(size, f.bs)
	for n := f.nextRegion(first / regionBlocks); n*regionBlocks < f.bound>>f.shift; n = f.nextRegion(n + 1) {
		r, err := f.region(n)
		if err != nil {
			return err
		}
		if r == emptyRegion {
			continue
		}
		for i := max(0, first-n*regionBlocks); i < regionBlocks; i++ {
			if err := f.drop(n*regionBlocks+i, r); err != nil {
				return err
			}
		}
	}
	if rest := size & (f.bs - 1); rest != 0 {
		b := size >> f.shift
		r, err := f.region(b / regionBlocks)
		if err != nil {
			return err
		}
		if r != emptyRegion && f.placed(r, b%regionBlocks) {
			at := int64(r.phys[b%regionBlocks].Load()) << f.shift
			return f.discard(at+rest, at+f.bs)
		}
	}
	return nil
}

// drop withdraws block b, which lies behind the logical size.
func (f *File) drop(b int64, r *region) error {
	i := b % regionBlocks
	switch r.state(i) {
	case stateLower:
		return nil
	case stateDamaged:
		return f.damaged(b)
	}
	if f.placed(r, i) {
		at := int64(r.phys[i].Load()) << f.shift
		if err := f.discard(at, at+f.bs); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.makeLower(b, b+1)
	return nil
}
