package soak

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"lamina/tests/layers"
)

const (
	ownFiles    = 3         // lower files that a worker writes to
	ownSize     = 150_000   // bytes of each
	sharedFiles = 8         // lower files that everybody reads
	sharedSize  = 1_500_000 // bytes of each
	maxFiles    = 14        // of a worker
	maxSize     = 300_000   // bytes of a file
	directories = 4         // of a worker, and its top
)

func ownContents(worker uint64, i int) []byte { return layers.Bytes(worker*100+uint64(i), ownSize) }
func sharedContents(i int) []byte             { return layers.Bytes(uint64(1_000_000+i), sharedSize) }

// file is what a worker knows of one of its files.
type file struct {
	data   []byte
	synced bool // data is what the last fsync that returned has seen
	// also is where the file may be instead: a rename was under way when the server died.
	also string
	// doubtful: the file may be there or not, because it was being made or removed when the server died.
	doubtful bool
}

// worker is one process of the load. It keeps a model of its own directory and obeys its parent's commands, a line each:
//
//	load     works until it is told to stop; says "done: N operations"
//	stop     ends the load in order
//	die      the server is about to be killed: the next error ends the load
//	verify   compares the mount with the model; says "done: N files"
//
// What is wrong it says in a line that begins with "error".
type worker struct {
	*rand.Rand
	dir, shared string
	top         string // of the mount
	files       map[string]*file
	dirs        map[string]bool
	names       int
	ops         int
	stop, dying atomic.Bool
	// under is what an operation is changing now, to be doubted if the server dies in it.
	under []*file
}

func newWorker(top string, id, seed uint64) *worker {
	w := &worker{Rand: rand.New(rand.NewPCG(seed, id)), top: top, dir: filepath.Join(top, fmt.Sprintf("w%d", id)),
		shared: filepath.Join(top, "shared"), files: map[string]*file{}, dirs: map[string]bool{".": true}}
	for i := range ownFiles {
		w.files[fmt.Sprintf("lower%d", i)] = &file{data: ownContents(id, i), synced: true}
	}
	return w
}

