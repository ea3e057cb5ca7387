package block

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sparseLower makes r's lower file size bytes long without writing them all.
func sparseRig(t testing.TB, o Options, size int64) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{t: t, path: dir + "/upper", low: dir + "/lower"}
	if err := os.WriteFile(r.low, []byte("head"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(r.low, size); err != nil {
		t.Fatal(err)
	}
	r.lower = openLower(r.low)
	r.init(o)
	return r
}

func (r *rig) allocated() int64 {
	r.t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(r.path, &st); err != nil {
		r.t.Fatal(err)
	}
	return st.Blocks * 512
}

// logSpace prints what docs/format.md quotes.
func (r *rig) logSpace(written string) {
	r.t.Helper()
	h, err := r.f.s.Header()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Logf("%s written: %d bytes allocated, header of %d bytes", written, r.allocated(), len(h))
}

// TestSpace: what writing to a 1 GiB file costs in the upper layer, table and filesystem overhead included.
func TestSpace(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		t.Run(name, func(t *testing.T) {
			r := sparseRig(t, Options{Format: format, CaW: CaWLazy}, 1<<30)
			r.logSpace("nothing")
			if n := r.allocated(); n != 0 {
				t.Errorf("an empty sketch allocates %d bytes", n)
			}
			r.write([]byte{'x'}, 777_777_777)
			if err := r.f.Sync(false); err != nil {
				t.Fatal(err)
			}
			r.logSpace("1 byte")
			if n := r.allocated(); n > 64<<10 {
				t.Errorf("1 byte written, %d bytes allocated", n)
			}
			if format == BCoWSingle {
				return // its blocks are of 16 KiB here
			}
			rnd := rand.New(rand.NewPCG(seed(t), 1))
			p := noise(rnd, 4096)
			for i := range 1000 {
				r.write(p, int64(rnd.IntN(1<<18))*4096)
				if i%300 == 0 { // both slots of the table pages get used
					if err := r.f.Sync(false); err != nil {
						t.Fatal(err)
					}
				}
			}
			r.reopen() // which also gives back what a filesystem had reserved behind the end for writes to come
			r.logSpace("1000 random blocks")
			if n := r.allocated(); n > 4_500_000 {
				t.Errorf("1000 random blocks written, %d bytes allocated", n)
			}
		})
	}
}

// TestSteadyWritesAllocateNothing: neither an overwrite of Upper blocks nor a read of any block makes garbage.
func TestSteadyWritesAllocateNothing(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Options{Format: format, CaW: CaWLazy}, testContent(256<<10))
			p := testContent(8192)
			r.write(p, 16384)
			if n := testing.AllocsPerRun(100, func() { r.f.WriteAt(p, 16384) }); n != 0 {
				t.Errorf("overwrite of Upper blocks: %v allocations", n)
			}
			if n := testing.AllocsPerRun(100, func() { r.f.WriteAt(p[:410], 16500) }); n != 0 {
				t.Errorf("partial overwrite of an Upper block: %v allocations", n)
			}
			if n := testing.AllocsPerRun(100, func() { r.f.ReadAt(p, 20000) }); n != 0 {
				t.Errorf("read across the states: %v allocations", n)
			}
			off := int64(32768)
			if n := testing.AllocsPerRun(20, func() { r.f.WriteAt(p, off); off += 8192 }); n != 0 {
				t.Errorf("full blocks that were Lower: %v allocations", n)
			}
		})
	}
}

// TestCompletionInPlace: the last Lower block written turns the sketch into an ordinary file, holes staying holes.
func TestCompletionInPlace(t *testing.T) {
	want := testContent(300_000)
	r := newRig(t, Options{}, want)
	r.write([]byte("partial"), 5000)
	copy(want[5000:], "partial")
	if err := r.f.Sync(false); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.f.Plain(); ok {
		t.Error("a sketch is called plain")
	}
	r.write(want, 0)
	if err := r.f.Sync(false); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.f.Plain(); !ok || r.f.Sketch() {
		t.Error("not complete after everything was written")
	}
	got, err := os.ReadFile(r.path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the upper file is not the ordinary file: %v", err)
	}
	s := openUpper(t, r.path)
	defer s.Close()
	if h, err := s.Header(); h != nil || err != nil {
		t.Errorf("header %x, %v", h, err)
	}
	b := make([]byte, 64)
	n, err := unix.Getxattr(r.path, testOrigin, b)
	if err != nil {
		t.Fatal(err)
	}
	if fs, ino, err := ParseOrigin(b[:n]); err != nil || fs != testFS || ino != identOf(t, r.lower).Ino {
		t.Errorf("origin %x %d, %v", fs, ino, err)
	}
}

