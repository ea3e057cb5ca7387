package overlay

import (
	"fmt"
	"net"
	"net/netip"

	"lamina/net/control"
	"lamina/net/peers"
	"lamina/net/podlink"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// reconcilePeers holds the three entries of every other node, and removes those of nodes that are gone.
func (o *Overlay) reconcilePeers(c *changes) error {
	if err := o.reconcileARP(c); err != nil {
		return err
	}
	if err := o.reconcileFDB(c); err != nil {
		return err
	}
	return o.reconcileRoutes(c)
}

func (o *Overlay) reconcileARP(c *changes) error {
	want := map[string]netlink.Neigh{}
	for _, l := range o.peers {
		want[l.Host().String()] = o.arpEntry(l.Host(), l.MAC)
	}
	have, err := o.nl.NeighList(o.device.Attrs().Index, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("ARP entries of %s: %w", o.cfg.Device, err)
	}
	for _, n := range have {
		key := n.IP.String()
		w, wanted := want[key]
		switch {
		case wanted && n.State == w.State && n.HardwareAddr.String() == w.HardwareAddr.String():
			delete(want, key)
		case !wanted && n.State&unix.NUD_NOARP == 0: // the kernel has its own for multicast
			c.did(func() error { return o.nl.NeighDel(&n) }, "no ARP entry %s on %s", key, o.cfg.Device)
		}
	}
	for key, n := range want {
		c.did(func() error { return o.nl.NeighSet(&n) }, "ARP entry %s %s", key, n.HardwareAddr)
	}
	return nil
}

func (o *Overlay) arpEntry(a netip.Addr, mac peers.MAC) netlink.Neigh {
	return netlink.Neigh{LinkIndex: o.device.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac.Hardware()}
}

func (o *Overlay) reconcileFDB(c *changes) error {
	want := map[string]netlink.Neigh{} // by MAC, which no two peers share
	for _, l := range o.peers {
		want[l.MAC.String()] = netlink.Neigh{
			LinkIndex: o.device.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP,
			IP: l.Node.AsSlice(), HardwareAddr: l.MAC.Hardware(),
		}
	}
	have, err := o.nl.NeighList(o.device.Attrs().Index, unix.AF_BRIDGE)
	if err != nil {
		return fmt.Errorf("FDB entries of %s: %w", o.cfg.Device, err)
	}
	for _, n := range have {
		key := n.HardwareAddr.String()
		if w, wanted := want[key]; wanted && n.IP.Equal(w.IP) && n.State&netlink.NUD_PERMANENT != 0 {
			delete(want, key)
		} else if !wanted {
			c.did(func() error { return o.nl.NeighDel(&n) }, "no FDB entry %s on %s", key, o.cfg.Device)
		}
	}
	for key, n := range want {
		c.did(func() error { return o.nl.NeighSet(&n) }, "FDB entry %s %s", key, n.IP)
	}
	return nil
}

// reconcileRoutes holds a route for every other node, and one for the own prefix that keeps packets to pods that do not
// exist from leaving by the default route.
func (o *Overlay) reconcileRoutes(c *changes) error {
	want := map[netip.Prefix]netlink.Route{o.cfg.Self.Prefix: {Dst: netOf(o.cfg.Self.Prefix), Type: unreachable, Protocol: protocol, Table: unix.RT_TABLE_MAIN}}
	for _, l := range o.peers {
		want[l.Prefix] = netlink.Route{
			Dst: netOf(l.Prefix), LinkIndex: o.device.Attrs().Index, Gw: l.Host().AsSlice(), Src: o.cfg.Self.Host().AsSlice(),
			Flags: int(netlink.FLAG_ONLINK), Protocol: protocol, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST,
		}
	}
	have, err := o.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("routes: %w", err)
	}
	for _, r := range have {
		dst := prefixOf(r.Dst)
		w, wanted := want[dst]
		mine := r.Protocol == protocol || r.LinkIndex == o.device.Attrs().Index
		switch {
		case wanted && r.Protocol == protocol && r.Type == w.Type && r.Gw.Equal(w.Gw) && r.Src.Equal(w.Src) && (w.Gw == nil || r.LinkIndex == w.LinkIndex):
			delete(want, dst)
		case !wanted && mine && !o.podRoute(dst):
			c.did(func() error { return o.nl.RouteDel(&r) }, "no route to %s", dst)
		}
	}
	for dst, r := range want {
		c.did(func() error { return o.nl.RouteReplace(&r) }, "route to %s", dst)
	}
	return nil
}

