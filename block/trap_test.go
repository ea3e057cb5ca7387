package block

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func testContent(n int) []byte { return noise(rand.New(rand.NewPCG(1, uint64(n))), n) }

// TestTrapOverwrittenBlockIsMarked: a whole block overwritten is read from the upper file from then on.
func TestTrapOverwrittenBlockIsMarked(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		want := testContent(64 << 10)
		r := newRig(t, o, want)
		p := bytes.Repeat([]byte{'x'}, 4096)
		r.write(p, 8192)
		copy(want[8192:], p)
		r.expect(want)
		if _, _, upper := r.f.States(); upper != 1 {
			t.Errorf("%d blocks are Upper, want 1", upper)
		}
	})
}

// TestTrapMapSurvivesReopen: the block map is written, so that another mount finds the blocks.
func TestTrapMapSurvivesReopen(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		want := testContent(1 << 20)
		r := newRig(t, o, want)
		for off := int64(5); off < 1<<20; off += 100_000 {
			r.write([]byte("written"), off)
			copy(want[off:], "written")
		}
		r.reopen()
		r.expect(want)
	})
}

// gate is a Lower whose reads wait, so that a test can write between the copier's read and its write.
type gate struct {
	Lower
	once    sync.Once
	reading chan struct{}
	proceed chan struct{}
}

func (g *gate) ReadAt(p []byte, off int64) (int, error) {
	g.once.Do(func() {
		close(g.reading)
		<-g.proceed
	})
	return g.Lower.ReadAt(p, off)
}

// TestTrapSecondPartialWrite: while the copier has read the rest of a block and not yet written it, a second partial
// write comes. It wins over the copy.
func TestTrapSecondPartialWrite(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW} {
		t.Run(name, func(t *testing.T) {
			want := testContent(16 << 10)
			r := &rig{t: t, path: t.TempDir() + "/upper"}
			low := &memLower{data: bytes.Clone(want), mtime: 5}
			g := &gate{Lower: low, reading: make(chan struct{}), proceed: make(chan struct{})}
			r.lower = func() (Lower, error) { return g, nil }
			e := newEngine(t, Options{Format: format, CaW: CaWLazy})
			s := openUpper(t, r.path)
			if err := e.Create(s, Ident{Size: int64(len(want)), MtimeNS: 5}); err != nil {
				t.Fatal(err)
			}
			f, err := e.Open(s, r.lower)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			r.f = f
			r.write([]byte("first"), 4100)
			done := make(chan error, 1)
			go func() { done <- f.completeAll() }()
			<-g.reading
			r.write([]byte("second"), 5000)
			r.write([]byte("third, across the block's end"), 8180)
			close(g.proceed)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			copy(want[4100:], "first")
			copy(want[5000:], "second")
			copy(want[8180:], "third, across the block's end")
			r.expect(want)
		})
	}
}

// TestTrapLowerChanged: a lower file that changed under its sketch is an error, never a mixture.
func TestTrapLowerChanged(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"content and time": func(p string) error { return os.WriteFile(p, testContent(64<<10), 0o644) },
		"longer":           func(p string) error { return os.Truncate(p, 70<<10) },
		"another file": func(p string) error {
			st, err := os.Stat(p)
			if err != nil {
				return err
			}
			if err := errors.Join(os.Rename(p, p+".old"), os.WriteFile(p, testContent(64<<10), 0o644)); err != nil {
				return err
			}
			return os.Chtimes(p, st.ModTime(), st.ModTime())
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Options{}, testContent(64<<10))
			r.write(bytes.Repeat([]byte{'x'}, 4096), 0)
			if err := r.f.Close(); err != nil {
				t.Fatal(err)
			}
			r.f = nil
			old, err := os.Stat(r.low)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(r.low, old.ModTime(), old.ModTime().Add(-time.Hour)); err != nil {
				t.Fatal(err)
			}
			if name == "another file" {
				if err := os.Chtimes(r.low, old.ModTime(), old.ModTime()); err != nil {
					t.Fatal(err)
				}
			}
			if err := change(r.low); err != nil {
				t.Fatal(err)
			}
			r.reopen()
			b := make([]byte, 4096)
			if _, err := r.f.ReadAt(b, 8192); !errors.Is(err, ErrLowerChanged) || !errors.Is(err, unix.EIO) {
				t.Errorf("reading a lower block: %v", err)
			}
			if _, err := r.f.ReadAt(b, 0); err != nil || b[0] != 'x' {
				t.Errorf("reading a block that the sketch holds: %v", err)
			}
			found, err := Check(openUpper(t, r.path), r.lower, false)
			if err != nil || len(found) != 1 {
				t.Errorf("check found %v, %v; want one finding", found, err)
			}
			if err := r.f.Truncate(0); err != nil { // now there is no lower block left, and Check is content
				t.Error(err)
			}
		})
	}
}

