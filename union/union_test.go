package union

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"

	"lamina/block"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// stack is a union under test: real directories, mounted by New as often as a test likes.
type stack struct {
	t      *testing.T
	dir    string
	lowers []string // topmost first
	change func(*Config)
	layers layer.Options // beside what each layer needs
	fs     *FS
}

// newStack makes n empty lower layers and an upper one. fill puts things into them before the first mount.
func newStack(t *testing.T, n int, fill func(lower func(i int, path string) string)) *stack {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests make whiteouts and trusted attributes: run them as root")
	}
	unix.Umask(0)
	s := &stack{t: t, dir: t.TempDir()}
	for i := range n {
		s.lowers = append(s.lowers, filepath.Join(s.dir, fmt.Sprint("lower", i)))
	}
	for _, d := range append([]string{s.upper(""), s.work()}, s.lowers...) {
		must(t, os.MkdirAll(d, 0o755))
	}
	fill(func(i int, path string) string { return filepath.Join(s.lowers[i], path) })
	t.Cleanup(s.umount)
	s.mount()
	return s
}

func (s *stack) upper(path string) string { return filepath.Join(s.dir, "upper", path) }
func (s *stack) work() string             { return filepath.Join(s.dir, "work") }

func (s *stack) config() Config {
	cfg := Config{Redirect: true, Follow: true, Index: true, Logf: s.t.Logf, Engine: newTestEngine(s.t.Logf)}
	for _, p := range s.lowers {
		lower := s.layers
		lower.ReadOnly = true
		cfg.Lowers = append(cfg.Lowers, openDir(s.t, p, lower))
	}
	cfg.Upper = openDir(s.t, s.upper(""), s.layers)
	cfg.Work = openDir(s.t, s.work(), layer.Options{})
	if s.change != nil {
		s.change(&cfg)
	}
	return cfg
}

func newTestEngine(logf func(string, ...any)) *block.Engine {
	return block.NewEngine(block.Options{Logf: logf})
}

func (s *stack) mount() {
	s.t.Helper()
	fs, err := New(s.config())
	must(s.t, err)
	s.fs = fs
}

// umount closes the union and checks what it left.
func (s *stack) umount() {
	if s.fs == nil {
		return
	}
	must(s.t, s.fs.Close())
	s.fs = nil
	cfg := s.config()
	defer closeAll(cfg)
	must(s.t, Fsck(cfg, false, func(f Finding) { s.t.Errorf("fsck: %s block %d: %s", f.Path, f.Block, f.What) }))
}

func closeAll(cfg Config) {
	cfg.Engine.Close()
	for _, l := range cfg.Lowers {
		l.Close()
	}
	cfg.Upper.Close()
	cfg.Work.Close()
}

func (s *stack) remount() {
	s.t.Helper()
	s.umount()
	s.mount()
}

func openDir(t *testing.T, path string, opt layer.Options) *layer.Dir {
	t.Helper()
	d, err := layer.OpenDir(path, opt)
	must(t, err)
	return d
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want %v", err, want)
	}
}

// node looks a path up. The reference is never given back: tests are short.
func (s *stack) node(path string) *Node {
	s.t.Helper()
	n, err := s.find(path)
	must(s.t, err)
	return n
}

