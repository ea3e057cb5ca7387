package traps

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/tests/mnt"
)

// reading says how a reader looks at a file.
type reading struct {
	name string
	read func(t *testing.T, fd int, n int) []byte
}

var readings = []reading{
	{"read", func(t *testing.T, fd int, n int) []byte { return pread(t, fd, n, 0) }},
	{"mmap", func(t *testing.T, fd int, n int) []byte {
		m, err := unix.Mmap(fd, 0, n, unix.PROT_READ, unix.MAP_SHARED)
		check(t, err)
		defer func() { check(t, unix.Munmap(m)) }()
		return bytes.Clone(m)
	}},
}

// A reader and a later writer of one file see one file: image package managers break otherwise. Both orders, by read and
// by a fresh mapping, over every passthrough mode.
func TestTrapReaderAndWriterSeeOneFile(t *testing.T) {
	eachPassthrough(t, func(t *testing.T, passthrough string) {
		for _, r := range readings {
			for _, readerFirst := range []bool{true, false} {
				if readerFirst && passthrough == "on" {
					continue // the option's documented price: such a reader keeps the old bytes
				}
				t.Run(fmt.Sprintf("%s/readerFirst=%t", r.name, readerFirst), func(t *testing.T) {
					want := data(1, 10*block)
					m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": want})}, "passthrough="+passthrough)
					want = bytes.Clone(want)
					var reader int
					if readerFirst {
						reader = open(t, m.Path("f"), unix.O_RDONLY)
						r.read(t, reader, len(want)) // fills every cache that there is
					}
					writer := open(t, m.Path("f"), unix.O_RDWR)
					if !readerFirst {
						reader = open(t, m.Path("f"), unix.O_RDONLY)
						r.read(t, reader, len(want))
					}
					// Partial, whole, and growing writes, then all blocks, so that the file completes.
					for i, w := range []struct{ off, n int }{{5, 10}, {2 * block, block}, {3*block - 1, 2*block + 2}, {10 * block, 300}, {0, 10*block + 300}} {
						p := data(50+i, w.n)
						pwrite(t, writer, p, int64(w.off))
						want = append(want[:w.off], append(p, want[min(len(want), w.off+w.n):]...)...)
						if got := r.read(t, reader, len(want)); !bytes.Equal(got, want) {
							t.Fatalf("write %d: the reader sees other bytes from %d on", i, firstDifference(got, want))
						}
						check(t, unix.Fsync(writer))
						late := open(t, m.Path("f"), unix.O_RDONLY)
						if got := r.read(t, late, len(want)); !bytes.Equal(got, want) {
							t.Fatalf("write %d: a late reader sees other bytes from %d on", i, firstDifference(got, want))
						}
					}
					check(t, unix.Ftruncate(writer, 5000))
					if got := pread(t, reader, len(want), 0); !bytes.Equal(got, want[:5000]) {
						t.Errorf("after truncation the reader sees %d bytes", len(got))
					}
				})
			}
		}
	})
}

// A mapping made before the first write of another descriptor.
func TestTrapLiveMappingSeesWrites(t *testing.T) {
	for _, p := range []string{"auto", "off"} {
		t.Run("passthrough="+p, func(t *testing.T) {
			m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": data(1, 4*block)})}, "passthrough="+p)
			reader := open(t, m.Path("f"), unix.O_RDONLY)
			live, err := unix.Mmap(reader, 0, 4*block, unix.PROT_READ, unix.MAP_SHARED)
			check(t, err)
			defer func() { check(t, unix.Munmap(live)) }()
			_ = live[2*block] // faulted in
			check(t, patch(m.Path("f"), "written later", 2*block))
			if !bytes.HasPrefix(live[2*block:], []byte("written later")) {
				t.Error("a live mapping does not see a later write")
			}
		})
	}
}

