package block

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/tests/history"
)

// crasher runs random operations on a crashStore and, at random points between any two changes of the upper file,
// looks at what power cuts would leave.
type crasher struct {
	t     *testing.T
	rand  *rand.Rand
	cuts  *rand.Rand
	store *crashStore
	low   *memLower
	e     *Engine
	f     *File
	h     *history.History
	opts  Options
	what  string
	looks int
}

func TestCrash(t *testing.T) {
	for name, o := range map[string]Options{
		"sparse":     {Format: Sparse, CaW: CaWLazy},
		"sparse 16k": {Format: Sparse, CaW: CaWLazy, BlockSize: 16384},
		"bcow":       {Format: BCoW, CaW: CaWLazy},
		"single":     {Format: BCoWSingle, CaW: CaWLazy},
		"sync":       {Format: Sparse, CaW: CaWSync},
	} {
		for _, orders := range []bool{false, true} {
			t.Run(name+map[bool]string{true: " ordered"}[orders], func(t *testing.T) {
				t.Parallel()
				s := seed(t)
				for round := range uint64(3) {
					c := newCrasher(t, o, s+round)
					c.e.orders = orders
					if orders && round > 0 { // many blocks, and an addendum that soon has to give way to the table
						c.e.addendum = 12
						c.setLower(noise(c.rand, 400_000))
					}
					c.open()
					c.run(*opsFlag / 4)
					if t.Failed() {
						return
					}
				}
			})
		}
	}
	t.Run("whole", func(t *testing.T) {
		t.Parallel()
		s := seed(t)
		for round := range uint64(20) { // each is provisional only at its beginning
			c := newCrasher(t, Options{CaW: CaWLazy}, s+round)
			c.e.orders = round%2 == 0
			c.create()
			c.run(*opsFlag / 8)
			if t.Failed() {
				return
			}
		}
	})
}

func newCrasher(t *testing.T, o Options, s uint64) *crasher {
	c := &crasher{t: t, rand: rand.New(rand.NewPCG(s, 1)), cuts: rand.New(rand.NewPCG(s, 2)), opts: o}
	c.e = newEngine(t, o)
	c.store = newCrashStore(nil)
	c.setLower(noise(c.rand, 30000+c.rand.IntN(60000)))
	return c
}

func (c *crasher) setLower(data []byte) {
	clear(data[8192:20480]) // a hole
	c.low = &memLower{data: data, mtime: 1e18}
	c.h = history.New(data, int64(max(c.opts.BlockSize, defaultBlockSize)))
}

// open makes a sketch if there is none, and opens it.
func (c *crasher) open() {
	c.store.after = nil
	if b, _ := c.store.Header(); b == nil && c.f == nil {
		if err := c.e.Create(c.store, c.low.ident()); err != nil {
			c.t.Fatal(err)
		}
		if err := c.store.Sync(); err != nil {
			c.t.Fatal(err)
		}
	}
	f, err := c.e.Open(c.store, c.low.open)
	if err != nil {
		c.t.Fatal(err)
	}
	c.f, c.store.after = f, c.look
}

// create makes a provisional copy. A name follows its header to the disk, so the header is there before anything else.
func (c *crasher) create() {
	id := c.low.ident()
	h := Header{Format: Sparse, BlockSize: defaultBlockSize, Ident: id, Limit: id.Size, Size: id.Size}
	if err := errors.Join(c.store.SetHeader(h.encode()), c.store.Sync()); err != nil {
		c.t.Fatal(err)
	}
	c.what, c.store.after = "create", c.look
	f, err := c.e.CreateWhole(c.store, id, c.low)
	if err != nil {
		c.t.Fatal(err)
	}
	c.f = f
	c.h.Add(c.h.Now(), 0, id.Size) // the next commit makes every block the upper file's
}

func (c *crasher) run(ops int) {
	for range ops {
		if c.step(); c.t.Failed() {
			break
		}
	}
	c.store.after = nil
	if err := c.f.Close(); err != nil {
		c.t.Error(err)
	}
	if c.looks == 0 {
		c.t.Error("no power cut was looked at")
	}
}

