package bench

import (
	"lamina/bench/report"
)

var bcow = Scenario{
	Name:   "bcow",
	Title:  "The compact file format",
	Source: "BAOverlay (SoCC 2020), BCoW files",
	Describes: "A tenth of every 4 KiB block of a large lower file is written, the file opened for each, into a file that does not exist " +
		"in the upper layer yet, and again after a remount, when it does. lamina keeps blocks at their places in a sparse " +
		"file; lamina-bcow appends them and finds them through a table of two levels, lamina-bcow-single of one.",
	Contenders: []string{"plain", "overlayfs", "lamina", "lamina-bcow", "lamina-bcow-single"},
	Quick:      []string{"lamina", "lamina-bcow", "lamina-bcow-single"},
	Space:      func(m Mode) int64 { return hugeSpace(hugeSize(m)) },
	Weight:     60,
	Run:        runBCoW,
}

func runBCoW(l *Lab) error {
	layer := l.hugeLayer()
	blocks := int(hugeSize(l.Mode()) / blockSize)
	iteration := l.Metric(report.Metric{Name: "an iteration", Unit: report.Microseconds, LessIsBetter: true, Log: true})
	return l.Rounds(func(c *Contender) error {
		if err := layer.Warm(c, huge); err != nil {
			return err
		}
		return l.On(c, Setup{Layer: layer}, func(u *Union) error {
			for _, name := range []string{"new file", "existing file"} {
				l.Progress("%s", name)
				s, err := u.Time(func() error { return reopening(l.ctx, u.Path(huge), blocks) })
				if err != nil {
					return err
				}
				if err := u.Down(); err != nil {
					return err
				}
				if s.Allocated, err = u.Allocated(); err != nil {
					return err
				}
				iteration.Add(c, name, s.Per(blocks))
				if err := u.Up(); err != nil {
					return err
				}
			}
			return nil
		})
	})
}
