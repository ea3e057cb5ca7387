package cni

import (
	"errors"
	"fmt"
	"net"
	"os"

	"lamina/net/control"
	"lamina/net/ipam"
	"lamina/net/peers"
	"lamina/net/podlink"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// wire is the veth pair between the host and a pod.
type wire struct {
	hostNS, podNS netns.NsHandle
	onHost, inPod *netlink.Handle
	name          string // inside the pod
	host          string // on the host
	index         int    // on the host
	lease         ipam.Lease
	node          control.Node
	mac           peers.MAC
	mtu           int
}

func openWire(path, name string, l ipam.Lease, n control.Node, mtu int) (w *wire, err error) {
	w = &wire{hostNS: netns.None(), podNS: netns.None(), name: name, host: control.HostInterface(l.ID), lease: l, node: n, mac: control.PodMAC(l.Address), mtu: mtu}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.hostNS, err = netns.Get(); err != nil {
		return w, fmt.Errorf("the host's network namespace: %w", err)
	}
	if w.podNS, err = netns.GetFromPath(path); err != nil {
		return w, fmt.Errorf("network namespace %s: %w", path, err)
	}
	if w.hostNS.Equal(w.podNS) {
		return w, fmt.Errorf("network namespace %s: it is the host's own", path)
	}
	if w.onHost, err = netlink.NewHandleAt(w.hostNS, unix.NETLINK_ROUTE); err != nil {
		return w, fmt.Errorf("netlink: %w", err)
	}
	if w.inPod, err = netlink.NewHandleAt(w.podNS, unix.NETLINK_ROUTE); err != nil {
		return w, fmt.Errorf("netlink in %s: %w", path, err)
	}
	return w, nil
}

func (w *wire) close() {
	for _, h := range []*netlink.Handle{w.onHost, w.inPod} {
		if h != nil {
			h.Close()
		}
	}
	for _, h := range []netns.NsHandle{w.hostNS, w.podNS} {
		if h.IsOpen() {
			h.Close()
		}
	}
}

// create makes the pair with the pod's end configured and the host's end down.
func (w *wire) create() error {
	if err := removeInterface(w.host); err != nil { // of an ADD that was cut short
		return err
	}
	v := &netlink.Veth{
		LinkAttrs: netlink.NewLinkAttrs(), PeerName: w.host, PeerHardwareAddr: control.GatewayMAC.Hardware(), PeerNamespace: netlink.NsFd(int(w.hostNS)), PeerMTU: uint32(w.mtu),
	}
	v.Name, v.MTU, v.HardwareAddr = w.name, w.mtu, w.mac.Hardware()
	if err := w.inPod.LinkAdd(v); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("interface %s: the pod has one of that name already: use another, or delete it", w.name)
		}
		return fmt.Errorf("veth %s and %s: %w", w.name, w.host, err)
	}
	if err := w.configurePod(); err != nil {
		return fmt.Errorf("interface %s of the pod: %w", w.name, err)
	}
	l, err := w.onHost.LinkByName(w.host)
	if err != nil {
		return fmt.Errorf("interface %s: %w", w.host, err)
	}
	w.index = l.Attrs().Index
	return nil
}

func (w *wire) configurePod() error {
	l, err := w.inPod.LinkByName(w.name)
	if err != nil {
		return err
	}
	index := l.Attrs().Index
	if err := w.inPod.AddrAdd(l, &netlink.Addr{IPNet: hostNet(w.lease.Address)}); err != nil {
		return fmt.Errorf("address %s: %w", w.lease.Address, err)
	}
	if err := w.inPod.LinkSetUp(l); err != nil {
		return err
	}
	gateway := w.gatewayNeigh(index)
	if err := w.inPod.NeighSet(&gateway); err != nil {
		return fmt.Errorf("ARP entry %s: %w", gateway.IP, err)
	}
	for _, r := range w.podRoutes(index) {
		if err := w.inPod.RouteReplace(&r); err != nil {
			return fmt.Errorf("route to %s: %w", r.Dst, err)
		}
	}
	return nil
}

func (w *wire) gatewayNeigh(index int) netlink.Neigh {
	return netlink.Neigh{
		LinkIndex: index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, IP: w.node.Host.AsSlice(), HardwareAddr: control.GatewayMAC.Hardware(),
	}
}