func (c *crasher) step() {
	const longest = 1300 << 10 // now and then far enough to push the table away
	size := len(c.h.Now())
	off := c.rand.IntN(size + 1)
	n := 1 + c.rand.IntN([]int{300, 5000, 40000}[c.rand.IntN(3)])
	v := bytes.Clone(c.h.Now())
	grow := func(n int) {
		if n > len(v) {
			v = append(v, make([]byte, n-len(v))...)
		}
	}
	failing := c.rand.IntN(6) == 0
	if failing {
		c.store.fail = func(op string, n int) (int, error) {
			if op != "sync" && c.rand.IntN(3) == 0 {
				return 0, unix.ENOSPC
			}
			return n, nil
		}
	}
	before, changes := c.h.Now(), true
	var err error
	switch k := c.rand.IntN(16); k {
	case 0, 1, 2, 3, 4, 5:
		if k == 0 && c.rand.IntN(4) == 0 {
			off = min(size+c.rand.IntN(300<<10), longest)
		}
		c.what = fmt.Sprintf("write of %d at %d", n, off)
		p := noise(c.rand, n)
		grow(off + n)
		copy(v[off:], p)
		c.h.Add(v, int64(off), int64(off+n))
		_, err = c.f.WriteAt(p, int64(off))
	case 6:
		to := c.rand.IntN(size + 1)
		if c.rand.IntN(2) == 0 {
			to = min(size+c.rand.IntN(40000), longest)
		}
		c.what = fmt.Sprintf("truncate from %d to %d", size, to)
		grow(to)
		c.h.Add(v[:to:to], int64(min(size, to)), int64(max(size, to)))
		err = c.f.Truncate(int64(to))
	case 7:
		if off == size {
			return
		}
		n = min(n, size-off)
		c.what = fmt.Sprintf("punch of %d at %d", n, off)
		clear(v[off : off+n])
		c.h.Add(v, int64(off), int64(off+n))
		err = c.f.Fallocate(punch, int64(off), int64(n))
	case 8, 9, 10:
		c.what, changes = "sync", false
		if err = c.f.Sync(n%2 == 0); err == nil {
			c.h.Sync()
		}
	case 11:
		c.what, changes = "commit", false
		if err = c.f.commit(); err == nil {
			c.h.Commit()
		}
	case 12:
		c.what, changes = "close and open", false
		if err = c.f.Close(); err == nil {
			c.h.Commit()
			c.open()
		}
	case 13:
		c.what, changes = "copy", false
		err = c.f.completeAll()
	case 14:
		if c.rand.IntN(6) == 0 {
			c.what, changes = "complete", false
			if err = c.f.Complete(); err == nil {
				c.h.Add(c.h.Now(), 0, int64(size)) // every block is in the upper file now
				c.h.Commit()
			}
		}
	case 15:
		c.what = fmt.Sprintf("read of %d at %d", n, off)
		got := make([]byte, n)
		m, _ := c.f.ReadAt(got, int64(off))
		if i := firstDifference(got[:m], c.h.Now()[off:min(off+n, size)]); i >= 0 && !failing {
			c.t.Errorf("%s: differs at %d", c.what, off+i)
		}
	}
	c.store.fail = nil
	switch {
	case failing && errors.Is(err, unix.ENOSPC):
		c.refused(before, changes)
	case err != nil:
		c.t.Errorf("%s: %v", c.what, err)
	}
}

// refused: an operation was refused half-way. What the file holds now is one more version; an operation that does not
// change the content has not changed it.
func (c *crasher) refused(before []byte, changes bool) {
	c.what += ", refused"
	got := make([]byte, c.f.Size())
	if n, err := c.f.ReadAt(got, 0); n != len(got) {
		c.t.Errorf("%s: read %d of %d: %v", c.what, n, len(got), err)
	}
	if i := firstDifference(got, before); i >= 0 && !changes {
		c.t.Errorf("%s: the content changed at %d; size %d, was %d", c.what, i, len(got), len(before))
	}
	if strings.HasPrefix(c.what, "truncate") && len(got) == len(before) { // it has not begun: its length never became a limit
		c.h.Versions = c.h.Versions[:len(c.h.Versions)-1]
	}
	brought := int64(0)
	if strings.HasPrefix(c.what, "complete") { // any block may be in the upper file now
		brought = int64(len(got))
	}
	c.h.Add(got, 0, brought)
}

