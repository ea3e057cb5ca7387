// Package fsx exercises one mounted file at a time, in the manner of Apple's and the LTP's fsx: overlapping writes,
// truncations, holes, fallocate, shared mappings, several descriptors, remounts, all against a model in memory. The
// file has a lower layer's bytes below it, so that it begins as a sketch.
//
//	go test ./tests/fsx -fsx.seed=N -run TestFile/COMBINATION    replays a failure
package fsx

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

var (
	seedFlag = flag.Uint64("fsx.seed", 1, "seed; 0 takes one from the clock")
	opsFlag  = flag.Int("fsx.ops", 1000, "operations on every file")
)

const (
	lowerSize = 5<<20 + 1234 // over one region of block states
	maxSize   = 7 << 20
	page      = 4096
)

func TestMain(m *testing.M) { mnt.Main(m) }

// lowerLayer holds the files that the tests write to.
func lowerLayer(t *testing.T) (dir string, contents []byte) {
	t.Helper()
	dir = mnt.Dirs(t, "lower")[0]
	contents = layers.Bytes(7, lowerSize)
	clear(contents[1<<20 : 1<<20+300_000]) // becomes a hole
	f, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(contents)
	err = errors.Join(err, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 300_000), f.Close())
	if err != nil {
		t.Fatal(err)
	}
	return dir, contents
}

func TestFile(t *testing.T) {
	s := mnt.Seed(t, "fsx.seed", *seedFlag)
	lower, contents := lowerLayer(t)
	for i, c := range mnt.Combinations(t) {
		t.Run(c.String(), func(t *testing.T) {
			x := &exerciser{
				t: t, Rand: rand.New(rand.NewPCG(s, uint64(i))),
				m:     mnt.Start(t, rival.Config{Lowers: []string{lower}, Options: c.Options()}),
				model: model{append([]byte(nil), contents...)},
				// With passthrough=on a descriptor opened read-only before the first write keeps the old bytes, and
				// on kernel overlayfs its mappings do.
				earlyReader: c.Passthrough != "on" && mnt.Subject() == rival.Lamina,
			}
			x.run(*opsFlag)
		})
	}
}

// exerciser holds one file, its model and its descriptors.
type exerciser struct {
	t *testing.T
	*rand.Rand
	m           *mnt.T
	model       model
	earlyReader bool
	fds         []int // [0] read-only, [1] and [2] read-write, [3] O_APPEND, [4] O_DIRECT
	log         []string
}

const (
	reader = iota
	first
	second
	appender
	direct
	descriptors
)

func (x *exerciser) open() {
	x.t.Helper()
	x.fds = make([]int, descriptors)
	for i, flags := range []int{unix.O_RDONLY, unix.O_RDWR, unix.O_RDWR, unix.O_RDWR | unix.O_APPEND, unix.O_RDWR | unix.O_DIRECT} {
		fd, err := unix.Open(x.m.Path("file"), flags|unix.O_CLOEXEC, 0)
		if err != nil {
			x.t.Fatalf("open with flags %#x: %v", flags, err)
		}
		x.fds[i] = fd
	}
	if !x.earlyReader {
		x.reopenReader()
	}
}

