package report

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Markdown writes the run's tables for a document. Each part lies between two comments, so that a document can keep its own
// text around them and have the tables replaced:
//
//	<!-- bench: targets -->
//	...
//	<!-- end -->
//
// The parts are "machine", "targets", "absent" and the scenarios by their names.
func (r *Run) Markdown(w io.Writer) error {
	if err := r.check(); err != nil {
		return err
	}
	var b strings.Builder
	part := func(name string, write func()) {
		fmt.Fprintf(&b, "<!-- bench: %s -->\n\n", name)
		write()
		b.WriteString("<!-- end -->\n\n")
	}
	part("machine", func() { r.markMachine(&b) })
	part("targets", func() { r.markTargets(&b) })
	for i := range r.Scenarios {
		s := &r.Scenarios[i]
		part(s.Name, func() { r.markScenario(&b, s) })
	}
	part("absent", func() { r.markAbsent(&b) })
	_, err := io.WriteString(w, strings.TrimSuffix(b.String(), "\n"))
	return err
}

func (r *Run) markMachine(b *strings.Builder) {
	m := &r.Machine
	fmt.Fprintf(b, "A `%s` run of %s on %s: Linux %s, %d × %s, %s of memory; %s.", r.Mode,
		time.Duration(r.Seconds*float64(time.Second)).Round(time.Second), r.Started.UTC().Format("2 January 2006"),
		inline(m.Kernel), m.CPUs, inline(m.CPUModel), quantity(float64(m.Memory), Bytes), inline(m.Filesystem))
	var versions []string
	for _, v := range m.Versions {
		versions = append(versions, inline(v.Name+" ("+v.Version+")"))
	}
	if len(versions) > 0 {
		fmt.Fprintf(b, " Versions: %s.", strings.Join(versions, ", "))
	}
	b.WriteString("\n\n")
}

func (r *Run) markTargets(b *strings.Builder) {
	all := r.Targets()
	fmt.Fprintf(b, "%d of %d met.\n\n", len(all)-len(r.Missed()), len(all))
	if len(all) == 0 {
		return
	}
	rows := [][]string{{"scenario", "figure", "reached", "target", "the floor reaches", ""}}
	floors := slices.ContainsFunc(all, func(t Target) bool { return t.Floor != 0 })
	for _, t := range all {
		bound, floor, met := "≤ "+digits(t.Target), "", "met"
		if t.AtLeast {
			bound = "≥ " + digits(t.Target)
		}
		if t.Floor != 0 {
			floor = digits(t.Floor)
		}
		switch {
		case t.Beyond():
			met = "**missed**, by the floor too"
		case !t.OK:
			met = "**missed**"
		}
		rows = append(rows, []string{t.Scenario, t.Says, digits(t.Value), bound, floor, met})
	}
	for i := range rows {
		if !floors {
			rows[i] = slices.Delete(rows[i], 4, 5)
		}
	}
	markTable(b, rows)
}

func (r *Run) markScenario(b *strings.Builder, s *Scenario) {
	for i := range s.Metrics {
		r.markMetric(b, &s.Metrics[i])
	}
	for _, f := range r.failedIn(s.Name) {
		who := f.Contender
		if who == "" {
			who = "the scenario"
		}
		fmt.Fprintf(b, "Failed: %s: %s\n\n", inline(who), inline(f.Why))
	}
}

// markMetric is a row a case and a column a contender.
func (r *Run) markMetric(b *strings.Builder, m *Metric) {
	if len(m.Cells) == 0 {
		return
	}
	better := "more is better"
	if m.LessIsBetter {
		better = "less is better"
	}
	fmt.Fprintf(b, "%s (%s)\n\n", inline(m.Name), better)
	head := []string{""}
	var columns []string
	for _, c := range r.Contenders {
		for i := range m.Cells {
			if m.Cells[i].Contender == c.Name {
				columns = append(columns, c.Name)
				break
			}
		}
	}
	rows := [][]string{append(head, columns...)}
	groups := m.groups()
	if m.Chart == Lines && m.Aside {
		groups = thin(groups)
	}
	for _, g := range groups {
		row := []string{g.label}
		for _, name := range columns {
			cell := "–"
			for _, c := range g.cells {
				if c.Contender == name {
					cell = quantity(c.Median, m.Unit)
				}
			}
			row = append(row, cell)
		}
		rows = append(rows, row)
	}
	markTable(b, rows)
}

func (r *Run) markAbsent(b *strings.Builder) {
	if len(r.Absent) == 0 {
		b.WriteString("Nobody was absent.\n\n")
	}
	for _, a := range r.Absent {
		fmt.Fprintf(b, "- %s was absent: %s\n", inline(a.Name), inline(a.Why))
	}
	if len(r.Absent) > 0 {
		b.WriteString("\n")
	}
}

// inline makes text of one line that ends no cell and begins no HTML.
func inline(s string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", "\n", " ", "\r", " ").Replace(s)
}

// markTable writes rows, the first of which is the head.
func markTable(b *strings.Builder, rows [][]string) {
	for i, row := range rows {
		for _, cell := range row {
			b.WriteString("| " + inline(cell) + " ")
		}
		b.WriteString("|\n")
		if i == 0 {
			b.WriteString(strings.Repeat("|---", len(row)) + "|\n")
		}
	}
	b.WriteString("\n")
}
