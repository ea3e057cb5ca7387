// Package history knows what may be left of an overlay file after a power cut: every byte that was synced, and of what came
// after that, by block, the lower file's bytes or newer ones; never a mixture of the two, never zeros.
package history

import (
	"bytes"
	"fmt"
)

// sector is what a disk writes whole, bytes.
const sector = 512

func zero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

// History is what a file's content may be after a power cut: the synced version and all later ones.
type History struct {
	Versions  [][]byte       // Versions[0] is the synced one
	Owned     map[int64]bool // blocks that were written before the last sync: on disk they lie in the upper file
	Touched   map[int64]bool // blocks written since
	Limit     int64          // how much of the lower file was visible at the last sync, bytes
	BlockSize int64
}

// New is the history of a file that nobody has written to.
func New(lower []byte, blockSize int64) *History {
	return &History{Versions: [][]byte{lower}, Owned: map[int64]bool{}, Touched: map[int64]bool{}, Limit: int64(len(lower)), BlockSize: blockSize}
}

// Now is the newest version.
func (h *History) Now() []byte { return h.Versions[len(h.Versions)-1] }

// Add records that a change of the bytes from off to end made version v of the file.
func (h *History) Add(v []byte, off, end int64) {
	h.Versions = append(h.Versions, v)
	h.Change(off, end)
}

// Change records that the bytes from off to end were changed.
func (h *History) Change(off, end int64) {
	for b := off / h.BlockSize; b*h.BlockSize < end; b++ {
		h.Touched[b] = true
	}
}

// Sync records that a sync returned.
func (h *History) Sync() {
	for _, v := range h.Versions {
		h.Limit = min(h.Limit, int64(len(v)))
	}
	h.Versions = h.Versions[len(h.Versions)-1:]
	for b := range h.Touched {
		h.Owned[b] = true
	}
	clear(h.Touched)
}

// Commit: what was touched is in the upper file for good, though its bytes may not have been synced.
func (h *History) Commit() {
	for b := range h.Touched {
		h.Owned[b] = true
	}
}

// piece is bytes [lo, hi) of a version; behind its end there are zeros.
func piece(v []byte, lo, hi int64) []byte {
	p := make([]byte, hi-lo)
	if lo < int64(len(v)) {
		copy(p, v[lo:])
	}
	return p
}

// Explain returns an error unless got is what the durability rules allow.
func (h *History) Explain(got []byte) error {
	least, most := int64(len(h.Versions[0])), 0
	for _, v := range h.Versions {
		least, most = min(least, int64(len(v))), max(most, len(v))
	}
	if int64(len(got)) < least || len(got) > most {
		return fmt.Errorf("size %d, allowed %d to %d", len(got), least, most)
	}
	limit := min(h.Limit, least)
	for b := int64(0); b*h.BlockSize < int64(len(got)); b++ {
		off, end := b*h.BlockSize, min((b+1)*h.BlockSize, int64(len(got)))
		if !h.Owned[b] && off < limit {
			below := min(limit, end)
			if !h.explainLower(got, off, below) {
				return fmt.Errorf("block %d is neither the lower block nor a later version of it:%s", b, h.describe(got, off, below))
			}
			off = below
		} else if off < limit && limit < end {
			// Bytes behind the limit lie in the upper file whether the block below it does or not.
			if !h.matches(got, off, limit, 0, len(h.Versions)) {
				return fmt.Errorf("block %d holds a sector of no version:%s", b, h.describe(got, off, limit))
			}
			off = limit
		}
		// Any other byte behaves as on an ordinary filesystem: every sector is the synced one or newer.
		if !h.matches(got, off, end, 0, len(h.Versions)) {
			return fmt.Errorf("block %d holds a sector of no version:%s", b, h.describe(got, off, end))
		}
	}
	return nil
}

// explainLower: bytes that the lower file still showed at the last sync are the lower file's all together, or all as
// new as the sync that made the block's entry durable.
func (h *History) explainLower(got []byte, off, end int64) bool {
	if h.matches(got, off, end, 0, 1) {
		return true
	}
	for j := 1; j < len(h.Versions); j++ {
		if h.matches(got, off, end, j, len(h.Versions)) {
			return true
		}
	}
	return false
}

// matches says whether every sector of got in [off, end) is that of one of the versions [from, to), or, behind the
// synced size, zeros: the length reached the disk and the data did not.
func (h *History) matches(got []byte, off, end int64, from, to int) bool {
	synced := int64(len(h.Versions[0]))
	for lo := off; lo < end; {
		hi := min(end, lo&^(sector-1)+sector)
		// What lies behind a limit was written apart from what lies below it, and every length may have become one.
		for _, v := range h.Versions {
			if cut := int64(len(v)); lo < cut {
				hi = min(hi, cut)
			}
		}
		if lo < h.Limit {
			hi = min(hi, h.Limit)
		}
		s := got[lo:hi]
		found := lo >= synced && zero(s)
		for v := from; v < to && !found; v++ {
			found = bytes.Equal(s, piece(h.Versions[v], lo, hi))
		}
		if !found {
			return false
		}
		lo = hi
	}
	return true
}

func (h *History) describe(got []byte, off, end int64) (text string) {
	for lo := off; lo < end; {
		hi := min(end, lo&^(sector-1)+sector)
		text += fmt.Sprintf(" [%d:", lo)
		for v := range h.Versions {
			if bytes.Equal(got[lo:hi], piece(h.Versions[v], lo, hi)) {
				text += fmt.Sprint(" v", v)
			}
		}
		if zero(got[lo:hi]) {
			text += " zero"
		}
		text += "]"
		lo = hi
	}
	return text
}
