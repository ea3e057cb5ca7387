package block

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// fsx does random operations on a sketch and on a byte slice, and compares.
type fsx struct {
	*rig
	rand *rand.Rand
	want []byte
	max  int
	// zeroRange: the filesystem knows FALLOC_FL_ZERO_RANGE; tmpfs does not.
	zeroRange bool
}

// knowsZeroRange asks the filesystem of dir.
func knowsZeroRange(t testing.TB, dir string) bool {
	s := openUpper(t, dir+"/probe")
	defer s.Close()
	return s.Fallocate(unix.FALLOC_FL_ZERO_RANGE, 0, 4096) == nil
}

func (x *fsx) pos() (off, n int) {
	off = x.rand.IntN(x.max)
	n = 1 + x.rand.IntN([]int{10, 600, 5000, 70000}[x.rand.IntN(4)])
	if x.rand.IntN(3) == 0 {
		off &^= 4095
	}
	if x.rand.IntN(3) == 0 {
		n = (n + 4095) &^ 4095
	}
	return off, min(n, x.max-off)
}

func (x *fsx) resize(n int) {
	if n > len(x.want) {
		x.want = append(x.want, make([]byte, n-len(x.want))...)
	}
	x.want = x.want[:n:n]
}

func (x *fsx) step() {
	off, n := x.pos()
	switch x.rand.IntN(20) {
	case 0, 1, 2, 3, 4, 5, 6:
		p := noise(x.rand, n)
		x.write(p, int64(off))
		x.resize(max(len(x.want), off+n))
		copy(x.want[off:], p)
	case 7, 8, 9, 10:
		x.read(off, n)
	case 11:
		x.must("truncate", x.f.Truncate(int64(off)))
		x.resize(off)
	case 12:
		x.must("sync", x.f.Sync(false))
	case 13:
		x.reopen()
	case 14:
		x.must("punch", x.f.Fallocate(punch, int64(off), int64(n)))
		if off < len(x.want) {
			clear(x.want[off:min(off+n, len(x.want))])
		}
	case 15:
		switch err := x.f.Fallocate(unix.FALLOC_FL_ZERO_RANGE, int64(off), int64(n)); {
		case err == unix.EOPNOTSUPP && !x.zeroRange:
			return
		case err != nil:
			x.t.Fatalf("zero: %v", err)
		}
		x.resize(max(len(x.want), off+n))
		clear(x.want[off : off+n])
	case 16:
		mode := uint32(x.rand.IntN(2))
		x.must("allocate", x.f.Fallocate(mode, int64(off), int64(n)))
		if mode&keepSize == 0 {
			x.resize(max(len(x.want), off+n))
		}
	case 17:
		x.seek(off)
	case 18:
		x.f.copyQueued()
	case 19:
		if x.rand.IntN(10) == 0 {
			x.must("complete", x.f.Complete())
		}
	}
	if got := x.f.Size(); got != int64(len(x.want)) {
		x.t.Fatalf("size %d, want %d", got, len(x.want))
	}
}

func (x *fsx) must(what string, err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatalf("%s: %v", what, err)
	}
}

func (x *fsx) read(off, n int) {
	x.t.Helper()
	got := make([]byte, n)
	m, _ := x.f.ReadAt(got, int64(off))
	want := x.want[min(off, len(x.want)):min(off+n, len(x.want))]
	if i := firstDifference(got[:m], want); i >= 0 {
		x.t.Fatalf("read of %d at %d: %d bytes, differs at %d", n, off, m, off+i)
	}
}

// seek checks what SEEK_DATA and SEEK_HOLE promise: what they call a hole is zeros, and they stay inside the file.
func (x *fsx) seek(off int) {
	x.t.Helper()
	data, err := x.f.Seek(int64(off), unix.SEEK_DATA)
	end := len(x.want)
	switch {
	case err == nil && (data < int64(off) || data >= int64(end)):
		x.t.Fatalf("SEEK_DATA from %d: %d in a file of %d", off, data, end)
	case err == nil:
		end = int(data)
	case !errors.Is(err, unix.ENXIO):
		x.t.Fatal(err)
	}
	if off < end && !allZero(x.want[off:end]) {
		x.t.Fatalf("SEEK_DATA from %d: %d (%v), but there is data before", off, end, err)
	}
	hole, err := x.f.Seek(int64(off), unix.SEEK_HOLE)
	if off >= len(x.want) != errors.Is(err, unix.ENXIO) || err == nil && (hole < int64(off) || hole > int64(len(x.want))) {
		x.t.Fatalf("SEEK_HOLE from %d: %d, %v", off, hole, err)
	}
}

