package bench

import (
	"context"
	"errors"
	"slices"

	"lamina/bench/report"
)

var writeMany = Scenario{
	Name:   "write-many",
	Title:  "A tenth of every block of a large file, the file opened for each",
	Source: "BAOverlay (SoCC 2020), 410 bytes of each 4 KiB block of a 2 GiB file",
	Describes: "For every 4 KiB block of a lower file (2 GiB in a full run, else less): open, seek, write 410 bytes, close. Then the same " +
		"with the file kept open. The time of an iteration includes its share of the copy-up. Warm, the lower file is in the page " +
		"cache, to the advantage of whoever copies it; cold, the page cache was dropped. The floor is a FUSE server that does " +
		"nothing: what Lamina adds to it is Lamina's own cost.",
	Contenders: []string{"plain", "overlayfs", "overlayfs-xfs", "lamina", "lamina-dev", "floor", "floor-dev"},
	Quick:      []string{"plain", "overlayfs", "overlayfs-xfs", "lamina", "floor"},
	More:       []string{"overlayfs-volatile", "fuse-overlayfs", "btrfs-snapshot", "lamina-lazy", "lamina-sync"},
	Space:      func(m Mode) int64 { return hugeSpace(writeManySize(m)) },
	Weight:     24,
	Run:        runWriteMany,
}

func writeManySize(m Mode) int64 { return Pick(m, hugeSize(m), hugeSize(m), 2*gib) }

// manyCase is one way to write every block.
type manyCase struct {
	name string
	cold bool
	do   func(ctx context.Context, path string, blocks int) error
	// but are those whom it would take minutes, or for whom the question makes no sense.
	but []string
}

const (
	reopenedWarm = "reopened each time, lower warm"
	reopenedCold = "reopened each time, lower cold"
)

var manyCases = []manyCase{
	{name: reopenedWarm, do: reopening},
	{name: "kept open, lower warm", do: keptOpen, but: []string{"fuse-overlayfs"}},
	{name: reopenedCold, cold: true, do: reopening, but: []string{"fuse-overlayfs", "floor", "floor-dev"}},
}

func runWriteMany(l *Lab) error {
	size := writeManySize(l.Mode())
	layer := l.fileLayer(size)
	blocks := int(size / blockSize)
	iteration := l.Metric(report.Metric{Name: "an iteration", Unit: report.Microseconds, LessIsBetter: true, Log: true})
	rest := l.Metric(report.Metric{Name: "afterwards, until nothing is left to copy", Unit: report.Seconds, LessIsBetter: true, Aside: true})
	var things []string
	for _, mc := range manyCases {
		things = append(things, mc.name)
	}
	err := l.Turns(l.contenders, things, func(c *Contender, i int) error {
		mc := &manyCases[i]
		if slices.Contains(mc.but, c.Name) {
			return nil
		}
		l.Progress("%s", mc.name)
		if err := layer.Warm(c, huge); err != nil {
			return err
		}
		return l.On(c, Setup{Layer: layer}, func(u *Union) error {
			s, err := mc.measure(u, blocks)
			if err != nil {
				return err
			}
			iteration.Add(c, mc.name, s.Per(blocks))
			if !c.IsLamina() {
				return nil
			}
			s, err = u.Time(u.Quiet)
			rest.Add(c, mc.name, s.InSeconds())
			return err
		})
	})
	if d := l.Default(); err == nil && d != nil {
		iteration.RatioAtMost("x the floor's time, reopened, warm", Of{d.Name, reopenedWarm}, Of{"floor", reopenedWarm}, 1.3)
		iteration.RatioAtMost("x overlayfs on reflink XFS's time, reopened, cold", Of{d.Name, reopenedCold}, Of{"overlayfs-xfs", reopenedCold}, 0.5)
	}
	if size != hugeSize(l.Mode()) {
		err = errors.Join(err, l.Drop(layer)) // nobody else's
	}
	return err
}

func (mc *manyCase) measure(u *Union, blocks int) (Sample, error) {
	if _, err := fileSize(u.Path(huge)); err != nil { // the name is known now
		return Sample{}, err
	}
	if mc.cold {
		if err := u.lab.DropCaches(); err != nil {
			return Sample{}, err
		}
	}
	return u.Time(func() error { return mc.do(u.lab.ctx, u.Path(huge), blocks) })
}
