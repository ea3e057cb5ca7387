// Package podman drives Debian's Podman and Buildah with Lamina as their mount program, as root and as a user without
// privileges. Every store is private: its own configuration, layers, state and locks.
package podman

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/inventory"
	"lamina/pool"
	"lamina/tests/mnt"
)

func TestMain(m *testing.M) { mnt.Main(m) }

// engine is a private installation of Podman and Buildah.
type engine struct {
	t      *testing.T
	dir    string   // of the layers and everything else that belongs to it
	state  string   // what Podman keeps while it runs: a directory with a short name
	env    []string // of every command
	prefix []string // goes before every command
	lamina string   // the mount program
	cgroup []string // flags that keep containers in a control group of this test
	killed []string // logs of servers that a test has killed
}

// configure writes the configuration below e.dir.
func (e *engine) configure() {
	e.t.Helper()
	graph := e.path("graph")
	var err error
	e.state, err = os.MkdirTemp("", "p")
	must(e.t, err)
	e.t.Cleanup(func() {
		if err := os.RemoveAll(e.state); err != nil {
			e.t.Error(err)
		}
	})
	run := e.state
	if root := run + "/c"; len(root) > 50 {
		e.t.Fatalf("%s: Podman takes no longer names than 50 characters here: set TMPDIR to a shorter one", root)
	}
	e.write("storage.conf", fmt.Sprintf(`[storage]
driver = "overlay"
graphroot = %q
runroot = %q
rootless_storage_path = %q
[storage.options.overlay]
mount_program = %q
`, graph, run+"/c", graph, e.lamina))
	// No resource limit that a container asks for is above what a sandbox allows.
	e.write("containers.conf", fmt.Sprintf(`[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime = "runc"
static_dir = %q
tmp_dir = %q
volume_path = %q
[containers]
netns = "none"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
`, graph+"/libpod", run+"/libpod", graph+"/volumes"))
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !slices.Contains([]string{"XDG_RUNTIME_DIR", "HOME", "TMPDIR", pool.RuntimeDirVariable}, name) {
			e.env = append(e.env, v)
		}
	}
	// TMPDIR stays what it is: the test's processes are known by it.
	e.env = append(e.env, "TMPDIR="+os.TempDir(), "HOME="+e.path("home"), "XDG_RUNTIME_DIR="+run,
		"CONTAINERS_STORAGE_CONF="+e.path("storage.conf"), "CONTAINERS_CONF="+e.path("containers.conf"))
}

func (e *engine) path(name string) string { return filepath.Join(e.dir, name) }

func (e *engine) write(name, text string) {
	e.t.Helper()
	must(e.t, os.WriteFile(e.path(name), []byte(text), 0o644))
}

// try runs a command and returns what it printed, errors apart.
func (e *engine) try(args ...string) (string, error) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
	defer cancel()
	args = append(slices.Clone(e.prefix), args...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Env = e.dir, e.env
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = 10 * time.Second // what stays in the background must not hold our pipes
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%q: %w: %s%s", args, err, out.String(), errOut.String())
	}
	return out.String(), nil
}

func (e *engine) run(args ...string) string {
	e.t.Helper()
	out, err := e.try(args...)
	must(e.t, err)
	return strings.TrimSpace(out)
}

// want runs a command that must print want.
func (e *engine) want(want string, args ...string) {
	e.t.Helper()
	if got := e.run(args...); got != want {
		e.t.Errorf("%q printed %q, want %q", args, got, want)
	}
}

func (e *engine) fails(args ...string) string {
	e.t.Helper()
	out, err := e.try(args...)
	if err == nil {
		e.t.Errorf("%q succeeded: %s", args, out)
		return ""
	}
	return err.Error()
}

// container is "podman run FLAGS IMAGE sh -c SCRIPT"; the flags come first in args.
func (e *engine) container(image, script string, flags ...string) []string {
	args := append([]string{"podman", "run"}, e.cgroup...)
	return append(append(args, flags...), image, "sh", "-ec", script)
}

