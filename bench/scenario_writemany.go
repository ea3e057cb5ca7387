package bench

import (
	"context"

	"lamina/bench/report"
)

var writeMany = Scenario{
	Name:   "write-many",
	Title:  "A tenth of every block of a large file, the file opened for each",
	Source: "BAOverlay (SoCC 2020), 410 bytes of each 4 KiB block of a 2 GiB file",
	Describes: "For every 4 KiB block of a lower file: open, seek, write 410 bytes, close. Then the same with the file kept open. " +
		"The time of an iteration includes its share of the copy-up. Warm, the lower file is in the page cache, to the advantage " +
		"of whoever copies it; cold, the page cache was dropped. The floor is a FUSE server that does nothing: what " +
		"Lamina adds to it is Lamina's own cost.",
	Contenders: []string{"plain", "overlayfs", "overlayfs-volatile", "overlayfs-xfs", "btrfs-snapshot", "lamina", "lamina-dev", "lamina-lazy", "lamina-sync", "floor", "floor-dev"},
	Quick:      []string{"plain", "overlayfs", "overlayfs-xfs", "lamina", "floor"},
	Space:      hugeSpace,
	Weight:     20,
	Run:        runWriteMany,
}

// hugeSpace is what scenarios on the huge file need: the layer on three filesystems, a plain copy, a copy-up, and the
// filesystems' own needs.
func hugeSpace(m Mode) int64 { return 6*hugeSize(m) + gib }

const (
	reopenedWarm = "reopened each time, lower warm"
	reopenedCold = "reopened each time, lower cold"
	openWarm     = "kept open, lower warm"
)

func runWriteMany(l *Lab) error {
	layer := l.hugeLayer()
	blocks := int(hugeSize(l.Mode()) / blockSize)
	iteration := l.Metric(report.Metric{Name: "an iteration", Unit: report.Microseconds, LessIsBetter: true, Log: true})
	rest := l.Metric(report.Metric{Name: "afterwards, until nothing is left to copy", Unit: report.Seconds, LessIsBetter: true, Aside: true})
	once := func(c *Contender, name string, cold bool, do func(context.Context, string, int) error) error {
		l.Progress("%s", name)
		if err := layer.Warm(c, huge); err != nil {
			return err
		}
		return l.On(c, Setup{Layer: layer}, func(u *Union) error {
			if _, err := fileSize(u.Path(huge)); err != nil { // the name is known now
				return err
			}
			if cold {
				if err := l.DropCaches(); err != nil {
					return err
				}
			}
			s, err := u.Time(func() error { return do(l.ctx, u.Path(huge), blocks) })
			if err != nil {
				return err
			}
			iteration.Add(c, name, s.Per(blocks))
			if !c.IsLamina() {
				return nil
			}
			s, err = u.Time(u.Quiet)
			if err == nil {
				rest.Add(c, name, s.InSeconds())
			}
			return err
		})
	}
	err := l.Rounds(func(c *Contender) error {
		if err := once(c, reopenedWarm, false, reopening); err != nil {
			return err
		}
		if err := once(c, openWarm, false, keptOpen); err != nil || c.Kind == report.Floor {
			return err
		}
		return once(c, reopenedCold, true, reopening)
	})
	if d := l.Default(); err == nil && d != nil {
		iteration.RatioAtMost("x the floor's time, reopened, warm", Of{d.Name, reopenedWarm}, Of{"floor", reopenedWarm}, 1.3)
		iteration.RatioAtMost("x overlayfs on reflink XFS's time, reopened, cold", Of{d.Name, reopenedCold}, Of{"overlayfs-xfs", reopenedCold}, 0.5)
	}
	return err
}
