package block

import (
	"io"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// image is the state of one in-memory upper file: pages of 4 KiB, absent ones being holes, and what the inode holds.
// Pages are never changed once they are in an image.
type image struct {
	pages  map[int64][]byte
	size   int64
	header []byte
	origin []byte
	mtime  unix.Timespec
}

func (m *image) clone() *image {
	c := *m
	c.pages = maps.Clone(m.pages)
	return &c
}

func (m *image) read(p []byte, off int64) {
	for len(p) > 0 {
		at := off % pageSize
		n := min(int64(len(p)), pageSize-at)
		if page := m.pages[off/pageSize]; page != nil {
			copy(p[:n], page[at:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

func (m *image) write(p []byte, off int64) {
	m.cutTail()
	m.size = max(m.size, off+int64(len(p)))
	for len(p) > 0 {
		at := off % pageSize
		n := min(int64(len(p)), pageSize-at)
		page := make([]byte, pageSize)
		copy(page, m.pages[off/pageSize])
		copy(page[at:], p[:n])
		m.pages[off/pageSize] = page
		p, off = p[n:], off+n
	}
}

// punch frees whole pages; what is left at the edges is the caller's to zero.
func (m *image) punch(off, end int64) {
	for k := range m.pages {
		if k*pageSize >= off && (k+1)*pageSize <= end {
			delete(m.pages, k)
		}
	}
}

func (m *image) truncate(size int64) {
	m.size = min(m.size, size)
	m.cutTail()
	m.size = size
}

// cutTail zeroes what lies behind the end of the file: no filesystem lets that be seen when the file grows.
func (m *image) cutTail() {
	m.punch(roundUp(m.size, pageSize), 1<<62)
	if page := m.pages[m.size/pageSize]; page != nil && m.size%pageSize != 0 && !allZero(page[m.size%pageSize:]) {
		cut := make([]byte, pageSize)
		copy(cut, page[:m.size%pageSize])
		m.pages[m.size/pageSize] = cut
	}
}

// change is one entry of the log of what was not synced: a metadata operation (which reach the disk in order) or the
// new contents of one sector (which reach it or not, each for itself).
type change struct {
	meta       func(*image)
	header     bool     // it changes attributes only
	order      bool     // no operation on metadata behind this reaches the disk before the sectors in front of it
	discards   [2]int64 // the bytes whose blocks a metadata operation frees
	off        int64    // of the sector
	sector     []byte
	size       int64 // length of the file at that time
	metaBefore int   // metadata operations logged before this sector
}

// crashStore is a Store in memory that knows what a power cut may leave of it.
type crashStore struct {
	mu     sync.Mutex
	live   *image
	synced *image
	log    []change
	metas  int
	after  func() // called after every change, without mu
	fail   func(op string, n int) (int, error)
	clock  int64
	most   int64 // the longest file that the filesystem can have; 0: any
}

var _ Store = (*crashStore)(nil)

func newCrashStore(m *image) *crashStore {
	if m == nil {
		m = &image{pages: make(map[int64][]byte)}
	}
	return &crashStore{live: m.clone(), synced: m.clone()}
}

// sketch makes a sketch of low in s, and opens it.
func (s *crashStore) sketch(t testing.TB, e *Engine, low *memLower) *File {
	t.Helper()
	if err := e.Create(s, low.ident()); err != nil {
		t.Fatal(err)
	}
	f, err := e.Open(s, low.open)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// failSyncs has all syncs from here on fail with err.
func (s *crashStore) failSyncs(err error) {
	s.onSync(func() error { return err })
}

// countSyncs counts the syncs that s is asked for from here on.
func (s *crashStore) countSyncs(n *int) {
	s.onSync(func() error {
		*n++
		return nil
	})
}

// onSync calls f, under mu, at every sync, which fails with f's error.
func (s *crashStore) onSync(f func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = func(op string, n int) (int, error) {
		if op == "sync" {
			return n, f()
		}
		return n, nil
	}
}

// power returns what a power cut leaves that takes everything that was not synced.
func (s *crashStore) power() *image {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.synced.clone()
}

// crash returns what one power cut could leave: the metadata operations up to a random one, and random sectors.
func (s *crashStore) crash(r *rand.Rand) *image {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.synced.clone()
	keep := r.IntN(s.metas + 1)
	bias := r.IntN(4) // 0: every sector, 1: none, otherwise a half
	ordered := s.ordered(keep)
	metas := 0
	for i, c := range s.log {
		if c.meta != nil {
			if metas < keep {
				c.meta(m)
			}
			metas++
			continue
		}
		if c.order {
			continue
		}
		size := max(m.size, min(c.size, c.off+sectorSize))
		if i >= ordered && (bias == 1 || bias > 1 && r.IntN(2) == 0 || !s.reaches(i, keep) || size > m.size && c.metaBefore > keep) {
			continue
		}
		m.write(c.sector, c.off)
		m.size = size
	}
	m.cutTail()
	return m
}

// ordered returns the end of the part of the log that is on the disk for certain if keep metadata operations are.
func (s *crashStore) ordered(keep int) (end int) {
	last, metas := 0, 0
	for i, c := range s.log {
		switch {
		case c.order:
			last = i
		case c.meta != nil && metas < keep:
			metas++
			end = last
		}
	}
	return end
}

// reaches says whether the sector of log entry i can be on the disk when only keep metadata operations are: not if its
// block was freed by one that is not: it lies in a new block then, and the file does not know that yet.
func (s *crashStore) reaches(i, keep int) bool {
	c := s.log[i]
	metas := 0
	for _, m := range s.log[:i] {
		if m.meta == nil {
			continue
		}
		if metas >= keep && c.off+sectorSize > m.discards[0] && c.off < m.discards[1] {
			return false
		}
		metas++
	}
	return true
}

// change runs op under the lock, after asking fail, and calls after.
func (s *crashStore) change(name string, op func()) error {
	s.mu.Lock()
	if s.fail != nil {
		if _, err := s.fail(name, 0); err != nil {
			s.mu.Unlock()
			return err
		}
	}
	op()
	s.mu.Unlock()
	if s.after != nil {
		s.after()
	}
	return nil
}

func (s *crashStore) touch() {
	s.clock++
	s.live.mtime = unix.NsecToTimespec(1e18 + s.clock*1e6)
}

func (s *crashStore) meta(discards [2]int64, op func(*image)) {
	op(s.live)
	s.log = append(s.log, change{meta: op, discards: discards})
	s.metas++
}

// logSectors records the sectors that [off, end) touches, as they are now.
func (s *crashStore) logSectors(off, end int64) {
	for o := off &^ (sectorSize - 1); o < end; o += sectorSize {
		b := make([]byte, sectorSize)
		s.live.read(b, o)
		s.log = append(s.log, change{off: o, sector: b, size: s.live.size, metaBefore: s.metas})
	}
}

func (s *crashStore) ReadAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := max(0, min(int64(len(p)), s.live.size-off))
	s.live.read(p[:n], off)
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

func (s *crashStore) WriteAt(p []byte, off int64) (n int, err error) {
	s.mu.Lock()
	n = len(p)
	if s.fail != nil {
		n, err = s.fail("write", n)
	}
	if n > 0 {
		end := off + int64(n)
		s.live.write(p[:n], off)
		s.touch()
		s.logSectors(off, end)
	}
	s.mu.Unlock()
	if s.after != nil {
		s.after()
	}
	return n, err
}

func (s *crashStore) Stat() (st unix.Stat_t, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Size, st.Mtim, st.Ino, st.Blksize = s.live.size, s.live.mtime, 7, pageSize
	st.Blocks = int64(len(s.live.pages)) * 8
	return st, nil
}

func (s *crashStore) Truncate(size int64) error {
	if s.most > 0 && size > s.most {
		return unix.EFBIG
	}
	return s.change("truncate", func() {
		s.touch()
		s.meta([2]int64{size, 1 << 62}, func(m *image) { m.truncate(size) })
	})
}

func (s *crashStore) Fallocate(mode uint32, off, n int64) error {
	end := off + n
	return s.change("fallocate", func() {
		s.touch()
		if mode&keepSize == 0 && end > s.live.size {
			s.meta([2]int64{}, func(m *image) { m.size = max(m.size, end) })
		}
		if mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) == 0 {
			return
		}
		s.meta([2]int64{roundUp(off, pageSize), end &^ (pageSize - 1)}, func(m *image) { m.punch(off, end) })
		s.zeroEdge(off, min(end, roundUp(off, pageSize)))
		s.zeroEdge(max(off, end&^(pageSize-1)), end)
	})
}

// zeroEdge zeroes a part of a page, in the page cache as the kernel does.
func (s *crashStore) zeroEdge(off, end int64) {
	if off >= end || s.live.pages[off/pageSize] == nil {
		return
	}
	size := s.live.size
	s.live.write(make([]byte, end-off), off)
	s.live.size = size
	s.logSectors(off, end)
}

func (s *crashStore) Seek(off int64, whence int) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if off < 0 || off >= s.live.size {
		return 0, unix.ENXIO
	}
	for ; off < s.live.size; off = off/pageSize*pageSize + pageSize {
		if (s.live.pages[off/pageSize] != nil) == (whence == unix.SEEK_DATA) {
			return off, nil
		}
	}
	if whence == unix.SEEK_DATA {
		return 0, unix.ENXIO
	}
	return s.live.size, nil
}

func (s *crashStore) Sync() error {
	return s.change("sync", func() { s.synced, s.log, s.metas = s.live.clone(), nil, 0 })
}

// SyncData leaves to chance the attributes that changed after the last thing that it does put on disk.
func (s *crashStore) SyncData() error {
	return s.change("sync", func() {
		last := -1
		for i, c := range s.log {
			if c.meta != nil && !c.header {
				last = i
			}
		}
		attrs := &image{header: s.synced.header, origin: s.synced.origin}
		var left []change
		for i, c := range s.log {
			switch {
			case c.header && i < last:
				c.meta(attrs)
			case c.header:
				c.metaBefore = 0
				left = append(left, c)
			}
		}
		s.synced, s.log, s.metas = s.live.clone(), left, len(left)
		s.synced.header, s.synced.origin = attrs.header, attrs.origin
	})
}

func (s *crashStore) Order() error {
	return s.change("sync", func() { s.log = append(s.log, change{order: true}) })
}

func (s *crashStore) Header() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live.header, nil
}

func (s *crashStore) SetHeader(b []byte) error {
	return s.attribute(func(m *image) { m.header = b })
}

func (s *crashStore) RemoveHeader() error {
	return s.attribute(func(m *image) { m.header = nil })
}

func (s *crashStore) SetOrigin(b []byte) error {
	return s.attribute(func(m *image) { m.origin = b })
}

func (s *crashStore) attribute(op func(*image)) error {
	return s.change("header", func() {
		s.meta([2]int64{}, op)
		s.log[len(s.log)-1].header = true
	})
}

func (s *crashStore) SetTimes(_, mtime unix.Timespec) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch mtime.Nsec {
	case unix.UTIME_OMIT:
	case unix.UTIME_NOW:
		s.touch()
	default:
		s.live.mtime = mtime
	}
	return nil
}

func (s *crashStore) FD() int      { return -1 }
func (s *crashStore) Close() error { return nil }

// memLower is a lower file in memory whose reads can be made to fail.
type memLower struct {
	data  []byte
	mtime int64
	fail  func(off int64) error
	reads *int
}

func (l *memLower) open() (Lower, error) { return l, nil }
func (l *memLower) FS() uint64           { return testFS }
func (l *memLower) Close() error         { return nil }

func (l *memLower) ident() Ident {
	return Ident{Size: int64(len(l.data)), MtimeNS: l.mtime, FS: testFS, Ino: 9}
}

func (l *memLower) Stat() (st unix.Stat_t, err error) {
	st.Size, st.Mtim, st.Ino, st.Blocks = int64(len(l.data)), unix.NsecToTimespec(l.mtime), 9, int64(len(l.data)+511)/512
	return st, nil
}

func (l *memLower) ReadAt(p []byte, off int64) (int, error) {
	if l.fail != nil {
		if err := l.fail(off); err != nil {
			return 0, err
		}
	}
	if l.reads != nil {
		*l.reads++
	}
	if off >= int64(len(l.data)) {
		return 0, io.EOF
	}
	n := copy(p, l.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// SeekData calls pages of zeros holes.
func (l *memLower) SeekData(off int64) (start, end int64, err error) {
	size := int64(len(l.data))
	hole := func(o int64) bool { return allZero(l.data[o&^(pageSize-1) : min(size, o&^(pageSize-1)+pageSize)]) }
	for off < size && hole(off) {
		off = off&^(pageSize-1) + pageSize
	}
	if off >= size {
		return 0, 0, unix.ENXIO
	}
	for end = off; end < size && !hole(end); {
		end = end&^(pageSize-1) + pageSize
	}
	return off, min(end, size), nil
}
