// Package crash kills a real server with SIGKILL in the middle of a load and looks at what is left.
//
// Killing the server loses what lived in its memory and nothing else: what it wrote to files survives in the kernel's
// page cache. (What a power cut loses on top of that is package block's crash test.) The rules to hold afterwards:
//
//   - fsck finds nothing;
//   - what was written before the last fsync that returned is there;
//   - every block is its state at that fsync, or a later state that was really written: never zeros, never a mixture.
//
// Run with -crash.rounds=N for more.
package crash

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

var (
	seedFlag   = flag.Uint64("crash.seed", 1, "seed; 0 takes one from the clock")
	roundsFlag = flag.Int("crash.rounds", 3, "kills for every combination of format and caw mode")
)

const (
	block   = 4096
	blocks  = 96 // a lower file
	writers = 3
)

func TestMain(m *testing.M) {
	if v, ok := os.LookupEnv(clientEnv); ok {
		number, dir, _ := strings.Cut(v, ":")
		id, _ := strconv.Atoi(number)
		runClient(dir, id)
		return
	}
	mnt.Main(m)
}

func TestKilledServer(t *testing.T) {
	if mnt.Subject() != rival.Lamina {
		t.Fatalf("%s has no server to kill", mnt.Subject())
	}
	seed := mnt.Seed(t, "crash.seed", *seedFlag)
	lower, contents := lowerLayer(t)
	n := uint64(0)
	for _, format := range []string{"sparse", "bcow", "bcow-single"} {
		for _, caw := range []string{"eager", "lazy"} {
			for round := range *roundsFlag {
				n++
				r := rand.New(rand.NewPCG(seed, n))
				t.Run(fmt.Sprintf("%s-%s/%d", format, caw, round), func(t *testing.T) {
					kill(t, r, lower, contents, []string{"format=" + format, "caw=" + caw})
				})
			}
		}
	}
}

// A server killed while it is starting must be able to die: one that opens something of its own mount waits for an
// answer that only it could give, for ever.
func TestServerKilledWhileStarting(t *testing.T) {
	lower, _ := lowerLayer(t)
	for i := range 25 {
		m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Foreground: true, Hasty: true})
		time.Sleep(time.Duration(i*100) * time.Microsecond)
		if err := m.Kill(); err != nil {
			t.Fatal(err)
		}
	}
}

