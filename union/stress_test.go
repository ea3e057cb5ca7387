package union

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lamina/block"

	"golang.org/x/sys/unix"
)

// Many goroutines do everything at once to a small tree, as a kernel would: with references that they take and give
// back. Afterwards the table of nodes is sound and empties itself, no descriptor is left, fsck finds nothing, and a new
// mount shows the same tree.
func TestStress(t *testing.T) {
	for _, mode := range []CopyUp{CopyUpBlock, CopyUpFull} {
		t.Run(fmt.Sprint("copyup", mode), func(t *testing.T) { stress(t, mode) })
	}
}

func stress(t *testing.T, mode CopyUp) {
	onFilesystem(t, "tmpfs", nil)
	before := openDescriptors(t)
	s := newStack(t, 2, func(p func(int, string) string) {
		for i := range 2 {
			for _, d := range []string{"a", "b", "a/b", "b/a"} {
				must(t, os.MkdirAll(p(i, d), 0o777))
				for _, f := range []string{"a", "c", "d"} {
					if d+"/"+f != "b/a" {
						put(t, p(i, d+"/"+f+"f"), strings.Repeat(d+f, 9000))
					}
				}
			}
			must(t, os.Link(p(i, "a/af"), p(i, "b/l")))
			must(t, os.Link(p(i, "a/af"), p(i, "a/b/l")))
			must(t, os.Symlink("target", p(i, "a/s")))
		}
	})
	s.umount()
	s.change = func(c *Config) {
		c.CopyUp = mode
		c.Engine.Close()
		c.Engine = block.NewEngine(block.Options{SettleDelay: 20 * time.Millisecond, Logf: t.Logf})
	}
	s.mount()
	var wg sync.WaitGroup
	for seed := range uint64(6) {
		wg.Go(func() {
			k := &kernel{t: t, fs: s.fs, rnd: rand.New(rand.NewPCG(seed, uint64(time.Now().UnixNano()))), refs: map[*Node]uint64{}}
			for range 1500 {
				k.act()
			}
			s.fs.check(t)
			k.end()
		})
	}
	wg.Wait()
	s.fs.check(t)
	for i := 0; s.fs.Live() > 1; i++ { // the last files still settle
		if i == 12000 {
			t.Fatalf("%d nodes are live when everything is forgotten", s.fs.Live())
		}
		time.Sleep(5 * time.Millisecond)
	}
	s.fs.check(t)
	want := s.dump()
	s.remount()
	if got := s.dump(); !maps.Equal(got, want) {
		for p := range want {
			if got[p] != want[p] {
				t.Errorf("%s: %s before, %s after the remount", p, want[p], got[p])
			}
		}
		t.Errorf("the new mount shows %d names, the old one showed %d", len(got), len(want))
	}
	s.umount()
	if after := openDescriptors(t); after > before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

func openDescriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(list)
}

// kernel is one user of a union.
type kernel struct {
	t    *testing.T
	fs   *FS
	rnd  *rand.Rand
	refs map[*Node]uint64
	open []*Handle
}

func (k *kernel) name() string {
	return []string{"a", "b", "l", "s", "af", "cf", "df", "new"}[k.rnd.IntN(8)]
}

func (k *kernel) keep(n *Node, err error) {
	if err == nil {
		k.refs[n]++
	}
}

// some gives a node that the user holds.
func (k *kernel) some() *Node {
	nodes := append(slices.Collect(maps.Keys(k.refs)), k.fs.Root())
	return nodes[k.rnd.IntN(len(nodes))]
}

func (k *kernel) dir() *Node {
	for range 20 {
		if n := k.some(); isDir(n.mode) {
			return n
		}
	}
	return k.fs.Root()
}

func (k *kernel) forget(n *Node) {
	id, refs := n.ID(), k.refs[n]
	delete(k.refs, n)
	k.fs.Forget(id, refs)
}

func (k *kernel) end() {
	for _, h := range k.open {
		h.Release()
	}
	for n := range k.refs {
		k.forget(n)
	}
}

