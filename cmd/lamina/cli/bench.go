package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"lamina/bench"
	breport "lamina/bench/report"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

type benchFlags struct {
	config      bench.Config
	quick, full bool
	asJSON      bool
	markdown    bool
	from        string
	html        string
	strict      bool
	list        bool

	measure func(context.Context, bench.Config) (*breport.Run, error) // nil: bench.Run
}

// register adds the flags that mean the same in every command that measures.
func (f *benchFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringSliceVar(&f.config.Scenarios, "scenarios", nil, "only these scenarios")
	flags.StringVar(&f.config.Dir, "dir", "", "measure below this directory instead of the one for temporary files")
	flags.BoolVar(&f.asJSON, "json", false, "print JSON")
	flags.StringVar(&f.html, "html", "", "also write a page with charts to this file")
	flags.BoolVar(&f.strict, "strict", false, "fail when a target is missed, or a scenario or a contender failed")
}

// registerFilesystem adds the flag of those that measure files.
func (f *benchFlags) registerFilesystem(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config.Filesystem, "filesystem", "", "measure on a fresh ext4, xfs or btrfs in an image file below DIR, or on what holds it (dir) (default: dir if a union can be measured there, otherwise ext4)")
}

func benchCommand() *cobra.Command {
	var f benchFlags
	cmd := &cobra.Command{
		Use:   "bench [--quick|--full] [--scenarios NAME[,NAME...]] [--contenders NAME[,NAME...]] [--dir DIR] [--filesystem TYPE] [--rounds N] [--json|--markdown] [--html FILE] [--from FILE] [--strict] [--list]",
		Short: "measure this program beside its rivals",
		Long: `Measures Lamina in the same run as everything that could be used instead of it, as far as it is installed: plain files,
kernel overlayfs in several variants, fuse-overlayfs, a reflink filesystem, btrfs snapshots. Contenders take turns; what
is printed are medians with their spread, ratios, and the project's targets. --list shows all scenarios and contenders.

It needs root. Everything happens in a directory of its own below DIR, and nothing is left behind. Where DIR's filesystem
cannot hold an upper layer, or is an ext4 without a journal, it measures on a fresh ext4 in an image file there. Between
measurements it empties the page cache of the whole machine. A contender that is missing or fails is named, and the rest
goes on.

What --json has printed can be shown again in any form with --from, and nothing is measured then.

As a contender, lamina:OPTION+OPTION... is Lamina with any mount options, and overlayfs:OPTION+OPTION... kernel overlayfs.`,
		Example: `  lamina bench --quick
  lamina bench --scenarios first-write --contenders plain,overlayfs,lamina,lamina:format=bcow+caw=lazy
  lamina bench --full --filesystem ext4 --json >bench.json
  lamina bench --from bench.json --markdown --html bench.html`,
		Args: optional(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.list {
				return benchList(cmd.OutOrStdout())
			}
			return withCode(exitFailure, runBench(cmd.OutOrStdout(), cmd.ErrOrStderr(), &f))
		},
	}
	flags := cmd.Flags()
	f.register(cmd)
	f.registerFilesystem(cmd)
	flags.BoolVar(&f.quick, "quick", false, "small files, few repetitions; meant for 3 minutes, where the default is for 10")
	flags.BoolVar(&f.full, "full", false, "files as large as in the papers; meant for 36 minutes")
	flags.StringSliceVar(&f.config.Contenders, "contenders", nil, "these contenders instead of each scenario's own choice")
	flags.IntVar(&f.config.Rounds, "rounds", 0, "turns of each contender (default: as many as the time allows)")
	flags.BoolVar(&f.markdown, "markdown", false, "print the tables for a Markdown document, each scenario's between comments that name it")
	flags.StringVar(&f.from, "from", "", "measure nothing, and show what this file has, which --json has printed")
	flags.BoolVar(&f.list, "list", false, "list the scenarios and contenders, and measure nothing")
	cmd.MarkFlagsMutuallyExclusive("quick", "full")
	cmd.MarkFlagsMutuallyExclusive("json", "markdown")
	for _, name := range []string{"quick", "full", "scenarios", "contenders", "dir", "filesystem", "rounds", "list"} {
		cmd.MarkFlagsMutuallyExclusive("from", name)
	}
	cmd.AddCommand(containersCommand(), benchNetCommand(), floorCommand(), manyCommand())
	return cmd
}

