package cli

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/pool"
	"lamina/tests/mnt"

	"golang.org/x/sys/unix"
)

// TestMain is also the program under test: run under its name it is lamina, and the background server that lamina
// starts is this program again.
func TestMain(m *testing.M) {
	if name := filepath.Base(os.Args[0]); name == "lamina" || strings.HasPrefix(name, "mount.") {
		os.Exit(Main(os.Args))
	}
	os.Exit(mnt.InRuntimeDir(func() int {
		runtimeRoot = pool.RuntimeDir()
		return m.Run()
	}))
}

var runtimeRoot string

type result struct {
	out, err string
	code     int
}

// runAs runs lamina under a name, in a directory, with a time limit.
func runAs(t testing.TB, argv0, dir string, args ...string) result {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, args...)
	cmd.Args[0] = argv0
	cmd.Dir = dir
	cmd.WaitDelay = 20 * time.Second // a server that keeps our pipes open must not hang the test
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("lamina %q: %v", args, err)
	}
	return result{out.String(), withoutWaits(errOut.String()), cmd.ProcessState.ExitCode()}
}

// withoutWaits leaves the notes out that lamina prints when it has to wait for a flush: how long that takes is up to the
// disk and to whoever else uses it.
func withoutWaits(stderr string) string {
	var kept strings.Builder
	for line := range strings.Lines(stderr) {
		if !strings.Contains(line, "its server has been flushing for ") && !strings.Contains(line, ": waiting for ") {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

// layers is a directory with l1, l2, upper, work and mnt, which is unmounted when the test ends.
type layers struct {
	t   testing.TB
	dir string
}

func newLayers(t testing.TB) *layers {
	t.Helper()
	l := &layers{t, t.TempDir()}
	for _, name := range []string{"l1", "l2", "upper", "work", "mnt"} {
		must(t, os.Mkdir(l.path(name), 0o755))
	}
	must(t, os.WriteFile(l.path("l1/file"), []byte("one"), 0o644))
	must(t, os.WriteFile(l.path("l2/big"), bytes.Repeat([]byte("lower--\n"), 1<<15), 0o644))
	t.Cleanup(func() {
		for unix.Unmount(l.path("mnt"), unix.MNT_DETACH) == nil {
			t.Error("the test left a mount")
		}
		l.waitServersGone()
	})
	return l
}

// patch writes a few bytes into big, which is in a lower layer, through the mount.
func (l *layers) patch(off int64) {
	l.t.Helper()
	f, err := os.OpenFile(l.path("mnt/big"), os.O_WRONLY, 0)
	must(l.t, err)
	_, err = f.WriteAt([]byte("x"), off)
	must(l.t, errors.Join(err, f.Close()))
}

// forge damages the header of big, which is a sketch in the upper layer of no mount.
func (l *layers) forge() {
	l.t.Helper()
	must(l.t, unix.Setxattr(l.path("upper/big"), "trusted.overlay.metacopy", []byte("forged beyond belief, and long enough"), unix.XATTR_REPLACE))
}

func (l *layers) path(name string) string { return filepath.Join(l.dir, name) }

func (l *layers) run(args ...string) result {
	l.t.Helper()
	return runAs(l.t, "lamina", l.dir, args...)
}

// ok runs lamina, which must succeed without a word on standard error.
func (l *layers) ok(args ...string) string {
	l.t.Helper()
	r := l.run(args...)
	if r.code != 0 || r.err != "" {
		l.t.Fatalf("lamina %q: exit status %d: %s", args, r.code, r.err)
	}
	return r.out
}

// fails runs lamina, which must fail with one line that contains every one of want.
func (l *layers) fails(args []string, want ...string) {
	l.t.Helper()
	r := l.run(args...)
	if r.code == 0 || strings.Count(r.err, "\n") != 1 || !strings.HasPrefix(r.err, "lamina: ") {
		l.t.Errorf("lamina %q: exit status %d, message %q", args, r.code, r.err)
	}
	for _, w := range want {
		if !strings.Contains(r.err, w) {
			l.t.Errorf("lamina %q: %q does not contain %q", args, r.err, w)
		}
	}
}

const rw = "lowerdir=l1:l2,upperdir=upper,workdir=work"

func (l *layers) mounted() bool { return pool.IsLaminaMount(l.path("mnt")) }

func (l *layers) waitServersGone() {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		paths, err := filepath.Glob(runtimeRoot + "/" + pool.MountHash(l.path("mnt")) + ".*.sock")
		if err == nil && len(paths) == 0 {
			return
		}
		if time.Now().After(deadline) {
			l.t.Errorf("servers still there: %v %v", paths, err)
			return
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
