package fastpath

import (
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lamina/net/lab/traffic"
	"lamina/net/ns"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"net/netip"
)

func newEcho(t testing.TB, h netns.NsHandle, at netip.AddrPort, name byte) *traffic.Echo {
	t.Helper()
	e, err := traffic.NewEcho(h, at, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return e
}

func dial(t testing.TB, h netns.NsHandle, network string, to netip.AddrPort) net.Conn {
	t.Helper()
	c, err := traffic.Dial(h, network, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// talk sends over both connections until stop is closed, and returns how many rounds there were. TCP must never fail; answers
// to datagrams may be lost while something is being changed, but not be wrong.
func talk(t testing.TB, stop <-chan struct{}, tcp, udp net.Conn) (rounds, lost int) {
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for number := uint64(1); ; number++ {
		select {
		case <-stop:
			return rounds, lost
		default:
		}
		if tcp != nil {
			size := r.IntN(3000)
			if r.IntN(8) == 0 {
				size = r.IntN(300_000)
			}
			if err := traffic.EchoTCP(tcp, size, number); err != nil {
				t.Errorf("TCP, %d bytes: %v", size, err)
				return rounds, lost
			}
		}
		if udp != nil {
			size := 8 + r.IntN(1390)
			if r.IntN(8) == 0 {
				size = 8 + r.IntN(9000) // fragments
			}
			_, l, err := traffic.EchoUDP(udp, size, number, time.Second)
			if err != nil {
				t.Error("UDP:", err)
				return rounds, lost
			}
			if l {
				lost++
			}
		}
		rounds++
	}
}

// during runs f while there is traffic over the connections.
func during(t testing.TB, tcp, udp net.Conn, f func()) (lost int) {
	t.Helper()
	stop := make(chan struct{})
	var all sync.WaitGroup
	var rounds int
	all.Go(func() { rounds, lost = talk(t, stop, tcp, udp) })
	f()
	close(stop)
	all.Wait()
	if rounds == 0 && !t.Failed() {
		t.Error("no traffic")
	}
	return lost
}

// all says whether f is true n times in a row.
func all(n int, f func() bool) bool {
	for range n {
		if !f() {
			return false
		}
	}
	return true
}

func TestEchoOffOnAndSwitched(t *testing.T) {
	a, b := newHosts(t, nil)
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), 'b')
	tcp, udp := dial(t, client.h, "tcp4", b.at(2, 7)), dial(t, client.h, "udp4", b.at(2, 7))

	for _, h := range []*host{a, b} {
		h.path.Enable(false)
	}
	before := [2]Counters{a.counters(), b.counters()}
	during(t, tcp, udp, func() { time.Sleep(300 * time.Millisecond) })
	for i, h := range []*host{a, b} {
		if n := h.counters().Sub(before[i]); n[Egress][Hit]+n[Ingress][Hit] != 0 || n[Egress][Disabled] == 0 {
			t.Errorf("switched off, host %d: %v", i, n)
		}
		h.path.Enable(true)
	}

	before = [2]Counters{a.counters(), b.counters()}
	lost := during(t, tcp, udp, func() { time.Sleep(time.Second) })
	if lost != 0 {
		t.Errorf("%d datagrams lost", lost)
	}
	for i, h := range []*host{a, b} {
		n := h.counters().Sub(before[i])
		for _, prog := range []Program{Egress, Ingress} {
			t.Logf("host %d: %s: %.1f%% of packets", i, prog, 100*n.Ratio(prog))
			if n[prog][Hit] < 100 {
				t.Errorf("host %d: %s has not been taken: %v", i, prog, n[prog])
			}
		}
		if n[EgressLearn][Learned]+n[EgressLearn][Confirmed] == 0 || n[IngressLearn][Learned] == 0 {
			t.Errorf("host %d learned nothing: %v", i, n)
		}
	}

	during(t, tcp, udp, func() {
		for i := range 60 {
			h := []*host{a, b}[rand.IntN(2)]
			h.path.Enable(i%2 == 0)
			time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		}
	})
}

// The time to live and a large packet's fate are those of the ordinary path.
func TestSameAsOrdinary(t *testing.T) {
	a, b := newHosts(t, nil)
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), 'b')
	udp := dial(t, client.h, "udp4", b.at(2, 7))
	for number := range uint64(20) {
		if _, lost, err := traffic.EchoUDP(udp, 100, number+1, time.Second); lost || err != nil {
			t.Fatal("no echo: ", err)
		}
	}
	before := a.counters()
	// The answer's TTL, as the client sees it.
	raw, err := udp.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVTTL, 1) })
	udp.Write(make([]byte, 20))
	buf, oob := make([]byte, 100), make([]byte, 100)
	udp.SetReadDeadline(time.Now().Add(time.Second))
	_, n, _, _, err := udp.(*net.UDPConn).ReadMsgUDP(buf, oob)
	if err != nil {
		t.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) == 0 || msgs[0].Data[0] != 62 {
		t.Errorf("TTL of the answer: %v %v, expected 62", msgs, err)
	}
	if a.counters().Sub(before)[Ingress][Hit] != 1 {
		t.Error("the answer did not take the fast path")
	}
	// ping goes through, the ordinary way.
	run(t, client.h, "ping -c 2 -i 0.2 -W 2 -s 2000 "+b.podAddr(2).String())
}