func (s *stack) find(path string) (*Node, error) {
	n := s.fs.Root()
	for comp := range strings.SplitSeq(path, "/") {
		if comp == "" {
			continue
		}
		var err error
		if n, err = s.fs.Lookup(n, comp); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (s *stack) parent(path string) (*Node, string) {
	s.t.Helper()
	return s.node(filepath.Dir("/" + path)), filepath.Base(path)
}

func (s *stack) read(path string) string {
	s.t.Helper()
	h, err := s.fs.Open(s.node(path), unix.O_RDONLY)
	must(s.t, err)
	defer h.Release()
	return readAll(s.t, h)
}

func readAll(t *testing.T, h *Handle) string {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(h, 0, 1<<40))
	must(t, err)
	return string(b)
}

func (s *stack) write(path, data string, off int64) {
	s.t.Helper()
	h, err := s.fs.Open(s.node(path), unix.O_RDWR)
	must(s.t, err)
	defer h.Release()
	_, err = h.WriteAt([]byte(data), off, false)
	must(s.t, err)
}

func (s *stack) create(path, data string) {
	s.t.Helper()
	dir, name := s.parent(path)
	_, h, err := s.fs.Create(dir, name, unix.O_RDWR|unix.O_EXCL, 0o644, Cred{})
	must(s.t, err)
	defer h.Release()
	_, err = h.WriteAt([]byte(data), 0, false)
	must(s.t, err)
}

func (s *stack) mkdir(path string) {
	s.t.Helper()
	dir, name := s.parent(path)
	_, err := s.fs.Mkdir(dir, name, 0o755, Cred{})
	must(s.t, err)
}

func (s *stack) rename(from, to string, flags uint32) error {
	s.t.Helper()
	fd, fn := s.parent(from)
	td, tn := s.parent(to)
	return s.fs.Rename(fd, fn, td, tn, flags)
}

func (s *stack) unlink(path string) error {
	s.t.Helper()
	dir, name := s.parent(path)
	return s.fs.Unlink(dir, name)
}

func (s *stack) rmdir(path string) error {
	s.t.Helper()
	dir, name := s.parent(path)
	return s.fs.Rmdir(dir, name)
}

func (s *stack) stat(path string) Attr {
	s.t.Helper()
	st, err := s.fs.Attr(s.node(path))
	must(s.t, err)
	return st
}

// ls names a directory's entries and checks that each one's number is what stat says.
func (s *stack) ls(path string) []string {
	s.t.Helper()
	dir := s.node(path)
	var entries []DirEntry
	must(s.t, s.fs.ReadDir(dir, 0, func(e DirEntry) bool { entries = append(entries, e); return true }))
	var names []string
	last := uint64(0)
	for _, e := range entries {
		if e.Off <= last {
			s.t.Errorf("%s: position %d of %q does not follow %d", path, e.Off, e.Name, last)
		}
		last = e.Off
		if e.Name == "." || e.Name == ".." {
			continue
		}
		names = append(names, e.Name)
		n, err := s.fs.Lookup(dir, e.Name)
		must(s.t, err)
		st, err := s.fs.Attr(n)
		must(s.t, err)
		if st.Ino != e.Ino {
			s.t.Errorf("%s/%s: readdir says inode %d, stat %d", path, e.Name, e.Ino, st.Ino)
		}
	}
	sort.Strings(names)
	return names
}

func (s *stack) wantLs(path string, want ...string) {
	s.t.Helper()
	if got := s.ls(path); !slices.Equal(got, want) {
		s.t.Errorf("%s holds %q, want %q", path, got, want)
	}
}

func (s *stack) wantRead(path, want string) {
	s.t.Helper()
	if got := s.read(path); got != want {
		s.t.Errorf("%s reads %.40q (%d bytes), want %.40q (%d bytes)", path, got, len(got), want, len(want))
	}
}

// dump describes every name of the tree.
func (s *stack) dump() map[string]string {
	out := map[string]string{}
	var walk func(path string, n *Node)
	walk = func(path string, n *Node) {
		st, err := s.fs.Attr(n)
		must(s.t, err)
		mark, err := s.fs.Getxattr(n, "trusted.mark")
		if !errors.Is(err, unix.ENODATA) {
			must(s.t, err)
		}
		d := fmt.Sprintf("ino %d mode %o nlink %d owner %d size %d mark %v", st.Ino, st.Mode, st.Nlink, st.Uid, st.Size, mark)
		if isReg(st.Mode) {
			h, err := s.fs.Open(n, unix.O_RDONLY)
			must(s.t, err)
			sum := fnv.New64a()
			sum.Write([]byte(readAll(s.t, h)))
			h.Release()
			d += fmt.Sprintf(" sum %x", sum.Sum64())
		}
		if isDir(st.Mode) {
			d = fmt.Sprintf("ino %d mode %o owner %d mark %v", st.Ino, st.Mode, st.Uid, mark)
			for _, name := range s.ls(path) {
				kid, err := s.fs.Lookup(n, name)
				must(s.t, err)
				walk(path+"/"+name, kid)
			}
		}
		out[path] = d
	}
	walk("", s.fs.Root())
	return out
}

func put(t *testing.T, path, data string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(data), 0o644))
}

