package block

import (
	"sync"
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

// page returns page i, reading it if it is not in memory. A damaged page is returned as it is: damaged.
func (t *table) page(s Store, i int64) (*page, error) {
	if p := t.pages[i]; p != nil {
		return p, nil
	}
	p := &page{slot: 1}
	if i < t.npages {
		buf := getBuf(slotsSize)
		defer putBuf(buf)
		if err := readZeroFilled(s, *buf, t.pos+i*slotsSize); err != nil {
			return nil, err
		}
		p = parsePage(*buf, pageID{t.kind, t.pos, i})
	}
	t.pages[i] = p
	return p, nil
}

// flush writes every dirty page into its older slot. A page stays dirty until its write succeeded.
func (t *table) flush(s Store) (wrote bool, err error) {
	buf := getBuf(pageSize)
	defer putBuf(buf)
	for _, i := range t.dirtyPages() {
		t.mu.Lock()
		p := t.pages[i]
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
	for i := range max(t.npages, npages) {
		if i >= t.npages && t.pages[i] == nil {
			continue
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