// obey reads commands until there are no more.
func (w *worker) obey(commands io.Reader, answers io.Writer) {
	debug.SetPanicOnFault(true)
	next := make(chan string)
	go func() {
		defer close(next)
		for lines := bufio.NewScanner(commands); lines.Scan(); {
			switch line := lines.Text(); line {
			case "stop":
				w.stop.Store(true)
			case "die":
				w.dying.Store(true)
			default:
				if line == "load" { // before the next command is read, which may end it
					w.stop.Store(false)
					w.dying.Store(false)
				}
				next <- line
			}
		}
		w.stop.Store(true)
	}()
	for command := range next {
		var err error
		var said string
		switch command {
		case "load":
			w.ops = 0
			err = w.load()
			said = fmt.Sprintf("done: %d operations", w.ops)
		case "verify":
			err = w.verify()
			said = fmt.Sprintf("done: %d files", len(w.files))
		default:
			err = fmt.Errorf("no command %q", command)
		}
		if err != nil {
			said = "error: " + strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		fmt.Fprintln(answers, said)
	}
}

// load works until it is told to stop, or its server dies as announced.
func (w *worker) load() error {
	for !w.stop.Load() {
		w.under = nil
		op, err := w.step()
		w.ops++
		if err == nil {
			continue
		}
		if w.dying.Load() {
			for _, f := range w.under {
				f.synced = false
			}
			return nil
		}
		return fmt.Errorf("operation %d, %s: %w", w.ops, op, err)
	}
	return nil
}

// step does one thing.
func (w *worker) step() (string, error) {
	type kind struct {
		name   string
		weight int
		run    func() error
	}
	kinds := []kind{
		{"create", 8, w.create}, {"write", 30, w.write}, {"read", 20, w.read}, {"read a shared file", 15, w.readShared},
		{"rename", 6, w.rename}, {"unlink", 5, w.unlink}, {"map", 8, w.mapped}, {"fsync", 8, w.fsync},
		{"truncate", 6, w.truncate}, {"mkdir", 3, w.mkdir}, {"rmdir", 2, w.rmdir}, {"list", 3, w.list},
	}
	n := w.IntN(114)
	for _, k := range kinds {
		if n -= k.weight; n < 0 {
			return k.name, k.run()
		}
	}
	panic("the weights do not add up")
}

func (w *worker) path(name string) string { return filepath.Join(w.dir, name) }

func (w *worker) newName() string {
	dirs := sortedKeys(w.dirs)
	w.names++
	return filepath.Join(dirs[w.IntN(len(dirs))], fmt.Sprintf("n%d", w.names))
}

// any chooses a file. There always is one.
func (w *worker) any() (string, *file) {
	names := sortedKeys(w.files)
	n := names[w.IntN(len(names))]
	return n, w.files[n]
}

func sortedKeys[T any](m map[string]T) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (w *worker) bytes(n int) []byte { return layers.Bytes(w.Uint64(), int64(n)) }

func (w *worker) create() error {
	if len(w.files) >= maxFiles {
		return w.unlink()
	}
	name, f := w.newName(), &file{data: w.bytes(w.IntN(maxSize / 4)), doubtful: true}
	w.files[name], w.under = f, []*file{f}
	fd, err := unix.Open(w.path(name), unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	f.doubtful = false
	err = writeAll(fd, f.data, 0)
	return errors.Join(err, unix.Close(fd))
}

// with opens a file that is about to be changed.
func (w *worker) with(name string, f *file, change func(fd int) error) error {
	w.under = append(w.under, f)
	fd, err := unix.Open(w.path(name), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(change(fd), unix.Close(fd))
}

func (w *worker) write() error {
	name, f := w.any()
	off := w.IntN(min(len(f.data)+1, maxSize-70_000))
	b := w.bytes(1 + w.IntN([]int{100, 5000, 70_000}[w.IntN(3)]))
	return w.with(name, f, func(fd int) error {
		f.synced = false
		err := writeAll(fd, b, int64(off))
		f.put(b, off)
		return err
	})
}

func (f *file) put(b []byte, off int) {
	if n := off + len(b); n > len(f.data) {
		f.data = append(f.data, make([]byte, n-len(f.data))...)
	}
	copy(f.data[off:], b)
}

func writeAll(fd int, b []byte, off int64) error {
	n, err := unix.Pwrite(fd, b, off)
	if err == nil && n != len(b) {
		err = fmt.Errorf("wrote %d of %d bytes", n, len(b))
	}
	return err
}

func (w *worker) read() error {
	name, f := w.any()
	return compare(w.path(name), f.data, w.IntN(len(f.data)+1), 1+w.IntN(100_000))
}

func (w *worker) readShared() error {
	i := w.IntN(sharedFiles)
	return compare(filepath.Join(w.shared, fmt.Sprint(i)), sharedContents(i), w.IntN(sharedSize), 1+w.IntN(300_000))
}

// compare reads [off, off+n) of a file whose contents are known.
func compare(path string, want []byte, off, n int) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, n)
	got, err := unix.Pread(fd, buf, int64(off))
	if err != nil {
		return fmt.Errorf("%s: reading %d bytes at %d: %w", path, n, off, err)
	}
	return same(path, buf[:got], want[off:min(len(want), off+n)], off)
}

func same(path string, got, want []byte, off int) error {
	if bytes.Equal(got, want) {
		return nil
	}
	i := 0
	for i < len(got) && i < len(want) && got[i] == want[i] {
		i++
	}
	return fmt.Errorf("%s: %d bytes at %d, want %d, and they differ from byte %d on", path, len(got), off, len(want), off+i)
}

func (w *worker) rename() error {
	from, f := w.any()
	to := w.newName()
	var over *file
	if w.IntN(3) == 0 {
		to, over = w.any()
	}
	if to == from {
		return nil
	}
	if over != nil && over != f {
		over.doubtful = true
	}
	f.also = to
	if err := unix.Rename(w.path(from), w.path(to)); err != nil {
		return err
	}
	f.also = ""
	delete(w.files, from)
	w.files[to] = f
	return nil
}

func (w *worker) unlink() error {
	name, f := w.any()
	if len(w.files) < 3 {
		return nil
	}
	f.doubtful = true
	if err := unix.Unlink(w.path(name)); err != nil {
		return err
	}
	delete(w.files, name)
	return nil
}

// mapped writes through a shared mapping.
func (w *worker) mapped() (err error) {
	name, f := w.any()
	if len(f.data) == 0 {
		return nil
	}
	return w.with(name, f, func(fd int) (err error) {
		f.synced = false
		m, err := unix.Mmap(fd, 0, len(f.data), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("a fault in a mapping: %v", r)
			}
			err = errors.Join(err, unix.Munmap(m))
		}()
		if err := same(name+", mapped", m, f.data, 0); err != nil {
			return err
		}
		off := w.IntN(len(f.data))
		b := w.bytes(1 + w.IntN(min(9000, len(f.data)-off)))
		copy(m[off:], b)
		f.put(b, off)
		return unix.Msync(m, unix.MS_SYNC)
	})
}

