package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
)

// Lab is what a scenario works in: it hands out layers and contenders mounted over them, in turns, takes samples, and
// cleans up.
type Lab struct {
	*run
	scenario   *Scenario
	contenders []*Contender // still in the running
	metrics    []*Metric
	deadline   time.Time // after it no further round begins
	most       int       // rounds; 0: the mode's
}

// Context ends with the run: Ctrl-C.
func (l *Lab) Context() context.Context { return l.ctx }

// Mode of the run.
func (l *Lab) Mode() Mode { return l.cfg.Mode }

// Contenders are those that are present and have not failed in this scenario.
func (l *Lab) Contenders() []*Contender { return slices.Clone(l.contenders) }

// Contender returns the contender of a name, or nil when it does not take part.
func (l *Lab) Contender(name string) *Contender {
	for _, c := range l.contenders {
		if c.Name == name {
			return c
		}
	}
	return nil
}

// Default is Lamina as it mounts by default or, where that was not chosen, the first of its variants; nil without any.
func (l *Lab) Default() *Contender {
	for _, c := range l.contenders {
		if c.IsLamina() {
			return c
		}
	}
	return nil
}

// Progress says on the progress line what is being done.
func (l *Lab) Progress(format string, args ...any) { l.progress.detail(fmt.Sprintf(format, args...)) }

// Rounds lets the contenders take turns: f measures one contender once. Each round begins with another one, so that none
// of them always follows the same. Rounds end after Config.Rounds, or when the scenario has used its share of the run's
// time; there is always one.
//
// A contender that f returns an error for is out of this scenario, and named in the report; the others go on.
func (l *Lab) Rounds(f func(c *Contender) error) error {
	return l.Turns(l.contenders, []string{""}, func(c *Contender, _ int) error { return f(c) })
}

// Turns is Rounds with some of the contenders, and several things to measure, all of them once in every round: the
// contenders measure the same thing right after each other, so that the machine's moods meet all of them. A contender that
// fails is out of that thing, and out of the scenario if it has no name.
func (l *Lab) Turns(some []*Contender, things []string, f func(c *Contender, i int) error) error {
	some = slices.Clone(some)
	most := l.cfg.Rounds
	if most == 0 {
		most = Pick(l.Mode(), 3, 5, 7)
	}
	if l.most > 0 {
		most = min(most, l.most)
	}
	out := map[turn]bool{}
	var longest time.Duration
	for round := range most {
		began := time.Now()
		if round > 0 && l.cfg.Rounds == 0 && began.Add(longest).After(l.deadline) {
			break
		}
		for i, name := range things {
			for k := range some {
				t := turn{some[(k+round)%len(some)], i}
				if out[t] || !slices.Contains(l.contenders, t.contender) {
					continue
				}
				l.progress.step(l.scenario.Name, t.contender.Name, round+1)
				failed, err := l.try(t, name, f)
				if err != nil {
					return err
				}
				out[t] = failed
			}
		}
		longest = max(longest, time.Since(began))
	}
	return nil
}

// once has f's Rounds and Turns take place once.
func (l *Lab) once(f func() error) error {
	defer func(was int) { l.most = was }(l.most)
	l.most = 1
	return f()
}

// within has f's Rounds and Turns end when a part of the scenario's time that is left has passed.
func (l *Lab) within(part float64, f func() error) error {
	defer func(was time.Time) { l.deadline = was }(l.deadline)
	l.deadline = time.Now().Add(time.Duration(part * float64(time.Until(l.deadline))))
	return f()
}

// alone does something for a contender. If it fails the contender is out of the scenario.
func (l *Lab) alone(c *Contender, f func() error) error {
	_, err := l.try(turn{c, 0}, "", func(*Contender, int) error { return f() })
	return err
}

// turn is one contender's measurement of one thing.
type turn struct {
	contender *Contender
	thing     int
}

// try takes a turn. Only the end of the run is an error.
func (l *Lab) try(t turn, name string, f func(c *Contender, i int) error) (failed bool, err error) {
	err = f(t.contender, t.thing)
	switch {
	case l.ctx.Err() != nil:
		return true, errors.Join(l.ctx.Err(), err)
	case err == nil:
		return false, nil
	case name != "":
		l.fail(t.contender.Name, fmt.Errorf("%s: %w", name, err))
	default:
		l.fail(t.contender.Name, err)
		l.contenders = slices.DeleteFunc(slices.Clone(l.contenders), func(c *Contender) bool { return c == t.contender })
	}
	return true, nil
}

