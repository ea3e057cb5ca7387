package report

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"io"
	"math"
	"slices"
	"strings"
	"time"
)

// The page is one file. Its charts are drawn by Observable Plot (plot/), which lies in it; without scripts it still has
// every number, as tables.
var (
	//go:embed plot/plot.min.js
	plotJS string
	//go:embed page.js
	pageJS string
	//go:embed page.css
	pageCSS string
	//go:embed page.html
	pageHTML string
)

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"quantity": quantity, "ratio": ratio, "digits": digits, "margin": margin, "standing": standing,
	"date": func(t time.Time) string { return t.UTC().Format("2 January 2006, 15:04 UTC") },
	"join": strings.Join,
}).Parse(pageHTML))

// HTML writes the run as one page that needs no network.
func (r *Run) HTML(w io.Writer) error {
	if err := r.check(); err != nil {
		return err
	}
	var out bytes.Buffer // a page that fails half way is not written at all
	if err := pageTemplate.Execute(&out, newPage(r)); err != nil {
		return err
	}
	_, err := out.WriteTo(w)
	return err
}

// page is what the template shows.
type page struct {
	*Run
	Policy    string // Content-Security-Policy: nothing may be fetched, and only the two scripts below run
	CSS       template.CSS
	Plot, JS  template.JS
	Self      *Contender
	Against   *Contender // kernel overlayfs or, where it did not take part, native: of the kind OverallOf
	Paints    []paint
	Rows      []summaryRow
	Ticks     []tick
	Parity    float64 // where on the strip 1× is, in per cent
	Overall   verdict // over all scenarios
	OverallOf Kind
	Met       int
	All       []Target
	Sections  []section
}

// paint is a contender with its colour and, for lines, its dashes.
type paint struct {
	Contender
	Colour template.CSS
	Dash   string
}

// summaryRow is a scenario's line in the overview.
type summaryRow struct {
	*Scenario
	Overlay, Native verdict
	Dots            []dot
	Failed          bool
}

// dot is one comparison on the strip, At per cent from its left end, and Up rem above its middle where it would hide
// another.
type dot struct {
	comparison
	At, Up float64
}

// tick is a mark of the strip's axis. Not each has room for a label.
type tick struct {
	Label string
	At    float64
}

type section struct {
	*Scenario
	Charts []chartView
	Failed []Failed
}

// chartView is a metric with the data of its chart.
type chartView struct {
	*Metric
	Data   chartData
	Groups []tableGroup
	CPU    bool
	Upper  bool
	Memory bool
}

type tableGroup struct {
	Label string
	Rows  []tableRow
}

type tableRow struct {
	*Cell
	Unit            string
	Colour          template.CSS
	Native, Overlay float64
}

// Bytes is the space of the upper layer.
func (t tableRow) Bytes() float64 { return float64(t.Cell.Allocated) }

// Peak is the server's memory at its largest, in bytes.
func (t tableRow) Peak() float64 { return float64(t.Cell.PeakMemory) }

// Memory is the machine's, in bytes.
func (p *page) Memory() float64 { return float64(p.Machine.Memory) }

// chartData is what page.js draws. Numbers carry their text, so that a figure reads the same everywhere.
type chartData struct {
	Chart      Chart        `json:"chart"`
	Title      string       `json:"title"`
	Log        bool         `json:"log"`
	XName      string       `json:"xName"`
	XLog       bool         `json:"xLog"`
	Steps      []step       `json:"steps"`  // of the values' axis
	XSteps     []step       `json:"xSteps"` // of the x axis
	Contenders []chartPaint `json:"contenders"`
	Cases      []string     `json:"cases"`
	Cells      []chartCell  `json:"cells"`
}

type chartPaint struct {
	Name   string `json:"name"`
	Colour string `json:"colour"`
	Dash   string `json:"dash"`
	Kind   Kind   `json:"kind"`
}

type chartCell struct {
	Contender string  `json:"contender"`
	Case      string  `json:"case"`
	X         float64 `json:"x"`
	V         float64 `json:"v"`
	Q1        float64 `json:"q1"`
	Q3        float64 `json:"q3"`
	Min       float64 `json:"min"`
	Max       float64 `json:"max"`
	Text      string  `json:"text"`
	Tip       string  `json:"tip"`
}

