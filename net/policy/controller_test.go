package policy

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"lamina/net/ns"
)

// opens says whether a TCP connection can be made now.
func (w *world) opens(from, to netip.Addr, port uint16, wait time.Duration) bool {
	w.t.Helper()
	p := &probe{packet: packet{from, to, "TCP", port}}
	w.send(p, nil)
	defer unix.Close(p.fd)
	return w.within(p, wait)
}

// From files to packets: the controller follows its directory, its pods file and its callers.
func TestController(t *testing.T) {
	w := newWorld(t, []netip.Addr{client}, []netip.Addr{server}, []netip.Addr{other})
	w.serve(server)
	base := t.TempDir()
	dir, podsFile := filepath.Join(base, "policies"), filepath.Join(base, "pods.yaml")
	var mu sync.Mutex
	var reports []error
	c, err := NewController(w.enforcer(EnforcerOptions{}), ControllerOptions{Dir: dir, PodsFile: podsFile, Keep: filepath.Join(base, "keep"),
		Node: testNode, Report: func(err error) { mu.Lock(); defer mu.Unlock(); reports = append(reports, err) }})
	must(t, err)
	c.SetInventory("cni", Inventory{Pods: trafficState().Pods[:2]})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- c.Run(ctx) }()
	file := func(apps ...string) {
		p := onlyFrom(apps...)
		p.APIVersion, p.Kind = "networking.k8s.io/v1", "NetworkPolicy"
		data, err := yaml.Marshal(p)
		must(t, err)
		write(t, filepath.Join(dir, "server.yaml"), string(data))
	}
	status := func(what string, f func(Status) bool) {
		t.Helper()
		eventually(t, what, func() bool { return f(c.Status()) })
	}
	status("first pass", func(s Status) bool { return s.Local == 2 })
	if !w.opens(client, server, 80, 10*time.Second) {
		t.Fatal("closed without a policy")
	}
	// The directory comes later.
	must(t, os.Mkdir(dir, 0o755))
	file("other")
	status("policy in force", func(s Status) bool { return s.Policies == 1 && s.Isolated == 1 })
	if w.opens(client, server, 80, 100*time.Millisecond) {
		t.Error("open under a policy that forbids it")
	}
	// A pod that only the pods file knows.
	write(t, podsFile, "pods: [{namespace: shop, name: other, labels: {app: other}, addresses: ["+other.String()+"]}]")
	status("pods file read", func(s Status) bool { return s.Pods == 3 })
	if !w.opens(other, server, 80, 10*time.Second) {
		t.Error("a pod of the pods file is not let in")
	}
	// Broken files change nothing but the problems.
	write(t, filepath.Join(dir, "server.yaml"), "spec: [")
	write(t, podsFile, "pods: 7")
	status("problems", func(s Status) bool { return len(s.Problems) == 2 })
	if w.opens(client, server, 80, 100*time.Millisecond) || !w.opens(other, server, 80, 10*time.Second) {
		t.Error("a broken file changed what is in force")
	}
	// A caller's policies count with the files'.
	file("other")
	write(t, podsFile, "pods: []")
	status("mended", func(s Status) bool { return len(s.Problems) == 0 && s.Pods == 2 })
	p := onlyFrom("client")
	p.Name = "from-kubernetes"
	c.SetPolicies(append(c.given, p))
	must(t, c.Sync(t.Context()))
	if !w.opens(client, server, 80, 10*time.Second) {
		t.Error("Sync returned and the policy is not in force")
	}
	cancel()
	must(t, <-ended)
	mu.Lock()
	defer mu.Unlock()
	if len(reports) < 2 || reports[len(reports)-1] != nil {
		t.Errorf("reports: %v", reports)
	}
}

// Policies see where a service's connection ends, in the chains and in conntrack.
func TestBehindNAT(t *testing.T) {
	w := newWorld(t, []netip.Addr{client}, []netip.Addr{server}, []netip.Addr{other})
	service := netip.MustParseAddr("10.96.0.1")
	w.nft("-f", "/dev/stdin", `table inet service {
		chain before { type nat hook prerouting priority dstnat; ip daddr 10.96.0.1 udp dport 1 dnat ip to 10.42.1.3:53; }
		chain after { type nat hook postrouting priority srcnat; ip daddr 10.42.1.3 masquerade; }
	}
`)
	e := w.enforcer(EnforcerOptions{})
	w.apply(e, trafficState(onlyFrom("client")))
	w.serve(server)
	var u *net.UDPConn
	must(t, ns.Do(w.at(client), func() (err error) {
		u, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(service, 1)))
		return err
	}))
	defer u.Close()
	asks := func(tries int) bool {
		b := make([]byte, 9)
		for range tries {
			u.Write([]byte("hello"))
			u.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if n, err := u.Read(b); err == nil && string(b[:n]) == "hello" {
				return true
			}
		}
		return false
	}
	if !asks(200) {
		t.Fatal("the service does not answer")
	}
	res := w.apply(e, trafficState(onlyFrom("other")))
	if len(res.Cut) != 1 || res.Cut[0].Dst != server || res.Cut[0].DstPort != 53 || res.Cut[0].Src != client {
		t.Errorf("cut %v", res.Cut)
	}
	if asks(3) {
		t.Error("the service answers against the policy")
	}
}

// ICMP: a ping is for rules without ports alone, an error about an allowed flow is part of it, and a ping that is
// forbidden later is forgotten.
func TestICMP(t *testing.T) {
	w := newWorld(t, []netip.Addr{client}, []netip.Addr{server}, []netip.Addr{other})
	e := w.enforcer(EnforcerOptions{})
	ping := func() error {
		return ns.Do(w.at(client), func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 300_000}); err != nil {
				return err
			}
			echo := []byte{8, 0, 0, 0, 0, 7, 0, 1}
			echo[2], echo[3] = 0xf7, 0xf7 // checksum: ^(0x0800 + 0x0007 + 0x0001)
			if err := unix.Sendto(fd, echo, 0, sockaddr(server, 0)); err != nil {
				return err
			}
			b := make([]byte, 256)
			_, _, err = unix.Recvfrom(fd, b, 0)
			return err
		})
	}
	w.apply(e, trafficState(onlyFrom("client")))
	must(t, ping())
	if n := len(w.entries(client, server)); n != 1 {
		t.Errorf("%d conntrack entries of a ping", n)
	}
	if res := w.apply(e, trafficState(onlyFrom("other"))); len(res.Cut) != 1 || res.Cut[0].Proto != 1 {
		t.Errorf("cut %v, want the ping", res.Cut)
	}
	if err := ping(); err == nil {
		t.Error("a forbidden ping is answered")
	}
	// Nobody listens on this port: the refusal is an ICMP error from a pod that may send nothing of its own.
	w.apply(e, trafficState(onlyFrom("client")))
	must(t, ns.Do(w.at(client), func() error {
		u, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(server, 9)))
		if err != nil {
			return err
		}
		defer u.Close()
		u.Write([]byte("x"))
		u.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := u.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("reading after a refusal: %v", err)
		}
		return nil
	}))
}
