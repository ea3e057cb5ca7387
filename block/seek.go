package block

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Seek answers SEEK_DATA and SEEK_HOLE over the logical file. ENXIO: off is at or behind the end, or no data follows.
func (f *File) Seek(off int64, whence int) (int64, error) {
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return 0, unix.EINVAL
	}
	f.shape.RLock()
	defer f.shape.RUnlock()
	if f.closed.Load() {
		return 0, unix.EBADF
	}
	if f.plain.Load() {
		return f.s.Seek(off, whence)
	}
	size := f.size.Load()
	if off < 0 || off >= size {
		return 0, unix.ENXIO
	}
	for off < size {
		x, err := f.extent(off, size)
		if err != nil {
			return 0, err
		}
		data, hole, err := f.firstData(off, x)
		if err != nil {
			return 0, err
		}
		if whence == unix.SEEK_DATA && data < x.end {
			return data, nil
		}
		if whence == unix.SEEK_HOLE {
			if data > off {
				return off, nil
			}
			if hole < x.end {
				return hole, nil
			}
		}
		off = x.end
	}
	if whence == unix.SEEK_DATA {
		return 0, unix.ENXIO
	}
	return size, nil
}

// firstData returns the first run of data [data, hole) at or after off within the extent x, which begins at off;
// data is x.end if there is none.
func (f *File) firstData(off int64, x extent) (data, hole int64, err error) {
	switch x.src {
	case fromTransit:
		return off, x.end, nil
	case fromZeros:
		return x.end, x.end, nil
	case fromLower:
		l, err := f.lowerFor()
		if err != nil {
			return 0, 0, err
		}
		data, hole, err = l.SeekData(off)
		if errors.Is(err, unix.ENXIO) {
			return x.end, x.end, nil
		}
		return min(data, x.end), min(hole, x.end), err
	}
	data, err = f.s.Seek(x.at, unix.SEEK_DATA)
	if err == nil {
		hole, err = f.s.Seek(data, unix.SEEK_HOLE)
	}
	if err == unix.ENXIO {
		return x.end, x.end, nil
	}
	return min(data-x.at+off, x.end), min(hole-x.at+off, x.end), err
}
