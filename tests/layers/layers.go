// Package layers makes image layers for tests: a base layer that holds every kind of object, and layers above it that
// kernel overlayfs itself wrote, with whiteouts, opaque and redirected directories.
package layers

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
	"lamina/tests/probe"
)

// LongName is as long as a name can be.
var LongName = "n" + strings.Repeat("o", 253) + "t"

// Old is the modification time of everything in the base layer.
var Old = unix.Timespec{Sec: 1_000_000_000, Nsec: 123_456_789}

// Sizes of the base layer's files f0, f1, ...: around the block size, over one region of block states (4 MiB) and none.
var Sizes = []int64{0, 1, 4095, 4096, 4097, 70_000, 300_001, 5 << 20}

// Bytes are n bytes that depend on the seed alone and hold no long run of zeros.
func Bytes(seed uint64, n int64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// Generate makes three layers below a new directory and returns them topmost first.
func Generate(t testing.TB) []string {
	t.Helper()
	probe.Overlayfs.Need(t)
	d := mnt.Dirs(t, "base", "middle", "top")
	base(t, d[0])
	stack(t, d[1], d[:1], middle)
	stack(t, d[2], []string{d[1], d[0]}, top)
	return []string{d[2], d[1], d[0]}
}

// stack mounts kernel overlayfs with upper over lowers (topmost first) and lets write fill it.
func stack(t testing.TB, upper string, lowers []string, write func(*writer)) {
	t.Helper()
	// The work directory must share the upper's mount but not overlap it.
	work := upper + ".work"
	must(t, os.Mkdir(work, 0o755))
	m, err := mnt.Try(t, rival.Config{System: rival.Overlay, Lowers: lowers, Upper: upper, Work: work})
	must(t, err)
	write(&writer{t, m.Dir})
	m.Unmount()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// writer makes objects below a directory and ends the test when it cannot.
type writer struct {
	t    testing.TB
	root string
}

func (w *writer) path(p string) string { return filepath.Join(w.root, p) }

func (w *writer) dir(p string, mode uint32) {
	w.t.Helper()
	must(w.t, unix.Mkdir(w.path(p), mode))
	must(w.t, unix.Chmod(w.path(p), mode))
}

func (w *writer) file(p string, size int64) {
	w.t.Helper()
	must(w.t, os.WriteFile(w.path(p), Bytes(uint64(len(p))*1_000_003+uint64(size), size), 0o644))
}

func (w *writer) node(p string, mode uint32, dev uint64) {
	w.t.Helper()
	must(w.t, unix.Mknod(w.path(p), mode, int(dev)))
}

func (w *writer) link(old, new string) {
	w.t.Helper()
	must(w.t, os.Link(w.path(old), w.path(new)))
}

func (w *writer) symlink(target, p string) {
	w.t.Helper()
	must(w.t, os.Symlink(target, w.path(p)))
}

func (w *writer) xattr(p, name, value string) {
	w.t.Helper()
	must(w.t, unix.Lsetxattr(w.path(p), name, []byte(value), 0))
}

func (w *writer) rename(old, new string) {
	w.t.Helper()
	must(w.t, os.Rename(w.path(old), w.path(new)))
}

func (w *writer) remove(p string) {
	w.t.Helper()
	must(w.t, os.RemoveAll(w.path(p)))
}

// ACL encodes a POSIX ACL (xattr format version 2): owner rw, user 1000 r, group r, mask rw, others none.
func ACL() string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	const any = 0xffffffff
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{0x01, 6, any}, {0x02, 4, 1000}, {0x04, 4, any}, {0x10, 6, any}, {0x20, 0, any}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

// base holds every kind of object, and the same names in several directories, so that random operations meet them.
func base(t testing.TB, root string) {
	w := &writer{t, root}
	for _, d := range []string{"d0", "d1", "d2", "d0/s0", "d1/s0", "d1/s1", "d2/s0", "d2/s0/s1"} {
		w.dir(d, 0o755)
		for i := range 4 {
			w.file(fmt.Sprintf("%s/f%d", d, i), Sizes[(i+len(d))%6])
		}
		w.symlink("f0", d+"/l0")
	}
	for i, size := range Sizes {
		w.file(fmt.Sprintf("f%d", i), size)
	}
	w.file("d0/"+LongName, 10)

	w.link("f5", "h0")
	w.link("f5", "d1/h1")
	w.link("d0/f3", "d0/h2")
	w.symlink("d0/f0", "l0")
	w.symlink("no/such/thing", "l1")
	w.link("l1", "d0/l1") // a hard link of a symlink
	w.symlink("d1", "l2")

	w.node("c0", unix.S_IFCHR|0o666, unix.Mkdev(1, 3))
	w.node("d0/b0", unix.S_IFBLK|0o600, unix.Mkdev(7, 250))
	w.node("p0", unix.S_IFIFO|0o644, 0)
	w.node("d1/k0", unix.S_IFSOCK|0o600, 0)

	w.file("su", 5000)
	must(t, unix.Chmod(w.path("su"), 0o6755))
	w.dir("sg", 0o2775)
	must(t, unix.Chown(w.path("sg"), 0, 1000))
	w.dir("tmp", 0o1777)
	w.file("tmp/f0", 100)
	must(t, unix.Chown(w.path("tmp/f0"), 1000, 1000))
	w.file("secret", 100)
	must(t, unix.Chmod(w.path("secret"), 0))

	w.xattr("f1", "user.one", "1")
	w.xattr("f1", "trusted.two", strings.Repeat("2", 1000))
	w.xattr("d0", "user.dir", "")
	w.xattr("f4", "system.posix_acl_access", ACL())
	w.xattr("sg", "system.posix_acl_default", ACL())
	w.xattr("d1/s0", "trusted.long", strings.Repeat("x", 2000))

	sparse, err := os.Create(w.path("sparse"))
	must(t, err)
	for _, off := range []int64{0, 1 << 20, 6<<20 - 5000} {
		_, err := sparse.WriteAt(Bytes(uint64(off), 5000), off)
		must(t, err)
	}
	must(t, sparse.Truncate(9<<20+1))
	must(t, sparse.Close())

	must(t, filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{Old, Old}, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// middle whites out, replaces, makes opaque, redirects.
func middle(w *writer) {
	w.remove("d0/f1")                    // whiteout
	w.remove("d1/s0")                    // opaque
	w.dir("d1/s0", 0o700)                //
	w.file("d1/s0/f0", 20_000)           //
	w.rename("d2", "d3")                 // redirect
	w.file("d3/f5", 5000)                //
	w.rename("d1/s1", "d0/s1")           // redirect into another directory
	w.remove("d0/s1/f2")                 //
	w.remove("f2")                       // a file becomes a directory
	w.dir("f2", 0o755)                   //
	w.file("f2/f0", 9000)                //
	w.file("d0/f2", 12_345)              // a lower file overwritten
	w.link("d0/f2", "d0/h3")             //
	w.symlink("s1/f0", "d0/l2")          //
	must(w.t, os.Chmod(w.path("f0"), 0)) // metadata alone
}

// top does it again over what middle left.
func top(w *writer) {
	w.rename("d3", "d4") // redirect of a redirect
	w.remove("d4/s0/f1") //
	w.dir("d2", 0o755)   // a name that was renamed away
	w.file("d2/f0", 100) //
	w.remove("f2")       // the directory becomes a file again
	w.file("f2", 8192)   //
	w.remove("tmp/f0")   //
	w.file("d0/f1", 42)  // over a whiteout
	w.node("d0/p0", unix.S_IFIFO|0o600, 0)
	w.rename("d0/s1", "d1/s1") // and back to where it came from
	w.xattr("d0/f0", "user.top", "yes")
}
