package block

import (
	"io"

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
			if err := f.completeRange(o, x.end); err != nil {
				return n, err
			}
			continue // its blocks are Upper now
		}
		if err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
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
