// Package cli is the command line of lamina: it parses flags, wires the packages below and reports. The manual pages are
// made from its commands (cmd/lamina/genman).
package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// Exit statuses. Those of mount and umount are mount(8)'s, because Lamina is also its helper.
const (
	exitOK      = 0
	exitUsage   = 1  // mount: incorrect invocation
	exitFailure = 32 // mount: failed

	exitFindings = 1 // fsck: something is wrong
	exitTrouble  = 2 // fsck, flatten, doctor: could not do it, or the command line is wrong
)

// exitError is an error with an exit status of its own. A nil err exits silently.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func withCode(code int, err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code, err}
}

// Main runs the command line argv, whose first element is the program's name, and returns the exit status.
func Main(argv []string) int {
	name, args := "lamina", []string(nil)
	if len(argv) > 0 {
		name, args = filepath.Base(argv[0]), argv[1:]
	}
	var err error
	wrong := exitUsage
	if strings.HasPrefix(name, "mount.") {
		if err = setLogging("", ""); err == nil {
			err = mountHelper(args)
		}
	} else {
		root := Command()
		root.SetArgs(mountProgram(root, args))
		var c *cobra.Command
		c, err = root.ExecuteC()
		wrong = usageStatus(c.Name())
	}
	return report(err, wrong)
}

// usageStatus is a command's exit status when its command line is wrong. It must not be taken for findings.
func usageStatus(command string) int {
	switch command {
	case "fsck", "flatten", "doctor", "trace":
		return exitTrouble
	}
	return exitUsage
}

// report prints an error as one line and returns the exit status, which is wrong unless err has one.
func report(err error, wrong int) int {
	if err == nil {
		return exitOK
	}
	var e *exitError
	if !errors.As(err, &e) {
		e = &exitError{wrong, err}
	}
	if e.err != nil {
		fmt.Fprintln(os.Stderr, "lamina: "+oneLine(err))
	}
	return e.code
}

// oneLine flattens joined errors, and a question with its answers below it.
func oneLine(err error) string {
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.ReplaceAll(strings.Join(lines, "; "), "?; ", "? ")
}

// Command returns the whole command tree.
func Command() *cobra.Command {
	root := &cobra.Command{
		Use:   "lamina",
		Short: "block-accessible overlay filesystems for containers",
		Long: `Lamina stacks directories into one tree, as kernel overlayfs does, and serves it in user space. Writing one byte to a
file of an image costs one block instead of one file.

Where a program expects fuse-overlayfs, lamina takes its place: "lamina -o OPTIONS MOUNTPOINT" mounts without naming
the subcommand. Installed as /sbin/mount.fuse.lamina it makes "mount -t fuse.lamina" work.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       Version(),
	}
	var level, format string
	root.PersistentFlags().StringVar(&level, "log-level", "", "the least that logs say: debug, info (the default), warn or error; also in "+logLevelVariable)
	root.PersistentFlags().StringVar(&format, "log-format", "", "how logs say it: text (the default) or json; also in "+logFormatVariable)
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return setLogging(level, format) }
	root.SetVersionTemplate("lamina: version {{.Version}}\n")
	root.AddCommand(
		mountCommand(), umountCommand(),
		statusCommand(), topCommand(), metricsCommand(), doctorCommand(),
		fsckCommand(), flattenCommand(),
		serveCommand(), snapshotterCommand(),
		netCommand(),
		benchCommand(),
		survivorCommand(),
	)
	plainUsage(root)
	return root
}

// plainUsage has cobra leave "[flags]" out of the usage lines below c: flags are in them where they matter.
func plainUsage(c *cobra.Command) {
	for _, sub := range c.Commands() {
		sub.DisableFlagsInUseLine = true
		plainUsage(sub)
	}
}

// operands accepts at least one and at most most arguments; what says what is missing without any.
func operands(what string, most int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return fmt.Errorf("%s is missing: usage: %s", what, c.UseLine())
		}
		return optional(most)(c, args)
	}
}

// optional accepts at most most arguments.
func optional(most int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) > most {
			return fmt.Errorf("unexpected argument %q: usage: %s", args[most], c.UseLine())
		}
		return nil
	}
}

// version is set by whoever builds a package (-ldflags -X).
var version string

// Version is that of the package, or of the module's build, or its revision.
func Version() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		v = "devel"
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				v += "-" + s.Value[:min(12, len(s.Value))]
			}
		}
	}
	return v
}

// mountProgram turns the invocations of programs that expect a mount program, such as Podman's
// "lamina -o OPTIONS MOUNTPOINT" and mount.fuse3's "lamina NAME MOUNTPOINT -o OPTIONS", into those of the subcommand.
func mountProgram(root *cobra.Command, args []string) []string {
	if len(args) == 0 {
		return args
	}
	own := []string{"help", "completion", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd} // made when they are needed
	known := slices.Contains(own, args[0]) || slices.ContainsFunc(root.Commands(), func(c *cobra.Command) bool { return c.Name() == args[0] })
	if known || !slices.ContainsFunc(args, isMountOptions) {
		return args
	}
	return append([]string{"mount"}, args...)
}

func isMountOptions(arg string) bool {
	return strings.HasPrefix(arg, "-o") || arg == "--options" || strings.HasPrefix(arg, "--options=")
}
