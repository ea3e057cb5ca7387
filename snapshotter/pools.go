package snapshotter

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"lamina/pool"

	"golang.org/x/sys/unix"
)

// pools are the servers of this root's pools.
type pools struct {
	c  Config
	mu sync.Mutex
	by map[string]*poolServer
}

func (p *pools) init(c Config) { p.c, p.by = c, map[string]*poolServer{} }

// of returns a pool's server, which need not run.
func (p *pools) of(name string) *poolServer {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.by[name]
	if s == nil {
		base := filepath.Join(p.c.Root, "run", name)
		s = &poolServer{client: pool.Client{Socket: base + ".sock"},
			spawn: pool.Spawn{Program: p.c.Program, Socket: base + ".sock", Log: base + ".log", Cgroup: p.c.Cgroup, Survive: p.c.Survive}}
		p.by[name] = s
	}
	return s
}

// close tells the servers to end with their last mount.
func (p *pools) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	sockets, _ := filepath.Glob(filepath.Join(p.c.Root, "run", "*.sock"))
	for _, socket := range sockets {
		c := pool.Client{Socket: socket}
		_, _ = c.Do(ctx, pool.Request{Op: pool.OpQuit}) // it may have gone
		c.Close()
	}
	for _, s := range p.by {
		s.client.Close()
	}
}

const (
	closePatience = 5 * time.Second
	// discardPatience is for a server that hangs: the mount is taken away without it then.
	discardPatience = 15 * time.Second
	// startPatience is how long a server may take to answer after it was started: others may be dying.
	startPatience = 30 * time.Second
	startPoll     = 5 * time.Millisecond
)

// poolServer is the server of one pool.
type poolServer struct {
	client pool.Client
	spawn  pool.Spawn
	start  sync.Mutex
}

// ask asks the server, and starts it if there is none.
func (s *poolServer) ask(ctx context.Context, r pool.Request) (pool.Reply, error) {
	deadline := time.Now().Add(startPatience)
	for {
		reply, err := s.client.Do(ctx, r)
		if !errors.Is(err, pool.ErrNoServer) && !errors.Is(err, unix.ESHUTDOWN) || time.Now().After(deadline) {
			return reply, err
		}
		if err := s.started(ctx); err != nil {
			return reply, err
		}
	}
}

// started starts a server unless there is one by now, and gives it a moment.
func (s *poolServer) started(ctx context.Context) error {
	s.start.Lock()
	defer s.start.Unlock()
	_, err := s.client.Do(ctx, pool.Request{Op: pool.OpList})
	if errors.Is(err, pool.ErrNoServer) {
		if err := s.spawn.Start(); err != nil {
			return err
		}
	} // else it is about to end, and another one can be started when it has given up its socket
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(startPoll):
		return nil
	}
}

func (s *poolServer) mount(ctx context.Context, mnt, container string, options []string) error {
	r := pool.Request{Op: pool.OpMount, Mountpoint: mnt, Container: container, Options: options}
	_, err := s.ask(ctx, r)
	if errors.Is(err, unix.EBUSY) { // an earlier snapshotter had other options: anew, unless somebody uses it
		if _, e := s.unmount(ctx, mnt); e != nil {
			return e
		}
		_, err = s.ask(ctx, r)
	}
	return err
}

// unmount flushes and unmounts. A mount that is not there is unmounted; synced says whether it was there, and all that was
// written in it is on disk.
func (s *poolServer) unmount(ctx context.Context, mnt string) (synced bool, err error) {
	// What cannot be put on disk is found out while the mount is there, and nothing is lost.
	_, err = s.client.Do(ctx, pool.Request{Op: pool.OpSync, Mountpoint: mnt})
	if err == nil {
		_, err = s.client.Do(ctx, pool.Request{Op: pool.OpUnmount, Mountpoint: mnt})
	}
	return err == nil, ignoreGone(err)
}

func (s *poolServer) discard(ctx context.Context, mnt string) error {
	_, err := s.client.Do(ctx, pool.Request{Op: pool.OpUnmount, Mountpoint: mnt, Lazy: true, Discard: true})
	return ignoreGone(err)
}

// seal makes a layer of an upper directory that is not mounted.
func (s *poolServer) seal(ctx context.Context, options []string) error {
	_, err := s.ask(ctx, pool.Request{Op: pool.OpSeal, Options: options})
	return err
}

func ignoreGone(err error) error {
	if errors.Is(err, pool.ErrNoServer) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESHUTDOWN) {
		return nil
	}
	return err
}
