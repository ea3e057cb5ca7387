// Package mnt gives tests a mounted union and takes everything away again: it mounts below the test's temporary
// directory, unmounts when the test ends however it ends, and runs a full fsck over every upper layer that was written.
package mnt

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/hostfs"
	"lamina/pool"
	"lamina/tests/probe"
)

// subject is the filesystem under test. Another one than Lamina tells whether a tester finds what it should.
var subject = flag.String("fs", string(rival.Lamina), "filesystem under test: lamina, overlay or fuse-overlayfs")

// transport is how requests reach Lamina, in every mount that does not say otherwise itself.
var transport = flag.String("transport", "auto", "transport under test: auto, dev or uring; a mount that gets another one fails")

// deaths makes every server of every mount die again and again while the test runs. No test may notice.
var deaths = flag.Duration("deaths", 0, "kill the server of every mount this often on average, with survive=on; 0: never")

// Subject is the filesystem under test.
func Subject() rival.System { return rival.System(*subject) }

// Timeout bounds every command.
const Timeout = 2 * time.Minute

// T is one mount of one test.
type T struct {
	*rival.Mount
	t testing.TB
	// SkipFsck: the test has damaged the layer itself and looks at fsck's findings on its own.
	SkipFsck bool
	cleaned  bool
	killer   *Killer
}

