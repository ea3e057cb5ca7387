package block

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// A new block costs a sync twice: its bytes have to be on disk before the table says so. Where the filesystem's journal
// keeps an attribute back until everything that was written before has reached the disk (Engine.Orders), the header can say
// it in one: the bytes are written out, the header names the blocks, and a single sync puts both there. What the header
// names beyond the table is its addendum. A later commit, whose sync is needed anyway, writes the table's pages, and the
// header after that is short again.

const (
	// maxAddendum is the longest addendum, bytes: with more that is new, a commit writes the table. It leaves other attributes
	// their room in the block that ext4 has for them.
	maxAddendum = 1024
	// foldPart: the commit after one whose addendum is longer than this part of the longest brings the table up.
	foldPart = 2
)

// blockRange is blocks lo to hi, inclusive.
type blockRange struct{ lo, hi int64 }

// encodeRanges encodes ordered ranges that do not touch: for each the distance from the end of the one before, and how many
// blocks it has beyond the first.
func encodeRanges(list []blockRange) string {
	var b []byte
	end := int64(0)
	for _, r := range list {
		b = binary.AppendUvarint(b, uint64(r.lo-end))
		b = binary.AppendUvarint(b, uint64(r.hi-r.lo))
		end = r.hi + 1
	}
	return string(b)
}

// parseRanges is encodeRanges's inverse for ranges of a file of so many blocks. It takes nothing that encodeRanges does
// not write.
func parseRanges(s string, blocks int64) (list []blockRange, ok bool) {
	p := cursor{b: []byte(s)}
	for end := int64(0); len(p.b) > 0; {
		gap, more := p.length(), p.length()
		if p.bad || gap >= blocks || more >= blocks || end+gap+more >= blocks || gap == 0 && len(list) > 0 {
			return nil, false
		}
		r := blockRange{end + gap, end + gap + more}
		list, end = append(list, r), r.hi+1
	}
	return list, encodeRanges(list) == s
}

// joinRanges orders the ranges of both lists and makes one of those that touch or overlap.
func joinRanges(a, b []blockRange) (list []blockRange) {
	all := slices.Concat(a, b)
	slices.SortFunc(all, func(x, y blockRange) int { return cmp.Compare(x.lo, y.lo) })
	for _, r := range all {
		if n := len(list); n > 0 && r.lo <= list[n-1].hi+1 {
			list[n-1].hi = max(list[n-1].hi, r.hi)
		} else {
			list = append(list, r)
		}
	}
	return list
}

// added returns the blocks that the header on disk names.
func (f *File) added() []blockRange {
	list, _ := parseRanges(f.hdr.Addendum, ceilDiv(f.hdr.Ident.Size, f.bs))
	return list
}

// takeAddendum tells the table in memory what the header says beyond it. A damaged page stays as it is.
func (f *File) takeAddendum() error {
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	for _, r := range f.added() {
		for b := r.lo; b <= r.hi; b++ {
			p, err := f.tab.writable(f.s, b/bitsPerPage)
			switch {
			case err != nil:
				return err
			case p.damaged:
			case !p.bit(b % bitsPerPage):
				p.setBit(b % bitsPerPage)
				p.dirty = true
			}
		}
	}
	return nil
}

// inDamaged returns the blocks of the addendum whose pages are damaged: the table cannot take them over.
func (f *File) inDamaged() (list []blockRange) {
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	for _, r := range f.added() {
		for lo := r.lo; lo <= r.hi; {
			hi := min(r.hi, lo/bitsPerPage*bitsPerPage+bitsPerPage-1)
			if p := f.tab.pages[lo/bitsPerPage]; p != nil && p.damaged {
				list = append(list, blockRange{lo, hi})
			}
			lo = hi + 1
		}
	}
	return list
}

// names says whether the header names new blocks, instead of the table.
func (f *File) names() bool { return f.e.orders && f.format == Sparse && !f.readOnly }

// news says whether blocks have become Upper of which nothing on disk knows. The caller holds commitMu.
func (f *File) news() bool {
	if f.names() {
		return len(f.fresh) > 0
	}
	return f.tableDirty()
}

// addendum is what the next header has to name. ok: it fits. The caller holds commitMu.
func (f *File) addendum() (s string, ok bool) {
	if !f.names() {
		return "", false
	}
	old := f.added()
	if f.folded {
		old = f.inDamaged()
	}
	s = encodeRanges(joinRanges(old, f.fresh))
	return s, len(s) <= f.e.addendum
}

// fold writes into the table what the header names, once that is long. Every block concerned is on disk, so this needs no
// sync of its own: the header stays as it is until the commit has written the pages out. The caller holds commitMu.
func (f *File) fold() error {
	if !f.names() || f.folded || len(f.fresh) > 0 || len(f.hdr.Addendum) <= f.e.addendum/foldPart {
		return nil
	}
	size := f.size.Load()
	if f.tab.npages == 0 {
		if err := f.order(); err != nil { // the header is going to have the size
			return err
		}
		if err := f.placeTable(size); err != nil {
			return err
		}
	}
	err := f.quietly(func() error { _, err := f.tab.flush(f.s); return err })
	f.folded = err == nil
	return err
}

// order makes everything that was written reach the disk before any change of the inode that follows: by the filesystem's
// own order, or by a sync.
func (f *File) order() error {
	if !f.e.orders {
		return f.syncStore(true)
	}
	return f.syncWith(f.s.Order)
}

// Orders tells the engine that on the upper layer's filesystem no change of an inode reaches the disk before what
// Store.Order was called for. It is called before the first file is opened.
func (e *Engine) Orders() { e.orders = true }
