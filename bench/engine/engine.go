// Package engine runs a containerd of its own, with its own root, state, socket and, for Lamina, snapshotter, and drives it
// as an engine's user would: images are imported, containers run, written to, committed and removed. Tests and benchmarks use
// it; it asks for root, and [Engine.Close] names everything that was left behind.
package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// Snapshotters that the engine knows.
const (
	Overlay = "overlayfs"
	Lamina  = "lamina"
)

// patience bounds every wait for a daemon. A busy machine may take long; a broken daemon fails at once, by exiting.
const patience = 90 * time.Second

// Config says what to start.
type Config struct {
	Dir     string   // everything is kept below it; it must be empty, and short, for sockets are in it
	Bin     string   // where containerd and its shim are; empty: PATH
	Lamina  string   // the lamina binary, for its snapshotter; empty: no snapshotter but containerd's own
	Args    []string // further arguments of lamina snapshotter
	CRI     bool     // serve the CRI too, on containerd's socket
	Default string   // the CRI's snapshotter; empty: Overlay
	Pause   string   // the CRI's sandbox image

	// Words are what the configuration says of Lamina, in place of the engine's own, as in deploy/examples/containerd.
	Words string
	// Imported has the words in a file that is imported.
	Imported bool
}

// installed is the socket that the examples name.
const installed = "/run/lamina/snapshotter.sock"

// Engine is a running containerd.
type Engine struct {
	Config
	Client *client.Client // in the engine's namespace

	Cgroup string // of its containers, below the root of every hierarchy

	namespace               string
	containerd, snapshotter *daemon
}

// Start starts the snapshotter, if any, and containerd, and waits until both answer.
func Start(ctx context.Context, cfg Config) (_ *Engine, err error) {
	if cfg.Default == "" {
		cfg.Default = Overlay
	}
	name := "lamina-" + strconv.Itoa(os.Getpid()) + "-" + filepath.Base(cfg.Dir)
	e := &Engine{Config: cfg, namespace: name, Cgroup: "/" + name}
	if cfg.CRI {
		e.namespace = "k8s.io" // the CRI's own
	}
	if err := e.configure(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if cfg.Lamina != "" {
		if err := e.StartSnapshotter(ctx); err != nil {
			return nil, err
		}
	}
	if err := e.StartContainerd(ctx); err != nil {
		return nil, err
	}
	return e, nil
}

func (e *Engine) path(elem ...string) string {
	return filepath.Join(append([]string{e.Dir}, elem...)...)
}

// Address of containerd's socket.
func (e *Engine) Address() string { return e.path("c.sock") }

// Snapshots is the directory that a snapshotter keeps its snapshots in.
func (e *Engine) Snapshots(snapshotter string) string {
	if snapshotter == Lamina {
		return e.path("lamina", "snapshots")
	}
	return e.path("root", "io.containerd.snapshotter.v1."+snapshotter, "snapshots")
}

func (e *Engine) configure() error {
	words := strings.ReplaceAll(e.Words, installed, e.path("l.sock"))
	if !e.Imported {
		return os.WriteFile(e.path("config.toml"), []byte(e.config("")+words), 0o644)
	}
	imported := e.path("lamina.toml")
	return errors.Join(os.WriteFile(imported, []byte(words), 0o644),
		os.WriteFile(e.path("config.toml"), []byte(e.config(fmt.Sprintf("imports = [%q]\n", imported))), 0o644))
}

// config is containerd's configuration, in the version that 1.6 and 2.x read: each passes over the plugins that it lacks.
// Imports go to its head.
func (e *Engine) config(imports string) string {
	var b strings.Builder
	off := []string{"io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
		"io.containerd.snapshotter.v1.aufs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"}
	if !e.CRI {
		off = append(off, "io.containerd.grpc.v1.cri")
	}
	quoted := make([]string, len(off))
	for i, p := range off {
		quoted[i] = strconv.Quote(p)
	}
	fmt.Fprintf(&b, "version = 2\n%sroot = %q\nstate = %q\ndisabled_plugins = [%s]\n", imports, e.path("root"), e.path("state"), strings.Join(quoted, ", "))
	fmt.Fprintf(&b, "[grpc]\naddress = %q\n[ttrpc]\naddress = %q\n", e.Address(), e.Address()+".ttrpc")
	fmt.Fprintf(&b, "[plugins.\"io.containerd.internal.v1.opt\"]\npath = %q\n", e.path("opt"))
	if e.Lamina != "" && e.Words == "" {
		fmt.Fprintf(&b, "[proxy_plugins.lamina]\ntype = \"snapshot\"\naddress = %q\n", e.path("l.sock"))
		for _, s := range []string{Overlay, Lamina} {
			fmt.Fprintf(&b, "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatform = \"linux\"\nsnapshotter = %q\n", s)
		}
	}
	if e.CRI && e.Words == "" {
		fmt.Fprintf(&b, "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = %q\n", e.Default)
	}
	if e.CRI {
		fmt.Fprintf(&b, `[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = %q
disable_tcp_service = true
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = %q
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = %q
conf_dir = %q
`, e.Pause, e.path("runc"), e.path("cni", "bin"), e.path("cni", "conf"))
	}
	return b.String()
}

// Context is ctx with the engine's namespace.
func (e *Engine) Context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, e.namespace)
}