func TestCompleteKeepsHoles(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		t.Run(name, func(t *testing.T) {
			r := sparseRig(t, Options{Format: format}, 8<<20)
			r.write([]byte("middle"), 4<<20)
			if err := r.f.Complete(); err != nil {
				t.Fatal(err)
			}
			if n := r.allocated(); n > 64<<10 {
				t.Errorf("%d bytes allocated for two blocks of data", n)
			}
			want := make([]byte, 8<<20)
			copy(want, "head")
			copy(want[4<<20:], "middle")
			r.expect(want)
			if err := os.Remove(r.low); err != nil { // no longer needed
				t.Fatal(err)
			}
			r.reopen()
			r.expect(want)
		})
	}
}

// TestTruncateToNothing makes an ordinary file without ever opening the lower one.
func TestTruncateToNothing(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		r := newRig(t, o, testContent(100_000))
		if err := os.Remove(r.low); err != nil {
			t.Fatal(err)
		}
		r.write(testContent(8192), 0)
		if err := r.f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if _, plain := r.f.Plain(); !plain || !r.f.Provisional() {
			t.Errorf("ordinary: %v, until a power cut: %v", plain, r.f.Provisional())
		}
		r.write([]byte("anew"), 0)
		if err := r.f.Sync(true); err != nil || r.f.Sketch() {
			t.Errorf("an empty file is a sketch still after a sync: %v", err)
		}
		r.expect([]byte("anew"))
	})
}

// TestMoveTable: appending past the table moves it, and its old place reads as zeros.
func TestMoveTable(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		t.Run(name, func(t *testing.T) {
			want := testContent(100_000)
			r := newRig(t, Options{Format: format, CaW: CaWLazy}, want)
			r.write([]byte("x"), 50)
			want[50] = 'x'
			if err := r.f.Sync(false); err != nil {
				t.Fatal(err)
			}
			before := r.f.hdr.TablePos
			end := r.f.bound + 1_500_000
			r.write([]byte("far away"), end)
			if err := r.f.Sync(false); err != nil {
				t.Fatal(err)
			}
			if r.f.hdr.TablePos == before {
				t.Error("the table did not move")
			}
			r.reopen()
			if got := r.f.Size(); got != end+8 {
				t.Errorf("size %d, want %d", got, end+8)
			}
			b := make([]byte, 1<<20)
			for off := int64(len(want)); off < end; off += int64(len(b)) {
				if off > 8<<20 && off < end-8<<20 {
					off = end - 8<<20 // in between lies nothing, ever
				}
				b = b[:min(int64(len(b)), end-off)]
				if _, err := r.f.ReadAt(b, off); err != nil || !allZero(b) {
					t.Fatalf("bytes behind %d are not zeros (%v)", off, err)
				}
			}
			got := make([]byte, len(want))
			if _, err := r.f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the head differs (%v)", err)
			}
		})
	}
}

func TestFallocateErrnos(t *testing.T) {
	const collapse, insert = unix.FALLOC_FL_COLLAPSE_RANGE, unix.FALLOC_FL_INSERT_RANGE
	for _, c := range []struct {
		mode   uint32
		off, n int64
	}{
		{0, -1, 5}, {0, 0, 0}, {unix.FALLOC_FL_PUNCH_HOLE, 0, 4096}, {collapse | keepSize, 0, 4096}, {collapse, 1, 4096},
		{collapse, 0, 100}, {collapse, 0, 1 << 20}, {insert, 1 << 20, 4096}, {insert, 5, 4096}, {1 << 20, 0, 4096},
		{0, 1 << 62, 1 << 62}, {unix.FALLOC_FL_UNSHARE_RANGE, 0, 4096},
		{collapse, 4096, 8192}, {insert, 4096, 8192},
	} {
		want := testContent(100_000)
		r := newRig(t, Options{}, want)
		ref, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ref.Write(want); err != nil {
			t.Fatal(err)
		}
		wantErr := unix.Fallocate(int(ref.Fd()), c.mode, c.off, c.n)
		if err := r.f.Fallocate(c.mode, c.off, c.n); !errors.Is(err, wantErr) {
			t.Errorf("fallocate(%#x, %d, %d): %v, the filesystem says %v", c.mode, c.off, c.n, err, wantErr)
		}
		if want, err = os.ReadFile(ref.Name()); err != nil {
			t.Fatal(err)
		}
		r.expect(want)
		ref.Close()
	}
}

