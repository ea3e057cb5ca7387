package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Container is a container with its task.
type Container struct {
	client.Container
	Snapshotter string
	engine      *Engine
	log         string
	task        client.Task
	exit        <-chan client.ExitStatus
	exited      bool // exit has told
}

// Spec says what to run.
type Spec struct {
	ID          string // of the container and of its snapshot
	Image       client.Image
	Snapshotter string
	Args        []string
	Options     []oci.SpecOpts       // further ones
	Task        []client.NewTaskOpts // further ones
}

// Create prepares the container's root filesystem and makes its task, which does not run yet. It shares the host's network.
// What its programs print goes to a file that the shim writes, so that it is there even while nobody else is.
func (e *Engine) Create(ctx context.Context, s Spec) (_ *Container, err error) {
	opts := append([]oci.SpecOpts{
		oci.WithImageConfig(s.Image), oci.WithProcessArgs(s.Args...),
		oci.WithHostNamespace(specs.NetworkNamespace), oci.WithCgroup(e.Cgroup + "/" + s.ID),
	}, s.Options...)
	c := &Container{engine: e, Snapshotter: s.Snapshotter, log: e.path(s.ID + ".out")}
	if c.Container, err = e.Client.NewContainer(ctx, s.ID, client.WithSnapshotter(s.Snapshotter), client.WithNewSnapshot(s.ID, s.Image),
		client.WithRuntime("io.containerd.runc.v2", &options.Options{Root: e.path("runc")}), client.WithNewSpec(opts...)); err != nil {
		return nil, fmt.Errorf("container %s: %w", s.ID, err)
	}
	if err := c.newTask(ctx, s.Task...); err != nil {
		return nil, errors.Join(err, c.Delete(ctx, client.WithSnapshotCleanup))
	}
	return c, nil
}

func (c *Container) newTask(ctx context.Context, opts ...client.NewTaskOpts) (err error) {
	c.exited = false
	if c.task, err = c.NewTask(ctx, cio.LogFile(c.log), opts...); err != nil {
		return fmt.Errorf("task %s: %w", c.ID(), err)
	}
	if c.exit, err = c.task.Wait(ctx); err != nil {
		_, deleteErr := c.task.Delete(ctx, client.WithProcessKill)
		return errors.Join(err, deleteErr)
	}
	return nil
}

// Start lets the container's program run.
func (c *Container) Start(ctx context.Context) error {
	if err := c.task.Start(ctx); err != nil {
		_, deleteErr := c.task.Delete(ctx, client.WithProcessKill)
		return errors.Join(fmt.Errorf("starting %s: %w", c.ID(), err), deleteErr, c.Delete(ctx, client.WithSnapshotCleanup))
	}
	return nil
}

// Run creates a container and starts it.
func (e *Engine) Run(ctx context.Context, s Spec) (*Container, error) {
	c, err := e.Create(ctx, s)
	if err != nil {
		return nil, err
	}
	return c, c.Start(ctx)
}

// Load finds a running container again, after containerd has been away.
func (e *Engine) Load(ctx context.Context, c *Container) (err error) {
	if c.Container, err = e.Client.LoadContainer(ctx, c.ID()); err != nil {
		return err
	}
	if c.task, err = c.Container.Task(ctx, nil); err != nil {
		return fmt.Errorf("task %s: %w", c.ID(), err)
	}
	c.exit, err = c.task.Wait(ctx)
	return err
}

// Pid of the container's first process.
func (c *Container) Pid() int { return int(c.task.Pid()) }

// Check tells whether the container's root filesystem is what its snapshotter is there for: everything else would pass on
// another one, too.
func (c *Container) Check() error {
	want := int64(unix.OVERLAYFS_SUPER_MAGIC)
	if c.Snapshotter == Lamina {
		want = unix.FUSE_SUPER_MAGIC
	}
	var st unix.Statfs_t
	if err := unix.Statfs(fmt.Sprintf("/proc/%d/root", c.Pid()), &st); err != nil {
		return fmt.Errorf("%s: %w", c.ID(), err)
	}
	if st.Type != want {
		return fmt.Errorf("%s, of snapshotter %s: its root filesystem is of type %#x, not %#x", c.ID(), c.Snapshotter, st.Type, want)
	}
	return nil
}

// Status of the container's task.
func (c *Container) Status(ctx context.Context) (client.ProcessStatus, error) {
	s, err := c.task.Status(ctx)
	return s.Status, err
}

// Output is what the container's program has printed until now.
func (c *Container) Output() (string, error) {
	b, err := os.ReadFile(c.log)
	return string(b), err
}

