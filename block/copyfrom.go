package block

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// CopyFrom is copy_file_range: n bytes of src from srcOff on, to dstOff. Fewer are copied without an error where src
// ends. Where both sides have their bytes in one descriptor each, the kernel copies.
func (f *File) CopyFrom(dstOff int64, src io.ReaderAt, srcOff, n int64) (copied int64, err error) {
	if dstOff < 0 || srcOff < 0 || n < 0 || dstOff+n < dstOff || srcOff+n < srcOff {
		return 0, unix.EINVAL
	}
	if s, ok := src.(*File); ok && s == f && dstOff < srcOff+n && srcOff < dstOff+n {
		return 0, unix.EINVAL
	}
	if p, ok := src.(interface{ Plain() (int, bool) }); ok {
		if fd, plain := p.Plain(); plain {
			copied, err = f.copyDescriptor(dstOff, fd, srcOff, n)
			if err != unix.EXDEV && err != unix.EINVAL && err != unix.EOPNOTSUPP && err != unix.ENOSYS {
				return copied, err
			}
		}
	}
	buf := getBuf(copyChunk)
	defer putBuf(buf)
	for copied < n {
		part := (*buf)[:min(n-copied, copyChunk)]
		m, rerr := src.ReadAt(part, srcOff+copied)
		if rerr != nil && !errors.Is(rerr, io.EOF) {
			return copied, rerr
		}
		w, err := f.WriteAt(part[:m], dstOff+copied)
		copied += int64(w)
		if err != nil || rerr != nil {
			return copied, err
		}
	}
	return copied, nil
}

// copyDescriptor lets the kernel copy into the upper file, and advances the states as a write does.
func (f *File) copyDescriptor(off int64, fd int, srcOff, n int64) (copied int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	n = min(n, st.Size-srcOff)
	if n <= 0 {
		return 0, nil
	}
	to := f.s.FD()
	if to < 0 || f.format != Sparse && !f.plain.Load() {
		return 0, unix.EOPNOTSUPP
	}
	if err := f.lockFor(off+n, off+n); err != nil {
		return 0, err
	}
	defer f.shape.RUnlock()
	if f.plain.Load() {
		return f.copyKernel(to, off, fd, srcOff, n)
	}
	if _, err := f.allUpper(off, off+n); err != nil {
		return 0, err
	}
	f.mu.Lock()
	copied, err = f.copyKernel(to, off, fd, srcOff, n)
	partial := f.mark(off, off+copied)
	f.mu.Unlock()
	if copied > 0 {
		f.grow(off + copied)
		f.written.Add(copied)
	}
	return copied, f.follow(partial, off, off+copied, err)
}

// copyKernel is copy_file_range(2) until n bytes are copied or it cannot go on.
func (f *File) copyKernel(to int, off int64, from int, srcOff, n int64) (copied int64, err error) {
	f.times.RLock()
	defer f.times.RUnlock()
	for copied < n {
		m, err := unix.CopyFileRange(from, &srcOff, to, &off, int(min(n-copied, 1<<30)), 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil && copied > 0 {
			return copied, nil
		}
		if err != nil || m == 0 {
			return copied, err
		}
		copied += int64(m)
	}
	return copied, nil
}
