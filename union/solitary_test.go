package union

import (
	"os"
	"testing"

	"lamina/layer"

	"golang.org/x/sys/unix"
)

// Some upper objects do not say which lower file they were copied up from: symbolic links and special files in the user.*
// namespace, and files with several names where there is no index. The node that the kernel knows has to go on with them.

func TestSymlinkOfUserNamespaceIsOneNode(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		must(t, os.MkdirAll(p(0, "d"), 0o755))
		must(t, os.Symlink("target", p(0, "d/link")))
		must(t, os.Symlink("twice", p(0, "d/one")))
		must(t, os.Link(p(0, "d/one"), p(0, "d/two")))
		must(t, unix.Mkfifo(p(0, "d/fifo"), 0o644))
		put(t, p(0, "d/over"), "o")
	})
	s.umount()
	s.layers.NS = layer.User
	s.change = func(c *Config) { c.NS = layer.User }
	s.mount()
	for name, to := range map[string]string{"link": "renamed", "fifo": "over", "one": "uno"} {
		n := s.node("d/" + name)
		ino := n.Ino()
		must(t, s.rename("d/"+name, "d/"+to, 0))
		st, err := s.fs.Attr(n)
		must(t, err)
		if st.Mode&unix.S_IFMT != n.Mode() || st.Ino != ino {
			t.Errorf("%s: the node is now %o, inode %d; it was inode %d", name, st.Mode, st.Ino, ino)
		}
		if again := s.node("d/" + to); again != n {
			t.Errorf("%s: a look-up finds another node", to)
		}
	}
	n := s.node("d/two")
	uid := uint32(7)
	_, err := s.fs.SetAttr(n, SetAttr{UID: &uid})
	must(t, err)
	if st := s.stat("d/two"); st.Uid != 7 {
		t.Errorf("d/two belongs to %d", st.Uid)
	}
	s.wantLs("d", "over", "renamed", "two", "uno")
	for name, want := range map[string]string{"renamed": "target", "two": "twice", "uno": "twice"} {
		if got, err := s.fs.Readlink(s.node("d/" + name)); err != nil || got != want {
			t.Errorf("%s -> %q %v", name, got, err)
		}
	}
	must(t, s.unlink("d/renamed"))
	must(t, s.unlink("d/two"))
	s.wantLs("d", "over", "uno")
	s.remount()
	s.wantLs("d", "over", "uno")
}

func TestHardLinkWithoutIndexIsOneNode(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "d/a"), "both")
		must(t, os.Link(p(0, "d/a"), p(0, "d/b")))
	})
	s.umount()
	s.change = func(c *Config) { c.Index = false }
	s.mount()
	n := s.node("d/a")
	must(t, s.rename("d/a", "d/c", 0))
	h, err := s.fs.Open(n, unix.O_RDWR)
	must(t, err)
	_, err = h.WriteAt([]byte("mine"), 0, false)
	must(t, err)
	h.Release()
	check := func() {
		t.Helper()
		s.wantLs("d", "b", "c")
		s.wantRead("d/c", "mine")
		s.wantRead("d/b", "both")
	}
	check()
	s.remount()
	check()
}