// A file that was passed through, was closed, and is opened in another mode: no stale pages.
func TestTrapNoStalePagesBetweenModes(t *testing.T) {
	eachPassthrough(t, func(t *testing.T, passthrough string) {
		want := append([]byte("\x7fELF"), data(1, 8*block)...)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": want})}, "passthrough="+passthrough)
		want = bytes.Clone(want)
		for round := range 6 {
			wantFile(t, m.Path("f"), want)
			p := data(round, 2000)
			off := (round * 5000) % (7 * block)
			check(t, patch(m.Path("f"), string(p), int64(off)))
			copy(want[off:], p)
			if round == 3 { // everything, so that it completes and passes through as an upper file
				want = append([]byte("\x7fELF"), data(9, 8*block)...)
				check(t, patch(m.Path("f"), string(want), 0))
				fd, shut := opened(t, m.Path("f"), unix.O_RDONLY)
				check(t, unix.Fsync(fd))
				shut()
			}
			wantFile(t, m.Path("f"), want)
		}
		m.Remount()
		wantFile(t, m.Path("f"), want)
	})
}

// Running an image's program, and writing to it while it runs: as on the plain filesystem.
func TestTrapRunningExecutableIsBusy(t *testing.T) {
	sleep, err := os.ReadFile("/bin/sleep")
	check(t, err)
	dir := lowerWith(t, map[string][]byte{"sleep": sleep})
	check(t, os.Chmod(filepath.Join(dir, "sleep"), 0o755))
	plain := mnt.Dirs(t, "plain")[0]
	fill(t, plain, map[string][]byte{"sleep": sleep})
	check(t, os.Chmod(filepath.Join(plain, "sleep"), 0o755))

	eachPassthrough(t, func(t *testing.T, passthrough string) {
		m := mnt.New(t, []string{dir}, "passthrough="+passthrough)
		want := writeWhileRunning(t, filepath.Join(plain, "sleep"))
		if got := writeWhileRunning(t, m.Path("sleep")); !errors.Is(got, want) {
			t.Errorf("writing to a running executable: %v, on the plain filesystem: %v", got, want)
		}
		wantFile(t, filepath.Join(dir, "sleep"), sleep)

		fd := open(t, m.Path("sleep"), unix.O_WRONLY)
		if err := exec.Command(m.Path("sleep"), "0").Run(); !errors.Is(err, unix.ETXTBSY) {
			t.Errorf("running a file that is open for writing: %v, want ETXTBSY", err)
		}
		pwrite(t, fd, sleep[:100], 0)
	})
}

func writeWhileRunning(t *testing.T, path string) error {
	t.Helper()
	cmd := exec.Command(path, "60")
	check(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// Programs and their libraries run from the image, also after the image's copy was replaced by rename, as package
// managers do.
func TestImageProgramsRun(t *testing.T) {
	eachPassthrough(t, func(t *testing.T, passthrough string) {
		echo, err := os.ReadFile("/bin/echo")
		check(t, err)
		dir := lowerWith(t, map[string][]byte{"bin/echo": echo})
		check(t, os.Chmod(filepath.Join(dir, "bin/echo"), 0o755))
		m := mnt.New(t, []string{dir}, "passthrough="+passthrough)
		run := func() {
			t.Helper()
			if out, err := exec.Command(m.Path("bin/echo"), "hello").Output(); err != nil || string(out) != "hello\n" {
				t.Errorf("%q, %v", out, err)
			}
		}
		run()
		check(t, os.WriteFile(m.Path("bin/.new"), echo, 0o755))
		check(t, os.Chmod(m.Path("bin/.new"), 0o755))
		check(t, os.Rename(m.Path("bin/.new"), m.Path("bin/echo")))
		run()
		check(t, os.Chmod(m.Path("bin/echo"), 0o700))
		run()
	})
}

// flock and POSIX locks are about the file, not about where its bytes are at the moment.
func TestTrapLocksSurviveCopyUp(t *testing.T) {
	m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": data(1, block), "g": data(1, block)})})
	before := open(t, m.Path("f"), unix.O_RDONLY)
	check(t, unix.Flock(before, unix.LOCK_EX))
	after := open(t, m.Path("f"), unix.O_RDWR)
	pwrite(t, after, []byte("x"), 0)
	wantErrno(t, "flock of a locked file", unix.Flock(after, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
	check(t, unix.Flock(before, unix.LOCK_UN))
	check(t, unix.Flock(after, unix.LOCK_EX|unix.LOCK_NB))

	lock := func(fd int, kind int16) error {
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: 10, Len: 5})
	}
	reader := open(t, m.Path("g"), unix.O_RDONLY)
	check(t, lock(reader, unix.F_RDLCK))
	writer := open(t, m.Path("g"), unix.O_RDWR)
	wantErrno(t, "write lock under a read lock", lock(writer, unix.F_WRLCK), unix.EAGAIN, unix.EACCES)
	check(t, lock(reader, unix.F_UNLCK))
	check(t, lock(writer, unix.F_WRLCK))
}

// Hard links between lower files stay hard links after copy-up, through remounts and removals.
func TestTrapHardLinksSurviveCopyUp(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		want := data(1, 20*block)
		dir := lowerWith(t, map[string][]byte{"a": want, "d/": nil, "e/": nil})
		check(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "d/b")))
		check(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "e/c")))
		m := mnt.New(t, []string{dir}, format)
		want = bytes.Clone(want)
		names := []string{"a", "d/b", "e/c"}
		ino := linked(t, m, names, 3)
		early, shut := opened(t, m.Path("e/c"), unix.O_RDONLY)
		check(t, patch(m.Path("d/b"), "through b", 5*block))
		copy(want[5*block:], "through b")
		if got := pread(t, early, len(want), 0); !bytes.Equal(got, want) {
			t.Error("a descriptor of another link, opened before, does not see the write")
		}
		shut()
		for range 2 {
			if got := linked(t, m, names, 3); got != ino {
				t.Errorf("inode number changed from %d to %d", ino, got)
			}
			for _, n := range names {
				wantFile(t, m.Path(n), want)
			}
			m.Remount()
		}
		check(t, unix.Unlink(m.Path("a")))
		check(t, unix.Link(m.Path("e/c"), m.Path("f")))
		check(t, unix.Unlink(m.Path("d/b")))
		for range 2 {
			linked(t, m, []string{"e/c", "f"}, 2)
			wantFile(t, m.Path("f"), want)
			m.Remount()
		}
	})
}