// TestTrapTimes: neither the copier nor the table nor completion changes the modification time, and none of them puts
// an older one over a newer.
func TestTrapTimes(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		r := newRig(t, o, testContent(256<<10))
		r.write([]byte("partial"), 10)
		r.write([]byte("partial"), 9000)
		when := unix.NsecToTimespec(1_000_000_000_123_456_789)
		if err := r.f.SetTimes(when, when); err != nil {
			t.Fatal(err)
		}
		same := func(what string) {
			t.Helper()
			if st, err := r.f.Stat(); err != nil || st.Mtim != when {
				t.Errorf("after %s the mtime is %v (%v), want %v", what, st.Mtim, err, when)
			}
		}
		if err := r.f.completeAll(); err != nil {
			t.Fatal(err)
		}
		same("the copy")
		if err := r.f.Sync(false); err != nil {
			t.Fatal(err)
		}
		same("the table")
		r.reopen()
		if err := r.f.Complete(); err != nil {
			t.Fatal(err)
		}
		same("completion")
		r.write([]byte("x"), 0)
		if st, err := r.f.Stat(); err != nil || st.Mtim.Nano() <= when.Nano() {
			t.Errorf("a write left the mtime at %v, %v", st.Mtim, err)
		}
	})
}

// TestTimesUnderLoad: with the copier busy all the time, the mtime that stat shows never goes back.
func TestTimesUnderLoad(t *testing.T) {
	r := newRig(t, Options{CaW: CaWLazy}, testContent(4<<20))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if err := r.f.completeAll(); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	last := int64(0)
	for i := range int64(1000) {
		r.write([]byte("partial"), i*4096+17)
		st, err := r.f.s.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if now := st.Mtim.Nano(); now < last {
			t.Fatalf("write %d: mtime went back by %d ns", i, last-now)
		}
		last = st.Mtim.Nano()
	}
	close(stop)
	wg.Wait()
}

// TestWriteErrors: a write, a copy, a table or a header that the upper file refuses costs nothing that was acknowledged.
func TestWriteErrors(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		ops := []string{"write", "header", "fallocate"}
		if format != BCoWSingle {
			ops = append(ops, "truncate") // single-level bcow never changes the upper file's length
		}
		for _, op := range ops {
			t.Run(name+"/"+op, func(t *testing.T) { testWriteErrors(t, format, op) })
		}
	}
}

