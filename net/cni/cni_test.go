package cni_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lamina/cmd/lamina/cli"
	"lamina/net/control"
	"lamina/net/ipam"
	"lamina/net/lab/cluster"
)

func TestMain(m *testing.M) { os.Exit(cluster.MainAs(m, cli.Main)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// interfaces are the ends of pods' links that are on a node.
func interfaces(n *cluster.Node) []string {
	var names []string
	for line := range strings.Lines(n.Run("ip", "-o", "link", "show", "type", "veth")) {
		if name := strings.TrimSuffix(strings.Fields(line)[1], ":"); strings.HasPrefix(name, "lam") {
			name, _, _ = strings.Cut(name, "@")
			names = append(names, name)
		}
	}
	return names
}

// empty checks that nothing of a pod's is left.
func empty(t testing.TB, n *cluster.Node) {
	t.Helper()
	leases, err := n.Pool().List()
	must(t, err)
	if got := interfaces(n); len(leases)+len(got) > 0 {
		t.Errorf("left: leases %v, interfaces %v", leases, got)
	}
	if got := n.Run("ip", "route", "show", "proto", "108", "type", "unicast", "scope", "link"); got != "" {
		t.Errorf("left: routes %s", got)
	}
	if s, err := n.Status(); err == nil && s.Pods > 0 {
		t.Errorf("left: the agent knows %d pods", s.Pods)
	}
}

func fails(t testing.TB, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %q", want)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v: does not say %q", err, w)
		}
	}
}

// Every verb by cnitool, with results of every version.
func TestVerbs(t *testing.T) {
	c := cluster.New(t, 1)
	n := c.Nodes[0]
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		n.Configure(version)
		p := n.Namespace()
		out, err := p.Cnitool("add")
		must(t, err)
		var r struct {
			CNIVersion string
			Interfaces []struct {
				Name, Mac, Sandbox string
				Mtu                int
			}
			IPs []struct {
				Version, Address, Gateway string
				Interface                 int
			}
			Routes []struct{ Dst, GW string }
		}
		must(t, json.Unmarshal(out, &r))
		if r.CNIVersion != version || len(r.Interfaces) != 2 || len(r.IPs) != 1 || len(r.Routes) != 1 || r.Interfaces[1].Sandbox != p.Path ||
			r.Interfaces[1].Name != "eth0" || r.IPs[0].Interface != 1 || r.IPs[0].Gateway != "10.99.1.1" || !strings.HasSuffix(r.IPs[0].Address, "/32") ||
			r.Routes[0].Dst != "0.0.0.0/0" || r.Routes[0].GW != "10.99.1.1" {
			t.Errorf("%s: %s", version, out)
		}
		if old := version == "0.4.0"; (r.IPs[0].Version == "4") != old || (r.Interfaces[1].Mtu == 1450) == old {
			t.Errorf("%s: %s", version, out)
		}
		if got := interfaces(n); len(got) != 1 || got[0] != r.Interfaces[0].Name || len(got[0]) != 14 {
			t.Errorf("%s: interfaces %v", version, got)
		}
		if _, err := p.Cnitool("check"); err != nil {
			t.Error(err)
		}
		if version == "1.1.0" {
			if _, err := p.Cnitool("status"); err != nil {
				t.Error(err)
			}
			// To cnitool's GC no attachment is valid.
			if _, err := p.Cnitool("gc"); err != nil {
				t.Error(err)
			}
			empty(t, n)
		}
		must(t, p.Del())
		must(t, p.Del())
		empty(t, n)
	}
	out, err := n.Plugin(`{"cniVersion": "1.1.0"}`, "CNI_COMMAND=VERSION")
	if err != nil || !strings.Contains(out, `["0.4.0","1.0.0","1.1.0"]`) {
		t.Errorf("VERSION: %s %v", out, err)
	}
}