func (w *wire) podRoutes(index int) []netlink.Route {
	return []netlink.Route{
		{Dst: hostNet(w.node.Host), LinkIndex: index, Scope: netlink.SCOPE_LINK, Src: w.lease.Address.AsSlice()},
		{Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, LinkIndex: index, Gw: w.node.Host.AsSlice(), Src: w.lease.Address.AsSlice()},
	}
}

// hostSysctls are set on the host's end: a pod can send from its own address only, and IPv6 is not for it.
var hostSysctls = map[string]string{
	"ipv4/conf/%s/rp_filter":      "1",
	"ipv4/conf/%s/send_redirects": "0",
}

// connect brings the host's end up.
func (w *wire) connect() error {
	l, err := w.onHost.LinkByName(w.host)
	if err != nil {
		return fmt.Errorf("interface %s: %w", w.host, err)
	}
	for name, value := range hostSysctls {
		path := "/proc/sys/net/" + fmt.Sprintf(name, w.host)
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			return fmt.Errorf("interface %s: %w", w.host, err)
		}
	}
	const addrGenModeNone = 1
	_ = w.onHost.LinkSetIP6AddrGenMode(l, addrGenModeNone) // a kernel without IPv6 has none
	if err := w.onHost.LinkSetUp(l); err != nil {
		return fmt.Errorf("interface %s: %w", w.host, err)
	}
	neigh := podlink.Neigh(control.Pod{Lease: w.lease, MAC: w.mac}, w.index)
	if err := w.onHost.NeighSet(&neigh); err != nil {
		return fmt.Errorf("ARP entry %s: %w", w.lease.Address, err)
	}
	route := podlink.Route(w.lease.Address, w.node.Lease.Node, w.index)
	if err := w.onHost.RouteReplace(&route); err != nil {
		return fmt.Errorf("route to %s: %w", w.lease.Address, err)
	}
	return nil
}

// check says what differs from what create and connect make.
func (w *wire) check() error {
	pod, err := w.inPod.LinkByName(w.name)
	if err != nil {
		return fmt.Errorf("interface %s of the pod: %w", w.name, err)
	}
	host, err := w.onHost.LinkByName(w.host)
	if err != nil {
		return fmt.Errorf("interface %s: %w", w.host, err)
	}
	p, h := pod.Attrs(), host.Attrs()
	switch {
	case p.Flags&net.FlagUp == 0 || h.Flags&net.FlagUp == 0:
		return fmt.Errorf("interfaces %s and %s: not both are up", w.name, w.host)
	case p.ParentIndex != h.Index:
		return fmt.Errorf("interface %s of the pod: its other end is not %s", w.name, w.host)
	case p.MTU > w.mtu:
		return fmt.Errorf("interface %s of the pod: MTU %d, which is more than the %d that fit through the underlay", w.name, p.MTU, w.mtu)
	case p.HardwareAddr.String() != w.mac.String():
		return fmt.Errorf("interface %s of the pod: MAC %s, not %s", w.name, p.HardwareAddr, w.mac)
	}
	return errors.Join(w.checkPod(pod), w.checkHost(h.Index))
}

func (w *wire) checkPod(pod netlink.Link) error {
	addrs, err := w.inPod.AddrList(pod, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	there := false
	for _, a := range addrs {
		there = there || a.IPNet.String() == hostNet(w.lease.Address).String()
	}
	if !there {
		return fmt.Errorf("interface %s of the pod: address %s is missing", w.name, w.lease.Address)
	}
	routes, err := w.inPod.RouteList(pod, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if r.Gw.Equal(w.node.Host.AsSlice()) {
			return nil
		}
	}
	return fmt.Errorf("interface %s of the pod: the default route by %s is missing", w.name, w.node.Host)
}

func (w *wire) checkHost(index int) error {
	want := podlink.Route(w.lease.Address, w.node.Lease.Node, index)
	routes, err := w.onHost.RouteListFiltered(netlink.FAMILY_V4, &want, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
	if err != nil {
		return err
	}
	if len(routes) == 0 {
		return fmt.Errorf("the host's route to %s on %s is missing", w.lease.Address, w.host)
	}
	return nil
}

// removeInterface removes an interface of the host's, and with it the pod's end; that there is none is no error.
func removeInterface(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(l)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("interface %s: removing it: %w", name, err)
	}
	return nil
}

func interfaceExists(name string) (bool, error) {
	_, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return false, nil
	}
	return err == nil, err
}
