// Package top shows what a node's part of the pod network is doing: packets, hits, why others miss, drops, repairs.
package top

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"lamina/net/control"
	"lamina/net/fastpath"
	"lamina/net/policy"
	"lamina/net/steer"
	"lamina/top/live"
)

// Way is packets between this node's pods and those of other nodes, in one direction. Rates are by second.
type Way struct {
	Packets float64            `json:"packets_per_second"`
	Hits    float64            `json:"hit_ratio"` // 0 if there were no packets
	Misses  map[string]float64 `json:"misses_per_second"`
}

// Stage is what steering did with received packets of the ordinary path before a stage of it. Rates are by second.
type Stage struct {
	Packets float64 `json:"packets_per_second"`
	Over    float64 `json:"handed_over_per_second"` // to another CPU
	Moves   float64 `json:"moves_per_second"`       // of flows from CPU to CPU
}

// Rates is what happened in an interval.
type Rates struct {
	Time     time.Time          `json:"time"`
	Node     string             `json:"node"`
	FastPath string             `json:"fastpath"` // "on", or why not
	Out      Way                `json:"out"`      // packets to other nodes
	In       Way                `json:"in"`
	Learning map[string]float64 `json:"learning_per_second"` // what the ordinary path shows the caches, by outcome
	Dropped  map[string]float64 `json:"dropped_per_second"`  // by policies: see policy.Status
	Cut      float64            `json:"cut_flows_per_second"`
	Steering string             `json:"steering"` // "on", "static", "off", or why not; with "saturated" behind it if no CPU has time to spare
	Stages   map[string]Stage   `json:"stages"`   // of steering, by name
	Policies int                `json:"policies"`
	Pods     int                `json:"pods"`
	Peers    int                `json:"peers"`
	Broken   []string           `json:"broken_peers"` // those to which something is missing
	Repairs  uint64             `json:"repairs"`      // since the agent began
	Repaired *control.Repair    `json:"last_repair,omitempty"`
	Problems []string           `json:"problems"`
}

// counters is a status with its parts decoded.
type counters struct {
	at   time.Time
	s    *control.Status
	fast fastpath.PartStatus
	pol  policy.Status
	cpus steer.PartStatus
}

// Sampler makes rates of what an agent counts.
type Sampler struct{ last counters }

// Next takes a sample and returns what happened since the one before; rates are zero if that was of another agent. Maps that
// were made anew have none either.
func (s *Sampler) Next(at time.Time, st *control.Status) Rates {
	now := counters{at: at, s: st}
	st.Part(fastpath.PartName, &now.fast)
	st.Part(policy.PartName, &now.pol)
	st.Part(steer.PartName, &now.cpus)
	before := s.last
	s.last = now
	r := Rates{Time: at, Node: st.Node.Lease.Node.String(), FastPath: now.fast.State, Policies: now.pol.Policies, Pods: st.Pods, Peers: len(st.Peers),
		Repairs: st.Repairs, Problems: st.Problems, Broken: []string{}, Learning: map[string]float64{}, Dropped: map[string]float64{}, Steering: now.cpus.State, Stages: map[string]Stage{}}
	if now.cpus.Saturated {
		r.Steering += ", saturated"
	}
	if n := len(st.Repaired); n > 0 {
		r.Repaired = &st.Repaired[n-1]
	}
	for _, p := range st.Peers {
		if p.State != control.PeerOK {
			r.Broken = append(r.Broken, fmt.Sprintf("%s: %s", p.Node, p.State))
		}
	}
	seconds := 0.0
	if before.s != nil && before.s.Started.Equal(st.Started) {
		seconds = at.Sub(before.at).Seconds()
	}
	rates := func(p fastpath.Program) map[string]float64 {
		out := map[string]float64{}
		for reason, n := range now.fast.Counters[p.String()] {
			out[reason] = live.Rate(before.fast.Counters[p.String()][reason], n, seconds)
		}
		return out
	}
	r.Out, r.In = way(rates(fastpath.Egress)), way(rates(fastpath.Ingress))
	for _, p := range []fastpath.Program{fastpath.EgressLearn, fastpath.IngressLearn} {
		for reason, rate := range rates(p) {
			if known, ok := fastpath.ParseReason(reason); ok && !known.Others() {
				r.Learning[reason] += rate
			}
		}
	}
	for why, n := range now.pol.Dropped {
		r.Dropped[why] = live.Rate(before.pol.Dropped[why], n, seconds)
	}
	for name, stage := range now.cpus.Stages {
		was := before.cpus.Stages[name]
		over, all := stage.Counts()
		wasOver, wasAll := was.Counts()
		r.Stages[name] = Stage{live.Rate(wasAll, all, seconds), live.Rate(wasOver, over, seconds), live.Rate(was.Moves, stage.Moves, seconds)}
	}
	r.Cut = live.Rate(before.pol.Cut, now.pol.Cut, seconds)
	return r
}