// linked checks that names are one file with that many links, and returns its number.
func linked(t *testing.T, m *mnt.T, names []string, links int) uint64 {
	t.Helper()
	var ino uint64
	for _, n := range names {
		var st unix.Stat_t
		check(t, unix.Lstat(m.Path(n), &st))
		if ino == 0 {
			ino = st.Ino
		}
		if st.Ino != ino || int(st.Nlink) != links {
			t.Errorf("%s: inode %d, %d links; want inode %d, %d links", n, st.Ino, st.Nlink, ino, links)
		}
	}
	return ino
}

// Open files outlive their names, as sketches and as whole files.
func TestOpenUnlinkedFiles(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		want := data(1, 10*block)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"untouched": want, "sketch": want, "late": want, "over": want})}, format)
		untouched := open(t, m.Path("untouched"), unix.O_RDONLY)
		check(t, unix.Unlink(m.Path("untouched")))
		sketch := open(t, m.Path("sketch"), unix.O_RDWR)
		pwrite(t, sketch, []byte("x"), 3*block)
		check(t, unix.Unlink(m.Path("sketch")))
		late := open(t, m.Path("late"), unix.O_RDWR) // first written when it has no name any more
		check(t, unix.Unlink(m.Path("late")))
		pwrite(t, late, []byte("x"), 3*block)
		over := open(t, m.Path("over"), unix.O_RDWR)
		check(t, os.WriteFile(m.Path("new"), []byte("new"), 0o644))
		check(t, os.Rename(m.Path("new"), m.Path("over")))
		pwrite(t, over, []byte("x"), 3*block)

		for name, fd := range map[string]int{"untouched": untouched, "sketch": sketch, "late": late, "over": over} {
			w := bytes.Clone(want)
			if name != "untouched" {
				w[3*block] = 'x'
			}
			if got := pread(t, fd, len(w)+1, 0); !bytes.Equal(got, w) {
				t.Errorf("%s: wrong bytes from %d on", name, firstDifference(got, w))
			}
			var st unix.Stat_t
			check(t, unix.Fstat(fd, &st))
			if st.Nlink != 0 || st.Size != int64(len(w)) {
				t.Errorf("%s: nlink %d, size %d", name, st.Nlink, st.Size)
			}
		}
		wantFile(t, m.Path("over"), []byte("new"))
	})
}

