package report

import (
	"fmt"
	"io"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
)

// TableOptions say what the tables are written to.
type TableOptions struct {
	Width int  // columns of the terminal; 0: 100
	Color bool // it understands colours
}

// Widths below which a column is left out, least telling first.
const (
	widthForSpread = 72
	widthForCPU    = 110
)

// Table writes the run for people at a terminal: a table for each metric, the targets, and who could not take part.
func (r *Run) Table(w io.Writer, o TableOptions) error {
	if o.Width == 0 {
		o.Width = 100
	}
	t := terminal{out: w, TableOptions: o}
	t.line("%s, %s, %d CPUs, %s memory", r.Machine.Kernel, r.Machine.CPUModel, r.Machine.CPUs,
		quantity(float64(r.Machine.Memory), Bytes))
	t.line("%s", r.Machine.Filesystem)
	t.line("%s run of %.0f s; medians; × is times better than", r.Mode, r.Seconds)
	for i := range r.Scenarios {
		s := &r.Scenarios[i]
		t.line("\n%s", t.bold(s.Name+": "+s.Title))
		for j := range s.Metrics {
			t.metric(r, &s.Metrics[j])
		}
	}
	t.summary(r)
	t.targets(r)
	for _, a := range r.Absent {
		t.line("absent: %s: %s", a.Name, a.Why)
	}
	for _, f := range r.Failed {
		t.line("%s: %s", t.mark(Behind, strings.TrimSuffix("failed: "+f.Scenario+", "+f.Contender, ", ")), f.Why)
	}
	return t.err
}

// terminal remembers the first error of writing, so that what is written reads straight.
type terminal struct {
	out io.Writer
	TableOptions
	err error
}

func (t *terminal) line(format string, args ...any) {
	if t.err == nil {
		_, t.err = fmt.Fprintf(t.out, format+"\n", args...)
	}
}

func (t *terminal) bold(s string) string {
	if !t.Color {
		return s
	}
	return text.Bold.Sprint(s)
}

var colours = map[Standing]text.Colors{Ahead: {text.FgGreen}, Behind: {text.FgRed}}

func (t *terminal) mark(st Standing, s string) string {
	if !t.Color || colours[st] == nil {
		return s
	}
	return colours[st].Sprint(s)
}

// newTable is a table without lines, which would take the place of numbers.
func (t *terminal) newTable() table.Writer {
	w := table.NewWriter()
	style := table.StyleLight
	style.Options = table.Options{SeparateHeader: true}
	style.Box.PaddingLeft, style.Box.PaddingRight = "", "  "
	style.Format.Header = text.FormatDefault
	style.Size.WidthMax = t.Width
	w.SetStyle(style)
	return w
}

func (t *terminal) metric(r *Run, m *Metric) {
	w := t.newTable()
	t.line("%s", text.WrapSoft(m.Name, t.Width))
	head := table.Row{"", "median"}
	spread, cpu := t.Width >= widthForSpread, t.Width >= widthForCPU && m.hasCPU()
	if spread {
		head = append(head, "q1 – q3")
	}
	head = append(head, r.Base(Native), r.Base(Overlay))
	if cpu {
		head = append(head, "server", "client")
	}
	w.AppendHeader(head)
	var columns []table.ColumnConfig
	for i := 2; i <= len(head); i++ {
		columns = append(columns, table.ColumnConfig{Number: i, Align: text.AlignRight, AlignHeader: text.AlignRight})
	}
	w.SetColumnConfigs(append(columns, table.ColumnConfig{Number: 1, WidthMax: max(16, t.Width/3)}))
	groups := m.groups()
	shown := groups
	if m.Chart == Lines {
		shown = thin(groups)
	}
	for _, g := range shown {
		if g.label != "" {
			w.AppendRow(table.Row{g.label})
		}
		for _, c := range g.cells {
			row := table.Row{"  " + c.Contender, quantity(c.Median, m.Unit)}
			if spread {
				row = append(row, c.spread(m.Unit))
			}
			for _, to := range []Kind{Native, Overlay} {
				v := r.Ratio(m, c, to)
				row = append(row, t.mark(standing(v), ratio(v)))
			}
			if cpu {
				row = append(row, seconds(c.ServerCPU), seconds(c.ClientCPU))
			}
			w.AppendRow(row)
		}
	}
	t.line("%s", w.Render())
	if len(shown) < len(groups) {
		t.line("(%d of %d points; the rest is in the JSON and HTML forms)", len(shown), len(groups))
	}
	for _, f := range m.Figures {
		t.line("%s", t.figure("", f))
	}
}

