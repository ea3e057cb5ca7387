// Package overlay is the ordinary path between pods of different nodes: what works before any cache has learned anything,
// and what everything falls back to.
//
// The design is that of flannel's third VXLAN backend: routing, not switching. A node has one VXLAN device that learns
// nothing. For every other node there is
//
//   - a route: its pods' prefix by its address in the pod network, on that device,
//   - an ARP entry: the MAC of that address, which is that of the other node's VXLAN device,
//   - an FDB entry: the underlay address at which this MAC is.
//
// So the tables have three entries a node, whatever the number of pods, nothing is flooded and nothing ages. Pods are on
// veth pairs of their own with a route each; there is no bridge. nftables masquerades what leaves the pod network and holds
// the chain in which policies are (nft.go).
//
// [Overlay.Reconcile] compares all of it with what should be and puts right what differs, so that the first start, a change
// of peers and the repair of what somebody deleted are one piece of code. It changes nothing that is right.
package overlay

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"

	"lamina/net/control"
	"lamina/net/peers"
	"lamina/net/podlink"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// What a VXLAN device is unless a Config says otherwise.
const (
	Device = "lamina0"
	VNI    = 1
	Port   = 4789 // IANA's
)

// Overhead is what VXLAN over IPv4 adds to a packet: Ethernet 14, VXLAN 8, UDP 8 and IPv4 20 bytes.
const Overhead = 50

// minMTU is the least that IPv4 wants, in bytes.
const minMTU = 576

const protocol = podlink.Protocol

// alias marks our device.
const alias = "lamina: VXLAN device of lamina net agent"

// Errors that callers tell apart with errors.Is.
var (
	ErrConflict = errors.New("already in use")
	ErrConfig   = errors.New("cannot work")
)

// Config is what an overlay is made of. NS and Self are required.
type Config struct {
	NS     netns.NsHandle // the host's network namespace
	Self   peers.Lease    // the own node; no MAC: peers.NodeMAC
	Device string         // name of the VXLAN device; empty: Device
	VNI    int            // 0: VNI
	Port   int            // UDP; 0: Port
	MTU    int            // of pods and of the device, in bytes; 0: what the underlay has less Overhead
	Policy Policy         // nil: every pod may talk to every pod
}

// Overlay holds a node's part of the pod network. All methods are safe for concurrent use.
type Overlay struct {
	cfg    Config
	nl     *netlink.Handle
	settle *netlink.Handle // of Settle, which others must not wait for
	nft    *table

	mu      sync.Mutex
	peers   []peers.Lease
	pods    map[string]control.Pod // by ID
	settled map[string]bool        // pods, by ID, that have been seen with all that they need
	device  netlink.Link           // as last seen; nil before the first Reconcile
	under   Underlay
}

// Underlay is the interface that the node's address is on.
type Underlay struct {
	Name  string
	Index int
	MTU   int // bytes
}

// New checks that the overlay can work on this host and changes nothing yet. The error is ErrConflict or ErrConfig if what is
// asked for cannot be.
func New(cfg Config) (*Overlay, error) {
	if cfg.Device == "" {
		cfg.Device = Device
	}
	if cfg.VNI == 0 {
		cfg.VNI = VNI
	}
	if cfg.Port == 0 {
		cfg.Port = Port
	}
	if cfg.Self.MAC == (peers.MAC{}) {
		cfg.Self.MAC = peers.NodeMAC(cfg.Self.Node)
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	nl, err := netlink.NewHandleAt(cfg.NS, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	settle, err := netlink.NewHandleAt(cfg.NS, unix.NETLINK_ROUTE)
	if err != nil {
		nl.Close()
		return nil, fmt.Errorf("netlink: %w", err)
	}
	o := &Overlay{cfg: cfg, nl: nl, settle: settle, pods: map[string]control.Pod{}, settled: map[string]bool{}}
	if err := o.preflight(); err != nil {
		o.Close()
		return nil, err
	}
	return o, nil
}

func (c Config) check() error {
	switch {
	case len(c.Device) > 15:
		return fmt.Errorf("device name %q: %w: it may have 15 characters", c.Device, ErrConfig)
	case c.VNI < 1 || c.VNI > 1<<24-1:
		return fmt.Errorf("VNI %d: %w: use 1 to %d", c.VNI, ErrConfig, 1<<24-1)
	case c.Port < 1 || c.Port > 65535:
		return fmt.Errorf("port %d: %w: use 1 to 65535", c.Port, ErrConfig)
	}
	return nil
}

// preflight looks for what would stop Reconcile, before anything is changed.
func (o *Overlay) preflight() error {
	under, err := o.findUnderlay()
	if err != nil {
		return err
	}
	o.under = under
	if _, err := o.mtu(under); err != nil {
		return err
	}
	if _, _, err := o.findDevice(under); err != nil {
		return err
	}
	if err := o.prefixConflict(o.cfg.Self); err != nil {
		return err
	}
	o.nft, err = newTable(o.cfg)
	return err
}

// Close lets go of what the process holds; the kernel keeps the overlay.
func (o *Overlay) Close() {
	o.nl.Close()
	o.settle.Close()
}

// Settle waits until the change of devices or routes that is under way in the kernel is done: the removal of an interface, for
// example, goes on for tens of milliseconds after its first notification, and who asks for anything meanwhile waits too.
func (o *Overlay) Settle() {
	const loopback = 1
	_, _ = o.settle.LinkByIndex(loopback) // waits for the kernel's lock of the network's configuration (RTNL)
}

// Config is what New was given, with everything filled in.
func (o *Overlay) Config() Config { return o.cfg }

// MTU is that of pods, in bytes.
func (o *Overlay) MTU() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	mtu, _ := o.mtu(o.under)
	return mtu
}

// Underlay is the interface below, as last seen.
func (o *Overlay) Underlay() Underlay {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.under
}

// CheckPeers says whether peers.Others accepts leases and no prefix is already in use on this host, and returns the leases
// of other nodes.
func (o *Overlay) CheckPeers(all []peers.Lease) ([]peers.Lease, error) {
	others, err := peers.Others(o.cfg.Self, all)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, l := range others {
		errs = append(errs, o.prefixConflict(l))
	}
	return others, errors.Join(errs...)
}

// SetPeers says which other nodes there are; Reconcile makes it so. They must have passed CheckPeers.
func (o *Overlay) SetPeers(others []peers.Lease) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.peers = others
}

