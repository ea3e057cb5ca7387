package survive

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

// TestNamelessFiles: files whose last name goes while they are open live on through deaths before and after that, and their
// space is free when they are closed.
func TestNamelessFiles(t *testing.T) {
	lower := mnt.Dirs(t, "lower")[0]
	big, small := layers.Bytes(5, 1<<20), layers.Bytes(6, 5000)
	kinds := map[string][]byte{"sketch": big, "whole": small, "untouched": big, "replaced": big, "linked": small}
	for name, b := range kinds {
		if err := os.WriteFile(filepath.Join(lower, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m := start(t, lower)
	type file struct {
		fd   int
		want []byte
	}
	files := map[string]*file{}
	open := func(name string, flags int, want []byte) {
		t.Helper()
		fd, err := unix.Open(m.Path(name), flags|unix.O_CLOEXEC, 0o600)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		f := &file{fd, bytes.Clone(want)}
		files[name] = f
		t.Cleanup(func() {
			if f.fd >= 0 {
				unix.Close(f.fd)
			}
		})
	}
	write := func(round int) {
		t.Helper()
		for name, f := range files {
			if name == "untouched" {
				continue
			}
			p := fmt.Appendf(nil, "%s, round %d", name, round)
			if _, err := unix.Pwrite(f.fd, p, int64(100*round)); err != nil {
				t.Fatalf("writing to %s: %v", name, err)
			}
			if n := 100*round + len(p); n > len(f.want) {
				f.want = append(f.want, make([]byte, n-len(f.want))...)
			}
			copy(f.want[100*round:], p)
			if err := unix.Fsync(f.fd); err != nil && round%2 == 0 {
				t.Fatalf("syncing %s: %v", name, err)
			}
		}
	}
	look := func(nlink uint64) {
		t.Helper()
		for name, f := range files {
			got := make([]byte, len(f.want)+1)
			n, err := unix.Pread(f.fd, got, 0)
			if err == nil {
				err = same(name, got[:n], f.want)
			}
			var st unix.Stat_t
			if err == nil {
				err = unix.Fstat(f.fd, &st)
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if st.Size != int64(len(f.want)) || name != "linked" && name != "nameless" && st.Nlink != nlink {
				t.Fatalf("%s: size %d and %d names, want %d and %d", name, st.Size, st.Nlink, len(f.want), nlink)
			}
		}
	}
	open("sketch", unix.O_RDWR, big)
	open("whole", unix.O_RDWR, small)
	open("replaced", unix.O_RDWR, big)
	open("linked", unix.O_RDWR, small)
	open("untouched", unix.O_RDONLY, big)
	open("new", unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, nil)
	fd, err := unix.Open(m.Dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	nameless := &file{fd: fd}
	files["nameless"] = nameless
	t.Cleanup(func() { unix.Close(nameless.fd) })

	write(0)
	m.Die()
	look(1)
	write(1)
	for _, err := range []error{
		unix.Link(m.Path("linked"), m.Path("other")),
		unix.Unlink(m.Path("linked")),
		unix.Unlink(m.Path("sketch")),
		unix.Unlink(m.Path("whole")),
		unix.Unlink(m.Path("untouched")),
		unix.Unlink(m.Path("new")),
		os.WriteFile(m.Path("over"), []byte("over"), 0o644),
		unix.Rename(m.Path("over"), m.Path("replaced")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	look(0)
	m.Die()
	look(0)
	write(2)
	m.Die()
	write(3)
	look(0)
	// A nameless file gets its name, after a death and before another.
	if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", nameless.fd), unix.AT_FDCWD, m.Path("named"), unix.AT_SYMLINK_FOLLOW); err != nil {
		t.Fatal(err)
	}
	m.Die()
	look(0)
	for name, f := range map[string]*file{"named": nameless, "other": files["linked"]} {
		got, err := os.ReadFile(m.Path(name))
		if err == nil {
			err = same(name, got, f.want)
		}
		var st unix.Stat_t
		if err == nil {
			err = unix.Stat(m.Path(name), &st)
		}
		if err != nil || st.Nlink != 1 {
			t.Fatalf("%s: %d names, want 1: %v", name, st.Nlink, err)
		}
	}
	for name, f := range files {
		if err := unix.Close(f.fd); err != nil {
			t.Errorf("closing %s: %v", name, err)
		}
		f.fd = -1
	}
	kept := filepath.Join(m.Work, "lamina", "kept")
	eventually(t, "nothing is kept of files that are closed", func() bool {
		entries, err := os.ReadDir(kept)
		return err == nil && len(entries) == 0
	})
	for _, name := range []string{"sketch", "whole", "untouched", "new", "linked"} {
		if _, err := os.Lstat(m.Path(name)); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s is there: %v", name, err)
		}
	}
}

// TestPrograms: a program of a lower layer, whose pages the kernel reads without the server, and a shared mapping, go on;
// so does who has a directory open, or has its working directory in one that is removed.
func TestPrograms(t *testing.T) {
	lower := mnt.Dirs(t, "lower")[0]
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	text := layers.Bytes(8, 256<<10)
	for name, b := range map[string][]byte{"sleep": program, "mapped": text} {
		if err := os.WriteFile(filepath.Join(lower, name), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(lower, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if err := os.WriteFile(filepath.Join(lower, "dir", fmt.Sprint(i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m := start(t, lower)
	cmd := exec.Command(m.Path("sleep"), "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	fd, err := unix.Open(m.Path("mapped"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	mapped, err := unix.Mmap(fd, 0, len(text), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapped)
	dir, err := os.Open(m.Path("dir"))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	first, err := dir.Readdirnames(10)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(m.Path("gone"), 0o755); err != nil {
		t.Fatal(err)
	}
	gone, err := os.Open(m.Path("gone"))
	if err != nil {
		t.Fatal(err)
	}
	defer gone.Close()
	if err := os.Remove(m.Path("gone")); err != nil {
		t.Fatal(err)
	}
	copy(mapped[5000:], "before the death")
	copy(text[5000:], "before the death")
	m.Die()
	copy(mapped[100_000:], "after the death")
	copy(text[100_000:], "after the death")
	if err := unix.Msync(mapped, unix.MS_SYNC); err != nil {
		t.Errorf("msync: %v", err)
	}
	if err := same("the mapping", mapped, text); err != nil {
		t.Error(err)
	}
	got := make([]byte, len(text))
	if _, err := unix.Pread(fd, got, 0); err != nil {
		t.Error(err)
	} else if err := same("the mapped file", got, text); err != nil {
		t.Error(err)
	}
	rest, err := dir.Readdirnames(-1)
	if err != nil || len(first)+len(rest) != 100 {
		t.Errorf("%d and %d names in a directory of 100: %v", len(first), len(rest), err)
	}
	fd2, err := unix.Openat(int(gone.Fd()), "x", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("a file in a removed directory: %d, %v", fd2, err)
	}
	if err := exec.Command(m.Path("sleep"), "0").Run(); err != nil {
		t.Errorf("starting the program again: %v", err)
	}
	if err := cmd.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the program died too: %v", err)
	}
}

// TestEnd: a mount whose server has just been killed is unmounted, by a command or by a signal, and leaves nothing behind.
func TestEnd(t *testing.T) {
	lower := mnt.Dirs(t, "lower")[0]
	text := layers.Bytes(9, 1<<20)
	if err := os.WriteFile(filepath.Join(lower, "file"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	m := start(t, lower)
	for i := range 6 {
		f, err := os.OpenFile(m.Path("file"), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		p := fmt.Appendf(nil, "round %d", i)
		copy(text[10_000*i:], p)
		if _, err := f.WriteAt(p, int64(10_000*i)); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		supervisor, server := m.Processes()
		if err := unix.Kill(server, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			m.Unmount()
		} else {
			if err := unix.Kill(supervisor, unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the mount goes, and the supervisor", func() bool {
				there, err := rival.Mounted(m.Dir)
				return err == nil && !there && unix.Kill(supervisor, 0) == unix.ESRCH
			})
		}
		m.Fsck()
		m.Again()
		got, err := os.ReadFile(m.Path("file"))
		if err == nil {
			err = same("file", got, text)
		}
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
}

// TestLayersStayClaimed: between two servers nobody else can have the upper layer.
func TestLayersStayClaimed(t *testing.T) {
	lower := mnt.Dirs(t, "lower")[0]
	m := start(t, lower)
	for range 5 {
		_, server := m.Processes()
		if err := unix.Kill(server, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if _, err := mnt.Try(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Upper: m.Upper, Work: m.Work}); err == nil {
			t.Fatal("another mount could have the upper layer")
		}
		m.Die()
	}
}

// TestRefused: what cannot survive is refused by name.
func TestRefused(t *testing.T) {
	d := mnt.Dirs(t, "lower", "upper", "work", "merged")
	out, code := mnt.Lamina(t, "mount", "-o", fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,transport=uring,survive=on", d[0], d[1], d[2]), d[3])
	if code == 0 || !bytes.Contains([]byte(out), []byte("survive")) || !bytes.Contains([]byte(out), []byte("transport=dev")) {
		t.Errorf("exit status %d: %s", code, out)
	}
}
