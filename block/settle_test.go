package block

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// eventually waits for something that is bound to happen; the test's own deadline is the limit.
func eventually(t *testing.T, happened func() bool) {
	t.Helper()
	for !happened() {
		if t.Context().Err() != nil {
			t.Fatal("it did not happen")
		}
		time.Sleep(time.Millisecond)
	}
}

// logbook collects what an operator is told.
type logbook struct {
	mu    sync.Mutex
	lines []string
}

func (l *logbook) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

// count says how many lines contain all of the words.
func (l *logbook) count(words ...string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
next:
	for _, line := range l.lines {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		n++
	}
	return n
}

// TestCommitOfOpenFiles: a file that nobody syncs or closes is on disk after CommitInterval, also what was only partly
// written with caw=lazy, and it is left alone then.
func TestCommitOfOpenFiles(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		t.Run(name, func(t *testing.T) {
			e := newEngine(t, Options{Format: format, CaW: CaWLazy, CommitInterval: time.Millisecond})
			low := &memLower{data: testContent(100_000), mtime: 5}
			store, other := newCrashStore(nil), newCrashStore(nil)
			f, busy := store.sketch(t, e, low), other.sketch(t, e, low)
			want := bytes.Clone(low.data)
			copy(want[5000:], "partial")
			if _, err := f.WriteAt([]byte("partial"), 5000); err != nil {
				t.Fatal(err)
			}
			eventually(t, func() bool { return e.Stats().Commits > 0 && !f.hasUnsaved() })
			after, err := e.Open(newCrashStore(store.power()), low.open)
			if err != nil {
				t.Fatal(err)
			}
			expectContent(t, after, want)

			syncs := 0
			store.countSyncs(&syncs)
			for i := range int64(3) { // rounds pass
				n := e.Stats().Commits
				if _, err := busy.WriteAt([]byte("x"), i*4096); err != nil {
					t.Fatal(err)
				}
				eventually(t, func() bool { return e.Stats().Commits > n })
			}
			store.mu.Lock()
			if syncs != 0 {
				t.Errorf("a file with nothing new was synced %d times", syncs)
			}
			store.mu.Unlock()
			for _, f := range []*File{f, busy, after} {
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// hasUnsaved says whether anything of f is not in its table on disk.
func (f *File) hasUnsaved() bool {
	transit, untold := f.unsaved()
	return len(transit)+len(untold) > 0
}

// TestCommitOfOpenFilesVolatile: a volatile mount writes the table as well, and syncs nothing.
func TestCommitOfOpenFilesVolatile(t *testing.T) {
	e := newEngine(t, Options{Volatile: true, CommitInterval: time.Millisecond})
	low := &memLower{data: testContent(100_000), mtime: 5}
	store := newCrashStore(nil)
	f := store.sketch(t, e, low)
	store.onSync(func() error {
		t.Error("synced")
		return nil
	})
	want := bytes.Clone(low.data)
	copy(want[5000:], "partial")
	if _, err := f.WriteAt([]byte("partial"), 5000); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return e.Stats().Commits > 0 && !f.hasUnsaved() })
	store.mu.Lock()
	m := store.live.clone()
	store.mu.Unlock()
	after, err := e.Open(newCrashStore(m), low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, after, want)
	if err := errors.Join(f.Close(), after.Close()); err != nil {
		t.Error(err)
	}
}

// TestFillIdleHot: a file to which as much was written as it lacks is completed when it settles, though it lacks most of
// its blocks; one byte less is not enough.
func TestFillIdleHot(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW} {
		t.Run(name, func(t *testing.T) {
			for _, short := range []int{0, 1} {
				want := testContent(64 << 10)
				r := newRig(t, Options{Format: format, Fill: FillIdle, SettleDelay: time.Millisecond}, want)
				block := testContent(4096)
				copy(want[8192:], block)
				for range 14 { // 14 blocks' worth into one of 16, and then 15 are missing
					r.write(block, 8192)
				}
				r.write(block[:4096-short], 8192)
				settled := make(chan struct{})
				r.f.Settle(func(*File) { close(settled) })
				<-settled
				lower, _, _ := r.f.States()
				if completed := lower == 0; completed != (short == 0) {
					t.Errorf("%d bytes short of enough: completed %v", short, completed)
				}
				r.expect(want)
			}
		})
	}
}

// TestFillInUse: a file that is synced again and again is completed while it is open and written to, and loses nothing.
func TestFillInUse(t *testing.T) {
	want := testContent(3<<20 + 100)
	r := newRig(t, Options{Fill: FillIdle, CommitInterval: 5 * time.Millisecond}, want)
	p := testContent(5000)
	for i, end := 0, time.Now().Add(time.Minute); r.f.Sketch() && time.Now().Before(end); i++ {
		off := int64(i*7919*13) % (2 << 20) // what lies behind is never written
		p[0] = byte(i)
		copy(want[off:], p)
		r.write(p, off)
		if i%10 == 0 {
			if err := r.f.Sync(i%20 == 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	if r.f.Sketch() {
		t.Fatal("it stayed a sketch")
	}
	r.expect(want)
	r.write([]byte("after"), 77)
	copy(want[77:], "after")
	r.reopen()
	r.expect(want)
}

// TestFillInUseOnly: what is not synced again and again, or was asked to take no space, stays a sketch while it is open.
func TestFillInUseOnly(t *testing.T) {
	for name, c := range map[string]struct {
		fill  Fill
		syncs int
		begun bool
	}{"hot": {FillIdle, hotSyncs, true}, "hardly synced": {FillIdle, hotSyncs - 1, false}, "none": {FillNone, hotSyncs, false}} {
		t.Run(name, func(t *testing.T) {
			want := testContent(1 << 20)
			r := newRig(t, Options{Fill: c.fill}, want)
			for range 300 {
				r.write(want[:4096], 0)
			}
			for i := range c.syncs {
				at := int64(i*7+5) * 4096 // no log
				r.write(want[:4096], at)
				copy(want[at:], want[:4096])
				if err := r.f.Sync(true); err != nil {
					t.Fatal(err)
				}
			}
			r.e.fillInUse(r.f)
			if begun := r.e.filling.Load() || !r.f.Sketch(); begun != c.begun {
				t.Errorf("begun: %v", begun)
			}
			for end := time.Now().Add(time.Minute); r.e.filling.Load() && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
			if r.f.Sketch() == c.begun {
				t.Errorf("a sketch: %v", r.f.Sketch())
			}
			r.expect(want)
		})
	}
}

// TestFillIdleWithoutSpace: that completing a file fails keeps nobody waiting: what was written is on disk.
func TestFillIdleWithoutSpace(t *testing.T) {
	var log logbook
	e := newEngine(t, Options{Fill: FillIdle, SettleDelay: time.Millisecond, Logf: log.printf})
	low := &memLower{data: testContent(64 << 10), mtime: 5}
	store := newCrashStore(nil)
	f := store.sketch(t, e, low)
	want := bytes.Clone(low.data)
	for i := range int64(15) {
		if _, err := f.WriteAt(make([]byte, 4096), i*4096); err != nil {
			t.Fatal(err)
		}
		clear(want[i*4096 : (i+1)*4096])
	}
	low.fail = func(int64) error { return unix.EIO }
	settled := make(chan struct{})
	f.Settle(func(*File) { close(settled) })
	<-settled
	if n := log.count("completing", "inode 7"); n != 1 {
		t.Errorf("the operator was told %d times", n)
	}
	low.fail = nil
	after, err := e.Open(newCrashStore(store.power()), low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, after, want)
	if err := errors.Join(f.Close(), after.Close()); err != nil {
		t.Error(err)
	}
}

// TestLossesAreNamed: bytes that can never be put on disk, because the rest of their blocks cannot be read, are named in
// the log when the engine ends, by inode, blocks and reason, and Engine.Close returns the error. Everything else is saved.
func TestLossesAreNamed(t *testing.T) {
	for name, settle := range map[string]bool{"open": false, "waiting to be settled": true} {
		t.Run(name, func(t *testing.T) {
			var log logbook
			e := NewEngine(Options{CaW: CaWLazy, SettleDelay: time.Hour, Logf: log.printf})
			low := &memLower{data: testContent(100_000), mtime: 5}
			store := newCrashStore(nil)
			f := store.sketch(t, e, low)
			broken := errors.New("the disk below is gone")
			want := bytes.Clone(low.data)
			for _, off := range []int64{4100, 8200, 50_000} {
				if _, err := f.WriteAt([]byte("acknowledged"), off); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := f.WriteAt(make([]byte, 4096), 20_480); err != nil {
				t.Fatal(err)
			}
			clear(want[20_480 : 20_480+4096])
			low.fail = func(int64) error { return fmt.Errorf("%w: %w", broken, unix.EIO) }
			closed := make(chan error, 1)
			if settle {
				f.Settle(func(f *File) { closed <- f.Close() })
			}
			if err := e.Close(); !errors.Is(err, broken) || !strings.Contains(err.Error(), "inode 7") {
				t.Errorf("closing the engine: %v", err)
			}
			if !settle {
				closed <- f.Close()
			}
			if err := <-closed; !errors.Is(err, broken) {
				t.Errorf("closing the file: %v", err)
			}
			if log.count("inode 7", "blocks 1 to 2", "lost", broken.Error()) != 1 || log.count("inode 7", "blocks 12 to 12", "lost") != 1 {
				t.Errorf("the log says %q", log.lines)
			}
			if err := f.Close(); err != nil {
				t.Errorf("closing the file again: %v", err)
			}
			low.fail = nil
			e = newEngine(t, Options{})
			f, err := e.Open(store, low.open)
			if err != nil {
				t.Fatal(err)
			}
			expectContent(t, f, want)
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBackgroundFailureIsReportedOnce: work that fails again and again for the same reason is one line, until it succeeds.
func TestBackgroundFailureIsReportedOnce(t *testing.T) {
	var log logbook
	var broken atomic.Bool
	e := newEngine(t, Options{CaW: CaWLazy, CommitInterval: time.Millisecond, Logf: log.printf})
	low := &memLower{data: testContent(100_000), mtime: 5, fail: func(int64) error {
		if broken.Load() {
			return unix.EIO
		}
		return nil
	}}
	f := newCrashStore(nil).sketch(t, e, low)
	for round := range 2 {
		broken.Store(true)
		if _, err := f.WriteAt([]byte("partial"), int64(5000+4096*round)); err != nil {
			t.Fatal(err)
		}
		n := e.Stats().Errors
		eventually(t, func() bool { return e.Stats().Errors > n+10 })
		if told := log.count("committing", "tried again later"); told != round+1 {
			t.Errorf("after failure %d the operator was told %d times", round+1, told)
		}
		broken.Store(false)
		eventually(t, func() bool { text := f.complaint.Load(); return !f.hasUnsaved() && text != nil && *text == "" })
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// TestCloseDuringFill: an engine ends without waiting until a large file is completed, and every settled file is handed
// back.
func TestCloseDuringFill(t *testing.T) {
	want := testContent(4 << 20)
	g := &gate{Lower: &memLower{data: want, mtime: 5}, reading: make(chan struct{}), proceed: make(chan struct{})}
	e := NewEngine(Options{CaW: CaWLazy, Fill: FillIdle, SettleDelay: time.Microsecond, Logf: t.Logf})
	var files []*File
	handed := make(chan *File, 2)
	for range 2 {
		store := newCrashStore(nil)
		if err := e.Create(store, Ident{Size: int64(len(want)), MtimeNS: 5}); err != nil {
			t.Fatal(err)
		}
		f, err := e.Open(store, func() (Lower, error) { return g, nil })
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // twice as much as the file has: hot
			if _, err := f.WriteAt(want[:2<<20], 0); err != nil {
				t.Fatal(err)
			}
		}
		files = append(files, f)
		f.Settle(func(f *File) { handed <- f })
	}
	<-g.reading
	closed := make(chan error)
	go func() { closed <- e.Close() }()
	<-e.end
	close(g.proceed)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if len(handed) != 2 {
		t.Errorf("%d of 2 files were handed back", len(handed))
	}
	for _, f := range files {
		if !f.Sketch() {
			t.Error("a file was completed after the end")
		}
		expectContent(t, f, want)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A file whose lower layer does not answer keeps no other file from the disk.
func TestSlowLowerDelaysNobodyElse(t *testing.T) {
	e := newEngine(t, Options{SettleDelay: time.Hour, CommitInterval: 10 * time.Millisecond, CaW: CaWLazy})
	answer := make(chan struct{})
	slow := &memLower{data: testContent(200_000), mtime: 5, fail: func(int64) error { <-answer; return nil }}
	quick := &memLower{data: testContent(200_000), mtime: 5}
	stuck := newCrashStore(nil).sketch(t, e, slow)
	if _, err := stuck.WriteAt([]byte("partial"), 5000); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond) // the settler is at it
	store := newCrashStore(nil)
	f := store.sketch(t, e, quick)
	if _, err := f.WriteAt([]byte("partial"), 5000); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return e.Stats().Commits > 0 })
	if m := store.power(); m.header == nil {
		t.Error("the other file was not committed")
	}
	close(answer)
	for _, f := range []*File{stuck, f} {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestSettleAgain: a file that is opened and closed again and again is not put on disk before SettleDelay has passed since
// it was closed for the last time.
func TestSettleAgain(t *testing.T) {
	e := newEngine(t, Options{SettleDelay: time.Hour, CommitInterval: 2 * time.Hour})
	low := &memLower{data: testContent(100_000), mtime: 5}
	f, other := newCrashStore(nil).sketch(t, e, low), newCrashStore(nil).sketch(t, e, low)
	settled := make(chan *File, 2)
	f.Settle(func(f *File) { settled <- f })
	other.Settle(func(f *File) { settled <- f })
	past := time.Now().Add(-time.Hour)
	e.mu.Lock()
	e.waiting[0].at = past // of its first close; it has been closed since
	last := f.settleAt
	e.mu.Unlock()
	if files, _, _ := e.nextSettled(time.Now().Add(2 * time.Hour)); len(files) > 0 {
		t.Fatalf("%d files settle", len(files))
	}
	e.mu.Lock()
	if len(e.waiting) != 2 || e.waiting[0].f != f || !e.waiting[0].at.Equal(last) || e.waiting[1].at.Before(last) {
		t.Error("it does not wait where its time is")
	}
	e.waiting[0].at, f.settleAt = past, past
	e.mu.Unlock()
	e.nudge()
	if got := <-settled; got != f {
		t.Error("the other file settled first")
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
}
