package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"lamina/bench"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// benchRows are the groups of figures that bench.Run knows.
var benchRows = []string{"first-write", "allocated", "partial-writes", "reads", "metadata", "chown", "memory"}

type benchFlags struct {
	dir    string
	rows   []string
	reps   int
	asJSON bool
	strict bool
}

func benchCommand() *cobra.Command {
	var f benchFlags
	cmd := &cobra.Command{
		Use:   "bench [--rows ROW[,ROW...]] [--dir DIR] [--reps N] [--json] [--strict]",
		Short: "measure this program beside its rivals",
		Long: `Measures Lamina in the same run as plain files, kernel overlayfs and, where it is installed, fuse-overlayfs, and prints
medians beside their targets. It needs root, 12 GiB of disk and some minutes, and leaves nothing behind.

The rows are ` + strings.Join(benchRows, ", ") + `.`,
		Args: optional(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withCode(exitFailure, runBench(cmd.OutOrStdout(), cmd.ErrOrStderr(), &f))
		},
	}
	cmd.Flags().StringSliceVar(&f.rows, "rows", nil, "only these rows")
	cmd.Flags().StringVar(&f.dir, "dir", "", "make the scratch directory here instead of in the directory for temporary files")
	cmd.Flags().IntVar(&f.reps, "reps", 3, "repetitions of what takes long")
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&f.strict, "strict", false, "fail when a target is missed")
	return cmd
}

func runBench(out, progress io.Writer, f *benchFlags) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("bench: mounts filesystems: run it as root")
	}
	if f.reps < 1 {
		return fmt.Errorf("--reps %d: use at least 1", f.reps)
	}
	for _, row := range f.rows {
		if !slices.Contains(benchRows, row) {
			return fmt.Errorf("--rows %s: unknown: use %s", row, strings.Join(benchRows, ", "))
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	c := bench.Config{Dir: f.dir, Lamina: self, Reps: f.reps, Logf: func(format string, args ...any) {
		fmt.Fprintf(progress, format+"\n", args...)
	}}
	if len(f.rows) > 0 {
		c.Rows = func(name string) bool { return slices.Contains(f.rows, name) }
	}
	report, err := bench.Run(ctx, c)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	if f.asJSON {
		err = report.JSON(out)
	} else {
		report.Table(out)
	}
	if missed := len(report.Missed()); err == nil && f.strict && missed > 0 {
		err = fmt.Errorf("bench: %d targets missed", missed)
	}
	return err
}
