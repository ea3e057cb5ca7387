package report

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// step is one name of a unit: how many of the unit it holds.
type step struct {
	Size float64 `json:"size"`
	Name string  `json:"name"`
}

// scales are the names that a unit takes as its values grow, smallest first.
var scales = map[string][]step{
	Microseconds: {{1e-3, "ns"}, {1, "µs"}, {1e3, "ms"}, {1e6, "s"}},
	Seconds:      {{1e-6, "µs"}, {1e-3, "ms"}, {1, "s"}},
	Bytes:        {{1, "B"}, {1 << 10, "KiB"}, {1 << 20, "MiB"}, {1 << 30, "GiB"}, {1 << 40, "TiB"}},
	BytesPerSec:  {{1, "B/s"}, {1 << 10, "KiB/s"}, {1 << 20, "MiB/s"}, {1 << 30, "GiB/s"}},
	PerSecond:    {{1, "/s"}},
}

// scale is a unit's names; of a unit without any, its own.
func scale(unit string) []step {
	if s := scales[unit]; s != nil {
		return s
	}
	return []step{{1, unit}}
}

// quantity writes a value with the name of its unit that leaves few digits: quantity(1500, "us") is "1.5 ms".
func quantity(v float64, unit string) string {
	steps := scale(unit)
	s := steps[0]
	if v == 0 && unit == Microseconds {
		s = steps[1]
	}
	for _, next := range steps[1:] {
		if v >= next.Size*0.9995 { // 999.9 us is 1 ms once it is rounded
			s = next
		}
	}
	return strings.TrimSpace(digits(v/s.Size) + " " + s.Name)
}

// digits writes a number with three significant digits, or all of those before the point, thousands apart.
func digits(v float64) string {
	switch a := math.Abs(v); {
	case v == 0:
		return "0"
	case a < 1e-4:
		return strconv.FormatFloat(v, 'g', 2, 64)
	case a < 999.5:
		places := max(0, 2-int(math.Floor(math.Log10(a)+1e-9)))
		s := strconv.FormatFloat(v, 'f', places, 64)
		if strings.Contains(s, ".") {
			s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
		}
		return s
	}
	s := strconv.FormatFloat(math.Abs(v), 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u202f" + s[i:] // a narrow space that does not break
	}
	if v < 0 {
		s = "-" + s
	}
	return s
}

// ratio writes how many times better something is: "12×", and "1/65×" for what is far behind. What could not be compared
// is a dash.
func ratio(v float64) string {
	switch {
	case math.IsNaN(v):
		return "–"
	case v < 0.1:
		return "1/" + digits(1/v) + "×"
	}
	return factor(v) + "×"
}

// factor writes a number near 1 with two digits behind the point: a third would be noise, and none would hide a loss of
// some per cent.
func factor(v float64) string {
	if v < 10 {
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return digits(v)
}

// Standing is which side of parity a ratio is on.
type Standing string

const (
	Ahead   Standing = "ahead"
	Level   Standing = "level" // within levelBand of parity
	Behind  Standing = "behind"
	Unknown Standing = "unknown"
)

// levelBand is how far from 1 a ratio of medians may be before the report calls it a difference. Most scenarios repeat
// to within a few per cent.
const levelBand = 0.05

func standing(ratio float64) Standing {
	switch {
	case math.IsNaN(ratio):
		return Unknown
	case ratio > 1+levelBand:
		return Ahead
	case ratio < 1-levelBand:
		return Behind
	}
	return Level
}

// margin says a ratio in words whose size grows with the distance from parity: "12× ahead", "2× behind", "level".
func margin(v float64) string {
	switch standing(v) {
	case Ahead:
		return factor(v) + "× ahead"
	case Behind:
		return factor(1/v) + "× behind"
	case Level:
		return "level"
	}
	return "–"
}

// Bound says what a figure was to reach.
func (f Figure) Bound() string {
	if f.AtLeast {
		return "at least " + digits(f.Target)
	}
	return "at most " + digits(f.Target)
}

// caseLabel names a cell's place within its metric.
func (m *Metric) caseLabel(c *Cell) string {
	if m.Chart == Lines {
		return strings.TrimSpace(fmt.Sprintf("%s %s", m.XName, quantity(c.X, m.XUnit)))
	}
	return c.Case
}
