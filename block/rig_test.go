package block

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	seedFlag = flag.Uint64("block.seed", 1, "seed of the random tests; 0: a new one, which is printed")
	opsFlag  = flag.Int("block.ops", 200, "operations in each random test")
)

const (
	testHeader = "trusted.overlay.metacopy"
	testOrigin = "trusted.overlay.lamina.origin"
)

// seed returns the seed of a random test, and prints it if the test fails.
func seed(t testing.TB) uint64 {
	s := *seedFlag
	if s == 0 {
		s = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("repeat with -block.seed=%d -block.ops=%d", s, *opsFlag)
		}
	})
	return s
}

// TestMain fails the run if a test left a descriptor or a goroutine behind.
func TestMain(m *testing.M) {
	flag.Parse()
	before := descriptors()
	code := m.Run()
	if fuzzing := flag.Lookup("test.fuzz"); code == 0 && fuzzing.Value.String() == "" { // the fuzzer leaves a signal handler
		code = leaked(before)
	}
	os.Exit(code)
}

func leaked(before int) int {
	deadline := time.Now().Add(30 * time.Second)
	for runtime.NumGoroutine() > 1 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > 1 {
		buf := make([]byte, 1<<20)
		fmt.Printf("leaked goroutines: %d\n%s\n", n, buf[:runtime.Stack(buf, true)])
		return 1
	}
	if after := descriptors(); after > before {
		fmt.Printf("leaked descriptors: %d before, %d after\n", before, after)
		return 1
	}
	return 0
}

func descriptors() int {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	n := 0
	for _, e := range list {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && filepath.IsAbs(to) && to != "/dev/null" {
			n++
		}
	}
	return n
}

// fdLower is a lower file of the real filesystem.
type fdLower struct {
	*fdStore
	fs uint64
}

func (l fdLower) FS() uint64 { return l.fs }

func (l fdLower) SeekData(off int64) (start, end int64, err error) {
	if start, err = l.Seek(off, unix.SEEK_DATA); err != nil {
		return 0, 0, err
	}
	end, err = l.Seek(start, unix.SEEK_HOLE)
	return start, end, err
}

const testFS = 0x1234567812345678

func openLower(path string) func() (Lower, error) {
	return func() (Lower, error) {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		return fdLower{OpenStore(fd, "", "").(*fdStore), testFS}, nil
	}
}

func openUpper(t testing.TB, path string) Store {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	return OpenStore(fd, testHeader, testOrigin)
}

// identOf is the identity that a union would record.
func identOf(t testing.TB, lower func() (Lower, error)) Ident {
	t.Helper()
	l, err := lower()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	st, err := l.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Ident{Size: st.Size, MtimeNS: st.Mtim.Nano(), FS: testFS, Ino: st.Ino}
}

// newEngine is an engine that ends with the test; closing it must succeed.
func newEngine(t testing.TB, o Options) *Engine {
	t.Helper()
	if o.Logf == nil {
		o.Logf = func(format string, args ...any) { t.Logf(format, args...) }
	}
	e := NewEngine(o)
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("closing the engine: %v", err)
		}
	})
	return e
}

// rig is one sketch on the real filesystem.
type rig struct {
	t     testing.TB
	e     *Engine
	path  string // upper file
	low   string // lower file
	lower func() (Lower, error)
	f     *File
	wrap  func(Store) Store // around the upper file; nil: nothing
}

// newRig makes a sketch of a lower file with the given content, and opens it.
func newRig(t testing.TB, o Options, content []byte) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{t: t, path: dir + "/upper", low: dir + "/lower"}
	if err := os.WriteFile(r.low, content, 0o644); err != nil {
		t.Fatal(err)
	}
	r.lower = openLower(r.low)
	r.init(o)
	return r
}

// init makes the sketch of r.lower, once that is set.
func (r *rig) init(o Options) {
	r.t.Helper()
	r.e = newEngine(r.t, o)
	s := openUpper(r.t, r.path)
	if err := r.e.Create(s, identOf(r.t, r.lower)); err != nil {
		r.t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.reopen()
	r.t.Cleanup(func() {
		if err := r.f.Close(); err != nil && !r.t.Failed() {
			r.t.Errorf("closing: %v", err)
		}
		r.clean()
	})
}

// clean fails the test unless Check finds nothing.
func (r *rig) clean() {
	r.t.Helper()
	checkClean(r.t, openUpper(r.t, r.path), r.lower)
}

func checkClean(t testing.TB, s Store, lower func() (Lower, error)) {
	t.Helper()
	found, err := Check(s, lower, false)
	if err != nil {
		t.Errorf("check: %v", err)
	}
	for _, x := range found {
		t.Errorf("check: block %d: %s", x.Block, x.What)
	}
}

// reopen closes the file, if it is open, and opens it again.
func (r *rig) reopen() {
	r.t.Helper()
	if r.f != nil {
		if err := r.f.Close(); err != nil {
			r.t.Fatal(err)
		}
	}
	s := openUpper(r.t, r.path)
	if r.wrap != nil {
		s = r.wrap(s)
	}
	f, err := r.e.Open(s, r.lower)
	if err != nil {
		r.t.Fatal(err)
	}
	r.f = f
}

func (r *rig) write(p []byte, off int64) {
	r.t.Helper()
	if n, err := r.f.WriteAt(p, off); err != nil || n != len(p) {
		r.t.Fatalf("write of %d at %d: %d, %v", len(p), off, n, err)
	}
}

// expect fails the test unless the file holds want, all of it.
func (r *rig) expect(want []byte) {
	r.t.Helper()
	expectContent(r.t, r.f, want)
}

func expectContent(t testing.TB, f io.ReaderAt, want []byte) {
	t.Helper()
	got := make([]byte, len(want)+1)
	n, err := f.ReadAt(got, 0)
	if err != io.EOF || n != len(want) {
		t.Fatalf("read %d bytes, %v; want %d and EOF", n, err, len(want))
	}
	if bytes.Equal(got[:n], want) {
		return
	}
	if i := firstDifference(got[:n], want); i >= 0 {
		t.Fatalf("byte %d (block %d): %#x, want %#x", i, i/4096, got[i], want[i])
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	if len(a) != len(b) {
		return min(len(a), len(b))
	}
	return -1
}

// noise is n random bytes, none of them zero, so that zeros in the wrong place show.
func noise(r *rand.Rand, n int) []byte {
	p := make([]byte, n+8)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64()|0x0101010101010101)
	}
	return p[:n:n]
}

// everyFormat runs a test on every format and caw mode.
func everyFormat(t *testing.T, test func(t *testing.T, o Options)) {
	for name, format := range map[string]Format{"sparse": Sparse, "bcow": BCoW, "single": BCoWSingle} {
		for cname, caw := range map[string]CaW{"eager": CaWEager, "lazy": CaWLazy, "sync": CaWSync} {
			t.Run(name+"/"+cname, func(t *testing.T) { test(t, Options{Format: format, CaW: caw}) })
		}
	}
}
