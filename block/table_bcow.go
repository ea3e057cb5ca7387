package block

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A bcow file is an array of blocks. The first ones hold the table; the others are data blocks and leaf blocks in the
// order of their writing. Block numbers are u32; 0 is no data block, because the first table lies there.
//
// The single-level table has a u32 for every block of the logical file. The two-level table has a u32 for every leaf,
// counted in units of leafSize, and a leaf has leafEntries block numbers. A leaf has two slots side by side in one
// sector, which disks write whole:
//
//	0   u32 crc32c of bytes 4-127, then of the leaf's index (u64)
//	4   u32 generation, compared modulo 2^32; never 0
//	8       30 u32 block numbers
const (
	leafEntries  = 30
	leafSlot     = 128
	leafSize     = 2 * leafSlot
	leavesInPage = defaultBlockSize / leafSize

	physNone = 0          // below the lower limit: the lower file's block; behind it: zeros
	physZero = ^uint32(0) // zeros, without a place of their own
	maxPhys  = physZero - 1
)

// appender is the part of a bcow File that knows where the next block goes.
type appender struct {
	next     atomic.Int64 // block number; changed under mu
	leafAt   uint32       // next free leaf of the current leaf block; under mu
	leafLeft int
	leafNew  bool            // a leaf block was taken that the upper file's length may not cover yet; under mu
	leaves   map[int64]*leaf // by index; under tab.mu
}

// leaf is the newest state of one leaf, in memory.
type leaf struct {
	at      uint32 // place, in units of leafSize; 0: none yet
	gen     uint32
	slot    int64
	dirty   bool
	damaged bool
	phys    [leafEntries]uint32
}

func (a *appender) init(f *File, stSize int64) error {
	a.leaves = make(map[int64]*leaf)
	next := max(ceilDiv(stSize, f.bs), ceilDiv(f.tab.end(), f.bs), 1)
	if next > int64(maxPhys) {
		return fmt.Errorf("%w: upper file of %d bytes", ErrInvalid, stSize)
	}
	a.next.Store(next)
	return nil
}

// take reserves n blocks behind all others. The caller holds mu.
func (a *appender) take(n int64) (int64, error) {
	at := a.next.Load()
	if at+n > int64(maxPhys) {
		return 0, fmt.Errorf("bcow file holds %d blocks, the most that the format can number: use format=sparse: %w", at, unix.EFBIG)
	}
	a.next.Store(at + n)
	return at, nil
}

// takeLeaf reserves a place for a leaf. The caller holds mu.
func (a *appender) takeLeaf() (uint32, error) {
	if a.leafLeft == 0 {
		at, err := a.take(1)
		if err != nil {
			return 0, err
		}
		if at >= 1<<32/leavesInPage {
			return 0, fmt.Errorf("bcow file holds 1 TiB, the most that its leaves can lie in: use format=sparse: %w", unix.EFBIG)
		}
		a.leafAt, a.leafLeft, a.leafNew = uint32(at*leavesInPage), leavesInPage, true
	}
	a.leafAt++
	a.leafLeft--
	return a.leafAt - 1, nil
}

// parseLeaf reads leaf index from b: a pure function of its bytes. Both slots lie in one sector, so no power cut tears
// them: a slot that is neither good nor zero is damage.
func parseLeaf(b []byte, index int64) *leaf {
	l := &leaf{slot: 1}
	for i := range int64(2) {
		s := b[i*leafSlot : (i+1)*leafSlot]
		if allZero(s) {
			continue
		}
		gen := binary.LittleEndian.Uint32(s[4:])
		if gen == 0 || binary.LittleEndian.Uint32(s) != leafSum(s, index) {
			return &leaf{damaged: true}
		}
		if l.gen != 0 && int32(gen-l.gen) < 0 {
			continue
		}
		l.gen, l.slot = gen, i
		for k := range l.phys {
			l.phys[k] = binary.LittleEndian.Uint32(s[8+4*k:])
		}
	}
	return l
}

// encode writes the leaf as generation gen into s, one slot.
func (l *leaf) encode(s []byte, index int64, gen uint32) {
	binary.LittleEndian.PutUint32(s[4:], gen)
	for k, v := range l.phys {
		binary.LittleEndian.PutUint32(s[8+4*k:], v)
	}
	binary.LittleEndian.PutUint32(s, leafSum(s, index))
}

func leafSum(s []byte, index int64) uint32 {
	var tail [8]byte
	binary.LittleEndian.PutUint64(tail[:], uint64(index))
	return crc32.Update(crc32.Update(0, castagnoli, s[4:leafSlot]), castagnoli, tail[:])
}

// noLeaf stands for every leaf that has no place. It is shared and never changed.
var noLeaf = &leaf{slot: 1}