func (l *Lab) fail(contender string, err error) {
	l.failed(report.Failed{Scenario: l.scenario.Name, Contender: contender, Why: err.Error()})
}

// Layer is a lower layer, made when first needed on each of the filesystems that contenders stand on.
type Layer struct {
	run   *run
	name  string
	build func(ctx context.Context, dir string) error
	on    map[groundName]string
	plain string // the copy that plain files, and floors over them, are measured in
}

// Layer returns the layer of a name. build fills an empty directory, the same way every time; it is called once for each
// filesystem that a contender needs the layer on. Layers stay for the scenarios that follow: the name says what is in it.
func (l *Lab) Layer(name string, build func(ctx context.Context, dir string) error) *Layer {
	if l.layers[name] == nil {
		l.layers[name] = &Layer{run: l.run, name: name, build: build, on: map[groundName]string{}}
	}
	return l.layers[name]
}

// Drop removes a layer that no other scenario will use, to make room.
func (l *Lab) Drop(layer *Layer) error {
	delete(l.layers, layer.name)
	dirs := slices.Collect(maps.Values(layer.on))
	if layer.plain != "" {
		dirs = append(dirs, layer.plain)
	}
	var err error
	for _, dir := range dirs {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// At returns the layer's directory on the contender's filesystem. Nobody may write there.
func (ly *Layer) At(c *Contender) (string, error) { return ly.at(c.ground) }

func (ly *Layer) at(name groundName) (string, error) {
	if dir, ok := ly.on[name]; ok {
		return dir, nil
	}
	g, err := ly.run.ground(name)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(g.dir, "layer-"+ly.name)
	ly.run.progress.detail("making layer " + ly.name + " on " + string(name))
	if err := g.mkdirLayer(ly.run.ctx, dir); err != nil {
		return "", err
	}
	if err := ly.build(ly.run.ctx, dir); err != nil {
		return "", errors.Join(fmt.Errorf("layer %s on %s: %w", ly.name, name, err), os.RemoveAll(dir))
	}
	ly.on[name] = dir
	// What is still on its way to the disk would disturb the first measurements.
	return dir, syncfs(dir)
}

// copied returns the copy of the layer for plain files. It is made once: writing to a file again costs what it cost the
// first time. A fresh one is the caller's to remove.
func (ly *Layer) copied(c *Contender, fresh bool) (string, error) {
	if ly.plain != "" && !fresh {
		return ly.plain, nil
	}
	from, err := ly.At(c)
	if err != nil {
		return "", err
	}
	ly.run.progress.detail("copying layer " + ly.name + " for " + c.Name)
	to, err := ly.run.place(c.ground, "plain")
	if err != nil {
		return "", err
	}
	if err := copyTree(ly.run.ctx, from, to); err != nil {
		return "", errors.Join(err, os.RemoveAll(to))
	}
	if !fresh {
		ly.plain = to
	}
	return to, syncfs(to)
}

// Warm brings files of the layer (all of them if none are named) into the page cache of the contender's filesystem; for
// plain files, those of their copy.
func (ly *Layer) Warm(c *Contender, names ...string) error {
	root, err := ly.At(c)
	if err != nil {
		return err
	}
	if (c.kind == plainCopy || c.kind == floorFS) && ly.plain != "" {
		root = ly.plain
	}
	if len(names) == 0 {
		return warmTree(root)
	}
	for _, name := range names {
		if err := Warm(filepath.Join(root, name)); err != nil {
			return err
		}
	}
	return nil
}

// DropCaches writes everything out and empties the page cache, of the whole machine.
func (l *Lab) DropCaches() error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		return fmt.Errorf("dropping the page cache needs root of the host: %w", err)
	}
	return nil
}

// Metric is one question of a scenario, with everybody's samples.
type Metric struct {
	report.Metric
	lab     *Lab
	samples map[cellKey][]Sample
	order   []cellKey
}

type cellKey struct {
	contender, name string
	x               float64
}

// Metric adds a metric to the scenario's report; m has everything but cells and figures.
func (l *Lab) Metric(m report.Metric) *Metric {
	if m.Chart == "" {
		m.Chart = report.Bars
	}
	metric := &Metric{Metric: m, lab: l, samples: map[cellKey][]Sample{}}
	l.metrics = append(l.metrics, metric)
	return metric
}