// CHECK finds what is missing. The agent is stopped, or it would be there again.
func TestCheck(t *testing.T) {
	c := cluster.New(t, 1)
	n := c.Nodes[0]
	p := n.Pod()
	check := func(want string) {
		t.Helper()
		_, err := p.Cnitool("check")
		fails(t, err, want)
	}
	for _, broken := range []struct{ do, undo, want string }{
		{"ip addr del ADDR/32 dev eth0", "ip addr add ADDR/32 dev eth0", "address " + p.Addr.String() + " is missing"},
		{"ip link set eth0 mtu 1480", "ip link set eth0 mtu 1450", "MTU 1480, which is more than the 1450"},
		{"ip link set eth0 address 02:00:00:00:00:01", "ip link set eth0 address " + control.PodMAC(p.Addr).String(), "MAC 02:00:00:00:00:01"},
		{"ip link set eth0 name eth9", "ip link set eth9 name eth0", "eth0"},
	} {
		for i, command := range []string{broken.do, broken.undo} {
			words := strings.Fields(strings.ReplaceAll(command, "ADDR", p.Addr.String()))
			if strings.Contains(command, "name") {
				p.Run("ip", "link", "set", words[3], "down")
			}
			p.Run(words[0], words[1:]...)
			if i == 0 {
				check(broken.want)
			}
		}
	}
	p.Run("ip", "link", "set", "eth0", "up")
	p.Run("ip", "route", "replace", "10.99.1.1", "dev", "eth0")
	check("the default route by 10.99.1.1 is missing")
	p.Run("ip", "route", "replace", "default", "via", "10.99.1.1")
	if _, err := p.Cnitool("check"); err != nil {
		t.Error(err)
	}
	leases, err := n.Pool().List()
	must(t, err)
	file := filepath.Join(n.Pool().Dir, leases[0].Address.String()+"."+leases[0].ID)
	must(t, os.WriteFile(file, nil, 0o600))
	check("damaged lease")
	check(file)
}

// DEL succeeds whatever is left, and takes all of it away.
func TestDelete(t *testing.T) {
	c := cluster.New(t, 1)
	n := c.Nodes[0]
	add := func() *cluster.Pod {
		p := n.Namespace()
		_, err := p.Add()
		must(t, err)
		return p
	}
	del := func(p *cluster.Pod, without string) {
		t.Helper()
		if err := p.Del(); err != nil {
			t.Errorf("without %s: %v", without, err)
		}
		empty(t, n)
	}
	p := add()
	p.Run("ip", "link", "del", "eth0")
	del(p, "its interface")
	p = add()
	n.Run("ip", "netns", "del", p.Name)
	del(p, "its namespace")
	p = add()
	n.Kill()
	del(p, "the agent")
	n.Start()
	empty(t, n)
	del(n.Namespace(), "anything")

	// The environment of a runtime that has forgotten the namespace's path.
	p = add()
	leases, err := n.Pool().List()
	must(t, err)
	if out, err := n.Plugin(n.PluginConf("1.1.0"), "CNI_COMMAND=DEL", "CNI_CONTAINERID="+leases[0].Container, "CNI_IFNAME=eth0"); err != nil {
		t.Errorf("without a path: %v %s", err, out)
	}
	empty(t, n)
	del(p, "anything left")
}