func way(rates map[string]float64) Way {
	w := Way{Misses: map[string]float64{}}
	for name, rate := range rates {
		reason, ok := fastpath.ParseReason(name)
		if !ok || reason.Others() {
			continue
		}
		w.Packets += rate
		if reason == fastpath.Hit {
			w.Hits = rate
		} else if rate > 0 {
			w.Misses[name] = rate
		}
	}
	if w.Packets > 0 {
		w.Hits /= w.Packets
	}
	return w
}

// View is a node on a screen.
type View struct {
	Status func() (control.Status, error)

	sampler Sampler
	rates   *Rates // nil: the agent does not answer
}

var _ live.View = (*View)(nil)

// Name implements live.View, as all of the following.
func (v *View) Name() string { return "lamina net top" }

func (v *View) Sample() (any, error) {
	s, err := v.Status()
	if err != nil {
		return nil, err
	}
	return &s, nil
}

func (v *View) Take(at time.Time, sample any) {
	v.rates = nil
	if st, ok := sample.(*control.Status); ok {
		r := v.sampler.Next(at, st)
		v.rates = &r
	}
}

func (v *View) Head() (how, summary string) {
	if v.rates == nil {
		return "", ""
	}
	return "", fmt.Sprintf("node %s, %d pods, %d peers  fast path %s", v.rates.Node, v.rates.Pods, v.rates.Peers, v.rates.FastPath)
}

func (v *View) Data(time.Time) any { return v.rates }

func (v *View) Key(string) {}

func (v *View) Keys() string { return "" }

func (v *View) Help() []string {
	return []string{
		"Packets are those between pods of this node and of others, counted where they enter the overlay.",
		"Those that miss take the ordinary path; lamina net trace FLOW says why one flow does.",
		"LEARNING: what the ordinary path shows the caches.",
		"STEERING: received packets of the ordinary path, and how many of them went to another CPU for their next stage.",
	}
}

const lineForm = "%-18s %9s %9s  %s"

func (v *View) Table(int) []string {
	lines := []string{strings.TrimSpace(fmt.Sprintf(lineForm, "PACKETS", "OUT/S", "IN/S", ""))}
	r := v.rates
	if r == nil {
		return append(lines, "the agent does not answer")
	}
	add := func(form string, args ...any) {
		lines = append(lines, live.Printable(strings.TrimRight(fmt.Sprintf(form, args...), " ")))
	}
	add(lineForm, "all", live.Count(r.Out.Packets), live.Count(r.In.Packets), "")
	add(lineForm, "hits", percent(r.Out), percent(r.In), "")
	reasons := maps.Clone(r.Out.Misses)
	for name, rate := range r.In.Misses {
		reasons[name] += rate
	}
	for _, name := range byRate(reasons) {
		reason, _ := fastpath.ParseReason(name)
		add(lineForm, "  "+name, live.Count(r.Out.Misses[name]), live.Count(r.In.Misses[name]), reason.Text())
	}
	add("")
	add(lineForm, "LEARNING", "/S", "", "")
	for _, name := range byRate(r.Learning) {
		reason, _ := fastpath.ParseReason(name)
		add(lineForm, "  "+name, live.Count(r.Learning[name]), "", reason.Text())
	}
	add("")
	add(lineForm, "STEERING", "PACKETS/S", "TO OTHERS", r.Steering)
	for _, name := range slices.Sorted(maps.Keys(r.Stages)) {
		stage := r.Stages[name]
		add(lineForm, "  before "+name, live.Count(stage.Packets), live.Count(stage.Over), live.Count(stage.Moves)+"/s flows moved")
	}
	add("")
	add(lineForm, "POLICIES", fmt.Sprint(r.Policies), "", "")
	for _, why := range slices.Sorted(maps.Keys(r.Dropped)) {
		add(lineForm, "  dropped "+why, live.Count(r.Dropped[why])+"/s", "", "")
	}
	add(lineForm, "  flows ended", live.Count(r.Cut)+"/s", "", "")
	add(lineForm, "PEERS", fmt.Sprint(r.Peers), "", "")
	for _, p := range r.Broken {
		add("  %s", p)
	}
	last := ""
	if r.Repaired != nil {
		last = fmt.Sprintf("last: %s, %s ago", r.Repaired.What, r.Time.Sub(r.Repaired.Time).Round(time.Second))
	}
	add(lineForm, "REPAIRS", fmt.Sprint(r.Repairs), "", last)
	for _, p := range r.Problems {
		add("PROBLEM  %s", strings.Join(strings.Fields(p), " "))
	}
	return lines
}

func percent(w Way) string {
	if w.Packets == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f %%", 100*w.Hits)
}

// byRate is names, the busiest first; without those that do nothing.
func byRate(rates map[string]float64) []string {
	names := slices.SortedFunc(maps.Keys(rates), func(a, b string) int { return cmp.Or(cmp.Compare(rates[b], rates[a]), cmp.Compare(a, b)) })
	return slices.DeleteFunc(names, func(n string) bool { return rates[n] == 0 })
}
