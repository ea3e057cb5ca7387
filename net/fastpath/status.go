package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Counters are packets by program and reason since the maps were made.
type Counters [programs][reasons]uint64

// Counters reads them.
func (p *Path) Counters() (Counters, error) {
	var c Counters
	const n = int(programs) * int(reasons)
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return c, fmt.Errorf("fast path: counters: %w", err)
	}
	keys, values := make([]uint32, n), make([]uint64, n*cpus)
	var cursor ebpf.MapBatchCursor
	if _, err := p.obj.Counters.BatchLookup(&cursor, keys, values, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return c, fmt.Errorf("fast path: counters: %w", err)
	}
	for i, k := range keys {
		for _, v := range values[i*cpus : (i+1)*cpus] {
			c[k/uint32(reasons)][k%uint32(reasons)] += v
		}
	}
	return c, nil
}

// Sub is the difference to an earlier reading.
func (c Counters) Sub(before Counters) Counters {
	for i := range c {
		for j := range c[i] {
			c[i][j] -= before[i][j]
		}
	}
	return c
}

// Ratio is the part of the packets between pods of different nodes that took the fast path at a program, Egress or Ingress.
// It is 0 if there were none.
func (c Counters) Ratio(prog Program) float64 {
	var all uint64
	for r, n := range c[prog] {
		switch Reason(r) {
		case NotIPv4, NotLocal, NotRemote: // others' packets
		default:
			all += n
		}
	}
	if all == 0 {
		return 0
	}
	return float64(c[prog][Hit]) / float64(all)
}

// Each calls f for every counter that is not zero.
func (c Counters) Each(f func(Program, Reason, uint64)) {
	for prog := range c {
		for r, n := range c[prog] {
			if n != 0 {
				f(Program(prog), Reason(r), n)
			}
		}
	}
}

// Trace is what would become of an ordinary packet of a flow, and why.
type Trace struct {
	Flow    Flow // local end first
	Node    netip.Addr
	Egress  Reason
	Ingress Reason
	Detail  []string
}

// Trace says whether a flow takes the fast path. One end has to be a pod of this node.
func (p *Path) Trace(f Flow) (Trace, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, src := p.getPod(f.Src.Addr())
	pod, dst := p.getPod(f.Dst.Addr())
	if !src && dst {
		f.Src, f.Dst = f.Dst, f.Src
	} else if src {
		pod, _ = p.getPod(f.Src.Addr())
	}
	t := Trace{Flow: f}
	t.both(p.traceCommon(f, src || dst))
	t.Node = p.nodeOf(f.Dst.Addr())
	if t.Egress != Hit {
		return t, nil
	}
	key := bpfFlow{Local: toAddr(f.Src.Addr()), Remote: toAddr(f.Dst.Addr()), LocalPort: big(f.Src.Port()), RemotePort: big(f.Dst.Port()), Protocol: f.Protocol}
	var rec bpfFilter
	if p.obj.Filters.Lookup(key, &rec) != nil {
		t.both(NotLearned)
		return t, nil
	}
	p.traceVerdicts(&t, key, rec, younger(pod.Since, atomic.LoadUint32(&p.control.Since)))
	return t, nil
}

func (t *Trace) both(r Reason) { t.Egress, t.Ingress = r, r }

func (t *Trace) say(format string, args ...any) {
	t.Detail = append(t.Detail, fmt.Sprintf(format, args...))
}

func (p *Path) traceCommon(f Flow, local bool) Reason {
	switch {
	case atomic.LoadUint32(&p.control.Enabled) == 0:
		return Disabled
	case p.stale():
		return Stale
	case f.Protocol != unix.IPPROTO_TCP && f.Protocol != unix.IPPROTO_UDP:
		return Protocol
	case !local:
		return NotLocal
	case !p.nodeOf(f.Dst.Addr()).IsValid():
		return NotRemote
	}
	return Hit
}

func (p *Path) traceVerdicts(t *Trace, key bpfFlow, rec bpfFilter, since uint32) {
	k := flowKey(&key, p.control.Secret)
	now := monotonic()
	lease := p.control.UdpLease
	if key.Protocol == unix.IPPROTO_TCP {
		lease = p.control.TcpLease
	}
	judge := func(name string, v verdict) (known Reason, over bool) {
		switch {
		case v.Generation == 0:
			known = OneSided
		case verdictTag(&v, k) != v.Tag:
			known = Torn
		case voided(v.Generation, since):
			known = Outdated
		}
		age := time.Duration(now - v.At)
		if v.Generation == 0 {
			t.say("%s: never seen allowed", name)
		} else {
			t.say("%s: seen allowed %s ago, in generation %d (valid since %d, lease %s)", name, age.Round(time.Millisecond), v.Generation, since, time.Duration(lease))
		}
		return known, age >= time.Duration(lease)
	}
	out, outOver := judge("outward", rec.out())
	in, inOver := judge("inward", rec.in())
	first := func(rs ...Reason) Reason {
		for _, r := range rs {
			if r != Hit {
				return r
			}
		}
		return Hit
	}
	over := func(o bool) Reason {
		if o {
			return LeaseOver
		}
		return Hit
	}
	if key.Protocol == unix.IPPROTO_UDP { // each direction by itself
		t.Egress = first(out, over(outOver), p.traceHeader(uint32(rec.Out.Node)))
		t.Ingress = first(in, over(inOver))
	} else {
		t.Egress = first(out, in, over(outOver), p.traceHeader(uint32(rec.Out.Node)))
		t.Ingress = first(in, out, p.traceHeader(uint32(rec.In.Node)), over(inOver))
	}
	if t.Ingress == Hit && now-rec.Bulk < uint64(100*time.Millisecond) {
		t.Ingress = Segments
	}
}

func (p *Path) traceHeader(slot uint32) Reason {
	var n bpfNode
	if p.obj.Nodes.Lookup(slot, &n) != nil || voided(n.Header.Generation, atomic.LoadUint32(&p.control.Since)) {
		return NoHeader
	}
	if headerTag(&n, p.control.Secret) != n.Header.Tag {
		return Torn
	}
	return Hit
}
