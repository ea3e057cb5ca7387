package block

import (
	"errors"

	"golang.org/x/sys/unix"
)

// FlattenTo writes the whole logical content of the sketch s into the empty file dst, holes staying holes, and syncs it.
// It closes s and the lower file, not dst. Owner, mode, times and attributes are the caller's affair.
func FlattenTo(dst, s Store, lower func() (Lower, error)) error {
	src, err := OpenReadOnly(s, lower)
	if err != nil {
		return err
	}
	return errors.Join(CopyAll(dst, src), src.Close())
}

// CopyAll writes the whole of src into the empty file dst, holes staying holes, and syncs it.
func CopyAll(dst Store, src Lower) error {
	st, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(st.Size); err != nil {
		return err
	}
	buf := getBuf(copyChunk)
	defer putBuf(buf)
	for off := int64(0); off < st.Size; {
		data, hole, err := src.SeekData(off)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return err
		}
		for off = data; off < hole; {
			part := (*buf)[:min(hole-off, copyChunk)]
			if err := readZeroFilled(src, part, off); err != nil {
				return err
			}
			if _, err := dst.WriteAt(part, off); err != nil {
				return err
			}
			off += int64(len(part))
		}
	}
	return dst.Sync()
}