// reopenReader opens the reader anew, after the writers.
func (x *exerciser) reopenReader() {
	unix.Close(x.fds[reader])
	fd, err := unix.Open(x.m.Path("file"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		x.t.Fatal(err)
	}
	x.fds[reader] = fd
}

func (x *exerciser) close() {
	for _, fd := range x.fds {
		unix.Close(fd)
	}
	x.fds = nil
}

func (x *exerciser) run(n int) {
	x.open()
	defer func() {
		x.close()
		if x.t.Failed() {
			x.t.Logf("the last operations:\n%s", strings.Join(x.log[max(0, len(x.log)-40):], "\n"))
		}
	}()
	for i := range n {
		if err := x.step(i); err != nil {
			x.t.Errorf("operation %d: %s: %v", i, x.log[len(x.log)-1], err)
			return
		}
	}
	for _, when := range []string{"at the end", "after remount"} {
		if err := x.check(); err != nil {
			x.t.Errorf("%s: %v", when, err)
			return
		}
		x.remount()
	}
}

func (x *exerciser) remount() {
	x.close()
	x.m.Remount()
	x.open()
}

// note records what is about to be done.
func (x *exerciser) note(format string, args ...any) {
	x.log = append(x.log, fmt.Sprintf("%5d  ", len(x.log))+fmt.Sprintf(format, args...))
}

func (x *exerciser) step(i int) error {
	off, n := x.rang()
	fd := x.fds[x.IntN(direct)]
	writer := x.fds[first+x.IntN(2)]
	switch k := x.IntN(100); {
	case k < 30:
		return x.write(writer, off, n)
	case k < 34:
		return x.append(n)
	case k < 42:
		return x.directWrite(off, n)
	case k < 64:
		return x.read(fd, off, n)
	case k < 67:
		return x.directRead(off, n)
	case k < 73:
		return x.mapWrite(writer, off, n)
	case k < 78:
		return x.mapRead(fd, off, n)
	case k < 83:
		return x.truncate(writer, off)
	case k < 90:
		return x.fallocate(writer, off, n)
	case k < 93:
		return x.copyRange(writer, off, n)
	case k < 95:
		return x.seek(writer, off)
	case k < 97:
		x.note("fsync")
		return unix.Fsync(writer)
	case k < 98:
		return x.check()
	case k < 99 && i%3 == 0:
		x.note("remount")
		x.remount()
		return nil
	}
	x.note("stat")
	return x.size(fd)
}

// rang draws a range: mostly small and unaligned, sometimes whole blocks, rarely large; mostly in one corner of the
// file, so that ranges meet.
func (x *exerciser) rang() (off, n int64) {
	switch x.IntN(10) {
	case 0:
		n = x.Int64N(300_000)
	case 1, 2:
		n = page * (1 + x.Int64N(4))
	case 3:
		n = 1
	default:
		n = x.Int64N(6000)
	}
	if x.IntN(3) == 0 {
		off = x.Int64N(maxSize - n)
	} else {
		off = 4<<20 - 40_000 + x.Int64N(80_000) // around the border of two regions
	}
	if x.IntN(3) == 0 {
		off &^= page - 1
	}
	return off, n
}

func (x *exerciser) bytes(n int64) []byte { return layers.Bytes(x.Uint64(), n) }

func (x *exerciser) write(fd int, off, n int64) error {
	x.note("write [%d, %d)", off, off+n)
	b := x.bytes(n)
	got, err := unix.Pwrite(fd, b, off)
	if err != nil || int64(got) != n {
		return fmt.Errorf("wrote %d: %w", got, err)
	}
	x.model.write(b, off)
	return nil
}

func (x *exerciser) append(n int64) error {
	if x.model.size()+n > maxSize {
		n = 0
	}
	x.note("append %d at %d", n, x.model.size())
	b := x.bytes(n)
	if got, err := unix.Write(x.fds[appender], b); err != nil || int64(got) != n {
		return fmt.Errorf("wrote %d: %w", got, err)
	}
	x.model.write(b, x.model.size())
	return nil
}

func (x *exerciser) directWrite(off, n int64) error {
	off &^= page - 1
	n = (n + page) &^ (page - 1)
	x.note("direct write [%d, %d)", off, off+n)
	b := aligned(n)
	copy(b, x.bytes(n))
	if got, err := unix.Pwrite(x.fds[direct], b, off); err != nil || int64(got) != n {
		return fmt.Errorf("wrote %d: %w", got, err)
	}
	x.model.write(b, off)
	return nil
}

func (x *exerciser) read(fd int, off, n int64) error {
	x.note("read [%d, %d)", off, off+n)
	b := make([]byte, n)
	got, err := unix.Pread(fd, b, off)
	if err != nil {
		return err
	}
	return x.model.same(b[:got], off, n)
}

func (x *exerciser) directRead(off, n int64) error {
	off &^= page - 1
	n = (n + page) &^ (page - 1)
	x.note("direct read [%d, %d)", off, off+n)
	b := aligned(n)
	got, err := unix.Pread(x.fds[direct], b, off)
	if err != nil {
		return err
	}
	return x.model.same(b[:got], off, n)
}

// aligned returns n bytes that O_DIRECT accepts.
func aligned(n int64) []byte {
	b := make([]byte, n+page)
	skip := -uintptr(unsafe.Pointer(&b[0])) & (page - 1)
	return b[skip : int64(skip)+n]
}

func (x *exerciser) mapWrite(fd int, off, n int64) error {
	n = min(n, x.model.size()-off)
	x.note("mapped write [%d, %d)", off, off+n)
	if n <= 0 {
		return nil
	}
	b := x.bytes(n)
	err := withMap(fd, off, n, unix.PROT_READ|unix.PROT_WRITE, func(m []byte) error {
		copy(m, b)
		return nil
	})
	x.model.write(b, off)
	return err
}

func (x *exerciser) mapRead(fd int, off, n int64) error {
	n = min(n, x.model.size()-off)
	x.note("mapped read [%d, %d)", off, off+n)
	if n <= 0 {
		return nil
	}
	return withMap(fd, off, n, unix.PROT_READ, func(m []byte) error { return x.model.same(m, off, n) })
}

// withMap maps [off, off+n) shared, runs f on it, and writes it back.
func withMap(fd int, off, n int64, prot int, f func([]byte) error) (err error) {
	start := off &^ (page - 1)
	m, err := unix.Mmap(fd, start, int(off+n-start), prot, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(m)) }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("fault in the mapping: %v", r)
		}
	}()
	if err := f(m[off-start:]); err != nil {
		return err
	}
	if prot&unix.PROT_WRITE != 0 {
		return unix.Msync(m, unix.MS_SYNC)
	}
	return nil
}

func (x *exerciser) truncate(fd int, to int64) error {
	if x.IntN(4) == 0 && to < 4<<20 { // rarely so far down that little remains to be tested
		to += 2 << 20
	}
	x.note("truncate %d -> %d", x.model.size(), to)
	if err := unix.Ftruncate(fd, to); err != nil {
		return err
	}
	x.model.truncate(to)
	return x.size(fd)
}

