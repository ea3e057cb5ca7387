package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"lamina/net/control"
)

// tracer is a part that can tell why a flow takes its path. It adds steps to a trace.
type tracer interface {
	Trace(*control.Trace) error
}

// maxTraced is how many flows an answer lists.
const maxTraced = 1000

// trace says why a flow takes the path it takes. The fast path comes last: what it says follows from what was before.
func (a *Agent) trace(f control.Flow) (control.Trace, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := control.Trace{Flow: f, Steps: []control.Step{}}
	conns, err := a.overlay.Connections(f)
	if err != nil {
		return t, err
	}
	if f.Whole() {
		if err := a.traceOrdinary(&t, conns); err != nil {
			return t, err
		}
	} else {
		for _, c := range conns {
			if own := a.cfg.Overlay.Self.Prefix; own.Contains(c.Flow.Src.Addr()) || own.Contains(c.Flow.Dst.Addr()) {
				t.Flows = append(t.Flows, control.TracedFlow{Flow: c.Flow, Connection: &c})
			}
		}
	}
	for _, p := range slices.Backward(a.cfg.Parts) {
		if tr, ok := p.(tracer); ok {
			if err := tr.Trace(&t); err != nil {
				return t, fmt.Errorf("%s: %w", p.Name(), err)
			}
		}
	}
	slices.SortFunc(t.Flows, func(a, b control.TracedFlow) int {
		return cmp.Or(a.Flow.Src.Compare(b.Flow.Src), a.Flow.Dst.Compare(b.Flow.Dst), cmp.Compare(a.Flow.Protocol, b.Flow.Protocol))
	})
	t.More = max(0, len(t.Flows)-maxTraced)
	t.Flows = t.Flows[:len(t.Flows)-t.More]
	return t, nil
}

// traceOrdinary adds what the ordinary path knows of a flow, and turns the flow round if the other end opened it.
func (a *Agent) traceOrdinary(t *control.Trace, conns []control.Connection) error {
	s := control.Step{Name: "conntrack", Result: control.Noted, Found: "no connection", Fix: "none, if nothing has been sent. Otherwise see that packets reach this node, and the policies below"}
	if len(conns) > 0 {
		c := conns[0]
		t.Flow = c.Flow
		s = control.Step{Name: "conntrack", Result: control.Passed, Found: c.String()}
		if !c.Replied && c.Flow.Protocol == "udp" {
			s.Result, s.Fix = control.Noted, "none, if nobody is to answer: each direction is cached by itself, from its third packet on"
		} else if !c.Replied {
			s.Result, s.Fix = control.Stopped, "no answer has passed this node: only established connections are cached. See whether the other end answers"
		}
	}
	states, err := a.overlay.PeerState()
	if err != nil {
		return err
	}
	for _, end := range []netip.Addr{t.Flow.Src.Addr(), t.Flow.Dst.Addr()} {
		for l, state := range states {
			if !l.Prefix.Contains(end) {
				continue
			}
			route := control.Step{Name: "route", Result: control.Passed, Found: fmt.Sprintf("%s by %s", end, l.Node)}
			if state != control.PeerOK {
				route.Result, route.Found, route.Fix = control.Stopped, route.Found+": "+state, "see PROBLEM in lamina net status: the agent puts it back unless something keeps it from that"
			}
			t.Steps = append(t.Steps, route)
		}
	}
	t.Steps = append(t.Steps, s)
	return nil
}
