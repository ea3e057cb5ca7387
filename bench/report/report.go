// Package report holds what `lamina bench` measured and shows it: as JSON, as tables on a terminal, and as one HTML page
// that needs nothing else. It knows nothing of how the numbers came about.
//
// # Terms
//
// A [Run] compares [Contender]s, over [Scenario]s. A scenario has [Metric]s, each a question with one answer a contender
// and a case: a [Cell], the median of its samples with their spread. A [Figure] is a number that the project has set
// itself a target for.
//
// Ratios (to native files, to kernel overlayfs) are never stored: [Run.Ratio] works them out from the medians, for every
// form of output alike.
package report

import (
	"math"
	"slices"
	"time"
)

// Format is the version of the JSON form that this package writes and reads.
const Format = 1

// Run is everything that one run of the bench found.
type Run struct {
	Format     int         `json:"format"` // [Format]; set by WriteJSON, checked by ReadJSON
	Machine    Machine     `json:"machine"`
	Started    time.Time   `json:"started"`
	Seconds    float64     `json:"seconds"`
	Mode       string      `json:"mode"` // "quick", "full" or what else the bench calls its sizes
	Contenders []Contender `json:"contenders"`
	Absent     []Absent    `json:"absent,omitempty"`
	Failed     []Failed    `json:"failed,omitempty"`
	Scenarios  []Scenario  `json:"scenarios"`
}

// Machine is where the run took place.
type Machine struct {
	Kernel     string    `json:"kernel"`
	CPUModel   string    `json:"cpu_model"`
	CPUs       int       `json:"cpus"`
	Memory     int64     `json:"memory"`     // bytes
	Filesystem string    `json:"filesystem"` // of the directory measured in: type, device, mount options
	Versions   []Version `json:"versions,omitempty"`
}

// Version is that of Lamina, of a rival, or of a tool that a scenario uses.
type Version struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Kind is a contender's part in the comparison. It decides its colour, and what ratios refer to.
type Kind string

const (
	// Native is files without any union, or a network without any overlay: the bound that nobody can beat honestly.
	Native Kind = "native"
	// Overlay is kernel overlayfs, or VXLAN with a bridge, as most hosts use it. At most one contender of a run.
	Overlay Kind = "overlayfs"
	// Lamina is a variant of this program. The first one of the run is its default configuration, which the summary is
	// about.
	Lamina Kind = "lamina"
	// Rival is anything else that a user could pick.
	Rival Kind = "rival"
	// Floor is not a product: a server of the same transport without a union, which shows what the rest costs.
	Floor Kind = "floor"
)

// Contender is one system with its options.
type Contender struct {
	Name      string   `json:"name"` // unique in the run; what cells refer to
	Kind      Kind     `json:"kind"`
	Describes string   `json:"describes,omitempty"`
	Options   []string `json:"options,omitempty"`
}

// Absent is a contender that this machine does not have.
type Absent struct {
	Name string `json:"name"`
	Why  string `json:"why"` // with the remedy
}

// Failed is a contender that a scenario could not measure, although it is present. Contender is empty if the scenario
// failed as a whole.
type Failed struct {
	Scenario  string `json:"scenario"`
	Contender string `json:"contender,omitempty"`
	Why       string `json:"why"`
}

// Scenario is one situation that the contenders were put in.
type Scenario struct {
	Name      string   `json:"name"` // as on the command line: "first-write"
	Title     string   `json:"title"`
	Source    string   `json:"source,omitempty"` // the paper's table or figure that asks the same
	Describes string   `json:"describes"`        // what is done, and what is kept fair; a newcomer reads this
	Metrics   []Metric `json:"metrics"`
}

// Chart is how a metric is best drawn.
type Chart string

const (
	Bars  Chart = "bars"  // a bar for each contender, grouped by Cell.Case
	Lines Chart = "lines" // a line for each contender over Cell.X; Cell.Case is not used
)

// Units that the report scales and spells out (1500 us becomes 1.5 ms). Any other is printed as it is.
const (
	Microseconds = "us"
	Seconds      = "s"
	Bytes        = "B"
	BytesPerSec  = "B/s"
	PerSecond    = "/s"
)

// Metric is one question, with everybody's answers.
type Metric struct {
	Name         string   `json:"name"`
	Unit         string   `json:"unit"`
	LessIsBetter bool     `json:"less_is_better"`
	Chart        Chart    `json:"chart"`
	Log          bool     `json:"log,omitempty"`    // the values' axis is logarithmic
	XName        string   `json:"x_name,omitempty"` // of the x axis of Lines
	XUnit        string   `json:"x_unit,omitempty"`
	XLog         bool     `json:"x_log,omitempty"`
	Aside        bool     `json:"aside,omitempty"` // shown, but neither lead nor lag: left out of the summary
	Cells        []Cell   `json:"cells"`
	Figures      []Figure `json:"figures,omitempty"`
}

