package policy

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/net/ns"
)

var rounds = flag.Int("policy.rounds", 12, "random states to ask the kernel about")
var firstSeed = flag.Uint64("policy.seed", 1, "seed of the random states")

// TestKernelAgreesWithReference asks the kernel with packets what the reference says: for random states, every pair of
// endpoints, protocol and port. Conntrack is never emptied and UDP sockets live through all rounds, so that each change
// must also end what the states before it allowed.
func TestKernelAgreesWithReference(t *testing.T) {
	r := rand.New(rand.NewPCG(*firstSeed, 4))
	pods := randomPods(r)
	var ends [][]netip.Addr
	for _, p := range pods {
		ends = append(ends, p.Addrs)
	}
	ends = append(ends, []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::a")})
	w := newWorld(t, ends...)
	var addrs []netip.Addr
	for _, e := range append(ends, nodeAddrs) {
		for _, a := range e {
			w.serve(a)
			addrs = append(addrs, a)
		}
	}
	clients := map[netip.Addr]*net.UDPConn{}
	for _, a := range addrs {
		must(t, ns.Do(w.at(a), func() (err error) {
			clients[a], err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 40000)))
			return err
		}))
		t.Cleanup(func() { clients[a].Close() })
		go w.answers(clients[a])
	}
	e := w.enforcer(EnforcerOptions{})
	node := map[netip.Addr]bool{nodeAddrs[0]: true, nodeAddrs[1]: true}
	cut, denied, asked := 0, 0, 0
	for round := range *rounds {
		s := randomState(r)
		if round%3 > 0 { // the same pods under other policies
			s.Pods = pods
		}
		pods = s.Pods
		cut += len(w.apply(e, s).Cut)
		d, n := w.compare(round, s, node, addrs, clients)
		denied, asked = denied+d, asked+n
		if t.Failed() {
			t.Fatalf("in round %d of seed %d; the policies:\n%s", round, *firstSeed, describe(s))
		}
	}
	t.Logf("%d packets asked about, %d denied; %d established flows cut", asked, denied, cut)
	if denied == 0 || denied == asked || cut == 0 {
		t.Errorf("the states are too dull: %d of %d denied, %d cut", denied, asked, cut)
	}
}

// answers records what comes back to a client.
func (w *world) answers(u *net.UDPConn) {
	b := make([]byte, 512)
	for {
		n, err := u.Read(b)
		if err != nil {
			return
		}
		w.arrived("answer %s", b[:n])
	}
}

type probe struct {
	packet
	text  string // UDP and SCTP: what the packet says
	fd    int    // TCP: the connecting socket
	allow bool
}

// compare sends everything there is to send and compares what arrives.
func (w *world) compare(round int, s State, node map[netip.Addr]bool, addrs []netip.Addr, clients map[netip.Addr]*net.UDPConn) (denied, asked int) {
	t := w.t
	var probes []*probe
	for _, src := range addrs {
		for _, dst := range addrs {
			if src.Is4() != dst.Is4() || src == dst || src.Is4() != (round%2 == 0) {
				continue
			}
			for _, port := range testPorts {
				for _, proto := range []string{"TCP", "UDP", "SCTP"} {
					p := &probe{packet: packet{src, dst, proto, port}}
					p.text = fmt.Sprintf("%-80s", fmt.Sprintf("%d %s %s>%s:%d", round, proto, src, dst, port))
					p.allow = referenceAllows(s, node, p.packet)
					w.send(p, clients)
					probes = append(probes, p)
				}
			}
		}
	}
	defer func() {
		for _, p := range probes {
			if p.proto == "TCP" {
				unix.Close(p.fd)
			}
		}
	}()
	// What is to arrive has its time; what is not has had as much of it by then, and a little more.
	for _, p := range probes {
		asked++
		if !p.allow {
			denied++
			continue
		}
		if !w.within(p, 10*time.Second) {
			t.Errorf("%s %s > %s port %d is denied, the reference allows it", p.proto, p.src, p.dst, p.port)
			return denied, asked
		}
	}
	time.Sleep(30 * time.Millisecond)
	for _, p := range probes {
		if !p.allow && w.passed(p) {
			t.Errorf("%s %s > %s port %d passes, the reference denies it", p.proto, p.src, p.dst, p.port)
		}
	}
	return denied, asked
}

func (w *world) within(p *probe, d time.Duration) bool {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if w.passed(p) {
			return true
		}
	}
	return false
}

// passed says whether a probe arrived; for TCP and UDP, whether the answer came back too.
func (w *world) passed(p *probe) bool {
	switch p.proto {
	case "TCP":
		fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(fds, 0)
		if err != nil || n == 0 {
			return false
		}
		soerr, err := unix.GetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		return err == nil && soerr == 0
	case "UDP":
		if p.allow {
			return w.count("answer "+p.text) > 0
		}
		return w.count(p.text) > 0
	}
	return w.count(p.text) > 0
}

func (w *world) send(p *probe, clients map[netip.Addr]*net.UDPConn) {
	t := w.t
	t.Helper()
	switch p.proto {
	case "TCP":
		must(t, ns.Do(w.at(p.src), func() (err error) {
			p.fd, err = connecting(p.src, p.dst, p.port)
			return err
		}))
	case "UDP":
		if _, err := clients[p.src].WriteToUDPAddrPort([]byte(p.text), netip.AddrPortFrom(p.dst, p.port)); err != nil {
			t.Fatal(err)
		}
	case "SCTP":
		must(t, unix.Sendto(w.raw[p.src], sctpPacket(40000, p.port, p.text), 0, sockaddr(p.dst, 0)))
	}
}

// connecting begins a TCP connection and does not wait for it.
func connecting(src, dst netip.Addr, port uint16) (int, error) {
	domain := unix.AF_INET
	if src.Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	// Closed with a reset, so that thousands of them leave nothing waiting.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return fd, err
	}
	if err := unix.Bind(fd, sockaddr(src, 0)); err != nil {
		return fd, err
	}
	if err := unix.Connect(fd, sockaddr(dst, port)); err != nil && err != unix.EINPROGRESS {
		return fd, err
	}
	return fd, nil
}

func describe(s State) string {
	var b strings.Builder
	for _, p := range s.Pods {
		fmt.Fprintf(&b, "pod %s %v %v %v\n", p.key(), p.Labels, p.Addrs, p.Ports)
	}
	for _, p := range s.Policies {
		fmt.Fprintf(&b, "policy %s: %s\n", key(p), p.Spec.String())
	}
	return b.String()
}