func setx(t *testing.T, path, name, value string) {
	t.Helper()
	must(t, unix.Lsetxattr(path, name, []byte(value), 0))
}

func mkWhiteout(t *testing.T, path string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, unix.Mknod(path, unix.S_IFCHR, 0))
}

func TestMergeWhiteoutsAndOpaque(t *testing.T) {
	s := newStack(t, 3, func(p func(int, string) string) {
		put(t, p(2, "d/bottom"), "b")
		put(t, p(2, "d/gone"), "g")
		put(t, p(2, "o/hidden"), "h")
		put(t, p(2, "x/f"), "file")
		put(t, p(1, "d/middle"), "m")
		mkWhiteout(t, p(1, "d/gone"))
		put(t, p(1, "o/new"), "n")
		setx(t, p(1, "o"), "trusted.overlay.opaque", "y")
		put(t, p(0, "d/bottom"), "top")
		put(t, p(0, "x/f/inside"), "a directory over a file")
	})
	s.wantLs("d", "bottom", "middle")
	s.wantRead("d/bottom", "top")
	s.wantLs("o", "new")
	s.wantLs("x/f", "inside")
	_, err := s.find("d/gone")
	wantErr(t, err, unix.ENOENT)
}

// A container engine's layer may mark whiteouts by attribute where device nodes cannot be made.
func TestXattrWhiteouts(t *testing.T) {
	s := newStack(t, 2, func(p func(int, string) string) {
		put(t, p(1, "d/a"), "a")
		put(t, p(1, "d/b"), "b")
		put(t, p(0, "d/a"), "")
		setx(t, p(0, "d/a"), "trusted.overlay.whiteout", "y")
		setx(t, p(0, "d"), "trusted.overlay.opaque", "x")
	})
	s.wantLs("d", "b")
	_, err := s.find("d/a")
	wantErr(t, err, unix.ENOENT)
}

// One inode object for life: a descriptor opened before the first write sees what is written later.
func TestReaderBeforeWriterSeesOneFile(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), strings.Repeat("a", 10000)) })
	h, err := s.fs.Open(s.node("f"), unix.O_RDONLY)
	must(t, err)
	defer h.Release()
	s.write("f", "NEW", 5000)
	want := strings.Repeat("a", 5000) + "NEW" + strings.Repeat("a", 4997)
	if got := readAll(t, h); got != want {
		t.Error("the descriptor opened before the write does not see it")
	}
	s.wantRead("f", want)
	if s.node("f") != h.Node() {
		t.Error("copy-up made a second node")
	}
}

// A sketch that became an ordinary file while it was open is stat'ed as one afterwards.
func TestSizeAfterASketchBecameOrdinary(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), strings.Repeat("a", 70000)) })
	h, err := s.fs.Open(s.node("f"), unix.O_RDWR)
	must(t, err)
	zero, size := int64(0), int64(123)
	_, err = s.fs.SetAttr(s.node("f"), SetAttr{Size: &zero})
	must(t, err)
	h.Release()
	if got := s.stat("f").Size; got != 0 {
		t.Errorf("size %d after truncation to 0", got)
	}
	_, err = s.fs.SetAttr(s.node("f"), SetAttr{Size: &size})
	must(t, err)
	s.wantRead("f", strings.Repeat("\x00", 123))
	if got := s.stat("f").Size; got != size {
		t.Errorf("size %d, want %d", got, size)
	}
}