// TestKernelMetacopy: a file that kernel overlayfs copied up without data is a sketch without blocks, and becomes one of
// ours when it is written to.
func TestKernelMetacopy(t *testing.T) {
	for name, value := range map[string][]byte{"empty": {}, "version 0": {0, 4, 0, 0}} {
		t.Run(name, func(t *testing.T) {
			want := testContent(100_000)
			dir := t.TempDir()
			r := &rig{t: t, path: dir + "/upper", low: dir + "/lower", lower: openLower(dir + "/lower"), e: newEngine(t, Options{})}
			if err := errors.Join(os.WriteFile(r.low, want, 0o644), os.WriteFile(r.path, nil, 0o644),
				os.Truncate(r.path, int64(len(want))), unix.Setxattr(r.path, testHeader, value, 0)); err != nil {
				t.Fatal(err)
			}
			l, err := OpenReadOnly(openUpper(t, r.path), r.lower)
			if err != nil {
				t.Fatal(err)
			}
			expectContent(t, l, want)
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			r.reopen()
			r.expect(want)
			r.write([]byte("ours now"), 5000)
			copy(want[5000:], "ours now")
			r.reopen()
			r.expect(want)
			if r.f.hdr.Kernel || r.f.hdr.Ident.Size != int64(len(want)) {
				t.Errorf("header %+v", r.f.hdr)
			}
			if err := r.f.Close(); err != nil {
				t.Error(err)
			}
			r.clean()
		})
	}
}

// TestCopyFrom copies between files in every combination of sketch and ordinary file.
func TestCopyFrom(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		src, dst := testContent(300_000), testContent(200_000)
		a, b := newRig(t, o, src), newRig(t, o, dst)
		for range 2 {
			n, err := b.f.CopyFrom(1000, a.f, 250_001, 100_000)
			if n != 49_999 || err != nil {
				t.Fatalf("copied %d, %v", n, err)
			}
			copy(dst[1000:], src[250_001:])
			b.expect(dst)
			if _, err := b.f.CopyFrom(0, b.f, 10, 100); !errors.Is(err, unix.EINVAL) {
				t.Errorf("overlapping ranges of one file: %v", err)
			}
			b.reopen()
			if err := a.f.Complete(); err != nil { // next time from an ordinary file
				t.Fatal(err)
			}
		}
		b.expect(dst)
	})
}

// TestSettle: done is called once the table is on disk, also when the file is closed and opened again meanwhile, and
// when the engine ends first.
func TestSettle(t *testing.T) {
	want := testContent(100_000)
	r := newRig(t, Options{SettleDelay: time.Millisecond}, want)
	r.write([]byte("partial"), 10)
	copy(want[10:], "partial")
	done := make(chan *File)
	r.f.Settle(func(f *File) { done <- f })
	if f := <-done; f != r.f {
		t.Error("another file was settled")
	}
	h, err := r.f.s.Header()
	if err != nil {
		t.Fatal(err)
	}
	if hdr, err := ParseHeader(h); err != nil || hdr.TablePages == 0 {
		t.Errorf("settled, but header %+v, %v", hdr, err)
	}
	slow := newRig(t, Options{SettleDelay: time.Hour}, want)
	called := 0
	slow.f.Settle(func(*File) { called += 100 })
	slow.f.Settle(func(*File) { called++ })
	if err := slow.e.Close(); err != nil {
		t.Error(err)
	}
	if called != 1 {
		t.Errorf("done was called %d times (the first one counts 100)", called)
	}
}

// TestFillIdle: a settled file that lacks little is completed.
func TestFillIdle(t *testing.T) {
	want := testContent(256 << 10)
	r := newRig(t, Options{Fill: FillIdle, SettleDelay: time.Millisecond}, want)
	r.write(want[:250<<10], 0)
	done := make(chan struct{})
	r.f.Settle(func(*File) { close(done) })
	<-done
	if r.f.Sketch() {
		t.Error("a sketch still")
	}
	r.expect(want)
}

