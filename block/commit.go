package block

import (
	"errors"
	"slices"

	"golang.org/x/sys/unix"
)

// Sync completes the InTransit blocks and puts data, table, header and size on disk, in this order. Blocks that cannot
// be completed do not keep the others from the disk; their error is returned. With dataOnly, the owner, the mode and the
// times need not survive, as in fdatasync(2): where no blocks are new that saves the filesystem a transaction.
func (f *File) Sync(dataOnly bool) error {
	f.commitMu.Lock()
	defer f.commitMu.Unlock()
	if f.closed.Load() {
		return unix.EBADF
	}
	f.bringAhead()
	synced, err := f.commitLocked(dataOnly)
	if synced {
		f.syncs.Add(1)
	}
	if synced || f.broken != nil {
		return err
	}
	return errors.Join(err, f.syncStore(dataOnly))
}

// commit puts what is not yet there on disk. A file that has nothing new is left alone.
func (f *File) commit() error {
	_, err := f.commitNew()
	return err
}

// commitNew is commit, and says whether there was something new.
func (f *File) commitNew() (wrote bool, err error) {
	f.commitMu.Lock()
	defer f.commitMu.Unlock()
	if f.closed.Load() {
		return false, nil
	}
	return f.commitLocked(true)
}

// commitLocked is commit with commitMu held. synced: everything written before the call is on disk, with dataOnly except
// for what only concerns the inode.
//
// The order is the whole point: what says that a block is Upper, table or header, reaches the disk only after the block's
// bytes. The table is data of the upper file; the header is not, so that where it changes the second sync is a full one
// (syncStore).
func (f *File) commitLocked(dataOnly bool) (synced bool, err error) {
	if f.provisional.Load() {
		return f.commitWhole()
	}
	if f.plain.Load() {
		return false, nil
	}
	if f.broken != nil {
		return false, f.broken
	}
	copyErr := f.completeAll()
	if err := f.trim(); err != nil {
		return false, errors.Join(copyErr, err)
	}
	_ = f.fold() // if it fails, the addendum stays, and if it gets too long the table is written below
	size, err := f.stage()
	if err != nil {
		return false, errors.Join(copyErr, err)
	}
	whole := f.whole()
	if !whole && !f.news() && (f.hdr.Size == naturalSize || f.hdr.Size == size) {
		return false, copyErr
	}
	if err := f.coverLeaves(); err != nil {
		return false, errors.Join(copyErr, err)
	}
	if whole {
		if err := f.order(); err != nil {
			return false, errors.Join(copyErr, err)
		}
		if err := f.finish(); err != nil {
			return false, errors.Join(copyErr, err)
		}
		return true, errors.Join(copyErr, f.makeOrdinary())
	}
	if named, err := f.nameNew(size); named || err != nil {
		return named, errors.Join(copyErr, err)
	}
	if err := f.syncStore(true); err != nil {
		return false, errors.Join(copyErr, err)
	}
	if err := f.writeTable(size, f.tableDirty()); err != nil {
		return false, errors.Join(copyErr, err)
	}
	if err := f.syncStore(dataOnly); err != nil {
		return true, errors.Join(copyErr, err)
	}
	f.fresh, f.folded = nil, true
	return true, copyErr
}

// trim cuts off what a refused truncation has left behind the end of a sketch whose size is the upper file's. The caller
// holds commitMu.
func (f *File) trim() error {
	if f.hdr.Size != naturalSize {
		return nil
	}
	f.shape.Lock()
	defer f.shape.Unlock()
	if f.tailClean {
		return nil
	}
	return f.cleanTail()
}

// nameNew commits the staged blocks and size with a header that names them. named: it has; otherwise, without an error, the
// table has to be written.
func (f *File) nameNew(size int64) (named bool, err error) {
	add, fits := f.addendum()
	if !fits {
		return false, nil
	}
	if err := f.order(); err != nil {
		return false, err
	}
	h := f.hdr
	h.Limit, h.Addendum = f.limit, add
	if h.Size != naturalSize {
		h.Size = size
	}
	if err := f.setHeader(h); err != nil {
		return false, nil // no space for a longer attribute
	}
	f.folded = false
	if err := f.syncStore(false); err != nil {
		return true, err
	}
	f.fresh = nil
	f.told()
	return true, nil
}

// syncStore is Store.Sync, or SyncData if that will do.
func (f *File) syncStore(dataOnly bool) error {
	if dataOnly && f.attrsSynced { // what fdatasync need not write may be our header
		return f.syncWith(f.s.SyncData)
	}
	err := f.syncWith(f.s.Sync)
	f.attrsSynced = f.attrsSynced || err == nil
	return err
}

// syncWith syncs the upper file, unless the mount is volatile. Once that has failed nothing says what the disk holds: the
// table does not advance any more, and every later Sync fails too.
func (f *File) syncWith(sync func() error) error {
	if f.e.opts.Volatile {
		return nil
	}
	if f.broken != nil {
		return f.broken
	}
	err := sync()
	if err != nil {
		f.e.fail("syncing the upper file of inode %d: %v", f.ino(), err)
		if f.Sketch() {
			f.breaks(err)
		}
	}
	return err
}

