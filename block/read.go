package block

import (
	"io"
	"slices"

	"golang.org/x/sys/unix"
)

// source says where the bytes of an extent are.
type source uint8

const (
	fromLower source = iota
	fromUpper
	fromZeros
	fromTransit // nowhere whole yet: complete the blocks first
)

// extent is a run of bytes with one source.
type extent struct {
	src source
	end int64
	at  int64 // fromUpper: position in the upper file of the extent's first byte
}

// ReadAt reads as io.ReaderAt says: fewer than len(p) bytes only with an error, which is io.EOF at the logical end.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, unix.EINVAL
	}
	f.shape.RLock()
	defer f.shape.RUnlock()
	if f.closed.Load() {
		return 0, unix.EBADF
	}
	if f.plain.Load() {
		return f.s.ReadAt(p, off)
	}
	size := f.size.Load()
	if off >= size {
		return 0, io.EOF
	}
	var atEnd error
	if int64(len(p)) > size-off {
		p, atEnd = p[:size-off], io.EOF
	}
	n, err := f.read(p, off)
	if err != nil {
		return n, err
	}
	return n, atEnd
}

// read fills p, one read a run of equal state. The caller holds shape.
func (f *File) read(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		o := off + int64(n)
		x, err := f.extent(o, off+int64(len(p)))
		if err != nil {
			return n, err
		}
		part := p[n : n+int(x.end-o)]
		switch x.src {
		case fromLower:
			err = f.readLower(part, o)
		case fromUpper:
			err = readZeroFilled(f.s, part, x.at)
		case fromZeros:
			clear(part)
		case fromTransit:
			if whole := f.completeRange(o, x.end); whole == nil {
				continue // its blocks are Upper now
			} else if part = part[:min(int64(len(part)), f.bs-o&(f.bs-1))]; f.assemble(part, o) != nil {
				return n, whole
			}
		}
		if err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// assemble reads p, a part of one block, out of both files, for when the block cannot be completed: there may be no space
// for that, or what is missing of it cannot be read and is not asked for here. The caller holds shape.
func (f *File) assemble(p []byte, off int64) error {
	b := off >> f.shift
	missing, err := f.eachPart(b, off, p, nil)
	if err != nil {
		return err
	}
	below := p[:max(0, min(int64(len(p)), f.limit-off))]
	if missing && len(below) > 0 {
		if err := f.readLower(below, off); err != nil {
			return err
		}
	}
	_, err = f.eachPart(b, off, p, func(part []byte, at int64) error { return readZeroFilled(f.s, part, at) })
	return err
}

// eachPart calls do for those parts of p, the bytes of block b from off on, that lie in the upper file, and says whether
// there are others. A write in between is no harm: it only adds parts.
func (f *File) eachPart(b, off int64, p []byte, do func(part []byte, at int64) error) (missing bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	start, end := b<<f.shift, off+int64(len(p))
	spans, ok := f.transit[b]
	if !ok { // completed in the meantime
		spans = []span{{0, uint32(f.bs)}}
	} else {
		spans = addSpan(slices.Clone(spans), span{uint32(max(0, min(f.bs, f.limit-start))), uint32(f.bs)})
	}
	move := f.upperAt(b) - start
	at := off
	for _, s := range spans {
		lo, hi := max(off, start+int64(s.lo)), min(end, start+int64(s.hi))
		if lo >= hi {
			continue
		}
		missing = missing || lo > at
		at = hi
		if do != nil {
			if err := do(p[lo-off:hi-off], lo+move); err != nil {
				return missing, err
			}
		}
	}
	return missing || at < end, nil
}

// extent returns the run of bytes that begins at off and has one source, at most to end. The caller holds shape.
func (f *File) extent(off, end int64) (extent, error) {
	if f.format == Sparse && off >= f.limit {
		return extent{fromUpper, end, off}, nil
	}
	b := off >> f.shift
	r, err := f.region(b / regionBlocks)
	if err != nil {
		return extent{}, err
	}
	st := r.state(b % regionBlocks)
	switch st {
	case stateDamaged:
		return extent{}, f.damaged(b)
	case stateTransit:
		return extent{src: fromTransit, end: min(end, f.stateEnd(r, b, end, st))}, nil
	case stateUpper:
		if f.format == Sparse {
			return extent{fromUpper, min(end, f.stateEnd(r, b, end, st)), off}, nil
		}
		return f.physExtent(r, off, end), nil
	}
	if off >= f.limit {
		return extent{src: fromZeros, end: min(end, f.stateEnd(r, b, end, st))}, nil
	}
	return extent{src: fromLower, end: min(end, f.limit, f.stateEnd(r, b, end, st))}, nil
}

// stateEnd returns where the run of blocks in state st that begins with block b of region r ends, in bytes; it does not
// look past end, and stops at a region that cannot be read.
func (f *File) stateEnd(r *region, b, end int64, st State) int64 {
	last := ceilDiv(end, f.bs)
	if f.format == Sparse {
		last = min(last, f.blocks())
	}
	for {
		n := b / regionBlocks
		stop := min(last, (n+1)*regionBlocks)
		b = n*regionBlocks + r.runEnd(b%regionBlocks, stop-n*regionBlocks, st)
		if b < stop || b == last {
			return b << f.shift
		}
		next, err := f.region(n + 1)
		if err != nil {
			return b << f.shift
		}
		r = next
	}
}
