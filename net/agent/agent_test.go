package agent_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"lamina/cmd/lamina/cli"
	"lamina/net/control"
	"lamina/net/lab"
	"lamina/net/lab/cluster"
)

func TestMain(m *testing.M) { os.Exit(cluster.MainAs(m, cli.Main)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until f has nothing to say, for as long as a busy machine may take.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// talks checks that from reaches to and is seen there as seen.
func talks(t testing.TB, from *lab.Node, to netip.Addr, e *lab.Echo, seen netip.Addr) {
	t.Helper()
	defer func(b time.Time) {
		if time.Since(b) > 500*time.Millisecond {
		}
	}(time.Now())
	who, err := from.Talk(to, e, 3)
	if err != nil {
		t.Error(err)
	} else if who != seen {
		t.Errorf("%s to %s was seen as %s, not %s", from.Name, to, who, seen)
	}
}

// Every pod reaches every pod, on its own host and on others, and is seen with its own address.
func TestPodToPod(t *testing.T) {
	c := cluster.New(t, 3)
	var pods []*cluster.Pod
	for _, n := range c.Nodes {
		pods = append(pods, n.Pod(), n.Pod())
	}
	for _, to := range pods {
		e := to.Echo(7000)
		for _, from := range pods {
			talks(t, from.Node, to.Addr, e, from.Addr)
		}
	}
}

// Hosts and the outside: only what leaves the pod network is masqueraded.
func TestHosts(t *testing.T) {
	c := cluster.New(t, 2)
	n1, n2 := c.Nodes[0], c.Nodes[1]
	p1, p2 := n1.Pod(), n2.Pod()
	inside := func(n *cluster.Node) netip.Addr { return n.Prefix.Addr().Next() }
	host1, host2, out, pod1, pod2 := n1.Echo(7000), n2.Echo(7000), c.Outside.Echo(7000), p1.Echo(7000), p2.Echo(7000)

	talks(t, p1.Node, n1.Addr, host1, p1.Addr) // own host
	// By its address among pods, of which a server on UDP that listens on all addresses knows nothing when it answers.
	if who, err := p1.TalkOver([]string{"tcp"}, inside(n1), host1, 3); err != nil || who != p1.Addr {
		t.Errorf("pod to its gateway: seen as %s, %v", who, err)
	}
	talks(t, p1.Node, n2.Addr, host2, n1.Addr)      // another host is outside the pod network
	talks(t, p1.Node, inside(n2), host2, p1.Addr)   // but not by its address among pods
	talks(t, p1.Node, c.Outside.Addr, out, n1.Addr) // masqueraded
	talks(t, n1.Node, p1.Addr, pod1, n1.Addr)       // host to its own pod
	talks(t, n1.Node, p2.Addr, pod2, inside(n1))    // and to another's
	talks(t, n2.Node, p1.Addr, pod1, inside(n2))

	// A pod cannot speak with another's address: the host drops it.
	p1.Run("ip", "addr", "add", "10.99.1.77/32", "dev", "eth0")
	p1.Run("ip", "route", "replace", p2.Addr.String(), "via", inside(n1).String(), "dev", "eth0", "onlink", "src", "10.99.1.77")
	if c, err := p1.Dial("udp", netip.AddrPortFrom(p2.Addr, pod2.Port)); err == nil {
		before := n1.Run("nstat", "-asz", "TcpExtIPReversePathFilter")
		_, err = c.Write([]byte("forged"))
		must(t, err)
		eventually(t, "a forged packet", func() error {
			if n1.Run("nstat", "-asz", "TcpExtIPReversePathFilter") == before {
				return fmt.Errorf("was not dropped")
			}
			return nil
		})
		c.Close()
	} else {
		t.Error(err)
	}
	// There is no way to a pod that does not exist.
	if out, err := n1.Command("ip", "route", "get", "10.99.1.200").CombinedOutput(); err == nil {
		t.Errorf("a pod that does not exist has a route: %s", out)
	}
}

// A pod reaches itself by a port of its host, and others reach it by that.
func TestHairpin(t *testing.T) {
	c := cluster.New(t, 2)
	n1 := c.Nodes[0]
	p1, sibling, p2 := n1.Pod(), n1.Pod(), c.Nodes[1].Pod()
	rules := filepath.Join(n1.Dir, "dnat.nft")
	must(t, os.WriteFile(rules, fmt.Appendf(nil, `table ip portmap { chain pre { type nat hook prerouting priority dstnat; ip daddr %s meta l4proto { tcp, udp } th dport 8080 dnat to %s:7000; }; }`, n1.Addr, p1.Addr), 0o600))
	n1.Run("nft", "-f", rules)
	e := p1.Echo(7000)
	e.Port = 8080
	talks(t, p1.Node, n1.Addr, e, n1.Addr)
	talks(t, sibling.Node, n1.Addr, e, sibling.Addr)
	talks(t, c.Outside.Node, n1.Addr, e, c.Outside.Addr)
	talks(t, p2.Node, n1.Addr, e, c.Nodes[1].Addr)
}

// What somebody deletes or changes comes back at once, and connections go on.
func TestRepair(t *testing.T) {
	c := cluster.New(t, 2)
	n1, n2 := c.Nodes[0], c.Nodes[1]
	p1, p2 := n1.Pod(), n2.Pod()
	e := p2.Echo(7000)
	conn, err := p1.Dial("tcp", netip.AddrPortFrom(p2.Addr, e.Port))
	must(t, err)
	defer conn.Close()
	before := state(n1)
	if s, err := n1.Status(); err != nil || s.Repairs != 0 {
		t.Errorf("repairs of a new pod: %+v, %v", s.Repaired, err)
	}
	mac2 := "0e:6c:c0:a8:4d:02"
	for _, command := range []string{
		"ip link del lamina0",
		"ip link set lamina0 down",
		"ip link set lamina0 mtu 1300",
		"ip link set lamina0 address 02:00:00:00:00:01",
		"ip addr flush dev lamina0",
		"ip addr add 10.99.9.9/32 dev lamina0",
		"ip route del " + n2.Prefix.String(),
		"ip route replace unreachable " + n2.Prefix.String(),
		"ip route del unreachable " + n1.Prefix.String(),
		"ip route del " + p1.Addr.String(),
		"ip link set " + p1.Host + " down",
		"ip neigh del 10.99.2.1 dev lamina0",
		"ip neigh replace 10.99.2.1 lladdr 02:00:00:00:00:01 dev lamina0 nud permanent",
		"ip neigh del " + p1.Addr.String() + " dev " + p1.Host,
		"bridge fdb del " + mac2 + " dev lamina0 dst " + n2.Addr.String(),
		"bridge fdb replace " + mac2 + " dev lamina0 dst 192.168.77.99",
		"bridge fdb add 02:00:00:00:00:02 dev lamina0 dst 192.168.77.99",
		"nft delete table inet lamina",
		"nft flush table inet lamina",
		"nft flush set inet lamina pods",
		"nft delete element inet lamina pods { " + n2.Prefix.String() + " }",
		"nft insert rule inet lamina forward drop",
	} {
		s, err := n1.Status()
		must(t, err)
		words := strings.Fields(command)
		n1.Run(words[0], words[1:]...)
		eventually(t, command, func() error {
			if now := state(n1); now != before {
				return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
			}
			return nil
		})
		if err := conn.Exchange(10_000); err != nil {
			t.Fatalf("%s: an open connection: %v", command, err)
		}
		talks(t, p1.Node, p2.Addr, e, p1.Addr)
		now, err := n1.Status()
		must(t, err)
		if now.Repairs <= s.Repairs || len(now.Repaired) == 0 || len(now.Problems) > 0 {
			t.Errorf("%s: repairs %d and before %d, problems %q", command, now.Repairs, s.Repairs, now.Problems)
		}
	}
}

// state is all that the overlay has on a host, as the tools show it, in an order of its own.
func state(n *cluster.Node) string {
	var all []string
	for _, command := range []string{"ip -o -d link show type vxlan", "ip -o -4 addr", "ip -4 route", "ip -4 neigh show nud permanent", "bridge fdb show dev lamina0", "nft list ruleset"} {
		words := strings.Fields(command)
		out, err := n.Command(words[0], words[1:]...).CombinedOutput()
		lines := strings.Split(string(out), "\n")
		if words[0] == "ip" && words[1] == "-o" { // numbers of interfaces and their counters
			for i, line := range lines {
				_, lines[i], _ = strings.Cut(line, ":")
			}
		}
		if words[0] == "nft" {
			lines = blocks(lines)
		}
		slices.Sort(lines)
		all = append(all, fmt.Sprintf("%s (%v)\n%s", command, err, strings.Join(lines, "\n")))
	}
	return strings.Join(all, "\n")
}

// blocks are the sets, maps and chains in a table's listing. The kernel lists them as they were made, which after a repair is
// in another order.
func blocks(lines []string) []string {
	inside := slices.DeleteFunc(lines, func(line string) bool { return line != "" && !strings.HasPrefix(line, "\t") })
	return strings.Split(strings.Trim(strings.Join(inside, "\n"), "\n"), "\n\n")
}

// Peers come and go with the file; a file that cannot be used changes nothing.
func TestPeersFile(t *testing.T) {
	c := cluster.New(t, 3)
	n1, n2, n3 := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	p1, p2, p3 := n1.Pod(), n2.Pod(), n3.Pod()
	e2, e3 := p2.Echo(7000), p3.Echo(7000)
	lines := c.PeerLines()
	peers := func(want int) func() error {
		return func() error {
			s, err := n1.Status()
			if err == nil && (len(s.Peers) != want || slices.ContainsFunc(s.Problems, func(p string) bool { return strings.HasPrefix(p, "peers") })) {
				err = fmt.Errorf("peers %v, problems %v", s.Peers, s.Problems)
			}
			return err
		}
	}

	c.WritePeers(lines[:2]...)
	eventually(t, "two nodes", peers(1))
	talks(t, p1.Node, p2.Addr, e2, p1.Addr)
	if got := n1.Run("ip", "route", "show", n3.Prefix.String()); got != "" {
		t.Errorf("a node that has gone has a route: %s", got)
	}
	c.WritePeers(lines...)
	eventually(t, "three nodes", peers(2))
	eventually(t, "the third node's own", func() error { _, err := p1.Talk(p3.Addr, e3, 1); return err })

	for _, bad := range []struct{ line, want string }{
		{"10.99.2.128/25 192.168.77.9", "overlaps 10.99.2.0/24 on 192.168.77.2"},
		{"10.99.0.0/16 192.168.77.9", "overlaps this node's own prefix 10.99.1.0/24"},
		{"10.99.9.0/24 192.168.77.1", "192.168.77.1 is this node's own address"},
		{"10.99.9.0/24 192.168.77.2", "a node has one prefix"},
		{"10.99.9.0/24 192.168.77.9 0e:6c:c0:a8:4d:02", "the same MAC"},
		{"192.168.77.0/24 192.168.77.9", "contains the address of node"},
		{"10.99.9.1/24 192.168.77.9", "peers:4: 10.99.9.1/24 on 192.168.77.9: the prefix has bits of a host in it: write 10.99.9.0/24"},
		{"10.99.9.0/24", "peers:4: \"10.99.9.0/24\": a line is PREFIX NODE [MAC]"},
		{"10.99.9.0/24 host9", "peers:4: \"host9\" is not an address"},
		{"10.99.9.0/24 192.168.77.9 01:00:00:00:00:01", "is not a unicast Ethernet address"},
		{"fd00::/64 192.168.77.9", "only IPv4"},
	} {
		before := state(n1)
		c.WritePeers(append(slices.Clone(lines), bad.line)...)
		eventually(t, bad.line, func() error {
			s, err := n1.Status()
			if err == nil && (len(s.Problems) != 1 || !strings.Contains(s.Problems[0], bad.want) || !strings.Contains(s.Problems[0], c.Peers)) {
				err = fmt.Errorf("problems %q, not %q", s.Problems, bad.want)
			}
			return err
		})
		if now := state(n1); now != before {
			t.Errorf("%s changed something: before:\n%s\nnow:\n%s", bad.line, before, now)
		}
		talks(t, p1.Node, p2.Addr, e2, p1.Addr)
	}
	must(t, os.Remove(c.Peers))
	eventually(t, "no file", func() error {
		s, err := n1.Status()
		if err == nil && (len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "no such file")) {
			err = fmt.Errorf("problems %q", s.Problems)
		}
		return err
	})
	talks(t, p1.Node, p3.Addr, e3, p1.Addr)
	c.WritePeers(lines...)
	eventually(t, "in order again", peers(2))
}

// An agent that is killed leaves everything as it is, and the next one changes nothing.
func TestKill(t *testing.T) {
	c := cluster.New(t, 2)
	n1, n2 := c.Nodes[0], c.Nodes[1]
	p1, p2 := n1.Pod(), n2.Pod()
	e := p2.Echo(7000)
	const connections = 8
	errs, stop := make(chan error, connections), make(chan bool)
	rounds := make(chan bool, 1<<20)
	for range connections {
		conn, err := p1.Dial("tcp", netip.AddrPortFrom(p2.Addr, e.Port))
		must(t, err)
		defer conn.Close()
		go func() {
			for {
				if err := conn.Exchange(20_000); err != nil {
					errs <- err
					return
				}
				rounds <- true
				select {
				case <-stop:
					errs <- nil
					return
				default:
				}
			}
		}()
	}
	before, handles := state(n1), n1.Run("nft", "-a", "list", "table", "inet", "lamina")
	index := n1.Run("cat", "/proc/net/dev_snmp6/lamina0")[:20]
	for range 5 {
		n1.Kill()
		<-rounds
		talks(t, p1.Node, p2.Addr, e, p1.Addr) // also a new connection
		n1.Start()
		if s, err := n1.Status(); err != nil || s.Repairs != 0 || s.Pods != 1 {
			t.Errorf("after a restart: %d repairs, %d pods, %v", s.Repairs, s.Pods, err)
		}
	}
	close(stop)
	for range connections {
		if err := <-errs; err != nil {
			t.Errorf("a connection over kills of the agent: %v", err)
		}
	}
	if now := state(n1); now != before {
		t.Errorf("before:\n%s\nnow:\n%s", before, now)
	}
	if n1.Run("nft", "-a", "list", "table", "inet", "lamina") != handles || n1.Run("cat", "/proc/net/dev_snmp6/lamina0")[:20] != index {
		t.Error("a restart made rules or the device anew")
	}
}

// The MTU is the underlay's less the overhead, follows it, and can be set.
func TestMTU(t *testing.T) {
	c := cluster.New(t, 2)
	n1 := c.Nodes[0]
	mtu := func(n *lab.Node, dev string) string {
		_, after, _ := strings.Cut(n.Run("ip", "link", "show", dev), " mtu ")
		return strings.Fields(after)[0]
	}
	p := n1.Pod()
	if got := mtu(n1.Node, "lamina0") + " " + mtu(p.Node, "eth0") + " " + mtu(n1.Node, p.Host); got != "1450 1450 1450" {
		t.Errorf("MTU of device and pod: %s", got)
	}
	n1.Run("ip", "link", "set", lab.Nic, "mtu", "1400")
	eventually(t, "a smaller underlay", func() error {
		if got := mtu(n1.Node, "lamina0"); got != "1350" {
			return fmt.Errorf("MTU %s", got)
		}
		return nil
	})
	if got := mtu(n1.Pod().Node, "eth0"); got != "1350" {
		t.Errorf("MTU of a new pod: %s", got)
	}
	n1.Kill()
	n1.Args = []string{"--mtu", "1200"}
	n1.Start()
	if got := mtu(n1.Node, "lamina0"); got != "1200" {
		t.Errorf("--mtu 1200: %s", got)
	}
	n1.Kill()
	n1.Args = []string{"--mtu", "1400"}
	if err := n1.Launch(); err == nil || !strings.Contains(err.Error(), "phys0 has 1400 and VXLAN needs 50 of it: use 576 to 1350") {
		t.Errorf("--mtu 1400: %v", err)
	}
}

// A start that cannot work says why, and leaves nothing.
func TestBadStart(t *testing.T) {
	c := cluster.New(t, 1)
	n := c.Nodes[0]
	p := n.Pod()
	n.Kill()
	working := state(n)
	good := n.Args
	start := func(want string, args ...string) {
		t.Helper()
		n.Args = append(slices.Clone(good), args...)
		err := n.Launch()
		if err == nil {
			n.Kill()
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Count(strings.TrimSpace(err.Error()), "\n") > 0 {
			t.Errorf("%q: %v, not %q", args, err, want)
		}
	}
	e := p.Echo(7000)
	unchanged := func(want string) {
		t.Helper()
		if now := state(n); now != want {
			t.Errorf("changed: before:\n%s\nnow:\n%s", want, now)
		}
		talks(t, n.Node, p.Addr, e, n.Addr)
	}
	start("no interface of this host has it", "--node-ip", "192.168.77.99", "--pod-cidr", "10.99.1.0/24")
	start("not an address", "--node-ip", "x")
	start("is not a prefix", "--pod-cidr", "10.99.1.0")
	start("VNI 16777216", "--vni", "16777216")
	start("is this node's own address", "--pod-cidr", "10.98.0.0/16")
	start("this host has a route to 192.168.77.0/24 on phys0", "--pod-cidr", "192.168.0.0/16", "--peers", "/dev/null", "--node-ip", n.Addr.String())
	start("no peer has an address of this host (", "--peers", "/dev/null")
	start("--peers is missing", "--peers", "")
	start("no such file", "--peers", "/nonexistent/peers")
	unchanged(working)

	// Without anything of ours on the host.
	n.Run("ip", "link", "del", "lamina0")
	n.Run("nft", "delete", "table", "inet", "lamina")
	n.Run("ip", "route", "flush", "proto", "108", "type", "unreachable")
	n.Run("ip", "link", "add", "lamina0", "type", "bridge")
	clean := state(n)
	start("device lamina0: already in use: it is a bridge that Lamina did not make")
	unchanged(clean)
	n.Run("ip", "link", "del", "lamina0")
	n.Run("ip", "link", "add", "flannel.1", "type", "vxlan", "id", "1", "dstport", "4789", "dev", lab.Nic)
	clean = state(n)
	start("VNI 1 on port 4789: already in use by flannel.1: use another with --vni or --port on all nodes")
	unchanged(clean)
	n.Run("ip", "link", "add", "lamina0", "type", "vxlan", "id", "7", "dstport", "8472", "dev", lab.Nic)
	clean = state(n)
	start("it is a vxlan that Lamina did not make")
	unchanged(clean)
	n.Run("ip", "link", "del", "lamina0")
	n.Run("ip", "link", "add", "cni0", "type", "bridge")
	n.Run("ip", "addr", "add", "10.99.1.1/25", "dev", "cni0")
	n.Run("ip", "link", "set", "cni0", "up")
	clean = state(n)
	start("pod prefix 10.99.1.0/24 on 192.168.77.1: already in use: this host has a route to 10.99.1.0/25 on cni0")
	unchanged(clean)
	n.Run("ip", "link", "del", "cni0")
	n.Args = []string{"--vni", "2"}
	n.Start()

	// One agent at a time.
	running := n.Socket()
	out, err := n.Command(cluster.Bin(t)+"/lamina", "net", "agent", "--peers", c.Peers, "--socket", running, "--state", n.State()).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another lamina listens on it") {
		t.Errorf("a second agent: %v %s", err, out)
	}
}

// Established connections take the fast path, and go on when it is switched off and on, when peers come and go, and when the
// agent is killed for longer than its heartbeat lasts.
func TestFastPath(t *testing.T) {
	c := cluster.New(t, 2, "--fastpath", "on")
	n1, n2 := c.Nodes[0], c.Nodes[1]
	p1, p2 := n1.Pod(), n2.Pod()
	e := p2.Echo(7000)
	var conns []*lab.Conn
	for _, network := range []string{"tcp", "udp"} {
		conn, err := p1.Dial(network, netip.AddrPortFrom(p2.Addr, e.Port))
		must(t, err)
		defer conn.Close()
		conns = append(conns, conn)
	}
	exchange := func(what string, rounds int) {
		t.Helper()
		for range rounds {
			for _, conn := range conns {
				if err := conn.Exchange(1300); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
		}
	}
	hits := func(n *cluster.Node) float64 {
		s, err := n.Status()
		must(t, err)
		f := s.Parts["fastpath"].(map[string]any)
		if f["state"] != "on" {
			t.Fatalf("fast path: %v", f["state"])
		}
		counters := f["counters"].(map[string]any)
		one := func(prog string) float64 {
			m, _ := counters[prog].(map[string]any)
			v, _ := m["hit"].(float64)
			return v
		}
		return one("egress") + one("ingress")
	}
	used := func(what string) {
		t.Helper()
		before := hits(n1) + hits(n2)
		exchange(what, 100)
		if got := hits(n1) + hits(n2) - before; got < 400 { // of about 800
			t.Errorf("%s: %v packets were served", what, got)
		}
	}
	exchange("learning", 20)
	used("first")

	// A host that another program's ordinary path would never see again: the peer goes and comes back.
	c.WritePeers(c.PeerLines()[0])
	eventually(t, "a peer that has gone", func() error {
		s, err := n1.Status()
		if err == nil && len(s.Peers) > 0 {
			err = fmt.Errorf("peers %v", s.Peers)
		}
		return err
	})
	if conns[1].Answered() {
		t.Error("a peer that has gone still answers")
	}
	c.WritePeers(c.PeerLines()...)
	eventually(t, "a peer that is back", func() error {
		s, err := n1.Status()
		if err == nil && len(s.Peers) != 1 {
			err = fmt.Errorf("peers %v", s.Peers)
		}
		return err
	})
	exchange("learning again", 20)
	used("a peer that is back")

	// The MTU of the underlay.
	for _, mtu := range []string{"1400", "1500"} {
		for _, n := range c.Nodes {
			n.Run("ip", "link", "set", lab.Nic, "mtu", mtu)
		}
		exchange("MTU "+mtu, 30)
	}
	used("the old MTU")

	// The agent is away.
	n1.Kill()
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); {
		exchange("without the agent", 5)
	}
	n1.Start()
	exchange("learning after a restart", 20)
	used("after a restart")

	// Switched off, and on.
	for _, mode := range []string{"off", "on"} {
		n1.Kill()
		n1.Args = []string{"--fastpath", mode}
		n1.Start()
		exchange(mode, 50)
	}
	used("switched on again")

	// A pod whose address another one gets.
	must(t, p2.Del())
	if conns[1].Answered() {
		t.Error("a pod that is deleted still answers")
	}
}

// lamina net status says what there is and what is wrong, to people and to programs.
func TestStatus(t *testing.T) {
	c := cluster.New(t, 2)
	n := c.Nodes[0]
	p := n.Pod()
	status := func(want int, args ...string) string {
		t.Helper()
		cmd := n.Command(cluster.Bin(t)+"/lamina", append([]string{"net", "status", "--socket", n.Socket()}, args...)...)
		out, _ := cmd.Output()
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Errorf("lamina net status %v: exit status %d, not %d: %s", args, code, want, out)
		}
		return string(out)
	}
	for _, want := range []string{"192.168.77.1 on phys0 (MTU 1500)", "1 in 10.99.1.0/24, gateway 10.99.1.1, MTU 1450", "1 of 253 leased", "lamina0, VNI 1, port 4789",
		c.Peers, "192.168.77.2  10.99.2.0/24  0e:6c:c0:a8:4d:02  ok"} {
		if out := status(0); !strings.Contains(out, want) {
			t.Errorf("%q is not in:\n%s", want, out)
		}
	}
	var s control.Status
	must(t, json.Unmarshal([]byte(status(0, "--json")), &s))
	if s.Pods != 1 || len(s.Peers) != 1 || s.Peers[0].State != "ok" || s.Node.MTU != 1450 || len(s.Problems) != 0 || s.Addresses.Leased != 1 {
		t.Errorf("%+v", s)
	}

	// A damaged lease is a problem, and nobody's but its pod's.
	leases, err := n.Pool().List()
	must(t, err)
	file := filepath.Join(n.Pool().Dir, p.Addr.String()+"."+leases[0].ID)
	must(t, os.WriteFile(file, []byte("{"), 0o600))
	n.Kill()
	n.Start()
	if out := status(1); !strings.Contains(out, "PROBLEM") || !strings.Contains(out, file) {
		t.Errorf("a damaged lease: %s", out)
	}
	talks(t, n.Pod().Node, p.Addr, p.Echo(7000), netip.MustParseAddr("10.99.1.3"))
	n.Run("ip", "route", "del", p.Addr.String())
	eventually(t, "the route of a pod with a damaged lease", func() error {
		if n.Run("ip", "route", "show", p.Addr.String()) == "" {
			return errors.New("is missing")
		}
		return nil
	})
}
