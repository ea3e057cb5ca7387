// Package survive kills the servers of mounts with survive=on, again and again, under programs that use the mounts. None of
// them may see an error, or anything else than on a mount whose server lives.
package survive

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/tests/layers"
	"lamina/tests/mnt"
)

var (
	deathsFlag = flag.Int("survive.deaths", 10, "how many servers die in each test")
	seedFlag   = flag.Uint64("survive.seed", 1, "seed of the programs' operations")
)

func TestMain(m *testing.M) { mnt.Main(m) }

const every = 150 * time.Millisecond

// start mounts a lower layer.
func start(t *testing.T, lower string, options ...string) *mnt.T {
	t.Helper()
	return mnt.New(t, []string{lower}, append(options, "transport=dev", "survive=on")...)
}

// worker is a program that works until it is told to stop, and says what it met.
type worker interface {
	step() error
	// check compares all it knows with what is there.
	check(dir string) error
}

// work runs workers until enough servers have died, and looks at what is there then, and again after another mount.
func work(t *testing.T, m *mnt.T, workers ...worker) {
	t.Helper()
	killer := m.KillEvery(every)
	var wg sync.WaitGroup
	steps := make([]int, len(workers))
	for i, w := range workers {
		wg.Go(func() {
			for ; killer.Deaths() < *deathsFlag || steps[i] < 100; steps[i]++ {
				if err := w.step(); err != nil {
					t.Errorf("worker %d, step %d, after %d deaths: %v", i, steps[i], killer.Deaths(), err)
					return
				}
			}
		})
	}
	wg.Wait()
	for i, w := range workers {
		if err := w.check(m.Dir); err != nil && !t.Failed() {
			t.Errorf("worker %d: %v", i, err)
		}
	}
	killer.Stop()
	t.Logf("%d deaths, steps %v", killer.Deaths(), steps)
	if t.Failed() {
		return
	}
	m.Remount()
	for i, w := range workers {
		if err := w.check(m.Dir); err != nil {
			t.Errorf("worker %d, after another mount: %v", i, err)
		}
	}
}

// eventually waits for what must come about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(mnt.Timeout); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain: %s", what)
}

// writer changes one file at random and knows what must be in it.
type writer struct {
	name string
	fd   int
	rnd  *rand.Rand
	want []byte
}

const fileSize = 3<<20 + 1234

func newWriter(t *testing.T, dir, name string, seed uint64, want []byte) *writer {
	t.Helper()
	w := &writer{name: name, rnd: rand.New(rand.NewPCG(*seedFlag, seed)), want: bytes.Clone(want)}
	var err error
	if w.fd, err = unix.Open(filepath.Join(dir, name), unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.close)
	return w
}

func (w *writer) close() {
	if w.fd >= 0 {
		unix.Close(w.fd)
		w.fd = -1
	}
}

func (w *writer) step() error {
	off := w.rnd.IntN(fileSize)
	n := 1 + w.rnd.IntN([]int{20, 5000, 70000}[w.rnd.IntN(3)])
	switch w.rnd.IntN(20) {
	default:
		p := layers.Bytes(w.rnd.Uint64(), int64(n))
		if m, err := unix.Pwrite(w.fd, p, int64(off)); err != nil || m != n {
			return fmt.Errorf("write of %d at %d: %d, %w", n, off, m, err)
		}
		w.grow(off + n)
		copy(w.want[off:], p)
	case 10, 11, 12, 13, 14:
		got := make([]byte, n)
		m, err := unix.Pread(w.fd, got, int64(off))
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		return same(fmt.Sprintf("read of %d at %d", n, off), got[:m], w.want[min(off, len(w.want)):min(off+n, len(w.want))])
	case 15, 16:
		if err := unix.Fsync(w.fd); err != nil {
			return fmt.Errorf("fsync: %w", err)
		}
	case 17:
		if err := unix.Ftruncate(w.fd, int64(off)); err != nil {
			return fmt.Errorf("truncate: %w", err)
		}
		w.grow(off)
		w.want = w.want[:off:off]
	case 18:
		if err := unix.Fallocate(w.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n)); err != nil {
			return fmt.Errorf("punch: %w", err)
		}
		if off < len(w.want) {
			clear(w.want[off:min(off+n, len(w.want))])
		}
	case 19:
		var st unix.Stat_t
		if err := unix.Fstat(w.fd, &st); err != nil || st.Size != int64(len(w.want)) {
			return fmt.Errorf("fstat: size %d, want %d: %w", st.Size, len(w.want), err)
		}
	}
	return nil
}