// spread is the quartiles, where there are any.
func (c *Cell) spread(unit string) string {
	if c.N < 2 {
		return ""
	}
	return quantity(c.Q1, unit) + " – " + quantity(c.Q3, unit)
}

func seconds(v float64) string {
	if v == 0 {
		return ""
	}
	return quantity(v, Seconds)
}

func (m *Metric) hasCPU() bool {
	for _, c := range m.Cells {
		if c.ServerCPU != 0 || c.ClientCPU != 0 {
			return true
		}
	}
	return false
}

func (t *terminal) figure(where string, f Figure) string {
	s := fmt.Sprintf("%s%s %s (target: %s%s)", where, digits(f.Value), f.Says, f.Bound(), f.floor())
	if f.Note != "" {
		s += "; " + f.Note
	}
	const indent = "      "
	lines := strings.Split(text.WrapSoft(s, t.Width-len(indent)), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight(line, " ")
	}
	return t.met(f.OK) + "  " + strings.Join(lines, "\n"+indent)
}

// floor says what a server without a union reaches.
func (f Figure) floor() string {
	switch {
	case f.Floor == 0:
		return ""
	case f.Beyond():
		return "; the floor reaches " + digits(f.Floor) + " and misses it too"
	}
	return "; the floor reaches " + digits(f.Floor)
}

func (t *terminal) met(ok bool) string {
	if ok {
		return t.mark(Ahead, "ok  ")
	}
	return t.mark(Behind, "MISS")
}

// summary is where the default Lamina stands, a line a scenario.
func (t *terminal) summary(r *Run) {
	self := r.First(Lamina)
	if self == nil {
		return
	}
	w := t.newTable()
	w.AppendHeader(table.Row{self.Name, "to " + r.Base(Overlay), "worst – best", "to " + r.Base(Native), "worst – best"})
	for i := range r.Scenarios {
		s := &r.Scenarios[i]
		row := table.Row{s.Name}
		for _, to := range []Kind{Overlay, Native} {
			v := sumUp(r.comparisons(s, to))
			spread := ""
			if len(v.All) > 1 {
				spread = ratio(v.Worst.Ratio) + " – " + ratio(v.Best.Ratio)
			}
			row = append(row, t.mark(standing(v.Mean), margin(v.Mean)), spread)
		}
		w.AppendRow(row)
	}
	t.line("\n%s", w.Render())
}

func (t *terminal) targets(r *Run) {
	all, missed := r.Targets(), r.Missed()
	if len(all) == 0 {
		return
	}
	t.line("\n%d of %d targets met", len(all)-len(missed), len(all))
	for _, m := range missed {
		t.line("%s", t.figure(m.Scenario+": ", m.Figure))
	}
}

// group is the cells of one case.
type group struct {
	label string
	cells []*Cell
}

// groups are a metric's cells by case or X, in the order in which these first appear.
func (m *Metric) groups() []group {
	type place struct {
		caseName string
		x        float64
	}
	var all []group
	index := map[place]int{}
	for i := range m.Cells {
		c := &m.Cells[i]
		p := place{c.Case, c.X}
		k, ok := index[p]
		if !ok {
			k = len(all)
			index[p] = k
			all = append(all, group{label: m.caseLabel(c)})
		}
		all[k].cells = append(all[k].cells, c)
	}
	return all
}

// maxPoints is how many points of a line a terminal shows.
const maxPoints = 5

// thin picks maxPoints of the groups, both ends among them.
func thin(all []group) []group {
	if len(all) <= maxPoints {
		return all
	}
	picked := make([]group, maxPoints)
	for i := range picked {
		picked[i] = all[i*(len(all)-1)/(maxPoints-1)]
	}
	return picked
}