func lowerLayer(t *testing.T) (string, []byte) {
	t.Helper()
	dir := mnt.Dirs(t, "lower")[0]
	contents := layers.Bytes(11, blocks*block)
	for w := range writers {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file%d", w)), contents, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir, contents
}

func kill(t *testing.T, r *rand.Rand, lower string, contents []byte, options []string) {
	m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Options: options, Foreground: true})
	var wg sync.WaitGroup
	var dying atomic.Bool
	all := make([]*writer, writers)
	for i := range all {
		all[i] = newWriter(m.Path(fmt.Sprintf("file%d", i)), r.Uint64(), contents)
		wg.Go(func() { all[i].run(&dying) })
	}
	eventually(t, "something is written", func() bool { return begun(all) })
	time.Sleep(time.Duration(50+r.IntN(450)) * time.Millisecond)
	dying.Store(true)
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	for _, w := range all {
		if w.err != nil {
			t.Errorf("before the kill: %v", w.err)
		}
	}

	m.Fsck()
	m.Again()
	writes := 0
	for _, w := range all {
		writes += w.writes
		if err := w.verify(m.Dir); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d writes before the kill", writes)

	// The mount is good for more: everything written once more in whole blocks reads back.
	again := layers.Bytes(r.Uint64(), blocks*block)
	if err := os.WriteFile(all[0].path, again, 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(all[0].path); err != nil || !bytes.Equal(got, again) {
		t.Errorf("writing after recovery: %v, equal=%t", err, bytes.Equal(got, again))
	}
}

// begun says whether a write was acknowledged, or somebody has failed.
func begun(all []*writer) bool {
	return slices.ContainsFunc(all, func(w *writer) bool { return w.begun.Load() })
}

// writer owns one lower file and makes new files beside it.
type writer struct {
	path   string
	rand   *rand.Rand
	writes int
	begun  atomic.Bool
	err    error

	// allowed[b] holds every state that block b may be in: the durable one first, then each later one. The last may be
	// half written, when the server died inside it.
	allowed [][][]byte
	// torn[b]: a write to b was under way when the server died.
	torn map[int]bool
	// created are new files whose fsync returned, with their contents.
	created map[string][]byte
}

func newWriter(path string, seed uint64, contents []byte) *writer {
	w := &writer{path: path, rand: rand.New(rand.NewPCG(seed, 1)), torn: map[int]bool{}, created: map[string][]byte{}}
	for b := range blocks {
		w.allowed = append(w.allowed, [][]byte{contents[b*block : (b+1)*block]})
	}
	return w
}

// run writes until the server dies. An error before it is told to die is the server's fault.
func (w *writer) run(dying *atomic.Bool) {
	err := w.load()
	if !dying.Load() {
		w.err = err
	}
	w.begun.Store(true)
}

func (w *writer) load() error {
	fd, err := unix.Open(w.path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { unix.Close(fd) }()
	for i := 0; ; i++ {
		switch k := w.rand.IntN(100); {
		case k < 80:
			err = w.write(fd)
		case k < 90:
			err = w.sync(fd)
		case k < 95: // closing and opening again settles the file
			unix.Close(fd)
			fd, err = unix.Open(w.path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		default:
			err = w.create(i)
		}
		if err != nil {
			return fmt.Errorf("step %d of %s: %w", i, w.path, err)
		}
	}
}

// write changes a part of one block, or a run of whole blocks.
func (w *writer) write(fd int) error {
	off, n := w.rand.IntN(blocks*block-5*block), 1+w.rand.IntN(block)
	if w.rand.IntN(3) == 0 {
		off, n = off/block*block, block*(1+w.rand.IntN(4))
	} else if off/block != (off+n-1)/block {
		n = block - off%block
	}
	data := layers.Bytes(w.rand.Uint64(), int64(n))
	for b := off / block; b <= (off+n-1)/block; b++ {
		states := w.allowed[b]
		next := bytes.Clone(states[len(states)-1])
		from := max(off, b*block)
		copy(next[from-b*block:], data[from-off:])
		w.allowed[b] = append(states, next)
		w.torn[b] = true
	}
	got, err := unix.Pwrite(fd, data, int64(off))
	if err != nil || got != n {
		return errors.Join(err, fmt.Errorf("wrote %d of %d", got, n))
	}
	clear(w.torn)
	w.writes++
	w.begun.Store(true)
	return nil
}

// sync makes the newest state of every block the only one allowed.
func (w *writer) sync(fd int) error {
	if err := unix.Fsync(fd); err != nil {
		return err
	}
	for b, states := range w.allowed {
		w.allowed[b] = states[len(states)-1:]
	}
	return nil
}

// create makes a new file, syncs it under a temporary name, and renames it into place.
func (w *writer) create(i int) error {
	name := fmt.Sprintf("%s.new%d", filepath.Base(w.path), i)
	data := layers.Bytes(w.rand.Uint64(), int64(w.rand.IntN(20_000)))
	tmp := w.path + ".tmp"
	fd, err := unix.Open(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, data)
	if err == nil {
		err = unix.Fsync(fd)
	}
	unix.Close(fd)
	if err != nil {
		return err
	}
	if err := unix.Rename(tmp, filepath.Join(filepath.Dir(w.path), name)); err != nil {
		return err
	}
	w.created[name] = data
	return nil
}

func (w *writer) verify(dir string) error {
	got, err := os.ReadFile(w.path)
	if err != nil {
		return err
	}
	if len(got) != blocks*block {
		return fmt.Errorf("%s: %d bytes, want %d", w.path, len(got), blocks*block)
	}
	var bad error
	for b, states := range w.allowed {
		if err := w.verifyBlock(b, got[b*block:(b+1)*block], states); err != nil {
			bad = errors.Join(bad, fmt.Errorf("%s: block %d: %w", w.path, b, err))
		}
	}
	for name, want := range w.created {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Equal(got, want) {
			bad = errors.Join(bad, fmt.Errorf("%s was synced, and now: %d bytes of %d, %v", name, len(got), len(want), err))
		}
	}
	return bad
}

func (w *writer) verifyBlock(b int, got []byte, states [][]byte) error {
	for _, s := range states {
		if bytes.Equal(got, s) {
			return nil
		}
	}
	if w.torn[b] && len(states) > 1 && between(got, states[len(states)-2], states[len(states)-1]) {
		return nil
	}
	what := "a mixture"
	if len(bytes.TrimLeft(got, "\x00")) == 0 {
		what = "zeros"
	}
	return fmt.Errorf("%s: none of the %d states that it was in since the last fsync", what, len(states))
}

// between says whether got is a write from before to after that was cut short: every byte is from the one or the other,
// all new ones before all old ones.
func between(got, before, after []byte) bool {
	for i := range len(got) + 1 {
		if bytes.Equal(got[:i], after[:i]) && bytes.Equal(got[i:], before[i:]) {
			return true
		}
	}
	return false
}
