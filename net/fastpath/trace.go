package fastpath

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"lamina/net/control"
	"lamina/net/tcx"

	"golang.org/x/sys/unix"
)

// Trace is what would become of an ordinary packet of a flow, and why.
type Trace struct {
	Flow    Flow // local end first
	Node    netip.Addr
	Egress  Reason
	Ingress Reason
	Steps   []control.Step
}

func (t *Trace) both(r Reason) {
	if t.Egress == Hit && t.Ingress == Hit {
		t.Egress, t.Ingress = r, r
	}
}

// step notes what was found. A reason other than Hit stops the flow there.
func (t *Trace) step(name string, r Reason, format string, args ...any) {
	s := control.Step{Name: name, Result: control.Passed, Found: fmt.Sprintf(format, args...)}
	if r != Hit {
		s.Result, s.Fix = control.Stopped, r.Fix()
		s.Found += ": " + r.Text()
	}
	t.Steps = append(t.Steps, s)
}

// Trace says whether a flow takes the fast path. One end has to be a pod of this node.
func (p *Path) Trace(f Flow) (Trace, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, src := p.getPod(f.Src.Addr()); !src {
		if _, dst := p.getPod(f.Dst.Addr()); dst {
			f.Src, f.Dst = f.Dst, f.Src
		}
	}
	t := Trace{Flow: f, Node: p.nodeOf(f.Dst.Addr())}
	p.traceControl(&t)
	if f.Protocol != unix.IPPROTO_TCP && f.Protocol != unix.IPPROTO_UDP {
		t.both(Protocol)
		t.step("protocol", Protocol, "%s", control.ProtocolName(f.Protocol))
	}
	pod, local := p.tracePod(&t)
	remote := p.traceNode(&t)
	if !local || !remote || f.Protocol != unix.IPPROTO_TCP && f.Protocol != unix.IPPROTO_UDP {
		return t, nil
	}
	key := bpfFlow{Local: toAddr(f.Src.Addr()), Remote: toAddr(f.Dst.Addr()), LocalPort: big(f.Src.Port()), RemotePort: big(f.Dst.Port()), Protocol: f.Protocol}
	var rec bpfFilter
	if p.obj.Filters.Lookup(key, &rec) != nil {
		t.both(NotLearned)
		t.step("flow", NotLearned, "map filters: no entry")
		return t, nil
	}
	p.traceVerdicts(&t, key, rec, younger(pod.Since, atomic.LoadUint32(&p.control.Since)))
	return t, nil
}

func (p *Path) traceControl(t *Trace) {
	r, g := Hit, atomic.LoadUint32(&p.control.Generation)
	switch {
	case atomic.LoadUint32(&p.control.Enabled) == 0:
		r = Disabled
	case p.stale():
		r = Stale
	}
	t.both(r)
	age := time.Duration(monotonic() - atomic.LoadUint64(&p.control.Heartbeat)).Round(time.Millisecond)
	t.step("fast path", r, "map control: heartbeat %s ago, generation %d", age, g)
	if r == Hit && g%2 == 1 {
		t.Steps = append(t.Steps, control.Step{Name: "fast path", Result: control.Noted, Found: Changing.Text() + ": nothing is learned", Fix: Changing.Fix()})
	}
}

func (p *Path) tracePod(t *Trace) (bpfPod, bool) {
	a := t.Flow.Src.Addr()
	pod, ok := p.getPod(a)
	if !ok {
		t.both(NotLocal)
		t.step("pod", NotLocal, "map pods: neither %s nor %s", a, t.Flow.Dst.Addr())
		return pod, false
	}
	name := fmt.Sprint("interface ", pod.Ifindex)
	if l, err := p.nl.LinkByIndex(int(pod.Ifindex)); err == nil {
		name = l.Attrs().Name
	}
	t.step("pod", Hit, "maps pods, locals: %s on %s; verdicts count since generation %d", a, name, younger(pod.Since, atomic.LoadUint32(&p.control.Since)))
	if missing := p.unattached(int(pod.Ifindex)); len(missing) > 0 {
		t.both(Disabled)
		t.Steps = append(t.Steps, control.Step{Name: "programs", Result: control.Stopped, Found: fmt.Sprintf("not attached: %s", missing), Fix: "restart the agent: systemctl restart lamina-net"})
	}
	return pod, true
}

