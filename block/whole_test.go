package block

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/state"
)

// whole makes a provisional copy of low in a new store.
func whole(t testing.TB, e *Engine, low *memLower) (*File, *crashStore) {
	t.Helper()
	s := newCrashStore(nil)
	f, err := e.CreateWhole(s, low.ident(), low)
	if err != nil {
		t.Fatal(err)
	}
	return f, s
}

func TestWholeIsProvisionalUntilCommitted(t *testing.T) {
	low := &memLower{data: testContent(20000), mtime: 5}
	f, s := whole(t, newEngine(t, Options{SettleDelay: time.Hour}), low)
	defer f.Close()
	if _, err := f.WriteAt([]byte("new"), 19999); err != nil {
		t.Fatal(err)
	}
	if _, ok := f.Plain(); ok || !f.plain.Load() || !f.Sketch() || f.Size() != 20002 {
		// crashStore has no descriptor, so nothing can be passed through
		t.Errorf("plain %v, sketch %v, size %d", f.plain.Load(), f.Sketch(), f.Size())
	}
	if b, _ := s.Header(); b == nil {
		t.Error("the header is gone before the bytes are on disk")
	}
	if err := f.Sync(false); err != nil {
		t.Fatal(err)
	}
	m := s.power()
	if m.header != nil || len(m.origin) == 0 || m.size != 20002 || f.Sketch() {
		t.Errorf("synced: header %v, origin %x, size %d, sketch %v", m.header, m.origin, m.size, f.Sketch())
	}
	want := append(bytes.Clone(low.data[:19999]), "new"...)
	expectContent(t, newCrashStore(m), want)
}

// A lower file that is shorter than it was is no reason to make up bytes.
func TestWholeOfAShorterLower(t *testing.T) {
	low := &memLower{data: testContent(20000), mtime: 5}
	id := low.ident()
	low.data = low.data[:1000]
	_, err := newEngine(t, Options{}).CreateWhole(newCrashStore(nil), id, low)
	if !errors.Is(err, ErrLowerChanged) {
		t.Errorf("got %v", err)
	}
}

// Once a sync has failed nothing says what the disk holds: the header stays, and Sync keeps failing.
func TestWholeAfterAFailedSync(t *testing.T) {
	f, s := whole(t, newEngine(t, Options{SettleDelay: time.Hour}), &memLower{data: testContent(5000), mtime: 5})
	s.failSyncs(unix.EIO)
	if err := f.Sync(false); !errors.Is(err, unix.EIO) {
		t.Errorf("sync: %v", err)
	}
	s.fail = nil
	if err := f.Sync(false); !errors.Is(err, unix.EIO) {
		t.Errorf("second sync: %v", err)
	}
	if b, _ := s.Header(); b == nil {
		t.Error("the header is gone")
	}
	f.Abandon()
}

