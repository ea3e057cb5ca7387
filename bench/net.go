package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"lamina/bench/pair"
	"lamina/bench/report"
	"lamina/net/fastpath"
	"lamina/net/lab/traffic"
)

// NetScenarios measure the network between two hosts: what a program gets on the hosts themselves, in pods on bridges with
// VXLAN between them, and in pods of Lamina's network with and without its fast path, in turns.
func NetScenarios() []Scenario {
	return []Scenario{netTCP, netUDP, netFlows, netConnect, netStream, netSegments, netRate, netSilent, netWeb, netCache, netCNI}
}

// Contenders of the network.
const (
	onHosts    = "host"
	onBridges  = "vxlan-bridge"
	fastPath   = "lamina"
	steered    = "lamina-steering"
	routedPath = "lamina-routed"
)

// netContender is how a contender's pair is made.
type netContender struct {
	*Contender
	agent []string // arguments of Lamina's agents
}

var netContenders = []netContender{
	{&Contender{Contender: report.Contender{Name: onHosts, Kind: report.Native, Describes: "the hosts' own network: no pods, no overlay"}}, nil},
	{&Contender{Contender: report.Contender{Name: onBridges, Kind: report.Overlay, Describes: "pods on a bridge, routes into a VXLAN device, masquerade and conntrack: flannel's VXLAN backend with the CNI plugin bridge"}}, nil},
	{&Contender{Contender: report.Contender{Name: fastPath, Kind: report.Lamina, Describes: "pods of Lamina's network, fast path on, steering off"}}, []string{"--fastpath=on", "--steering=off"}},
	{&Contender{Contender: report.Contender{Name: steered, Kind: report.Lamina, Describes: "pods of Lamina's network, fast path and steering on"}}, []string{"--fastpath=on", "--steering=on"}},
	{&Contender{Contender: report.Contender{Name: routedPath, Kind: report.Lamina, Describes: "pods of Lamina's network, ordinary path alone"}}, []string{"--fastpath=off", "--steering=off"}},
}

// NetContenders are those of [NetScenarios], in the order in which they are shown.
func NetContenders() []report.Contender {
	var all []report.Contender
	for _, c := range netContenders {
		all = append(all, c.Contender.Contender)
	}
	return all
}

func netNames() []string {
	var names []string
	for _, c := range NetContenders() {
		names = append(names, c.Name)
	}
	return names
}

var netTools = []Tool{{"ip", "iproute2"}, {"bridge", "iproute2"}, {"nft", "nftables"}}

// RunNet is [Run] for [NetScenarios].
func RunNet(ctx context.Context, cfg Config) (*report.Run, error) {
	all := NetScenarios()
	for _, name := range cfg.Scenarios {
		if !slices.ContainsFunc(all, func(s Scenario) bool { return s.Name == name }) {
			return nil, fmt.Errorf("scenario %s: unknown: bench net --list names them all", name)
		}
	}
	if len(cfg.Scenarios) > 0 {
		all = slices.DeleteFunc(all, func(s Scenario) bool { return !slices.Contains(cfg.Scenarios, s.Name) })
	}
	for _, name := range cfg.Contenders {
		if !slices.Contains(netNames(), name) {
			return nil, fmt.Errorf("contender %s: unknown: use %s", name, strings.Join(netNames(), ", "))
		}
	}
	if err := checkRights(); err != nil {
		return nil, err
	}
	if cfg.Mode == "" {
		cfg.Mode = Normal
	}
	if cfg.Rounds == 0 {
		cfg.Rounds = Pick(cfg.Mode, 3, 5, 9)
	}
	cfg.Filesystem, cfg.noFiles = OnDir, true
	cfg.find = (*run).findNets
	return measure(ctx, cfg, all)
}

// findNets makes a pair of each contender that is wanted, and names those that cannot be made.
func (r *run) findNets([]Scenario) ([]*Contender, error) {
	if err := findTools(netTools...); err != nil {
		return nil, err
	}
	r.result.Machine.Versions = r.result.Machine.Versions[:1] // without those of filesystems
	for _, v := range [][]string{{"nft", "--version"}, {"nginx", "-v"}, {"wrk", "-v"}, {"memcached", "--version"}} {
		if line := firstLine(r.ctx, v[0], v[1:]...); line != "" {
			r.result.Machine.Versions = append(r.result.Machine.Versions, report.Version{Name: v[0], Version: line})
		}
	}
	if cc, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); err == nil {
		r.result.Machine.Versions = append(r.result.Machine.Versions, report.Version{Name: "TCP congestion control", Version: strings.TrimSpace(string(cc))})
	}
	var present []*Contender
	for _, c := range netContenders {
		if len(r.cfg.Contenders) > 0 && !slices.Contains(r.cfg.Contenders, c.Name) {
			continue
		}
		r.progress.step("looking for", c.Name, 0)
		p, err := r.pair(c.Contender)
		if err == nil {
			err = p.Close()
		}
		if r.ctx.Err() != nil {
			return nil, errors.Join(r.ctx.Err(), err)
		}
		if err != nil {
			r.result.Absent = append(r.result.Absent, report.Absent{Name: c.Name, Why: oneLine(err)})
			r.progress.note("%s is absent: %s", c.Name, oneLine(err))
			continue
		}
		present = append(present, c.Contender)
		r.result.Contenders = append(r.result.Contenders, c.Contender.Contender)
	}
	return present, nil
}

