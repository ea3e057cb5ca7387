package oracle

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"golang.org/x/sys/unix"

	"lamina/tests/layers"
)

// slots is how many descriptors a run can hold open.
const slots = 8

// op is one operation. It is generated without looking at any state, so that a sequence with some operations left out
// is still a sequence: that is what shrinking needs.
type op struct {
	kind     string
	path, to string
	slot, sl int // descriptor slots
	flags    int
	mode     uint32
	off, n   int64
	name     string // xattr
	seed     uint64 // of the bytes written
	uid      int    // who does it
}

func (o op) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", o.kind)
	if o.uid != 0 {
		fmt.Fprintf(&b, " as %d", o.uid)
	}
	show := func(uses string, format string, args ...any) {
		if strings.Contains(uses, " "+o.kind+" ") {
			fmt.Fprintf(&b, format, args...)
		}
	}
	switch {
	case strings.HasPrefix(o.kind, "f") || strings.HasPrefix(o.kind, "p") || strings.HasPrefix(o.kind, "m"):
		fmt.Fprintf(&b, " slot=%d", o.slot)
	}
	if o.path != "" || !strings.HasPrefix(o.kind, "f") {
		p := o.path
		if strings.Contains(p, layers.LongName) {
			p = strings.ReplaceAll(p, layers.LongName, "<long name>")
		}
		fmt.Fprintf(&b, " %q", p)
	}
	show(" rename link symlink linktmp ", " to %q", o.to)
	show(" copyrange ", " from slot %d to slot %d", o.slot, o.sl)
	if o.flags != 0 {
		fmt.Fprintf(&b, " flags=%#x", o.flags)
	}
	if o.mode != 0 {
		fmt.Fprintf(&b, " mode=%#o", o.mode)
	}
	if o.off != 0 || o.n != 0 {
		fmt.Fprintf(&b, " off=%d n=%d", o.off, o.n)
	}
	if o.name != "" {
		fmt.Fprintf(&b, " xattr=%s", o.name)
	}
	return b.String()
}

// The names that operations draw from: few, so that they meet.
var (
	dirs = []string{"", "", "d0", "d0", "d1", "d1", "d2", "d4", "d0/s0", "d0/s1", "d1/s0", "d1/s1", "d4/s0", "d4/s0/s1",
		"f2", "n0", "n0/n1", "sg", "tmp", "l2", "missing"}
	names = []string{"f0", "f0", "f1", "f2", "f3", "f4", "f5", "f7", "h0", "h1", "h2", "h3", "l0", "l1", "l2", "c0", "b0",
		"p0", "k0", "su", "secret", "sparse", "n0", "n1", "n2", "s0", "s1", "d0", "d1", "d2", "d4", "sg", layers.LongName}
	xattrs = []string{"user.one", "user.new", "trusted.two", "trusted.overlay.foo", "trusted.overlay.opaque", "user.overlay.x",
		"system.posix_acl_access", "system.posix_acl_default", "security.odd", "bogus.name"}
	// No absolute and no ".." targets: what is followed must stay in the tree, on the host's side too.
	targets = []string{"f0", "d0/f0", "d1", "s0/f1", "no/such", "n0", strings.Repeat("t", 300)}
	modes   = []uint32{0o644, 0o600, 0o755, 0, 0o4755, 0o2755, 0o6777, 0o1777, 0o444}
	lengths = []int64{0, 1, 100, 511, 4096, 4096, 5000, 8192, 20_000, 70_000}
)

// kinds, with how often each is drawn.
var kinds = []struct {
	name   string
	weight int
}{
	{"open", 120}, {"tmpfile", 8}, {"linktmp", 10}, {"fclose", 30},
	{"pread", 40}, {"read", 15}, {"pwrite", 90}, {"pappend", 25}, {"fsync", 12}, {"fstat", 20}, {"statx", 10},
	{"truncate", 25}, {"ftruncate", 25}, {"fallocate", 20}, {"copyrange", 15}, {"fseek", 25},
	{"mread", 15}, {"mwrite", 15},
	{"mkdir", 25}, {"rmdir", 20}, {"unlink", 40}, {"rename", 70}, {"link", 30}, {"symlink", 15}, {"mknod", 15},
	{"readlink", 10}, {"readdir", 20}, {"stat", 30}, {"access", 8},
	{"chmod", 25}, {"fchmod", 10}, {"chown", 20}, {"fchown", 8}, {"utimes", 20}, {"futimes", 8},
	{"setxattr", 25}, {"fsetxattr", 8}, {"getxattr", 15}, {"listxattr", 15}, {"removexattr", 15},
	{"remount", 2},
}

