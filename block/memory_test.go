package block

import (
	"bytes"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/state"
)

// killed is what a call of a mortalStore panics with when the process "dies" there.
type killed struct{}

// mortalStore dies before or after a call.
type mortalStore struct {
	Store
	x *mortal
}

func (s mortalStore) call() {
	if s.x.life > 0 {
		if s.x.life--; s.x.life == 0 {
			panic(killed{})
		}
	}
}

// mortalCall is one call with a chance to die on either side of it.
func mortalCall[T any](s mortalStore, do func() (T, error)) (T, error) {
	s.call()
	v, err := do()
	s.call()
	return v, err
}

func (s mortalStore) WriteAt(p []byte, off int64) (int, error) {
	return mortalCall(s, func() (int, error) { return s.Store.WriteAt(p, off) })
}

func (s mortalStore) do(f func() error) error {
	_, err := mortalCall(s, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

func (s mortalStore) Truncate(size int64) error {
	return s.do(func() error { return s.Store.Truncate(size) })
}
func (s mortalStore) Fallocate(mode uint32, off, n int64) error {
	return s.do(func() error { return s.Store.Fallocate(mode, off, n) })
}
func (s mortalStore) Sync() error     { return s.do(noSync) }
func (s mortalStore) SyncData() error { return s.do(noSync) }
func (s mortalStore) SetHeader(b []byte) error {
	return s.do(func() error { return s.Store.SetHeader(b) })
}
func (s mortalStore) RemoveHeader() error { return s.do(s.Store.RemoveHeader) }
func (s mortalStore) Order() error        { return s.do(noSync) }
func (s mortalStore) SetOrigin(b []byte) error {
	return s.do(func() error { return s.Store.SetOrigin(b) })
}

// mortal is fsx on an engine that dies now and then in the middle of an operation, whose successor gets the same
// operation again.
type mortal struct {
	fsx
	arena  *state.Arena
	o      Options
	orders bool
	life   int // calls of the store until it dies; 0: it does not
	deaths int
}

// successor opens the memory as another process would, and the file. Nothing of the old engine touches either any more.
func (x *mortal) successor() {
	x.t.Helper()
	x.life = 0
	old, oldFile, oldArena := x.e, x.f, x.arena
	fd, err := unix.FcntlInt(oldArena.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	x.must("dup", err)
	x.arena, err = state.Open(os.NewFile(uintptr(fd), "state"))
	x.must("state", err)
	x.o.Memory = x.arena
	x.e = newEngine(x.t, x.o)
	if x.orders {
		x.e.Orders()
	}
	x.f = nil
	x.reopen()
	x.e.Resume()
	old.mu.Lock()
	delete(old.files, oldFile)
	old.mu.Unlock()
	x.must("close", old.Close())
	oldFile.lower.file.Swap(nil).close()
	_ = oldFile.s.Close() // Close may have got there itself
	x.must("close", oldArena.Close())
	x.deaths++
}

func (l *lowerFile) close() {
	if l != nil {
		l.Lower.Close()
	}
}

// stepOrDie does a step, to its end in the end.
func (x *mortal) stepOrDie(pcg *rand.PCG) {
	x.t.Helper()
	before, err := pcg.MarshalBinary()
	x.must("random numbers", err)
	want := bytes.Clone(x.want)
	for x.life = x.rand.IntN(12); ; x.life = 0 {
		x.must("random numbers", pcg.UnmarshalBinary(before))
		if x.lives() {
			return
		}
		x.successor()
		x.want = bytes.Clone(want)
	}
}

func (x *mortal) lives() (alive bool) {
	defer func() {
		x.life = 0
		if r := recover(); r != nil {
			if _, ok := r.(killed); !ok {
				panic(r)
			}
		}
	}()
	x.rand.IntN(12) // the life
	x.step()
	return true
}

// TestSuccessorGoesOn has an engine die at random calls of random operations. What it knew is in its memory alone: the
// successor must have all of it.
func TestSuccessorGoesOn(t *testing.T) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		for cname, caw := range map[string]CaW{"lazy": CaWLazy, "sync": CaWSync} {
			t.Run(name+"/"+cname, func(t *testing.T) {
				t.Parallel()
				o := Options{Format: format, CaW: caw, SettleDelay: time.Hour, CommitInterval: time.Hour}
				testMortal(t, o, false, seed(t)*100)
				if format == Sparse {
					testMortal(t, o, true, seed(t)*100+1)
				}
			})
		}
	}
}

func testMortal(t *testing.T, o Options, orders bool, s uint64) {
	arena, err := state.Create("test")
	if err != nil {
		t.Fatal(err)
	}
	o.Memory = arena
	pcg := rand.NewPCG(s, 4)
	x := &mortal{fsx: fsx{rand: rand.New(pcg), max: 6 << 20}, arena: arena, o: o, orders: orders}
	t.Cleanup(func() { x.arena.Close() })
	size := x.rand.IntN(5 << 20)
	if x.rand.IntN(2) == 0 {
		x.max, size = 300<<10, x.rand.IntN(200<<10)
	}
	x.want = noise(x.rand, size)
	x.rig = newRig(t, o, x.want)
	x.want = bytes.Clone(x.want)
	if orders {
		x.e.Orders()
	}
	x.wrap = func(s Store) Store { return mortalStore{s, x} }
	x.reopen()
	x.zeroRange = knowsZeroRange(t, t.TempDir())
	for range *opsFlag / 2 {
		x.stepOrDie(pcg)
		if x.rand.IntN(10) == 0 {
			x.successor()
		}
		if x.rand.IntN(10) == 0 {
			x.expect(x.want)
		}
	}
	x.expect(x.want)
	if x.deaths < *opsFlag/40 {
		t.Errorf("only %d deaths in %d operations", x.deaths, *opsFlag/2)
	}
	x.reopen()
	x.expect(x.want)
	x.clean()
	x.must("close", x.f.Close())
	if n := x.arena.Count(state.Sketch) + x.arena.Count(state.Chunk); n != 0 {
		t.Errorf("%d records are left of files that are closed", n)
	}
}

// noSync: what the page cache holds survives the death of a process.
func noSync() error { return nil }
