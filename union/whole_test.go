package union

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hasHeader says whether the upper file still is a sketch on disk.
func (s *stack) hasHeader(path string) bool {
	_, err := unix.Lgetxattr(s.upper(path), "trusted.overlay.metacopy", nil)
	return err == nil
}

func openFile(t *testing.T, s *stack, path string) *Handle {
	t.Helper()
	h, err := s.fs.Open(s.node(path), unix.O_RDWR)
	must(t, err)
	return h
}

// A small file passes through from its first open for writing on, and shows the lower file again if the server is killed
// before anything was synced.
func TestSmallFileIsCopiedWhole(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "small"), strings.Repeat("a", wholeMax))
		put(t, p(0, "other"), strings.Repeat("a", wholeMax))
		put(t, p(0, "large"), strings.Repeat("a", wholeMax+1))
	})
	h, l := openFile(t, s, "small"), openFile(t, s, "large")
	fd, kind := h.Backing()
	if kind != BackingUpper {
		t.Fatalf("the small file's backing is %v", kind)
	}
	if _, kind := l.Backing(); kind != BackingNone {
		t.Errorf("the large file's backing is %v", kind)
	}
	l.Release()
	ino := s.stat("small").Ino
	if _, err := unix.Pwrite(fd, []byte("new"), wholeMax); err != nil { // what the kernel does
		t.Fatal(err)
	}
	if st := s.stat("small"); st.Size != wholeMax+3 || !s.hasHeader("small") {
		t.Errorf("size %d, header %v", st.Size, s.hasHeader("small"))
	}
	h.n.cur.Load().file.Abandon() // as SIGKILL does
	h.Release()
	s.remount()
	if now := s.stat("small").Ino; now != ino {
		t.Errorf("inode number %d, was %d", now, ino)
	}
	s.wantRead("small", strings.Repeat("a", wholeMax))

	ino = s.stat("other").Ino
	h = openFile(t, s, "other")
	_, err := h.WriteAt([]byte("B"), 0, false)
	must(t, err)
	must(t, h.Sync(false))
	if s.hasHeader("other") {
		t.Error("synced, and still a sketch")
	}
	h.Release()
	s.remount()
	s.wantRead("other", "B"+strings.Repeat("a", wholeMax-1))
	if now := s.stat("other").Ino; now != ino {
		t.Errorf("inode number %d, was %d", now, ino)
	}
}

// Without space for a copy the file is opened as a sketch, which takes none.
func TestSmallFileWithoutSpace(t *testing.T) {
	onFilesystem(t, "tmpfs", nil)
	t.Run("full", func(t *testing.T) { // with a temporary directory on that filesystem
		s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), strings.Repeat("a", wholeMax)) })
		filler, err := os.Create(filepath.Join(s.dir, "filler"))
		must(t, err)
		defer filler.Close()
		if free := s.free(); free > 1<<30 {
			t.Fatalf("%d bytes free: this is not the small filesystem that was made to be filled", free)
		}
		for free := s.free(); free >= 0 && err == nil; free -= 4096 {
			_, err = filler.Write(make([]byte, 4096))
		}
		wantErr(t, err, unix.ENOSPC)
		h := openFile(t, s, "f")
		if _, kind := h.Backing(); kind != BackingNone {
			t.Errorf("backing %v on a full disk", kind)
		}
		h.Release()
		must(t, filler.Truncate(0))
		s.wantRead("f", strings.Repeat("a", wholeMax))
	})
}

// A file without a name can be opened, and changed, until the kernel forgets it.
func TestNamelessFileIsKept(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {})
	s.create("f", "data")
	n := s.node("f")
	must(t, s.unlink("f"))
	mode := uint32(0o600)
	st, err := s.fs.SetAttr(n, SetAttr{Mode: &mode})
	must(t, err)
	if st.Nlink != 0 || st.Mode&0o777 != mode {
		t.Errorf("links %d, mode %o", st.Nlink, st.Mode)
	}
	h, err := s.fs.Open(n, unix.O_RDWR)
	must(t, err)
	got := make([]byte, 4)
	if _, err := h.ReadAt(got, 0); err != nil || string(got) != "data" {
		t.Errorf("read %q, %v", got, err)
	}
	h.Release()
}

// What is remembered of attributes changes with them.
func TestCapabilitiesAreNoticed(t *testing.T) {
	const caps = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // VFS_CAP_REVISION_2, CAP_NET_BIND_SERVICE
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "bare"), "data")
		put(t, p(0, "capable"), "data")
		setx(t, p(0, "capable"), capability, caps)
	})
	s.create("new", "data")
	for _, name := range []string{"bare", "new"} {
		_, err := s.fs.Getxattr(s.node(name), capability)
		wantErr(t, err, unix.ENODATA)
		must(t, s.fs.Setxattr(s.node(name), capability, []byte(caps), 0, false))
	}
	for _, name := range []string{"bare", "new", "capable"} {
		v, err := s.fs.Getxattr(s.node(name), capability)
		if err != nil || string(v) != caps {
			t.Errorf("%s: %q, %v", name, v, err)
		}
		mode := uint32(0o755)
		_, err = s.fs.SetAttr(s.node(name), SetAttr{Mode: &mode})
		must(t, err)
		if _, err := s.fs.Getxattr(s.node(name), capability); err != nil {
			t.Errorf("%s: a chmod took the capabilities: %v", name, err)
		}
		s.write(name, "D", 0)
		_, err = s.fs.Getxattr(s.node(name), capability)
		wantErr(t, err, unix.ENODATA)
	}
}

// Set-id bits that come with a chmod go with a write, whatever was known of the file before.
func TestSetIDAfterChmodIsNoticed(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {})
	s.create("f", "data")
	mode := uint32(0o4755)
	_, err := s.fs.SetAttr(s.node("f"), SetAttr{Mode: &mode})
	must(t, err)
	h := openFile(t, s, "f")
	defer h.Release()
	_, err = h.WriteAt([]byte("D"), 0, true)
	must(t, err)
	if m := s.stat("f").Mode & 0o7777; m != 0o755 {
		t.Errorf("mode %o after a write", m)
	}
}

// New objects take after their directory as it is now, not as it was when the first of them was made.
func TestDirectorysGroupIsNoticed(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {})
	s.mkdir("d")
	s.create("d/before", "")
	gid, mode := uint32(77), uint32(0o2755)
	_, err := s.fs.SetAttr(s.node("d"), SetAttr{GID: &gid, Mode: &mode})
	must(t, err)
	s.create("d/after", "")
	if g := s.stat("d/after").Gid; g != gid {
		t.Errorf("group %d, want %d", g, gid)
	}
	if g := s.stat("d/before").Gid; g == gid {
		t.Error("the older file changed its group")
	}
}

// Spares are made when files are copied up, and given back.
func TestSpares(t *testing.T) {
	made := 0
	s := spares{make: func() (spare, error) {
		made++
		fd, err := unix.Open(t.TempDir(), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		return spare{fd, 1}, err
	}}
	wait := func() {
		for s.mu.Lock(); s.making; s.mu.Lock() {
			s.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		s.mu.Unlock()
	}
	if _, ok := s.take(); ok {
		t.Error("there is one already")
	}
	wait()
	if len(s.list) != minSpares {
		t.Errorf("%d spares", len(s.list))
	}
	for range minSpares {
		sp, ok := s.take()
		if !ok {
			t.Error("none left")
		}
		unix.Close(sp.fd)
		wait()
	}
	if made < minSpares+1 {
		t.Errorf("%d were made", made)
	}
	s.close()
	if _, ok := s.take(); ok {
		t.Error("there is one after close")
	}
}