// unattached lists the programs that run neither at a pod's interface nor at the underlay's.
func (p *Path) unattached(index int) (missing []string) {
	for _, prog := range []Program{Egress, IngressLearn} {
		if tcx.LinkedTo(p.pinName(prog, index)) != index {
			missing = append(missing, prog.String())
		}
	}
	entries, _ := os.ReadDir(filepath.Join(p.o.Pins, "links"))
	for _, prog := range []Program{Ingress, EgressLearn} {
		if !slices.ContainsFunc(entries, func(e os.DirEntry) bool {
			at, index, err := parsePinName(e.Name())
			return err == nil && at == prog && tcx.LinkedTo(filepath.Join(p.o.Pins, "links", e.Name())) == index
		}) {
			missing = append(missing, prog.String())
		}
	}
	return missing
}

func (p *Path) traceNode(t *Trace) bool {
	a := t.Flow.Dst.Addr()
	if t.Node.IsValid() {
		t.step("node", Hit, "maps prefixes, nodes: %s lives at %s", a, t.Node)
		return true
	}
	t.both(NotRemote)
	what := "no prefix holds " + a.String()
	if _, local := p.getPod(a); local {
		what = a.String() + " is a pod of this node too"
	}
	t.step("node", NotRemote, "map prefixes: %s", what)
	return false
}

func (p *Path) traceVerdicts(t *Trace, key bpfFlow, rec bpfFilter, since uint32) {
	k := flowKey(&key, p.control.Secret)
	now := monotonic()
	lease := p.control.UdpLease
	if key.Protocol == unix.IPPROTO_TCP {
		lease = p.control.TcpLease
	}
	judge := func(name string, v verdict) (known, over Reason) {
		switch {
		case v.Generation == 0:
			t.step(name, OneSided, "map filters: never seen allowed")
			return OneSided, Hit
		case verdictTag(&v, k) != v.Tag:
			known = Torn
		case voided(v.Generation, since):
			known = Outdated
		}
		age := time.Duration(now - v.At)
		if age >= time.Duration(lease) {
			over = LeaseOver
		}
		t.step(name, first(known, over), "map filters: seen allowed %s ago in generation %d, for %s", age.Round(time.Millisecond), v.Generation, time.Duration(lease))
		return known, over
	}
	out, outOver := judge("outward", rec.out())
	in, inOver := judge("inward", rec.in())
	outHeader, inHeader := NoHeader, NoHeader
	if out != OneSided {
		outHeader = p.traceHeader(t, uint32(rec.Out.Node))
	}
	if inHeader = outHeader; in != OneSided && (out == OneSided || rec.In.Node != rec.Out.Node) {
		inHeader = p.traceHeader(t, uint32(rec.In.Node))
	}
	var bulk Reason
	if age := now - rec.Bulk; age < uint64(bulkRest) {
		bulk = Segments
		t.step("segments", Segments, "map filters: the latest large packet came %s ago", time.Duration(age).Round(time.Millisecond))
	}
	egress, ingress := first(out, in, outOver, outHeader), first(in, out, inHeader, inOver, bulk)
	if key.Protocol == unix.IPPROTO_UDP { // each direction by itself
		egress, ingress = first(out, outOver, outHeader), first(in, inOver, bulk)
	}
	if t.Egress == Hit {
		t.Egress = egress
	}
	if t.Ingress == Hit {
		t.Ingress = ingress
	}
}

// bulkRest is BULK_NS of bpf/fastpath.c.
const bulkRest = 100 * time.Millisecond

// first is the first that is no hit.
func first(rs ...Reason) Reason {
	for _, r := range rs {
		if r != Hit {
			return r
		}
	}
	return Hit
}

func (p *Path) traceHeader(t *Trace, slot uint32) Reason {
	var n bpfNode
	r := Hit
	switch since := atomic.LoadUint32(&p.control.Since); {
	case p.obj.Nodes.Lookup(slot, &n) != nil || n.Header.Generation == 0:
		t.step("header", NoHeader, "map nodes: none to %s", p.slots.who[slot])
		return NoHeader
	case voided(n.Header.Generation, since):
		r = NoHeader
	case headerTag(&n, p.control.Secret) != n.Header.Tag:
		r = Torn
	}
	name := fmt.Sprint("interface ", n.Header.Ifindex)
	if l, err := p.nl.LinkByIndex(int(n.Header.Ifindex)); err == nil {
		name = l.Attrs().Name
	}
	t.step("header", r, "map nodes: to %s by %s, learned in generation %d", fromAddr(n.Addr), name, n.Header.Generation)
	return r
}

