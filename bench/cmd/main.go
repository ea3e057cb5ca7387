// Command cmd runs Lamina's benchmark: go run ./bench/cmd [-json] [-rows first-write,reads] [-dir SCRATCH].
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"lamina/bench"
)

func main() {
	var (
		binary = flag.String("lamina", "bin/lamina", "the lamina binary")
		asJSON = flag.Bool("json", false, "print JSON")
		rows   = flag.String("rows", "", "only these rows, comma-separated: first-write, allocated, partial-writes, reads, metadata, chown, memory")
		dir    = flag.String("dir", "", "where to make the scratch directory (default: TMPDIR)")
		reps   = flag.Int("reps", 3, "repetitions")
		strict = flag.Bool("strict", false, "exit with status 1 when a target is missed")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *binary, *dir, *rows, *reps, *asJSON, *strict); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, binary, dir, rows string, reps int, asJSON, strict bool) error {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	c := bench.Config{Dir: dir, Lamina: binary, Reps: reps, Logf: func(f string, args ...any) {
		fmt.Fprintf(os.Stderr, f+"\n", args...)
	}}
	if rows != "" {
		c.Rows = func(name string) bool { return slices.Contains(strings.Split(rows, ","), name) }
	}
	report, err := bench.Run(ctx, c)
	if err != nil {
		return err
	}
	if asJSON {
		err = report.JSON(os.Stdout)
	} else {
		report.Table(os.Stdout)
	}
	if missed := report.Missed(); err == nil && strict && len(missed) > 0 {
		err = fmt.Errorf("%d targets missed", len(missed))
	}
	return err
}