func TestMetadataCopiesNoData(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		must(t, os.WriteFile(p(0, "big"), nil, 0o644))
		must(t, os.Truncate(p(0, "big"), 1<<40))
		put(t, p(0, "small"), strings.Repeat("x", 100000))
	})
	uid := uint32(1000)
	for _, f := range []string{"big", "small"} {
		before := s.stat(f)
		after, err := s.fs.SetAttr(s.node(f), SetAttr{UID: &uid, GID: &uid})
		must(t, err)
		if after.Uid != uid || after.Ino != before.Ino || after.Size != before.Size || after.Mtim != before.Mtim {
			t.Errorf("%s: after chown %+v, before %+v", f, after, before)
		}
		var st unix.Stat_t
		must(t, unix.Stat(s.upper(f), &st))
		if st.Blocks > 8 { // an attribute block at most
			t.Errorf("%s: chown allocated %d blocks", f, st.Blocks)
		}
	}
	s.wantRead("small", strings.Repeat("x", 100000))
	s.remount()
	if st := s.stat("big"); st.Uid != uid || st.Size != 1<<40 {
		t.Errorf("after remount: %+v", st)
	}
	s.wantRead("small", strings.Repeat("x", 100000))
}

func TestInodeNumbersStayAcrossCopyUpAndRemount(t *testing.T) {
	s := newStack(t, 2, func(p func(int, string) string) {
		put(t, p(1, "d/f"), "data")
		put(t, p(1, "d/g"), "data")
		put(t, p(0, "d/h"), "data")
		must(t, os.Symlink("target", p(1, "d/link")))
		must(t, unix.Mkfifo(p(1, "d/fifo"), 0o600))
	})
	paths := []string{"", "d", "d/f", "d/g", "d/h", "d/link", "d/fifo"}
	want := map[string]uint64{}
	for _, p := range paths {
		want[p] = s.stat(p).Ino
	}
	check := func(when string) {
		t.Helper()
		for _, p := range paths {
			if got := s.stat(p).Ino; got != want[p] {
				t.Errorf("%s: inode of %q is %d, was %d", when, p, got, want[p])
			}
		}
		s.ls("d")
	}
	uid := uint32(7)
	for _, p := range paths {
		_, err := s.fs.SetAttr(s.node(p), SetAttr{UID: &uid})
		must(t, err)
	}
	check("after chown")
	s.write("d/f", "D", 0)
	s.write("d/g", "all of it, and more", 0)
	check("after write")
	s.remount()
	check("after remount")
	must(t, s.rename("d", "e", 0))
	for i, p := range paths {
		if strings.HasPrefix(p, "d") {
			want["e"+p[1:]] = want[p]
			paths[i] = "e" + p[1:]
		}
	}
	s.remount()
	for _, p := range paths {
		if got := s.stat(p).Ino; got != want[p] {
			t.Errorf("after rename and remount: inode of %q is %d, was %d", p, got, want[p])
		}
	}
}

func TestHardLinksStayTogetherAcrossCopyUp(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "a"), "lower bytes")
		must(t, os.Mkdir(p(0, "d"), 0o755))
		must(t, os.Link(p(0, "a"), p(0, "b")))
		must(t, os.Link(p(0, "a"), p(0, "d/c")))
	})
	if s.node("a") != s.node("b") || s.node("b") != s.node("d/c") {
		t.Fatal("names of one lower file are different nodes")
	}
	s.write("b", "UPPER", 0)
	check := func(names []string, nlink uint64) {
		t.Helper()
		ino := s.stat(names[0]).Ino
		for _, n := range names {
			s.wantRead(n, "UPPER bytes")
			if st := s.stat(n); st.Nlink != nlink || st.Ino != ino {
				t.Errorf("%s: nlink %d inode %d, want %d and %d", n, st.Nlink, st.Ino, nlink, ino)
			}
		}
	}
	check([]string{"a", "b", "d/c"}, 3)
	s.remount()
	check([]string{"a", "b", "d/c"}, 3)
	must(t, s.unlink("b"))
	check([]string{"a", "d/c"}, 2)
	must(t, s.rename("a", "e", 0))
	check([]string{"e", "d/c"}, 2)
	s.remount()
	check([]string{"e", "d/c"}, 2)
	dir, name := s.parent("f")
	_, err := s.fs.Link(s.node("d/c"), dir, name)
	must(t, err)
	check([]string{"e", "d/c", "f"}, 3)
	must(t, s.unlink("e"))
	must(t, s.unlink("d/c"))
	s.remount()
	check([]string{"f"}, 1)
	must(t, s.unlink("f"))
	if list, err := os.ReadDir(filepath.Join(s.work(), indexDir)); err != nil || len(list) != 0 {
		t.Errorf("the index keeps %v of a file without names (%v)", list, err)
	}
	s.wantLs("", "d")
}