func newPage(r *Run) *page {
	p := &page{
		Run: r, CSS: template.CSS(pageCSS), Plot: template.JS(plotJS), JS: template.JS(pageJS),
		Policy: "default-src 'none'; style-src 'unsafe-inline'; script-src " + hash(plotJS) + " " + hash(pageJS),
		Self:   r.First(Lamina), Against: r.First(Overlay), Paints: paints(r.Contenders), All: r.Targets(),
	}
	p.Met = len(p.All) - len(r.Missed())
	p.summarise()
	for i := range r.Scenarios {
		s := &r.Scenarios[i]
		sec := section{Scenario: s, Failed: r.failedIn(s.Name)}
		for j := range s.Metrics {
			sec.Charts = append(sec.Charts, p.chart(&s.Metrics[j]))
		}
		p.Sections = append(p.Sections, sec)
	}
	return p
}

// hash names a script in the page's policy.
func hash(script string) string {
	sum := sha256.Sum256([]byte(script))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

func (r *Run) failedIn(scenario string) []Failed {
	return slices.DeleteFunc(slices.Clone(r.Failed), func(f Failed) bool { return f.Scenario != scenario })
}

// Colours that page.css has of each kind, see there.
var shades = map[Kind]int{Native: 1, Overlay: 1, Lamina: 6, Rival: 6, Floor: 1}

// dashes tell lines apart where colours are muted or missing.
var dashes = []string{"5 3", "2 2", "8 3 2 3", "1 3", "10 4", "6 2 1 2"}

// paints gives each contender its colour: Lamina's default the one strong hue, its variants tints of it, the rest muted.
func paints(all []Contender) []paint {
	seen := map[Kind]int{}
	var out []paint
	for _, c := range all {
		kind := c.Kind
		if shades[kind] == 0 {
			kind = Rival
		}
		n := seen[kind]
		seen[kind]++
		pt := paint{Contender: c, Colour: template.CSS(fmt.Sprintf("var(--%s-%d)", kind, n%shades[kind]))}
		if kind == Rival || kind == Floor || n > 0 {
			pt.Dash = dashes[n%len(dashes)]
		}
		out = append(out, pt)
	}
	return out
}

func (p *page) paint(name string) paint {
	i := slices.IndexFunc(p.Paints, func(pt paint) bool { return pt.Name == name })
	return p.Paints[i] // check has made sure that there is one
}

// summarise fills the overview in: where on one axis for all scenarios each comparison with overlayfs lies (with native,
// if overlayfs did not take part).
func (p *page) summarise() {
	p.OverallOf = Overlay
	if p.Against == nil {
		p.OverallOf, p.Against = Native, p.First(Native)
	}
	var all []comparison
	for i := range p.Scenarios {
		s := &p.Scenarios[i]
		row := summaryRow{
			Scenario: s, Failed: len(p.failedIn(s.Name)) > 0,
			Overlay: sumUp(p.comparisons(s, Overlay)), Native: sumUp(p.comparisons(s, Native)),
		}
		for _, c := range p.comparisons(s, p.OverallOf) {
			row.Dots = append(row.Dots, dot{comparison: c})
			all = append(all, c)
		}
		p.Rows = append(p.Rows, row)
	}
	p.Overall = sumUp(all)
	low, high := -1.0, 1.0 // powers of ten
	for _, c := range all {
		l := math.Log10(c.Ratio)
		low, high = min(low, math.Floor(l)), max(high, math.Ceil(l))
	}
	at := func(log float64) float64 { return 100 * (log - low) / (high - low) }
	p.Parity = at(0)
	every := math.Ceil((high - low) / maxLabels)
	for l := low; l <= high; l++ {
		t := tick{At: at(l)}
		if math.Mod(l, every) == 0 {
			t.Label = digits(math.Pow(10, l)) + "×"
		}
		p.Ticks = append(p.Ticks, t)
	}
	for _, row := range p.Rows {
		for i := range row.Dots {
			row.Dots[i].At = at(math.Log10(row.Dots[i].Ratio))
		}
		spreadOut(row.Dots)
	}
}

// maxLabels is how many labels the strip's axis has room for.
const maxLabels = 5

// spreadOut moves dots that lie on each other up and down.
func spreadOut(dots []dot) {
	slices.SortFunc(dots, func(a, b dot) int { return cmp.Compare(a.At, b.At) })
	const width = 2 // per cent of the strip, about
	lanes := []float64{0, 0.45, -0.45}
	for i := range dots {
		for _, up := range lanes {
			dots[i].Up = up
			if !slices.ContainsFunc(dots[:i], func(d dot) bool { return d.Up == up && dots[i].At-d.At < width }) {
				break
			}
		}
	}
}

// spreadForLog is the ratio of a metric's largest value to its smallest above which bars on a linear axis vanish.
const spreadForLog = 200

func (p *page) chart(m *Metric) chartView {
	v := chartView{Metric: m, CPU: m.hasCPU()}
	d := chartData{
		Chart: m.Chart, Title: m.Name, Log: m.Log, XName: m.XName, XLog: m.XLog, Steps: scale(m.Unit), XSteps: scale(m.XUnit),
	}
	least, most := math.Inf(1), 0.0
	for _, g := range m.groups() {
		tg := tableGroup{Label: g.label}
		if m.Chart == Bars {
			d.Cases = append(d.Cases, g.label)
		}
		for _, c := range g.cells {
			v.Upper, v.Memory = v.Upper || c.Allocated > 0, v.Memory || c.PeakMemory > 0
			if c.Median > 0 {
				least = min(least, c.Median)
			}
			most = max(most, c.Max)
			native, overlay := p.Ratio(m, c, Native), p.Ratio(m, c, Overlay)
			tg.Rows = append(tg.Rows, tableRow{Cell: c, Unit: m.Unit, Colour: p.paint(c.Contender).Colour, Native: native, Overlay: overlay})
			d.Cells = append(d.Cells, chartCell{
				Contender: c.Contender, Case: c.Case, X: c.X, V: c.Median, Q1: c.Q1, Q3: c.Q3, Min: c.Min, Max: c.Max,
				Text: quantity(c.Median, m.Unit), Tip: p.tip(m, c, native, overlay),
			})
		}
		v.Groups = append(v.Groups, tg)
	}
	for _, pt := range p.Paints {
		if slices.ContainsFunc(m.Cells, func(c Cell) bool { return c.Contender == pt.Name }) {
			d.Contenders = append(d.Contenders, chartPaint{pt.Name, string(pt.Colour), pt.Dash, pt.Kind})
		}
	}
	if most > spreadForLog*least {
		d.Log = true
	}
	v.Data = d
	return v
}

// tip is what a cell says when it is pointed at.
func (p *page) tip(m *Metric, c *Cell, native, overlay float64) string {
	name := c.Contender
	if label := m.caseLabel(c); label != "" {
		name += ", " + label
	}
	value := quantity(c.Median, m.Unit)
	if c.N > 1 {
		value += fmt.Sprintf(" (%s to %s, %d samples)", quantity(c.Min, m.Unit), quantity(c.Max, m.Unit), c.N)
	}
	lines := []string{name, value}
	for _, to := range []struct {
		kind  Kind
		ratio float64
	}{{Overlay, overlay}, {Native, native}} {
		if !math.IsNaN(to.ratio) && p.First(to.kind).Name != c.Contender {
			lines = append(lines, ratio(to.ratio)+" as good as "+p.First(to.kind).Name)
		}
	}
	return strings.Join(lines, "\n")
}

// Describe is the chart in words, for those who do not see it.
func (v chartView) Describe() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, medians. ", v.Name)
	if v.Chart == Lines {
		fmt.Fprintf(&b, "Lines over %s. ", v.XName)
	}
	for _, g := range v.Groups {
		if g.Label != "" {
			b.WriteString(g.Label + ": ")
		}
		for i, row := range g.Rows {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(row.Contender + " " + quantity(row.Median, v.Unit))
		}
		b.WriteString(". ")
	}
	return strings.TrimSpace(b.String())
}

// Better says which way of the axis is the good one.
func (v chartView) Better() string {
	if v.LessIsBetter {
		return "less is better"
	}
	return "more is better"
}
