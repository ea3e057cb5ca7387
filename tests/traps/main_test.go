// Package traps holds a named test for every trap that others fell into, for every kind of bad input, and for the
// corners of a filesystem's behaviour that container programs rely on. Everything is driven from outside.
package traps

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

func TestMain(m *testing.M) {
	if os.Getenv(unringedEnv) != "" {
		fmt.Fprintln(os.Stderr, runUnringed())
		os.Exit(1)
	}
	mnt.Main(m)
}

const block = 4096

// formats are the mount options that most tests about sketches run under, each in turn.
var formats = []string{"format=sparse", "format=bcow", "format=bcow-single"}

// eachFormat runs a test once for every format.
func eachFormat(t *testing.T, f func(t *testing.T, format string)) {
	for _, format := range formats {
		t.Run(format, func(t *testing.T) { f(t, format) })
	}
}

// eachPassthrough runs a test once for every passthrough mode.
func eachPassthrough(t *testing.T, f func(t *testing.T, passthrough string)) {
	for _, p := range []string{"auto", "on", "off"} {
		t.Run("passthrough="+p, func(t *testing.T) { f(t, p) })
	}
}

// lowerWith makes a lower layer out of names and contents; a name that ends in a slash is a directory.
func lowerWith(t testing.TB, files map[string][]byte) string {
	t.Helper()
	dir := mnt.Dirs(t, "lower")[0]
	fill(t, dir, files)
	return dir
}

func fill(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, contents := range files {
		p := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			check(t, os.MkdirAll(p, 0o755))
			continue
		}
		check(t, os.MkdirAll(filepath.Dir(p), 0o755))
		check(t, os.WriteFile(p, contents, 0o644))
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open opens path and closes it when the test ends, before the mount goes.
func open(t testing.TB, path string, flags int) int {
	t.Helper()
	fd, _ := opened(t, path, flags)
	return fd
}

// opened is open for tests that close earlier, with shut.
func opened(t testing.TB, path string, flags int) (fd int, shut func()) {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	shut = sync.OnceFunc(func() { unix.Close(fd) })
	t.Cleanup(shut)
	return fd, shut
}

func pwrite(t testing.TB, fd int, p []byte, off int64) {
	t.Helper()
	if n, err := unix.Pwrite(fd, p, off); err != nil || n != len(p) {
		t.Fatalf("wrote %d of %d at %d: %v", n, len(p), off, err)
	}
}

func pread(t testing.TB, fd int, n int, off int64) []byte {
	t.Helper()
	b := make([]byte, n)
	got, err := unix.Pread(fd, b, off)
	if err != nil {
		t.Fatalf("reading %d at %d: %v", n, off, err)
	}
	return b[:got]
}

// wantFile compares a whole file.
func wantFile(t testing.TB, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Errorf("reading: %v", err)
		return
	}
	if i := firstDifference(got, want); i >= 0 {
		t.Errorf("%s: %d bytes, want %d; first difference at %d (block %d)", path, len(got), len(want), i, i/block)
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	return i
}

// wantErrno fails unless err is one of the errnos.
func wantErrno(t testing.TB, what string, err error, want ...unix.Errno) {
	t.Helper()
	for _, w := range want {
		if errors.Is(err, w) {
			return
		}
	}
	t.Errorf("%s: %v, want %v", what, err, want)
}

// within fails the test if f does not end in time; the server that it hangs on is then killed by the clean-up.
func within(t testing.TB, limit time.Duration, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatalf("%s: hangs (more than %v)", what, limit)
	}
}

// walk touches everything below root that can be touched without changing it, and counts the objects. It does not fail on
// errors: hostile layers are full of them.
func walk(root string) (objects int, failed []error) {
	_ = filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		objects++
		if err != nil {
			failed = append(failed, err)
			return nil
		}
		buf := make([]byte, 1<<16)
		_, _ = unix.Llistxattr(p, buf)
		_, _ = os.Readlink(p)
		if e.Type().IsRegular() {
			if _, err := os.ReadFile(p); err != nil {
				failed = append(failed, err)
			}
		}
		if objects > 100_000 {
			return fmt.Errorf("endless tree")
		}
		return nil
	})
	return objects, failed
}

// shell runs a script and returns its output.
func shell(t testing.TB, script string, args ...any) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
	defer cancel()
	out, err := rival.Run(ctx, "sh", "-ec", fmt.Sprintf(script, args...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// server is the pid of the mount's server.
func server(t testing.TB, m *mnt.T) int {
	t.Helper()
	pid, err := m.Server()
	check(t, err)
	return pid
}

// data are n bytes that depend on the seed.
func data(seed, n int) []byte { return layers.Bytes(uint64(seed), int64(n)) }

// eventually waits for what the server does in the background.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Errorf("%s: %v", what, err)
}