func TestRenameOfLowerDirectory(t *testing.T) {
	s := newStack(t, 2, func(p func(int, string) string) {
		put(t, p(1, "d/sub/deep"), "deep")
		put(t, p(1, "d/f"), "f")
		put(t, p(0, "d/g"), "g")
		put(t, p(1, "other/x"), "x")
	})
	must(t, s.rename("d", "other/moved", 0))
	check := func() {
		t.Helper()
		s.wantLs("", "other")
		s.wantLs("other/moved", "f", "g", "sub")
		s.wantRead("other/moved/sub/deep", "deep")
		s.wantRead("other/moved/g", "g")
	}
	check()
	s.remount()
	check()
	s.mkdir("d") // a new directory under the old name shows nothing of the old one
	s.wantLs("d")
	must(t, s.rename("other/moved/sub", "d/sub2", 0))
	s.wantRead("d/sub2/deep", "deep")
	s.write("d/sub2/deep", "DEE", 0)
	must(t, s.rename("d/sub2/deep", "deepest", 0)) // a sketch leaves the place that named its lower file
	s.remount()
	s.wantRead("deepest", "DEEp")
	s.wantLs("other/moved", "f", "g")
	s.wantLs("d/sub2")
	must(t, s.rename("d/sub2", "other/moved", unix.RENAME_EXCHANGE))
	s.remount()
	s.wantLs("d/sub2", "f", "g")
	s.wantLs("other/moved")
	wantErr(t, s.rename("d", "d/sub2/d", 0), unix.EINVAL)
	wantErr(t, s.rename("d/sub2", "deepest", unix.RENAME_NOREPLACE), unix.EEXIST)
	wantErr(t, s.rename("other", "d", 0), unix.ENOTEMPTY)
}

func TestRemovedNamesStayRemoved(t *testing.T) {
	s := newStack(t, 2, func(p func(int, string) string) {
		put(t, p(1, "d/a"), "a")
		put(t, p(0, "d/b"), "b")
		put(t, p(1, "f"), "lower")
	})
	must(t, s.unlink("f"))
	s.create("f", "new")
	s.remount()
	s.wantRead("f", "new")
	must(t, s.unlink("f"))
	s.remount()
	_, err := s.find("f")
	wantErr(t, err, unix.ENOENT)
	wantErr(t, s.rmdir("d"), unix.ENOTEMPTY)
	must(t, s.unlink("d/a"))
	must(t, s.unlink("d/b"))
	must(t, s.rmdir("d"))
	s.mkdir("d")
	s.remount()
	s.wantLs("d")
	must(t, s.rmdir("d"))
	s.wantLs("")
}

func TestUnlinkedFileLivesWhileOpen(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), "lower bytes") })
	r, err := s.fs.Open(s.node("f"), unix.O_RDONLY)
	must(t, err)
	w, err := s.fs.Open(s.node("f"), unix.O_RDWR)
	must(t, err)
	must(t, s.unlink("f"))
	_, err = w.WriteAt([]byte("UPPER"), 0, false)
	must(t, err)
	if got := readAll(t, r); got != "UPPER bytes" {
		t.Errorf("reads %q", got)
	}
	if st, err := s.fs.Attr(r.Node()); err != nil || st.Nlink != 0 || st.Size != 11 {
		t.Errorf("stat of the unlinked file: %+v, %v", st, err)
	}
	s.create("f", "another")
	if s.node("f") == r.Node() {
		t.Error("the new file is the old node")
	}
	r.Release()
	w.Release()
	s.wantRead("f", "another")
}