// Entries come and go while a directory is read: every entry that stays is seen once.
func TestTrapReaddirWhileEntriesComeAndGo(t *testing.T) {
	const n = 3000
	files := map[string][]byte{}
	for i := range n {
		files[fmt.Sprintf("d/lower%04d", i)] = nil
	}
	m := mnt.New(t, []string{lowerWith(t, files)})
	for i := range 500 {
		check(t, os.WriteFile(m.Path("d", fmt.Sprintf("upper%04d", i)), nil, 0o644))
	}
	dir, err := os.Open(m.Path("d"))
	check(t, err)
	defer dir.Close()
	seen := map[string]int{}
	for round := 0; ; round++ {
		names, err := dir.Readdirnames(50)
		for _, name := range names {
			seen[name]++
		}
		if errors.Is(err, io.EOF) {
			break
		}
		check(t, err)
		// Some go that were seen and some that were not, some come, some are renamed.
		_ = os.Remove(m.Path("d", fmt.Sprintf("lower%04d", round*37%n)))
		_ = os.WriteFile(m.Path("d", fmt.Sprintf("born%04d", round)), nil, 0o644)
		_ = os.Rename(m.Path("d", fmt.Sprintf("lower%04d", round*53%n)), m.Path("d", fmt.Sprintf("renamed%04d", round)))
		if round > 10*n {
			t.Fatal("readdir never ends")
		}
	}
	entries, err := os.ReadDir(m.Path("d"))
	check(t, err)
	for _, e := range entries {
		if name := e.Name(); name[:5] == "lower" || name[:5] == "upper" {
			if seen[name] != 1 {
				t.Errorf("%s stayed all the time and was seen %d times", name, seen[name])
			}
		}
	}
	for name, times := range seen {
		if times > 1 {
			t.Errorf("%s was seen %d times", name, times)
		}
	}
}

// telldir's positions stay good.
func TestReaddirOffsetsAreStable(t *testing.T) {
	files := map[string][]byte{}
	for i := range 400 {
		files[fmt.Sprintf("d/f%03d", i)] = nil
	}
	m := mnt.New(t, []string{lowerWith(t, files)})
	fd := open(t, m.Path("d"), unix.O_RDONLY|unix.O_DIRECTORY)
	type place struct {
		off  int64
		next string
	}
	var places []place
	buf := make([]byte, 1024)
	for {
		off, err := unix.Seek(fd, 0, unix.SEEK_CUR)
		check(t, err)
		n, err := unix.Getdents(fd, buf)
		check(t, err)
		if n == 0 {
			break
		}
		places = append(places, place{off, firstName(buf)})
	}
	if len(places) < 10 {
		t.Fatalf("only %d reads", len(places))
	}
	check(t, os.WriteFile(m.Path("d/another"), nil, 0o644))
	for i := len(places) - 1; i >= 0; i-- {
		_, err := unix.Seek(fd, places[i].off, unix.SEEK_SET)
		check(t, err)
		_, err = unix.Getdents(fd, buf)
		check(t, err)
		if got := firstName(buf); got != places[i].next {
			t.Errorf("position %d: %q, and %q before", places[i].off, got, places[i].next)
		}
	}
}

func firstName(dirents []byte) string {
	return unix.ByteSliceToString(dirents[19 : int(dirents[16])|int(dirents[17])<<8])
}

// Programs that receive signals all the time (every Go program does) must not see EINTR from local work.
func TestTrapSignalsDoNotInterrupt(t *testing.T) {
	m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": data(1, 1<<20)})})
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Kill(os.Getpid(), unix.SIGURG)
				time.Sleep(20 * time.Microsecond)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	var st unix.Stat_t
	for i := range 400 {
		p := m.Path(fmt.Sprintf("new%d", i))
		fd, err := unix.Open(p, unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
		check(t, err)
		_, err = unix.Pwrite(fd, data(i, 5000), 0)
		check(t, err)
		check(t, unix.Fsync(fd))
		check(t, unix.Close(fd))
		check(t, unix.Rename(p, m.Path("renamed")))
		wantErrno(t, "lstat of what is not there", unix.Lstat(m.Path(fmt.Sprintf("missing%d", i)), &st), unix.ENOENT)
		check(t, patch(m.Path("f"), "x", int64(i)*2000))
	}
}