// Caches too small for the flows there are: everything still arrives.
func TestTinyCaches(t *testing.T) {
	a, b := newHosts(t, func(o *Options) { o.Flows = 1 })
	var all sync.WaitGroup
	stop := make(chan struct{})
	for i := 2; i < 4; i++ {
		client, server := a.addPod(i, true), b.addPod(i, true)
		newEcho(t, server.h, b.at(i, 7), 'b')
		tcp, udp := dial(t, client.h, "tcp4", b.at(i, 7)), dial(t, client.h, "udp4", b.at(i, 7))
		all.Go(func() { talk(t, stop, tcp, nil) })
		all.Go(func() {
			if _, lost := talk(t, stop, nil, udp); lost != 0 {
				t.Errorf("%d datagrams lost", lost)
			}
		})
	}
	eventually(t, "evictions", func() bool { return a.counters()[EgressLearn][Learned] > 400 })
	close(stop)
	all.Wait()
	c := a.counters()
	t.Log("hits", c[Egress][Hit], c[Ingress][Hit], "not learned", c[Egress][NotLearned], "torn", c[Egress][Torn]+c[Ingress][Torn])
}

// A pod goes and another gets its address: nobody hears from the first one again, and no connection goes on.
func TestAddressReused(t *testing.T) {
	a, b := newHosts(t, nil)
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), '0')
	udp, old := dial(t, client.h, "udp4", b.at(2, 7)), dial(t, client.h, "tcp4", b.at(2, 7))
	if err := traffic.EchoTCP(old, 1000, 1); err != nil {
		t.Fatal(err)
	}
	var answers atomic.Value
	answers.Store(byte('0'))
	stop := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		for number := uint64(1); ; number++ {
			select {
			case <-stop:
				return
			default:
			}
			expect := answers.Load().(byte)
			name, lost, err := traffic.EchoUDP(udp, 200, number, 20*time.Millisecond)
			if err != nil {
				t.Error(err)
			}
			// The answer may be of the next one, never of an earlier one.
			if !lost && name < expect {
				t.Errorf("pod %c answers, it is pod %c's address now", name, expect)
			}
		}
	})
	for i := range byte(5) {
		eventually(t, "hits", func() bool {
			before := b.counters()
			time.Sleep(20 * time.Millisecond)
			return b.counters().Sub(before)[Ingress][Hit] > 5
		})
		name := '1' + i
		b.delPod(2)
		answers.Store(name)
		pod := b.addPod(2, true)
		newEcho(t, pod.h, b.at(2, 7), name)
	}
	eventually(t, "hits", func() bool {
		before := b.counters()
		time.Sleep(20 * time.Millisecond)
		return b.counters().Sub(before)[Ingress][Hit] > 5
	})
	close(stop)
	all.Wait()
	if err := traffic.EchoTCP(old, 1000, 2); err == nil {
		t.Error("a connection goes on with a pod that has not made it")
	}
	fresh := dial(t, client.h, "tcp4", b.at(2, 7))
	if err := traffic.EchoTCP(fresh, 100_000, 3); err != nil {
		t.Error(err)
	}
}

