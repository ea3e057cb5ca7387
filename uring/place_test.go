package uring

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"lamina/tests/probe"
)

// What is about where threads may run: servers that have fewer CPUs than their clients, CPUs that come and go, and
// processes that may not have rings at all.

// guest is a server in a process of its own.
type guest struct {
	dir                            string
	threads, pinned, queues, depth int
	stop                           func()
}

// startGuest starts an actor that serves, and ends it with the test.
func startGuest(t *testing.T, prepare func(*exec.Cmd)) *guest {
	t.Helper()
	g := &guest{dir: t.TempDir()}
	cmd := actor(-1, "server", g.dir)
	prepare(cmd)
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line := make(chan string, 1)
	go func() {
		s, _ := bufio.NewReader(stdout).ReadString('\n')
		line <- s
	}()
	g.stop = func() {
		stdin.Close()
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("the server's end: %v", err)
			}
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			t.Error("the server does not end")
		}
		_ = unix.Unmount(g.dir, unix.MNT_DETACH) // if it has failed to
	}
	t.Cleanup(func() { g.stop() })
	select {
	case s := <-line:
		if _, err := fmt.Sscanf(s, "serving %d %d %d %d", &g.threads, &g.pinned, &g.queues, &g.depth); err != nil {
			t.Fatalf("the server says %q: %v", s, err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the server does not begin")
	}
	return g
}

// A server that may use one CPU answers clients on all of them.
func TestServerOnOneCPU(t *testing.T) {
	all := cpus(t)
	for _, cpu := range all {
		t.Run(fmt.Sprint("taskset/", cpu), func(t *testing.T) {
			servesEverybody(t, all, startGuest(t, func(cmd *exec.Cmd) {
				cmd.Args = append([]string{"taskset", "-c", fmt.Sprint(cpu)}, cmd.Path)
				taskset, err := exec.LookPath("taskset")
				must(t, err)
				cmd.Path = taskset
			}))
		})
		t.Run(fmt.Sprint("cpuset/", cpu), func(t *testing.T) {
			group := cpuset(t, cpu)
			servesEverybody(t, all, startGuest(t, func(cmd *exec.Cmd) {
				cmd.Args = []string{"sh", "-c", `echo $$ >"$1" && exec "$2"`, "sh", filepath.Join(group, "cgroup.procs"), cmd.Path}
				cmd.Path = "/bin/sh"
			}))
		})
	}
}

func servesEverybody(t *testing.T, all []int, g *guest) {
	t.Helper()
	if want := g.depth; g.pinned != want {
		t.Errorf("%d threads are pinned, want %d: those of one CPU", g.pinned, want)
	}
	if len(all) > 1 && g.threads != 2*g.depth {
		t.Errorf("%d threads, want %d for the one CPU and as many for all others", g.threads, g.depth)
	}
	for _, cpu := range all {
		acted(t, cpu, fmt.Sprint("a client on CPU ", cpu), "fast", g.dir)
	}
}

// cpuset makes a control group with one CPU, of whichever version of control groups there is.
func cpuset(t *testing.T, cpu int) string {
	t.Helper()
	root := "/sys/fs/cgroup/cpuset" // version 1
	if _, err := os.Stat(root + "/cpuset.cpus"); err != nil {
		root = "/sys/fs/cgroup" // version 2
		_ = os.WriteFile(root+"/cgroup.subtree_control", []byte("+cpuset"), 0)
	}
	dir := filepath.Join(root, fmt.Sprintf("lamina-test-%d-%d", os.Getpid(), cpu))
	must(t, os.Mkdir(dir, 0o755))
	t.Cleanup(func() {
		eventually(t, "the control group is empty", func() bool { return os.Remove(dir) == nil })
	})
	must(t, os.WriteFile(dir+"/cpuset.cpus", []byte(fmt.Sprint(cpu)), 0))
	must(t, os.WriteFile(dir+"/cpuset.mems", []byte("0"), 0))
	return dir
}

// A CPU that goes and comes back takes no mount with it, neither one from before nor one that began meanwhile.
func TestCPUComesAndGoes(t *testing.T) {
	probe.CPUHotplug.Need(t)
	all := cpus(t)
	if len(all) < 2 {
		t.Fatalf("this process may run on CPU %d alone, of several: allow it a second one", all[0])
	}
	last := all[len(all)-1]
	knob := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/online", last)
	turn := func(on string) { must(t, os.WriteFile(knob, []byte(on), 0)) }
	t.Cleanup(func() { turn("1") })
	before := startGuest(t, func(*exec.Cmd) {})
	acted(t, last, "a client before", "fast", before.dir)
	turn("0")
	acted(t, all[0], "a client of the older mount meanwhile", "fast", before.dir)
	meanwhile := startGuest(t, func(*exec.Cmd) {})
	acted(t, all[0], "a client meanwhile", "fast", meanwhile.dir)
	turn("1")
	for _, dir := range []string{before.dir, meanwhile.dir} {
		for _, cpu := range []int{all[0], last} {
			acted(t, cpu, fmt.Sprint("a client afterwards on CPU ", cpu), "fast", dir)
		}
	}
}

// A process that a seccomp filter keeps from io_uring is told so.
func TestForbidden(t *testing.T) {
	cmd := actor(-1, "unringed")
	if out, err := cmd.Output(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func init() { actors["unringed"] = func([]string) error { return actUnringed() } }

func actUnringed() error {
	before := takeStock()
	if err := probe.ForbidRings(); err != nil {
		return err
	}
	_, err := Open()
	if !errors.Is(err, ErrNotSupported) {
		return fmt.Errorf("Open: %v, want ErrNotSupported", err)
	}
	for _, word := range []string{"forbidden", "kernel.io_uring_disabled", "seccomp"} {
		if !strings.Contains(err.Error(), word) {
			return fmt.Errorf("%q does not say %q", err, word)
		}
	}
	return before.settled()
}

// A connection that cannot be served over io_uring goes on over /dev/fuse, whoever finds out, and when: the kernel has been
// promised io_uring in INIT, holds every request back, and must be told otherwise.
func TestRefusedConnectionGoesOnOverDev(t *testing.T) {
	for name, spoil := range map[string]func(*fuse.MountOptions){
		"the kernel, because buffers are too small": func(o *fuse.MountOptions) { o.MaxWrite = 8192 },
		"us, because of SingleThreaded":             func(o *fuse.MountOptions) { o.SingleThreaded = true },
		"us, because of EnableLocks":                func(o *fuse.MountOptions) { o.EnableLocks = true },
	} {
		t.Run(name, func(t *testing.T) {
			pool, err := Open()
			must(t, err)
			defer pool.Close()
			fs := newMemFS()
			fs.file("fast", pattern(1, 5000))
			dir := t.TempDir()
			fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
			must(t, err)
			must(t, unix.Mount("test", dir, "fuse.test", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)))
			opts := &fuse.MountOptions{MaxWrite: 1 << 20, Name: "test", DisableSplice: true, ExtraCapabilities: fuse.CAP_OVER_IO_URING}
			server, err := fuse.NewServer(fs, fmt.Sprintf("/dev/fd/%d", fd), opts)
			must(t, err)
			spoilt := *opts
			spoil(&spoilt)
			if _, err := pool.Serve(fd, fs, Options{Mount: &spoilt, Init: server.KernelSettings()}); !errors.Is(err, ErrNotSupported) {
				t.Errorf("Serve: %v, want ErrNotSupported", err)
			}
			ended := make(chan struct{})
			go func() { defer close(ended); server.Serve() }()
			acted(t, -1, "requests over /dev/fuse", "fast", dir)
			must(t, unix.Unmount(dir, 0))
			within(t, 20*time.Second, "the end of the server", ended)
		})
	}
}

// cachedFS lets the kernel cache files, and so read ahead.
type cachedFS struct{ *memFS }

func (f cachedFS) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	status := f.memFS.Open(cancel, in, out)
	out.OpenFlags = 0
	return status
}

func init() { actors["read"] = func(args []string) error { return actRead(args[0], args[1]) } }

// actRead reads a file in order, and must get what has this sum.
func actRead(path, want string) error {
	var all []byte
	err := actOpened(path, func(fd int) error {
		buf := make([]byte, 1<<20)
		for {
			n, err := unix.Read(fd, buf)
			if n <= 0 || err != nil {
				return err
			}
			all = append(all, buf[:n]...)
		}
	})
	if got := sum(all); err == nil && got != want {
		return fmt.Errorf("got %s, want %s", got, want)
	}
	return err
}

// What the kernel reads ahead is answered on any CPU, everything else on the one that it is asked on. Where there is one CPU
// alone it is the same one.
func TestReadingAheadLeavesTheCPU(t *testing.T) {
	all := cpus(t)
	fs := newMemFS()
	content := pattern(3, 16<<20)
	fs.file("large", content)
	fs.file("fast", pattern(1, 5000))
	m := serve(t, onUring, cachedFS{fs})
	// allowed is on how many CPUs a lane may run, after f has run on it.
	allowed := func(l *lane, f func()) int {
		t.Helper()
		n := make(chan int, 1)
		l.post(func() {
			f()
			var set unix.CPUSet
			_ = unix.SchedGetaffinity(0, &set)
			n <- set.Count()
		})
		select {
		case n := <-n:
			return n
		case <-time.After(20 * time.Second):
			t.Fatal("a lane does not answer")
			return 0
		}
	}
	away := func() (n int) {
		m.conn.pool.each(func(l *lane) {
			if allowed(l, func() {}) > 1 {
				n++
			}
		})
		return n
	}
	for _, cpu := range all {
		acted(t, cpu, "small requests", "fast", m.dir)
	}
	if n := away(); n > 0 {
		t.Errorf("%d lanes may leave their CPU after small requests", n)
	}
	acted(t, all[0], "reading a large file in order", "read", m.path("large"), sum(content))
	if n := away(); (n > 0) != (len(all) > 1) {
		t.Errorf("%d lanes may leave their CPU after reading a large file in order, of %d CPUs", n, len(all))
	}
	l := m.conn.pool.of(all[0])[0]
	again := func(n int, ahead bool) func() {
		return func() {
			for range n {
				l.roam(ahead)
			}
		}
	}
	for i, step := range []struct {
		f    func()
		want int
	}{
		{again(homeAfter, false), 1},
		{again(roamAfter-1, true), 1},
		{again(1, true), len(all)},
		{again(1000, true), len(all)},
		{again(homeAfter-1, false), len(all)},
		{again(1, false), 1},
	} {
		if n := allowed(l, step.f); n != step.want {
			t.Errorf("step %d: the lane may run on %d CPUs, want %d", i, n, step.want)
		}
	}
	for _, cpu := range all {
		acted(t, cpu, "small requests afterwards", "fast", m.dir)
	}
}
