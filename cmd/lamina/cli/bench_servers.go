package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"lamina/bench/floor"
	"lamina/fusefs"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// The bench's own servers. They are subcommands, so that each is a process of its own with the program's own settings, as
// a server of a mount is.

// ready tells whoever started such a server that it serves.
const benchReady = "ready\n"

// floorCommand serves the floor until it is unmounted.
func floorCommand() *cobra.Command {
	var options, files []string
	cmd := &cobra.Command{
		Use:    "floor -o OPTION[,OPTION...] --file NAME=SIZE... MOUNTPOINT",
		Short:  "serve files that do nothing",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withCode(exitFailure, serveFloor(cmd.OutOrStdout(), options, files, args[0]))
		},
	}
	cmd.Flags().StringArrayVarP(&options, "options", "o", nil, "mount options")
	cmd.Flags().StringArrayVar(&files, "file", nil, "a file and its size in bytes")
	return cmd
}

func serveFloor(out io.Writer, options, names []string, mnt string) error {
	o, err := parseOptions(options)
	if err != nil {
		return err
	}
	var files []floor.File
	for _, f := range names {
		name, size, _ := strings.Cut(f, "=")
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil {
			return fmt.Errorf("--file %s: %w", f, err)
		}
		files = append(files, floor.File{Name: name, Size: n})
	}
	raiseDescriptorLimit()
	widenScheduler()
	in := &instance{o: o, mnt: mnt, log: newStderrLog()}
	opt := in.fuseOptions()
	opt.ReadOnly = false // although it has no upper layer
	s, err := fusefs.MountRaw(floor.New(files), mnt, opt)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(out, benchReady); err != nil {
		return errors.Join(err, s.Unmount())
	}
	s.Wait()
	return nil
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
	unix.Umask(0)
	raiseDescriptorLimit()
	widenScheduler()
	var all []*instance
	defer func() { err = errors.Join(err, endMany(all)) }()
	w := bufio.NewWriter(out)
	for i := range count {
		base := filepath.Join(dir, strconv.Itoa(i))
		o, err := parseOptions(append(options, "upperdir="+escape(base)+"/upper,workdir="+escape(base)+"/work"))
		if err == nil {
			err = o.Complete()
		}
		if err != nil {
			return err
		}
		m := &instance{o: o, mnt: filepath.Join(base, "tree"), log: newStderrLog(), started: time.Now(), note: printNote}
		began := time.Now()
		if err := m.start(); err != nil {
			return errors.Join(fmt.Errorf("mount %d of %d: %w", i+1, count, err), m.abandon())
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
func endMany(all []*instance) error {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, m := range all {
		wg.Go(func() {
			if err := m.server.Unmount(); err != nil {
				errs[i] = fmt.Errorf("%s: %w", m.mnt, err)
				return
			}
			m.server.Wait()
			errs[i] = m.fs.Close()
			m.control.close()
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(path)
}