func testWriteErrors(t *testing.T, format Format, op string) {
	s := seed(t)
	rnd := rand.New(rand.NewPCG(s, 1))
	low := &memLower{data: noise(rnd, 200_000), mtime: 5}
	e := newEngine(t, Options{Format: format, CaW: CaWLazy, Logf: func(string, ...any) {}})
	store := newCrashStore(nil)
	if err := e.Create(store, low.ident()); err != nil {
		t.Fatal(err)
	}
	f, err := e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(low.data)
	refused := 0
	fail := func(name string, n int) (int, error) {
		if name != op || refused > 0 && rnd.IntN(3) != 0 { // the first one always: some operations happen once
			return n, nil
		}
		refused++
		return n * rnd.IntN(2) / 2, unix.ENOSPC
	}
	for range *opsFlag {
		store.mu.Lock()
		store.fail = fail
		store.mu.Unlock()
		off := rnd.IntN(len(want))
		p := noise(rnd, 1+rnd.IntN(min(9000, len(want)-off)))
		switch rnd.IntN(5) {
		case 0, 1:
			n, err := f.WriteAt(p, int64(off))
			copy(want[off:off+n], p)
			if n < len(p) && !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("wrote %d of %d: %v", n, len(p), err)
			}
			// What a failing write touched behind n may be old or new, as on any filesystem; here it is old.
		case 2:
			if err := f.Sync(false); err != nil && !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
		case 3:
			got := make([]byte, len(p))
			if _, err := f.ReadAt(got, int64(off)); err == nil && !bytes.Equal(got, want[off:off+len(p)]) {
				t.Fatalf("read of %d at %d: wrong bytes", len(p), off)
			} else if err != nil && !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
		case 4:
			n := len(want) - rnd.IntN(max(1, min(len(want)/2, 3000)))
			if err := f.Truncate(int64(n)); err == nil {
				want = want[:n]
			} else if f.Size() != int64(len(want)) {
				want = want[:f.Size()] // refused half-way: the size is lower already, the bytes behind it are not yet freed
			}
		}
	}
	if refused == 0 {
		t.Error("nothing was refused")
	}
	store.fail = nil
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, newCrashStore(store.live), low.open)
	f, err = e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestSizeLost: a power cut may leave the name and the header of a new sketch, and no length.
func TestSizeLost(t *testing.T) {
	low := &memLower{data: testContent(64 << 10), mtime: 5}
	made := newCrashStore(nil)
	e := newEngine(t, Options{CaW: CaWLazy})
	made.sketch(t, e, low).Abandon()
	m := made.live.clone()
	m.size = 0
	s := newCrashStore(m)
	b, err := s.Header()
	if err != nil {
		t.Fatal(err)
	}
	if h, err := ParseHeader(b); err != nil || h.LogicalSize(0) != 64<<10 {
		t.Errorf("stat shows %d bytes, %v", h.LogicalSize(0), err)
	}
	f, err := e.Open(s, low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, f, low.data)
	if _, err := f.WriteAt([]byte("new"), 100); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(true), f.Close()); err != nil {
		t.Fatal(err)
	}
	if f, err = e.Open(newCrashStore(s.power()), low.open); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	expectContent(t, f, append(append(bytes.Clone(low.data[:100]), "new"...), low.data[103:]...))
}

