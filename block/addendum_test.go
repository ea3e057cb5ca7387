package block

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRanges(t *testing.T) {
	r := rand.New(rand.NewPCG(seed(t), 3))
	for range 1000 {
		var a, b []blockRange
		want := map[int64]bool{}
		for range r.IntN(20) {
			lo := r.Int64N(300)
			x := blockRange{lo, lo + r.Int64N(10)}
			if r.IntN(2) == 0 {
				a = append(a, x)
			} else {
				b = append(b, x)
			}
			for k := x.lo; k <= x.hi; k++ {
				want[k] = true
			}
		}
		list, ok := parseRanges(encodeRanges(joinRanges(a, b)), 310)
		if !ok {
			t.Fatalf("%v and %v: not parsed", a, b)
		}
		for _, x := range list {
			for k := x.lo; k <= x.hi; k++ {
				if !want[k] {
					t.Fatalf("%v and %v became %v", a, b, list)
				}
				delete(want, k)
			}
		}
		if len(want) > 0 {
			t.Fatalf("%v and %v became %v", a, b, list)
		}
	}
	for _, bad := range []string{"\x00", "\x00\x00\x00\x00", "\x0a\x00", "\x00\x0a", "\x05\x05", "\x80\x00\x00", "\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"} {
		if list, ok := parseRanges(bad, 10); ok {
			t.Errorf("%q became %v", bad, list)
		}
	}
}

// orderedRig is a sketch on a filesystem that keeps the order.
func orderedRig(t *testing.T, size int) (s *crashStore, low *memLower, f *File) {
	low = &memLower{data: testContent(size), mtime: 5}
	s = newCrashStore(nil)
	e := newEngine(t, Options{CaW: CaWLazy})
	e.Orders()
	f = s.sketch(t, e, low)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, low, f
}

// expectAfterCut fails the test unless a power cut now leaves want.
func expectAfterCut(t *testing.T, s *crashStore, low *memLower, orders bool, want []byte) {
	t.Helper()
	checkClean(t, newCrashStore(s.power()), low.open)
	e := newEngine(t, Options{})
	e.orders = orders
	f, err := e.Open(newCrashStore(s.power()), low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, f, want)
	if err := f.Abandon(); err != nil {
		t.Error(err)
	}
}

// TestOneSync: new blocks cost one sync, and no table as long as the header can name them.
func TestOneSync(t *testing.T) {
	s, low, f := orderedRig(t, 16<<20)
	want := slices.Clone(low.data)
	moved := 0
	for i := range 400 {
		p, off := []byte("new"), int64(i*7%400)*9*4096+100
		copy(want[off:], p)
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		syncs := 0
		s.countSyncs(&syncs)
		before := f.hdr
		if err := f.Sync(i%2 == 0); err != nil {
			t.Fatal(err)
		}
		s.fail = nil
		if before.TablePages == 0 && f.hdr.TablePages != 0 {
			moved++
			syncs-- // once in a file's life
		}
		if syncs != 2 { // one is the Order
			t.Fatalf("sync %d took %d", i, syncs)
		}
		if len(f.hdr.Addendum) > maxAddendum {
			t.Fatalf("an addendum of %d bytes", len(f.hdr.Addendum))
		}
		if i%50 == 0 {
			expectAfterCut(t, s, low, i%100 == 0, want)
		}
	}
	if moved != 1 {
		t.Errorf("the table got its place %d times", moved)
	}
	expectAfterCut(t, s, low, true, want)
	expectAfterCut(t, s, low, false, want)
}

