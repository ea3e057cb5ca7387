// Package lab is a network to test with: namespaces as hosts on one Ethernet, more of them as pods, and one that is the
// world outside. Everything goes when the test ends, and [Main] fails a test program that leaves something behind.
//
// The namespaces have names, so that other programs can use them: `ip netns exec` and CNI's cnitool know them.
package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"lamina/net/ns"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Nic is the name of the interface that each host has on the underlay.
const Nic = "phys0"

// UnderlayMTU is that of the underlay, in bytes.
const UnderlayMTU = 1500

// Lab is hosts joined by a bridge.
type Lab struct {
	Hosts   []*Host
	Outside *Host // on the underlay, knows nothing of pods; its prefix is not valid
	fabric  *Node
	t       testing.TB
}

// Node is a network namespace.
type Node struct {
	Name string
	NS   netns.NsHandle
	Path string // as CNI wants it
	t    testing.TB
}

// Host is a namespace that stands for a host.
type Host struct {
	*Node
	Addr   netip.Addr   // on the underlay
	Prefix netip.Prefix // a pod prefix for it
}

var (
	// scripts/own.sh knows by LAMINA_RUN which namespaces a test that was killed has left.
	prefix = fmt.Sprintf("lamt%s%d-", os.Getenv("LAMINA_RUN"), os.Getpid())
	count  atomic.Int64
)

const namedDir = "/run/netns"

// Main runs the tests and fails if a namespace is left.
func Main(m *testing.M) int {
	code := m.Run()
	left, _ := filepath.Glob(filepath.Join(namedDir, prefix+"*"))
	for _, path := range left {
		fmt.Fprintf(os.Stderr, "left a network namespace: %s\n", path)
		_ = netns.DeleteNamed(filepath.Base(path))
		code = 1
	}
	return code
}

// New makes n hosts with addresses 192.168.77.1 and up, and pod prefixes 10.99.1.0/24 and up.
func New(t testing.TB, n int) *Lab {
	t.Helper()
	l := &Lab{t: t, fabric: NewNode(t, "fabric")}
	l.fabric.must(func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		if err := netlink.LinkAdd(br); err != nil {
			return err
		}
		return netlink.LinkSetUp(br)
	})
	for i := 1; i <= n; i++ {
		h := l.join(fmt.Sprintf("h%d", i), netip.AddrFrom4([4]byte{192, 168, 77, byte(i)}))
		h.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 99, byte(i), 0}), 24)
		l.Hosts = append(l.Hosts, h)
	}
	l.Outside = l.join("out", netip.AddrFrom4([4]byte{192, 168, 77, 200}))
	return l
}

// join makes a host on the fabric.
func (l *Lab) join(name string, addr netip.Addr) *Host {
	l.t.Helper()
	h := &Host{Node: NewNode(l.t, name), Addr: addr}
	l.fabric.must(func() error {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: UnderlayMTU}, PeerName: Nic, PeerNamespace: netlink.NsFd(int(h.NS))}
		if err := netlink.LinkAdd(v); err != nil {
			return err
		}
		br, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMaster(v, br); err != nil {
			return err
		}
		return netlink.LinkSetUp(v)
	})
	h.must(func() error {
		nic, err := netlink.LinkByName(Nic)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(nic, &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
			return err
		}
		return netlink.LinkSetUp(nic)
	})
	return h
}

// NewNode makes a namespace that has a loopback interface and nothing else.
func NewNode(t testing.TB, name string) *Node {
	t.Helper()
	n := &Node{Name: fmt.Sprintf("%s%d-%s", prefix, count.Add(1), name), t: t}
	n.Path = filepath.Join(namedDir, n.Name)
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	// Making one enters it: ns.Do comes back.
	err = ns.Do(here, func() (err error) {
		n.NS, err = netns.NewNamed(n.Name)
		return err
	})
	if err != nil {
		t.Fatalf("network namespace %s: %v", n.Name, err)
	}
	t.Cleanup(func() {
		n.NS.Close()
		if err := netns.DeleteNamed(n.Name); err != nil && !os.IsNotExist(err) {
			t.Errorf("network namespace %s: %v", n.Name, err)
		}
	})
	n.must(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return n
}

// Do runs f in the namespace.
func (n *Node) Do(f func() error) error { return ns.Do(n.NS, f) }

func (n *Node) must(f func() error) {
	n.t.Helper()
	if err := n.Do(f); err != nil {
		n.t.Fatalf("%s: %v", n.Name, err)
	}
}

// Command is a program that runs in the namespace.
func (n *Node) Command(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + n.Path, "--", name}, args...)...)
}

// Run runs a program, which must succeed, and returns its output.
func (n *Node) Run(name string, args ...string) string {
	n.t.Helper()
	out, err := n.Command(name, args...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s: %s %s: %v\n%s", n.Name, name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