// TestCopyError: a lower file that cannot be read keeps the block InTransit; its reader gets the error, everything else
// works, and a later attempt succeeds.
func TestCopyError(t *testing.T) {
	low := &memLower{data: testContent(64 << 10), mtime: 5}
	broken := errors.New("broken")
	low.fail = func(off int64) error {
		if off < 8192 {
			return fmt.Errorf("%w: %w", broken, unix.EIO)
		}
		return nil
	}
	e := newEngine(t, Options{CaW: CaWLazy, Logf: func(string, ...any) {}})
	store := newCrashStore(nil)
	if err := e.Create(store, low.ident()); err != nil {
		t.Fatal(err)
	}
	f, err := e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(low.data)
	for _, off := range []int64{4100, 20000} {
		if _, err := f.WriteAt([]byte("new"), off); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], "new")
	}
	b := make([]byte, 100)
	if _, err := f.ReadAt(b, 4096); !errors.Is(err, broken) {
		t.Errorf("reading the block: %v", err)
	}
	if err := f.Sync(false); !errors.Is(err, broken) {
		t.Errorf("sync: %v", err)
	}
	if _, transit, upper := f.States(); transit != 1 || upper != 1 {
		t.Errorf("%d in transit, %d upper; want 1 and 1", transit, upper)
	}
	if err := f.Close(); !errors.Is(err, broken) {
		t.Errorf("close: %v", err)
	}
	low.fail = nil
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// TestSyncErrorIsNotForgotten: after a failed fsync the table does not advance, and no later Sync claims success.
func TestSyncErrorIsNotForgotten(t *testing.T) {
	low := &memLower{data: testContent(64 << 10), mtime: 5}
	e := newEngine(t, Options{CaW: CaWLazy, Logf: func(string, ...any) {}})
	store := newCrashStore(nil)
	if err := e.Create(store, low.ident()); err != nil {
		t.Fatal(err)
	}
	f, err := e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	store.failSyncs(unix.EIO)
	if err := f.Sync(false); !errors.Is(err, unix.EIO) {
		t.Errorf("first sync: %v", err)
	}
	store.fail = nil
	if err := f.Sync(false); !errors.Is(err, unix.EIO) {
		t.Errorf("second sync: %v", err)
	}
	if err := f.Abandon(); err != nil {
		t.Error(err)
	}
	f, err = e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, f, low.data)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// TestNoCopyWhenWritesFill: partial writes that together cover a block make it Upper, and nothing is copied.
func TestNoCopyWhenWritesFill(t *testing.T) {
	reads := 0
	low := &memLower{data: testContent(64 << 10), mtime: 5, reads: &reads}
	e := newEngine(t, Options{CaW: CaWLazy})
	store := newCrashStore(nil)
	if err := e.Create(store, low.ident()); err != nil {
		t.Fatal(err)
	}
	f, err := e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := testContent(40 << 10)
	for off := 0; off < len(want); off += 410 {
		if _, err := f.WriteAt(want[off:min(off+410, len(want))], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if _, transit, upper := f.States(); transit != 0 || upper != 10 {
		t.Errorf("%d in transit, %d upper; want 0 and 10", transit, upper)
	}
	if reads != 0 {
		t.Errorf("the lower file was read %d times", reads)
	}
}

// TestAbandonUnderLoad: a file that nobody will read again is closed while the copier, a sync and a settlement are busy
// with it and writers come late. The late ones get EBADF; they never reach the file that has the descriptor's number now.
func TestAbandonUnderLoad(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW} {
		t.Run(name, func(t *testing.T) {
			e := newEngine(t, Options{Format: format, SettleDelay: time.Microsecond})
			low := &memLower{data: testContent(256 << 10), mtime: 5}
			for range 30 {
				path := t.TempDir() + "/upper"
				s := openUpper(t, path)
				if err := e.Create(s, low.ident()); err != nil {
					t.Fatal(err)
				}
				f, err := e.Open(s, low.open)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				late := func(op func(i int64) error) {
					wg.Go(func() {
						for i := int64(0); ; i++ {
							if err := op(i % 50); err == unix.EBADF {
								return
							} else if err != nil {
								t.Error(err)
								return
							}
						}
					})
				}
				late(func(i int64) error { _, err := f.WriteAt([]byte("partial"), i*4096+100); return err })
				late(func(i int64) error { _, err := f.ReadAt(make([]byte, 5000), i*4096); return err })
				late(func(int64) error { return f.Sync(false) })
				late(func(i int64) error { return f.Truncate(250<<10 + i) })
				late(func(i int64) error { return f.Fallocate(punch, i*4096+1, 5000) })
				late(func(int64) error { // a copier whose turn began before the end
					if err := f.completeAll(); err != nil || !f.closed.Load() {
						return err
					}
					return unix.EBADF
				})
				settled := make(chan struct{})
				f.Settle(func(*File) { close(settled) })
				if err := f.Abandon(); err != nil {
					t.Error(err)
				}
				other, err := os.Create(path) // takes the lowest free descriptor
				if err != nil {
					t.Fatal(err)
				}
				wg.Wait()
				<-settled
				if st, err := other.Stat(); err != nil || st.Size() != 0 {
					t.Errorf("another file has %d bytes, %v", st.Size(), err)
				}
				if err := f.Abandon(); err != nil {
					t.Errorf("the second time: %v", err)
				}
				other.Close()
			}
		})
	}
}

// TestStoreClosedTwice: the second close of a store does not close whatever has its number now.
func TestStoreClosedTwice(t *testing.T) {
	dir := t.TempDir()
	s := openUpper(t, dir+"/one")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := os.Create(dir + "/two")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != unix.EBADF {
		t.Errorf("second close: %v", err)
	}
	if _, err := s.WriteAt([]byte("x"), 0); err != unix.EBADF {
		t.Errorf("write after it: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Errorf("another file: %v", err)
	}
}

// TestHugeUpperFile: an upper file of any length, made by somebody else, is refused or read, and never a panic.
func TestHugeUpperFile(t *testing.T) {
	h := Header{Format: Sparse, BlockSize: 4096, Ident: Ident{Size: 9000, MtimeNS: 5}, Limit: 9000, Size: naturalSize}
	for _, size := range []int64{1<<63 - 1, 1<<63 - 4096, 1<<46 + 1} {
		for name, header := range map[string][]byte{"kernel's": {}, "ours": h.encode()} {
			low := &memLower{data: testContent(9000), mtime: 5}
			m := &image{pages: map[int64][]byte{}, header: header, size: size}
			if l, err := OpenReadOnly(newCrashStore(m), low.open); !errors.Is(err, ErrInvalid) {
				t.Errorf("%s header, %d bytes: %v, %v", name, size, l, err)
			}
			if found, err := Check(newCrashStore(m), low.open, false); err != nil || len(found) != 1 {
				t.Errorf("%s header, %d bytes: found %v, %v", name, size, found, err)
			}
		}
	}
}

// TestRefusedTruncation: a truncation that the upper file refuses half-way leaves neither the new length with old bytes
// behind it, nor a header that says more than was done.
func TestRefusedTruncation(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		for _, to := range []int64{0, 10_000} {
			for _, committed := range []bool{false, true} {
				refusedTruncation(t, o, to, committed, 0)
				for nth := range 4 {
					refusedTruncation(t, o, to, committed, nth+1)
				}
			}
		}
	})
}