// Sample is one measurement. What was not measured is 0.
type Sample struct {
	Value                float64       // in the metric's unit
	Took                 time.Duration // wall clock
	ClientCPU, ServerCPU float64       // seconds
	Allocated            int64         // bytes of the upper layer
	PeakMemory           int64         // bytes of the server
}

// Add takes a sample of a bar chart; caseName is empty if there is only one case.
func (m *Metric) Add(c *Contender, caseName string, s Sample) { m.add(cellKey{c.Name, caseName, 0}, s) }

// AddX takes a sample of a line chart.
func (m *Metric) AddX(c *Contender, x float64, s Sample) { m.add(cellKey{c.Name, "", x}, s) }

func (m *Metric) add(k cellKey, s Sample) {
	if m.samples[k] == nil {
		m.order = append(m.order, k)
	}
	m.samples[k] = append(m.samples[k], s)
}

// Median of a contender in a case; false if it has no samples.
func (m *Metric) Median(contender, caseName string) (float64, bool) {
	return m.median(cellKey{contender, caseName, 0})
}

// MedianX is Median of a line chart.
func (m *Metric) MedianX(contender string, x float64) (float64, bool) {
	return m.median(cellKey{contender, "", x})
}

func (m *Metric) median(k cellKey) (float64, bool) {
	if len(m.samples[k]) == 0 {
		return 0, false
	}
	return report.NewCell("", "", 0, values(m.samples[k])).Median, true
}

// Figure adds a number that the project has a target for.
func (m *Metric) Figure(f report.Figure) { m.Figures = append(m.Figures, f) }

// Of names one median of a metric.
type Of struct {
	Contender, Case string
}

// RatioAtMost adds the figure a/b, which must not exceed target. Without one of the two there is no figure.
func (m *Metric) RatioAtMost(says string, a, b Of, target float64) {
	m.ratio(report.AtMost, says, a, b, target)
}

// RatioAtLeast adds the figure a/b, which must reach target.
func (m *Metric) RatioAtLeast(says string, a, b Of, target float64) {
	m.ratio(report.AtLeast, says, a, b, target)
}

func (m *Metric) ratio(make func(string, float64, float64) report.Figure, says string, a, b Of, target float64) {
	va, okA := m.Median(a.Contender, a.Case)
	vb, okB := m.Median(b.Contender, b.Case)
	if okA && okB && vb > 0 {
		f := make(says, va/vb, target)
		f.Floor = m.floorRatio(a, b)
		m.Figure(f)
	}
}

// floorRatio is a/b with the floor in place of Lamina; 0 if the floor was not measured.
func (m *Metric) floorRatio(a, b Of) float64 {
	fa, fb := m.floorOf(a), m.floorOf(b)
	va, okA := m.Median(fa.Contender, fa.Case)
	vb, okB := m.Median(fb.Contender, fb.Case)
	if fa == a && fb == b || !okA || !okB || vb <= 0 {
		return 0
	}
	return va / vb
}

// floorOf is the floor's answer to the same question, if o is an answer of Lamina.
func (m *Metric) floorOf(o Of) Of {
	if c, err := find(o.Contender); err == nil && c.IsLamina() {
		o.Contender = c.floorOf()
	}
	return o
}

// report sums the samples up.
func (m *Metric) report() report.Metric {
	r := m.Metric
	for _, k := range m.order {
		samples := m.samples[k]
		cell := report.NewCell(k.contender, k.name, k.x, values(samples))
		cell.ClientCPU = medianOf(samples, func(s Sample) float64 { return s.ClientCPU })
		cell.ServerCPU = medianOf(samples, func(s Sample) float64 { return s.ServerCPU })
		cell.Allocated = int64(medianOf(samples, func(s Sample) float64 { return float64(s.Allocated) }))
		cell.PeakMemory = int64(medianOf(samples, func(s Sample) float64 { return float64(s.PeakMemory) }))
		r.Cells = append(r.Cells, cell)
	}
	return r
}

func values(samples []Sample) []float64 {
	v := make([]float64, len(samples))
	for i, s := range samples {
		v[i] = s.Value
	}
	return v
}

// medianOf takes the median of what was measured: 0 stands for what was not.
func medianOf(samples []Sample, value func(Sample) float64) float64 {
	var v []float64
	for _, s := range samples {
		if x := value(s); x != 0 {
			v = append(v, x)
		}
	}
	if len(v) == 0 {
		return 0
	}
	return report.NewCell("", "", 0, v).Median
}
