package policy

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"lamina/net/ns"
)

// talk is a connection whose ends take turns, for as long as they can: what changes under it is seen as silence.
type talk struct {
	name  string
	turns atomic.Int64
	err   atomic.Value // of TCP: why it ended before the test did
}

// pods of the traffic tests: client may talk to server until a policy says otherwise; other always may.
var (
	client = netip.MustParseAddr("10.42.1.2")
	server = netip.MustParseAddr("10.42.1.3")
	other  = netip.MustParseAddr("10.42.1.4")
	remote = netip.MustParseAddr("10.42.2.5")
)

func trafficState(policies ...*networkingv1.NetworkPolicy) State {
	pod := func(name string, a netip.Addr) Pod {
		return Pod{Namespace: "shop", Name: name, Labels: map[string]string{"app": name}, Addrs: []netip.Addr{a}}
	}
	return State{Node: testNode, Policies: policies,
		Pods: []Pod{pod("client", client), pod("server", server), pod("other", other), pod("remote", remote)}}
}

// onlyFrom lets only the pods named by app reach the server.
func onlyFrom(apps ...string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "server"}}
	p.Spec.PodSelector.MatchLabels = map[string]string{"app": "server"}
	p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	for _, app := range apps {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{
			{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}}}})
	}
	return p
}

// talkTCP begins a conversation of eight-byte numbers over TCP.
func (w *world) talkTCP(from, to netip.Addr, port uint16) *talk {
	w.t.Helper()
	tk := &talk{name: fmt.Sprintf("tcp %s > %s", from, to)}
	var l *net.TCPListener
	must(w.t, ns.Do(w.at(to), func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(to, port)))
		return err
	}))
	defer l.Close()
	var c *net.TCPConn
	must(w.t, ns.Do(w.at(from), func() (err error) {
		c, err = net.DialTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.TCPAddrFromAddrPort(netip.AddrPortFrom(to, port)))
		return err
	}))
	s, err := l.AcceptTCP()
	must(w.t, err)
	w.t.Cleanup(func() { c.SetLinger(0); c.Close(); s.SetLinger(0); s.Close() })
	go func() { io.Copy(s, s) }()
	go func() {
		var out, in [8]byte
		for n := uint64(1); w.t.Context().Err() == nil; n++ {
			binary.BigEndian.PutUint64(out[:], n)
			_, err := c.Write(out[:])
			if err == nil {
				_, err = io.ReadFull(c, in[:])
			}
			if err != nil || in != out {
				tk.err.Store(fmt.Errorf("turn %d: %v, got %x", n, err, in))
				return
			}
			tk.turns.Add(1)
			time.Sleep(500 * time.Microsecond)
		}
	}()
	return tk
}

// talkUDP begins one over UDP. Neither end waits for long: both send again when nothing comes, so that either end's packet
// may be the first after a change.
func (w *world) talkUDP(from, to netip.Addr, port uint16) *talk {
	w.t.Helper()
	tk := &talk{name: fmt.Sprintf("udp %s > %s", from, to)}
	open := func(a, peer netip.Addr, ap, pp uint16) (u *net.UDPConn) {
		must(w.t, ns.Do(w.at(a), func() (err error) {
			u, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, ap)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer, pp)))
			return err
		}))
		w.t.Cleanup(func() { u.Close() })
		return u
	}
	c, s := open(from, to, 50000+port, port), open(to, from, port, 50000+port)
	run := func(u *net.UDPConn, count bool) {
		b := make([]byte, 64)
		for w.t.Context().Err() == nil {
			u.Write([]byte("turn"))
			u.SetReadDeadline(time.Now().Add(2 * time.Millisecond))
			if n, err := u.Read(b); err == nil && n == 4 && count {
				tk.turns.Add(1)
			}
			time.Sleep(500 * time.Microsecond)
		}
	}
	// The client's first packet makes the flow; the server speaks when it has come.
	go run(c, true)
	go func() {
		b := make([]byte, 64)
		if _, err := s.Read(b); err == nil {
			run(s, false)
		}
	}()
	return tk
}