// benchList shows what can be chosen.
func benchList(w io.Writer) error {
	fmt.Fprintln(w, "Scenarios:")
	for _, s := range bench.Scenarios() {
		fmt.Fprintf(w, "  %-18s %s\n", s.Name, s.Title)
	}
	fmt.Fprintln(w, "\nContenders:")
	for _, c := range bench.Catalogue() {
		fmt.Fprintf(w, "  %-20s %s\n", c.Name, c.Describes)
	}
	fmt.Fprintln(w, "\nMore: lamina bench containers --list, lamina bench net --list")
	return nil
}

func runBench(out, progress io.Writer, f *benchFlags) error {
	c := f.config
	switch {
	case f.quick:
		c.Mode = bench.Quick
	case f.full:
		c.Mode = bench.Full
	}
	if c.Rounds < 0 {
		return fmt.Errorf("--rounds %d: use at least 1", c.Rounds)
	}
	if f.from != "" {
		return showAgain(out, f)
	}
	page, err := createPage(f.html)
	if err != nil {
		return err
	}
	defer page.Close()
	if c.Lamina, err = os.Executable(); err != nil {
		return err
	}
	c.Progress = progress
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	measure := f.measure
	if measure == nil {
		measure = bench.Run
	}
	run, err := measure(ctx, c)
	switch {
	case errors.Is(err, context.Canceled):
		err = fmt.Errorf("bench: interrupted, and cleaned up: %w", err)
	case err != nil:
		err = fmt.Errorf("bench: %w", err)
	}
	if run == nil || len(run.Scenarios) == 0 {
		if page != nil {
			err = errors.Join(err, os.Remove(f.html)) // it is empty
		}
		return err
	}
	return errors.Join(err, showBench(out, page, run, f))
}

// showAgain shows what an earlier run has printed as JSON.
func showAgain(out io.Writer, f *benchFlags) error {
	saved, err := os.Open(f.from)
	if err != nil {
		return fmt.Errorf("--from: %w", err)
	}
	defer saved.Close()
	run, err := breport.ReadJSON(saved)
	if err != nil {
		return fmt.Errorf("--from: %s: %w", f.from, err)
	}
	page, err := createPage(f.html)
	if err != nil {
		return err
	}
	defer page.Close()
	return showBench(out, page, run, f)
}

// createPage opens the file before an hour of measuring rather than after it. Nil: none is wanted.
func createPage(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Create(path)
	if err != nil {
		return nil, fmt.Errorf("--html: %w", err)
	}
	return f, nil
}

// tableOptions fit a terminal; anything else gets plain text.
func tableOptions(out io.Writer) (o breport.TableOptions) {
	f, ok := out.(*os.File)
	if !ok {
		return o
	}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
		o.Width = int(size.Col)
		o.Color = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	}
	return o
}

func showBench(out io.Writer, page *os.File, run *breport.Run, f *benchFlags) error {
	var err error
	switch {
	case f.asJSON:
		err = run.WriteJSON(out)
	case f.markdown:
		err = run.Markdown(out)
	default:
		err = run.Table(out, tableOptions(out))
	}
	if page != nil {
		err = errors.Join(err, run.HTML(page), page.Close())
	}
	if !f.strict {
		return err
	}
	if n := len(run.Missed()); n > 0 {
		err = errors.Join(err, fmt.Errorf("bench: %d targets missed", n))
	}
	if n := len(run.Failed); n > 0 {
		err = errors.Join(err, fmt.Errorf("bench: %d failures", n))
	}
	return err
}