// StartSnapshotter starts lamina snapshotter, also again after [Engine.KillSnapshotter].
func (e *Engine) StartSnapshotter(ctx context.Context) error {
	args := append([]string{"snapshotter", "--root", e.path("lamina"), "--address", e.path("l.sock")}, e.Args...)
	d, err := start(e.path("snapshotter.log"), "", e.Lamina, args...)
	if err != nil {
		return err
	}
	e.snapshotter = d
	if err := d.await(ctx, e.path("l.sock")); err != nil || e.containerd == nil || e.containerd.alive() != nil {
		return err
	}
	// A containerd that has lost its snapshotter tries again at its own pace, and fails what is asked of it until then.
	return poll(ctx, "containerd has found the snapshotter again", func() (bool, error) {
		sn := e.Client.SnapshotService(Lamina)
		if _, err := sn.Prepare(e.Context(ctx), "probe", ""); errdefs.IsUnavailable(err) {
			return false, d.alive()
		} else if err != nil {
			return false, err
		}
		return true, sn.Remove(e.Context(ctx), "probe")
	})
}

// StartContainerd starts containerd, also again after [Engine.KillContainerd].
func (e *Engine) StartContainerd(ctx context.Context) error {
	program := "containerd"
	if e.Bin != "" {
		program = filepath.Join(e.Bin, program)
	}
	d, err := start(e.path("containerd.log"), e.Bin, program, "--config", e.path("config.toml"))
	if err != nil {
		return err
	}
	e.containerd = d
	if err := d.await(ctx, e.Address()); err != nil {
		return err
	}
	if e.Client, err = client.New(e.Address(), client.WithDefaultNamespace(e.namespace), client.WithTimeout(patience)); err != nil {
		return fmt.Errorf("containerd at %s: %w", e.Address(), err)
	}
	// The socket is there before the plugins behind it are.
	return poll(ctx, "containerd serves", func() (bool, error) {
		if err := d.alive(); err != nil {
			return false, err
		}
		ok, err := e.Client.IsServing(ctx)
		return ok && err == nil, nil
	})
}

// KillContainerd kills containerd as the kernel would when memory runs out.
func (e *Engine) KillContainerd() error {
	return errors.Join(e.Client.Close(), e.containerd.kill())
}

// KillSnapshotter kills Lamina's snapshotter in the same way. Those who serve its mounts are not its children.
func (e *Engine) KillSnapshotter() error { return e.snapshotter.kill() }

// StopSnapshotter asks it to end.
func (e *Engine) StopSnapshotter() error { return e.snapshotter.stop() }

// Logs are the last lines of the daemons' logs, for a test that failed.
func (e *Engine) Logs() string {
	var b strings.Builder
	for _, name := range []string{"containerd.log", "snapshotter.log"} {
		text, err := os.ReadFile(e.path(name))
		if err != nil {
			continue
		}
		lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
		lines = slices.DeleteFunc(lines, func(l []byte) bool { return bytes.Contains(l, []byte("level=info")) })
		lines = lines[max(0, len(lines)-60):]
		fmt.Fprintf(&b, "== %s\n%s\n", name, bytes.Join(lines, []byte("\n")))
	}
	return b.String()
}

// Close removes all containers and images, stops the daemons and looks for what they left. What it finds is an error, and
// is taken away.
func (e *Engine) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ctx = e.Context(ctx)
	var err error
	if e.Client != nil && e.containerd.alive() == nil {
		err = errors.Join(e.RemoveAll(ctx), e.leftSnapshots(ctx))
	}
	if e.Client != nil {
		e.Client.Close()
	}
	for _, d := range []*daemon{e.containerd, e.snapshotter} {
		if d != nil {
			err = errors.Join(err, d.stop())
		}
	}
	return errors.Join(err, e.sweep())
}

