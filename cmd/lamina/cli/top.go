package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"lamina/inventory"
	"lamina/top"
	"lamina/top/live"

	"github.com/charmbracelet/x/term"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

type topFlags struct {
	liveFlags
	sort string
}

func topCommand() *cobra.Command {
	var f topFlags
	cmd := &cobra.Command{
		Use:   "top [--once] [--json] [--interval DURATION] [--sort KEY]",
		Short: "show live what all mounts do",
		Long: `Shows a row for every mount of this user: its container, requests, bytes read and written through the server, bytes of
lower files whose copying was avoided, bytes that the copier fetched, blocks in transit, files that wait for the copier,
and errors. Rates are those of the last interval. What the kernel reads and writes by itself (passthrough) is not counted.

In a terminal q quits, ? lists the keys, and letters change the order. Where standard output is no terminal a table is
printed every interval, and with --json an object a line.

With --once one interval is measured and printed.`,
		Example: `  lamina top --sort written
  lamina top --once --json | jq '.mounts[] | select(.errors > 0)'`,
		Args: optional(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return withCode(exitFailure, showTop(cmd, f)) },
	}
	fs := cmd.Flags()
	f.add(fs)
	fs.StringVar(&f.sort, "sort", "requests", "what rows are sorted by: mount, container, requests, read, written, avoided, copied, transit, queue or errors")
	return cmd
}

func showTop(cmd *cobra.Command, f topFlags) error {
	key, err := top.ParseKey(f.sort)
	if err != nil {
		return withCode(exitUsage, err)
	}
	return showLive(cmd, f.liveFlags, &top.View{Source: func() ([]inventory.Mount, error) { return inventory.Mounts("") }, Sort: key})
}

// liveFlags are those of commands that show something anew at an interval.
type liveFlags struct {
	interval     time.Duration
	once, asJSON bool
}

func (f *liveFlags) add(fs *pflag.FlagSet) {
	fs.DurationVar(&f.interval, "interval", 2*time.Second, "how long one measurement takes, such as 500ms or 10s")
	fs.BoolVar(&f.once, "once", false, "measure once, print, end")
	fs.BoolVar(&f.asJSON, "json", false, "print JSON")
}

// showLive shows a view in a terminal, or prints it.
func showLive(cmd *cobra.Command, f liveFlags, view live.View) error {
	const least = 100 * time.Millisecond
	if f.interval < least {
		return withCode(exitUsage, fmt.Errorf("--interval %s: at least %s", f.interval, least))
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	out, isFile := cmd.OutOrStdout().(*os.File)
	if !f.once && !f.asJSON && isFile && term.IsTerminal(out.Fd()) && term.IsTerminal(os.Stdin.Fd()) {
		return live.Run(ctx, os.Stdin, out, view, f.interval)
	}
	return printLive(ctx, cmd.OutOrStdout(), view, f)
}

// printLive prints a table, or an object, at the end of every interval.
func printLive(ctx context.Context, w io.Writer, view live.View, f liveFlags) error {
	sample, _ := view.Sample() // what fails now is told after the interval
	view.Take(time.Now(), sample)
	var failed error
	clock := time.NewTicker(f.interval)
	defer clock.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-clock.C:
		}
		sample, err := view.Sample()
		now := time.Now()
		view.Take(now, sample)
		if printErr := printView(w, now, view, f.asJSON); printErr != nil {
			return printErr
		}
		if f.once {
			return err
		}
		if err != nil && (failed == nil || err.Error() != failed.Error()) {
			printNote(oneLine(err)) // once, until something else fails
		}
		failed = err
	}
}

func printView(w io.Writer, at time.Time, view live.View, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(view.Data(at))
	}
	_, err := fmt.Fprintf(w, "%s\n%s\n\n", at.Format(time.RFC3339), strings.Join(view.Table(0), "\n"))
	return err
}
