package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"lamina/mountopt"
	"lamina/pool"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// mountFlags are the flags of "lamina mount" and of the forms that mean it.
type mountFlags struct {
	options    []string
	foreground bool
	fake       bool // check everything, mount nothing
	verbose    bool
	debug      bool
	readyFD    int // set in the background server: where it tells that it is ready
}

func (f *mountFlags) register(fs *pflag.FlagSet) {
	fs.StringArrayVarP(&f.options, "options", "o", nil, "mount options, comma-separated; may be given several times")
	fs.BoolVarP(&f.foreground, "foreground", "f", false, "serve in the foreground; Ctrl-C unmounts")
	fs.BoolVarP(&f.debug, "debug", "d", false, "log every request; implies -f")
	fs.BoolVarP(&f.verbose, "verbose", "v", false, "say where the log and the control socket are")
	fs.BoolVar(&f.fake, "fake", false, "check options and directories, but mount nothing")
	fs.IntVar(&f.readyFD, "ready-fd", -1, "")
	// fuse-overlayfs and mount(8) have them; here they change nothing.
	fs.BoolP("single-threaded", "s", false, "")
	fs.BoolP("no-mtab", "n", false, "")
	for _, hidden := range []string{"ready-fd", "single-threaded", "no-mtab"} {
		if err := fs.MarkHidden(hidden); err != nil {
			panic(err)
		}
	}
}

func mountCommand() *cobra.Command {
	var f mountFlags
	cmd := &cobra.Command{
		Use:   "mount -o lowerdir=DIR[:DIR...][,upperdir=DIR,workdir=DIR][,OPTION...] [NAME] MOUNTPOINT",
		Short: "mount a union of layers",
		Long: `Mounts the union of the lower directories and the upper directory on MOUNTPOINT. The command returns when the mount
is ready, and a server of its own stays in the background until the mount is gone. On failure nothing is mounted, one
line on standard error says why, and the exit status is not 0.

The server writes what an operator must know to a log file (see FILES). SIGTERM and SIGINT unmount: while somebody still
uses the mount it is detached from the tree and served until the last user is gone; a second signal cuts them off. When the
mount is gone, what was written is flushed; it takes two signals to end that.

NAME is the source shown in /proc/mounts.`,
		Example: `  lamina mount -o lowerdir=/layers/app:/layers/base,upperdir=/c1/upper,workdir=/c1/work /c1/merged
  mount -t fuse.lamina app /c1/merged -o lowerdir=/layers/app:/layers/base`,
		Args: operands("the mount point", 2),
		RunE: func(_ *cobra.Command, args []string) error { return mount(&f, args) },
	}
	f.register(cmd.Flags())
	cmd.SetUsageTemplate(cmd.UsageTemplate() + "\nMount options:\n" + optionList())
	return cmd
}

// optionList is the table of mount options for --help.
func optionList() string {
	const column = 32
	var b strings.Builder
	for _, o := range mountopt.Table() {
		syntax := o.Syntax()
		if len(syntax) > column {
			syntax += "\n" + strings.Repeat(" ", column+2)
		}
		fmt.Fprintf(&b, "  %-*s %s\n", column, syntax, o.Help)
	}
	return b.String()
}

