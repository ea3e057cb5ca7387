package bench

import (
	"lamina/bench/report"
)

var readAfterWrite = Scenario{
	Name:   "read-after-write",
	Title:  "Reading blocks that were partly written",
	Source: "BAOverlay (SoCC 2020), reads after copy-after-write",
	Describes: "A tenth of every 4 KiB block of a large lower file is written, in order, and then a fifth of the blocks are read, at " +
		"random. lamina-lazy has copied nothing before the read, so that each read completes its block first: the worst case. " +
		"lamina has had the time to copy the rest of the blocks in the background: the usual case. Cold, the page cache is " +
		"dropped between writing and reading.",
	Contenders: []string{"plain", "overlayfs", "overlayfs-xfs", "btrfs-snapshot", "lamina", "lamina-lazy", "lamina-dev"},
	Quick:      []string{"plain", "overlayfs", "lamina", "lamina-lazy"},
	Space:      func(m Mode) int64 { return hugeSpace(hugeSize(m)) },
	Weight:     80,
	Run:        runReadAfterWrite,
}

func runReadAfterWrite(l *Lab) error {
	layer := l.hugeLayer()
	blocks := int(hugeSize(l.Mode()) / blockSize)
	some := shuffled(blocks)[:blocks/5]
	read := l.Metric(report.Metric{Name: "reading 4 KiB", Unit: report.Microseconds, LessIsBetter: true, Log: true})
	once := func(c *Contender, name string, cold bool) error {
		l.Progress("%s", name)
		if err := layer.Warm(c, huge); err != nil {
			return err
		}
		return l.On(c, Setup{Layer: layer}, func(u *Union) error {
			if err := keptOpen(l.ctx, u.Path(huge), blocks); err != nil {
				return err
			}
			if err := u.Quiet(); err != nil {
				return err
			}
			if cold {
				if err := l.DropCaches(); err != nil {
					return err
				}
			}
			s, err := u.Time(func() error { return readBlocks(l.ctx, u.Path(huge), some) })
			if err == nil {
				read.Add(c, name, s.Per(len(some)))
			}
			return err
		})
	}
	return l.Rounds(func(c *Contender) error {
		if err := once(c, "warm", false); err != nil || l.Mode() == Quick {
			return err
		}
		return once(c, "cold", true)
	})
}