// refusedTruncation refuses the truncations of the upper file, or the nth change of its attributes.
func refusedTruncation(t *testing.T, o Options, to int64, committed bool, nth int) {
	low := &memLower{data: testContent(64 << 10), mtime: 5}
	e := newEngine(t, o)
	store := newCrashStore(nil)
	f := store.sketch(t, e, low)
	want := bytes.Clone(low.data)
	p := bytes.Repeat([]byte{'x'}, 20_000)
	if _, err := f.WriteAt(p, 4096); err != nil {
		t.Fatal(err)
	}
	copy(want[4096:], p)
	if committed {
		if err := f.Sync(false); err != nil {
			t.Fatal(err)
		}
	}
	store.mu.Lock()
	attrs := 0
	store.fail = func(op string, n int) (int, error) {
		if op == "header" {
			attrs++
		}
		if nth == 0 && (op == "truncate" || op == "fallocate") || nth > 0 && op == "header" && attrs == nth {
			return 0, unix.EIO
		}
		return n, nil
	}
	store.mu.Unlock()
	if err := f.Truncate(to); nth == 0 && !errors.Is(err, unix.EIO) || err == nil && f.Size() != to {
		t.Errorf("truncate to %d, committed %v, attribute %d refused: %v, %d bytes left", to, committed, nth, err, f.Size())
	}
	store.mu.Lock()
	store.fail = nil
	store.mu.Unlock()
	want = want[:f.Size()]
	expectContent(t, f, want)
	// Whoever has synced it is safe, whatever is left to be done.
	if _, err := f.WriteAt([]byte("synced"), 0); err != nil {
		t.Fatal(err)
	}
	want = append([]byte("synced"), want[min(6, len(want)):]...)
	if err := f.Sync(false); err != nil {
		t.Fatal(err)
	}
	after, err := e.Open(newCrashStore(store.power()), low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, after, want)
	if err := after.Close(); err != nil {
		t.Error(err)
	}
	want = append(want, make([]byte, 30_000)...)
	if _, err := f.WriteAt([]byte("end"), int64(len(want))); err != nil {
		t.Fatal(err)
	}
	want = append(want, "end"...)
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f, err = e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, newCrashStore(store.live), low.open)
}