// build makes the image that the tests start from, in steps that each need a mount: files that later steps change, take
// away and give to another owner.
func (e *engine) build(image string) {
	e.t.Helper()
	ctx := e.path("context")
	must(e.t, os.Mkdir(ctx, 0o755))
	busybox, err := exec.LookPath("busybox")
	must(e.t, err)
	if f, err := elf.Open(busybox); err != nil {
		e.t.Fatal(err)
	} else if libs, err := f.ImportedLibraries(); f.Close() != nil || err != nil || len(libs) > 0 {
		e.t.Fatalf("%s needs %q: install the package busybox-static", busybox, libs)
	}
	b, err := os.ReadFile(busybox)
	must(e.t, err)
	must(e.t, os.WriteFile(ctx+"/busybox", b, 0o755))
	must(e.t, os.WriteFile(ctx+"/big", big(), 0o644))
	must(e.t, os.WriteFile(ctx+"/Containerfile", []byte(`FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir -p /etc /data /tmp /opaque/sub && chmod 1777 /tmp && echo root:x:0:0:root:/:/bin/sh >/etc/passwd && echo old >/opaque/sub/old
COPY big /data/big
RUN printf X | dd of=/data/big bs=1 seek=5000 conv=notrunc && chown -R 5:6 /data && rm /etc/passwd
RUN rm -r /opaque && mkdir -p /opaque/sub && echo new >/opaque/sub/new && mv /bin/vi /bin/renamed
`), 0o644))
	e.run("buildah", "bud", "--isolation", "chroot", "--layers", "-t", image, ctx)
}

// big is a file of the image as the build gets it.
func big() []byte { return bytes.Repeat([]byte("0123456789abcdef"), 2<<20) } // 32 MiB

// upper is the upper directory of a container.
func (e *engine) upper(container string) string {
	e.t.Helper()
	return e.run("podman", "inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", container)
}

// status is what Lamina tells of a container's mount, asked as the container's user.
func (e *engine) status(container string) inventory.Mount {
	e.t.Helper()
	merged := e.run("podman", "inspect", "-f", "{{.GraphDriver.Data.MergedDir}}", container)
	var st inventory.Mount
	must(e.t, json.Unmarshal([]byte(e.run(e.lamina, "status", "--json", merged)), &st))
	return st
}

// remove removes containers. Podman may still be cleaning up behind one that has just ended, and says that it is busy.
func (e *engine) remove(containers ...string) {
	e.t.Helper()
	var err error
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if _, err = e.try(append([]string{"podman", "rm", "-f", "-i", "-t", "0"}, containers...)...); err == nil {
			return
		}
	}
	e.t.Error(err)
}

// unmounted waits until Podman has cleaned up behind a container that has ended.
func (e *engine) unmounted(container string) {
	e.t.Helper()
	merged := e.run("podman", "inspect", "-f", "{{.GraphDriver.Data.MergedDir}}", container)
	poll(e.t, merged+" to be unmounted", func() bool {
		is, err := rival.Mounted(merged)
		must(e.t, err)
		return !is
	})
}

// destroy removes everything and fails the test if the engine cannot or something is left.
func (e *engine) destroy() {
	e.t.Helper()
	e.remove("-a")
	for _, args := range [][]string{{"rmi", "-fa"}, {"volume", "prune", "-f"}} {
		if _, err := e.try(append([]string{"podman"}, args...)...); err != nil {
			e.t.Error(err)
		}
	}
	if left, err := filepath.Glob(e.path("graph/overlay/[0-9a-f]*")); err != nil || len(left) > 0 {
		e.t.Errorf("layers left: %q %v", left, err)
	}
	// A server that ended well leaves neither socket nor log.
	var left []string
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		left, _ = filepath.Glob(e.state + "/lamina/*")
		left = slices.DeleteFunc(left, func(p string) bool { return slices.Contains(e.killed, p) })
		if len(left) == 0 {
			return
		}
	}
	for _, path := range left {
		b, _ := os.ReadFile(path) // a socket cannot be read
		e.t.Errorf("left in the runtime directory: %s %s", path, b)
	}
}

// unmountStore takes the mount away that Podman makes of its store's directory.
func unmountStore(t *testing.T, dir string) {
	t.Helper()
	below, err := rival.MountsBelow(dir)
	must(t, err)
	slices.Sort(below)
	for _, m := range slices.Backward(below) {
		if filepath.Base(m) != "overlay" {
			t.Errorf("still mounted: %s", m)
		}
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: %v", m, err)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
