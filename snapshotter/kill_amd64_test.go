package snapshotter_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"lamina/snapshotter"
	"lamina/tests/steps"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The tests below run one request in a snapshotter of its own and kill it (SIGKILL) in front of its first change, of its
// second, and so on. Each time the next snapshotter must find the request not begun or done, and nothing besides.

const victimEnv = "LAMINA_TEST_VICTIM" // NAME OF THE REQUEST:ROOT

// The tracer follows the main thread, and an init function is what can stay on it.
func init() {
	if _, ok := os.LookupEnv(victimEnv); ok {
		runtime.LockOSThread()
	}
}

// isStep takes what changes files, the database or mounts, and what asks the pool's server.
func isStep(regs *unix.PtraceRegs) bool {
	switch regs.Orig_rax {
	case unix.SYS_OPENAT:
		return regs.Rdx&unix.O_CREAT != 0
	case unix.SYS_MKDIRAT, unix.SYS_SYMLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_UNLINKAT, unix.SYS_FCHOWNAT, unix.SYS_FCHMODAT,
		unix.SYS_PWRITE64, unix.SYS_FTRUNCATE, unix.SYS_FDATASYNC, unix.SYS_WRITE, unix.SYS_UMOUNT2:
		return true
	}
	return false
}

const unpackKey = "extract-9 new"

// killOp is a request: what it does to a store with an image "top" and a container "c" that has written to it, and how to
// tell whether it was done. undo makes the store what it was.
type killOp struct {
	do   func(ctx context.Context, s snapshots.Snapshotter) error
	done func(s *store) bool
	undo func(s *store)
}

func prepared(key string, view bool) killOp {
	return killOp{
		do: func(ctx context.Context, s snapshots.Snapshotter) (err error) {
			if view {
				_, err = s.View(ctx, key, "top", gcRoot)
			} else {
				_, err = s.Prepare(ctx, key, "top", gcRoot)
			}
			return err
		},
		done: func(s *store) bool {
			if !s.exists(key) {
				return false
			}
			s.again(key, func(dir string) { want(s.t, dir+"/big", big) })
			return true
		},
		undo: func(s *store) { must(s.t, s.Remove(s.ctx, key)) },
	}
}

var killOps = map[string]killOp{
	"prepare": prepared("new", false),
	"unpack":  prepared(unpackKey, false),
	"view":    prepared("new", true),
	"commit": {
		do: func(ctx context.Context, s snapshots.Snapshotter) error {
			return s.Commit(ctx, "committed", "c", gcRoot)
		},
		done: func(s *store) bool {
			if !s.exists("committed") {
				s.again("c", func(dir string) { want(s.t, dir+"/big", written) })
				return false
			}
			if s.exists("c") {
				s.t.Error("committed, and the container is still there")
			}
			s.view("committed", func(dir string) { want(s.t, dir+"/big", written) })
			return true
		},
		undo: func(s *store) { must(s.t, s.Remove(s.ctx, "committed")); s.victimsContainer() },
	},
	"remove": {
		do: func(ctx context.Context, s snapshots.Snapshotter) error { return s.Remove(ctx, "c") },
		done: func(s *store) bool {
			if s.exists("c") {
				s.again("c", func(dir string) { want(s.t, dir+"/big", written) })
				return false
			}
			return true
		},
		undo: func(s *store) { s.victimsContainer() },
	},
}

var written = big[:500_000] + "XYZ" + big[500_003:]

func (s *store) victimsContainer() {
	s.container("c", "top", func(dir string) { overwrite(s.t, dir+"/big", "XYZ", 500_000) })
}

func (s *store) exists(key string) bool {
	_, err := s.Stat(s.ctx, key)
	if err != nil && !errdefs.IsNotFound(err) {
		s.t.Fatal(err)
	}
	return err == nil
}

// victim opens the root, stops for the tracer to take note, and does what it is told.
func victim(spec string) int {
	op, root, _ := strings.Cut(spec, ":")
	s, err := snapshotter.New(snapshotter.Config{Root: root, Options: killOptions})
	if err == nil {
		err = unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGSTOP)
	}
	if err == nil {
		err = killOps[op].do(namespaces.WithNamespace(context.Background(), "test"), s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

var killOptions = []string{"transport=dev"}

func TestKilledBetweenAnyTwoSteps(t *testing.T) {
	for name, op := range killOps {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, snapshotter.Config{Options: killOptions})
			s.image()
			s.victimsContainer()
			n := 1
			for ; ; n++ {
				s.stop()
				finished := s.run(name, n) < n
				s.open()
				s.clean()
				done := op.done(s)
				if finished && !done {
					t.Fatal("not killed, and not done")
				}
				if finished && n < 5 {
					t.Fatalf("done in %d steps: are they still counted?", n-1)
				}
				if done {
					op.undo(s)
				}
				s.clean()
				if finished {
					return
				}
			}
		})
	}
}

// run has a snapshotter of its own do the request.
func (s *store) run(op string, n int) int {
	s.t.Helper()
	self, err := os.Executable()
	must(s.t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), victimEnv+"="+op+":"+s.c.Root)
	cmd.Stderr = os.Stderr
	return steps.Run(s.t.(*testing.T), cmd, n, isStep)
}