// Cell is one contender's answer in one case. What was not measured is 0 and left out.
type Cell struct {
	Contender  string  `json:"contender"`
	Case       string  `json:"case,omitempty"` // of Bars: "4 MiB"; empty if there is only one
	X          float64 `json:"x,omitempty"`    // of Lines
	N          int     `json:"n"`              // samples
	Median     float64 `json:"median"`         // this and the rest of the spread: in Metric.Unit
	Q1         float64 `json:"q1"`
	Q3         float64 `json:"q3"`
	Min        float64 `json:"min"`
	Max        float64 `json:"max"`
	ServerCPU  float64 `json:"server_cpu,omitempty"`  // seconds a sample, median
	ClientCPU  float64 `json:"client_cpu,omitempty"`  // seconds a sample, median
	Allocated  int64   `json:"allocated,omitempty"`   // bytes of the upper layer after it
	PeakMemory int64   `json:"peak_memory,omitempty"` // bytes of the server, resident
}

// NewCell sums samples up. Quartiles are interpolated linearly between samples (R's and NumPy's default). It panics if
// there are no samples: a cell that was not measured does not exist.
func NewCell(contender, caseName string, x float64, samples []float64) Cell {
	s := slices.Sorted(slices.Values(samples))
	at := func(q float64) float64 {
		pos := q * float64(len(s)-1)
		i := int(pos)
		if i+1 >= len(s) {
			return s[i]
		}
		return s[i] + (s[i+1]-s[i])*(pos-float64(i))
	}
	return Cell{
		Contender: contender, Case: caseName, X: x, N: len(s),
		Median: at(0.5), Q1: at(0.25), Q3: at(0.75), Min: s[0], Max: s[len(s)-1],
	}
}

// Figure is a number that the project wants to reach.
type Figure struct {
	Says    string  `json:"says"` // what it is, with its unit: "times overlayfs volatile's time"
	Value   float64 `json:"value"`
	Target  float64 `json:"target"`
	AtLeast bool    `json:"at_least,omitempty"` // it must reach the target; otherwise it must not exceed it
	OK      bool    `json:"ok"`
	Floor   float64 `json:"floor,omitempty"` // what the floor reaches: the same server without a union; 0: it did not take part
	Note    string  `json:"note,omitempty"`  // what limits it, in a sentence
}

// Beyond tells that no server over this transport reaches the target: the floor misses it too.
func (f Figure) Beyond() bool {
	return f.Floor != 0 && !f.OK && (f.AtLeast && f.Floor < f.Target || !f.AtLeast && f.Floor > f.Target)
}

// AtLeast is a figure that must reach its target.
func AtLeast(says string, value, target float64) Figure {
	return Figure{Says: says, Value: value, Target: target, AtLeast: true, OK: value >= target}
}

// AtMost is a figure that must not exceed its target.
func AtMost(says string, value, target float64) Figure {
	return Figure{Says: says, Value: value, Target: target, OK: value <= target}
}

// Cell returns the answer of a contender in a case, or nil. Lines are asked by X, Bars by caseName.
func (m *Metric) Cell(contender, caseName string, x float64) *Cell {
	for i := range m.Cells {
		c := &m.Cells[i]
		if c.Contender == contender && c.Case == caseName && c.X == x {
			return c
		}
	}
	return nil
}

// First is the first contender of a kind: for Native and Overlay what ratios refer to, for Lamina the default
// configuration. Nil if the run had none.
func (r *Run) First(k Kind) *Contender {
	i := slices.IndexFunc(r.Contenders, func(c Contender) bool { return c.Kind == k })
	if i < 0 {
		return nil
	}
	return &r.Contenders[i]
}

// Base names what ratios to a kind refer to.
func (r *Run) Base(k Kind) string {
	if c := r.First(k); c != nil {
		return c.Name
	}
	return string(k)
}

// Contender returns the contender of a name, or nil.
func (r *Run) Contender(name string) *Contender {
	i := slices.IndexFunc(r.Contenders, func(c Contender) bool { return c.Name == name })
	if i < 0 {
		return nil
	}
	return &r.Contenders[i]
}

// Ratio is how many times better the cell is than the first contender of a kind in the same case: 2 is half its time, or
// twice its rate. It is NaN if there is nothing to compare with.
func (r *Run) Ratio(m *Metric, c *Cell, to Kind) float64 {
	base := r.First(to)
	if base == nil {
		return math.NaN()
	}
	b := m.Cell(base.Name, c.Case, c.X)
	switch {
	case b == nil || b.Median <= 0 || c.Median <= 0:
		return math.NaN()
	case m.LessIsBetter:
		return b.Median / c.Median
	}
	return c.Median / b.Median
}

// Targets are all figures of the run, with the scenario of each, in order.
func (r *Run) Targets() []Target {
	var all []Target
	for _, s := range r.Scenarios {
		for _, m := range s.Metrics {
			for _, f := range m.Figures {
				all = append(all, Target{Scenario: s.Name, Metric: m.Name, Figure: f})
			}
		}
	}
	return all
}

// Target is a figure and where it belongs.
type Target struct {
	Scenario, Metric string
	Figure
}

// Missed are the targets that were not met.
func (r *Run) Missed() []Target {
	return slices.DeleteFunc(r.Targets(), func(t Target) bool { return t.OK })
}