// generator makes operations out of one seed.
type generator struct{ *rand.Rand }

func newGenerator(seed uint64) generator {
	return generator{rand.New(rand.NewPCG(seed, 0x6c616d696e61))}
}

func pick[T any](g generator, from []T) T { return from[g.IntN(len(from))] }

func (g generator) path() string {
	d, n := pick(g, dirs), pick(g, names)
	switch {
	case g.IntN(25) == 0:
		return d
	case d == "":
		return n
	}
	return d + "/" + n
}

// kind draws one by weight.
func (g generator) kind() string {
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	at := g.IntN(total)
	for _, k := range kinds {
		if at -= k.weight; at < 0 {
			return k.name
		}
	}
	panic("unreachable: weights sum to total")
}

func (g generator) chance(percent int) bool { return g.IntN(100) < percent }

func (g generator) op() op {
	o := op{
		kind: g.kind(), path: g.path(), slot: g.IntN(slots), sl: g.IntN(slots),
		mode: pick(g, modes), n: pick(g, lengths), seed: g.Uint64(),
	}
	if g.chance(15) {
		o.uid = 1000
	}
	switch o.off = int64(g.IntN(80_000)); {
	case g.chance(10):
		o.off = g.Int64N(6 << 20)
	case g.chance(30):
		o.off &^= 4095
	case g.chance(20):
		o.off = 0
	}
	switch o.kind {
	case "open":
		o.flags = g.openFlags()
	case "tmpfile":
		o.flags = unix.O_TMPFILE | pick(g, []int{unix.O_RDWR, unix.O_WRONLY})
		o.path = pick(g, dirs)
	case "rename":
		o.to = g.path()
		o.flags = pick(g, []int{0, 0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE})
		if g.chance(20) { // of one directory over another, by name
			o.path, o.to = pick(g, dirs[2:]), pick(g, dirs[2:])
		}
	case "link":
		o.to = g.path()
		o.flags = pick(g, []int{0, 0, unix.AT_SYMLINK_FOLLOW})
	case "linktmp":
		o.to = g.path()
	case "symlink":
		o.to = pick(g, targets)
	case "mknod":
		o.mode = o.mode&0o777 | pick(g, []uint32{unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR})
	case "fallocate":
		o.flags = pick(g, []int{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
			unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE})
	case "fseek":
		o.flags = pick(g, []int{unix.SEEK_DATA, unix.SEEK_HOLE})
	case "setxattr", "fsetxattr", "getxattr", "removexattr":
		o.name = pick(g, xattrs)
		o.flags = pick(g, []int{0, 0, unix.XATTR_CREATE, unix.XATTR_REPLACE})
		o.n = pick(g, []int64{0, 1, 30, 500, 3000})
	case "truncate", "ftruncate":
		if g.chance(30) {
			o.off = pick(g, []int64{0, 1, 4095, 4096, 4097})
		}
	case "chown", "fchown":
		o.n, o.off = pick(g, []int64{-1, 0, 1000, 4242}), pick(g, []int64{-1, 0, 1000})
	case "remount":
		o.path = ""
	}
	return o
}

func (g generator) openFlags() int {
	f := pick(g, []int{unix.O_RDONLY, unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, unix.O_RDWR})
	for _, c := range []struct{ percent, flag int }{
		{30, unix.O_CREAT}, {15, unix.O_EXCL}, {12, unix.O_TRUNC}, {15, unix.O_APPEND}, {25, unix.O_NOFOLLOW},
		{4, unix.O_DIRECTORY}, {3, unix.O_SYNC}, {3, unix.O_DSYNC}, {10, unix.O_NOATIME}, {2, unix.O_PATH},
	} {
		if g.chance(c.percent) {
			f |= c.flag
		}
	}
	if f&unix.O_CREAT != 0 {
		f &^= unix.O_DIRECTORY // together EINVAL in the VFS, before any filesystem is asked
	} else {
		f &^= unix.O_EXCL // alone it claims a block device, and both sides' node is one device
	}
	return f
}

func generate(seed uint64, n int) []op {
	g := newGenerator(seed)
	ops := make([]op, n)
	for i := range ops {
		ops[i] = g.op()
	}
	return ops
}
