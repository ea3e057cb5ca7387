package fastpath

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"lamina/net/lab"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const agentEnv = "LAMINA_FASTPATH_TEST_AGENT"

// agentConfig is what the agent of a test is told.
type agentConfig struct {
	Options Options
	NS      string
	Pods    []Pod
	Peer    netip.Addr
	Prefix  netip.Prefix
}

func TestMain(m *testing.M) {
	if s := os.Getenv(agentEnv); s != "" {
		if err := agent(s); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(lab.Main(m))
}

// agent is a process that opens a path and looks after it until it is killed.
func agent(config string) error {
	var c agentConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	h, err := netns.GetFromPath(c.NS)
	if err != nil {
		return err
	}
	c.Options.NS = h
	p, err := Open(c.Options)
	if err != nil {
		return err
	}
	if err := p.AttachNIC("phys"); err != nil {
		return err
	}
	for _, pod := range c.Pods {
		if err := p.AttachPod(pod); err != nil {
			return err
		}
	}
	if err := p.SetNode(c.Peer, c.Prefix); err != nil {
		return err
	}
	p.Enable(true)
	p.Heartbeat()
	fmt.Println("ready")
	for {
		time.Sleep(50 * time.Millisecond)
		p.Heartbeat()
	}
}

// startAgent runs an agent for the host in a process of its own, with flows as the size of its cache.
func (h *host) startAgent(peer *host, flows int) *exec.Cmd {
	h.t.Helper()
	c := agentConfig{Options: h.options(), NS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), h.h)}
	c.Options.Flows, c.Peer, c.Prefix = flows, peer.node(), peer.prefix()
	for _, p := range h.pods {
		c.Pods = append(c.Pods, p.Pod)
	}
	b, err := json.Marshal(c)
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), agentEnv+"="+string(b))
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if strings.TrimSpace(line) != "ready" {
		h.t.Fatalf("agent: %s %v", line, err)
	}
	return cmd
}

func kill(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
}