func TestStat(t *testing.T) {
	r := newRig(t, Options{}, testContent(100_000))
	st, err := r.f.Stat()
	if err != nil || st.Size != 100_000 || st.Blocks == 0 {
		t.Errorf("size %d, %d blocks, %v", st.Size, st.Blocks, err)
	}
	r.write([]byte("x"), 500)
	if err := r.f.Sync(false); err != nil {
		t.Fatal(err)
	}
	if st, err = r.f.Stat(); err != nil || st.Size != 100_000 {
		t.Errorf("with a table behind the data: size %d, %v", st.Size, err)
	}
	s := r.e.Stats()
	if s.Sketches != 1 || s.Upper != 1 || s.Lower != 24 || s.BytesNotCopied < 90_000 || s.BytesCopied == 0 {
		t.Errorf("stats %+v", s)
	}
}

// TestDamage: damage to the table concerns its own blocks, is found, and can be repaired.
func TestDamage(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		t.Run(name, func(t *testing.T) {
			want := testContent(64 << 10)
			low := &memLower{data: want, mtime: 5}
			e := newEngine(t, Options{Format: format, Logf: func(string, ...any) {}})
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
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			h, err := ParseHeader(store.live.header)
			if err != nil {
				t.Fatal(err)
			}
			pos := h.TablePos
			store.live.write([]byte("rust"), pos+100)
			store.live.write([]byte("rust"), pos+pageSize+100)
			f, err = e.Open(store, low.open)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 4096)
			if _, err := f.ReadAt(b, 0); !errors.Is(err, ErrDamaged) || !errors.Is(err, unix.EIO) {
				t.Errorf("read: %v", err)
			}
			if _, err := f.WriteAt(b, 0); !errors.Is(err, ErrDamaged) {
				t.Errorf("write: %v", err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			found, err := Check(store, low.open, true)
			if err != nil || len(found) != 1 || !found[0].Repaired {
				t.Errorf("check: %v, %v", found, err)
			}
			checkClean(t, store, low.open)
			f, err = e.Open(store, low.open)
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

// TestCheckWithoutLower: without a lower file, Check looks at everything but that.
func TestCheckWithoutLower(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		r := newRig(t, o, testContent(100_000))
		r.write([]byte("partial"), 5000)
		if err := r.f.Sync(false); err != nil {
			t.Fatal(err)
		}
		for _, repair := range []bool{false, true} {
			if found, err := Check(openUpper(t, r.path), nil, repair); len(found) != 0 || err != nil {
				t.Errorf("repair %v: found %v, %v", repair, found, err)
			}
		}
		gone := func() (Lower, error) { return nil, unix.ENOENT }
		if found, err := Check(openUpper(t, r.path), gone, false); len(found) != 1 || found[0].Block != -1 || err != nil {
			t.Errorf("a lower file that is gone: found %v, %v", found, err)
		}
	})
}

// TestRepairFinishes: what a power cut interrupted between two steps of a completion or a truncation is finished by
// Check with repair, and left alone without.
func TestRepairFinishes(t *testing.T) {
	for name, h := range map[string]Header{
		"completion": {Format: Sparse, BlockSize: 4096, Complete: true, Size: 5000},
		"truncation": {Format: Sparse, BlockSize: 4096, Ident: Ident{Size: 9000, MtimeNS: 5}, Limit: 5000, Size: 5000},
	} {
		t.Run(name, func(t *testing.T) {
			store := newCrashStore(nil)
			if err := errors.Join(store.Truncate(9000), store.SetHeader(h.encode())); err != nil {
				t.Fatal(err)
			}
			for _, repair := range []bool{false, true} {
				if found, err := Check(store, nil, repair); len(found) != 0 || err != nil {
					t.Fatalf("repair %v: %v, %v", repair, found, err)
				}
				want := map[bool]int64{false: 9000, true: 5000}[repair]
				if st, err := store.Stat(); err != nil || st.Size != want {
					t.Errorf("repair %v: the upper file has %d bytes, %v; want %d", repair, st.Size, err, want)
				}
			}
		})
	}
}