// Exited waits until containerd tells that the container's program has ended, and nothing more: the root filesystem is still
// mounted then. An exit status other than 0 is an error.
func (c *Container) Exited(ctx context.Context) error {
	select {
	case s := <-c.exit:
		c.exited = true
		return c.status("", s)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Wait is Exited, and removes the task: after it, all that was printed is in the file, and the root filesystem is unmounted
// from the task's directory.
func (c *Container) Wait(ctx context.Context) error {
	if err := c.Exited(ctx); err != nil {
		return err
	}
	_, err := c.task.Delete(ctx)
	c.task = nil
	return err
}

func (c *Container) status(what string, s client.ExitStatus) error {
	code, _, err := s.Result()
	if err != nil || code == 0 {
		return err
	}
	out, _ := c.Output()
	return fmt.Errorf("%s: %sexit status %d: %s", c.ID(), what, code, out)
}

var execs atomic.Int64

// Exec runs a program in the container and returns its standard output; the error carries its standard error.
func (c *Container) Exec(ctx context.Context, args ...string) (string, error) {
	spec, err := c.Spec(ctx)
	if err != nil {
		return "", err
	}
	p := *spec.Process
	p.Args, p.Terminal = args, false
	var out, errOut bytes.Buffer // two goroutines write
	process, err := c.task.Exec(ctx, fmt.Sprintf("exec-%d", execs.Add(1)), &p, cio.NewCreator(cio.WithStreams(nil, &out, &errOut), cio.WithFIFODir(c.engine.path("fifo"))))
	if err != nil {
		return "", fmt.Errorf("%s: exec %q: %w", c.ID(), args, err)
	}
	exit, err := process.Wait(ctx)
	if err == nil {
		err = process.Start(ctx)
	}
	if err != nil {
		_, deleteErr := process.Delete(ctx, client.WithProcessKill)
		return "", errors.Join(fmt.Errorf("%s: exec %q: %w", c.ID(), args, err), deleteErr)
	}
	var s client.ExitStatus
	select {
	case s = <-exit:
	case <-ctx.Done():
		_, deleteErr := process.Delete(context.WithoutCancel(ctx), client.WithProcessKill)
		return "", errors.Join(ctx.Err(), deleteErr)
	}
	process.IO().Wait() // until all that was printed has been read
	_, err = process.Delete(ctx)
	return out.String(), errors.Join(c.status(fmt.Sprintf("exec %q: %s%s", args, out.String(), errOut.String()), s), err)
}

// Stop kills the container's program and removes the task. The root filesystem stays.
func (c *Container) Stop(ctx context.Context) error {
	if c.task == nil {
		return nil
	}
	if err := c.task.Kill(ctx, syscall.SIGKILL); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		return err
	}
	if !c.exited {
		select {
		case <-c.exit:
		case <-ctx.Done():
			return fmt.Errorf("%s does not end: %w", c.ID(), ctx.Err())
		}
	}
	if _, err := c.task.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("task %s: %w", c.ID(), err)
	}
	c.task = nil
	return nil
}

// Again starts a stopped container with its own root filesystem.
func (c *Container) Again(ctx context.Context) error {
	if err := c.newTask(ctx); err != nil {
		return err
	}
	return c.task.Start(ctx)
}

// Remove stops the container and removes it with its root filesystem.
func (c *Container) Remove(ctx context.Context) error {
	if err := c.Stop(ctx); err != nil {
		return err
	}
	if err := c.Delete(ctx, client.WithSnapshotCleanup); err != nil {
		return fmt.Errorf("removing %s: %w", c.ID(), err)
	}
	return nil
}

// RemoveAll removes every container, image and lease of the engine, and lets containerd collect its garbage.
func (e *Engine) RemoveAll(ctx context.Context) error {
	containers, err := e.Client.Containers(ctx)
	for _, c := range containers {
		if task, taskErr := c.Task(ctx, nil); taskErr == nil {
			_, deleteErr := task.Delete(ctx, client.WithProcessKill)
			err = errors.Join(err, deleteErr)
		}
		err = errors.Join(err, c.Delete(ctx, client.WithSnapshotCleanup))
	}
	list, listErr := e.Client.ImageService().List(ctx)
	err = errors.Join(err, listErr)
	for _, i := range list {
		err = errors.Join(err, e.Client.ImageService().Delete(ctx, i.Name))
	}
	return errors.Join(err, e.Collect(ctx))
}

// Collect runs containerd's garbage collection and waits for it. Only the end of a lease asks for one by itself.
func (e *Engine) Collect(ctx context.Context) error {
	l, err := e.Client.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Minute))
	if err != nil {
		return err
	}
	return e.Client.LeasesService().Delete(ctx, l, leases.SynchronousDelete)
}

// RemoveImage removes an image with whatever only it needed.
func (e *Engine) RemoveImage(ctx context.Context, name string) error {
	return e.Client.ImageService().Delete(ctx, name, images.SynchronousDelete())
}

// SnapshotNames of a snapshotter, in the engine's namespace.
func (e *Engine) SnapshotNames(ctx context.Context, snapshotter string) (names []string, err error) {
	err = e.Client.SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		names = append(names, i.Name)
		return nil
	})
	return names, err
}

// leftSnapshots names snapshots that outlived everything that needed them, and directories that outlived their snapshots.
// The last garbage collection may still be removing some; what it could not remove, the next one does.
func (e *Engine) leftSnapshots(ctx context.Context) error {
	snapshotters := []string{Overlay}
	if e.Lamina != "" {
		snapshotters = append(snapshotters, Lamina)
	}
	var err error
	for _, s := range snapshotters {
		var names, dirs []string
		waited := poll(ctx, s+"'s snapshots are gone", func() (bool, error) {
			err := e.Collect(ctx)
			if err != nil {
				return false, err
			}
			if names, err = e.SnapshotNames(ctx, s); err != nil {
				return false, err
			}
			entries, err := os.ReadDir(e.Snapshots(s))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return false, err
			}
			dirs = nil
			for _, d := range entries {
				dirs = append(dirs, d.Name())
			}
			return len(names)+len(dirs) == 0, nil
		})
		if waited != nil {
			err = errors.Join(err, fmt.Errorf("%w: snapshots %q, directories %q", waited, names, dirs))
		}
	}
	return err
}