// goesOn waits until a conversation has had so many more turns.
func (tk *talk) goesOn(t *testing.T) {
	t.Helper()
	before := tk.turns.Load()
	eventually(t, tk.name+" goes on", func() bool { return tk.turns.Load() > before+10 })
}

// silent checks that no turn is taken any more in some conversations, while others have many.
func silent(t *testing.T, forbidden, allowed []*talk) {
	t.Helper()
	time.Sleep(20 * time.Millisecond) // what was in sockets' buffers is read by then
	var before []int64
	for _, tk := range forbidden {
		before = append(before, tk.turns.Load())
	}
	for range 2 {
		for _, tk := range allowed {
			tk.goesOn(t)
		}
	}
	for i, tk := range forbidden {
		if n := tk.turns.Load() - before[i]; n > 0 {
			t.Errorf("%s: %d turns after it was forbidden", tk.name, n)
		}
	}
}

// entries lists the conntrack flows between two addresses.
func (w *world) entries(a, b netip.Addr) (out []Flow) {
	w.t.Helper()
	must(w.t, ns.Do(w.node, func() error {
		fs, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		for _, f := range fs {
			if fl := flowOf(f); fl.Src == a && fl.Dst == b || fl.Src == b && fl.Dst == a {
				out = append(out, fl)
			}
		}
		return err
	}))
	return out
}

func TestChangeUnderTraffic(t *testing.T) {
	w := newWorld(t, []netip.Addr{client}, []netip.Addr{server}, []netip.Addr{other}, []netip.Addr{remote})
	var plans []*Plan
	resumed := 0
	e := w.enforcer(EnforcerOptions{Around: func(p *Plan, apply func() error) error {
		plans = append(plans, p)
		err := apply()
		if n := len(w.entries(remote, server)); n > 0 && !p.Allows(Flow{remote, server, protoUDP, 50443, 443}) {
			t.Errorf("apply has returned, and conntrack still has %d flows that are forbidden", n)
		}
		resumed++
		return err
	}})
	w.apply(e, trafficState())
	forbidden := []*talk{w.talkTCP(client, server, 80), w.talkUDP(client, server, 53), w.talkUDP(remote, server, 443)}
	allowed := []*talk{w.talkTCP(other, server, 81), w.talkUDP(other, server, 54), w.talkTCP(client, other, 80), w.talkTCP(server, client, 8080)}
	for _, tk := range append(forbidden, allowed...) {
		tk.goesOn(t)
	}
	kept := len(w.entries(other, server)) + len(w.entries(client, other))

	// Several times, for the packet that is on its way at the change is another each time.
	for range 3 {
		had := append(w.entries(client, server), w.entries(remote, server)...)
		res := w.apply(e, trafficState(onlyFrom("other")))
		if len(res.Cut) != len(forbidden) {
			t.Errorf("cut %v, want %d flows; conntrack had %v", res.Cut, len(forbidden), had)
		}
		last := plans[len(plans)-1]
		if len(last.Pods) != 1 || last.Pods[0] != server || !last.Affects(client, server) || last.Affects(client, other) {
			t.Errorf("changed pods: %v, want %s", last.Pods, server)
		}
		silent(t, forbidden, allowed)
		for _, f := range append(w.entries(client, server), w.entries(remote, server)...) {
			if f.Dst == server {
				t.Errorf("conntrack still has %s", f)
			}
		}
		if n := len(w.entries(other, server)) + len(w.entries(client, other)); n != kept {
			t.Errorf("%d conntrack entries of allowed flows, %d before the change", n, kept)
		}
		w.apply(e, trafficState(onlyFrom("other", "client", "remote")))
		for _, tk := range append(forbidden, allowed...) {
			tk.goesOn(t) // TCP has waited and goes on
		}
	}
	for _, tk := range append(forbidden, allowed...) {
		if err := tk.err.Load(); err != nil {
			t.Errorf("%s broke: %v", tk.name, err)
		}
	}
	if resumed != len(plans) {
		t.Errorf("%d changes announced, %d ended", len(plans), resumed)
	}
}

