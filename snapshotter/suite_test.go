package snapshotter_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"lamina/pool"
	"lamina/snapshotter"
	"lamina/tests/probe"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"golang.org/x/sys/unix"
)

// containerd's own suite, whose snapshots are all containers' as far as Lamina can tell, over every format and transport.
func TestSuite(t *testing.T) {
	// In memory: most of its time it would wait for a disk, hundreds of commits of a hundred layers.
	memory := t.TempDir()
	must(t, unix.Mount("snapshotter", memory, "tmpfs", 0, "size=1g"))
	t.Cleanup(func() { must(t, eventually(func() error { return unix.Unmount(memory, 0) })) })
	t.Setenv("TMPDIR", memory)
	for _, transport := range transports(t) {
		for _, format := range []string{"sparse", "bcow"} {
			name := format + "-" + transport
			t.Run(name, func(t *testing.T) {
				testsuite.SnapshotterSuite(t, name, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
					s, err := snapshotter.New(snapshotter.Config{Root: root, Options: []string{"format=" + format, "transport=" + transport}, Logf: t.Logf})
					if err != nil {
						return nil, nil, err
					}
					return s, func() error { return errors.Join(s.Close(), endPools(root)) }, nil
				})
			})
		}
	}
}

func transports(t *testing.T) []string {
	if probe.FuseUring.Missing(t) != nil {
		return []string{"dev"}
	}
	return []string{"dev", "uring"}
}

// endPools unmounts what the test left on purpose, ends the servers of a root, and waits until they are gone.
func endPools(root string) error {
	sockets, err := filepath.Glob(filepath.Join(root, "run", "*.sock"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, socket := range sockets {
		c := pool.Client{Socket: socket}
		reply, err := c.Do(ctx, pool.Request{Op: pool.OpList})
		for _, mnt := range reply.Mounts {
			_, e := c.Do(ctx, pool.Request{Op: pool.OpUnmount, Mountpoint: mnt, Lazy: true, Discard: true})
			err = errors.Join(err, e)
		}
		if err == nil {
			_, err = c.Do(ctx, pool.Request{Op: pool.OpQuit})
		}
		c.Close()
		if err != nil && !errors.Is(err, pool.ErrNoServer) {
			return err
		}
	}
	return eventually(func() error {
		for _, socket := range sockets {
			c := pool.Client{Socket: socket}
			_, err := c.Do(ctx, pool.Request{Op: pool.OpList})
			c.Close()
			if !errors.Is(err, pool.ErrNoServer) {
				return fmt.Errorf("the server on %s is still there: %w", socket, err)
			}
		}
		return nil
	})
}

// eventually waits for a condition.
func eventually(condition func() error) error {
	// What is waited for can be a sync of all that the disk has to write.
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		err := condition()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}