// flows lists those that are cached, local end first.
func (p *Path) flows() (all []Flow, err error) {
	var key bpfFlow
	var rec bpfFilter
	it := p.obj.Filters.Iterate()
	for it.Next(&key, &rec) {
		all = append(all, Flow{key.Protocol, netip.AddrPortFrom(fromAddr(key.Local), big(key.LocalPort)), netip.AddrPortFrom(fromAddr(key.Remote), big(key.RemotePort))})
	}
	return all, it.Err()
}

// Trace adds why a flow takes the path it takes, or which flows fit.
func (p *Part) Trace(t *control.Trace) error {
	if p.path == nil {
		s := p.Status().(PartStatus)
		t.Steps = append(t.Steps, control.Step{Name: "fast path", Result: control.Stopped, Found: s.State, Fix: Disabled.Fix()})
		t.Out, t.In = verdictOf(Disabled), verdictOf(Disabled)
		for i := range t.Flows {
			t.Flows[i].Out, t.Flows[i].In = Disabled.String(), Disabled.String()
		}
		return nil
	}
	if t.Flow.Whole() {
		tr, err := p.path.Trace(fromControl(t.Flow))
		t.Steps = append(t.Steps, tr.Steps...)
		t.Out, t.In = verdictOf(tr.Egress), verdictOf(tr.Ingress)
		return err
	}
	return p.traceAll(t)
}

func (p *Part) traceAll(t *control.Trace) error {
	cached, err := p.path.flows()
	if err != nil {
		return fmt.Errorf("fast path: flows: %w", err)
	}
	known := map[control.Flow]int{}
	for i, f := range t.Flows {
		known[f.Flow] = i
	}
	for _, f := range cached {
		c := toControl(f)
		if !t.Flow.Fits(c) {
			continue
		}
		i, ok := known[c]
		if !ok {
			i, ok = known[c.Reverse()]
		}
		if !ok {
			i = len(t.Flows)
			t.Flows = append(t.Flows, control.TracedFlow{Flow: c})
		}
		t.Flows[i].Cached = true
	}
	for i := range t.Flows {
		f := &t.Flows[i]
		tr, err := p.path.Trace(fromControl(f.Flow))
		if err != nil {
			return err
		}
		f.Out, f.In = tr.Egress.String(), tr.Ingress.String()
	}
	return nil
}

func verdictOf(r Reason) *control.Verdict {
	return &control.Verdict{Hit: r == Hit, Reason: r.String(), Text: r.Text(), Fix: r.Fix()}
}

func fromControl(f control.Flow) Flow { return Flow{f.ProtocolNumber(), f.Src, f.Dst} }

func toControl(f Flow) control.Flow {
	return control.Flow{Protocol: control.ProtocolName(f.Protocol), Src: f.Src, Dst: f.Dst}
}

// fixes are what helps against a reason that Trace gives.
var fixes = map[Reason]string{
	Disabled:   "start the agent with --fastpath=on: it says what is missing",
	Stale:      "the agent has stopped or hangs: systemctl restart lamina-net",
	Changing:   "wait a moment; if it stays so, restart the agent",
	Protocol:   "none: only TCP and UDP are cached",
	NotLocal:   "ask on the node that has one of the two pods",
	NotRemote:  "none: only packets between pods of different nodes are cached",
	NotLearned: "none if the flow has just begun. Both directions have to pass the ordinary path once as established: look at conntrack and the policies above",
	OneSided:   "see that the other direction passes this node, and that conntrack calls the flow replied",
	Outdated:   "none: the next packets are learned again",
	LeaseOver:  "none: the next packet confirms it. A flow that rests for so long always begins so",
	Torn:       "none: ask again",
	NoHeader:   "send something to the node. If it stays so, packets leave by another interface than that of the node's address",
	Segments:   "none: what receives much at once takes the ordinary path, which costs little then",
}

// Fix is what helps, where Trace may give the reason.
func (r Reason) Fix() string { return fixes[r] }