// leaf returns leaf index, reading it if it is not in memory. The caller holds tab.mu.
func (f *File) leaf(index int64) (*leaf, error) {
	if l := f.bcow.leaves[index]; l != nil {
		return l, nil
	}
	p, err := f.tab.page(f.s, index/wordsPerPage)
	if err != nil {
		return nil, err
	}
	at := p.word(index % wordsPerPage)
	if at == 0 && !p.damaged {
		return noLeaf, nil
	}
	l := &leaf{slot: 1, damaged: p.damaged}
	if !p.damaged {
		if !f.insideData(int64(at)*leafSize, leafSize) {
			l.damaged = true
		} else {
			var b [leafSize]byte
			if err := readZeroFilled(f.s, b[:], int64(at)*leafSize); err != nil {
				return nil, err
			}
			l = parseLeaf(b[:], index)
		}
		l.at = at
	}
	f.bcow.leaves[index] = l
	return l, nil
}

// insideData: n bytes at off can be data or leaves. The caller holds tab.mu.
func (f *File) insideData(off, n int64) bool {
	if off+n > f.bcow.next.Load()<<f.shift {
		return false
	}
	return off >= f.bs && (off >= f.tab.end() || off+n <= f.tab.pos)
}

// entry returns where the table says that block b lies. The caller holds tab.mu.
func (f *File) entry(b int64) (phys uint32, damaged bool, err error) {
	if f.format == BCoW {
		l, err := f.leaf(b / leafEntries)
		if err != nil {
			return 0, false, err
		}
		phys, damaged = l.phys[b%leafEntries], l.damaged
	} else {
		p, err := f.tab.page(f.s, b/wordsPerPage)
		if err != nil {
			return 0, false, err
		}
		phys, damaged = p.word(b%wordsPerPage), p.damaged
	}
	if phys != physNone && phys != physZero && !f.insideData(int64(phys)<<f.shift, f.bs) {
		damaged = true
	}
	return phys, damaged, nil
}

// setEntry changes what the table says of block b, in memory. The caller holds mu and tab.mu.
func (f *File) setEntry(b int64, phys uint32) error {
	if f.format != BCoW {
		p, err := f.tab.writable(f.s, b/wordsPerPage)
		if err == nil && !p.damaged && p.word(b%wordsPerPage) != phys {
			p.setWord(b%wordsPerPage, phys)
			p.dirty = true
		}
		return err
	}
	l, err := f.leaf(b / leafEntries)
	if err != nil || l.damaged || l.phys[b%leafEntries] == phys {
		return err
	}
	if l == noLeaf {
		at, err := f.bcow.takeLeaf()
		if err != nil {
			return err
		}
		p, err := f.tab.writable(f.s, b/leafEntries/wordsPerPage)
		if err != nil {
			return err
		}
		p.setWord(b/leafEntries%wordsPerPage, at)
		p.dirty = true
		l = &leaf{slot: 1, at: at}
		f.bcow.leaves[b/leafEntries] = l
	}
	l.phys[b%leafEntries] = phys
	l.dirty = true
	return nil
}

// loadPhys reads region n from the table. The caller holds tab.mu.
func (f *File) loadPhys(n int64) (*region, error) {
	r := &region{phys: new([regionBlocks]atomic.Uint32)}
	used := false
	last := min((n+1)*regionBlocks, f.tab.npages*entriesPerPage(f.format))
	for b := n * regionBlocks; b < last; b++ {
		phys, damaged, err := f.entry(b)
		if err != nil {
			return nil, err
		}
		i := b % regionBlocks
		switch {
		case damaged:
			r.set(i, stateDamaged)
			used = true
		case phys != physNone:
			r.phys[i].Store(phys)
			r.set(i, stateUpper)
			used = true
		}
	}
	if !used {
		return emptyRegion, nil
	}
	return r, nil
}

// stagePhys tells the table where the Upper blocks of region n lie. The caller holds mu and tab.mu.
func (f *File) stagePhys(n int64, r *region) error {
	for i := range int64(regionBlocks) {
		phys := uint32(physNone)
		switch r.state(i) {
		case stateDamaged:
			continue
		case stateUpper:
			phys = r.phys[i].Load()
		}
		if n*regionBlocks+i >= f.tab.npages*entriesPerPage(f.format) {
			break
		}
		if err := f.setEntry(n*regionBlocks+i, phys); err != nil {
			return err
		}
	}
	return nil
}

// coverLeaves makes the upper file reach over the leaf blocks that were taken, before the sync that comes before the
// table is written. Otherwise a power cut could leave an entry that leads behind the end of the file, to a block number
// that is then given to somebody else.
func (f *File) coverLeaves() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.bcow.leafNew {
		return nil
	}
	// All bytes ever written lie below next, and whoever writes behind it holds mu: this cuts nothing off.
	if err := f.quietly(func() error { return f.s.Truncate(f.bcow.next.Load() << f.shift) }); err != nil {
		return err
	}
	f.bcow.leafNew = false
	return nil
}

