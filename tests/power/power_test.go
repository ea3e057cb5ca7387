// Package power cuts the power of a real filesystem under a real mount, and looks at what is left.
//
// The filesystem of the upper layer lies on a disk whose every write and flush is recorded (disk). A cut at any point is
// the state at the last flush before it, and of what was written after that some 4 KiB units and others not. The kernel
// mounts that, Lamina mounts what lies there, and every file has to hold what was synced, and otherwise old or new blocks.
package power

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/hostfs"
	"lamina/tests/history"
	"lamina/tests/layers"
	"lamina/tests/mnt"
	"lamina/tests/probe"
)

var (
	seedFlag = flag.Uint64("power.seed", 0, "seed; 0 takes one from the clock")
	cutsFlag = flag.Int("power.cuts", 6, "power cuts for every filesystem; twice as many where one sync does")
	loadFlag = flag.Duration("power.load", time.Second, "how long files are written on every filesystem")
)

const block = 4096

func TestMain(m *testing.M) { mnt.Main(m) }

func TestPowerCut(t *testing.T) {
	if mnt.Subject() != rival.Lamina {
		t.Fatalf("%s keeps no rules of Lamina's", mnt.Subject())
	}
	seed := mnt.Seed(t, "power.seed", *seedFlag)
	for i, c := range []struct {
		name, fstype, mount string
		mib                 int64
		mkfs, options       []string
		times               int
	}{
		{"ext4", "ext4", "data=ordered", 128, []string{"mkfs.ext4", "-q", "-b", "4096"}, nil, 2},
		{"ext4 of two syncs", "ext4", "data=writeback", 128, []string{"mkfs.ext4", "-q", "-b", "4096"}, nil, 1},
		{"ext4 lazy", "ext4", "data=ordered", 128, []string{"mkfs.ext4", "-q", "-b", "4096", "-O", "^metadata_csum"}, []string{"caw=lazy", "copyup=block"}, 2},
		{"ext4 bcow", "ext4", "data=ordered", 128, []string{"mkfs.ext4", "-q", "-b", "4096"}, []string{"format=bcow"}, 1},
		{"xfs", "xfs", "", 300, []string{"mkfs.xfs", "-q"}, nil, 1},
		{"btrfs", "btrfs", "", 256, []string{"mkfs.btrfs", "-q"}, nil, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			probe.Filesystem(c.fstype, [2]int{2, 6}).Need(t)
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			d := &disk{slow: rand.New(rand.NewPCG(seed, 100+uint64(i)))}
			image := filepath.Join(mnt.Dirs(t, "image")[0], "disk")
			if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, c.mib<<20)); err != nil {
				t.Fatal(err)
			}
			mkfs := hostfs.Mkfs(append(c.mkfs, image)...)
			run(t, mkfs[0], mkfs[1:]...)
			if err := d.load(image); err != nil {
				t.Fatal(err)
			}
			lower := mnt.Dirs(t, "lower")[0]
			var all []*file
			for k, size := range []int64{40_000, 70_000, 300_000, 500_000, 40 * block, 1<<20 + 77} {
				all = append(all, newFile(t, lower, fmt.Sprint("file", k), size, r.Uint64()))
			}
			from, to := 0, 0
			ok := t.Run("load", func(t *testing.T) {
				at := d.attach(t, c.fstype, c.mount)
				m := unionOn(t, at, lower, c.options)
				run(t, "sync", "-f", at)
				from = d.position()
				load(t, d, m, at, all)
				to = d.position()
			})
			if !ok || to == from {
				t.Fatalf("%d events", to-from)
			}
			t.Logf("%d writes and flushes, %d of them flushes", to-from, d.flushes(from, to))
			for n := range *cutsFlag * c.times {
				p := from + r.IntN(to-from+1)
				if n%2 == 0 { // where the cache has just been emptied shows best what was not in it yet
					p = d.flushed(p)
				}
				if !t.Run(fmt.Sprint("cut", n), func(t *testing.T) { cut(t, d, p, r, c.fstype, c.mount, lower, c.options, all) }) {
					return
				}
			}
		})
	}
}

// unionOn mounts Lamina with its upper layer on the filesystem at.
func unionOn(t *testing.T, at, lower string, options []string) *mnt.T {
	t.Helper()
	up, work := filepath.Join(at, "up"), filepath.Join(at, "work")
	for _, d := range []string{up, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Upper: up, Work: work, Options: options})
}

// cut cuts the power after the first p events and judges what is left.
func cut(t *testing.T, d *disk, p int, r *rand.Rand, fstype, options, lower string, own []string, all []*file) {
	m := unionOn(t, d.cut(p, r).attach(t, fstype, options), lower, own)
	synced := 0
	for _, f := range all {
		n, err := f.verify(m.Dir, p)
		if err != nil {
			t.Errorf("power cut after event %d: %s: %v", p, f.name, err)
		}
		synced += n
	}
	t.Logf("after event %d, with %d syncs that had returned", p, synced)
}