// What an agent finds in the kernel when it starts is replaced in one transaction, and flows it would not allow are cut.
func TestRestart(t *testing.T) {
	w := newWorld(t, []netip.Addr{client}, []netip.Addr{server}, []netip.Addr{other})
	first := w.enforcer(EnforcerOptions{})
	w.apply(first, trafficState())
	tk, stays := w.talkUDP(client, server, 53), w.talkTCP(other, server, 80)
	tk.goesOn(t)
	w.apply(first, trafficState(onlyFrom("other")))
	silent(t, []*talk{tk}, []*talk{stays})
	before := w.nft("-a", "list", "table", "inet", Table) // with handles, which are never used twice
	second := w.enforcer(EnforcerOptions{})
	w.apply(second, trafficState(onlyFrom("other")))
	if after := w.nft("-a", "list", "table", "inet", Table); handles(after) != handles(before) {
		t.Errorf("a second agent made rules anew:\n%s", after)
	}
	silent(t, []*talk{tk}, []*talk{stays})
	third := w.enforcer(EnforcerOptions{})
	w.apply(third, trafficState())
	tk.goesOn(t)
	stays.goesOn(t)
}

func TestRepair(t *testing.T) {
	w := newWorld(t, []netip.Addr{client}, []netip.Addr{server})
	e := w.enforcer(EnforcerOptions{})
	w.serve(server)
	w.apply(e, trafficState(onlyFrom("other")))
	before := w.nft("list", "table", "inet", Table)
	if missing, err := e.Missing(t.Context()); err != nil || len(missing) > 0 {
		t.Fatalf("missing: %v, %v", missing, err)
	}
	w.nft("flush", "ruleset")
	if missing, err := e.Missing(t.Context()); err != nil || len(missing) == 0 {
		t.Fatalf("an empty kernel misses nothing: %v", err)
	}
	must(t, e.Repair(t.Context()))
	w.startForward()
	if after := w.nft("list", "table", "inet", Table); sortedLines(after) != sortedLines(before) {
		t.Errorf("after the repair:\n%s\nbefore the damage:\n%s", after, before)
	}
	// What is listed can be read again.
	w.nft("-c", "-f", "/dev/stdin", before)
}

// A transaction that fails leaves the rules as they were.
func TestFailedTransaction(t *testing.T) {
	w := newWorld(t, []netip.Addr{client}, []netip.Addr{server})
	e := w.enforcer(EnforcerOptions{})
	w.apply(e, trafficState(onlyFrom("other")))
	before := w.nft("list", "table", "inet", Table)
	p, err := e.Plan(trafficState(onlyFrom("client")))
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // nft is not run, or killed
	if _, err := e.Apply(ctx, p); err == nil || !strings.Contains(err.Error(), "policies unchanged") {
		t.Errorf("error is %v", err)
	}
	if after := w.nft("list", "table", "inet", Table); after != before {
		t.Errorf("changed by a failed transaction:\n%s", after)
	}
	w.apply(e, trafficState(onlyFrom("client")))
	if after := w.nft("list", "table", "inet", Table); after == before || !strings.Contains(after, client.String()) {
		t.Errorf("the next change did not get through:\n%s", after)
	}
}

// handles is a listing's lines that have one.
func handles(s string) (out string) {
	for l := range strings.Lines(s) {
		if _, h, ok := strings.Cut(l, "# handle "); ok {
			out += h
		}
	}
	return out
}

func sortedLines(s string) string {
	return strings.Join(sorted(countLines(s)), "\n")
}

func countLines(s string) map[string]int {
	out := map[string]int{}
	for l := range strings.Lines(s) {
		out[strings.TrimSpace(l)]++
	}
	return out
}

// nft runs nft in the node; a last argument of several lines is its standard input.
func (w *world) nft(args ...string) string {
	w.t.Helper()
	var out []byte
	must(w.t, ns.Do(w.node, func() (err error) {
		input := ""
		if last := args[len(args)-1]; strings.Contains(last, "\n") {
			args, input = args[:len(args)-1], last
		}
		cmd := exec.Command("nft", args...)
		cmd.Stdin = strings.NewReader(input)
		out, err = cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("nft %v: %w: %s", args, err, out)
		}
		return err
	}))
	return string(out)
}