func (w *worker) fsync() error {
	name, f := w.any()
	fd, err := unix.Open(w.path(name), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Fsync(fd); err != nil {
		unix.Close(fd)
		return err
	}
	f.synced = true
	return unix.Close(fd)
}

func (w *worker) truncate() error {
	name, f := w.any()
	to := w.IntN(len(f.data) + 5000)
	return w.with(name, f, func(fd int) error {
		f.synced = false
		if err := unix.Ftruncate(fd, int64(to)); err != nil {
			return err
		}
		f.put(nil, max(to, len(f.data)))
		f.data = f.data[:to]
		return nil
	})
}

func (w *worker) mkdir() error {
	if len(w.dirs) > directories {
		return nil
	}
	w.names++
	name := fmt.Sprintf("d%d", w.names)
	w.dirs[name] = true
	return unix.Mkdir(w.path(name), 0o755)
}

func (w *worker) rmdir() error {
	for _, d := range sortedKeys(w.dirs) {
		used := d == "."
		for name := range w.files {
			used = used || filepath.Dir(name) == d
		}
		if !used {
			delete(w.dirs, d)
			return unix.Rmdir(w.path(d))
		}
	}
	return nil
}

// list compares one directory's names.
func (w *worker) list() error {
	dirs := sortedKeys(w.dirs)
	d := dirs[w.IntN(len(dirs))]
	entries, err := os.ReadDir(w.path(d))
	if err != nil {
		return err
	}
	var got, want []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	for name := range w.files {
		if filepath.Dir(name) == d {
			want = append(want, filepath.Base(name))
		}
	}
	if d == "." {
		for name := range w.dirs {
			if name != "." {
				want = append(want, name)
			}
		}
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fmt.Errorf("%s holds %q, want %q", d, got, want)
	}
	return nil
}

// verify compares everything with the model. After the server was killed, files that were not synced since their last
// change may hold something else, though they must be readable; the model then takes over what they hold. A server that
// ended in order has lost nothing.
func (w *worker) verify() error {
	killed := w.dying.Load()
	found := map[string][]byte{}
	dirs := map[string]bool{".": true}
	err := filepath.WalkDir(w.dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == w.dir {
			return err
		}
		name := strings.TrimPrefix(p, w.dir+"/")
		if e.IsDir() {
			dirs[name] = true
			return nil
		}
		found[name], err = os.ReadFile(p)
		return err
	})
	if err != nil {
		return err
	}
	var wrong error
	model := map[string]*file{}
	for _, name := range sortedKeys(w.files) {
		f := w.files[name]
		at := name
		if _, ok := found[name]; !ok && killed && f.also != "" {
			at = f.also
		}
		data, ok := found[at]
		switch {
		case !ok && killed && f.doubtful:
			continue
		case !ok:
			wrong = errors.Join(wrong, fmt.Errorf("%s is gone", name))
			continue
		case !killed || f.synced && !f.doubtful:
			wrong = errors.Join(wrong, same(at, data, f.data, 0))
		}
		model[at] = &file{data: data, synced: f.synced && bytes.Equal(data, f.data)}
	}
	for name := range found {
		if model[name] == nil {
			wrong = errors.Join(wrong, fmt.Errorf("%s should not be there", name))
		}
	}
	if !killed {
		for d := range w.dirs {
			if !dirs[d] {
				wrong = errors.Join(wrong, fmt.Errorf("directory %s is gone", d))
			}
		}
	}
	w.files, w.dirs = model, dirs
	for i := range sharedFiles {
		wrong = errors.Join(wrong, compare(filepath.Join(w.shared, fmt.Sprint(i)), sharedContents(i), 0, sharedSize+1))
	}
	return wrong
}