// act does one thing. What it may answer is anything but damage.
func (k *kernel) act() {
	var err error
	switch dir, n := k.dir(), k.some(); k.rnd.IntN(22) {
	case 0, 1, 2, 3, 4:
		n, err = k.fs.Lookup(dir, k.name())
		k.keep(n, err)
	case 5, 6:
		err = k.openOne(n)
	case 7, 8, 9:
		err = k.useOpen()
	case 10:
		var h *Handle
		if n, h, err = k.fs.Create(dir, k.name(), unix.O_RDWR, 0o644, Cred{}); err == nil {
			k.keep(n, nil)
			k.open = append(k.open, h)
		}
	case 11:
		n, err = k.fs.Mkdir(dir, k.name(), 0o755, Cred{})
		k.keep(n, err)
	case 12, 13:
		err = k.fs.Rename(dir, k.name(), k.dir(), k.name(), []uint32{0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[k.rnd.IntN(4)])
	case 14:
		n, err = k.fs.Link(n, dir, k.name())
		k.keep(n, err)
	case 15:
		err = k.fs.Unlink(dir, k.name())
	case 16:
		err = k.fs.Rmdir(dir, k.name())
	case 17:
		err = k.setAttr(n)
	case 18:
		err = k.xattr(n)
	case 19:
		err = k.fs.ReadDir(dir, 0, func(DirEntry) bool { return k.rnd.IntN(10) > 0 })
		_, aerr := k.fs.Attr(n)
		err = firstError(err, aerr)
	case 20:
		for n := range k.refs {
			k.forget(n)
			break
		}
	case 21:
		err = k.detachOrTmpfile(n, dir)
	}
	for _, e := range []error{unix.EIO, unix.EBADF, unix.EMFILE, unix.ENFILE} {
		if errors.Is(err, e) {
			k.t.Errorf("an operation gave %v", err)
		}
	}
}

func (k *kernel) openOne(n *Node) error {
	flags := []uint32{unix.O_RDONLY, unix.O_RDWR, unix.O_RDWR | unix.O_TRUNC}[k.rnd.IntN(3)]
	if !isReg(n.mode) {
		return nil
	}
	h, err := k.fs.Open(n, flags)
	if err == nil {
		k.open = append(k.open, h)
	}
	return err
}

func (k *kernel) useOpen() error {
	if len(k.open) == 0 {
		return nil
	}
	i := k.rnd.IntN(len(k.open))
	h := k.open[i]
	off := k.rnd.Int64N(40000)
	switch k.rnd.IntN(6) {
	case 0, 1:
		k.open = slices.Delete(k.open, i, i+1)
		h.Release()
		return nil
	case 2:
		_, err := h.ReadAt(make([]byte, 5000), off)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return err
	case 3:
		h.Backing()
		_, err := h.Seek(off, unix.SEEK_HOLE)
		return err
	case 4:
		if k.rnd.IntN(10) == 0 {
			return h.Sync(false)
		}
	}
	if h.flags&unix.O_ACCMODE == unix.O_RDONLY {
		return nil
	}
	_, err := h.WriteAt([]byte("written"), off, true)
	return err
}

func (k *kernel) setAttr(n *Node) error {
	var s SetAttr
	mode, size, uid := uint32(0o600+k.rnd.IntN(64)), k.rnd.Int64N(50000), uint32(k.rnd.IntN(5))
	switch k.rnd.IntN(4) {
	case 0:
		if n.mode == unix.S_IFLNK {
			return nil
		}
		s.Mode = &mode
	case 1:
		if !isReg(n.mode) {
			return nil
		}
		s.Size = &size
	case 2:
		s.UID, s.GID = &uid, &uid
	case 3:
		s.Mtime = &unix.Timespec{Sec: int64(k.rnd.IntN(1e9))}
	}
	_, err := k.fs.SetAttr(n, s)
	return err
}

func (k *kernel) xattr(n *Node) error {
	if n.mode == unix.S_IFLNK {
		return nil
	}
	const name = "trusted.mark"
	if k.rnd.IntN(3) == 0 {
		return k.fs.Removexattr(n, name)
	}
	if err := k.fs.Setxattr(n, name, []byte{byte(k.rnd.IntN(256))}, 0, false); err != nil {
		return err
	}
	_, err := k.fs.Listxattr(n)
	return err
}

// detachOrTmpfile detaches a file as fusefs does: one that has readers and no writer.
func (k *kernel) detachOrTmpfile(n, dir *Node) error {
	if k.rnd.IntN(2) == 0 {
		n, h, err := k.fs.Tmpfile(dir, unix.O_RDWR, 0o600, Cred{})
		if err == nil {
			k.keep(n, nil)
			k.open = append(k.open, h)
		}
		return err
	}
	if !isReg(n.mode) {
		return nil
	}
	h, err := k.fs.Open(n, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer h.Release()
	if _, kind := h.Backing(); kind == BackingLower {
		_, err = k.fs.Detach(n)
	}
	return err
}

// check verifies that the table of nodes agrees with itself. Others may be at work.
func (fs *FS) check(t *testing.T) {
	t.Helper()
	fs.tree.Lock()
	defer fs.tree.Unlock()
	fs.tab.Lock()
	defer fs.tab.Unlock()
	live := map[*Node]bool{}
	fs.byID.Range(func(id, n any) bool {
		live[n.(*Node)] = true
		if n.(*Node).id != id {
			t.Errorf("node %d is known as %d", n.(*Node).id, id)
		}
		return true
	})
	if len(live) != fs.live {
		t.Errorf("%d nodes are counted, %d known", fs.live, len(live))
	}
	pins := map[*Node]int64{}
	for n := range live {
		for _, l := range n.links {
			pins[l.dir]++
			if !live[l.dir] {
				t.Errorf("node %d: its directory is forgotten", n.id)
			}
			if isDir(n.mode) && l.dir.kids[l.name] != n {
				t.Errorf("directory %d is not its parent's %q", n.id, l.name)
			}
		}
		for name, kid := range n.kids {
			if !live[kid] || !slices.Contains(kid.links, link{n, name}) {
				t.Errorf("node %d: its %q is another's or nobody's", n.id, name)
			}
		}
		if n.dead && len(n.links) > 0 || !n.dead && !n.upper && len(n.links) == 0 { // an upper file may have names that nobody looked up
			t.Errorf("node %d: dead is %v, with %d names", n.id, n.dead, len(n.links))
		}
		if n.refs < 0 || n.refs == 0 && n.pins == 0 {
			t.Errorf("node %d: %d references, %d pins", n.id, n.refs, n.pins)
		}
	}
	for n := range live { // one pin more for an open content, which comes and goes by another lock
		if extra := n.pins - pins[n]; extra < 0 || extra > 1 || isDir(n.mode) && extra != 0 {
			t.Errorf("node %d: %d pins for %d children", n.id, n.pins, pins[n])
		}
	}
	for k, n := range fs.byKey {
		if !live[n] || n.key != k {
			t.Errorf("key %v finds node %d, which is forgotten or another", k, n.id)
		}
	}
}
