package cli

import (
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"

	"lamina/pool"
	"lamina/supervise"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func serveCommand() *cobra.Command {
	var socket, log string
	var readyFD, keeperFD int
	var survive bool
	cmd := &cobra.Command{
		Use:   "serve --socket SOCKET [--log FILE] [--survive]",
		Short: "serve the mounts of a pool of containers",
		Long: `Serves many mounts in one process. What to mount where is asked for over a unix socket, in lines of JSON; lamina
snapshotter starts such a server for every pool of containers, and asks it. It is not the snapshotter's child: it goes on
when the snapshotter ends, and the next snapshotter finds it by its socket.

With --survive the process that is started is a supervisor, and the server its child: when the server is killed, another one
takes over its socket and its mounts, and their users see no error. A mount that cannot be taken over is given up.

It ends when it is told to and has no mount left. SIGTERM and SIGINT unmount what nobody uses, detach the rest, and end the
server when the last user is gone.`,
		Example: `  lamina serve --socket /run/lamina/pool.sock`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if survive && keeperFD < 0 {
				return withCode(exitFailure, supervisePool(socket, log, readyFD))
			}
			return withCode(exitFailure, servePool(socket, log, readyFD, keeperFD))
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&socket, "socket", "", "the unix socket to listen on; needed")
	fs.StringVar(&log, "log", "", "write what an operator must know to this file, instead of standard error")
	fs.BoolVar(&survive, "survive", false, "the mounts outlive the server: a supervisor starts another when it is killed (every mount gets survive=on)")
	fs.IntVar(&readyFD, "ready-fd", -1, "")
	fs.IntVar(&keeperFD, "store-fd", -1, "")
	_ = fs.MarkHidden("ready-fd")
	_ = fs.MarkHidden("store-fd")
	_ = cmd.MarkFlagRequired("socket")
	return cmd
}

// supervisePool is the supervisor of a pool server whose mounts outlive it.
func supervisePool(socket, logFile string, readyFD int) error {
	socket, err := filepath.Abs(socket)
	if err != nil {
		return err
	}
	lg := newStderrLog()
	if logFile != "" {
		if logFile, err = filepath.Abs(logFile); err == nil {
			lg, err = openLog(logFile)
		}
		if err != nil {
			return err
		}
	}
	var ready *os.File
	if readyFD >= 0 {
		unix.CloseOnExec(readyFD)
		ready = os.NewFile(uintptr(readyFD), "ready pipe")
	}
	status, err := supervise.Run(supervise.Options{
		Command: func(int) (*exec.Cmd, error) {
			cmd := exec.Command("/proc/self/exe", "serve", "--survive", "--socket", socket, "--store-fd", strconv.Itoa(storeFD))
			cmd.Args[0] = "lamina"
			cmd.Stderr = os.Stderr
			if logFile != "" {
				cmd.Args = append(cmd.Args, "--log", logFile)
			}
			if ready != nil {
				cmd.Args = append(cmd.Args, "--ready-fd", strconv.Itoa(storeFD+1))
				cmd.ExtraFiles, ready = []*os.File{ready}, nil
			}
			return cmd, nil
		},
		Logf: func(format string, args ...any) { lg.printf(socket+": "+format, args...) },
	})
	if err == nil && status != 0 {
		err = &exitError{code: status} // the server has told why
	} else if err != nil {
		lg.printf("%s: %v", socket, err)
	}
	return err
}

func servePool(socket, logFile string, readyFD, keeperFD int) error {
	s, lg, store, err := listenPool(socket, logFile, keeperFD)
	// Before the supervisor is told: it passes on at once what came while nobody could have it.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	if err == nil && store != nil {
		err = store.Ready()
	}
	if readyFD >= 0 {
		pool.Ready(readyFD, err)
	}
	if err != nil {
		return err
	}
	go func() {
		for sig := range signals {
			lg.infof("%s: %v: unmounting", socket, sig)
			s.End()
		}
	}()
	return s.Serve()
}

func listenPool(socket, logFile string, keeperFD int) (*pool.Server, *logger, *supervise.Store, error) {
	var store *supervise.Store
	var kept map[string][]*os.File
	socket, err := filepath.Abs(socket)
	if err == nil && keeperFD >= 0 {
		store, kept, err = supervise.Dial(keeperFD)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	lg := newStderrLog()
	if logFile != "" {
		if lg, err = openLog(logFile); err != nil {
			return nil, nil, nil, err
		}
	}
	s, err := pool.Listen(pool.ServerConfig{Socket: socket, Logf: lg.printf, Log: lg.path, Version: Version(), Store: store, Kept: kept})
	return s, lg, store, err
}