// An ADD that cannot be says why, and leaves nothing.
func TestAddFails(t *testing.T) {
	c := cluster.New(t, 1)
	n := c.Nodes[0]
	p := n.Namespace()
	p.Run("ip", "link", "add", "eth0", "type", "bridge")
	_, err := p.Add()
	fails(t, err, "eth0", "has one of that name already")
	empty(t, n)

	env := func(path string) []string {
		return []string{"CNI_COMMAND=ADD", "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_NETNS=" + path}
	}
	plugin := func(conf, path string, want ...string) {
		t.Helper()
		out, err := n.Plugin(conf, env(path)...)
		if err == nil {
			t.Errorf("%s: no error", conf)
		}
		fails(t, errors.New(out), want...)
		empty(t, n)
	}
	plugin(n.PluginConf("1.1.0"), "/nonexistent", "/nonexistent", "no such file")
	plugin(n.PluginConf("1.1.0"), n.Path, "it is the host's own")
	plugin(n.PluginConf("1.1.0", `"mtu": 10`), p.Path, "mtu 10: use 576")
	plugin(n.PluginConf("1.1.0", `"stateDir": "/elsewhere"`), p.Path, n.State(), `add \"stateDir\"`)
	plugin(n.PluginConf("1.1.0", `"socket": 7`), p.Path, "JSON")
	plugin(n.PluginConf("9.9.9"), p.Path, "version")
	n.Kill()
	plugin(n.PluginConf("1.1.0"), p.Path, n.Socket(), "no lamina net agent answers", `"code": 11`)
	if out, err := n.Plugin(n.PluginConf("1.1.0"), "CNI_COMMAND=STATUS"); err == nil || !strings.Contains(out, `"code": 50`) {
		t.Errorf("STATUS without an agent: %s", out)
	}
	if out, err := n.Plugin(n.PluginConf("1.1.0", `"cni.dev/valid-attachments": []`), "CNI_COMMAND=GC"); err != nil {
		t.Errorf("GC without an agent: %v %s", err, out)
	}
}