// The kernel may have looked a link up and be about to follow it when its name goes.
func TestUnlinkedSymlinkCanStillBeFollowed(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { must(t, os.Symlink("below", p(0, "lower"))) })
	_, err := s.fs.Symlink(s.fs.Root(), "upper", "above", Cred{})
	must(t, err)
	for name, want := range map[string]string{"lower": "below", "upper": "above"} {
		n := s.node(name)
		must(t, s.unlink(name))
		if got, err := s.fs.Readlink(n); err != nil || got != want {
			t.Errorf("%s: follows to %q, %v, want %q", name, got, err, want)
		}
	}
}

func TestTmpfileGetsAName(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), "x") })
	n, h, err := s.fs.Tmpfile(s.fs.Root(), unix.O_RDWR, 0o600, Cred{UID: 5, GID: 6})
	must(t, err)
	_, err = h.WriteAt([]byte("nameless"), 0, false)
	must(t, err)
	_, err = s.fs.Link(n, s.fs.Root(), "named")
	must(t, err)
	h.Release()
	s.wantRead("named", "nameless")
	if st := s.stat("named"); st.Uid != 5 || st.Gid != 6 || st.Nlink != 1 {
		t.Errorf("%+v", st)
	}
}

// Positions hold while names come and go around the reader.
func TestReaddirPositionsAreStable(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		for i := range 200 {
			put(t, p(0, fmt.Sprintf("d/keep%03d", i)), "")
			put(t, p(0, fmt.Sprintf("d/go%03d", i)), "")
		}
	})
	dir := s.node("d")
	seen := map[string]int{}
	off := uint64(0)
	for round := 0; ; round++ {
		count := 0
		must(t, s.fs.ReadDir(dir, off, func(e DirEntry) bool {
			if count == 7 {
				return false
			}
			count++
			off = e.Off
			seen[e.Name]++
			return true
		}))
		if count == 0 {
			break
		}
		if round < 200 {
			must(t, s.unlink(fmt.Sprintf("d/go%03d", round)))
			s.create(fmt.Sprintf("d/come%03d", round), "")
		}
	}
	for i := range 200 {
		if n := seen[fmt.Sprintf("keep%03d", i)]; n != 1 {
			t.Errorf("keep%03d was listed %d times", i, n)
		}
	}
	for name, n := range seen {
		if n != 1 {
			t.Errorf("%s was listed %d times", name, n)
		}
	}
}

func TestOverlayAttributesAreEscaped(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), "x") })
	n := s.node("f")
	must(t, s.fs.Setxattr(n, "trusted.overlay.opaque", []byte("mine"), 0, false))
	must(t, s.fs.Setxattr(n, "user.a", []byte("b"), 0, false))
	v, err := s.fs.Getxattr(n, "trusted.overlay.opaque")
	must(t, err)
	if string(v) != "mine" {
		t.Errorf("reads %q", v)
	}
	names, err := s.fs.Listxattr(n)
	must(t, err)
	slices.Sort(names)
	if !slices.Equal(names, []string{"trusted.overlay.opaque", "user.a"}) {
		t.Errorf("lists %q", names)
	}
	_, err = s.fs.Getxattr(n, "trusted.overlay.metacopy")
	wantErr(t, err, unix.ENODATA)
	must(t, s.fs.Removexattr(n, "trusted.overlay.opaque"))
	wantErr(t, s.fs.Removexattr(n, "trusted.overlay.opaque"), unix.ENODATA)
	must(t, s.fs.Removexattr(n, "system.posix_acl_access")) // an absent ACL is removed without complaint
	s.wantRead("f", "x")
}

// Redirects of hostile layers: to ancestors, to themselves, to another one and back. Layers are only ever asked
// downwards, so every walk ends.
func TestTrapRedirectCycles(t *testing.T) {
	s := newStack(t, 3, func(p func(int, string) string) {
		for i := range 3 {
			must(t, os.MkdirAll(p(i, "a/b"), 0o755))
			must(t, os.MkdirAll(p(i, "c"), 0o755))
			setx(t, p(i, "a/b"), "trusted.overlay.redirect", "/a")
			setx(t, p(i, "a"), "trusted.overlay.redirect", "/c")
			setx(t, p(i, "c"), "trusted.overlay.redirect", "/a/b")
		}
		put(t, p(2, "a/f"), "f")
	})
	depth := 0
	var walk func(n *Node)
	walk = func(n *Node) {
		if depth++; depth > 1000 {
			t.Fatal("the tree does not end")
		}
		var names []string
		must(t, s.fs.ReadDir(n, 0, func(e DirEntry) bool { names = append(names, e.Name); return true }))
		for _, name := range names {
			if name == "." || name == ".." {
				continue
			}
			child, err := s.fs.Lookup(n, name)
			must(t, err)
			if isDir(child.mode) {
				walk(child)
			}
		}
	}
	walk(s.fs.Root())
}