// flushLeaves writes every dirty leaf into its older slot.
func (f *File) flushLeaves() (wrote bool, err error) {
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	var b [leafSlot]byte
	for index, l := range f.bcow.leaves {
		if !l.dirty {
			continue
		}
		if l.gen++; l.gen == 0 {
			l.gen = 1
		}
		l.encode(b[:], index, l.gen)
		if _, err := f.s.WriteAt(b[:], int64(l.at)*leafSize+(1-l.slot)*leafSlot); err != nil {
			return wrote, err
		}
		l.slot, l.dirty, wrote = 1-l.slot, false, true
	}
	return wrote, nil
}

// physExtent is the run of Upper blocks that begins at off and is contiguous in the upper file.
func (f *File) physExtent(r *region, off, end int64) extent {
	b := off >> f.shift
	i, stop := b%regionBlocks, min(regionBlocks, ceilDiv(end, f.bs)-b/regionBlocks*regionBlocks)
	first := r.phys[i].Load()
	k := i + 1
	for k < stop && r.state(k) == stateUpper {
		next := r.phys[k].Load()
		if first == physZero && next != physZero || first != physZero && int64(next) != int64(first)+k-i {
			break
		}
		k++
	}
	x := extent{src: fromZeros, end: min(end, (b+k-i)<<f.shift)}
	if first != physZero {
		x.src, x.at = fromUpper, int64(first)<<f.shift+off&(f.bs-1)
	}
	return x
}

// overwritePhys writes to blocks that are all Upper and have a place, one write a contiguous run.
func (f *File) overwritePhys(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		o := off + int64(n)
		r, err := f.region(o >> f.shift / regionBlocks)
		if err != nil {
			return n, err
		}
		x := f.physExtent(r, o, off+int64(len(p)))
		m, err := f.writeUpper(p[n:n+int(x.end-o)], x.at)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// appendPhys writes to blocks of which some have no place yet: each run of those gets one, contiguous, and is one write.
func (f *File) appendPhys(p []byte, off int64) (int, error) {
	f.mu.Lock()
	n, partial, err := f.appendRuns(p, off)
	f.mu.Unlock()
	return n, f.follow(partial, off, off+int64(n), err)
}

func (f *File) appendRuns(p []byte, off int64) (n int, partial bool, err error) {
	for n < len(p) {
		o, end := off+int64(n), off+int64(len(p))
		b := o >> f.shift
		r := f.mutable(b / regionBlocks)
		var m int
		if f.placed(r, b%regionBlocks) {
			x := f.placedRun(r, o, end)
			m, err = f.writeUpper(p[n:n+int(x.end-o)], x.at)
		} else {
			run := f.unplacedRun(r, b, ceilDiv(end, f.bs))
			var at int64
			if at, err = f.bcow.take(run); err != nil {
				return n, partial, err
			}
			stop := min(end, (b+run)<<f.shift)
			m, err = f.writeUpper(p[n:n+int(stop-o)], at<<f.shift+o&(f.bs-1))
			if m > 0 {
				f.place(b, ceilDiv(o+int64(m), f.bs), at)
			}
		}
		if m > 0 && f.mark(o, o+int64(m)) {
			partial = true
		}
		n += m
		if err != nil {
			return n, partial, err
		}
	}
	return n, partial, nil
}

// placed: block i of r has a place of its own in the upper file.
func (f *File) placed(r *region, i int64) bool {
	phys := r.phys[i].Load()
	return phys != physNone && phys != physZero
}

// placedRun is physExtent for blocks in any state.
func (f *File) placedRun(r *region, off, end int64) extent {
	b := off >> f.shift
	i := b % regionBlocks
	first := int64(r.phys[i].Load())
	k := i + 1
	for k < regionBlocks && (b+k-i)<<f.shift < end && int64(r.phys[k].Load()) == first+k-i {
		k++
	}
	return extent{fromUpper, min(end, (b+k-i)<<f.shift), first<<f.shift + off&(f.bs-1)}
}

// unplacedRun counts the blocks from b on, within the region and below last, that have no place.
func (f *File) unplacedRun(r *region, b, last int64) (n int64) {
	for i := b % regionBlocks; i+n < regionBlocks && b+n < last && !f.placed(r, i+n); n++ {
	}
	return n
}

// place puts blocks [b, end) of one region at at and the following. The caller holds mu.
func (f *File) place(b, end, at int64) {
	f.remember(blocksAt, b, end, at)
	r := f.mutable(b / regionBlocks)
	for ; b < end; b, at = b+1, at+1 {
		r.phys[b%regionBlocks].Store(uint32(at))
	}
	r.dirty.Store(true)
}
