package traps

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

// After a workload and a little rest the server holds what it held before: descriptors and goroutines.
func TestServerLeaksNothing(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		files := map[string][]byte{}
		for i := range 100 {
			files[fmt.Sprintf("d%d/f%d", i%5, i)] = data(i, 3*block)
		}
		m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lowerWith(t, files)}, Options: []string{format}})
		pid := server(t, m)
		workload(t, m, 0) // fills the caches that are kept
		var fds, goroutines int
		eventually(t, "coming to rest", func() error {
			before := descriptorsOf(t, pid)
			fds, goroutines = before, goroutinesOf(t, m)
			if s := sketchesOpen(t, m); s > 0 {
				return fmt.Errorf("%d files still open", s)
			}
			return nil
		})
		for round := 1; round <= 2; round++ {
			workload(t, m, round)
		}
		eventually(t, "coming to rest again", func() error {
			// A few directories more may be held open for the next lookup, not one for each file.
			if n := descriptorsOf(t, pid); n > fds+10 {
				return fmt.Errorf("the server held %d descriptors and now holds %d", fds, n)
			}
			// The transport reads with more goroutines once there was more to do at a time, up to 16, and keeps them.
			if n := goroutinesOf(t, m); n > goroutines+20 {
				return fmt.Errorf("the server had %d goroutines and now has %d", goroutines, n)
			}
			return nil
		})
	})
}

// workload makes, opens, maps, renames, links and removes files of all kinds.
func workload(t *testing.T, m *mnt.T, round int) {
	t.Helper()
	for i := range 50 {
		p := m.Path(fmt.Sprintf("d%d/f%d", i%5, i))
		check(t, patch(p, "x", int64(i*50)))
		fd, err := unix.Open(p, unix.O_RDWR|unix.O_CLOEXEC, 0)
		check(t, err)
		b, err := unix.Mmap(fd, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		check(t, err)
		b[7] = byte(round)
		check(t, unix.Munmap(b))
		check(t, unix.Close(fd))
		n := m.Path(fmt.Sprintf("d%d/new%d", i%5, i))
		check(t, os.WriteFile(n, data(i, 5000), 0o644))
		check(t, os.Rename(n, n+".r"))
		check(t, os.Link(n+".r", n))
		check(t, os.Remove(n+".r"))
		if _, err := os.ReadDir(filepath.Dir(n)); err != nil {
			t.Fatal(err)
		}
		check(t, os.Remove(n))
	}
}

func descriptorsOf(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	check(t, err)
	return len(entries)
}

// status is what a mount says of itself.
func status(t *testing.T, m *mnt.T) map[string]any {
	t.Helper()
	out, code := mnt.Lamina(t, "status", "--json", m.Dir)
	if code != 0 {
		t.Fatalf("status: %s", out)
	}
	var all []map[string]any
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		var one map[string]any
		check(t, json.Unmarshal([]byte(out), &one))
		return one
	}
	return all[0]
}

func goroutinesOf(t *testing.T, m *mnt.T) int {
	t.Helper()
	n, ok := status(t, m)["goroutines"].(float64)
	if !ok {
		t.Fatal("status does not tell the number of goroutines")
	}
	return int(n)
}

func sketchesOpen(t *testing.T, m *mnt.T) int {
	t.Helper()
	s := status(t, m)
	open, _ := s["open_files"].(float64)
	settling, _ := s["settling"].(float64)
	return int(open + settling)
}

// The kernel forgets many inodes at once (BATCH_FORGET): the server's memory must stay bounded, and what is looked up
// again is the same.
func TestTrapForgetStormsAreBounded(t *testing.T) {
	const n = 10_000
	lower := mnt.Dirs(t, "lower")[0]
	for d := range 100 {
		sub := filepath.Join(lower, fmt.Sprint(d))
		check(t, os.Mkdir(sub, 0o755))
		for i := range n / 100 {
			check(t, os.WriteFile(filepath.Join(sub, fmt.Sprint(i)), nil, 0o644))
		}
	}
	m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}})
	pid := server(t, m)
	first, _ := walk(m.Dir)
	for range 3 {
		check(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0))
		if again, failed := walk(m.Dir); again != first || len(failed) > 0 {
			t.Fatalf("%d objects, %d before (%v)", again, first, failed)
		}
	}
	if rss := residentMiB(t, pid); rss > 150 {
		t.Errorf("the server's memory is %d MiB after lookups of %d files", rss, n)
	}
}

func residentMiB(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(t, err)
	_, after, _ := strings.Cut(string(b), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(after)[0])
	check(t, err)
	return kib >> 10
}