// A forged origin must not make one file of two.
func TestTrapForgedOrigin(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "victim"), "secret") })
	s.create("evil", "evil")
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(s.lowers[0], "victim"), &st))
	id := block.Ident{FS: s.fs.lowers[0].FS(), Ino: st.Ino}
	s.umount()
	setx(t, s.upper("evil"), "trusted.overlay.lamina.origin", string(id.Origin()))
	s.mount()
	s.wantRead("victim", "secret")
	s.wantRead("evil", "evil")
	s.write("evil", "EVIL", 0)
	s.wantRead("victim", "secret")
}

func TestTrapChangedLowerIsEIOForThatFileOnly(t *testing.T) {
	const size = wholeMax + 20000 // a smaller file would be copied
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "changed"), strings.Repeat("a", size))
		put(t, p(0, "intact"), strings.Repeat("b", size))
	})
	s.write("changed", "X", 4096)
	s.write("intact", "X", 4096)
	s.umount()
	put(t, filepath.Join(s.lowers[0], "changed"), strings.Repeat("c", size+1))
	s.mount()
	h, err := s.fs.Open(s.node("changed"), unix.O_RDONLY)
	must(t, err)
	_, err = h.ReadAt(make([]byte, 10), 12000)
	wantErr(t, err, unix.EIO)
	h.Release()
	s.wantRead("intact", strings.Repeat("b", 4096)+"X"+strings.Repeat("b", size-4097))
	must(t, s.fs.Close())
	s.fs = nil
	cfg := s.config()
	defer closeAll(cfg)
	var found []string
	must(t, Fsck(cfg, false, func(f Finding) { found = append(found, f.Path) }))
	if !slices.Equal(found, []string{"changed"}) {
		t.Errorf("fsck found %q", found)
	}
}

func TestFlattenLeavesOrdinaryFiles(t *testing.T) {
	for _, format := range []block.Format{block.Sparse, block.BCoW, block.BCoWSingle} {
		t.Run(fmt.Sprint(format), func(t *testing.T) {
			data := bytes.Repeat([]byte("0123456789abcdef"), 8192)
			s := newStack(t, 1, func(p func(int, string) string) {
				put(t, p(0, "d/f"), string(data))
				put(t, p(0, "l1"), string(data))
				must(t, os.Link(p(0, "l1"), p(0, "l2")))
				put(t, p(0, "meta"), string(data))
			})
			s.umount()
			s.change = func(c *Config) {
				c.Engine.Close()
				c.Engine = block.NewEngine(block.Options{Format: format, Logf: t.Logf})
			}
			s.mount()
			s.write("d/f", "PATCH", 10000)
			s.write("l1", "PATCH", 10000)
			uid := uint32(3)
			_, err := s.fs.SetAttr(s.node("meta"), SetAttr{UID: &uid})
			must(t, err)
			must(t, s.rename("d/f", "moved", 0))
			want := map[string]string{}
			for _, p := range []string{"moved", "l1", "l2", "meta"} {
				want[p] = s.read(p)
			}
			s.umount()
			cfg := s.config()
			must(t, Flatten(cfg, func(string) {}))
			closeAll(cfg)
			for p, data := range want {
				got, err := os.ReadFile(s.upper(p))
				must(t, err)
				if st, err := os.Stat(s.upper(p)); err != nil || st.Mode() != 0o644 {
					t.Errorf("%s: flattened to mode %v (%v)", p, st.Mode(), err)
				}
				if string(got) != data {
					t.Errorf("%s: the flattened file differs (%d bytes, want %d)", p, len(got), len(data))
				}
				for _, x := range []string{"metacopy", "redirect"} {
					if _, err := unix.Lgetxattr(s.upper(p), "trusted.overlay."+x, nil); err != unix.ENODATA {
						t.Errorf("%s keeps overlay.%s: %v", p, x, err)
					}
				}
			}
			var a, b unix.Stat_t
			must(t, unix.Stat(s.upper("l1"), &a))
			must(t, unix.Stat(s.upper("l2"), &b))
			if a.Ino != b.Ino || a.Nlink != 2 {
				t.Errorf("the hard link broke: inodes %d and %d, %d links", a.Ino, b.Ino, a.Nlink)
			}
			s.mount()
			for p, data := range want {
				s.wantRead(p, data)
			}
		})
	}
}

