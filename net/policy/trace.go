package policy

import (
	"fmt"
	"net/netip"
	"strings"

	"lamina/net/control"
)

// Trace adds what the rules in force say of a whole flow's first packet: of both ends, as far as they are pods of this node.
func (p *Part) Trace(t *control.Trace) error {
	p.mu.Lock()
	e := p.enforcer
	p.mu.Unlock()
	if e == nil || !t.Flow.Whole() {
		return nil
	}
	e.mu.Lock()
	r := e.last
	e.mu.Unlock()
	if r == nil {
		t.Steps = append(t.Steps, control.Step{Name: "policies", Result: control.Noted, Found: "what is in force is not known: the last change failed", Fix: "see lamina net status"})
		return nil
	}
	f := Flow{Src: t.Flow.Src.Addr(), Dst: t.Flow.Dst.Addr(), Proto: t.Flow.ProtocolNumber(), SrcPort: t.Flow.Src.Port(), DstPort: t.Flow.Dst.Port()}
	for _, side := range []struct {
		dir direction
		pod netip.Addr
	}{{egress, f.Src}, {ingress, f.Dst}} {
		if lp := r.pods[side.pod]; lp != nil {
			t.Steps = append(t.Steps, lp.explain(f, side.dir))
		}
	}
	return nil
}

// explain names the rule that allows a flow, or the policies that do not.
func (p *localPod) explain(f Flow, dir direction) control.Step {
	s := control.Step{Name: "policy " + dir.String(), Result: control.Passed}
	pr := p.profiles[dir]
	switch {
	case f.Src == f.Dst:
		s.Found = fmt.Sprintf("%s speaks to itself, which nothing forbids", p.name)
	case pr == nil:
		s.Found = fmt.Sprintf("no policy selects %s for %s", p.name, dir)
	default:
		if i := pr.allowing(f); i >= 0 {
			s.Found = fmt.Sprintf("%s: allowed by %s", p.name, pr.rules[i].origin)
			break
		}
		s.Result, s.Found = control.Stopped, fmt.Sprintf("%s: forbidden: selected by %s, and none of their rules allows it", p.name, strings.Join(pr.policies, ", "))
		s.Fix = "add a rule that allows it to one of these policies"
	}
	return s
}
