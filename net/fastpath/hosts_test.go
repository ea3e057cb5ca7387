package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"lamina/net/overlay"
	"lamina/net/peers"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// host is a namespace with an ordinary path and a fast path.
type host struct {
	t      testing.TB
	h      netns.NsHandle
	n      int // 1 or 2
	pins   string
	path   *Path
	change func(*Options)
	stop   chan struct{} // of the heartbeat
	pods   map[netip.Addr]*podNS
}

type podNS struct {
	Pod
	h    netns.NsHandle
	name string // of the host's end
}

func (h *host) node() netip.Addr     { return netip.AddrFrom4([4]byte{192, 168, 0, byte(h.n)}) }
func (h *host) prefix() netip.Prefix { return netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/24", h.n)) }
func (h *host) podAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(h.n), 0, byte(i)})
}

// newHosts makes two hosts on one wire. With change the options of both are changed first.
func newHosts(t testing.TB, change func(*Options)) (a, b *host) {
	t.Helper()
	return wire(t, change, bothPaths)
}

// What hosts have.
const (
	nothing = iota
	ordinaryPath
	bothPaths
)

// wire makes two hosts on one wire.
func wire(t testing.TB, change func(*Options), with int) (a, b *host) {
	t.Helper()
	hasTCX.Need(t)
	if change == nil {
		change = func(*Options) {}
	}
	hosts := [2]*host{}
	for i := range hosts {
		hosts[i] = &host{t: t, h: newNS(t), n: i + 1, pins: newBPFFS(t), change: change, pods: map[netip.Addr]*podNS{}}
	}
	a, b = hosts[0], hosts[1]
	in(t, a.h, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "phys"}, PeerName: "physB"}); err != nil {
			return err
		}
		l, err := netlink.LinkByName("physB")
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(b.h))
	})
	run(t, b.h, "ip link set physB name phys")
	for i, h := range hosts {
		if with >= ordinaryPath {
			h.ordinary(hosts[1-i])
		}
		if with < bothPaths {
			continue
		}
		h.open()
		if err := h.path.SetNode(hosts[1-i].node(), hosts[1-i].prefix()); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

// ordinary makes the ordinary path to the other host.
func (h *host) ordinary(o *host) {
	h.t.Helper()
	run(h.t, h.h, fmt.Sprintf("ip addr add %s/24 dev phys && ip link set phys up", h.node()))
	ov, err := overlay.New(overlay.Config{NS: h.h, Self: h.lease()})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(ov.Close)
	ov.SetPeers([]peers.Lease{o.lease()})
	if _, err := ov.Reconcile(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) lease() peers.Lease {
	return peers.Lease{Node: h.node(), Prefix: h.prefix(), MAC: peers.NodeMAC(h.node())}
}

func (h *host) options() Options {
	o := Options{NS: h.h, Pins: h.pins, Node: h.node(), MAC: h.lease().MAC.Hardware()}
	h.change(&o)
	return o
}

// open opens the path and looks after it until close.
func (h *host) open() {
	h.t.Helper()
	p, err := Open(h.options())
	if err != nil {
		h.t.Fatal(err)
	}
	h.path = p
	if err := p.AttachNIC("phys"); err != nil {
		h.t.Fatal(err)
	}
	for _, pod := range h.pods {
		if err := p.AttachPod(pod.Pod); err != nil {
			h.t.Fatal(err)
		}
	}
	p.Enable(true)
	h.beat()
	h.t.Cleanup(h.remove)
}

func (h *host) beat() {
	h.path.Heartbeat()
	stop, p := make(chan struct{}), h.path
	h.stop = stop
	go func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				p.Heartbeat()
			}
		}
	}()
}

func (h *host) silence() {
	if h.stop != nil {
		h.stop <- struct{}{}
		h.stop = nil
	}
}

// remove ends the fast path and looks for what it left.
func (h *host) remove() {
	h.silence()
	if h.path == nil {
		return
	}
	if err := h.path.Remove(); err != nil {
		h.t.Error(err)
	}
	h.path = nil
	h.noPrograms()
}

func (h *host) noPrograms() {
	h.t.Helper()
	in(h.t, h.h, func() error {
		links, err := netlink.LinkList()
		for errors.Is(err, netlink.ErrDumpInterrupted) {
			links, err = netlink.LinkList()
		}
		if err != nil {
			return err
		}
		for _, l := range links {
			for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
				r, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: at})
				if err == nil && len(r.Programs) > 0 {
					h.t.Errorf("%s has still %d programs", l.Attrs().Name, len(r.Programs))
				}
			}
		}
		return nil
	})
}

// addPod makes a pod. Its path is attached when attach is set.
func (h *host) addPod(i int, attach bool) *podNS {
	h.t.Helper()
	p := &podNS{h: newNS(h.t), name: fmt.Sprintf("lam%d", i)}
	a := h.podAddr(i)
	in(h.t, h.h, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: p.name, MTU: 1450}, PeerName: "eth0"}); err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(p.h))
	})
	run(h.t, p.h, fmt.Sprintf("ip link set eth0 up && ip addr add %s/32 dev eth0 && ip route add %s dev eth0 && ip route add default via %s", a, h.podAddr(1), h.podAddr(1)))
	run(h.t, h.h, fmt.Sprintf("ip link set %s up && ip addr add %s/32 dev %s && ip route add %s dev %s", p.name, h.podAddr(1), p.name, a, p.name))
	host := mustLink(h.t, h.h, p.name).Attrs()
	p.Pod = Pod{Addrs: []netip.Addr{a}, Index: host.Index, Gateway: host.HardwareAddr, MAC: mustLink(h.t, p.h, "eth0").Attrs().HardwareAddr}
	h.pods[a] = p
	if attach {
		if err := h.path.AttachPod(p.Pod); err != nil {
			h.t.Fatal(err)
		}
	}
	return p
}

// delPod removes a pod, its interface first, as the CNI plugin does.
func (h *host) delPod(i int) {
	h.t.Helper()
	a := h.podAddr(i)
	p := h.pods[a]
	in(h.t, h.h, func() error {
		l, err := netlink.LinkByName(p.name)
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	delete(h.pods, a)
	if err := h.path.DetachPod(a); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) counters() Counters {
	h.t.Helper()
	c, err := h.path.Counters()
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

func (h *host) at(i int, port uint16) netip.AddrPort { return netip.AddrPortFrom(h.podAddr(i), port) }

// eventually waits for what has to come without a timing of its own.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}