// Dirs makes the named directories below a new temporary directory and returns their paths.
func Dirs(t testing.TB, names ...string) []string {
	t.Helper()
	base := t.TempDir()
	// The tests' directory is its owner's alone, and other users act in it too.
	if err := os.Chmod(filepath.Dir(base), 0o755); err != nil {
		t.Fatal(err)
	}
	paths := make([]string, len(names))
	for i, n := range names {
		paths[i] = filepath.Join(base, n)
		if err := os.MkdirAll(paths[i], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return paths
}

// New mounts the subject over lowers, with a new upper.
func New(t testing.TB, lowers []string, options ...string) *T {
	t.Helper()
	return Start(t, rival.Config{System: Subject(), Lowers: lowers, Options: options})
}

// Start mounts c in a new directory. With neither upper nor work given it makes new ones; Upper "-" means a read-only
// mount.
func Start(t testing.TB, c rival.Config) *T {
	t.Helper()
	m, err := Try(t, c)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// Try is Start for mounts that may be refused.
func Try(t testing.TB, c rival.Config) (*T, error) {
	t.Helper()
	if c.System == "" {
		c.System = Subject()
	}
	switch {
	case c.Upper == "-":
		c.Upper = ""
	case c.Upper == "":
		d := Dirs(t, "upper", "work")
		c.Upper, c.Work = d[0], d[1]
	}
	if c.System == rival.Overlay {
		c.Options = overlayOptions(c)
	}
	// Without an upper kernel overlayfs needs two lowers; an empty one changes nothing.
	if c.System == rival.Overlay && c.Upper == "" && len(c.Lowers) == 1 {
		c.Lowers = append([]string{Dirs(t, "empty")[0]}, c.Lowers...)
	}
	c.Options = withTransport(c)
	dir := Dirs(t, "merged")[0]
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	defer cancel()
	rm, err := rival.Up(ctx, c, dir)
	m := &T{Mount: rm, t: t, SkipFsck: err != nil} // nothing was mounted, nothing was written
	t.Cleanup(m.cleanup)
	if err == nil {
		m.wantTransport()
		m.kill()
	}
	return m, err
}

// Transports are those to be tested, by a test that chooses for its mounts itself: the one under test, or all that this
// kernel has.
func Transports(t testing.TB) []string {
	t.Helper()
	switch {
	case *transport != "auto":
		return []string{*transport}
	case probe.FuseUring.Missing(t) != nil:
		return []string{"dev"}
	}
	return []string{"dev", "uring"}
}

// withTransport asks for the transport under test, unless the test has a transport of its own.
func withTransport(c rival.Config) []string {
	own := slices.ContainsFunc(c.Options, func(o string) bool { return strings.HasPrefix(o, "transport=") })
	if c.System == rival.Lamina && *deaths > 0 && !c.Foreground {
		return append(slices.DeleteFunc(slices.Clone(c.Options), func(o string) bool { return strings.HasPrefix(o, "transport=") }), "survive=on")
	}
	if c.System != rival.Lamina || own || *transport == "auto" {
		return c.Options
	}
	return append(slices.Clone(c.Options), "transport="+*transport)
}

// wantTransport fails the test if requests do not come the way that was asked for.
func (m *T) wantTransport() {
	m.t.Helper()
	if m.System != rival.Lamina || m.Hasty { // a hasty one is not asked for anything
		return
	}
	for _, o := range m.Options {
		if want, ok := strings.CutPrefix(o, "transport="); ok && want != "auto" {
			if got := m.Transport(); got != want {
				m.t.Fatalf("mounted with %s, and yet its transport is %s", o, got)
			}
		}
	}
}

// Transport is how requests reach the server, as it says itself.
func (m *T) Transport() string {
	m.t.Helper()
	out, code := Lamina(m.t, "status", "--json", m.Dir)
	if code != 0 {
		m.t.Fatalf("status: exit status %d\n%s", code, out)
	}
	var status struct{ Transport string }
	if err := json.Unmarshal([]byte(out), &status); err != nil || status.Transport == "" {
		m.t.Fatalf("status does not tell the transport: %v in %s", err, out)
	}
	return status.Transport
}

// overlayOptions leaves out Lamina's own options and adds those that make kernel overlayfs behave.
func overlayOptions(c rival.Config) []string {
	opts := []string{"redirect_dir=on", "xino=on", "metacopy=off"}
	if c.Upper != "" {
		opts = append(opts, "index=on")
	} else {
		opts = []string{"redirect_dir=follow", "xino=on", "metacopy=off"}
	}
	own := []string{"format=", "caw=", "fill=", "copyup=", "passthrough=", "block_size=", "transport="}
next:
	for _, o := range c.Options {
		for _, prefix := range own {
			if strings.HasPrefix(o, prefix) {
				continue next
			}
		}
		opts = append(opts, o)
	}
	return opts
}

func (m *T) cleanup() {
	if m.cleaned {
		return
	}
	m.cleaned = true
	m.killer.Stop()
	mounted, err := rival.Mounted(m.Dir)
	if err != nil {
		m.t.Error(err)
	}
	if mounted {
		if err := m.Down(); err != nil {
			m.t.Errorf("unmounting: %v", err)
			m.t.Logf("who holds it: %s", holders(m.Dir))
		}
	}
	m.Discard()
	if log := m.Log(); log != "" && m.t.Failed() {
		m.t.Logf("server's log: %s", log)
	}
	if m.System == rival.Lamina && m.Upper != "" && !m.SkipFsck {
		m.Fsck()
	}
}

// Unmount unmounts before the test ends.
func (m *T) Unmount() {
	m.t.Helper()
	m.killer.Stop()
	if err := m.Down(); err != nil {
		m.t.Logf("who holds it: %s", holders(m.Dir))
		m.t.Fatal(err)
	}
}

// Remount unmounts what is mounted and mounts it again.
func (m *T) Remount() {
	m.t.Helper()
	if ok, _ := rival.Mounted(m.Dir); ok {
		m.Unmount()
	}
	m.Again()
}

// Again mounts what is not mounted.
func (m *T) Again() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	defer cancel()
	again, err := rival.Up(ctx, m.Config, m.Dir)
	if err != nil {
		m.t.Fatal(err)
	}
	*m.Mount = *again
	m.wantTransport()
	m.kill()
}

// Path joins names below the mount point.
func (m *T) Path(names ...string) string {
	return filepath.Join(append([]string{m.Dir}, names...)...)
}

// Fsck checks the upper layer, which must not be mounted, and fails the test on any finding.
func (m *T) Fsck() {
	m.t.Helper()
	if out, code := FsckOutput(m.t, m.Config); code != 0 {
		m.t.Errorf("fsck of %s (%v): exit status %d\n%s", m.Upper, m.Options, code, out)
	}
}

// FsckOutput runs fsck and returns what it printed and its exit status.
func FsckOutput(t testing.TB, c rival.Config, flags ...string) (string, int) {
	t.Helper()
	args := []string{"fsck", "-o", layerOptions(c)}
	args = append(args, flags...)
	return Lamina(t, append(args, c.Upper)...)
}

// Flatten completes every sketch of the unmounted upper layer.
func (m *T) Flatten() {
	m.t.Helper()
	if out, code := Lamina(m.t, "flatten", "-o", layerOptions(m.Config), m.Upper); code != 0 {
		m.t.Fatalf("flatten: exit status %d\n%s", code, out)
	}
}

// layerOptions name the layers of an unmounted union.
func layerOptions(c rival.Config) string {
	c.Options = nil
	opts := strings.Split(c.OptionString(), ",upperdir=")
	return opts[0] + ",workdir=" + rival.Escape(c.Work)
}

// Lamina runs the binary under test and returns what it printed on both streams, and its exit status.
func Lamina(t testing.TB, args ...string) (string, int) {
	t.Helper()
	bin, err := rival.BinaryPath()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	defer cancel()
	out, err := rival.Run(ctx, bin, args...)
	if err == nil {
		return out, 0
	}
	if ctx.Err() != nil {
		t.Fatalf("lamina %s did not end in %v", strings.Join(args, " "), Timeout)
	}
	var ee *rival.ExitError
	if !errors.As(err, &ee) {
		t.Fatal(err)
	}
	return ee.Stdout + ee.Stderr, ee.Code()
}

// holders names the processes that use something below dir.
func holders(dir string) string {
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	cwds, _ := filepath.Glob("/proc/[0-9]*/cwd")
	var found []string
	for _, l := range append(links, cwds...) {
		if target, err := os.Readlink(l); err == nil && strings.HasPrefix(target, dir) {
			found = append(found, l+" -> "+target)
		}
	}
	if len(found) == 0 {
		return "nobody"
	}
	return strings.Join(found, ", ")
}

// Loop makes a filesystem of mib MiB on a loop device and mounts it in a new directory.
func Loop(t testing.TB, mib int64, mkfs []string, mountOptions string) string {
	t.Helper()
	d := Dirs(t, "dev", "fs")
	img := filepath.Join(d[0], "image")
	f, err := os.Create(img)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(mib<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	defer cancel()
	cmd := hostfs.Mkfs(append(mkfs, img)...)
	if _, err := rival.Run(ctx, cmd[0], cmd[1:]...); err != nil {
		t.Fatal(err)
	}
	if _, err := rival.Run(ctx, "mount", "-o", strings.TrimSuffix("loop,"+mountOptions, ","), img, d[1]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d[1], 0); err != nil {
			t.Errorf("unmounting the loop filesystem at %s: %v (%s)", d[1], err, holders(d[1]))
			_ = unix.Unmount(d[1], unix.MNT_DETACH)
		}
	})
	return d[1]
}

// Main runs a package's tests with no umask, and fails the run if a goroutine or a descriptor is left over.
func Main(m *testing.M) {
	flag.Parse()
	unix.Umask(0)
	run, err := ownRuntimeDir()
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		os.Exit(1)
	}
	before := descriptors()
	goroutines := runtime.NumGoroutine()
	code := m.Run()
	if code == 0 {
		if err := settle(before, goroutines); err != nil {
			fmt.Fprintln(os.Stderr, "FAIL:", err)
			code = 1
		}
	}
	if err := os.RemoveAll(run); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}

