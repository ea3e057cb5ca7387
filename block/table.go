package block

import (
	"math"
	"sync"

	"golang.org/x/sys/unix"
)

// table is a paged table of one file, with its pages in memory as far as they were touched. All methods but flush want
// mu held.
type table struct {
	mu     sync.Mutex
	kind   pageKind
	pos    int64 // bytes; means nothing while npages is 0
	npages int64
	pages  map[int64]*page
}

func newTable(kind pageKind, pos, npages int64) *table {
	return &table{kind: kind, pos: pos, npages: npages, pages: make(map[int64]*page)}
}

// end is the first byte behind the table.
func (t *table) end() int64 { return t.pos + t.npages*slotsSize }

// noPage stands for every page that was never written. It is shared and never changed: see writable.
var noPage = &page{slot: 1}

// page returns page i, reading it if it is not in memory. A damaged page is returned as it is: damaged.
func (t *table) page(s Store, i int64) (*page, error) {
	if p := t.pages[i]; p != nil {
		return p, nil
	}
	p := noPage
	if i < t.npages {
		buf := getBuf(slotsSize)
		defer putBuf(buf)
		if err := readZeroFilled(s, *buf, t.pos+i*slotsSize); err != nil {
			return nil, err
		}
		if !allZero(*buf) {
			p = parsePage(*buf, pageID{t.kind, t.pos, i})
		}
	}
	t.pages[i] = p
	return p, nil
}

// writable returns page i for a change of its entries.
func (t *table) writable(s Store, i int64) (*page, error) {
	p, err := t.page(s, i)
	if p == noPage {
		p = &page{slot: 1}
		t.pages[i] = p
	}
	return p, err
}

// nextPage returns the first page at or after i that may say something. It makes walking a long table of nothing cheap. A
// page from npages on is one that only memory has, as when the header names blocks and the table has no place yet.
func (t *table) nextPage(s Store, i int64) (int64, error) {
	next, err := t.nextOnDisk(s, i)
	if err != nil {
		return 0, err
	}
	for k, p := range t.pages {
		if k >= i && k < next && p != noPage {
			next = k
		}
	}
	return next, nil
}

// noMorePages is what nextPage returns when no page is left.
const noMorePages = math.MaxInt64

func (t *table) nextOnDisk(s Store, i int64) (int64, error) {
	if i >= t.npages {
		return noMorePages, nil
	}
	at, err := s.Seek(t.pos+i*slotsSize, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO || err == nil && at >= t.end():
		return noMorePages, nil
	case err != nil:
		return 0, err
	}
	return max(i, (at-t.pos)/slotsSize), nil
}

// flush writes every dirty page into its older slot. A page stays dirty until its write succeeded.
func (t *table) flush(s Store) (wrote bool, err error) {
	buf := getBuf(pageSize)
	defer putBuf(buf)
	for _, i := range t.dirtyPages() {
		t.mu.Lock()
		p := t.pages[i]
		if i >= t.npages { // of blocks behind a limit that was lowered before the table had its place
			p.dirty = false
			t.mu.Unlock()
			continue
		}
		p.encode(*buf, pageID{t.kind, t.pos, i}, p.gen+1)
		to := 1 - p.slot
		p.dirty = false
		t.mu.Unlock()
		_, err := s.WriteAt(*buf, t.pos+i*slotsSize+to*pageSize)
		t.mu.Lock()
		p.gen++ // even when the write failed: some of its sectors may have been written
		if err != nil {
			p.dirty = true
			t.mu.Unlock()
			return wrote, err
		}
		p.slot = to
		t.mu.Unlock()
		wrote = true
	}
	return wrote, nil
}

func (t *table) dirtyPages() (list []int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, p := range t.pages {
		if p.dirty {
			list = append(list, i)
		}
	}
	return list
}

func (t *table) anyDirty() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.pages {
		if p.dirty {
			return true
		}
	}
	return false
}

// movedTo returns the same table for another place, where nothing was written yet: every page that says something is
// dirty. The caller holds mu.
func (t *table) movedTo(s Store, pos, npages int64) (*table, error) {
	moved := newTable(t.kind, pos, npages)
	for i := int64(0); ; i++ {
		var err error
		if i, err = t.nextPage(s, i); err != nil {
			return nil, err
		}
		if i >= t.npages {
			break
		}
		p, err := t.page(s, i)
		if err != nil {
			return nil, err
		}
		if p.damaged {
			return nil, &damagedError{first: i, last: i, why: "a table with a damaged page cannot be moved; page"}
		}
		if !allZero(p.payload[:]) {
			moved.pages[i] = &page{slot: 1, dirty: true, payload: p.payload}
		}
	}
	return moved, nil
}

// entriesPerPage is how many blocks one page of a bcow table speaks for.
func entriesPerPage(f Format) int64 {
	if f == BCoW {
		return wordsPerPage * leafEntries
	}
	return wordsPerPage
}
