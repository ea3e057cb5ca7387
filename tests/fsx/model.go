package fsx

import (
	"bytes"
	"fmt"
)

// model is the file as it should be.
type model struct{ data []byte }

func (m *model) size() int64 { return int64(len(m.data)) }

// write puts p at off, with zeros between the end and off.
func (m *model) write(p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	if end := off + int64(len(p)); end > m.size() {
		m.truncate(end)
	}
	copy(m.data[off:], p)
}

func (m *model) truncate(size int64) {
	if size <= m.size() {
		m.data = m.data[:size]
		return
	}
	old := len(m.data)
	if int64(cap(m.data)) < size {
		m.data = append(make([]byte, 0, size*2), m.data...)
	}
	m.data = m.data[:size]
	clear(m.data[old:])
}

// zero clears [off, off+n) as far as it lies within the file.
func (m *model) zero(off, n int64) {
	if off < m.size() {
		clear(m.data[off:min(off+n, m.size())])
	}
}

// read is what a read of n bytes at off must give.
func (m *model) read(off, n int64) []byte {
	if off >= m.size() {
		return nil
	}
	return m.data[off:min(off+n, m.size())]
}

// same says where got, read at off, differs from the model.
func (m *model) same(got []byte, off, n int64) error {
	want := m.read(off, n)
	if bytes.Equal(got, want) {
		return nil
	}
	if len(got) != len(want) {
		return fmt.Errorf("read of %d at %d gave %d bytes, want %d (size %d)", n, off, len(got), len(want), m.size())
	}
	i := 0
	for got[i] == want[i] {
		i++
	}
	j := len(got)
	for got[j-1] == want[j-1] {
		j--
	}
	return fmt.Errorf("read of %d at %d is wrong in [%d, %d) (blocks %d to %d): got %.16x, want %.16x",
		n, off, off+int64(i), off+int64(j), (off+int64(i))/4096, (off+int64(j)-1)/4096, got[i:min(i+16, j)], want[i:min(i+16, j)])
}
