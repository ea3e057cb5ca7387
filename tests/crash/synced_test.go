package crash

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

// What a program has made durable is there after the server was killed, by whichever call it was done. A small lower file
// is copied whole and unsynced when it is opened for writing, and the kernel may write to it without a request.
func TestSyncedByAnyCallSurvivesAKill(t *testing.T) {
	const size = 10_000
	old := layers.Bytes(5, size)
	word := []byte("durable")
	write := func(t *testing.T, path string, flags int) int {
		fd := openFor(t, path, flags)
		if _, err := unix.Pwrite(fd, word, 0); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	msync := func(t *testing.T, path string) {
		m, err := unix.Mmap(openFor(t, path, unix.O_RDWR), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		copy(m, word)
		if err := errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m)); err != nil {
			t.Fatal(err)
		}
	}
	ways := map[string]func(t *testing.T, path string){
		"fsync": func(t *testing.T, path string) {
			if err := unix.Fsync(write(t, path, unix.O_WRONLY)); err != nil {
				t.Fatal(err)
			}
		},
		"fdatasync": func(t *testing.T, path string) {
			if err := unix.Fdatasync(write(t, path, unix.O_RDWR)); err != nil {
				t.Fatal(err)
			}
		},
		"O_SYNC":      func(t *testing.T, path string) { write(t, path, unix.O_WRONLY|unix.O_SYNC) },
		"O_DSYNC":     func(t *testing.T, path string) { write(t, path, unix.O_WRONLY|unix.O_DSYNC) },
		"option sync": func(t *testing.T, path string) { write(t, path, unix.O_WRONLY) },
		"msync":       msync,
		"O_DSYNC, shared": func(t *testing.T, path string) {
			openFor(t, path, unix.O_WRONLY)
			write(t, path, unix.O_WRONLY|unix.O_DSYNC)
		},
		"msync, shared": func(t *testing.T, path string) { openFor(t, path, unix.O_WRONLY); msync(t, path) },
		"msync, read once": func(t *testing.T, path string) {
			write(t, path, unix.O_WRONLY)
			openFor(t, path, unix.O_RDONLY)
			msync(t, path)
		},
	}
	for way, do := range ways {
		t.Run(way, func(t *testing.T) {
			lower := mnt.Dirs(t, "lower")[0]
			if err := os.WriteFile(filepath.Join(lower, "f"), old, 0o644); err != nil {
				t.Fatal(err)
			}
			c := rival.Config{System: rival.Lamina, Lowers: []string{lower}, Foreground: true}
			if option, is := strings.CutPrefix(way, "option "); is {
				c.Options = []string{option}
			}
			m := mnt.Start(t, c)
			do(t, m.Path("f"))
			if err := m.Kill(); err != nil {
				t.Fatal(err)
			}
			m.Again()
			want := append(bytes.Clone(word), old[len(word):]...)
			if got, err := os.ReadFile(m.Path("f")); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes that begin with %q, %v", len(got), got[:min(len(got), len(word))], err)
			}
		})
	}
}

// openFor opens a file until the server is killed or the test ends.
func openFor(t *testing.T, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}