// A committed upper layer full of sketches is the lower layer of the next container.
func TestChainOfSketches(t *testing.T) {
	data := strings.Repeat("0123456789abcdef", 8192)
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), data) })
	want := []byte(data)
	for i := range maxChain + 3 {
		patch := fmt.Sprintf("patch%02d", i)
		off := int64(i) * 3000
		s.write("f", patch, off)
		copy(want[off:], patch)
		s.wantRead("f", string(want))
		s.umount()
		next := filepath.Join(s.dir, fmt.Sprint("committed", i))
		must(t, os.Rename(s.upper(""), next))
		must(t, os.RemoveAll(s.work()))
		must(t, os.Mkdir(s.upper(""), 0o755))
		must(t, os.Mkdir(s.work(), 0o755))
		s.lowers = append([]string{next}, s.lowers...)
		s.mount()
		s.wantRead("f", string(want))
	}
}

func TestVolatileLeftoverIsRefused(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), "x") })
	s.umount()
	s.change = func(c *Config) { c.Volatile = true }
	s.mount()
	s.remount() // a clean end removes the mark
	cfg := s.config()
	defer closeAll(cfg)
	_, err := New(cfg)
	wantErr(t, err, ErrVolatile)
}

func TestReadOnlyUnion(t *testing.T) {
	s := newStack(t, 2, func(p func(int, string) string) {
		put(t, p(0, "d/a"), "a")
		put(t, p(1, "d/b"), "b")
	})
	s.umount()
	s.change = func(c *Config) { c.Upper.Close(); c.Work.Close(); c.Upper, c.Work = nil, nil }
	s.mount()
	defer func() { must(t, s.fs.Close()); s.fs = nil }()
	s.wantLs("d", "a", "b")
	s.wantRead("d/b", "b")
	_, err := s.fs.Open(s.node("d/a"), unix.O_RDWR)
	wantErr(t, err, unix.EROFS)
	wantErr(t, s.unlink("d/a"), unix.EROFS)
	_, err = s.fs.Mkdir(s.fs.Root(), "x", 0o755, Cred{})
	wantErr(t, err, unix.EROFS)
}

func TestSetIDAndCapabilitiesGoWithAWrite(t *testing.T) {
	caps := string([]byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "f"), "program")
		setx(t, p(0, "f"), "security.capability", caps)
		must(t, unix.Chmod(p(0, "f"), 0o6755))
	})
	n := s.node("f")
	if v, err := s.fs.Getxattr(n, "security.capability"); err != nil || string(v) != caps {
		t.Fatalf("capability %q %v", v, err)
	}
	h, err := s.fs.Open(n, unix.O_RDWR)
	must(t, err)
	defer h.Release()
	if v, err := s.fs.Getxattr(n, "security.capability"); err != nil || string(v) != caps {
		t.Fatalf("copy-up lost the capability: %q %v", v, err)
	}
	if st := s.stat("f"); st.Mode&0o7777 != 0o6755 {
		t.Fatalf("copy-up changed the mode to %o", st.Mode)
	}
	_, err = h.WriteAt([]byte("P"), 0, true)
	must(t, err)
	_, err = s.fs.Getxattr(n, "security.capability")
	wantErr(t, err, unix.ENODATA)
	if st := s.stat("f"); st.Mode&0o7777 != 0o755 {
		t.Errorf("mode %o after a write", st.Mode&0o7777)
	}
}