// Many files are settled with one sync of the filesystem; if that fails, each is synced by itself.
func TestManyWholesSettleTogether(t *testing.T) {
	for _, fails := range []bool{false, true} {
		e := newEngine(t, Options{SettleDelay: time.Second}) // all have asked for it before the first one's turn comes
		synced := 0
		e.SyncsWith(func() error {
			if synced++; fails {
				return unix.EIO
			}
			return nil
		})
		done := make(chan *File, 3*syncMany)
		stores, alone := map[*File]*crashStore{}, make(chan struct{}, 100)
		for range cap(done) {
			f, s := whole(t, e, &memLower{data: testContent(5000), mtime: 5})
			s.onSync(func() error {
				alone <- struct{}{}
				return nil
			})
			stores[f] = s
		}
		for f := range stores {
			f.Settle(func(f *File) { done <- f })
		}
		for range cap(done) {
			f := <-done
			if b, _ := stores[f].Header(); b != nil || f.Sketch() {
				t.Errorf("fails %v: settled with a header", fails)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
		if synced == 0 || synced > 3 { // one deadline may fall between two of them
			t.Errorf("fails %v: %d syncs of the filesystem", fails, synced)
		}
		if n := len(alone); fails != (n >= cap(done)) || !fails && n >= syncMany {
			t.Errorf("fails %v: %d files were synced by themselves", fails, n)
		}
	}
}

// When the engine ends, the headers' removal is on disk as well.
func TestManyWholesAtTheEnd(t *testing.T) {
	e := newEngine(t, Options{SettleDelay: time.Hour})
	var stores []*crashStore
	e.SyncsWith(func() error {
		for _, s := range stores {
			if err := s.Sync(); err != nil {
				return err
			}
		}
		return nil
	})
	low := &memLower{data: testContent(5000), mtime: 5}
	for range syncMany {
		f, s := whole(t, e, low)
		stores = append(stores, s)
		f.Settle(func(f *File) {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	for _, s := range stores {
		m := s.power()
		if m.header != nil {
			t.Error("a power cut after the end shows the lower file")
		}
		expectContent(t, newCrashStore(m), low.data)
	}
}

// What is written past a file that has settled, and synced there without its inode, as O_DSYNC and msync do where the file
// is passed through, outlives a power cut: the header is gone for good.
func TestSettledStaysOrdinary(t *testing.T) {
	low := &memLower{data: testContent(5000), mtime: 5}
	settle := func(t *testing.T, e *Engine, files ...*File) {
		done := make(chan *File, len(files))
		for _, f := range files {
			f.Settle(func(f *File) { done <- f })
		}
		for range files {
			<-done
		}
	}
	past := func(t *testing.T, s *crashStore, old []byte) {
		t.Helper()
		if _, err := s.WriteAt([]byte("written past it"), 0); err != nil {
			t.Fatal(err)
		}
		if err := s.SyncData(); err != nil {
			t.Fatal(err)
		}
		want := bytes.Clone(old)
		copy(want, "written past it")
		m := s.power()
		if m.header != nil {
			t.Errorf("a power cut brings the header back: %v", m.header)
		}
		expectContent(t, newCrashStore(m), want)
	}
	t.Run("many", func(t *testing.T) {
		e := newEngine(t, Options{SettleDelay: time.Millisecond})
		var stores []*crashStore
		e.SyncsWith(func() error {
			for _, s := range stores {
				if err := s.Sync(); err != nil {
					return err
				}
			}
			return nil
		})
		var files []*File
		for range 2 * syncMany {
			f, s := whole(t, e, low)
			files, stores = append(files, f), append(stores, s)
			defer f.Close()
		}
		settle(t, e, files...)
		for i, s := range stores {
			if files[i].Provisional() {
				t.Fatal("settled, and provisional")
			}
			past(t, s, low.data)
		}
	})
	t.Run("one", func(t *testing.T) {
		e := newEngine(t, Options{SettleDelay: time.Millisecond})
		f, s := whole(t, e, low)
		defer f.Close()
		settle(t, e, f)
		past(t, s, low.data)
	})
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW} {
		t.Run("truncated "+name, func(t *testing.T) {
			e := newEngine(t, Options{SettleDelay: time.Millisecond, Format: format})
			s := newCrashStore(nil)
			f := s.sketch(t, e, low)
			defer f.Close()
			if err := f.Truncate(0); err != nil {
				t.Fatal(err)
			}
			if !f.Provisional() {
				t.Fatal("a power cut brings the header back, and the file passes for an ordinary one")
			}
			if err := f.Truncate(100); err != nil {
				t.Fatal(err)
			}
			settle(t, e, f)
			past(t, s, make([]byte, 100))
		})
	}
	t.Run("found complete", func(t *testing.T) {
		e := newEngine(t, Options{SettleDelay: time.Millisecond})
		s := newCrashStore(nil)
		s.sketch(t, e, low).Abandon()
		h := Header{Format: Sparse, BlockSize: defaultBlockSize, Ident: low.ident(), Complete: true, Size: 100}
		if err := errors.Join(s.SetHeader(h.encode()), s.Sync()); err != nil {
			t.Fatal(err)
		}
		f, err := e.Open(s, low.open)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if !f.Provisional() {
			t.Fatal("a power cut brings the header back, and the file passes for an ordinary one")
		}
		settle(t, e, f)
		past(t, s, make([]byte, 100))
	})
}

// The kernel tells a failure of syncfs once. Files that were open then do not trust the next one, which may have nothing
// to tell although their bytes are lost.
func TestFailedSyncFSConcernsEveryOpenFile(t *testing.T) {
	e := newEngine(t, Options{SettleDelay: time.Hour, Logf: func(string, ...any) {}})
	fails := true
	e.SyncsWith(func() error {
		if fails {
			fails = false
			return unix.EIO
		}
		return nil
	})
	low := &memLower{data: testContent(5000), mtime: 5}
	batch := func() (files []*File) {
		for range syncMany {
			f, _ := whole(t, e, low)
			t.Cleanup(func() { f.Abandon() })
			files = append(files, f)
		}
		return files
	}
	first, second := batch(), batch()
	if rest := e.settleWholes(first); len(rest) != len(first) {
		t.Errorf("%d of %d files are to be synced by themselves", len(rest), len(first))
	}
	if rest := e.settleWholes(second); len(rest) != len(second) {
		t.Errorf("%d of %d files of another batch are to be synced by themselves", len(rest), len(second))
	}
	if rest := e.settleWholes(batch()); len(rest) != 0 {
		t.Errorf("%d files that are newer than the failure are to be synced by themselves", len(rest))
	}
}

// TestFailedSyncOutlivesTheProcess: a successor does not say that on the disk is what the kernel has said is lost.
func TestFailedSyncOutlivesTheProcess(t *testing.T) {
	for name, makes := range map[string]func(*Engine, *crashStore, *memLower) (*File, error){
		"sketch": func(e *Engine, s *crashStore, low *memLower) (*File, error) { return s.sketch(t, e, low), nil },
		"provisional": func(e *Engine, s *crashStore, low *memLower) (*File, error) {
			return e.CreateWhole(s, low.ident(), low)
		},
	} {
		t.Run(name, func(t *testing.T) {
			arena, err := state.Create("test")
			if err != nil {
				t.Fatal(err)
			}
			defer arena.Close()
			o := Options{CaW: CaWLazy, SettleDelay: time.Hour, Logf: func(string, ...any) {}, Memory: arena}
			low, s := &memLower{data: testContent(64 << 10), mtime: 5}, newCrashStore(nil)
			f, err := makes(newEngine(t, o), s, low)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Abandon()
			if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
				t.Fatal(err)
			}
			s.failSyncs(unix.ENOSPC)
			if err := f.Sync(true); !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("sync: %v", err)
			}
			s.fail = nil
			g, err := newEngine(t, o).Open(s, low.open)
			if err != nil {
				t.Fatal(err)
			}
			defer g.Abandon()
			if err := g.Sync(true); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("sync of the successor: %v", err)
			}
		})
	}
}

// A file without a name is not put on disk by anybody but who asks for it.
func TestNamelessIsNotCommitted(t *testing.T) {
	e := newEngine(t, Options{SettleDelay: time.Millisecond, CommitInterval: 5 * time.Millisecond, CaW: CaWLazy})
	low := &memLower{data: testContent(500000), mtime: 5}
	named, nameless := newCrashStore(nil), newCrashStore(nil)
	f, g := named.sketch(t, e, low), nameless.sketch(t, e, low)
	g.Nameless()
	for _, f := range []*File{f, g} {
		if _, err := f.WriteAt([]byte("new"), 10000); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return e.Stats().Commits > 0 })
	settled := make(chan struct{})
	g.Settle(func(*File) { close(settled) })
	<-settled
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if m := nameless.power(); m.header != nil || len(m.pages) != 0 {
		t.Errorf("the nameless file is on disk: header %v, %d pages", m.header, len(m.pages))
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
