package layer

import (
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain fails the run when a descriptor or a mount outlives the tests.
func TestMain(m *testing.M) {
	unix.Umask(0)
	fdsBefore := openDescriptors()
	code := m.Run()
	if left := difference(openDescriptors(), fdsBefore); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "descriptors left open:\n%s\n", strings.Join(left, "\n"))
		code = 1
	}
	if left := difference(mounts(), nil); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "mounts left:\n%s\n", strings.Join(left, "\n"))
		code = 1
	}
	os.Exit(code)
}

func openDescriptors() map[string]bool {
	fds := map[string]bool{}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		// The runtime's own poller may start at any time and lives for ever.
		if err == nil && !strings.HasPrefix(target, "anon_inode:[event") && !strings.HasSuffix(target, "/fd") {
			fds[e.Name()+" -> "+target] = true
		}
	}
	return fds
}

// mounted holds the targets of the mounts that the tests made: other packages' tests mount at the same time.
var mounted sync.Map

// mounts returns those of the tests' mounts that are there.
func mounts() map[string]bool {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err)
	}
	set := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		target := strings.Fields(line)[4]
		if _, ours := mounted.Load(target); ours {
			set[target] = true
		}
	}
	return set
}

func difference(now, before map[string]bool) []string {
	var left []string
	for k := range now {
		if !before[k] {
			left = append(left, k)
		}
	}
	sort.Strings(left)
	return left
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, path string, opt Options) *Dir {
	t.Helper()
	d, err := OpenDir(path, opt)
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	return d
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(content), 0o644))
}

// mount mounts for the length of the test.
func mount(t testing.TB, source, target, fstype, data string) {
	t.Helper()
	if err := unix.Mount(source, target, fstype, 0, data); err != nil {
		t.Fatalf("mount -t %s -o %s %s: %v", fstype, data, target, err)
	}
	mounted.Store(target, true)
	t.Cleanup(func() {
		if err := unix.Unmount(target, 0); err != nil && err != unix.EINVAL {
			t.Errorf("umount %s: %v", target, err)
		}
	})
}