// breaks notes that what the disk holds of the sketch is not known any more. A take-over does not forget it.
func (f *File) breaks(err error) {
	f.broken = err
	if m := f.known(); m != nil {
		errno := unix.EIO
		_ = errors.As(err, &errno)
		m.broken.Store(uint32(errno))
	}
}

// stage tells the table in memory which blocks are Upper, and returns a logical size: everything it speaks of was
// written before, so the next Sync of the upper file makes it durable.
func (f *File) stage() (size int64, err error) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	size = f.size.Load()
	for n, p := range f.dir.all() {
		r := p.Load()
		if !r.dirty.Load() {
			continue
		}
		if f.format != Sparse {
			err = f.stagePhys(n, r)
		} else {
			err = f.stageBits(n, r)
		}
		if err != nil {
			return 0, err
		}
		if f.e.opts.Memory != nil && !slices.Contains(f.staged, n) {
			f.staged = append(f.staged, n)
		}
		r.dirty.Store(false)
		if f.format == Sparse && r.runEnd(0, regionBlocks, stateUpper) == regionBlocks {
			p.Store(fullRegion)
		}
	}
	return size, nil
}

// tableDirty says whether the table in memory is newer than the one on disk.
func (f *File) tableDirty() bool {
	if f.tab.anyDirty() {
		return true
	}
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	for _, l := range f.bcow.leaves {
		if l.dirty {
			return true
		}
	}
	return false
}

// whole says whether every block that the lower file shows is Upper, so that a sparse sketch is complete.
func (f *File) whole() bool {
	f.shape.RLock()
	defer f.shape.RUnlock()
	if f.format != Sparse {
		return false
	}
	blocks := f.blocks()
	for ; f.fullTo*regionBlocks < blocks; f.fullTo++ {
		r, err := f.region(f.fullTo)
		n := min(regionBlocks, blocks-f.fullTo*regionBlocks)
		if err != nil || r.runEnd(0, n, stateUpper) != n {
			return false
		}
	}
	return true
}

// writeTable puts the staged table and a header with size on disk. The data has been synced.
func (f *File) writeTable(size int64, dirty bool) error {
	if dirty && f.tab.npages == 0 {
		if err := f.placeTable(size); err != nil {
			return err
		}
	}
	err := f.quietly(func() error {
		if _, err := f.flushLeaves(); err != nil {
			return err
		}
		_, err := f.tab.flush(f.s)
		return err
	})
	if err != nil {
		return err
	}
	h := f.hdr
	h.Limit = f.limit
	if h.Size != naturalSize {
		h.Size = size
	}
	if f.folded { // the sync before this has put it there
		h.Addendum = encodeRanges(f.inDamaged())
	}
	if h != f.hdr {
		if err := f.setHeader(h); err != nil {
			return err
		}
	}
	f.told()
	return nil
}

// finish turns a sketch whose bytes all lie at their natural places, on disk, into an ordinary file. Every step leaves
// a file that recover can finish. The caller holds commitMu, or is alone.
func (f *File) finish() error {
	f.shape.Lock()
	defer f.shape.Unlock()
	if err := f.setOrigin(); err != nil { // while nothing is changed yet
		return err
	}
	if f.hdr.Size != naturalSize {
		h := f.hdr
		h.Complete, h.Size, h.Limit, h.TablePages, h.TablePos, h.Addendum = true, f.size.Load(), 0, 0, 0, ""
		if err := f.setHeader(h); err != nil {
			return err
		}
		if err := f.quietly(func() error { return f.s.Truncate(h.Size) }); err != nil {
			return err
		}
	}
	return f.becomePlain()
}

// setOrigin writes down what is to remain of the header. The caller holds commitMu, or is alone.
func (f *File) setOrigin() error {
	if f.hdr.Kernel {
		return nil
	}
	f.attrsSynced = false
	return f.s.SetOrigin(f.hdr.Ident.Origin())
}

// becomePlain takes the last steps of a completion but for the sync, until which the file is provisional (see whole.go).
// Where the header cannot be removed, but says already that nothing of the lower file counts, the next commit tries again.
// The caller holds commitMu and shape, or is alone.
func (f *File) becomePlain() error {
	f.attrsSynced = false
	if err := f.s.RemoveHeader(); err != nil {
		if !f.hdr.Complete {
			return err
		}
	} else {
		f.headerless = true
		f.e.complete.Add(1)
	}
	if m := f.known(); m != nil {
		m.provisional.Store(1)
	}
	f.provisional.Store(true)
	f.plain.Store(true)
	f.closeLower()
	f.mu.Lock()
	f.e.inTransit.Add(-int64(len(f.transit)))
	f.transit, f.dir, f.bcow.leaves = nil, directory{}, nil
	if m := f.mem.Load(); m != nil {
		f.beginLog(m) // of nothing
	}
	f.mu.Unlock()
	return nil
}
