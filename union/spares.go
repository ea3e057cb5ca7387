package union

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// spares are upper inodes without a name that were made before anybody asked for them: making one costs the filesystem
// half of what a first write does. A mount that copies nothing up has none, and one that stops copying up gives them
// back. A crash leaves nothing: a nameless inode goes with its last descriptor.
type spares struct {
	make func() (spare, error)

	mu      sync.Mutex
	list    []spare
	want    int  // how many to keep
	making  bool // a goroutine does
	closed  bool
	used    time.Time // when one was last taken
	idle    *time.Timer
	pending sync.WaitGroup
}

// spare is an empty regular file of the server's user, mode spareMode, open for reading and writing.
type spare struct {
	fd  int
	ino uint64
}

const (
	spareMode = 0o644
	// A mount that copies up one file now and then keeps minSpares; each time there is none left it keeps twice as many.
	minSpares = 4
	maxSpares = 32
	// spareIdle after the last copy-up the spares are given back.
	spareIdle = 10 * time.Second
)

// take returns a spare if there is one. More are made once half of them are gone, so that not every taker wakes the maker.
func (s *spares) take() (spare, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used = time.Now()
	n := len(s.list)
	if n == 0 {
		s.want = min(max(2*s.want, minSpares), maxSpares)
	}
	if n <= s.want/2 && !s.making && !s.closed {
		s.making = true
		s.pending.Go(s.fill)
	}
	if n == 0 {
		return spare{}, false
	}
	sp := s.list[n-1]
	s.list = s.list[:n-1]
	return sp, true
}

// fill makes spares until there are enough. An error ends it: whoever needs a file then makes it and meets the error.
func (s *spares) fill() {
	for {
		sp, err := s.make()
		s.mu.Lock()
		if err == nil {
			s.list = append(s.list, sp)
		}
		if err != nil || s.closed || len(s.list) >= s.want {
			s.making = false
			if s.idle == nil {
				s.idle = time.AfterFunc(spareIdle, s.tidy)
			}
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
	}
}

// tidy gives the spares back if none was taken for a while, and otherwise looks again later.
func (s *spares) tidy() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if left := spareIdle - time.Since(s.used); left > 0 && !s.closed {
		s.idle.Reset(left)
		return
	}
	s.idle, s.want = nil, 0
	s.drop()
}

func (s *spares) drop() {
	for _, sp := range s.list {
		unix.Close(sp.fd)
	}
	s.list = nil
}

// close gives everything back, and lets none be made any more.
func (s *spares) close() {
	s.mu.Lock()
	s.closed = true
	if s.idle != nil {
		s.idle.Stop()
	}
	s.mu.Unlock()
	s.pending.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop()
}

// newSpare makes one.
func (fs *FS) newSpare() (spare, error) {
	fd, err := fs.work.Tmpfile(tmpDir, spareMode)
	if err != nil {
		return spare{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return spare{}, err
	}
	return spare{fd, st.Ino}, nil
}
