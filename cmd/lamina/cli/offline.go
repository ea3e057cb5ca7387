package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"lamina/block"
	"lamina/layer"
	"lamina/mountopt"
	"lamina/pool"
	"lamina/union"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func fsckCommand() *cobra.Command {
	var options []string
	var repair, asJSON bool
	cmd := &cobra.Command{
		Use:   "fsck [--repair] [--json] [-o lowerdir=DIR[:DIR...]] UPPERDIR",
		Short: "check the sketches of an upper layer",
		Long: `Checks every sketch of an upper layer: header, block tables, and with -o lowerdir= the lower file that it was made
from. What is damaged is reported with its path, and its block where one is meant.

With --repair, what can be mended without guessing is mended. The upper layer must not be mounted then. Without it a
mounted layer can be checked too, but what is just being written may be reported.

The workdir is checked as well: the one given with -o workdir=, or a directory "work" beside the upper layer.`,
		Args: operands("the upper directory", 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return fsck(cmd.OutOrStdout(), args[0], options, repair, asJSON)
		},
	}
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "lowerdir=, workdir=, userxattr, redirect_dir= as for mount")
	cmd.Flags().BoolVar(&repair, "repair", false, "mend what can be mended without guessing")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per finding")
	return cmd
}

func flattenCommand() *cobra.Command {
	var options []string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "flatten -o lowerdir=DIR[:DIR...] UPPERDIR",
		Short: "complete every sketch, so that other tools can use the layer",
		Long: `Copies the blocks that the sketches of an upper layer still lack from the lower layers, so that the layer holds
ordinary files only and kernel overlayfs, or a tool that reads the layer as it lies, finds what the mount showed.

The layer must not be mounted. Interrupted, it leaves a layer that is partly flattened and as good as before.`,
		Args: operands("the upper directory", 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withCode(exitTrouble, flatten(cmd.OutOrStdout(), args[0], options, verbose))
		},
	}
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "lowerdir= (needed), workdir=, userxattr, redirect_dir= as for mount")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "name every file that is completed")
	return cmd
}

// offlineLayers opens the layers for work on an upper layer that is not mounted. lock says how to claim it; busy is the
// error where somebody else has it, with the layers open all the same.
func offlineLayers(upper string, options []string, lock int) (cfg union.Config, closeAll func(), busy error, err error) {
	o, err := parseOptions(append(options[:len(options):len(options)], "upperdir="+mountopt.Escape(upper)))
	if err != nil {
		return cfg, nil, nil, err
	}
	if o.Work == "" {
		beside := filepath.Join(filepath.Dir(o.Upper), "work")
		if st, err := os.Stat(beside); err == nil && st.IsDir() {
			o.Work = beside
		}
	}
	logf := func(format string, args ...any) { fmt.Fprintf(os.Stderr, "lamina: "+format+"\n", args...) }
	cfg = pool.UnionConfig(o, logf)
	cfg.Engine = block.NewEngine(block.Options{Logf: logf})
	var dirs []*layer.Dir
	closeAll = func() {
		_ = cfg.Engine.Close() // its errors were reported for the files they concern
		for _, d := range dirs {
			_ = d.Close()
		}
	}
	open := func(option, path string, opt layer.Options) (*layer.Dir, error) {
		if _, err := pool.StatDir(option, path); err != nil {
			return nil, err
		}
		opt.NS = cfg.NS
		d, err := layer.OpenDir(path, opt)
		if err == nil {
			dirs = append(dirs, d)
		}
		return d, err
	}
	for _, path := range o.Lower {
		d, err := open("lowerdir", path, layer.Options{ReadOnly: true, OverrideStat: layer.OverrideAuto, WhiteoutFiles: pool.WhiteoutFiles(o, path)})
		if err != nil {
			return cfg, closeAll, nil, err
		}
		cfg.Lowers = append(cfg.Lowers, d)
	}
	own := layer.Options{OverrideStat: pool.Overrides[o.Perms]}
	if o.Perms == mountopt.PermsInode {
		own.OverrideStat = layer.OverrideAuto
	}
	upperOwn := own
	upperOwn.WhiteoutFiles = pool.WhiteoutFiles(o, o.Upper)
	if cfg.Upper, err = open("upper layer", o.Upper, upperOwn); err != nil {
		return cfg, closeAll, nil, err
	}
	if o.Work != "" {
		if cfg.Work, err = open("workdir", o.Work, own); err != nil {
			return cfg, closeAll, nil, err
		}
	}
	err = pool.Claim(cfg.Upper.RootFD(), "upper layer "+upper, lock, printNote)
	if err == nil && cfg.Work != nil {
		err = pool.Claim(cfg.Work.RootFD(), "workdir "+o.Work, lock, printNote)
	}
	var b *pool.BusyError
	if errors.As(err, &b) {
		busy, err = err, nil
	}
	return cfg, closeAll, busy, err
}

func fsck(w io.Writer, upper string, options []string, repair, asJSON bool) error {
	lock := unix.LOCK_SH
	if repair {
		lock = unix.LOCK_EX
	}
	cfg, closeAll, busy, err := offlineLayers(upper, options, lock)
	if closeAll != nil {
		defer closeAll()
	}
	if err != nil {
		return withCode(exitTrouble, err)
	}
	if busy != nil && repair {
		return withCode(exitTrouble, fmt.Errorf("%w; without --repair it can be checked while mounted", busy))
	}
	if busy != nil {
		fmt.Fprintf(os.Stderr, "lamina: upper layer %s is mounted: what is just being written may be reported\n", upper)
	}
	found, left := 0, 0
	err = union.Fsck(cfg, repair, func(f union.Finding) {
		found++
		if !f.Repaired {
			left++
		}
		printFinding(w, f, asJSON)
	})
	if err != nil {
		return withCode(exitTrouble, err)
	}
	if !asJSON {
		printSummary(w, upper, found, left, len(cfg.Lowers) == 0)
	}
	if found > 0 {
		return &exitError{code: exitFindings}
	}
	return nil
}

func printFinding(w io.Writer, f union.Finding, asJSON bool) {
	if asJSON {
		_ = json.NewEncoder(w).Encode(f) // a reader that went away ends the program by SIGPIPE
		return
	}
	where := "/" + f.Path
	if f.Block >= 0 {
		where += fmt.Sprintf(", block %d", f.Block)
	}
	repaired := ""
	if f.Repaired {
		repaired = " (repaired)"
	}
	fmt.Fprintf(w, "%s: %s%s\n", where, f.What, repaired)
}

func printSummary(w io.Writer, upper string, found, left int, alone bool) {
	switch {
	case found == 0 && alone:
		fmt.Fprintf(w, "%s: clean, as far as it can be told without -o lowerdir=\n", upper)
	case found == 0:
		fmt.Fprintf(w, "%s: clean\n", upper)
	default:
		fmt.Fprintf(w, "%s: %d findings, %d left\n", upper, found, left)
	}
}

func flatten(w io.Writer, upper string, options []string, verbose bool) error {
	cfg, closeAll, busy, err := offlineLayers(upper, options, unix.LOCK_EX)
	if closeAll != nil {
		defer closeAll()
	}
	if err == nil {
		err = busy
	}
	if err != nil {
		return err
	}
	unix.Umask(0)
	done := 0
	err = union.Flatten(cfg, func(path string) {
		done++
		if verbose {
			fmt.Fprintf(w, "/%s\n", path)
		}
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%s: %d sketches completed\n", upper, done)
	return nil
}
