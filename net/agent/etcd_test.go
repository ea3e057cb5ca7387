package agent_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"lamina/net/lab"
	"lamina/net/lab/cluster"
	"lamina/net/lab/etcdserver"

	"go.etcd.io/etcd/client/pkg/v3/transport"
)

// status waits until a node's status is as wanted.
func status(t *testing.T, what string, n *cluster.Node, peers int, problems ...string) {
	t.Helper()
	eventually(t, what, func() error {
		s, err := n.Status()
		if err != nil {
			return err
		}
		for _, want := range problems {
			if !slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, want) }) {
				return fmt.Errorf("problems %q, none has %q", s.Problems, want)
			}
		}
		if len(problems) == 0 && len(s.Problems) > 0 || len(s.Peers) != peers {
			return fmt.Errorf("problems %q, peers %v", s.Problems, s.Peers)
		}
		return nil
	})
}

// Nodes with leases in etcd: two take a prefix, one brings its own. While etcd is gone everything goes on, also pods that are
// made then and an agent that starts then.
func TestEtcd(t *testing.T) {
	var srv *etcdserver.Server
	var cert, key string
	c := cluster.From(t, 3, func(c *cluster.Cluster, h *lab.Host) []string {
		if srv == nil {
			cert, key = lab.Certificate(t, c.Outside.Addr)
			srv = etcdserver.New(t, fmt.Sprintf("https://%s:2379", c.Outside.Addr),
				transport.TLSInfo{CertFile: cert, KeyFile: key, TrustedCAFile: cert, ClientCertAuth: true}, c.Outside.Do)
		}
		args := []string{"--etcd", srv.URL, "--etcd-prefix", "/test/", "--etcd-ca", cert, "--etcd-cert", cert, "--etcd-key", key}
		switch h {
		case c.Hosts[0]: // by its default route
			h.Run("ip", "route", "add", "default", "via", c.Outside.Addr.String())
			return append(args, "--pod-network", "10.99.0.0/16")
		case c.Hosts[1]:
			return append(args, "--pod-network", "10.99.0.0/16", "--node-ip", h.Addr.String())
		default:
			return append(args, "--pod-cidr", "10.98.3.0/24", "--node-ip", h.Addr.String())
		}
	})
	n1, n2, n3 := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	for i, want := range []string{"10.99.0.0/24 on 192.168.77.1", "10.99.1.0/24 on 192.168.77.2", "10.98.3.0/24 on 192.168.77.3"} {
		s, err := c.Nodes[i].Status()
		must(t, err)
		if got := s.Node.Lease.String(); got != want {
			t.Errorf("lease is %s, not %s", got, want)
		}
		c.Nodes[i].Prefix = s.Node.Lease.Prefix
		status(t, "all know all", c.Nodes[i], 2)
	}
	p1, p2, p3 := n1.Pod(), n2.Pod(), n3.Pod()
	e2, e3 := p2.Echo(7000), p3.Echo(7000)
	talks(t, p1.Node, p2.Addr, e2, p1.Addr)
	talks(t, p2.Node, p3.Addr, e3, p2.Addr)
	conn, err := p1.Dial("tcp", netip.AddrPortFrom(p2.Addr, e2.Port))
	must(t, err)
	defer conn.Close()

	srv.Stop()
	must(t, conn.Exchange(10_000))
	gone := func(n *cluster.Node) {
		t.Helper()
		status(t, "without etcd", n, 2, "etcd "+srv.URL+": ", "is it running and reachable?")
	}
	gone(n1)
	late := n1.Pod()
	talks(t, late.Node, p2.Addr, e2, late.Addr)
	before := state(n2)
	n2.Kill()
	n2.Start()
	gone(n2)
	if now := state(n2); now != before {
		t.Errorf("an agent that starts without etcd: before:\n%s\nnow:\n%s", before, now)
	}
	late = n2.Pod()
	talks(t, late.Node, p3.Addr, e3, late.Addr)
	must(t, conn.Exchange(10_000))

	srv.Start()
	for _, n := range c.Nodes {
		status(t, "with etcd again", n, 2)
	}
	must(t, conn.Exchange(10_000))

	// A node that goes for good, and comes back.
	n3.Kill()
	srv.Delete("/test/10.98.3.0-24")
	status(t, "a node has gone", n1, 1)
	n3.Source = append(n3.Source, "--pod-cidr", n1.Prefix.String())
	if err := n3.Launch(); err == nil || !strings.Contains(err.Error(), "node 192.168.77.1 has 10.99.0.0/24: give this node another prefix") {
		t.Errorf("another node's prefix: %v", err)
	}
	n3.Source = n3.Source[:len(n3.Source)-2]
	n3.Start()
	status(t, "it is back", n1, 2)
	talks(t, p1.Node, p3.Addr, e3, p1.Addr)
	must(t, conn.Exchange(10_000))
}