// An agent that says nothing more is an agent that repairs nothing more: the ordinary path it is.
func TestStaleHeartbeat(t *testing.T) {
	a, b := newHosts(t, func(o *Options) { o.Heartbeat = 300 * time.Millisecond })
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), 'b')
	tcp, udp := dial(t, client.h, "tcp4", b.at(2, 7)), dial(t, client.h, "udp4", b.at(2, 7))
	hitting := func() bool {
		before := a.counters()
		time.Sleep(20 * time.Millisecond)
		return a.counters().Sub(before)[Egress][Hit] > 0
	}
	lost := during(t, tcp, udp, func() {
		eventually(t, "hits", hitting)
		a.silence()
		eventually(t, "no hits", func() bool {
			before := a.counters()
			time.Sleep(20 * time.Millisecond)
			n := a.counters().Sub(before)
			return n[Egress][Hit] == 0 && n[Egress][Stale] > 0 && n[EgressLearn] == [reasons]uint64{}
		})
		a.beat()
		eventually(t, "hits again", hitting)
	})
	if lost != 0 {
		t.Errorf("%d datagrams lost", lost)
	}
}

// A policy that forbids a flow holds from the moment Change returns, and flows that are kept go on.
func TestChange(t *testing.T) {
	a, b := newHosts(t, nil)
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), 'b')
	newEcho(t, server.h, b.at(2, 8), 'b')
	tcp, udp := dial(t, client.h, "tcp4", b.at(2, 7)), dial(t, client.h, "udp4", b.at(2, 7))
	forbidden := dial(t, client.h, "udp4", b.at(2, 8))
	number := uint64(0)
	echo := func() bool {
		number++
		_, lost, err := traffic.EchoUDP(forbidden, 100, number, 100*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		return !lost
	}
	for _, by := range []Change{{Pods: []netip.Addr{b.podAddr(2)}}, {All: true}} {
		by.Keep = func(f Flow) bool { return f.Dst.Port() != 8 }
		lost := during(t, tcp, udp, func() {
			eventually(t, "hits", func() bool {
				before := b.counters()
				return all(3, echo) && b.counters().Sub(before)[Ingress][Hit] > 2
			})
			by.Apply = func() error {
				run(t, b.h, "nft add rule inet lamina policies udp dport 8 drop")
				return nil
			}
			if err := b.path.Change(by); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if echo() {
					t.Error("an answer of a flow that is forbidden")
				}
			}
			tr, err := b.path.Trace(Flow{unix.IPPROTO_UDP, b.at(2, 8), netip.MustParseAddrPort(forbidden.LocalAddr().String())})
			if err != nil || tr.Ingress == Hit || tr.Egress == Hit {
				t.Errorf("Trace: %+v %v", tr, err)
			}
			by.Apply = func() error {
				run(t, b.h, "nft flush chain inet lamina policies")
				return nil
			}
			if err := b.path.Change(by); err != nil {
				t.Fatal(err)
			}
			eventually(t, "an answer", echo)
		})
		if lost != 0 {
			t.Errorf("%d datagrams of a flow that is allowed were lost", lost)
		}
	}
}