// TestRefusedTableMove: a table that was moved half-way leaves nothing that a later, longer file shows.
func TestRefusedTableMove(t *testing.T) {
	low := &memLower{data: testContent(64 << 10), mtime: 5}
	e := newEngine(t, Options{CaW: CaWLazy})
	store := newCrashStore(nil)
	f := store.sketch(t, e, low)
	if _, err := f.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(false); err != nil {
		t.Fatal(err)
	}
	store.fail = func(op string, n int) (int, error) {
		if op == "header" {
			return 0, unix.ENOSPC
		}
		return n, nil
	}
	far := f.bound + 4096
	if n, err := f.WriteAt([]byte("refused"), far); n != 0 || !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("write that moves the table: %d, %v", n, err)
	}
	store.fail = nil
	want := append(bytes.Clone(low.data), make([]byte, 3*far-int64(len(low.data)))...)
	want[0] = 'x'
	if _, err := f.WriteAt([]byte("end"), 3*far); err != nil {
		t.Fatal(err)
	}
	want = append(want, "end"...)
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, newCrashStore(store.live), low.open)
}

// TestRefusedWriteMovesNoEnd: a write behind the end that the upper file refuses leaves the length alone.
func TestRefusedWriteMovesNoEnd(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		low := &memLower{data: testContent(10_000), mtime: 5}
		e := newEngine(t, o)
		store := newCrashStore(nil)
		f := store.sketch(t, e, low)
		store.fail = func(string, int) (int, error) { return 0, unix.ENOSPC }
		if n, err := f.WriteAt([]byte("refused"), 50_000); n != 0 || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("write: %d, %v", n, err)
		}
		store.fail = nil
		expectContent(t, f, low.data)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestLongestFile: near the filesystem's longest file the table makes do with less room.
func TestLongestFile(t *testing.T) {
	low := &memLower{data: testContent(16 << 20), mtime: 5}
	e := newEngine(t, Options{CaW: CaWLazy})
	store := newCrashStore(nil)
	store.most = 16<<20 + 1200<<10
	f := store.sketch(t, e, low)
	if _, err := f.WriteAt(make([]byte, 4096), 4096); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(low.data)
	clear(want[4096:8192])
	f, err := e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// halfStore runs out of space half-way through a preallocation, and keeps what it has, as ext4 does.
type halfStore struct{ Store }

func (s halfStore) Fallocate(mode uint32, off, n int64) error {
	return errors.Join(s.Store.Fallocate(mode, off, n/2), unix.ENOSPC)
}

// TestHalfAllocation: the length that a failed preallocation leaves is the same before and after the file is closed.
func TestHalfAllocation(t *testing.T) {
	low := &memLower{data: testContent(10_000), mtime: 5}
	e := newEngine(t, Options{})
	store := newCrashStore(nil)
	if err := e.Create(store, low.ident()); err != nil {
		t.Fatal(err)
	}
	f, err := e.Open(halfStore{store}, low.open)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Fallocate(0, 0, 40_000); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("fallocate: %v", err)
	}
	size := f.Size()
	want := append(bytes.Clone(low.data), make([]byte, size-10_000)...)
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = e.Open(store, low.open); err != nil {
		t.Fatal(err)
	}
	expectContent(t, f, want)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
