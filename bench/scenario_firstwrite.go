package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
)

var firstWrite = Scenario{
	Name:   "first-write",
	Title:  "The first write to a file of the image",
	Source: "BAOverlay (SoCC 2020), first-write latency by file size",
	Describes: "A file of a lower layer is opened, one byte in its middle is written, and it is closed. Then, on fresh mounts, the " +
		"same without writing: many programs open files for writing and never write. Names, attributes and the lower files' " +
		"bytes are in memory, to the advantage of whoever copies them, and some other files have been written before: the " +
		"server is in use.",
	Contenders: []string{"plain", "overlayfs", "overlayfs-volatile", "overlayfs-xfs", "fuse-overlayfs", "btrfs-snapshot", "lamina", "lamina-dev", "lamina-bcow", "floor"},
	More:       []string{"floor-dev"},
	Quick:      []string{"plain", "overlayfs", "overlayfs-volatile", "overlayfs-xfs", "btrfs-snapshot", "lamina", "floor"},
	Space: func(m Mode) int64 {
		var layer int64
		for _, s := range firstSizes(m) {
			layer += s.size * int64(s.files)
		}
		return layer*4 + gib/2 // the layer, a plain copy, a full copy-up, some room
	},
	Weight: 60,
	Run:    runFirstWrite,
}

type firstSize struct {
	name  string
	size  int64
	files int
}

func firstSizes(m Mode) []firstSize {
	sizes := []firstSize{{"1 KiB", kib, 40}, {"4 MiB", 4 * mib, 12}, {"64 MiB", 64 * mib, 3}}
	if m == Full {
		sizes = append(sizes, firstSize{"1 GiB", gib, 1})
	}
	return sizes
}

func (s firstSize) file(i int) string { return fmt.Sprintf("%d/%02d", s.size, i) }

// usedBefore are written before a mount's first measurement.
const usedBefore = 8

func runFirstWrite(l *Lab) error {
	sizes := firstSizes(l.Mode())
	layer := l.Layer("first-write", func(ctx context.Context, dir string) error { return firstLayer(ctx, dir, sizes) })
	write := l.Metric(report.Metric{Name: "open, write 1 byte, close", Unit: report.Microseconds, LessIsBetter: true, Log: true})
	open := l.Metric(report.Metric{Name: "open for writing, close", Unit: report.Microseconds, LessIsBetter: true, Log: true})
	err := l.Rounds(func(c *Contender) error {
		// A file of a size that there is only one of is one sample a mount: mounts are cheap where writing is.
		mounts := 1
		if c.IsLamina() {
			mounts = 3
		}
		for range mounts {
			if err := firstOn(l, c, layer, sizes, write, firstByte); err != nil {
				return err
			}
		}
		return firstOn(l, c, layer, sizes, open, func(path string, _ int64) error { return openClose(path) })
	})
	if d := l.Default(); err == nil && d != nil {
		firstFigures(write, d.Name, sizes)
	}
	return errors.Join(err, l.Drop(layer))
}

func firstFigures(write *Metric, lamina string, sizes []firstSize) {
	slowest := sizes[0].name
	for _, s := range sizes {
		m, ok := write.Median(lamina, s.name)
		if worst, has := write.Median(lamina, slowest); ok && (!has || m > worst) {
			slowest = s.name
		}
	}
	write.RatioAtMost("x overlayfs volatile's time for 1 KiB, at the slowest size ("+slowest+")",
		Of{lamina, slowest}, Of{"overlayfs-volatile", sizes[0].name}, 1)
	write.RatioAtLeast("x faster than overlayfs, 1 KiB", Of{"overlayfs", sizes[0].name}, Of{lamina, sizes[0].name}, 3)
}

func firstLayer(ctx context.Context, dir string, sizes []firstSize) error {
	for _, s := range sizes {
		if err := os.Mkdir(filepath.Join(dir, fmt.Sprint(s.size)), 0o755); err != nil {
			return err
		}
		for i := range s.files {
			if err := fillFile(ctx, filepath.Join(dir, s.file(i)), s.size); err != nil {
				return err
			}
		}
	}
	for i := range usedBefore {
		if err := fillFile(ctx, filepath.Join(dir, fmt.Sprintf("before%d", i)), kib); err != nil {
			return err
		}
	}
	return nil
}

// firstOn does something once to every file of the layer.
func firstOn(l *Lab, c *Contender, layer *Layer, sizes []firstSize, m *Metric, do func(path string, middle int64) error) error {
	if err := layer.Warm(c); err != nil {
		return err
	}
	return l.On(c, Setup{Layer: layer}, func(u *Union) error {
		for i := range usedBefore {
			if err := firstByte(u.Path(fmt.Sprintf("before%d", i)), 1); err != nil {
				return err
			}
		}
		for _, s := range sizes {
			l.Progress("%s", s.name)
			for i := range s.files {
				path := u.Path(s.file(i))
				if _, err := fileSize(path); err != nil { // the name is known now
					return err
				}
				sample, err := u.Time(func() error { return do(path, s.size/2+1) })
				if err != nil {
					return err
				}
				m.Add(c, s.name, sample)
			}
		}
		return nil
	})
}

// firstByte is what the whole project is about: open, write one byte, close.
func firstByte(path string, off int64) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	_, err = unix.Pwrite(fd, []byte{'x'}, off)
	return errors.Join(err, unix.Close(fd))
}

func openClose(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	return unix.Close(fd)
}