// mountHelper serves "mount.fuse.lamina NAME MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]", as mount(8)
// calls it. There -f means to fake.
func mountHelper(args []string) error {
	f := mountFlags{readyFD: -1}
	fs := pflag.NewFlagSet("mount.fuse.lamina", pflag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringArrayVarP(&f.options, "options", "o", nil, "")
	fs.BoolVarP(&f.fake, "fake", "f", false, "")
	fs.BoolVarP(&f.verbose, "verbose", "v", false, "")
	fs.BoolP("sloppy", "s", false, "")
	fs.BoolP("no-mtab", "n", false, "")
	fs.StringP("type", "t", "", "")
	namespace := fs.StringP("namespace", "N", "", "")
	if err := fs.Parse(args); err != nil {
		return withCode(exitUsage, err)
	}
	if *namespace != "" {
		return withCode(exitUsage, errors.New("flag -N: enter the namespace with nsenter and mount there"))
	}
	if fs.NArg() != 2 {
		return withCode(exitUsage, errors.New("usage: mount.fuse.lamina NAME MOUNTPOINT [-fnsv] [-o OPTIONS]"))
	}
	return mount(&f, fs.Args())
}

// mount parses, checks and mounts: in this process with -f, else in a new one.
func mount(f *mountFlags, args []string) error {
	mnt := args[len(args)-1]
	o, err := parseOptions(f.options)
	if err == nil {
		err = o.Complete()
	}
	if err != nil {
		return withCode(exitUsage, err)
	}
	if len(args) == 2 && o.FSName == "" {
		o.FSName = args[0]
	}
	if f.debug || o.Debug {
		o.Debug, f.foreground = true, f.foreground || f.readyFD < 0
	}
	if mnt, err = pool.CheckMountPoint(mnt); err != nil {
		return withCode(exitFailure, err)
	}
	if f.readyFD < 0 && !f.foreground && !f.fake {
		return withCode(exitFailure, mountInBackground(f, args, mnt)) // the server checks the directories
	}
	if f.readyFD >= 0 && o.Survive {
		return superviseInBackground(o, mnt, f.readyFD)
	}
	if f.readyFD >= 0 {
		return serveInBackground(o, mnt, f.readyFD, nil)
	}
	if err := pool.CheckDirs(o); err != nil || f.fake {
		return withCode(exitFailure, err)
	}
	lg := newStderrLog()
	defer lg.close(mnt)
	if o.Survive {
		return withCode(exitFailure, superviseMount(o, mnt, lg, true, nil))
	}
	return withCode(exitFailure, serve(o, mnt, lg, printNote, nil, func() error { return nil }))
}

func printNote(msg string) { fmt.Fprintln(os.Stderr, "lamina: "+msg) }

func mountInBackground(f *mountFlags, args []string, mnt string) error {
	if err := startServer(f, args, mnt); err != nil {
		return err
	}
	if f.verbose {
		fmt.Printf("lamina: %s mounted; log %s, control sockets in %s\n", mnt, logPath(mnt), pool.RuntimeDir())
	}
	return nil
}

func parseOptions(options []string) (*mountopt.Options, error) {
	cwd, err := os.Getwd()
	if err != nil {
		return nil, fmt.Errorf("working directory: %w", err)
	}
	return mountopt.Parse(options, mountopt.Env{Dir: cwd})
}

// Messages from the server to the command that started it.
const (
	readyOK    = "ready"
	readyError = "error "
	readyNote  = "note " // of several, before one of the others
)

// startServer runs this program again, in a session of its own, and waits until it serves or says why not.
func startServer(f *mountFlags, args []string, mnt string) error {
	if err := pool.MakeRuntimeDir(); err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	self := []string{"mount", "--ready-fd", "3"}
	for _, o := range f.options {
		self = append(self, "-o", o)
	}
	if f.debug {
		self = append(self, "--debug")
	}
	if len(args) == 2 {
		self = append(self, "--", args[0], mnt)
	} else {
		self = append(self, "--", mnt)
	}
	cmd := exec.Command("/proc/self/exe", self...)
	cmd.Args[0] = "lamina"
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What the caller left open here must not stay open for the life of the mount: a lock, or a pipe somebody reads to
	// its end.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		w.Close()
		return fmt.Errorf("close_range (Linux 5.11): %w", err)
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("starting the server: %w", err)
	}
	line, err := awaitServer(r)
	if msg, failed := strings.CutPrefix(line, readyError); failed {
		_ = cmd.Wait() // it says nothing that the message did not
		return errors.New(msg)
	}
	if line == readyOK {
		return cmd.Process.Release()
	}
	if waitErr := cmd.Wait(); waitErr != nil {
		err = waitErr
	}
	return fmt.Errorf("the server ended before the mount was ready (%w): see %s", err, logPath(mnt))
}

// awaitServer passes the server's notes on and returns its last word.
func awaitServer(pipe io.Reader) (string, error) {
	for r := bufio.NewReader(pipe); ; {
		line, err := r.ReadString('\n')
		line = strings.TrimSuffix(line, "\n")
		note, is := strings.CutPrefix(line, readyNote)
		if err != nil || !is {
			return line, err
		}
		printNote(note)
	}
}

// superviseInBackground is serveInBackground for a mount that survives its server.
func superviseInBackground(o *mountopt.Options, mnt string, readyFD int) error {
	unix.CloseOnExec(readyFD)
	parent := os.NewFile(uintptr(readyFD), "ready pipe")
	lg, err := detach(mnt)
	if err != nil {
		_, werr := io.WriteString(parent, readyError+oneLine(err)+"\n")
		return silently(err, werr)
	}
	defer lg.close(mnt)
	return silently(superviseMount(o, mnt, lg, false, parent))
}

// serveInBackground is the server's side of startServer.
func serveInBackground(o *mountopt.Options, mnt string, readyFD int, s *pool.Survival) error {
	unix.CloseOnExec(readyFD)
	parent := os.NewFile(uintptr(readyFD), "ready pipe")
	tell := func(msg string) error {
		_, err := io.WriteString(parent, msg+"\n")
		parent.Close()
		return err
	}
	note := func(msg string) { _, _ = io.WriteString(parent, readyNote+msg+"\n") } // ready will find out who is gone
	lg, err := detach(mnt)
	if err != nil {
		return silently(err, tell(readyError+oneLine(err)))
	}
	defer lg.close(mnt)
	told := false
	if err = pool.CheckDirs(o); err == nil {
		err = serve(o, mnt, lg, note, s, func() error {
			told = true
			return tell(readyOK)
		})
	}
	if err == nil || told {
		return silently(err, nil) // the log has it
	}
	return silently(err, tell(readyError+oneLine(err)))
}

// silently keeps the exit status of errors that have been told elsewhere.
func silently(errs ...error) error {
	if errors.Join(errs...) == nil {
		return nil
	}
	return &exitError{code: exitFailure}
}

// detach lets go of what the server must not keep busy or disturb: the working directory and standard input and output.
// Standard error becomes the log, so that a crash leaves its trace there.
func detach(mnt string) (*logger, error) {
	lg, err := openLog(logPath(mnt))
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	for _, fd := range []int{0, 1} {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return nil, err
		}
	}
	return lg, os.Chdir("/")
}
