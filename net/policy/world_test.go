package policy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"lamina/net/ns"
)

// world is a node in a network namespace of its own, with endpoints in theirs: pods of this node, pods that live
// elsewhere, and a machine outside. Every endpoint is one routed hop from the node, so everything between them passes its
// forward chain. Namespaces have no names: they are gone when the test is.
type world struct {
	t    *testing.T
	node netns.NsHandle
	ends map[netip.Addr]netns.NsHandle
	raw  map[netip.Addr]int // SCTP sockets
	mu   sync.Mutex
	got  map[string]int // what arrived, by "SCTP 40001 src>dst:port" and the like
}

var nodeAddrs = []netip.Addr{netip.MustParseAddr("192.168.77.1"), netip.MustParseAddr("fd77::1")}

func newNS(t testing.TB) netns.NsHandle {
	t.Helper()
	var h netns.NsHandle
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		var err error
		h, err = netns.New()
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("network namespace: %v: run as root", err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newWorld makes the node and an endpoint for each list of addresses.
func newWorld(t *testing.T, ends ...[]netip.Addr) *world {
	w := &world{t: t, node: newNS(t), ends: map[netip.Addr]netns.NsHandle{}, raw: map[netip.Addr]int{}, got: map[string]int{}}
	must(t, ns.Do(w.node, func() error {
		for _, knob := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+knob, []byte("1"), 0); err != nil {
				return err
			}
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, a := range nodeAddrs {
			if err := addAddr(lo, a); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(lo)
	}))
	for i, addrs := range ends {
		w.connect(i, addrs)
	}
	w.startForward()
	return w
}

func addAddr(l netlink.Link, a netip.Addr) error {
	return netlink.AddrAdd(l, &netlink.Addr{IPNet: hostNet(a), Flags: unix.IFA_F_NODAD})
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// connect joins an endpoint to the node by a veth pair, with every neighbour entry written down.
func (w *world) connect(i int, addrs []netip.Addr) {
	w.t.Helper()
	e := newNS(w.t)
	here, there := net.HardwareAddr{2, 0, 0, 0, 1, byte(i)}, net.HardwareAddr{2, 0, 0, 0, 2, byte(i)}
	name := fmt.Sprintf("veth%d", i)
	must(w.t, ns.Do(w.node, func() error {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: here}, PeerName: "eth0", PeerHardwareAddr: there,
			PeerNamespace: netlink.NsFd(e)}
		if err := netlink.LinkAdd(v); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		for _, a := range addrs {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: hostNet(a), Scope: netlink.SCOPE_LINK}); err != nil {
				return fmt.Errorf("route to %s: %w", a, err)
			}
			if err := netlink.NeighAdd(&netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: there}); err != nil {
				return fmt.Errorf("neighbour %s: %w", a, err)
			}
		}
		return nil
	}))
	must(w.t, ns.Do(e, func() error {
		for _, n := range []string{"lo", "eth0"} {
			l, err := netlink.LinkByName(n)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if err := addAddr(l, a); err != nil {
				return err
			}
			gw := netip.MustParseAddr("169.254.1.1")
			if a.Is6() {
				gw = netip.MustParseAddr("fe80::1")
			}
			if err := netlink.NeighAdd(&netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: gw.AsSlice(), HardwareAddr: here}); err != nil {
				return fmt.Errorf("gateway's neighbour: %w", err)
			}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gw.AsSlice(), Src: a.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
				return fmt.Errorf("default route of %s: %w", a, err)
			}
		}
		return nil
	}))
	for _, a := range addrs {
		w.ends[a] = e
	}
}

// startForward writes the chain that package overlay owns on a real node.
func (w *world) startForward() {
	must(w.t, ns.Do(w.node, func() error {
		nft, err := knftables.New(knftables.InetFamily, Table)
		if err != nil {
			return err
		}
		tx := nft.NewTransaction()
		tx.Add(&knftables.Table{})
		tx.Add(&knftables.Chain{Name: Chain})
		tx.Add(&knftables.Chain{Name: "forward", Type: knftables.PtrTo(knftables.FilterType), Hook: knftables.PtrTo(knftables.ForwardHook),
			Priority: knftables.PtrTo(knftables.FilterPriority)})
		tx.Add(&knftables.Rule{Chain: "forward", Rule: "jump " + Chain})
		return nft.Run(w.t.Context(), tx)
	}))
}

