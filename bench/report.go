package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Report is a run's outcome.
type Report struct {
	Kernel  string  `json:"kernel"`
	CPUs    int     `json:"cpus"`
	Seconds float64 `json:"seconds"`
	Rows    []Row   `json:"rows"`
}

// Row is one measured case.
type Row struct {
	Name    string             `json:"name"`
	Unit    string             `json:"unit"`
	Systems map[string]float64 `json:"systems"` // medians, in Unit
	// Figure is the number that the target is about; Says tells what it is. No target: Target is 0.
	Figure  float64 `json:"figure,omitempty"`
	Says    string  `json:"says,omitempty"`
	Target  float64 `json:"target,omitempty"`
	AtLeast bool    `json:"at_least,omitempty"` // the figure must reach the target; otherwise it must not exceed it
	OK      bool    `json:"ok"`                 // met, or there is no target
}

func (r *Report) add(row Row) {
	row.OK = row.Target == 0 || row.AtLeast && row.Figure >= row.Target || !row.AtLeast && row.Figure <= row.Target
	r.Rows = append(r.Rows, row)
}

// Missed are the rows whose target was not met.
func (r *Report) Missed() []Row {
	return slices.DeleteFunc(slices.Clone(r.Rows), func(row Row) bool { return row.OK })
}

// JSON writes the report for machines.
func (r *Report) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// Table writes the report for people: a bar for each system, its length the time or size it took.
func (r *Report) Table(w io.Writer) {
	fmt.Fprintf(w, "Linux %s, %d CPUs, %.0f s; medians\n", r.Kernel, r.CPUs, r.Seconds)
	for _, row := range r.Rows {
		fmt.Fprintf(w, "\n%s\n", row.Name)
		most := slices.Max(slices.Collect(maps.Values(row.Systems)))
		names := slices.SortedFunc(maps.Keys(row.Systems), func(a, b string) int {
			return int(row.Systems[a]*1e6) - int(row.Systems[b]*1e6)
		})
		for _, name := range names {
			v := row.Systems[name]
			bar := strings.Repeat("█", min(40, max(1, int(40*v/max(most, 1e-9)))))
			fmt.Fprintf(w, "  %-22s %12s  %s\n", name, human(v, row.Unit), bar)
		}
		if row.Target == 0 {
			continue
		}
		verdict, bound := "ok", "at most"
		if !row.OK {
			verdict = "MISS"
		}
		if row.AtLeast {
			bound = "at least"
		}
		fmt.Fprintf(w, "  %-4s %.4g %s (target: %s %.4g)\n", verdict, row.Figure, row.Says, bound, row.Target)
	}
	if missed := r.Missed(); len(missed) > 0 {
		fmt.Fprintf(w, "\n%d of %d rows MISS their target\n", len(missed), len(r.Rows))
	}
}

// human picks the unit in which a figure has few digits.
func human(v float64, unit string) string {
	switch {
	case unit == "us" && v >= 1e6:
		return fmt.Sprintf("%.2f s", v/1e6)
	case unit == "us" && v >= 1e3:
		return fmt.Sprintf("%.2f ms", v/1e3)
	case unit == "us":
		return fmt.Sprintf("%.1f us", v)
	case unit == "KiB" && v >= 10_000:
		return fmt.Sprintf("%.1f MiB", v/1024)
	}
	return fmt.Sprintf("%.1f %s", v, unit)
}
