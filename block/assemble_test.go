package block

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// On a full disk a block InTransit cannot be completed, but it can be read.
func TestReadInTransitWithoutSpace(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		o.CaW = CaWLazy
		r := rand.New(rand.NewPCG(seed(t), 1))
		low := &memLower{data: noise(r, 100_001), mtime: 5}
		store := newCrashStore(nil)
		f := store.sketch(t, newEngine(t, o), low)
		want := bytes.Clone(low.data)
		for range 60 {
			p := noise(r, 1+r.IntN(900))
			off := r.IntN(len(want))
			if off+len(p) > len(want) {
				want = append(want[:off], p...)
			} else {
				copy(want[off:], p)
			}
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		store.fail = func(op string, n int) (int, error) { return 0, unix.ENOSPC }
		_, transit, _ := f.States()
		if transit == 0 {
			t.Fatal("no block is in transit")
		}
		for range 300 {
			off := r.IntN(len(want))
			got := make([]byte, 1+r.IntN(20_000))
			n, _ := f.ReadAt(got, int64(off))
			if n != min(len(got), len(want)-off) {
				t.Fatalf("read %d of %d at %d", n, len(got), off)
			}
			if i := firstDifference(got[:n], want[off:off+n]); i >= 0 {
				t.Fatalf("byte %d differs", off+i)
			}
		}
		if _, now, _ := f.States(); now != transit {
			t.Errorf("%d blocks in transit, were %d", now, transit)
		}
		store.fail = nil
		expectContent(t, f, want)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

// What is new in a block can be read though the rest of it cannot; the rest is an error, never zeros.
func TestReadInTransitWithoutLower(t *testing.T) {
	low := &memLower{data: testContent(20_000), mtime: 5}
	f := newCrashStore(nil).sketch(t, newEngine(t, Options{CaW: CaWLazy}), low)
	defer f.Abandon()
	p := []byte("new bytes")
	if _, err := f.WriteAt(p, 5000); err != nil {
		t.Fatal(err)
	}
	low.fail = func(int64) error { return unix.EIO }
	got := make([]byte, len(p))
	if _, err := f.ReadAt(got, 5000); err != nil || !bytes.Equal(got, p) {
		t.Errorf("read %q, %v", got, err)
	}
	if n, err := f.ReadAt(make([]byte, 10), 5005); !errors.Is(err, unix.EIO) || n != 0 {
		t.Errorf("read %d bytes of what is missing: %v", n, err)
	}
}
