package report

import (
	"math"
	"math/rand/v2"
	"time"
)

// sample is a run made up in the shape of a real one: every kind of contender, chart and trouble. It is the same each
// time.
func sample() *Run {
	r := &Run{
		Machine: Machine{
			Kernel: "6.18.4", CPUModel: "A Processor @ 2.80GHz", CPUs: 2, Memory: 8 << 30,
			Filesystem: "ext4 on /dev/loop0 (rw,relatime)",
			Versions:   []Version{{"Lamina", "v0.3"}, {"fuse-overlayfs", "1.10"}, {"fio", "3.33"}},
		},
		Started: time.Date(2026, 11, 22, 18, 0, 0, 0, time.UTC), Seconds: 171, Mode: "quick",
		Contenders: []Contender{
			{"native", Native, "plain files on the same ext4", nil},
			{"overlayfs", Overlay, "the kernel's, as most hosts mount it", nil},
			{"overlayfs volatile", Rival, "without its syncs", []string{"volatile"}},
			{"fuse-overlayfs", Rival, "the usual choice without root", nil},
			{"overlayfs on XFS", Rival, "copies are reflinks", []string{"reflink=1"}},
			{"floor", Floor, "a server that answers and does nothing else", nil},
			{"lamina", Lamina, "as `lamina mount` sets it up", nil},
			{"lamina /dev/fuse", Lamina, "the same over the old transport", []string{"transport=dev"}},
			{"lamina bcow", Lamina, "compact format", []string{"format=bcow"}},
		},
		Absent: []Absent{{"btrfs snapshot", "mkfs.btrfs is not in PATH: apt-get install btrfs-progs"}},
		Failed: []Failed{{"density", "fuse-overlayfs", "mount: exit status 1: too many open files"}},
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	around := func(median float64) []float64 {
		s := make([]float64, 7)
		for i := range s {
			s[i] = median * math.Exp(rnd.NormFloat64()*0.12)
		}
		return s
	}
	bars := func(name, unit string, less, log bool, cases []string, medians map[string][]float64) Metric {
		m := Metric{Name: name, Unit: unit, LessIsBetter: less, Chart: Bars, Log: log}
		for i, k := range cases {
			for _, c := range r.Contenders {
				if v := medians[c.Name]; v != nil && v[i] > 0 {
					cell := NewCell(c.Name, k, 0, around(v[i]))
					if c.Kind != Native && c.Kind != Overlay {
						cell.ServerCPU, cell.PeakMemory = v[i]/1e7, 14<<20
					}
					cell.ClientCPU, cell.Allocated = v[i]/3e7, 8192
					m.Cells = append(m.Cells, cell)
				}
			}
		}
		return m
	}
	first := bars("open, write 1 byte, close", Microseconds, true, true, []string{"1 KiB", "4 MiB", "64 MiB", "1 GiB"}, map[string][]float64{
		"native": {5.8, 9.2, 11, 13.5}, "overlayfs": {383, 7511, 260_000, 3_959_000}, "overlayfs volatile": {83, 2369, 49_000, 852_000},
		"fuse-overlayfs": {555, 2828, 38_000, 603_000}, "overlayfs on XFS": {211, 199, 214, 246},
		"lamina": {79, 82, 81, 84}, "lamina /dev/fuse": {306, 341, 320, 327}, "lamina bcow": {88, 91, 0, 92},
	})
	first.Figures = []Figure{
		AtMost("of overlayfs volatile's 1 KiB time, the slowest size", 1.01, 1.0),
		AtLeast("times faster than overlayfs, 1 KiB", 4.8, 3),
	}
	first.Figures[0].Floor, first.Figures[1].Floor = 1.008, 5.1
	first.Figures[0].Note = "two round trips, 14 system calls"
	many := bars("2 GiB file, 410 of each 4 096 bytes: total", Seconds, true, false, []string{"warm", "cold"}, map[string][]float64{
		"native": {2.55, 9}, "overlayfs": {11.1, 19}, "overlayfs volatile": {6.6, 13}, "overlayfs on XFS": {14, 30.8},
		"floor": {9.4, 9.4}, "lamina": {11.5, 14.2}, "lamina /dev/fuse": {40, 44}, "lamina bcow": {12, 15},
	})
	many.Figures = []Figure{AtMost("times the floor's time, warm", 1.22, 1.3)}
	meta := bars("16 700 files", Seconds, true, true, []string{"untar", "find", "chown -R", "rm -rf"}, map[string][]float64{
		"native": {2.1, 0.09, 0.07, 0.25}, "overlayfs": {4.9, 0.12, 3.4, 2.3}, "fuse-overlayfs": {22, 0.26, 8.4, 8},
		"lamina": {6.0, 0.121, 0.6, 2.9}, "lamina /dev/fuse": {11, 0.124, 1.6, 5},
	})
	tps := Metric{Name: "transactions per second", Unit: PerSecond, Chart: Bars}
	for name, v := range map[string]float64{"native": 1012, "overlayfs": 983, "fuse-overlayfs": 281, "lamina": 940} {
		tps.Cells = append(tps.Cells, NewCell(name, "", 0, []float64{v * .98, v, v * 1.03}))
	}
	sortCells(r, &tps)
	over := Metric{Name: "transactions per second, over time", Unit: PerSecond, Chart: Lines, XName: "seconds since start", Aside: true}
	space := Metric{Name: "upper layer after n random writes of 4 KiB", Unit: Bytes, LessIsBetter: true, Chart: Lines, Log: true, XName: "writes", XLog: true}
	for _, c := range []struct {
		name string
		tps  float64
		warm float64
	}{{"native", 1012, 1}, {"overlayfs", 983, 12}, {"fuse-overlayfs", 281, 5}, {"lamina", 940, 1}, {"lamina bcow", 900, 1}} {
		for t := 1.0; t <= 60; t++ {
			v := c.tps * (1 - math.Exp(-t/c.warm/2)) * math.Exp(rnd.NormFloat64()*0.04)
			over.Cells = append(over.Cells, NewCell(c.name, "", t, []float64{v}))
		}
		for n := 1.0; n <= 100_000; n *= 10 {
			bytes := map[string]float64{"native": 0, "lamina": 4096*n + 8192, "lamina bcow": 4200*n + 8192}[c.name]
			if bytes == 0 {
				bytes = 1 << 30
			}
			if c.name != "native" {
				space.Cells = append(space.Cells, NewCell(c.name, "", n, []float64{bytes}))
			}
		}
	}
	sortCells(r, &over)
	sortCells(r, &space)
	tps.Figures = []Figure{AtLeast("of overlayfs's steady state", 0.956, 0.9)}
	r.Scenarios = []Scenario{
		{"first-write", "First write to a file of the image", "BAOverlay, table 2", "A program opens a file of a lower layer, writes one byte and closes it. All names were looked up, and all lower bytes are in the page cache before.", []Metric{first}},
		{"write-many", "A tenth of every block", "BAOverlay, figure 6", "For each 4 KiB block of a 2 GiB lower file: open, seek, write 410 bytes, close.", []Metric{many}},
		{"metadata", "Trees of small files", "", "Everyday programs over a real tree.", []Metric{meta}},
		{"database", "A database in the image", "", "MariaDB with its data directory in a lower layer.", []Metric{tps, over}},
		{"space", "Space of the upper layer", "BAOverlay, figure 9", "Random writes to a 1 GiB lower file, then st_blocks of the upper layer.", []Metric{space}},
		{"density", "Many containers", "", "1 to 256 mounts over the same layers.", nil},
	}
	return r
}

// sortCells puts cells into the order of contenders: maps have none.
func sortCells(r *Run, m *Metric) {
	var cells []Cell
	for _, c := range r.Contenders {
		for _, cell := range m.Cells {
			if cell.Contender == c.Name {
				cells = append(cells, cell)
			}
		}
	}
	m.Cells = cells
}