func (x *exerciser) fallocate(fd int, off, n int64) error {
	if n == 0 {
		return nil
	}
	modes := []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
		unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE}
	mode := modes[x.IntN(len(modes))]
	x.note("fallocate mode %#x [%d, %d)", mode, off, off+n)
	if err := unix.Fallocate(fd, mode, off, n); err != nil {
		return err
	}
	if mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) != 0 {
		x.model.zero(off, n)
	}
	if mode&unix.FALLOC_FL_KEEP_SIZE == 0 && off+n > x.model.size() {
		x.model.truncate(off + n)
	}
	return x.size(fd)
}

func (x *exerciser) copyRange(fd int, off, n int64) error {
	to := x.Int64N(maxSize - n)
	if to < off+n && off < to+n { // within one file the ranges must not overlap
		to = (off + n + page) % (maxSize - n)
		if to < off+n && off < to+n {
			return nil
		}
	}
	n = min(n, max(0, x.model.size()-off))
	x.note("copy [%d, %d) to %d", off, off+n, to)
	src := append([]byte(nil), x.model.read(off, n)...)
	for done := int64(0); done < n; {
		from, into := off+done, to+done
		c, err := unix.CopyFileRange(fd, &from, x.fds[first], &into, int(n-done), 0)
		if err != nil || c == 0 {
			return fmt.Errorf("copied %d of %d: %w", done, n, err)
		}
		done += int64(c)
	}
	x.model.write(src, to)
	return x.size(fd)
}

// seek checks that what SEEK_DATA skips is zero.
func (x *exerciser) seek(fd int, off int64) error {
	x.note("seek data from %d of %d", off, x.model.size())
	got, err := unix.Seek(fd, off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		got, err = max(off, x.model.size()), nil
	}
	if err != nil {
		return err
	}
	for i, b := range x.model.read(off, got-off) {
		if b != 0 {
			return fmt.Errorf("data at %d skipped", off+int64(i))
		}
	}
	return nil
}

func (x *exerciser) size(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Size != x.model.size() {
		return fmt.Errorf("size %d, want %d", st.Size, x.model.size())
	}
	return nil
}

// check compares the whole file, read through every descriptor that may read any range.
func (x *exerciser) check() error {
	x.note("check")
	b := make([]byte, x.model.size()+1)
	for fd := range direct {
		got, err := unix.Pread(x.fds[fd], b, 0)
		if err != nil {
			return err
		}
		if err := x.model.same(b[:got], 0, int64(len(b))); err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
	}
	return x.size(x.fds[first])
}

// Goroutines own interleaved slices of the same blocks, so that nearly every write meets an in-transit block that
// another one is writing to.
func TestNeighbours(t *testing.T) {
	const workers, slice = 4, 512
	s := mnt.Seed(t, "fsx.seed", *seedFlag)
	lower, contents := lowerLayer(t)
	for _, c := range mnt.Square() {
		t.Run(c.String(), func(t *testing.T) {
			m := mnt.Start(t, rival.Config{Lowers: []string{lower}, Options: c.Options()})
			want := append([]byte(nil), contents...)
			var wg sync.WaitGroup
			errs := make([]error, workers)
			for w := range workers {
				wg.Go(func() { errs[w] = neighbour(m.Path("file"), want, s, w, workers, slice) })
			}
			wg.Wait()
			if err := errors.Join(errs...); err != nil {
				t.Fatal(err)
			}
			for _, when := range []string{"mounted", "remounted"} {
				got, err := os.ReadFile(m.Path("file"))
				if err != nil {
					t.Fatal(err)
				}
				if err := (&model{want}).same(got, 0, int64(len(want))+1); err != nil {
					t.Fatalf("%s: %v", when, err)
				}
				m.Remount()
			}
		})
	}
}

// neighbour writes and reads worker w's slices through a descriptor of its own. want is shared: nobody else touches w's
// slices of it.
func neighbour(path string, want []byte, seed uint64, w, workers, slice int) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r := rand.New(rand.NewPCG(seed, uint64(1000+w)))
	stride := workers * slice
	for i := range 1500 {
		at := r.IntN(len(want)/stride/8)*stride + w*slice
		from, to := at+r.IntN(slice/2), at+slice/2+r.IntN(slice/2)
		mine := want[from:to]
		if r.IntN(3) > 0 {
			copy(mine, layers.Bytes(r.Uint64(), int64(len(mine))))
			if n, err := unix.Pwrite(fd, mine, int64(from)); err != nil || n != len(mine) {
				return fmt.Errorf("worker %d, step %d: wrote %d of %d: %w", w, i, n, len(mine), err)
			}
			continue
		}
		got := make([]byte, len(mine))
		if _, err := unix.Pread(fd, got, int64(from)); err != nil {
			return err
		}
		if string(got) != string(mine) {
			return fmt.Errorf("worker %d, step %d: [%d, %d) lost its bytes", w, i, from, to)
		}
		if i%200 == 0 {
			if err := unix.Fsync(fd); err != nil {
				return err
			}
		}
	}
	return nil
}