// Agents are killed and start again under traffic, also with maps that do not fit: no connection breaks, no datagram is lost,
// and the fast path is taken again.
func TestKilledAndUpgraded(t *testing.T) {
	a, b := newHosts(t, func(o *Options) { o.Heartbeat = 500 * time.Millisecond })
	client, server := a.addPod(2, true), b.addPod(2, true)
	newEcho(t, server.h, b.at(2, 7), 'b')
	tcp, udp := dial(t, client.h, "tcp4", b.at(2, 7)), dial(t, client.h, "udp4", b.at(2, 7))
	a.silence()
	a.path.Close()
	a.path = nil

	// The counters are whoever's pinned them last.
	counter := func() (sum uint64) {
		m, err := ebpf.LoadPinnedMap(a.pins+"/counters", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		var cpus []uint64
		if err := m.Lookup(uint32(Egress)*uint32(reasons)+uint32(Hit), &cpus); err != nil {
			t.Fatal(err)
		}
		for _, n := range cpus {
			sum += n
		}
		return sum
	}
	hitting := func() bool {
		before := counter()
		time.Sleep(20 * time.Millisecond)
		return counter() > before
	}
	lost := during(t, tcp, udp, func() {
		for _, flows := range []int{0, 0, 77, 0, 0} {
			cmd := a.startAgent(b, flows)
			eventually(t, "hits", hitting)
			kill(t, cmd)
			if r := rand.IntN(2); r == 0 {
				eventually(t, "a stale heartbeat", func() bool { return !hitting() })
			}
		}
	})
	if lost != 0 {
		t.Errorf("%d datagrams lost", lost)
	}
	// What is left is taken over once more, for good.
	p, err := Open(a.options())
	if err != nil {
		t.Fatal(err)
	}
	a.path = p
	a.beat()
	during(t, tcp, udp, func() { eventually(t, "hits", hitting) })
	if n := a.path.Pods(); len(n) != 1 {
		t.Errorf("pods: %v", n)
	}
}

// An agent that was killed in the middle of a change leaves nothing that could be wrong.
func TestKilledInAChange(t *testing.T) {
	s := learned(t)
	s.here(func() {
		s.mustCheck(Egress, s.sent(unix.IPPROTO_UDP, 0, 64, udp(1000, 80, nil)), Hit)
		s.begin() // and never ends
		s.Close()
		p, err := Open(s.options())
		if err != nil {
			t.Fatal(err)
		}
		s.Path = p
		p.Heartbeat()
		if !p.Interrupted() {
			t.Error("the interrupted change is not noticed")
		}
		s.mustCheck(Egress, s.sent(unix.IPPROTO_UDP, 0, 64, udp(1000, 80, nil)), Outdated)
		s.relearn()
		s.mustCheck(Egress, s.sent(unix.IPPROTO_UDP, 0, 64, udp(1000, 80, nil)), Hit)
	})
}

// Of connections, only those go that the interrupted change was about.
func TestKilledKeepsConnections(t *testing.T) {
	s := learned(t)
	other := addr("10.1.0.77")
	s.here(func() {
		must(t, s.putPod(other, s.podInfo, s.control.Generation)) // on an interface that exists
		for i, pod := range []netip.Addr{podA, other} {
			there, back := netlink.IPTuple{Protocol: unix.IPPROTO_UDP, SrcIP: pod.AsSlice(), DstIP: podB.AsSlice(), SrcPort: uint16(5000 + i), DstPort: 80}, netlink.IPTuple{}
			back.Protocol, back.SrcIP, back.DstIP, back.SrcPort, back.DstPort = there.Protocol, there.DstIP, there.SrcIP, there.DstPort, there.SrcPort
			must(t, s.nl.ConntrackCreate(netlink.ConntrackTable, unix.AF_INET, &netlink.ConntrackFlow{FamilyType: unix.AF_INET, Forward: there, Reverse: back, TimeOut: 100}))
		}
		known := func() (addrs []string) {
			flows, err := s.nl.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
			must(t, err)
			for _, f := range flows {
				addrs = append(addrs, f.Forward.SrcIP.String())
			}
			slices.Sort(addrs)
			return addrs
		}
		if all := known(); len(all) != 2 {
			t.Fatalf("%v", all)
		}
		s.begin() // and never ends
		must(t, s.void(Change{Pods: []netip.Addr{podA}}))
		s.Close()
		p, err := Open(s.options())
		must(t, err)
		s.Path = p
		if left := known(); !p.Interrupted() || !slices.Equal(left, []string{other.String()}) {
			t.Errorf("left: %v", left)
		}
	})
}

// Caches are kept from one process to the next, and given up when anything about them is different.
func TestOpenKeepsOrReplaces(t *testing.T) {
	s := learned(t)
	packet := s.sent(unix.IPPROTO_UDP, 0, 64, udp(1000, 80, nil))
	reopen := func(o Options) {
		t.Helper()
		s.Close()
		p, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		s.Path = p
		p.Heartbeat()
	}
	s.here(func() {
		reopen(s.options())
		s.mustCheck(Egress, packet, Hit)
		o := s.options()
		o.TCPLease += time.Second
		reopen(o)
		s.mustCheck(Egress, packet, Outdated)
		s.relearn()
		s.mustCheck(Egress, packet, Hit)
		o.Flows++
		reopen(o)
		s.mustCheck(Egress, packet, Disabled)
		if len(s.Pods()) != 0 || len(s.Nodes()) != 0 {
			t.Errorf("pods %v and nodes %v of maps that do not fit", s.Pods(), s.Nodes())
		}
		if _, err := link.LoadPinnedLink(s.pinName(Egress, s.podInfo.Index), nil); err == nil {
			t.Error("a program with the old maps is still attached")
		}
		// A map of another version.
		s.control.Abi = abi + 1
		s.Enable(true)
		reopen(o)
		s.mustCheck(Egress, packet, Disabled)
	})
}

func TestRefusals(t *testing.T) {
	s := newSingle(t)
	run(t, s.h, "ip link add v0 type veth peer name v1 && ip link set v0 mtu 500; ip tuntap add dev raw0 mode tun")
	for name, err := range map[string]error{
		"no such interface":       s.AttachNIC("nowhere"),
		"no Ethernet interface":   s.AttachNIC("raw0"),
		"too small an interface":  s.AttachNIC("v0"),
		"a pod without MACs":      s.AttachPod(Pod{Addrs: []netip.Addr{addr("10.1.0.9")}, Index: s.podInfo.Index}),
		"a pod without interface": s.AttachPod(Pod{Addrs: []netip.Addr{addr("10.1.0.9")}, Index: 999, MAC: deviceMAC, Gateway: deviceMAC}),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if p := s.Pods(); len(p) != 1 {
		t.Errorf("pods after refusals: %v", p)
	}
	for name, change := range map[string]func(*Options){
		"IPv6 node": func(o *Options) { o.Node = addr("fd00::1") },
		"no MAC":    func(o *Options) { o.MAC = nil },
		"VNI":       func(o *Options) { o.VNI = 1 << 24 },
		"no pins":   func(o *Options) { o.Pins = "" },
		"no bpffs":  func(o *Options) { o.Pins = t.TempDir() },
	} {
		o := s.options()
		change(&o)
		if p, err := Open(o); err == nil {
			p.Close()
			t.Errorf("%s: no error", name)
		} else {
			t.Log(name+":", err)
		}
	}
}
