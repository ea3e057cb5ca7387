package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
)

// WriteJSON writes the run for machines, and for ReadJSON.
func (r *Run) WriteJSON(w io.Writer) error {
	if err := r.check(); err != nil {
		return err
	}
	out := *r
	out.Format = Format
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(&out)
}

// ReadJSON reads what WriteJSON wrote. Fields it does not know are an error: a number that is not shown is worse than a
// refusal.
func ReadJSON(in io.Reader) (*Run, error) {
	d := json.NewDecoder(in)
	d.DisallowUnknownFields()
	var r Run
	if err := d.Decode(&r); err != nil {
		return nil, fmt.Errorf("not the result of a bench run: %w", err)
	}
	if r.Format != Format {
		return nil, fmt.Errorf("the result has format %d, and this program reads %d: use the version that wrote it", r.Format, Format)
	}
	return &r, r.check()
}

// check refuses runs that would show something that is not so: cells of contenders that do not exist, two answers to one
// question, numbers that are none.
func (r *Run) check() error {
	var errs []error
	known := map[string]bool{}
	for _, c := range r.Contenders {
		if c.Name == "" || known[c.Name] {
			errs = append(errs, fmt.Errorf("contender %q: give each one its own name", c.Name))
		}
		known[c.Name] = true
	}
	for _, s := range r.Scenarios {
		for _, m := range s.Metrics {
			if err := m.check(known); err != nil {
				errs = append(errs, fmt.Errorf("%s, %s: %w", s.Name, m.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

func (m *Metric) check(known map[string]bool) error {
	if m.Chart != Bars && m.Chart != Lines {
		return fmt.Errorf("chart %q: use %q or %q", m.Chart, Bars, Lines)
	}
	type question struct {
		contender, caseName string
		x                   float64
	}
	answered := map[question]bool{}
	for _, c := range m.Cells {
		q := question{c.Contender, c.Case, c.X}
		switch {
		case !known[c.Contender]:
			return fmt.Errorf("a cell of %q, which is no contender of this run", c.Contender)
		case answered[q]:
			return fmt.Errorf("two cells of %q in case %q at %v", c.Contender, c.Case, c.X)
		case m.Chart == Lines && c.Case != "":
			return fmt.Errorf("a cell of %q has case %q: lines are told apart by X", c.Contender, c.Case)
		case m.Chart == Bars && c.X != 0:
			return fmt.Errorf("a cell of %q has X %v: bars are told apart by case", c.Contender, c.X)
		case m.XLog && c.X <= 0:
			return fmt.Errorf("a cell of %q has X %v, on a logarithmic axis", c.Contender, c.X)
		}
		for _, v := range []float64{c.X, c.Median, c.Q1, c.Q3, c.Min, c.Max, c.ServerCPU, c.ClientCPU} {
			if math.IsNaN(v) || math.IsInf(v, 0) || v < 0 {
				return fmt.Errorf("a cell of %q in case %q has the value %v", c.Contender, c.Case, v)
			}
		}
		answered[q] = true
	}
	for _, f := range m.Figures {
		for _, v := range []float64{f.Value, f.Target, f.Floor} {
			if math.IsNaN(v) || math.IsInf(v, 0) {
				return fmt.Errorf("the figure %q has the value %v", f.Says, v)
			}
		}
	}
	return nil
}