// podRoute says whether a route is one that the CNI plugin makes for a pod of this node.
func (o *Overlay) podRoute(dst netip.Prefix) bool {
	return dst.IsSingleIP() && o.cfg.Self.Prefix.Contains(dst.Addr())
}

// reconcilePods holds the route and the ARP entry of each pod that has an interface. A new pod's are not repairs: the CNI plugin
// is about to make them too.
func (o *Overlay) reconcilePods(c *changes) error {
	if len(o.pods) == 0 {
		return nil
	}
	have, err := o.podState()
	if err != nil {
		return err
	}
	for _, p := range o.pods {
		link, there := have.links[p.HostInterface]
		if !there {
			continue
		}
		name, all := p.Address.String(), c
		if !o.settled[p.ID] {
			c = &changes{}
		}
		if link.Attrs().Flags&net.FlagUp == 0 {
			c.did(func() error { return o.nl.LinkSetUp(link) }, "%s up", p.HostInterface)
			have.routes[p.Address] = 0 // they go with it
		}
		if have.routes[p.Address] != link.Attrs().Index {
			r := podlink.Route(p.Address, o.cfg.Self.Node, link.Attrs().Index)
			c.did(func() error { return o.nl.RouteReplace(&r) }, "route to pod %s", name)
		}
		if have.neighs[p.Address] != p.MAC.String() {
			n := podlink.Neigh(p, link.Attrs().Index)
			c.did(func() error { return o.nl.NeighSet(&n) }, "ARP entry of pod %s", name)
		}
		if c != all {
			o.settled[p.ID] = len(c.errs) == 0
			all.errs = append(all.errs, c.errs...)
			c = all
		}
	}
	return nil
}

// podState is what the kernel has for pods.
type podState struct {
	links  map[string]netlink.Link // by name
	routes map[netip.Addr]int      // the interface
	neighs map[netip.Addr]string   // the permanent MAC
}

func (o *Overlay) podState() (s podState, err error) {
	s = podState{map[string]netlink.Link{}, map[netip.Addr]int{}, map[netip.Addr]string{}}
	links, err := o.nl.LinkList()
	if err != nil {
		return s, fmt.Errorf("interfaces: %w", err)
	}
	for _, l := range links {
		s.links[l.Attrs().Name] = l
	}
	routes, err := o.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: protocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return s, fmt.Errorf("routes: %w", err)
	}
	for _, r := range routes {
		if dst := prefixOf(r.Dst); dst.IsSingleIP() {
			s.routes[dst.Addr()] = r.LinkIndex
		}
	}
	neighs, err := o.nl.NeighList(0, netlink.FAMILY_V4)
	if err != nil {
		return s, fmt.Errorf("ARP entries: %w", err)
	}
	for _, n := range neighs {
		if a, ok := netip.AddrFromSlice(n.IP); ok && n.State == netlink.NUD_PERMANENT {
			s.neighs[a.Unmap()] = n.HardwareAddr.String()
		}
	}
	return s, nil
}

// PeerState says what is missing of a peer's entries; control.PeerOK if nothing is.
func (o *Overlay) PeerState() (map[peers.Lease]string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	states := map[peers.Lease]string{}
	if o.device == nil {
		for _, l := range o.peers {
			states[l] = "no device"
		}
		return states, nil
	}
	routes, err := o.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: protocol, LinkIndex: o.device.Attrs().Index},
		netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_OIF)
	if err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	routed := map[netip.Prefix]bool{}
	for _, r := range routes {
		routed[prefixOf(r.Dst)] = true
	}
	known := map[string]bool{}
	for _, family := range []int{netlink.FAMILY_V4, unix.AF_BRIDGE} {
		entries, err := o.nl.NeighList(o.device.Attrs().Index, family)
		if err != nil {
			return nil, fmt.Errorf("neighbours: %w", err)
		}
		for _, n := range entries {
			known[fmt.Sprint(family, n.IP, n.HardwareAddr)] = true
		}
	}
	for _, l := range o.peers {
		mac := l.MAC.Hardware()
		switch {
		case !routed[l.Prefix]:
			states[l] = "no route"
		case !known[fmt.Sprint(netlink.FAMILY_V4, net.IP(l.Host().AsSlice()), mac)]:
			states[l] = "no ARP entry"
		case !known[fmt.Sprint(unix.AF_BRIDGE, net.IP(l.Node.AsSlice()), mac)]:
			states[l] = "no FDB entry"
		default:
			states[l] = control.PeerOK
		}
	}
	return states, nil
}
