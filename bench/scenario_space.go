package bench

import (
	"lamina/bench/report"
)

var space = Scenario{
	Name:   "space",
	Title:  "What the upper layer takes up on the disk",
	Source: "BAOverlay (SoCC 2020), space of an overlay file",
	Describes: "n different blocks of 4 KiB of a large lower file are written, in random order. What the upper layer occupies is " +
		"counted after unmounting: the blocks of its files, or what the filesystem grew by where files share blocks.",
	Contenders: []string{"overlayfs", "overlayfs-xfs", "btrfs-snapshot", "lamina", "lamina-bcow", "lamina-bcow-single"},
	Quick:      []string{"overlayfs", "lamina", "lamina-bcow"},
	Space:      func(m Mode) int64 { return hugeSpace(spaceSize(m)) },
	Weight:     60,
	Run:        runSpace,
}

// Targets of the first release: bytes for a write of one block, and for a thousand.
const (
	spaceOne      = 64 * kib
	spaceThousand = 4_500_000
)

// spaceSize leaves room for 100 000 writes in a full run.
func spaceSize(m Mode) int64 { return Pick(m, hugeSize(m), hugeSize(m), 512*mib) }

func runSpace(l *Lab) error {
	size := spaceSize(l.Mode())
	layer := l.fileLayer(size)
	blocks := shuffled(int(size / blockSize))
	most := min(100_000, len(blocks))
	bytes := l.Metric(report.Metric{Name: "upper layer after n writes", Unit: report.Bytes, LessIsBetter: true, Log: true,
		Chart: report.Lines, XName: "writes of 4 KiB", XLog: true})
	err := l.Rounds(func(c *Contender) error {
		if err := layer.Warm(c, huge); err != nil {
			return err
		}
		return l.On(c, Setup{Layer: layer}, func(u *Union) error {
			for done, n := 0, 1; n <= most; done, n = n, n*10 {
				l.Progress("%d writes", n)
				if err := u.Up(); err != nil {
					return err
				}
				if err := writeBlocks(l.ctx, u.Path(huge), blocks[done:n]); err != nil {
					return err
				}
				if err := u.Down(); err != nil {
					return err
				}
				allocated, err := u.Allocated()
				if err != nil {
					return err
				}
				bytes.AddX(c, float64(n), Sample{Value: float64(allocated), Allocated: allocated})
			}
			return nil
		})
	})
	if d := l.Default(); err == nil && d != nil {
		for _, t := range []struct {
			says      string
			n, target float64
		}{{"bytes after 1 write", 1, spaceOne}, {"bytes after 1000 writes", 1000, spaceThousand}} {
			if v, ok := bytes.MedianX(d.Name, t.n); ok {
				bytes.Figure(report.AtMost(t.says, v, t.target))
			}
		}
	}
	return err
}
