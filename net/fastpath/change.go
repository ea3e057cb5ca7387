package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Flow is a connection's five-tuple.
type Flow struct {
	Protocol uint8 // IPPROTO_TCP or IPPROTO_UDP
	Src, Dst netip.AddrPort
}

func (f Flow) String() string {
	proto := map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[f.Protocol]
	if proto == "" {
		proto = fmt.Sprint(f.Protocol)
	}
	return fmt.Sprintf("%s %s -> %s", proto, f.Src, f.Dst)
}

// Change is something that makes verdicts of the past doubtful.
type Change struct {
	Pods  []netip.Addr // local pods whose flows are concerned
	All   bool         // every flow is
	Apply func() error // does it; nil: it is done already
	// Keep says of a connection (in the direction it was opened in) that concerns the pods whether conntrack may go on
	// calling it established: whether it is allowed now. nil: none is. With All it is asked of every connection between pods'
	// prefixes and Pods.
	Keep func(Flow) bool
}

// Change applies a change. When it returns, no packet is on the fast path by what was known before, whatever the error; an
// error of Apply is returned as it is.
func (p *Path) Change(c Change) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.begin()()
	err := p.void(c)
	if c.Apply != nil {
		err = errors.Join(err, c.Apply())
	}
	ferr := p.forget(func(f, reply Flow) bool {
		concerned := c.All && p.ours(f) || touches(c.Pods)(f, reply)
		return concerned && (c.Keep == nil || !c.Keep(f))
	})
	return errors.Join(err, ferr, p.drain())
}

// void makes verdicts that concern a change invalid.
func (p *Path) void(c Change) error {
	if c.All {
		p.flush()
		return nil
	}
	var errs []error
	for _, a := range c.Pods {
		rec, ok := p.getPod(a)
		if !ok {
			continue
		}
		rec.Since = p.next()
		errs = append(errs, p.storePod(rec))
	}
	return errors.Join(errs...)
}

// ours says whether one end of a flow is a local pod and the other a pod of another node.
func (p *Path) ours(f Flow) bool {
	_, src := p.getPod(f.Src.Addr())
	_, dst := p.getPod(f.Dst.Addr())
	return src && p.nodeOf(f.Dst.Addr()).IsValid() || dst && p.nodeOf(f.Src.Addr()).IsValid()
}

func touches(addrs []netip.Addr) func(f, reply Flow) bool {
	return func(f, reply Flow) bool {
		for _, a := range []netip.AddrPort{f.Src, f.Dst, reply.Src, reply.Dst} {
			if slices.Contains(addrs, a.Addr()) {
				return true
			}
		}
		return false
	}
}

// matcher adapts a predicate to package netlink.
type matcher func(f, reply Flow) bool

func (m matcher) MatchConntrackFlow(c *netlink.ConntrackFlow) bool {
	return m(tuple(c.Forward), tuple(c.Reverse))
}

func tuple(t netlink.IPTuple) Flow {
	src, _ := netip.AddrFromSlice(t.SrcIP)
	dst, _ := netip.AddrFromSlice(t.DstIP)
	return Flow{t.Protocol, netip.AddrPortFrom(src.Unmap(), t.SrcPort), netip.AddrPortFrom(dst.Unmap(), t.DstPort)}
}

// forget deletes conntrack entries.
func (p *Path) forget(which func(f, reply Flow) bool) (err error) {
	for range 10 { // a list that changed while it was read is read again
		_, err = p.nl.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, matcher(which))
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("forgetting connections: %w", err)
	}
	return nil
}

// SetNode says that a node's pods have addresses of the prefixes. A node that is known already gets these prefixes instead.
func (p *Path) SetNode(addr netip.Addr, prefixes ...netip.Prefix) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	prefixes = slices.Clone(prefixes)
	for i := range prefixes {
		prefixes[i] = prefixes[i].Masked()
	}
	old := p.nodes[addr]
	if old != nil && slices.Equal(old.prefixes, prefixes) {
		return nil
	}
	for other, n := range p.nodes {
		for _, have := range n.prefixes {
			if other != addr && slices.Contains(prefixes, have) {
				return fmt.Errorf("fast path: %s is of node %s, so not of %s", have, other, addr)
			}
		}
	}
	defer p.begin()()
	p.flush()
	if old == nil {
		slot, err := p.slots.take(addr, p.drain)
		if err != nil {
			return fmt.Errorf("fast path: nodes: %w", err)
		}
		if err := p.obj.Nodes.Update(uint32(slot), bpfNode{Addr: toAddr(addr)}, ebpf.UpdateAny); err != nil {
			return fmt.Errorf("fast path: node %s: %w", addr, err)
		}
		old = &node{slot: slot}
		p.nodes[addr] = old
	}
	var errs []error
	for _, pre := range old.prefixes {
		if !slices.Contains(prefixes, pre) {
			errs = append(errs, p.obj.Prefixes.Delete(toPrefix(pre)))
		}
	}
	for _, pre := range prefixes {
		errs = append(errs, p.obj.Prefixes.Update(toPrefix(pre), uint32(old.slot), ebpf.UpdateAny))
	}
	old.prefixes = prefixes
	return errors.Join(errs...)
}

// RemoveNode forgets a node. One that is not known is no error.
func (p *Path) RemoveNode(addr netip.Addr) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.nodes[addr]
	if n == nil {
		return nil
	}
	defer p.begin()()
	p.flush()
	var errs []error
	for _, pre := range n.prefixes {
		errs = append(errs, p.obj.Prefixes.Delete(toPrefix(pre)))
	}
	errs = append(errs, p.obj.Nodes.Update(uint32(n.slot), bpfNode{}, ebpf.UpdateAny))
	p.slots.free(n.slot)
	delete(p.nodes, addr)
	return errors.Join(append(errs, p.drain())...)
}

// Nodes lists the nodes known and their prefixes.
func (p *Path) Nodes() map[netip.Addr][]netip.Prefix {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := map[netip.Addr][]netip.Prefix{}
	for a, n := range p.nodes {
		all[a] = slices.Clone(n.prefixes)
	}
	return all
}

// readNodes finds the nodes that are in the maps.
func (p *Path) readNodes() error {
	var key bpfPrefix
	var slot uint32
	it := p.obj.Prefixes.Iterate()
	for it.Next(&key, &slot) {
		var rec bpfNode
		if err := p.obj.Nodes.Lookup(slot, &rec); err != nil {
			return err
		}
		addr := fromAddr(rec.Addr)
		n := p.nodes[addr]
		if n == nil {
			n = &node{slot: int(slot)}
			p.nodes[addr] = n
			p.slots.put(int(slot), addr)
		}
		n.prefixes = append(n.prefixes, fromPrefix(key))
	}
	return it.Err()
}

// nodeOf is the node whose pod has the address.
func (p *Path) nodeOf(a netip.Addr) netip.Addr {
	if !a.IsValid() {
		return netip.Addr{}
	}
	var slot uint32
	if p.obj.Prefixes.Lookup(toPrefix(netip.PrefixFrom(a, a.BitLen())), &slot) != nil {
		return netip.Addr{}
	}
	return p.slots.who[slot]
}