func (w *world) enforcer(opts EnforcerOptions) *Enforcer {
	w.t.Helper()
	opts.NetNS = w.node
	e, err := NewEnforcer(opts)
	must(w.t, err)
	return e
}

// apply plans and applies a state.
func (w *world) apply(e *Enforcer, s State) Result {
	w.t.Helper()
	p, err := e.Plan(s)
	must(w.t, err)
	res, err := e.Apply(w.t.Context(), p)
	must(w.t, err)
	return res
}

func (w *world) arrived(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.got[fmt.Sprintf(format, args...)]++
}

func (w *world) count(what string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.got[what]
}

// at returns the namespace of an address; the node's for its own.
func (w *world) at(a netip.Addr) netns.NsHandle {
	if e, ok := w.ends[a]; ok {
		return e
	}
	return w.node
}

// serve answers TCP, UDP and SCTP on the test ports of an address, until the test ends.
func (w *world) serve(a netip.Addr) {
	must(w.t, ns.Do(w.at(a), func() error {
		for _, port := range testPorts {
			ap := netip.AddrPortFrom(a, port)
			l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(ap))
			if err != nil {
				return err
			}
			w.t.Cleanup(func() { l.Close() })
			go discardTCP(l)
			u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(ap))
			if err != nil {
				return err
			}
			w.t.Cleanup(func() { u.Close() })
			go w.echoUDP(u)
		}
		return w.openRaw(a)
	}))
}

// discardTCP takes connections and closes each when its client does.
func discardTCP(l *net.TCPListener) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			c.SetLinger(0)
			b := make([]byte, 512)
			for {
				if _, err := c.Read(b); err != nil {
					return
				}
			}
		}()
	}
}

// echoUDP records what arrives and sends it back.
func (w *world) echoUDP(u *net.UDPConn) {
	b := make([]byte, 512)
	for {
		n, from, err := u.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			w.arrived("%s", b[:n])
			u.WriteToUDPAddrPort(b[:n], from)
		}
	}
}

// openRaw makes the SCTP socket of an address: the kernel need not know the protocol for packets to be filtered.
func (w *world) openRaw(a netip.Addr) error {
	domain := unix.AF_INET
	if a.Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(a, 0)); err != nil {
		return err
	}
	w.raw[a] = fd
	read := make(chan struct{})
	go func() {
		defer close(read)
		w.readRaw(fd, a)
	}()
	w.t.Cleanup(func() { <-read; unix.Close(fd) })
	return nil
}

// readRaw records the SCTP packets that come in, whose last bytes are the probe's text.
func (w *world) readRaw(fd int, a netip.Addr) {
	b := make([]byte, 2048)
	for w.t.Context().Err() == nil {
		n, _, err := unix.Recvfrom(fd, b, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		p := b[:n]
		if a.Is4() {
			p = p[int(p[0]&15)*4:]
		}
		if len(p) > sctpInit {
			w.arrived("%s", p[sctpInit:])
		}
	}
}

const sctpInit = 12 + 20 + 4 // common header, INIT chunk, header of the parameter that carries the text

// sctpPacket is an INIT with an unknown parameter that holds text, whose length must be a multiple of four.
func sctpPacket(sport, dport uint16, text string) []byte {
	p := make([]byte, sctpInit, sctpInit+len(text))
	p = append(p, text...)
	binary.BigEndian.PutUint16(p[0:], sport)
	binary.BigEndian.PutUint16(p[2:], dport)
	p[12] = 1 // INIT
	binary.BigEndian.PutUint16(p[14:], uint16(len(p)-12))
	binary.BigEndian.PutUint32(p[16:], 0x1234567) // initiate tag
	binary.BigEndian.PutUint32(p[20:], 65535)     // window
	binary.BigEndian.PutUint16(p[24:], 1)
	binary.BigEndian.PutUint16(p[26:], 1)
	binary.BigEndian.PutUint16(p[32:], 0x8fff) // unknown parameter: to be skipped
	binary.BigEndian.PutUint16(p[34:], uint16(4+len(text)))
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	return p
}

func sockaddr(a netip.Addr, port uint16) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
}

// eventually waits for something that must come, for as long as a very slow machine may need.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}