// UDP takes the fast path in one direction by itself: before anybody answers, and after a change that happens when nobody
// does any more. A policy that forbids it holds, and an answer is one for conntrack however late it comes.
func TestOneWay(t *testing.T) {
	a, b := newHosts(t, func(o *Options) { o.UDPLease = 200 * time.Millisecond })
	client, server := a.addPod(2, true), b.addPod(2, true)
	var in net.PacketConn
	must(t, ns.Do(server.h, func() (err error) { in, err = net.ListenPacket("udp4", b.at(2, 9).String()); return err }))
	defer in.Close()
	out := dial(t, client.h, "udp4", b.at(2, 9))
	buf := make([]byte, 16)
	arrives := func() bool {
		if _, err := out.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		in.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, _, err := in.ReadFrom(buf)
		return err == nil
	}
	served := func() bool {
		was := [2]Counters{a.counters(), b.counters()}
		ok := all(3, arrives)
		return ok && a.counters().Sub(was[0])[Egress][Hit] > 1 && b.counters().Sub(was[1])[Ingress][Hit] > 1
	}
	was := a.counters()
	if !arrives() {
		t.Fatal("nothing arrived")
	}
	if n := a.counters().Sub(was); n[EgressLearn][Learned] != 0 {
		t.Error("learned from a single packet")
	}
	eventually(t, "hits of what nobody answers", served)
	was = a.counters()
	time.Sleep(300 * time.Millisecond)
	eventually(t, "a lease that is renewed", func() bool { return arrives() && a.counters().Sub(was)[EgressLearn][Confirmed] > 0 })
	eventually(t, "hits", served)

	forbid := Change{Pods: []netip.Addr{b.podAddr(2)}, Apply: func() error {
		run(t, b.h, "nft add rule inet lamina policies udp dport 9 drop")
		return nil
	}}
	must(t, b.path.Change(forbid))
	for range 3 {
		if arrives() {
			t.Error("what a policy forbids arrived")
		}
	}
	run(t, b.h, "nft flush chain inet lamina policies")
	eventually(t, "hits when it is allowed again", served)

	// The answer must be one: a policy of its own forbids the server to begin anything.
	run(t, b.h, "nft add rule inet lamina policies ct state new ip saddr "+b.podAddr(2).String()+" drop")
	run(t, a.h, "nft add rule inet lamina policies ct state new ip daddr "+a.podAddr(2).String()+" drop")
	in.SetReadDeadline(time.Now().Add(time.Second))
	out.Write([]byte("x"))
	_, from, err := in.ReadFrom(buf)
	must(t, err)
	in.WriteTo([]byte("y"), from)
	out.SetReadDeadline(time.Now().Add(time.Second))
	if _, err := out.Read(buf); err != nil || buf[0] != 'y' {
		t.Errorf("the answer: %v", err)
	}
	for _, h := range []*host{a, b} { // everything learned is void, and the server is silent from here on
		must(t, h.path.Change(Change{All: true, Keep: func(Flow) bool { return true }}))
	}
	eventually(t, "hits after a change, with the other direction silent", served)
	for _, h := range []*host{a, b} {
		tr, err := h.path.Trace(map[*host]Flow{
			a: {unix.IPPROTO_UDP, netip.MustParseAddrPort(out.LocalAddr().String()), b.at(2, 9)},
			b: {unix.IPPROTO_UDP, b.at(2, 9), netip.MustParseAddrPort(out.LocalAddr().String())},
		}[h])
		if got := map[*host]Reason{a: tr.Egress, b: tr.Ingress}[h]; err != nil || got != Hit && got != LeaseOver {
			t.Errorf("Trace: %+v %v", tr, err)
		}
	}
}

