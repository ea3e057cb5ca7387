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

	"github.com/charmbracelet/x/term"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

type topFlags struct {
	interval     time.Duration
	sort         string
	once, asJSON bool
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
	fs.DurationVar(&f.interval, "interval", 2*time.Second, "how long one measurement takes, such as 500ms or 10s")
	fs.StringVar(&f.sort, "sort", "requests", "what rows are sorted by: mount, container, requests, read, written, avoided, copied, transit, queue or errors")
	fs.BoolVar(&f.once, "once", false, "measure once, print, end")
	fs.BoolVar(&f.asJSON, "json", false, "print JSON")
	return cmd
}

func showTop(cmd *cobra.Command, f topFlags) error {
	key, err := top.ParseKey(f.sort)
	if err != nil {
		return withCode(exitUsage, err)
	}
	const least = 100 * time.Millisecond
	if f.interval < least {
		return withCode(exitUsage, fmt.Errorf("--interval %s: at least %s", f.interval, least))
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	source := func() ([]inventory.Mount, error) { return inventory.Mounts("") }
	out, isFile := cmd.OutOrStdout().(*os.File)
	if !f.once && !f.asJSON && isFile && term.IsTerminal(out.Fd()) && term.IsTerminal(os.Stdin.Fd()) {
		return top.Run(ctx, os.Stdin, out, source, top.Options{Interval: f.interval, Sort: key})
	}
	return printTop(ctx, cmd.OutOrStdout(), source, key, f)
}

// printTop prints a table, or an object, at the end of every interval.
func printTop(ctx context.Context, w io.Writer, source top.Source, key top.Key, f topFlags) error {
	var sampler top.Sampler
	mounts, _ := source() // what fails now is told after the interval
	sampler.Next(time.Now(), mounts)
	var failed error
	clock := time.NewTicker(f.interval)
	defer clock.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-clock.C:
		}
		mounts, err := source()
		now := time.Now()
		rows := sampler.Next(now, mounts)
		top.Sort(rows, key, false)
		if printErr := printRows(w, now, rows, f.asJSON); printErr != nil {
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

func printRows(w io.Writer, at time.Time, rows []top.Row, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(struct {
			Time   time.Time `json:"time"`
			Mounts []top.Row `json:"mounts"`
		}{at, rows})
	}
	_, err := fmt.Fprintf(w, "%s\n%s\n\n", at.Format(time.RFC3339), strings.Join(top.Table(rows, 0), "\n"))
	return err
}