// daemon is a program that serves a socket.
type daemon struct {
	cmd    *exec.Cmd
	log    string
	exited chan struct{}
	err    error // set when exited is closed
}

func start(log, bin, program string, args ...string) (*daemon, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d := &daemon{cmd: exec.Command(program, args...), log: log, exited: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = f, f
	d.cmd.Env = os.Environ()
	if bin != "" {
		d.cmd.Env = append(d.cmd.Env, "PATH="+bin+":"+os.Getenv("PATH"))
	}
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for us, who will stop it
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.exited)
	}()
	return d, nil
}

// alive is nil while the program runs.
func (d *daemon) alive() error {
	select {
	case <-d.exited:
		text, _ := os.ReadFile(d.log)
		text = text[max(0, len(text)-4000):]
		return fmt.Errorf("%s has exited (%w): %s", filepath.Base(d.cmd.Path), d.err, text)
	default:
		return nil
	}
}

// await waits until somebody listens: the socket of a daemon that was killed is there, too.
func (d *daemon) await(ctx context.Context, socket string) error {
	return poll(ctx, "somebody listens on "+socket, func() (bool, error) {
		if err := d.alive(); err != nil {
			return false, err
		}
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return false, nil
		}
		return true, conn.Close()
	})
}

func (d *daemon) kill() error {
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-d.exited
	return nil
}

// stop asks the program to end, and kills it when it does not: that is an error.
func (d *daemon) stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return nil // it has ended
	}
	select {
	case <-d.exited:
		return nil
	case <-time.After(patience):
		return errors.Join(fmt.Errorf("%s does not end on SIGTERM", filepath.Base(d.cmd.Path)), d.kill())
	}
}

// poll waits until f says yes.
func poll(ctx context.Context, what string, f func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		ok, err := f()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited in vain until %s: %w", what, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// left are the processes that have the engine's directory on their command line or in their root: shims, servers, and what
// runs in containers.
func (e *Engine) left() []int {
	var pids []int
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		pid, _ := strconv.Atoi(filepath.Base(p))
		if pid == os.Getpid() {
			continue
		}
		args, err := os.ReadFile(p + "/cmdline")
		if err != nil || len(args) == 0 {
			continue // a kernel thread, a zombie, or gone
		}
		if bytes.Contains(args, []byte(e.Dir+"/")) || e.inContainer(p) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// inContainer tells by the mounts that a process sees: runc names the container's own below the engine's directory.
func (e *Engine) inContainer(proc string) bool {
	root, err := os.Readlink(proc + "/root")
	if err != nil || root != "/" {
		return strings.HasPrefix(root, e.Dir+"/")
	}
	cgroup, err := os.ReadFile(proc + "/cgroup")
	return err == nil && bytes.Contains(cgroup, []byte(":"+e.Cgroup+"/"))
}

// mounts below the engine's directory, the innermost first.
func (e *Engine) mounts() ([]string, error) {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], e.Dir+"/") {
			found = append(found, f[1])
		}
	}
	slices.Sort(found)
	slices.Reverse(found)
	return found, nil
}

// sweep takes away what was left and tells what it was. What ends by itself, but not at once, is given time.
func (e *Engine) sweep() error {
	var pids []int
	err := poll(context.Background(), "processes have ended", func() (bool, error) {
		pids = e.left()
		return len(pids) == 0, nil
	})
	for _, pid := range pids {
		args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		err = errors.Join(err, fmt.Errorf("still running: %d %s", pid, bytes.ReplaceAll(args, []byte{0}, []byte(" "))), syscall.Kill(pid, syscall.SIGKILL))
	}
	mounts, mountErr := e.mounts()
	err = errors.Join(err, mountErr, e.removeCgroups())
	for _, m := range mounts {
		err = errors.Join(err, fmt.Errorf("still mounted: %s", m))
		if e := syscall.Unmount(m, syscall.MNT_DETACH); e != nil {
			err = errors.Join(err, e)
		}
	}
	return err
}

// removeCgroups removes the directories that runc made on the way to those of its containers, which it removes itself. The
// hierarchies are those of both versions of cgroups.
func (e *Engine) removeCgroups() error {
	var err error
	_ = poll(context.Background(), "the engine's cgroups are gone", func() (bool, error) { // busy for a moment after their last process
		err = nil
		for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			dirs, _ := filepath.Glob(pattern + e.Cgroup)
			for _, dir := range dirs {
				if e := os.Remove(dir); e != nil && !errors.Is(e, os.ErrNotExist) {
					err = errors.Join(err, fmt.Errorf("left behind: %w", e))
				}
			}
		}
		return err == nil, nil
	})
	return err
}