// Trace says of a flow what the programs do.
func TestTrace(t *testing.T) {
	a, b := newHosts(t, func(o *Options) { o.UDPLease = 400 * time.Millisecond })
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), 'b')
	udp := dial(t, client.h, "udp4", b.at(2, 7))
	f := Flow{unix.IPPROTO_UDP, netip.MustParseAddrPort(udp.LocalAddr().String()), b.at(2, 7)}
	expect := func(when string, h *host, f Flow, egress, ingress Reason) {
		t.Helper()
		tr, err := h.path.Trace(f)
		if err != nil || tr.Egress != egress || tr.Ingress != ingress {
			t.Errorf("%s: %s, %s (%v) %v, expected %s, %s", when, tr.Egress, tr.Ingress, tr.Steps, err, egress, ingress)
		}
	}
	echo := func() {
		for number := range uint64(3) {
			if _, lost, err := traffic.EchoUDP(udp, 64, number+1, time.Second); lost || err != nil {
				t.Fatal("no echo ", err)
			}
		}
	}
	expect("before", a, f, NotLearned, NotLearned)
	echo()
	expect("learned", a, f, Hit, Hit)
	expect("learned, the other end first", a, Flow{f.Protocol, f.Dst, f.Src}, Hit, Hit)
	expect("learned", b, f, Hit, Hit)
	expect("another protocol", a, Flow{unix.IPPROTO_ICMP, f.Src, f.Dst}, Protocol, Protocol)
	expect("another pod", a, Flow{f.Protocol, a.at(77, 1), f.Dst}, NotLocal, NotLocal)
	expect("outside", a, Flow{f.Protocol, f.Src, netip.MustParseAddrPort("1.1.1.1:53")}, NotRemote, NotRemote)
	time.Sleep(450 * time.Millisecond)
	expect("later", a, f, LeaseOver, LeaseOver)
	echo()
	expect("confirmed", a, f, Hit, Hit)
	a.path.Change(Change{Pods: []netip.Addr{a.podAddr(2)}, Keep: func(Flow) bool { return true }})
	expect("changed", a, f, Outdated, Outdated)
	a.path.Enable(false)
	expect("off", a, f, Disabled, Disabled)
}

// A MAC of the underlay changes and nobody tells: the next lease brings the new header.
func TestHeaderHeals(t *testing.T) {
	a, b := newHosts(t, func(o *Options) { o.UDPLease = 300 * time.Millisecond })
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), 'b')
	udp := dial(t, client.h, "udp4", b.at(2, 7))
	number := uint64(0)
	echo := func() bool {
		number++
		_, lost, err := traffic.EchoUDP(udp, 100, number, 100*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		return !lost
	}
	eventually(t, "hits", func() bool {
		before := a.counters()
		return all(2, echo) && a.counters().Sub(before)[Egress][Hit] == 2
	})
	run(t, b.h, "ip link set phys down && ip link set phys address 02:00:00:00:cc:02 && ip link set phys up")
	run(t, a.h, "ip neigh flush dev phys")
	eventually(t, "echo and hits", func() bool {
		before := a.counters()
		return all(2, echo) && a.counters().Sub(before)[Egress][Hit] == 2
	})
}

// Every change of nodes is seen by the programs.
func TestNodes(t *testing.T) {
	a, b := newHosts(t, func(o *Options) { o.Nodes = 2 })
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), 'b')
	tcp, udp := dial(t, client.h, "tcp4", b.at(2, 7)), dial(t, client.h, "udp4", b.at(2, 7))
	hits := func() bool {
		before := a.counters()
		time.Sleep(20 * time.Millisecond)
		return a.counters().Sub(before)[Egress][Hit] > 0
	}
	lost := during(t, tcp, udp, func() {
		eventually(t, "hits", hits)
		if err := a.path.RemoveNode(b.node()); err != nil {
			t.Error(err)
		}
		eventually(t, "no hits", func() bool {
			before := a.counters()
			time.Sleep(20 * time.Millisecond)
			n := a.counters().Sub(before)
			return n[Egress][Hit] == 0 && n[Egress][NotRemote]+n[Egress][Outdated] > 0
		})
		others := []netip.Addr{netip.MustParseAddr("192.168.0.9"), netip.MustParseAddr("192.168.0.10")}
		for i, o := range others {
			if err := a.path.SetNode(o, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(100 + i), 0, 0}), 24)); err != nil {
				t.Error(err)
			}
		}
		if err := a.path.SetNode(b.node(), b.prefix()); err == nil {
			t.Error("a third node found room for two")
		}
		if err := a.path.SetNode(others[1], netip.MustParsePrefix("10.100.0.0/24")); err == nil {
			t.Error("two nodes have one prefix")
		}
		a.path.RemoveNode(others[0])
		if err := a.path.SetNode(b.node(), b.prefix()); err != nil {
			t.Error(err)
		}
		eventually(t, "hits again", hits)
	})
	if lost != 0 {
		t.Errorf("%d datagrams lost", lost)
	}
}
