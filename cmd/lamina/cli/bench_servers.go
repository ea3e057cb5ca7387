package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"lamina/bench/floor"
	"lamina/fusefs"
	"lamina/mountopt"
	"lamina/pool"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// The bench's own servers. They are subcommands, so that each is a process of its own with the program's own settings, as
// a server of a mount is.

// ready tells whoever started such a server that it serves.
const benchReady = "ready\n"

// floorCommand serves a directory as it is, or files that do nothing, until it is unmounted.
func floorCommand() *cobra.Command {
	var options []string
	var null bool
	cmd := &cobra.Command{
		Use:    "floor [-o OPTION[,OPTION...]] [--null] DIR MOUNTPOINT",
		Short:  "serve a directory as it is, or with --null files of the same names and sizes that do nothing",
		Hidden: true,
		Args:   cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withCode(exitFailure, serveFloor(cmd.OutOrStdout(), options, null, args[0], args[1]))
		},
	}
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "mount options")
	cmd.Flags().BoolVar(&null, "null", false, "serve the topmost files' names and sizes only")
	return cmd
}

func serveFloor(out io.Writer, options []string, null bool, dir, mnt string) error {
	o, err := parseOptions(options)
	if err != nil {
		return err
	}
	pool.Tune()
	opt := pool.FuseOptions(o, newStderrLog().printf)
	opt.ReadOnly = false // although it has no upper layer
	var fs fuse.RawFileSystem
	if null {
		fs, err = nullFloor(dir)
	} else {
		fs, err = loopbackFloor(dir, opt.Passthrough)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	s, err := fusefs.MountRaw(fs, mnt, opt)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(out, benchReady); err != nil {
		return errors.Join(err, s.Unmount())
	}
	s.Wait()
	return nil
}

func loopbackFloor(dir string, pass fusefs.Passthrough) (fuse.RawFileSystem, error) {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return floor.Loopback(root, map[fusefs.Passthrough]floor.Pass{fusefs.PassthroughOn: floor.PassAll, fusefs.PassthroughOff: floor.PassNone}[pass])
}

func nullFloor(dir string) (fuse.RawFileSystem, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []floor.File
	for _, e := range entries {
		if st, err := e.Info(); err == nil && st.Mode().IsRegular() {
			files = append(files, floor.File{Name: e.Name(), Size: st.Size()})
		}
	}
	return floor.Null(files), nil
}

// manyCommand serves many unions of the same layers from one process.
func manyCommand() *cobra.Command {
	var options []string
	var count int
	cmd := &cobra.Command{
		Use:    "many -o lowerdir=DIR[:DIR...][,OPTION...] --count N DIR",
		Short:  "serve N unions, with their upper layers and mount points in DIR/0, DIR/1 and so on",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withCode(exitFailure, serveMany(cmd.InOrStdin(), cmd.OutOrStdout(), options, count, args[0]))
		},
	}
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "mount options")
	cmd.Flags().IntVar(&count, "count", 1, "how many")
	return cmd
}

// serveMany mounts, prints how long each mount took in nanoseconds, and then that it is ready. When its standard input
// ends, it unmounts.
func serveMany(in io.Reader, out io.Writer, options []string, count int, dir string) (err error) {
	pool.Tune()
	var all []*pool.Mount
	defer func() { err = errors.Join(err, endMany(all)) }()
	w := bufio.NewWriter(out)
	for i := range count {
		base := filepath.Join(dir, strconv.Itoa(i))
		o, err := parseOptions(append(options, "upperdir="+mountopt.Escape(base)+"/upper,workdir="+mountopt.Escape(base)+"/work"))
		if err == nil {
			err = o.Complete()
		}
		if err != nil {
			return err
		}
		began := time.Now()
		m, err := pool.Start(pool.Config{Options: o, Mountpoint: filepath.Join(base, "tree"), Logf: newStderrLog().printf, Version: Version(),
			Shared: true, Note: printNote})
		if err != nil {
			return fmt.Errorf("mount %d of %d: %w", i+1, count, err)
		}
		all = append(all, m)
		fmt.Fprintln(w, time.Since(began).Nanoseconds())
	}
	fmt.Fprint(w, benchReady)
	if err := w.Flush(); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, in)
	return err
}

// endMany unmounts and flushes, all at the same time.
func endMany(all []*pool.Mount) error {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, m := range all {
		wg.Go(func() {
			if err := m.Unmount(); err != nil {
				errs[i] = fmt.Errorf("%s: %w", m.Mountpoint, err)
				return
			}
			errs[i] = m.Wait()
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