// ownRuntimeDir keeps the servers' sockets and logs out of the machine's directory for them: what had something to say, as
// many a server under test has, stays there.
func ownRuntimeDir() (string, error) {
	dir, err := os.MkdirTemp("", "run.")
	if err != nil {
		return "", err
	}
	return dir, os.Setenv(pool.RuntimeDirVariable, dir)
}

// settle waits for what the tests started to end: on a busy machine that takes a while.
func settle(fds map[string]string, goroutines int) error {
	var err error
	for range 1500 {
		err = nil
		for fd, target := range descriptors() {
			// The runtime's own poller appears with the first use of a pipe.
			if _, ok := fds[fd]; !ok && !strings.HasPrefix(target, "anon_inode:[event") {
				err = errors.Join(err, fmt.Errorf("leaked descriptor %s -> %s", fd, target))
			}
		}
		if n := runtime.NumGoroutine(); n > goroutines {
			err = errors.Join(err, fmt.Errorf("leaked goroutines: %d before, %d after", goroutines, n))
		}
		if err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

func descriptors() map[string]string {
	fds := map[string]string{}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasSuffix(target, "/fd") {
			fds[e.Name()] = target
		}
	}
	return fds
}

// Seed is the seed that the flag of that name was given, which the test's log tells for a replay; 0 takes one from the
// clock.
func Seed(t testing.TB, name string, given uint64) uint64 {
	t.Helper()
	if given == 0 {
		given = uint64(time.Now().UnixNano()) % 1_000_000_000
	}
	t.Logf("-%s=%d", name, given)
	return given
}

// Combination is one set of Lamina's options.
type Combination struct{ Format, CaW, Passthrough string }

// Options are the combination's mount options.
func (c Combination) Options() []string {
	return []string{"format=" + c.Format, "caw=" + c.CaW, "passthrough=" + c.Passthrough}
}

func (c Combination) String() string { return c.Format + "-" + c.CaW + "-passthrough=" + c.Passthrough }

// Matrix is every combination of format, caw and passthrough.
func Matrix() []Combination {
	var all []Combination
	for _, f := range []string{"sparse", "bcow", "bcow-single"} {
		for _, c := range []string{"eager", "lazy", "sync"} {
			for _, p := range []string{"auto", "on", "off"} {
				all = append(all, Combination{f, c, p})
			}
		}
	}
	return all
}

// Combinations are those to test over the transport under test: the whole matrix over the better of those that this kernel
// has, and a square of it over the other. What is above the transport has been tested then.
func Combinations(t testing.TB) []Combination {
	t.Helper()
	if *transport == "dev" && probe.FuseUring.Missing(t) == nil {
		return Square()
	}
	return Matrix()
}

// Square is a Latin square out of the matrix: nine combinations that hold every pair of values once.
func Square() []Combination {
	var square []Combination
	for i, c := range Matrix() {
		if f, w, p := i/9, i/3%3, i%3; p == (f+w)%3 {
			square = append(square, c)
		}
	}
	return square
}
