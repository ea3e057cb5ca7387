package union

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// whStack is a stack whose layers Podman unpacked for a mount program: ".wh." files are whiteouts.
func whStack(t *testing.T, n int, fill func(lower func(i int, path string) string)) *stack {
	t.Helper()
	s := newStack(t, n, fill)
	s.umount()
	s.layers.WhiteoutFiles = true
	s.mount()
	return s
}

func TestWhiteoutFiles(t *testing.T) {
	s := whStack(t, 3, func(p func(int, string) string) {
		put(t, p(2, "d/bottom"), "b")
		put(t, p(2, "d/gone"), "g")
		put(t, p(2, "d/again"), "old")
		put(t, p(2, "d/dir/old"), "o")
		put(t, p(2, "o/hidden"), "h")
		put(t, p(2, "o2/hidden"), "h")
		put(t, p(1, "d/middle"), "m")
		put(t, p(1, "d/.wh.gone"), "")
		put(t, p(1, "d/.wh.again"), "")
		put(t, p(1, "d/again"), "new")
		put(t, p(1, "d/.wh.dir"), "")
		put(t, p(1, "d/dir/new"), "n")
		put(t, p(1, "o/new"), "n")
		put(t, p(1, "o/.wh..wh..opq"), "")
		put(t, p(0, "d/.wh.middle"), "")
		put(t, p(0, "d/.wh."), "says nothing")
		must(t, os.Symlink("/etc", p(0, "d/.wh.nothing")))
	})
	check := func() {
		t.Helper()
		s.wantLs("d", "again", "bottom", "dir")
		s.wantRead("d/again", "new")
		s.wantLs("d/dir", "new")
		s.wantLs("o", "new")
		s.wantLs("o2", "hidden")
		for _, name := range []string{"d/gone", "d/middle", "d/.wh.gone", "d/.wh.", "d/.wh.nothing", "d/nothing", "d/dir/old", "o/hidden", "o/.wh..wh..opq"} {
			_, err := s.find(name)
			wantErr(t, err, unix.ENOENT)
		}
	}
	check()
	s.remount()
	check()

	// An image cannot hold such a name.
	d := s.node("d")
	for _, name := range []string{".wh.x", ".wh.", ".wh..wh..opq"} {
		_, err := s.fs.Mkdir(d, name, 0o755, Cred{})
		wantErr(t, err, unix.EINVAL)
		_, _, err = s.fs.Create(d, name, unix.O_RDWR, 0o644, Cred{})
		wantErr(t, err, unix.EINVAL)
		wantErr(t, s.rename("d/again", "d/"+name, 0), unix.EINVAL)
		wantErr(t, s.unlink("d/"+name), unix.ENOENT)
	}
	s.wantRead("d/again", "new")
	if _, err := os.Lstat(s.upper("d/.wh.x")); err == nil {
		t.Error("a name was made that would hide another")
	}
}

// In a layer of an image that is written to, which Podman's import of a layer does.
func TestWhiteoutFilesInTheUpperLayer(t *testing.T) {
	names := []string{"file", "dir", "moved", "movedto", "link", "empty/x", "replaced/x"}
	s := whStack(t, 1, func(p func(int, string) string) {
		for _, n := range names {
			put(t, p(0, "d/"+n+"/lower"), n)
		}
		put(t, p(0, "e/source/lower"), "source")
		put(t, p(0, "e/f"), "f")
	})
	s.umount()
	for _, n := range []string{"file", "dir", "moved", "movedto", "link", "empty/.wh.x", "replaced/.wh.x"} {
		if n[len(n)-1] != 'x' {
			n = ".wh." + n
		}
		put(t, s.upper("d/"+n), "")
	}
	s.mount()
	s.wantLs("d", "empty", "replaced")
	s.create("d/file", "new")
	s.mkdir("d/dir")
	must(t, s.rename("e/source", "d/moved", 0))  // a lower directory, with a redirect
	s.mkdir("e/fresh")                           //
	must(t, s.rename("e/fresh", "d/movedto", 0)) // a directory without one
	_, err := s.fs.Link(s.node("e/f"), s.node("d"), "link")
	must(t, err)
	must(t, s.rmdir("d/empty"))
	s.mkdir("e/over")
	must(t, s.rename("e/over", "d/replaced", 0))
	check := func() {
		t.Helper()
		s.wantLs("d", "dir", "file", "link", "moved", "movedto", "replaced")
		s.wantRead("d/file", "new")
		s.wantRead("d/link", "f")
		s.wantLs("d/dir")
		s.wantLs("d/moved", "lower")
		s.wantRead("d/moved/lower", "source")
		s.wantLs("d/movedto")
		s.wantLs("d/replaced")
		s.wantLs("e", "f")
	}
	check()
	s.remount()
	check()
	// What goes leaves the lower one hidden.
	must(t, s.unlink("d/file"))
	must(t, s.rmdir("d/dir"))
	must(t, s.rename("d/movedto", "e/back", 0))
	s.remount()
	s.wantLs("d", "link", "moved", "replaced")
	s.wantLs("e/back")
}

// Elsewhere they are files like any other.
func TestWhiteoutFilesAreFilesByDefault(t *testing.T) {
	s := newStack(t, 2, func(p func(int, string) string) {
		put(t, p(1, "d/f"), "f")
		put(t, p(0, "d/.wh.f"), "a file")
	})
	s.wantLs("d", ".wh.f", "f")
	s.wantRead("d/.wh.f", "a file")
	s.create("d/.wh.g", "g")
	s.wantRead("d/.wh.g", "g")
}