// load writes to all files until it is time.
func load(t *testing.T, d *disk, m *mnt.T, at string, all []*file) {
	end := time.Now().Add(*loadFlag)
	var wg sync.WaitGroup
	for _, f := range all {
		wg.Go(func() {
			if err := f.run(m.Dir, d.position, end); err != nil {
				t.Errorf("%s: %v", f.name, err)
			}
		})
	}
	// Others have the filesystem commit at any time.
	wg.Go(func() {
		for i := 0; time.Now().Before(end); i++ {
			err := os.WriteFile(filepath.Join(at, "other"), fmt.Append(nil, i), 0o600)
			if f, oerr := os.Open(filepath.Join(at, "other")); oerr == nil {
				err = errors.Join(err, f.Sync(), f.Close())
			}
			if err != nil {
				t.Error(err)
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	wg.Wait()
	for _, f := range all {
		if len(f.syncs) == 0 && !t.Failed() {
			t.Errorf("%s was never synced", f.name)
		}
	}
}

// file is one file of the lower layer, what was done to it, and files that were made beside it.
type file struct {
	name  string
	lower []byte
	rand  *rand.Rand
	size  int64
	ops   []op
	syncs []synced
	made  []made
}

// op is a write, or a truncation: data nil.
type op struct {
	began     int // the disk's position
	off, size int64
	data      []byte
}

// synced is a sync of the first ops operations that had returned at position at.
type synced struct{ ops, at int }

// made is a file whose sync had returned at position at.
type made struct {
	name string
	data []byte
	at   int
}

func newFile(t *testing.T, dir, name string, size int64, seed uint64) *file {
	f := &file{name: name, lower: layers.Bytes(seed, size), rand: rand.New(rand.NewPCG(seed, 1)), size: size}
	clear(f.lower[size/2 : size/2+block+100]) // a hole now and then
	if err := os.WriteFile(filepath.Join(dir, name), f.lower, 0o644); err != nil {
		t.Fatal(err)
	}
	return f
}

// run does random things until the end.
func (f *file) run(dir string, position func() int, end time.Time) error {
	path := filepath.Join(dir, f.name)
	h, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { h.Close() }()
	for time.Now().Before(end) || len(f.syncs) == 0 {
		switch k := f.rand.IntN(100); {
		case k < 3:
			size := f.size - f.rand.Int64N(min(f.size, 3*block)+1)
			if k == 0 {
				size = f.size + f.rand.Int64N(3*block)
			}
			f.ops = append(f.ops, op{began: position(), size: size})
			f.size, err = size, h.Truncate(size)
		case k < 65:
			off, n := f.rand.Int64N(f.size+1), 1+f.rand.Int64N([]int64{200, 6000}[k%2])
			if k < 20 {
				off, n = off/block*block, block*(1+f.rand.Int64N(3))
			}
			o := op{began: position(), off: off, data: layers.Bytes(f.rand.Uint64(), n)}
			f.ops, f.size = append(f.ops, o), max(f.size, off+n)
			_, err = h.WriteAt(o.data, off)
		case k < 92:
			ops := len(f.ops)
			if k < 75 {
				err = unix.Fdatasync(int(h.Fd()))
			} else {
				err = h.Sync()
			}
			f.syncs = append(f.syncs, synced{ops, position()})
		case k < 95:
			if err = h.Close(); err == nil {
				h, err = os.OpenFile(path, os.O_RDWR, 0)
			}
		case k < 97:
			err = f.make(path, position)
		default:
			time.Sleep(time.Duration(f.rand.IntN(20)) * time.Millisecond)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// make makes a new file and syncs it.
func (f *file) make(path string, position func() int) error {
	m := made{name: fmt.Sprintf("%s.new%d", f.name, len(f.made)), data: layers.Bytes(f.rand.Uint64(), f.rand.Int64N(20_000))}
	h, err := os.Create(strings.TrimSuffix(path, f.name) + m.name)
	if err != nil {
		return err
	}
	_, err = h.Write(m.data)
	if err := errors.Join(err, h.Sync(), h.Close()); err != nil {
		return err
	}
	m.at = position()
	f.made = append(f.made, m)
	return nil
}

// verify judges the file after a power cut at position p, and says how many syncs had returned.
func (f *file) verify(dir string, p int) (returned int, err error) {
	durable := 0
	for _, s := range f.syncs {
		if s.at <= p {
			durable = s.ops
			returned++
		}
	}
	v := bytes.Clone(f.lower)
	h := history.New(v, block)
	for _, o := range f.ops[:durable] {
		h.Change(o.span(v))
		v = o.apply(v, true)
		h.Limit = min(h.Limit, int64(len(v)))
	}
	h.Versions[0] = v
	h.Sync()
	for _, o := range f.ops[durable:] {
		if o.began > p {
			break
		}
		off, end := o.span(h.Now())
		h.Add(o.apply(h.Now(), false), off, end)
	}
	got, err := os.ReadFile(filepath.Join(dir, f.name))
	if err == nil {
		err = h.Explain(got)
	}
	for _, m := range f.made {
		if m.at > p {
			break
		}
		returned++
		got, rerr := os.ReadFile(filepath.Join(dir, m.name))
		if rerr != nil || !bytes.Equal(got, m.data) {
			err = errors.Join(err, fmt.Errorf("%s, which was synced: %d bytes of %d, %v", m.name, len(got), len(m.data), rerr))
		}
	}
	return returned, err
}

// span is what o changes of v, bytes.
func (o op) span(v []byte) (off, end int64) {
	if o.data == nil {
		return min(int64(len(v)), o.size), max(int64(len(v)), o.size)
	}
	return o.off, o.off + int64(len(o.data))
}

// apply is what o makes of v, which it may change where that is asked for.
func (o op) apply(v []byte, change bool) []byte {
	if !change {
		v = bytes.Clone(v)
	}
	_, end := o.span(v)
	if n := int(end) - len(v); n > 0 {
		v = append(v, make([]byte, n)...)
	}
	if o.data == nil {
		return v[:o.size:o.size]
	}
	copy(v[o.off:], o.data)
	return v
}
