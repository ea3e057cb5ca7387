package agent_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"lamina/doctor"
	"lamina/net/control"
	"lamina/net/lab/cluster"
)

// The doctor finds nothing wrong with a node that works, and what is wrong with one that does not.
func TestDoctor(t *testing.T) {
	c := cluster.New(t, 2)
	n := c.Nodes[0]
	lamina := filepath.Join(cluster.Bin(t), "lamina")
	// A machine that has what this one has, and the node's agent and configuration in their usual places.
	root := t.TempDir()
	link := func(to, path string) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(root+path), 0o755))
		must(t, os.Symlink(to, root+path))
	}
	for _, dir := range []string{"/proc", "/sys", "/usr/sbin", "/lib"} {
		link(dir, dir)
	}
	link(n.Socket(), control.Socket)
	link(cluster.Bin(t), "/opt/cni/bin")
	must(t, os.MkdirAll(root+"/etc/cni/net.d", 0o755))
	b, err := os.ReadFile(filepath.Join(n.Dir, "net.d", "10-lamina.conflist"))
	must(t, err)
	must(t, os.WriteFile(root+"/etc/cni/net.d/10-lamina.conflist", b, 0o644))
	n.Run("sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=30")

	examine := func() map[string]doctor.Finding {
		t.Helper()
		out, _ := n.Command(lamina, "doctor", "--only", "net", "--json", "--root", root).Output()
		var report struct{ Findings []doctor.Finding }
		must(t, json.Unmarshal(out, &report))
		all := map[string]doctor.Finding{}
		for _, f := range report.Findings {
			all[f.Check] = f
		}
		return all
	}
	expect := func(check string, level doctor.Level, says string) {
		t.Helper()
		if f := examine()[check]; f.Level != level || !strings.Contains(f.Found+f.Cost+f.Fix, says) {
			t.Errorf("%+v, not %s and %q", f, level, says)
		}
	}
	for _, f := range examine() {
		if f.Level != doctor.OK {
			t.Errorf("nothing is wrong, but %+v", f)
		}
	}
	expect("net-agent", doctor.OK, "0 pods, 1 peers")

	// Its remedy for a firewall is one.
	n.Run("nft", "add table ip filter")
	n.Run("nft", "add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
	p1, p2 := n.Pod(), c.Nodes[1].Pod()
	e := p2.Echo(7000)
	defer e.Close()
	ping := func() error { return p1.Command("ping", "-c", "1", "-W", "1", p2.Addr.String()).Run() }
	if ping() == nil {
		t.Error("the firewall drops nothing")
	}
	expect("net-firewall", doctor.Broken, "FORWARD of table ip filter")
	fix := examine()["net-firewall"].Fix
	n.Run("sh", "-ec", fix)
	expect("net-firewall", doctor.OK, "no other table")
	if err := ping(); err != nil {
		t.Errorf("after %s: %v", fix, err)
	}
	n.Run("nft", "flush chain ip filter FORWARD")
	n.Run("nft", "delete chain ip filter FORWARD")
	n.Run("nft", "add chain ip filter own { type filter hook forward priority 0; policy drop; }")
	n.Run("sh", "-ec", examine()["net-firewall"].Fix)
	expect("net-firewall", doctor.OK, "no other table")

	n.Run("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_be_liberal=0")
	expect("net-liberal", doctor.Costs, "be_liberal=1")
	n.Run("sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=4")
	expect("net-udp-timeout", doctor.Costs, "is 4 s")
	must(t, os.Remove(c.Peers))
	eventually(t, "the problem is found", func() error {
		if s, err := n.Status(); err != nil || len(s.Problems) == 0 {
			return os.ErrNotExist
		}
		return nil
	})
	expect("net-problem", doctor.Broken, "no such file")
	c.WritePeers(c.PeerLines()...)
	n.Kill()
	expect("net-agent", doctor.Broken, "start it")
	must(t, os.Remove(root+control.Socket))
	n.Args = append(n.Args, "--fastpath", "off")
	n.Start()
	link(n.Socket(), control.Socket)
	expect("net-fastpath", doctor.Costs, "off")
}
