package overlay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"lamina/net/ns"
	"lamina/net/peers"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	unreachable     = unix.RTN_UNREACHABLE
	addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE
)

const forwardingSysctl = "/proc/sys/net/ipv4/ip_forward"

// reconcileForwarding makes the host a router.
func (o *Overlay) reconcileForwarding(c *changes) error {
	return ns.Do(o.cfg.NS, func() error {
		b, err := os.ReadFile(forwardingSysctl)
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(b)) == "0" {
			c.did(func() error { return os.WriteFile(forwardingSysctl, []byte("1"), 0o644) }, "sysctl net.ipv4.ip_forward=1")
		}
		return nil
	})
}

// reconcileDevice sees to it that the VXLAN device is there and as it should be.
func (o *Overlay) reconcileDevice(c *changes) error {
	under, err := o.findUnderlay()
	if err != nil {
		return err
	}
	o.under = under
	mtu, mtuErr := o.mtu(under) // a device with the nearest possible MTU is better than none
	c.try(mtuErr)
	link, keep, err := o.findDevice(under)
	if err != nil {
		return err
	}
	if link != nil && !keep {
		if err := o.nl.LinkDel(link); err != nil {
			return fmt.Errorf("removing device %s, which is not as it should be: %w", o.cfg.Device, err)
		}
		link = nil
	}
	if link == nil {
		if link, err = o.addDevice(under, mtu); err != nil {
			return err
		}
		c.what = append(c.what, "device "+o.cfg.Device)
	}
	o.device = link
	o.adjustDevice(c, link.Attrs(), mtu)
	return o.reconcileAddress(c)
}

// findDevice looks for the device. It may be kept if what cannot be changed about it is right. Without an error, what is
// there is ours.
func (o *Overlay) findDevice(under Underlay) (link netlink.Link, keep bool, err error) {
	link, err = o.nl.LinkByName(o.cfg.Device)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("device %s: %w", o.cfg.Device, err)
	}
	if !o.ours(link) {
		return nil, false, fmt.Errorf("device %s: %w: it is a %s that Lamina did not make: remove it if nobody needs it (ip link del %[1]s), or use another name with --device",
			o.cfg.Device, ErrConflict, link.Type())
	}
	v := link.(*netlink.Vxlan)
	keep = v.VxlanId == o.cfg.VNI && v.Port == o.cfg.Port && v.VtepDevIndex == under.Index && !v.Learning &&
		v.SrcAddr.Equal(o.cfg.Self.Node.AsSlice())
	return link, keep, nil
}

// ours says whether Lamina made the device. It gets its alias right after it was made; before that the MAC tells.
func (o *Overlay) ours(link netlink.Link) bool {
	_, vxlan := link.(*netlink.Vxlan)
	a := link.Attrs()
	return vxlan && (a.Alias == alias || a.Alias == "" && a.HardwareAddr.String() == o.cfg.Self.MAC.String())
}

func (o *Overlay) addDevice(under Underlay, mtu int) (netlink.Link, error) {
	v := &netlink.Vxlan{
		LinkAttrs:    netlink.NewLinkAttrs(),
		VxlanId:      o.cfg.VNI,
		VtepDevIndex: under.Index,
		SrcAddr:      o.cfg.Self.Node.AsSlice(),
		Port:         o.cfg.Port,
		Learning:     false,
	}
	v.Name, v.Alias, v.MTU, v.HardwareAddr = o.cfg.Device, alias, mtu, o.cfg.Self.MAC.Hardware()
	err := o.nl.LinkAdd(v)
	switch {
	case errors.Is(err, unix.EEXIST):
		return nil, fmt.Errorf("device %s: VNI %d on port %d: %w%s: use another with --vni or --port on all nodes", o.cfg.Device, o.cfg.VNI, o.cfg.Port,
			ErrConflict, o.vniHolder())
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil, fmt.Errorf("device %s: this kernel has no VXLAN: modprobe vxlan, or a kernel with CONFIG_VXLAN", o.cfg.Device)
	case err != nil:
		return nil, fmt.Errorf("device %s: making it: %w", o.cfg.Device, err)
	}
	_ = o.nl.LinkSetIP6AddrGenMode(v, addrGenModeNone) // it carries IPv4 only; without IPv6 there is nothing to set
	link, err := o.nl.LinkByName(o.cfg.Device)
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", o.cfg.Device, err)
	}
	return link, nil
}

// vniHolder names the device that has our VNI.
func (o *Overlay) vniHolder() string {
	links, _ := o.nl.LinkList()
	for _, l := range links {
		if v, ok := l.(*netlink.Vxlan); ok && v.VxlanId == o.cfg.VNI && v.Port == o.cfg.Port {
			return " by " + v.Name
		}
	}
	return ""
}

// adjustDevice sets what can be changed while packets flow.
func (o *Overlay) adjustDevice(c *changes, a *netlink.LinkAttrs, mtu int) {
	link := o.device
	if a.Alias != alias {
		c.try(o.nl.LinkSetAlias(link, alias))
	}
	if mac := o.cfg.Self.MAC; a.HardwareAddr.String() != mac.String() {
		c.did(func() error { return o.nl.LinkSetHardwareAddr(link, mac.Hardware()) }, "MAC %s of %s", mac, a.Name)
	}
	if a.MTU != mtu {
		c.did(func() error { return o.nl.LinkSetMTU(link, mtu) }, "MTU %d of %s", mtu, a.Name)
	}
	if a.Flags&net.FlagUp == 0 {
		c.did(func() error { return o.nl.LinkSetUp(link) }, "%s up", a.Name)
	}
}

// reconcileAddress gives the device the host's address in the pod network and no other.
func (o *Overlay) reconcileAddress(c *changes) error {
	want := hostNet(o.cfg.Self.Host())
	addrs, err := o.nl.AddrList(o.device, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", o.cfg.Device, err)
	}
	there := false
	for _, a := range addrs {
		if a.IPNet.String() == want.String() {
			there = true
			continue
		}
		c.did(func() error { return o.nl.AddrDel(o.device, &a) }, "no address %s on %s", a.IPNet, o.cfg.Device)
	}
	if !there {
		c.did(func() error { return o.nl.AddrReplace(o.device, &netlink.Addr{IPNet: want}) }, "address %s of %s", want, o.cfg.Device)
	}
	return nil
}

// prefixConflict finds a route or an interface's network of somebody else's that a pod prefix collides with. A wider route,
// such as one to a whole company's 10.0.0.0/8, does not.
func (o *Overlay) prefixConflict(l peers.Lease) error {
	links, err := o.nl.LinkList()
	if err != nil {
		return fmt.Errorf("interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	routes, err := o.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("routes: %w", err)
	}
	for _, r := range routes {
		dst := prefixOf(r.Dst)
		if r.Protocol == protocol || names[r.LinkIndex] == o.cfg.Device || !dst.IsValid() || dst.Bits() == 0 || !dst.Overlaps(l.Prefix) {
			continue
		}
		if connected := r.Gw == nil && len(r.MultiPath) == 0; connected || dst.Bits() >= l.Prefix.Bits() {
			return fmt.Errorf("pod prefix %s: %w: this host has a route to %s on %s: use another prefix, or remove that network", l, ErrConflict, dst, names[r.LinkIndex])
		}
	}
	return nil
}

// hostNet is an address as a network of one.
func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func netOf(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf is the inverse of netOf. nil, which netlink uses for a default route, is the prefix without bits.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	if !ok {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a.Unmap(), ones)
}
