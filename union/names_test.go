package union

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Kernel overlayfs writes a redirect relative to the parent when a directory stays there. A directory that leaves its
// parent must not take such a one along.
func TestRelativeRedirectDoesNotMove(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "a/old/f"), "right")
		put(t, p(0, "b/old/f"), "wrong")
	})
	s.umount()
	must(t, os.MkdirAll(s.upper("a/new"), 0o755))
	setx(t, s.upper("a/new"), "trusted.overlay.redirect", "old")
	mkWhiteout(t, s.upper("a/old"))
	s.mount()
	s.wantRead("a/new/f", "right")
	must(t, s.rename("a/new", "b/new", 0))
	s.wantRead("b/new/f", "right")
	s.remount()
	s.wantRead("b/new/f", "right")
}

// Without redirects of directories a sketch can still be renamed, and finds its blocks.
func TestSketchIsRenamedWithoutRedirectDir(t *testing.T) {
	data := strings.Repeat("a", 20000)
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "d/f"), data)
		put(t, p(0, "e/g"), "g")
	})
	s.umount()
	s.change = func(c *Config) { c.Redirect, c.Follow = false, false }
	s.mount()
	s.write("d/f", "X", 5000)
	must(t, s.rename("d/f", "e/f", 0))
	want := data[:5000] + "X" + data[5001:]
	s.wantRead("e/f", want)
	s.remount()
	s.wantRead("e/f", want)
	wantErr(t, s.rename("d", "x", 0), unix.EXDEV)
}

// A directory with a forged redirect cannot be entered; what lies beside it is listed and works.
func TestDamagedEntryDoesNotHideItsNeighbours(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "d/f"), "f") })
	s.mkdir("d/bad")
	s.mkdir("d/good")
	s.umount()
	setx(t, s.upper("d/bad"), "trusted.overlay.redirect", "../../etc")
	s.mount()
	defer func() { // fsck says what it finds: not through umount, which wants nothing found
		must(t, s.fs.Close())
		s.fs = nil
	}()
	var names []string
	must(t, s.fs.ReadDir(s.node("d"), offDotDot, func(e DirEntry) bool { names = append(names, e.Name); return true }))
	if len(names) != 3 {
		t.Errorf("d lists %q, want bad, f and good", names)
	}
	_, err := s.find("d/bad")
	wantErr(t, err, unix.EIO)
	s.wantRead("d/f", "f")
	cfg := s.config()
	defer closeAll(cfg)
	var found []string
	must(t, Fsck(cfg, false, func(f Finding) { found = append(found, f.Path) }))
	if len(found) != 1 || found[0] != "d/bad" {
		t.Errorf("fsck found %q", found)
	}
}
