package block

import (
	"errors"
	"io"
	"sync"
)

// copyChunk is how much the copier moves at once, bytes.
const copyChunk = 256 << 10

var bufs = sync.Pool{New: func() any { b := make([]byte, copyChunk); return &b }}

// getBuf returns a buffer of n bytes with undefined contents; putBuf takes it back.
func getBuf(n int) *[]byte {
	b := bufs.Get().(*[]byte)
	if cap(*b) < n {
		*b = make([]byte, n)
	}
	*b = (*b)[:n]
	return b
}

func putBuf(b *[]byte) { bufs.Put(b) }

// readZeroFilled fills p from off; what lies behind the end of r reads as zeros.
func readZeroFilled(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(p[n:])
	return nil
}