// TestStatesOfAddendum: blocks that nothing but the header names are counted, whether anybody has read them or not.
func TestStatesOfAddendum(t *testing.T) {
	s, low, f := orderedRig(t, 160<<20)
	blocks := []int64{3, 4, 5000, 40000} // in two pages of the table, and several regions
	for _, b := range blocks {
		if _, err := f.WriteAt(make([]byte, 4096), b*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(true); err != nil {
		t.Fatal(err)
	}
	if f.hdr.TablePages != 0 || f.hdr.Addendum == "" {
		t.Fatalf("%d pages, addendum of %d bytes", f.hdr.TablePages, len(f.hdr.Addendum))
	}
	again, err := newEngine(t, Options{}).Open(newCrashStore(s.power()), low.open)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Abandon()
	if lower, transit, upper := again.States(); upper != 4 || transit != 0 || lower != 160<<8-4 {
		t.Errorf("%d Lower, %d InTransit, %d Upper; want %d, 0, 4", lower, transit, upper, 160<<8-4)
	}
}

// TestManyNewBlocks: more than the header can name go into the table.
func TestManyNewBlocks(t *testing.T) {
	s, low, f := orderedRig(t, 16<<20)
	want := slices.Clone(low.data)
	for b := 0; b < 4096; b += 2 {
		copy(want[b*4096:], "new")
		if _, err := f.WriteAt([]byte("new"), int64(b)*4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(false); err != nil {
		t.Fatal(err)
	}
	if f.hdr.TablePages == 0 || f.hdr.Addendum != "" {
		t.Errorf("%d pages, addendum of %d bytes", f.hdr.TablePages, len(f.hdr.Addendum))
	}
	expectAfterCut(t, s, low, true, want)
}

// TestNoRoomForAddendum: where the filesystem has no room for a longer attribute, a sync writes the table.
func TestNoRoomForAddendum(t *testing.T) {
	s, low, f := orderedRig(t, 1<<20)
	want := slices.Clone(low.data)
	copy(want[8192:], "new")
	if _, err := f.WriteAt([]byte("new"), 8192); err != nil {
		t.Fatal(err)
	}
	headers := 0
	s.fail = func(op string, n int) (int, error) {
		if op == "header" {
			if headers++; headers == 1 {
				return 0, unix.ENOSPC
			}
		}
		return n, nil
	}
	if err := f.Sync(true); err != nil {
		t.Fatal(err)
	}
	s.fail = nil
	if f.hdr.TablePages == 0 || f.hdr.Addendum != "" {
		t.Errorf("%d pages, addendum of %d bytes", f.hdr.TablePages, len(f.hdr.Addendum))
	}
	expectAfterCut(t, s, low, true, want)
}

// TestAddendumOfDamagedPage: what the header names is not lost with the page that it would go into.
func TestAddendumOfDamagedPage(t *testing.T) {
	low := &memLower{data: testContent(1 << 20), mtime: 5}
	s := newCrashStore(nil)
	e := newEngine(t, Options{Logf: func(string, ...any) {}})
	f := s.sketch(t, e, low)
	write := func(text string, off int64) {
		t.Helper()
		if _, err := f.WriteAt([]byte(text), off); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(false); err != nil {
			t.Fatal(err)
		}
	}
	write("in the table", 0)
	pos := f.hdr.TablePos
	e.Orders()
	e.addendum = 4 // so that it is folded at once
	write("in the header", 100*4096)
	if f.hdr.Addendum == "" {
		t.Fatal("no addendum")
	}
	if err := f.Abandon(); err != nil {
		t.Fatal(err)
	}
	for slot := range int64(2) { // rotten
		if _, err := s.WriteAt([]byte("rot"), pos+slot*pageSize+700); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if f, err = e.Open(s, low.open); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(make([]byte, 10), 100*4096); !errors.Is(err, ErrDamaged) {
		t.Errorf("reading a block of a damaged page: %v", err)
	}
	if _, err := f.WriteAt([]byte("appended"), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if found, err := Check(s, low.open, true); err != nil || len(found) != 1 || !found[0].Repaired {
		t.Errorf("check: %v %v", found, err)
	}
	want := append(slices.Clone(low.data), "appended"...)
	copy(want[100*4096:], "in the header")
	if f, err = e.Open(s, low.open); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if i := firstDifference(got[4096:], want[4096:]); i >= 0 {
		t.Errorf("byte %d differs", i+4096)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
