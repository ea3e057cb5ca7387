package report

import (
	"math"
	"slices"
)

// comparison is Lamina's standing in one question against one other contender.
type comparison struct {
	Scenario, Metric, Case string
	Ratio                  float64 // times better
}

// Standing is on which side of parity.
func (c comparison) Standing() Standing { return standing(c.Ratio) }

// comparisons are the ratios of the default Lamina to the first contender of a kind, in all metrics of a scenario that
// are no asides.
func (r *Run) comparisons(s *Scenario, to Kind) []comparison {
	self := r.First(Lamina)
	if self == nil {
		return nil
	}
	var all []comparison
	for i := range s.Metrics {
		m := &s.Metrics[i]
		if m.Aside {
			continue
		}
		for j := range m.Cells {
			c := &m.Cells[j]
			if c.Contender != self.Name {
				continue
			}
			if v := r.Ratio(m, c, to); !math.IsNaN(v) {
				all = append(all, comparison{s.Name, m.Name, m.caseLabel(c), v})
			}
		}
	}
	return all
}

// verdict sums comparisons up: the geometric mean, the ends, and how many are on which side.
type verdict struct {
	All                  []comparison
	Mean                 float64 // NaN if there is nothing to compare
	Worst, Best          comparison
	Ahead, Level, Behind int
}

func sumUp(all []comparison) verdict {
	v := verdict{All: all, Mean: math.NaN()}
	if len(all) == 0 {
		return v
	}
	var logs float64
	for _, c := range all {
		logs += math.Log(c.Ratio)
		switch c.Standing() {
		case Ahead:
			v.Ahead++
		case Behind:
			v.Behind++
		default:
			v.Level++
		}
	}
	v.Mean = math.Exp(logs / float64(len(all)))
	less := func(a, b comparison) int {
		switch {
		case a.Ratio < b.Ratio:
			return -1
		case a.Ratio > b.Ratio:
			return 1
		}
		return 0
	}
	v.Worst, v.Best = slices.MinFunc(all, less), slices.MaxFunc(all, less)
	return v
}