// look cuts the power at this point, a few times.
func (c *crasher) look() {
	if c.t.Failed() || c.cuts.IntN(3) != 0 {
		return
	}
	c.looks++
	for range 3 {
		c.lookAt(c.store.crash(c.cuts))
	}
}

// lookAt judges what one power cut left: Check is clean, the content is explainable, what grows is zeros, and the file
// works and survives the next sync.
func (c *crasher) lookAt(m *image) {
	h, _ := ParseHeader(m.header)
	fail := func(format string, args ...any) {
		c.t.Helper()
		c.t.Errorf("power cut during %s: %s\nheader %+v present=%v st_size %d", c.what, fmt.Sprintf(format, args...), h, m.header != nil, m.size)
	}
	found, err := Check(newCrashStore(m), c.low.open, false)
	if err != nil || len(found) != 0 {
		fail("check: %v %v", found, err)
		return
	}
	s := newCrashStore(m)
	// The layer may have been moved to a filesystem without the order.
	e := Engine{opts: c.e.opts, files: map[*File]struct{}{}, orders: c.e.orders && c.cuts.IntN(4) != 0,
		addendum: c.cuts.IntN(maxAddendum)}
	f, err := e.Open(s, c.low.open)
	if err != nil {
		fail("open: %v", err)
		return
	}
	got := make([]byte, f.Size())
	if n, err := f.ReadAt(got, 0); n != len(got) {
		fail("read: %d of %d, %v", n, len(got), err)
		return
	}
	if err := c.h.Explain(got); err != nil {
		fail("%v", err)
		return
	}
	more := 50_000
	if c.cuts.IntN(50) == 0 {
		more = 2500 << 10 // over whatever a move of the table left half-done
	}
	want := append(got, make([]byte, more)...)
	if err := f.Truncate(int64(len(want))); err != nil {
		fail("growing: %v", err)
	}
	p := []byte("after the power came back")
	copy(want[len(want)/2:], p)
	if _, err := f.WriteAt(p, int64(len(want)/2)); err != nil {
		fail("writing: %v", err)
	}
	if err := f.Sync(false); err != nil {
		fail("sync: %v", err)
	}
	f2, err := e.Open(newCrashStore(s.synced), c.low.open)
	if err != nil {
		fail("second open: %v", err)
		return
	}
	again := make([]byte, f2.Size())
	if _, err := f2.ReadAt(again, 0); err != nil && len(again) > 0 && len(again) != len(want) {
		fail("second read: %v", err)
	}
	if i := firstDifference(again, want); i >= 0 {
		fail("after the second sync byte %d (block %d) differs; size %d, want %d", i, i/pageSize, len(again), len(want))
	}
}

// TestLeafLostBeforeItsPage: the page that leads to a new leaf reaches the disk and the leaf does not. Its blocks are
// Lower then, and its place is given to nobody else.
func TestLeafLostBeforeItsPage(t *testing.T) {
	low := &memLower{data: testContent(64 << 10), mtime: 5}
	store := newCrashStore(nil)
	e := newEngine(t, Options{Format: BCoW, CaW: CaWLazy, Logf: func(string, ...any) {}})
	f := store.sketch(t, e, low)
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	syncs := 0
	store.onSync(func() error {
		if syncs++; syncs == 2 {
			return unix.EIO
		}
		return nil
	})
	if err := f.Sync(false); !errors.Is(err, unix.EIO) {
		t.Fatalf("sync: %v, want the power cut", err)
	}
	m := store.synced.clone()
	for _, c := range store.log {
		if c.meta != nil {
			c.meta(m)
		} else if c.off < slotsSize {
			m.write(c.sector, c.off)
		}
	}
	if err := f.Abandon(); err != nil {
		t.Error(err)
	}
	checkClean(t, newCrashStore(m), low.open)
	store = newCrashStore(m)
	f, err := e.Open(store, low.open)
	if err != nil {
		t.Fatal(err)
	}
	expectContent(t, f, low.data)
	want := testContent(40 << 10)
	if _, err := f.WriteAt(want, 8192); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, newCrashStore(store.live), low.open)
}