// Peers are those set last.
func (o *Overlay) Peers() []peers.Lease {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.peers
}

// SetPod says that a pod is on this node. Its route and ARP entry are held while its interface exists.
func (o *Overlay) SetPod(p control.Pod) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pods[p.ID] = p
}

// Pods are those of this node.
func (o *Overlay) Pods() []control.Pod {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Collect(maps.Values(o.pods))
}

// RemovePod forgets a pod. The kernel removes what there was for it with its interface.
func (o *Overlay) RemovePod(id string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.pods, id)
	delete(o.settled, id)
}

// findUnderlay finds the interface of the node's address.
func (o *Overlay) findUnderlay() (Underlay, error) {
	node := o.cfg.Self.Node
	addrs, err := o.nl.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return Underlay{}, fmt.Errorf("addresses: %w", err)
	}
	for _, a := range addrs {
		if ip, _ := netip.AddrFromSlice(a.IP); ip.Unmap() == node {
			l, err := o.nl.LinkByIndex(a.LinkIndex)
			if err != nil {
				return Underlay{}, fmt.Errorf("the interface of %s: %w", node, err)
			}
			return Underlay{l.Attrs().Name, a.LinkIndex, l.Attrs().MTU}, nil
		}
	}
	return Underlay{}, fmt.Errorf("node address %s: %w: no interface of this host has it: name another with --node-ip, or add it", node, ErrConfig)
}

// mtu is that of pods over an underlay.
func (o *Overlay) mtu(under Underlay) (int, error) {
	most := under.MTU - Overhead
	mtu := o.cfg.MTU
	if mtu == 0 {
		mtu = most
	}
	if mtu > most || mtu < minMTU {
		return max(min(mtu, most), minMTU), fmt.Errorf("MTU %d: %w: %s has %d and VXLAN needs %d of it: use %d to %d", mtu, ErrConfig, under.Name, under.MTU, Overhead, minMTU, most)
	}
	return mtu, nil
}

// Reconcile puts right what is not as it should be, and returns what that was. What cannot be put right does not keep the
// rest from it.
func (o *Overlay) Reconcile() (changes []string, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	// Rules first: policies must be there before there is a way to pods.
	nftChanges, nftErr := o.nft.reconcile(o.peers)
	linkChanges, linkErr := o.reconcileLinks()
	return append(nftChanges, linkChanges...), errors.Join(nftErr, linkErr)
}

// ReconcileLinks is Reconcile without nftables, which takes other programs to look at.
func (o *Overlay) ReconcileLinks() (changes []string, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.reconcileLinks()
}

func (o *Overlay) reconcileLinks() ([]string, error) {
	var c changes
	c.try(o.reconcileForwarding(&c))
	if err := o.reconcileDevice(&c); err != nil {
		return c.what, errors.Join(append(c.errs, err)...)
	}
	c.try(o.reconcilePeers(&c))
	c.try(o.reconcilePods(&c))
	return c.what, errors.Join(c.errs...)
}

// changes collects what was done and what could not be.
type changes struct {
	what []string
	errs []error
}

// did runs f, and notes it as done or as an error.
func (c *changes) did(f func() error, format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	if err := f(); err != nil {
		c.errs = append(c.errs, fmt.Errorf("%s: %w", what, err))
		return
	}
	c.what = append(c.what, what)
}

func (c *changes) try(err error) {
	if err != nil {
		c.errs = append(c.errs, err)
	}
}

// Remove takes the overlay off the host. Pods' interfaces stay, and so does forwarding.
func (o *Overlay) Remove() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	errs := []error{o.nft.remove()}
	if l, err := o.nl.LinkByName(o.cfg.Device); err == nil && o.ours(l) {
		errs = append(errs, o.nl.LinkDel(l))
	}
	routes, err := o.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: protocol}, netlink.RT_FILTER_PROTOCOL)
	errs = append(errs, err)
	for _, r := range routes {
		if r.Type == unreachable {
			errs = append(errs, o.nl.RouteDel(&r))
		}
	}
	o.device = nil
	return errors.Join(errs...)
}

// Exists says whether the device is on the host.
func (o *Overlay) Exists() bool { return o.Index(o.cfg.Device) != 0 }

// Index is that of an interface of the host's; 0 if there is none of that name.
func (o *Overlay) Index(name string) int {
	l, err := o.nl.LinkByName(name)
	if err != nil {
		return 0
	}
	return l.Attrs().Index
}

// DefaultAddress is the address that a host uses for what is nowhere near: that of its default route.
func DefaultAddress(ns netns.NsHandle) (netip.Addr, error) {
	nl, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	routes, err := nl.RouteGet(net.IPv4(192, 0, 2, 1)) // a documentation address: nobody has a route of its own for it
	if err == nil && len(routes) > 0 {
		if a, ok := netip.AddrFromSlice(routes[0].Src); ok {
			return a.Unmap(), nil
		}
	}
	return netip.Addr{}, fmt.Errorf("this host has no default route to tell its address by: name the address with --node-ip")
}