// A prefix that is full, and an agent that has a problem.
func TestStatus(t *testing.T) {
	c := cluster.New(t, 1)
	n := c.Nodes[0]
	status := func() string {
		out, err := n.Plugin(n.PluginConf("1.1.0"), "CNI_COMMAND=STATUS")
		if err == nil {
			return ""
		}
		return out
	}
	if got := status(); got != "" {
		t.Error(got)
	}
	p := n.Pod()
	for i := range n.Pool().Size() - 1 {
		_, err := n.Pool().Allocate(ipam.Pod{Container: fmt.Sprint("c", i), Interface: "eth0", Network: "other"})
		must(t, err)
	}
	if got := status(); !strings.Contains(got, `"code": 50`) || !strings.Contains(got, "all 253 addresses of 10.99.1.0/24 are leased") {
		t.Error(got)
	}
	_, err := n.Namespace().Add()
	fails(t, err, "10.99.1.0/24", "no address left", "larger prefix")
	if _, err := p.Cnitool("check"); err != nil { // pods that are there go on
		t.Error(err)
	}
	must(t, n.Pool().Release(ipam.Pod{Container: "c0", Interface: "eth0"}.ID()))
	_, err = n.Namespace().Add()
	fails(t, err, "released too recently")
	c.WritePeers("nonsense")
	deadline := time.Now().Add(10 * time.Second)
	for !strings.Contains(status(), `"code": 51`) {
		if time.Now().After(deadline) {
			t.Fatalf("with a problem: %q", status())
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.WritePeers(c.PeerLines()...)
}

// GC removes what no valid attachment has, of its own network only.
func TestGC(t *testing.T) {
	c := cluster.New(t, 1)
	n := c.Nodes[0]
	keep, lose, damaged := n.Pod(), n.Namespace(), n.Namespace()
	for _, p := range []*cluster.Pod{lose, damaged} {
		_, err := p.Add()
		must(t, err)
		t.Cleanup(func() { _ = p.Del() })
	}
	_, err := n.Pool().Allocate(ipam.Pod{Container: "x", Interface: "eth0", Network: "another"})
	must(t, err)
	orphan, err := n.Pool().Allocate(ipam.Pod{Container: "y", Interface: "eth0", Network: n.Network()})
	must(t, err)
	leases, err := n.Pool().List()
	must(t, err)
	byAddress := func(p *cluster.Pod) ipam.Lease {
		return leases[slices.IndexFunc(leases, func(l ipam.Lease) bool { return l.Address == p.Addr })]
	}
	spoil := func(l ipam.Lease) {
		must(t, os.WriteFile(filepath.Join(n.Pool().Dir, l.Address.String()+"."+l.ID), []byte("{"), 0o600))
	}
	spoil(byAddress(damaged)) // a pod uses it: it stays
	spoil(orphan)             // no pod uses it: it goes
	conf := n.PluginConf("1.1.0", fmt.Sprintf(`"cni.dev/valid-attachments": [{"containerID": %q, "ifname": "eth0"}]`, byAddress(keep).Container))
	out, err := n.Plugin(conf, "CNI_COMMAND=GC")
	if err != nil {
		t.Fatalf("GC: %v %s", err, out)
	}
	leases, err = n.Pool().List()
	must(t, err)
	var left []string
	for _, l := range leases {
		left = append(left, l.Address.String())
	}
	want := []string{keep.Addr.String(), damaged.Addr.String(), "10.99.1.5"}
	slices.Sort(want)
	slices.Sort(left)
	if !slices.Equal(left, want) {
		t.Errorf("leases %v, want %v", left, want)
	}
	if got := interfaces(n); len(got) != 2 || slices.Contains(got, lose.Host) {
		t.Errorf("interfaces %v", got)
	}
	if _, err := keep.Cnitool("check"); err != nil {
		t.Error(err)
	}
}

// Host ports by the reference plugin, chained: from outside, from other pods, from the pod itself.
func TestPortmap(t *testing.T) {
	c := cluster.New(t, 2)
	n := c.Nodes[0]
	for _, backend := range []string{"nftables"} {
		n.Configure("1.1.0", fmt.Sprintf(`{"type": "portmap", "backend": %q, "capabilities": {"portMappings": true}}`, backend))
		p := n.Pod(`CAP_ARGS={"portMappings": [{"hostPort": 8080, "containerPort": 7000, "protocol": "tcp"}, {"hostPort": 8080, "containerPort": 7000, "protocol": "udp"}]}`)
		e := p.Echo(7000)
		e.Port = 8080
		sibling, remote := n.Pod(), c.Nodes[1].Pod()
		for _, from := range []*cluster.Pod{p, sibling, remote} {
			if _, err := from.Talk(n.Addr, e, 3); err != nil {
				t.Errorf("%s: %v", backend, err)
			}
		}
		if who, err := c.Outside.Talk(n.Addr, e, 3); err != nil || who != c.Outside.Addr {
			t.Errorf("%s: from outside, seen as %s: %v", backend, who, err)
		}
		if _, err := p.Cnitool("check"); err != nil {
			t.Error(err)
		}
		must(t, p.Del())
		if rules := n.Run("nft", "list", "ruleset"); strings.Contains(rules, "8080") {
			t.Errorf("%s: after DEL: %s", backend, rules)
		}
	}
}

// Pods that come and go at once.
func TestConcurrent(t *testing.T) {
	c := cluster.New(t, 1)
	n := c.Nodes[0]
	var pods []*cluster.Pod
	for range 12 {
		pods = append(pods, n.Namespace())
	}
	each := func(f func(i int, p *cluster.Pod) error) {
		t.Helper()
		var wg sync.WaitGroup
		for i, p := range pods {
			wg.Go(func() {
				if err := f(i, p); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	each(func(_ int, p *cluster.Pod) error { _, err := p.Add(); return err })
	seen := map[string]bool{}
	for _, p := range pods {
		if seen[p.Addr.String()] {
			t.Errorf("%s twice", p.Addr)
		}
		seen[p.Addr.String()] = true
	}
	// Half go while the other half is used.
	each(func(i int, p *cluster.Pod) error {
		if i%2 == 0 {
			return p.Del()
		}
		_, err := p.Cnitool("check")
		return err
	})
	if got := interfaces(n); len(got) != len(pods)/2 {
		t.Errorf("interfaces %v", got)
	}
	each(func(_ int, p *cluster.Pod) error { return p.Del() })
	empty(t, n)
}
