package union

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// What is said of a new object without looking at it again is what a look says, and what its children inherit without a
// look is what the directory passes on.
func TestMadeAttributes(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		for _, dir := range []string{"plain", "setgid", "acl"} {
			must(t, os.Mkdir(p(0, dir), 0o755))
			put(t, p(0, dir+"/gone"), "x")
			put(t, p(0, dir+"/back"), "x")
		}
		must(t, os.Chown(p(0, "setgid"), 0, 77))
		must(t, os.Chmod(p(0, "setgid"), 0o755|os.ModeSetgid))
	})
	// user::rwx group::r-x mask::rwx other::---, and user 5 may do all
	setDefaultACL(t, s, "acl", "\x02\x00\x00\x00"+"\x01\x00\x07\x00\xff\xff\xff\xff"+"\x02\x00\x07\x00\x05\x00\x00\x00"+
		"\x04\x00\x05\x00\xff\xff\xff\xff"+"\x10\x00\x07\x00\xff\xff\xff\xff"+"\x20\x00\x00\x00\xff\xff\xff\xff")
	for _, top := range []string{"plain", "setgid", "acl"} {
		must(t, s.unlink(top+"/gone"))
		must(t, s.unlink(top+"/back"))
		dir := s.node(top)
		back, h, err := s.fs.Create(dir, "back", unix.O_RDWR, 0o666, Cred{UID: 5})
		must(t, err)
		s.wantMade(back)
		h.Release()
		for depth := range 3 {
			for i, c := range []Cred{{Umask: 0o22}, {UID: 5, GID: 6, Umask: 0o77}} {
				name := func(kind string) string { return fmt.Sprintf("%s-%d-%d", kind, depth, i) }
				f, h, err := s.fs.Create(dir, name("file"), unix.O_RDWR|unix.O_EXCL, 0o4777, c)
				must(t, err)
				s.wantMade(f)
				h.Release()
				s.wantMade(f)
				l, err := s.fs.Symlink(dir, name("link"), "target", c)
				must(t, err)
				s.wantMade(l)
				p, err := s.fs.Mknod(dir, name("fifo"), unix.S_IFIFO|0o666, 0, c)
				must(t, err)
				s.wantMade(p)
				tmp, h, err := s.fs.Tmpfile(dir, unix.O_RDWR, 0o666, c)
				must(t, err)
				s.wantMade(tmp)
				h.Release()
			}
			name := "gone" // once in the place of a whiteout
			if depth > 0 {
				name = "dir"
			}
			d, err := s.fs.Mkdir(dir, name, 0o777, Cred{UID: 5, GID: 6, Umask: 0o22})
			must(t, err)
			s.wantMade(d)
			s.wantHeritage(d)
			dir = d
		}
	}
}

// setDefaultACL gives a directory a default ACL, through the union.
func setDefaultACL(t *testing.T, s *stack, dir, acl string) {
	t.Helper()
	must(t, s.fs.Setxattr(s.node(dir), aclDefault, []byte(acl), 0, false))
}

func (s *stack) wantMade(n *Node) {
	s.t.Helper()
	want, err := s.fs.Attr(n)
	must(s.t, err)
	if got := s.fs.AttrMade(n); got != want {
		s.t.Errorf("made: %+v\nis:   %+v", got, want)
	}
}

// wantHeritage compares what is known of a new directory with what it says itself.
func (s *stack) wantHeritage(n *Node) {
	s.t.Helper()
	known := n.heritage.Load()
	if known == nil {
		s.t.Error("nothing is known of what a new directory passes on")
		return
	}
	n.heritage.Store(nil)
	s.fs.tree.Lock()
	defer s.fs.tree.Unlock()
	asked, err := s.fs.heritageOf(n, n.path())
	must(s.t, err)
	if *known != *asked {
		s.t.Errorf("%s: taken for %+v, is %+v", n.path(), *known, *asked)
	}
}

// A directory that was removed is gone from the workdir when the union is closed, whatever was in it.
func TestDiscardedInTheEnd(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		for i := range 2 * maxDiscards {
			put(t, p(0, fmt.Sprintf("d%d/f", i)), "x")
		}
	})
	for i := range 2 * maxDiscards {
		must(t, s.unlink(fmt.Sprintf("d%d/f", i)))
		must(t, s.rmdir(fmt.Sprintf("d%d", i)))
	}
	s.wantLs("")
	s.umount()
	if left, err := os.ReadDir(filepath.Join(s.work(), tmpDir)); err != nil || len(left) > 0 {
		t.Errorf("left in %s: %v %v", tmpDir, left, err)
	}
	s.mount()
	s.wantLs("")
}