func (w *writer) grow(n int) {
	if n > len(w.want) {
		w.want = append(w.want, make([]byte, n-len(w.want))...)
	}
}

func (w *writer) check(dir string) error {
	w.close()
	got, err := os.ReadFile(filepath.Join(dir, w.name))
	if err != nil {
		return err
	}
	return same(w.name, got, w.want)
}

func same(what string, got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Errorf("%s: %d bytes, want %d; byte %d is %#x, want %#x", what, len(got), len(want), i, got[i], want[i])
		}
	}
	return fmt.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
}

// TestBytes has programs write, read, cut and sync files of a lower layer, one of them so small that it is copied whole, and
// a file that is passed through.
func TestBytes(t *testing.T) {
	lower := mnt.Dirs(t, "lower")[0]
	contents := layers.Bytes(3, fileSize)
	small := contents[:9000]
	for name, b := range map[string][]byte{"a": contents, "b": contents, "small": small} {
		if err := os.WriteFile(filepath.Join(lower, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, options := range [][]string{{"format=sparse", "caw=eager"}, {"format=sparse", "caw=lazy"}, {"format=bcow", "caw=eager"}, {"format=bcow-single", "caw=lazy"}} {
		t.Run(options[0]+"-"+options[1], func(t *testing.T) {
			m := start(t, lower, options...)
			if err := os.WriteFile(m.Path("new"), small, 0o644); err != nil {
				t.Fatal(err)
			}
			work(t, m, newWriter(t, m.Dir, "a", 1, contents), newWriter(t, m.Dir, "b", 2, contents),
				newWriter(t, m.Dir, "small", 3, small), newWriter(t, m.Dir, "new", 4, small))
		})
	}
}

// namer makes, moves and removes names in a directory of its own, and knows what every call must say.
type namer struct {
	dir   string // below the mount
	mount string
	rnd   *rand.Rand
	files map[string]string // contents; "/" for a directory, "@" and a target for a symbolic link
	n     int
}

func newNamer(mount, dir string, seed uint64, files map[string]string) *namer {
	w := &namer{dir: dir, mount: mount, rnd: rand.New(rand.NewPCG(*seedFlag, seed)), files: map[string]string{}}
	for k, v := range files {
		w.files[k] = v
	}
	return w
}

func (w *namer) path(name string) string { return filepath.Join(w.mount, w.dir, name) }

func (w *namer) step() error {
	w.n++
	name, other := fmt.Sprint("n", w.rnd.IntN(12)), fmt.Sprint("n", w.rnd.IntN(12))
	have, exists := w.files[name]
	text := fmt.Sprintf("%s %d", w.dir, w.n)
	switch w.rnd.IntN(9) {
	case 0: // make a file, which must not be there
		fd, err := unix.Open(w.path(name), unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o640)
		if err := expect("create", name, err, exists, unix.EEXIST); err != nil || exists {
			return err
		}
		_, err = unix.Write(fd, []byte(text))
		err = errors.Join(err, unix.Close(fd))
		w.files[name] = text
		return err
	case 1: // write a file that may be there
		if have == "/" || exists && have[0] == '@' {
			return nil
		}
		w.files[name] = text
		return os.WriteFile(w.path(name), []byte(text), 0o640)
	case 2:
		err := unix.Mkdir(w.path(name), 0o750)
		if !exists {
			w.files[name] = "/"
		}
		return expect("mkdir", name, err, exists, unix.EEXIST)
	case 3:
		err := unix.Symlink(text, w.path(name))
		if !exists {
			w.files[name] = "@" + text
		}
		return expect("symlink", name, err, exists, unix.EEXIST)
	case 4:
		if have == "/" {
			delete(w.files, name)
			return expect("rmdir", name, unix.Rmdir(w.path(name)), false, nil)
		}
		delete(w.files, name)
		return expect("unlink", name, unix.Unlink(w.path(name)), !exists, unix.ENOENT)
	case 5:
		if name == other || have == "/" || w.files[other] == "/" {
			return nil
		}
		if exists {
			w.files[other] = have
			delete(w.files, name)
		}
		return expect("rename to "+other, name, unix.Rename(w.path(name), w.path(other)), !exists, unix.ENOENT)
	case 6:
		if !exists || have == "/" || have[0] == '@' {
			return nil
		}
		_, there := w.files[other]
		err := unix.Link(w.path(name), w.path(other))
		if !there {
			// From here on they are one file; a copy keeps the two apart in what this program knows.
			w.files[other] = have
			if err := errors.Join(err, os.WriteFile(w.path(other)+".new", []byte(have), 0o640)); err != nil {
				return err
			}
			return expect("rename over a link", other, unix.Rename(w.path(other)+".new", w.path(other)), false, nil)
		}
		return expect("link to "+other, name, err, true, unix.EEXIST)
	case 7:
		if !exists || have != "/" && have[0] == '@' {
			return nil
		}
		for range 2 {
			_ = unix.Removexattr(w.path(name), "user.x")
			if err := unix.Setxattr(w.path(name), "user.x", []byte(text), unix.XATTR_CREATE); err != nil {
				return fmt.Errorf("setxattr of %s: %w", name, err)
			}
			if err := unix.Removexattr(w.path(name), "user.x"); err != nil {
				return fmt.Errorf("removexattr of %s: %w", name, err)
			}
		}
		return nil
	}
	return w.look(w.mount, name)
}

// expect says what was wrong with a call that should have failed in one way, or not at all.
func expect(call, name string, err error, fails bool, errno error) error {
	if !fails && err != nil || fails && !errors.Is(err, errno) {
		want := any(nil)
		if fails {
			want = errno
		}
		return fmt.Errorf("%s %s: %v, want %v", call, name, err, want)
	}
	return nil
}

func (w *namer) look(mount, name string) error {
	path := filepath.Join(mount, w.dir, name)
	want, exists := w.files[name]
	st, err := os.Lstat(path)
	switch {
	case !exists:
		if !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s is there: %v", name, err)
		}
		return nil
	case err != nil:
		return err
	case st.IsDir() != (want == "/"):
		return fmt.Errorf("%s: mode %v, want %q", name, st.Mode(), want)
	case st.IsDir():
		return nil
	case want[0] == '@':
		target, err := os.Readlink(path)
		if err != nil || "@"+target != want {
			return fmt.Errorf("%s leads to %q, want %q: %v", name, target, want, err)
		}
		return nil
	}
	got, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return same(name, got, []byte(want))
}

func (w *namer) check(mount string) error {
	entries, err := os.ReadDir(filepath.Join(mount, w.dir))
	if err != nil {
		return err
	}
	if len(entries) != len(w.files) {
		return fmt.Errorf("%s holds %d names, want %d", w.dir, len(entries), len(w.files))
	}
	for name := range w.files {
		if err := w.look(mount, name); err != nil {
			return err
		}
	}
	return nil
}

// TestNames has programs make, move and remove names: every call says what it says on a mount whose server lives.
func TestNames(t *testing.T) {
	lower := mnt.Dirs(t, "lower")[0]
	files := map[string]string{}
	if err := os.MkdirAll(filepath.Join(lower, "old"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 6 {
		name := fmt.Sprint("n", i)
		files[name] = "from below " + name
		if err := os.WriteFile(filepath.Join(lower, "old", name), []byte(files[name]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m := start(t, lower)
	for _, d := range []string{"one", "two"} {
		if err := os.Mkdir(m.Path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	work(t, m, newNamer(m.Dir, "old", 1, files), newNamer(m.Dir, "one", 2, nil), newNamer(m.Dir, "two", 3, nil))
}
