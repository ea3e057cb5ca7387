package block

import (
	"errors"
	"math"

	"golang.org/x/sys/unix"
)

const regionsPerPage = bitsPerPage / regionBlocks

// loadBits reads region n from the bitmap. The caller holds tab.mu.
func (f *File) loadBits(n int64) (*region, error) {
	p, err := f.tab.page(f.s, n/regionsPerPage)
	if err != nil {
		return nil, err
	}
	r := &region{}
	if p.damaged {
		r.setRun(0, regionBlocks, stateDamaged)
		return r, nil
	}
	first := n % regionsPerPage * regionBlocks
	upper := int64(0)
	for i := range int64(regionBlocks) {
		if p.bit(first + i) {
			r.set(i, stateUpper)
			upper++
		}
	}
	switch upper {
	case 0:
		return emptyRegion, nil
	case regionBlocks:
		return fullRegion, nil
	}
	return r, nil
}

// stageBits tells the bitmap which blocks of region n are Upper. The caller holds commitMu, mu and tab.mu.
func (f *File) stageBits(n int64, r *region) error {
	p, err := f.tab.writable(f.s, n/regionsPerPage)
	if err != nil || p.damaged {
		return err
	}
	first := n % regionsPerPage * regionBlocks
	for i := range int64(regionBlocks) {
		if r.state(i) != stateUpper || p.bit(first+i) {
			continue
		}
		p.setBit(first + i)
		p.dirty = true
		if b, last := n*regionBlocks+i, len(f.fresh)-1; last >= 0 && f.fresh[last].hi == b-1 {
			f.fresh[last].hi = b
		} else {
			f.fresh = append(f.fresh, blockRange{b, b})
		}
	}
	return nil
}

// minSlack is the least distance between the data and the table behind it, bytes.
const minSlack = 1 << 20

// tablePlace is where a bitmap goes behind end bytes of data: the file can double before the table is in the way again.
func tablePlace(end, slack int64) int64 {
	return roundUp(end+max(slack, minSlack), pageSize)
}

// placeTable finds the first place for the bitmap and writes it down. size is a logical size whose bytes are on disk.
// The caller holds commitMu.
func (f *File) placeTable(size int64) error {
	err := f.placeBehind(size, 8)
	if errors.Is(err, unix.EFBIG) { // the filesystem's longest file is near
		err = f.placeBehind(size, math.MaxInt64)
	}
	return err
}

// placeBehind puts the bitmap behind the data with room for one part more of it: header first, then the upper file's
// length, so that the bytes of a table are never taken for data.
func (f *File) placeBehind(size, part int64) error {
	pos, err := f.reservePlace(part)
	if err != nil {
		return err
	}
	h := f.hdr
	h.TablePos, h.TablePages, h.Size = pos, max(1, ceilDiv(f.blocks(), bitsPerPage)), size
	if err := f.setHeader(h); err != nil {
		if f.hdr.TablePages == 0 {
			f.shape.Lock()
			f.bound = unbounded
			f.shape.Unlock()
		}
		return err
	}
	f.tab.mu.Lock()
	f.tab.pos, f.tab.npages = pos, h.TablePages
	end := f.tab.end()
	f.tab.mu.Unlock()
	return f.quietly(func() error { return f.s.Truncate(end) })
}

// reservePlace keeps data away from where the first bitmap will lie.
func (f *File) reservePlace(part int64) (pos int64, err error) {
	f.shape.Lock()
	defer f.shape.Unlock()
	if !f.tailClean { // a refused truncation left bytes behind the end, which must not be taken for a table
		if err := f.cleanTail(); err != nil {
			return 0, err
		}
	}
	end := max(f.limit, f.size.Load())
	f.bound = tablePlace(end, end/part)
	return f.bound, nil
}

// discard makes [off, end) of the upper file read as zeros, without the space where the filesystem can.
func (f *File) discard(off, end int64) error {
	if off >= end {
		return nil
	}
	err := f.s.Fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, end-off)
	if err == unix.EOPNOTSUPP {
		return f.zero(off, end)
	}
	return err
}

// zero writes zeros over what is not a hole in [off, end) of the upper file.
func (f *File) zero(off, end int64) error {
	buf := getBuf(copyChunk)
	defer putBuf(buf)
	clear(*buf)
	for off < end {
		data, err := f.s.Seek(off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		if err != nil {
			return err
		}
		hole, err := f.s.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for off = max(off, data); off < min(hole, end); {
			n, err := f.s.WriteAt((*buf)[:min(min(hole, end)-off, copyChunk)], off)
			if err != nil {
				return err
			}
			off += int64(n)
		}
	}
	return nil
}