func TestFsx(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) { runFsx(t, o, *opsFlag) })
}

func runFsx(t *testing.T, o Options, ops int) {
	s := seed(t)
	x := &fsx{rand: rand.New(rand.NewPCG(s, 1)), max: 9 << 20}
	size := x.rand.IntN(6 << 20)
	if x.rand.IntN(2) == 0 {
		x.max, size = 300<<10, x.rand.IntN(200<<10)
	}
	x.want = noise(x.rand, size)
	clear(x.want[size/3 : size/2]) // a hole, if the filesystem sees it
	x.rig = newRig(t, o, x.want)
	x.want = bytes.Clone(x.want)
	x.zeroRange = knowsZeroRange(t, t.TempDir())
	for range ops {
		x.step()
	}
	x.expect(x.want)
	x.reopen()
	x.expect(x.want)
	x.clean()
}

// TestFsxChain is TestFsx on a sketch of a sketch of a sketch.
func TestFsxChain(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		s := seed(t)
		x := &fsx{rand: rand.New(rand.NewPCG(s, 2)), max: 300 << 10}
		x.want = noise(x.rand, 200<<10)
		dir := t.TempDir()
		x.zeroRange = knowsZeroRange(t, dir)
		if err := os.WriteFile(dir+"/base", x.want, 0o644); err != nil {
			t.Fatal(err)
		}
		lower := openLower(dir + "/base")
		for _, name := range []string{"one", "two", "three"} {
			x.rig = &rig{t: t, path: dir + "/" + name, lower: lower}
			x.rig.init(o)
			for range *opsFlag / 4 {
				x.step()
			}
			x.expect(x.want)
			x.must("close", x.f.Close())
			below, path := lower, x.path
			lower = func() (Lower, error) { return OpenReadOnly(openUpper(t, path), below) }
			l, err := lower()
			x.must("open read-only", err)
			expectContent(t, l, x.want)
			x.must("close", l.Close())
			dst := openUpper(t, dir+"/flat-"+name)
			x.must("flatten", FlattenTo(dst, openUpper(t, path), below))
			expectContent(t, dst, x.want)
			x.must("close", dst.Close())
		}
		x.reopen()
	})
}

// TestFsxParallel has several goroutines write, read and punch ranges of their own, not aligned to blocks, while others
// sync, settle and complete.
func TestFsxParallel(t *testing.T) {
	everyFormat(t, func(t *testing.T, o Options) {
		s := seed(t)
		const part, workers = 100_001, 6
		content := noise(rand.New(rand.NewPCG(s, 3)), part*workers)
		r := newRig(t, o, content)
		want := bytes.Clone(content)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for w := range workers {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(s, uint64(w)))
				mine := want[w*part : (w+1)*part : (w+1)*part]
				for range *opsFlag / 2 {
					off := rnd.IntN(part)
					n := 1 + rnd.IntN(min(part-off, []int{20, 5000, 50000}[rnd.IntN(3)]))
					at := int64(w*part + off)
					var err error
					switch rnd.IntN(5) {
					case 0, 1:
						p := noise(rnd, n)
						_, err = r.f.WriteAt(p, at)
						copy(mine[off:], p)
					case 2:
						err = r.f.Fallocate(punch, at, int64(n))
						clear(mine[off : off+n])
					default:
						got := make([]byte, n)
						if _, err = r.f.ReadAt(got, at); err == nil && !bytes.Equal(got, mine[off:off+n]) {
							t.Errorf("worker %d: read of %d at %d differs at %d", w, n, at, firstDifference(got, mine[off:off+n]))
							return
						}
					}
					if err != nil {
						t.Errorf("worker %d: %v", w, err)
						return
					}
				}
			})
		}
		var side sync.WaitGroup
		side.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				var err error
				if i%3 == 2 {
					err = r.f.Complete()
				} else {
					err = r.f.Sync(false)
				}
				if err != nil {
					t.Errorf("sync: %v", err)
					return
				}
			}
		})
		wg.Wait()
		close(stop)
		side.Wait()
		r.expect(want)
		r.reopen()
		r.expect(want)
	})
}
