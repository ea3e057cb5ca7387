package crash

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

// A machine that shuts down sends everybody SIGTERM and, to who is left, SIGKILL: programs that do not mind the first write
// until the second, and the server has both with them. What they wrote is there afterwards, as on a filesystem of the kernel.
func TestKilledAfterTerm(t *testing.T) {
	for _, format := range []string{"sparse", "bcow"} {
		t.Run(format, func(t *testing.T) { killedAfterTerm(t, "format="+format) })
	}
}

func killedAfterTerm(t *testing.T, options ...string) {
	lower := mnt.Dirs(t, "lower")[0]
	names := []string{"before", "after", "cut", "grown", "copied", "punched", "new", "small"}
	content := make(map[string][]byte)
	for i, name := range names {
		size := int64(50 * block)
		if name == "small" {
			size = 3000
		}
		content[name] = layers.Bytes(uint64(i), size)
		if err := os.WriteFile(filepath.Join(lower, name), content[name], 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dirs := mnt.Dirs(t, "u", "w")
	m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Upper: dirs[0], Work: dirs[1], Options: options})
	out, _ := mnt.Lamina(t, "status", "--json", m.Dir)
	var status struct {
		PID int
		Log string
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil || status.PID == 0 {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = os.Remove(status.Log) })

	root := openFor(t, m.Dir, unix.O_DIRECTORY)
	defer unix.Close(root)
	open := func(name string) int {
		fd, err := unix.Openat(root, name, unix.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	word := layers.Bytes(99, 100)
	write := func(fd int, name string, at int) {
		t.Helper()
		if _, err := unix.Pwrite(fd, word, int64(at)); err != nil {
			t.Fatal(err)
		}
		copy(content[name][at:], word)
	}
	fds := make(map[string]int)
	for _, name := range names[:6] {
		fds[name] = open(name)
		write(fds[name], name, 7000)
	}

	if err := unix.Kill(status.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server puts on disk what it has", func() bool {
		log, _ := os.ReadFile(status.Log)
		return strings.Contains(string(log), "what was written is on disk")
	})
	write(fds["after"], "after", 90_000)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(unix.Ftruncate(fds["cut"], 100_001))
	content["cut"] = content["cut"][:100_001]
	check(unix.Ftruncate(fds["grown"], 300_000))
	content["grown"] = append(content["grown"], make([]byte, 300_000-50*block)...)
	from, to := int64(0), int64(40_000)
	n, err := unix.CopyFileRange(fds["after"], &from, fds["copied"], &to, 20_000, 0)
	if err != nil || n == 0 {
		t.Fatal(n, err)
	}
	copy(content["copied"][40_000:], content["after"][:n])
	check(unix.Fallocate(fds["punched"], unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 30_001, 50_000))
	clear(content["punched"][30_001:80_001])
	write(open("new"), "new", 5000)
	write(open("small"), "small", 500)

	if err := unix.Kill(status.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	wantGone(t, status.PID)
	m.Again()
	for _, name := range names {
		got, err := os.ReadFile(m.Path(name))
		if err != nil || !bytes.Equal(got, content[name]) {
			t.Errorf("%s is not as it was written: %d bytes of %d (%v)", name, len(got), len(content[name]), err)
		}
	}
}
