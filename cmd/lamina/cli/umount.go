package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"lamina/pool"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func umountCommand() *cobra.Command {
	var lazy bool
	cmd := &cobra.Command{
		Use:   "umount [-l] MOUNTPOINT",
		Short: "unmount, and wait until everything is flushed",
		Long: `Unmounts the Lamina mount on MOUNTPOINT and returns when its server has flushed every file and exited. If somebody
still uses the mount, nothing happens, and the message says who.

With -l the mount disappears from the tree at once and is served until its last user is gone; the command does not wait
for that. A mount whose server was killed can be taken away as well.`,
		Args: operands("the mount point", 1),
		RunE: func(_ *cobra.Command, args []string) error { return withCode(exitFailure, umount(args[0], lazy)) },
	}
	cmd.Flags().BoolVarP(&lazy, "lazy", "l", false, "detach now, end when the last user is gone")
	return cmd
}

func umount(arg string, lazy bool) error {
	mnt, err := resolveMount(arg)
	if err != nil {
		return err
	}
	server, err := topServer(mnt)
	if err != nil {
		return err
	}
	defer closeServer(server.pidfd)
	err = pool.UnmountPath(mnt, lazy)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s: in use by %s: end them, or detach the mount with lamina umount -l", arg, pool.Holders(mnt))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", arg, err)
	}
	if lazy || server.pidfd < 0 {
		return nil
	}
	return server.waitEnd(arg)
}

// resolveMount returns the absolute name of a mount point. The mount itself is not touched, because its server may be
// dead or slow: only the way to it is.
func resolveMount(mnt string) (string, error) {
	abs, err := filepath.Abs(mnt)
	if err != nil {
		return "", err
	}
	notOurs := fmt.Errorf("%s: %w (lamina status lists them)", mnt, errNotMounted)
	switch {
	case pool.IsLaminaMount(abs):
		return abs, nil
	case pool.TopDevice(abs) != "": // somebody else's, which may hang
		return "", notOurs
	}
	resolved, err := filepath.EvalSymlinks(abs)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("%s: does not exist", mnt)
	case err != nil:
		return "", fmt.Errorf("%s: %w", mnt, pool.Reason(err))
	case !pool.IsLaminaMount(resolved):
		return "", notOurs
	}
	return resolved, nil
}

// mountServer is who serves a mount. pidfd is -1 if it is gone.
type mountServer struct {
	socket string
	pidfd  int
	shared bool // it serves other mounts too
}

// topServer returns the server of the topmost mount on mnt. Others may be asked for by the same name: they serve a mount
// below it, or one that was detached, or one in another mount namespace.
func topServer(mnt string) (mountServer, error) {
	best := mountServer{pidfd: -1}
	device := pool.TopDevice(mnt)
	paths, err := pool.Sockets(mnt)
	if err != nil {
		return best, err
	}
	var started time.Time
	for _, path := range paths {
		st, pidfd, err := pool.Ask(path)
		if errors.Is(err, pool.ErrGone) {
			_ = os.Remove(path)
			continue
		}
		if err != nil && pidfd < 0 {
			return best, fmt.Errorf("control socket %s: %w", path, err)
		}
		if err == nil && st.Device != device { // one that does not answer may be it
			closeServer(pidfd)
			continue
		}
		if best.pidfd >= 0 && st.Started.Before(started) {
			closeServer(pidfd)
			continue
		}
		if best.pidfd >= 0 {
			unix.Close(best.pidfd)
		}
		best, started = mountServer{path, pidfd, st.Shared}, st.Started
	}
	return best, nil
}

// patience is how long a flush may take without a word.
const patience = 2 * time.Second

func closeServer(pidfd int) {
	if pidfd >= 0 {
		unix.Close(pidfd)
	}
}

// waitEnd waits until the mount is flushed, and says so when that takes long: until the server's process has ended, or, if it
// serves others too, until it has let go of the mount's socket.
func (s *mountServer) waitEnd(mnt string) error {
	step := patience
	if s.shared {
		step = 10 * time.Millisecond
	}
	since, told := time.Now(), time.Duration(0)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.pidfd), Events: unix.POLLIN}}, int(step.Milliseconds()))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("waiting for the server: %w", err)
		case n > 0:
			return nil
		}
		if s.shared {
			if _, err := os.Lstat(s.socket); errors.Is(err, os.ErrNotExist) {
				return nil
			}
		}
		if waited := time.Since(since); waited >= told+patience {
			told = waited
			fmt.Fprintf(os.Stderr, "lamina: %s is unmounted; its server has been flushing for %s\n", mnt, waited.Round(time.Second))
		}
	}
}
