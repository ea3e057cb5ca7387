package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"lamina/mountopt"
	"lamina/pool"
	"lamina/supervise"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// A mount with survive=on has two processes: a supervisor, which is what the command that mounts starts, and a server,
// which is the supervisor's child and is replaced by another one when it is killed.

// survivorConfig is what a server is told by its supervisor.
type survivorConfig struct {
	Options    *mountopt.Options
	Mountpoint string
	Foreground bool
}

// Descriptors of a server.
const (
	storeFD  = 3
	configFD = 4
	toldFD   = 5 // the ready pipe, in the first server of a mount in the background
)

// superviseMount is the supervisor. ready is the pipe of the command that waits for the mount; nil: nobody does.
func superviseMount(o *mountopt.Options, mnt string, lg *logger, foreground bool, ready *os.File) error {
	config, err := pool.MemoryFile("lamina options", survivorConfig{o, mnt, foreground})
	if err != nil {
		return err
	}
	defer config.Close()
	status, err := supervise.Run(supervise.Options{
		Command: func(int) (*exec.Cmd, error) {
			cmd := exec.Command("/proc/self/exe", "survivor", mnt)
			cmd.Args[0] = "lamina"
			cmd.Stderr = os.Stderr
			fd, err := unix.FcntlInt(config.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "config")}
			if ready != nil {
				cmd.ExtraFiles = append(cmd.ExtraFiles, ready)
				ready = nil
			}
			return cmd, nil
		},
		Logf: func(format string, args ...any) { lg.printf(mnt+": "+format, args...) },
	})
	if err != nil {
		lg.printf("%s: %v", mnt, err)
		if errors.Is(err, supervise.ErrNeverReady) && pool.IsLaminaMount(mnt) {
			err = errors.Join(err, pool.UnmountPath(mnt, true))
		}
		return err
	}
	if status != 0 {
		return &exitError{code: status} // the server has told why
	}
	return nil
}

// survivorCommand is the server of a mount with survive=on. It is started by the supervisor alone.
func survivorCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "survivor MOUNTPOINT",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE:   func(*cobra.Command, []string) error { return survivor() },
	}
}

func survivor() error {
	store, kept, err := supervise.Dial(storeFD)
	if err != nil {
		return fmt.Errorf("started by hand? %w", err)
	}
	unix.CloseOnExec(configFD)
	var c survivorConfig
	if err := pool.ReadMemory(os.NewFile(configFD, "config"), &c); err != nil {
		return fmt.Errorf("reading what the supervisor says: %w", err)
	}
	s := &pool.Survival{Store: store}
	for s.Name, s.Kept = range kept { // one, if any
	}
	if s.Kept == nil && !c.Foreground {
		return serveInBackground(c.Options, c.Mountpoint, toldFD, s)
	}
	lg := newStderrLog()
	if !c.Foreground {
		if lg, err = detach(c.Mountpoint); err != nil {
			return err
		}
	}
	defer lg.close(c.Mountpoint)
	if s.Kept == nil {
		if err := pool.CheckDirs(c.Options); err != nil {
			return withCode(exitFailure, err)
		}
	}
	err = serve(c.Options, c.Mountpoint, lg, printNote, s, func() error { return nil })
	if err != nil && !c.Foreground {
		lg.printf("%s: %v", c.Mountpoint, err)
		return silently(err)
	}
	return withCode(exitFailure, err)
}
