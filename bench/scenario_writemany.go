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
	Describes: "For every 4 KiB block of a lower file: open, seek, write 410 bytes, close (in a full run also of 2 GiB, once). Then the same " +
		"with the file kept open. The time of an iteration includes its share of the copy-up. Warm, the lower file is in the page " +
		"cache, to the advantage of whoever copies it; cold, the page cache was dropped. floor-null is a FUSE server that does " +
		"nothing: what Lamina adds to it is Lamina's own cost, and floor's is that of writing to an ordinary file.",
	Contenders: []string{"plain", "overlayfs", "overlayfs-xfs", "lamina", "lamina-dev", "floor", "floor-null"},
	Quick:      []string{"plain", "overlayfs", "overlayfs-xfs", "lamina", "floor", "floor-null"},
	More:       []string{"fuse-overlayfs"},
	Space:      func(m Mode) int64 { return hugeSpace(max(hugeSize(m), wholeSize(m))) },
	Weight:     260,
	Run:        runWriteMany,
}

// wholeSize is that of the file that is written as in the paper, from beginning to end by few contenders; 0: none is.
func wholeSize(m Mode) int64 { return Pick[int64](m, 0, 0, 2*gib) }

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
	{name: reopenedCold, cold: true, do: reopening, but: []string{"lamina-dev", "fuse-overlayfs", "floor-null"}},
}

// wholeCase is the paper's: minutes for whoever takes a quarter of a millisecond an iteration.
var wholeCase = manyCase{name: reopenedWarm + ", 2 GiB", do: reopening,
	but: []string{"overlayfs-xfs", "lamina-dev", "fuse-overlayfs", "floor"}}

func runWriteMany(l *Lab) error {
	w := manyWrites{
		Lab:       l,
		iteration: l.Metric(report.Metric{Name: "an iteration", Unit: report.Microseconds, LessIsBetter: true, Log: true}),
		rest:      l.Metric(report.Metric{Name: "afterwards, until nothing is left to copy", Unit: report.Seconds, LessIsBetter: true, Aside: true}),
	}
	asked := reopenedWarm
	if size := wholeSize(l.Mode()); size > 0 {
		asked = wholeCase.name
		layer := l.fileLayer(size)
		// Once: it is half a million iterations.
		err := l.once(func() error { return w.turns(layer, size, []manyCase{wholeCase}) })
		if err = errors.Join(err, l.Drop(layer)); err != nil {
			return err
		}
	}
	err := w.turns(l.hugeLayer(), hugeSize(l.Mode()), manyCases)
	if d := l.Default(); err == nil && d != nil {
		w.iteration.RatioAtMost("x the time of a server that does nothing, "+asked, Of{d.Name, asked}, Of{"floor-null", asked}, 1.3)
		w.iteration.RatioAtMost("x overlayfs on reflink XFS's time, reopened, cold", Of{d.Name, reopenedCold}, Of{"overlayfs-xfs", reopenedCold}, 0.5)
	}
	return err
}

type manyWrites struct {
	*Lab
	iteration, rest *Metric
}

// turns lets everybody write a file of a size in some ways.
func (w *manyWrites) turns(layer *Layer, size int64, cases []manyCase) error {
	blocks := int(size / blockSize)
	var things []string
	for _, mc := range cases {
		things = append(things, mc.name)
	}
	return w.Turns(w.contenders, things, func(c *Contender, i int) error {
		mc := &cases[i]
		if slices.Contains(mc.but, c.Name) {
			return nil
		}
		w.Progress("%s", mc.name)
		if err := layer.Warm(c, huge); err != nil {
			return err
		}
		return w.On(c, Setup{Layer: layer}, func(u *Union) error {
			s, err := mc.measure(u, blocks)
			if err != nil {
				return err
			}
			w.iteration.Add(c, mc.name, s.Per(blocks))
			if !c.IsLamina() {
				return nil
			}
			s, err = u.Time(u.Quiet)
			w.rest.Add(c, mc.name, s.InSeconds())
			return err
		})
	})
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
