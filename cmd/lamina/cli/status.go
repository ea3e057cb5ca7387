package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"lamina/inventory"
	"lamina/pool"

	"github.com/spf13/cobra"
)

func statusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [--json] [MOUNTPOINT]",
		Short: "show the mounts that are being served",
		Long: `Asks the server of the mount on MOUNTPOINT, or of every mount of this user, and shows layers, transport,
passthrough, open files, sketches and their blocks by state, the copier's queue, the bytes that were not copied because
files were not copied up whole, and errors. The container that uses a mount is shown where containerd's runtime or Podman's
store names it.

Blocks are those of open sketches: lower (not touched), in transit (partly written, the rest still to be copied) and
upper. With --json the output is one object for MOUNTPOINT, or an array of objects for all mounts.`,
		Args: optional(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return status(cmd.OutOrStdout(), args, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func status(w io.Writer, args []string, asJSON bool) error {
	mnt := ""
	if len(args) == 1 {
		var err error
		if mnt, err = resolveMount(args[0]); err != nil {
			var there bool
			if mnt, there = servedElsewhere(args[0]); !there {
				return err
			}
		}
	}
	all, err := inventory.Mounts(mnt)
	if mnt != "" && len(all) == 0 {
		return errors.Join(err, fmt.Errorf("%s: no server of a Lamina mount answers here: see lamina status for all mounts", args[0]))
	}
	// What one server or file fails to tell does not hide the others.
	switch {
	case mnt != "" && asJSON:
		return errors.Join(err, printJSON(w, topmost(all)))
	case mnt != "":
		return errors.Join(err, printOne(w, topmost(all)))
	case asJSON:
		return errors.Join(err, printJSON(w, append([]inventory.Mount{}, all...))) // no mounts are an empty array, not null
	}
	return errors.Join(err, printTable(w, all))
}

// servedElsewhere finds a mount that is not in this mount namespace by its server: Podman without root keeps the mounts of
// its containers in a namespace of its own.
func servedElsewhere(path string) (mnt string, there bool) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", false
	}
	resolved := abs
	if pool.TopDevice(abs) == "" { // else somebody else's mount is there, which may hang
		if real, err := filepath.EvalSymlinks(abs); err == nil {
			resolved = real
		}
	}
	all, err := pool.MountsOn(resolved)
	return resolved, err == nil && slices.ContainsFunc(all, func(s pool.Status) bool { return !s.Flushing })
}

// topmost picks, of several mounts on one directory, the one that was mounted last.
func topmost(all []inventory.Mount) *inventory.Mount {
	top := &all[0]
	for i := range all {
		if all[i].Started.After(top.Started) {
			top = &all[i]
		}
	}
	return top
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func printTable(w io.Writer, all []inventory.Mount) error {
	if len(all) == 0 {
		_, err := fmt.Fprintf(w, "no mounts (control sockets are looked for in %s)\n", pool.RuntimeDir())
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MOUNTPOINT\tCONTAINER\tPID\tLOWERS\tTRANSPORT\tPASSTHROUGH\tOPEN\tSKETCHES\tLOWER\tIN TRANSIT\tUPPER\tQUEUE\tNOT COPIED\tERRORS")
	for _, s := range all {
		mnt := s.Mountpoint
		if s.Flushing {
			mnt += " (unmounted, flushing)"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%d\n", mnt, orDash(s.Container.String()), s.PID, len(s.Lower), s.Transport, s.Passthrough, s.OpenFiles,
			s.Sketches, s.Blocks.Lower, s.Blocks.InTransit, s.Blocks.Upper, s.Queue, humanBytes(s.BytesNotCopied), s.Errors)
	}
	return t.Flush()
}

func printOne(w io.Writer, s *inventory.Mount) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	row("mount point", "%s", s.Mountpoint)
	if c := s.Container; c != nil {
		row("container", "%s", containerWords(c))
	}
	row("server", "pid %d, version %s, up %s", s.PID, s.Version, time.Since(s.Started).Round(time.Second))
	if s.Upper != "" {
		row("upper", "%s", s.Upper)
		row("work", "%s", s.Work)
	} else {
		row("upper", "none (read-only)")
	}
	for i, l := range s.Lower {
		row(fmt.Sprintf("lower %d", i+1), "%s", l)
	}
	row("options", "%s", strings.Join(optionWords(s), ", "))
	row("transport", "%s", transportWords(s))
	if s.PassthroughReason != "" {
		row("passthrough", "%s: %s", s.Passthrough, s.PassthroughReason)
	} else {
		row("passthrough", "%s: %d opens passed through, %d cached", s.Passthrough, s.FUSE.PassedOpens, s.FUSE.CachedOpens)
	}
	row("open files", "%d", s.OpenFiles)
	row("sketches", "%d open; %d created, %d completed", s.Sketches, s.SketchesCreated, s.SketchesComplete)
	row("blocks", "%d lower, %d in transit, %d upper", s.Blocks.Lower, s.Blocks.InTransit, s.Blocks.Upper)
	row("queue", "%d to copy, %d settling", s.Queue, s.Settling)
	row("not copied", "%s; copied %s", humanBytes(s.BytesNotCopied), humanBytes(s.BytesCopied))
	row("through", "%s read, %s written through the server", humanBytes(int64(s.FUSE.BytesRead)), humanBytes(int64(s.FUSE.BytesWritten)))
	row("errors", "%d; %d damaged files", s.Errors, s.Damaged)
	if s.Log != "" {
		row("log", "%s", s.Log)
	}
	return t.Flush()
}

func containerWords(c *inventory.Container) string {
	words := c.Engine + " " + c.ID
	if c.Namespace != "" {
		words += " in namespace " + c.Namespace
	}
	if c.Name != "" {
		words += " (" + c.Name + ")"
	}
	return words
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func transportWords(s *inventory.Mount) string {
	if s.TransportReason != "" {
		return s.Transport + ": " + s.TransportReason
	}
	r := s.FUSE.Rings
	if r == nil {
		return s.Transport
	}
	return fmt.Sprintf("%s: %d queues, %d requests of each at a time, %s of address space; %d threads of the server, %d of them pinned",
		s.Transport, r.Queues, r.Depth, humanBytes(int64(r.Buffers)), r.Threads, r.Pinned)
}

func optionWords(s *inventory.Mount) []string {
	words := []string{"format=" + s.Format, "caw=" + s.CaW, "copyup=" + s.CopyUp, "fill=" + s.Fill, s.Namespace + ".*"}
	if s.Volatile {
		words = append(words, "volatile")
	}
	return words
}

// humanBytes shows a size in the largest binary unit of which it holds one.
func humanBytes(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

var errNotMounted = errors.New("not a Lamina mount")