// pair makes a contender's.
func (r *run) pair(c *Contender) (*pair.Pair, error) {
	switch c.Name {
	case onHosts:
		return pair.Hosts()
	case onBridges:
		return pair.Bridge()
	}
	plugin, err := pair.FindPlugin(r.cfg.Lamina)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(netContenders, func(n netContender) bool { return n.Name == c.Name })
	return pair.Lamina(r.cfg.Lamina, plugin, r.scratch, netContenders[i].agent...)
}

// nets is a lab with a pair for each contender.
type nets struct {
	*Lab
	pairs map[*Contender]*pair.Pair
	hits  *Metric
}

// withNets makes the pairs, calls f and takes them down. A contender whose pair cannot be made is out.
func (l *Lab) withNets(f func(n *nets) error) (err error) {
	n := &nets{Lab: l, pairs: map[*Contender]*pair.Pair{}}
	defer func() {
		for _, p := range n.pairs {
			err = errors.Join(err, p.Close())
		}
	}()
	for _, c := range l.Contenders() {
		l.Progress("hosts for %s", c.Name)
		if err := l.alone(c, func() error {
			p, err := l.pair(c)
			if err == nil {
				n.pairs[c] = p
			}
			return err
		}); err != nil {
			return err
		}
	}
	return f(n)
}

// port is where servers listen.
const port = 5201

// counted calls f and adds the part of the packets between pods that took the fast path meanwhile to the hit ratio.
func (n *nets) counted(c *Contender, f func(p *pair.Pair) error) error {
	p := n.pairs[c]
	before, has, err := p.Counters()
	if err != nil {
		return err
	}
	if err := f(p); err != nil || !has {
		return err
	}
	after, _, err := p.Counters()
	if err != nil {
		return err
	}
	d := after.Sub(before)
	n.hits.Add(c, "out", Sample{Value: 100 * d.Ratio(fastpath.Egress)})
	n.hits.Add(c, "in", Sample{Value: 100 * d.Ratio(fastpath.Ingress)})
	return nil
}

func (n *nets) addHits() {
	n.hits = n.Metric(report.Metric{Name: "packets that took the fast path", Unit: "%", Aside: true})
}

// measureTraffic has everybody do the same in turns: a rate, what a transaction costs the machine's CPUs, and hits.
func (n *nets) measureTraffic(m traffic.Run, unit string) (rate, cpu *Metric, err error) {
	name := "transactions"
	switch {
	case unit == report.BytesPerSec:
		name = "bytes that arrive"
	case m.Kind == traffic.UDPRate:
		name = "datagrams that arrive"
	}
	rate = n.Metric(report.Metric{Name: name, Unit: unit})
	if unit == report.PerSecond {
		cpu = n.Metric(report.Metric{Name: "CPU time of the whole machine for each of them", Unit: report.Microseconds, LessIsBetter: true, Aside: true})
	}
	n.addHits()
	if m.Duration == 0 {
		m.Duration = Pick(n.Mode(), 400*time.Millisecond, 800*time.Millisecond, time.Second)
	}
	// Whether the kernel puts the two ends of a single flow on one CPU or on two decides more than the network between them.
	m.Pin = m.Flows <= 1
	warm := m
	warm.Duration = 200 * time.Millisecond
	for _, c := range n.Contenders() {
		if err := n.alone(c, func() error { _, err := n.flow(n.pairs[c], warm); return err }); err != nil {
			return nil, nil, err
		}
	}
	err = n.Rounds(func(c *Contender) error {
		return n.counted(c, func(p *pair.Pair) error {
			r, err := n.flow(p, m)
			if err != nil {
				return err
			}
			if r.Count == 0 {
				return errors.New("nothing arrived")
			}
			rate.Add(c, "", Sample{Value: r.Rate(), Took: r.Elapsed})
			if cpu != nil {
				cpu.Add(c, "", Sample{Value: Micros(r.CPU) / float64(r.Count)})
			}
			return nil
		})
	})
	return rate, cpu, err
}

func (n *nets) flow(p *pair.Pair, m traffic.Run) (traffic.Result, error) {
	m.Client, m.Server = p.Client, p.Server
	m.At = netip.AddrPortFrom(p.At, port)
	return m.Do(n.ctx)
}

// ofHost adds the figure of Lamina's rate over the hosts': at least so much.
func (m *Metric) ofHost(what string, least float64) {
	m.RatioAtLeast("x the host network's rate: "+what, Of{fastPath, ""}, Of{onHosts, ""}, least)
}

// ofBridge adds the figure of Lamina's rate over VXLAN's with a bridge: at least so much.
func (m *Metric) ofBridge(what string, least float64) {
	m.RatioAtLeast("x the rate of VXLAN + bridge: "+what, Of{fastPath, ""}, Of{onBridges, ""}, least)
}

// steeredOfFast adds the figure of Lamina's rate with steering over that without: at least so much.
func (m *Metric) steeredOfFast(what string, least float64) {
	m.RatioAtLeast("x the rate without steering: "+what, Of{steered, ""}, Of{fastPath, ""}, least)
}

// routedOfBridge is ofBridge of the ordinary path alone.
func (m *Metric) routedOfBridge(what string, least float64) {
	m.RatioAtLeast("x the rate of VXLAN + bridge, ordinary path alone: "+what, Of{routedPath, ""}, Of{onBridges, ""}, least)
}
