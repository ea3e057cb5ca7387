package cli

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

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
	if server >= 0 {
		defer unix.Close(server)
	}
	err = unmountPath(mnt, lazy)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s: in use by %s: end them, or detach the mount with lamina umount -l", arg, holders(mnt))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", arg, err)
	}
	if lazy || server < 0 {
		return nil
	}
	return waitExit(server, arg)
}

// resolveMount returns the absolute name of a mount point. The mount itself is not touched, because its server may be
// dead or slow: only the way to it is.
func resolveMount(mnt string) (string, error) {
	abs, err := filepath.Abs(mnt)
	if err != nil {
		return "", err
	}
	if isLaminaMount(abs) {
		return abs, nil
	}
	resolved, err := filepath.EvalSymlinks(abs)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("%s: does not exist", mnt)
	case err != nil:
		return "", fmt.Errorf("%s: %w", mnt, reason(err))
	case !isLaminaMount(resolved):
		return "", fmt.Errorf("%s: %w (lamina status lists them)", mnt, errNotMounted)
	}
	return resolved, nil
}

// isLaminaMount tells whether the topmost mount on the directory is one of ours.
func isLaminaMount(abs string) bool {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	ours := false
	for line := range bytes.Lines(info) {
		before, after, _ := strings.Cut(string(line), " - ")
		if fields := strings.Fields(before); len(fields) > 4 && unescapeMountinfo(fields[4]) == abs {
			ours = strings.HasPrefix(after, "fuse.lamina ")
		}
	}
	return ours
}

// topServer returns a pidfd of the server of the topmost mount on mnt, or -1 if it is gone. Of several servers for one
// directory the youngest mounted last.
func topServer(mnt string) (int, error) {
	paths, err := sockets(mnt)
	if err != nil {
		return -1, err
	}
	best := -1
	var started time.Time
	for _, path := range paths {
		st, pidfd, err := ask(path)
		if errors.Is(err, errGone) {
			_ = os.Remove(path)
			continue
		}
		if err != nil && pidfd < 0 {
			return -1, fmt.Errorf("control socket %s: %w", path, err)
		}
		if best >= 0 && st.Started.Before(started) {
			unix.Close(pidfd)
			continue
		}
		if best >= 0 {
			unix.Close(best)
		}
		best, started = pidfd, st.Started
	}
	return best, nil
}

// unmountPath unmounts with umount2(2), or with fusermount3 where that is not allowed.
func unmountPath(mnt string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(mnt, flags)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	args := []string{"-u", "-q", "--", mnt}
	if lazy {
		args = slices.Insert(args, 1, "-z")
	}
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return errors.New("unmounting without privileges needs fusermount3: install the package fuse3")
	case err != nil && bytes.Contains(out, []byte("busy")):
		return unix.EBUSY
	case err != nil:
		return fmt.Errorf("fusermount3: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// patience is how long a flush may take without a word.
const patience = 2 * time.Second

// waitExit waits for the process behind a pidfd, and says so when it takes long.
func waitExit(pidfd int, mnt string) error {
	since := time.Now()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("waiting for the server: %w", err)
		case n > 0:
			return nil
		default:
			fmt.Fprintf(os.Stderr, "lamina: %s is unmounted; its server has been flushing for %s\n", mnt, time.Since(since).Round(time.Second))
		}
	}
}

// holders names processes that use the mount on mnt, as far as this user may see them.
func holders(mnt string) string {
	const enough = 5
	var found []string
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return "somebody"
	}
	self := fmt.Sprintf("/proc/%d", os.Getpid())
	for _, proc := range procs {
		if proc == self {
			continue
		}
		if how := holdsOpen(proc, mnt); how != "" {
			comm, _ := os.ReadFile(proc + "/comm") // it may be gone
			found = append(found, fmt.Sprintf("%s %q (%s)", filepath.Base(proc), strings.TrimSpace(string(comm)), how))
		}
		if len(found) > enough {
			found[enough] = "others"
			break
		}
	}
	if len(found) == 0 {
		return "somebody this user cannot see, or a mount inside it"
	}
	return "process " + strings.Join(found, ", ")
}

// holdsOpen says what a process has in mnt: links in /proc are read, never followed.
func holdsOpen(proc, mnt string) string {
	inside := func(link string) (string, bool) {
		target, err := os.Readlink(link)
		return target, err == nil && (target == mnt || strings.HasPrefix(target, mnt+"/"))
	}
	for _, name := range []string{"cwd", "root", "exe"} {
		if _, ok := inside(proc + "/" + name); ok {
			return name
		}
	}
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return ""
	}
	for _, fd := range fds {
		if target, ok := inside(proc + "/fd/" + fd.Name()); ok {
			return target
		}
	}
	maps, err := os.ReadFile(proc + "/maps")
	if err == nil && bytes.Contains(maps, []byte(" "+mnt+"/")) {
		return "a mapped file"
	}
	return ""
}
