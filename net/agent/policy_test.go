package agent_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/net/lab"
	"lamina/net/lab/cluster"

	"github.com/cilium/ebpf"
)

// The whole of it: agents, the CNI plugin, labels from CNI and from the pods file, across nodes; rules that come back when
// somebody flushes them, and stay when the agent is killed.
func TestPolicies(t *testing.T) {
	base := t.TempDir()
	dir, podsFile := filepath.Join(base, "policies"), filepath.Join(base, "pods.yaml")
	must(t, os.Mkdir(dir, 0o755))
	write := func(path, text string) {
		t.Helper()
		must(t, os.WriteFile(path+".new", []byte(text), 0o644))
		must(t, os.Rename(path+".new", path))
	}
	file := func(app string) {
		write(filepath.Join(dir, "server.yaml"), fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: %s}}}]}]
`, app))
	}
	file("other")
	c := cluster.New(t, 2, "--policies", dir, "--pods", podsFile)
	pod := func(n *cluster.Node, app string) *cluster.Pod {
		return n.Pod("CNI_ARGS=K8S_POD_NAMESPACE=shop;K8S_POD_NAME=" + app + ";LAMINA_LABELS=app:" + app)
	}
	server, other, far := pod(c.Nodes[0], "server"), pod(c.Nodes[0], "other"), pod(c.Nodes[1], "client")
	reaches := func(what string, from *cluster.Pod, want bool) {
		t.Helper()
		wait := "10" // seconds
		if !want {
			wait = "0.3"
		}
		out, err := from.Command("ping", "-c", "1", "-W", wait, server.Addr.String()).CombinedOutput()
		if (err == nil) != want {
			t.Errorf("%s: %s to the server: %v, want reached %v: %s", what, from.Name, err, want, out)
		}
	}
	reaches("first", other, true)
	reaches("first", far, false) // node 1 does not know what pod that is
	write(podsFile, "pods: [{namespace: shop, name: client, labels: {app: client}, addresses: ["+far.Addr.String()+"]}]")
	file("client")
	policies := func() map[string]any {
		s, err := c.Nodes[0].Status()
		must(t, err)
		return s.Parts["policies"].(map[string]any)
	}
	eventually(t, "the other pod is shut out", func() error {
		if rules := c.Nodes[0].Run("nft", "list", "table", "inet", "lamina"); policies()["pods"] != 3.0 || strings.Contains(rules, "pods app=other") {
			return fmt.Errorf("%v\n%s", policies(), rules)
		}
		return nil
	})
	reaches("changed", other, false)
	reaches("changed", far, true)

	// Flows that the caches carry end with what allowed them.
	echo := server.Echo(7000)
	defer echo.Close()
	flow, err := far.Dial("udp", netip.AddrPortFrom(server.Addr, 7000))
	must(t, err)
	defer flow.Close()
	answers := func(tries int) bool {
		b := make([]byte, 1<<16)
		for range tries {
			must(t, flow.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
			_, _ = flow.Write([]byte("turn"))
			if _, err := flow.Read(b); err == nil {
				return true
			}
		}
		return false
	}
	for range 200 {
		must(t, flow.Exchange(1000))
	}
	s, err := c.Nodes[0].Status()
	must(t, err)
	if f := s.Parts["fastpath"].(map[string]any); f["state"] == "on" && f["ingress_ratio"] == 0.0 {
		t.Errorf("200 turns of a flow, and no hit: %v", f)
	}
	file("nobody")
	eventually(t, "the flow is forbidden", func() error {
		if rules := c.Nodes[0].Run("nft", "list", "table", "inet", "lamina"); !strings.Contains(rules, "pods app=nobody") {
			return errors.New(rules)
		}
		return nil
	})
	time.Sleep(100 * time.Millisecond) // a change is done a moment after its rules are seen
	_ = answers(1)                     // what had been sent before
	if answers(5) {
		t.Error("a flow goes on that the policy forbids")
	}
	file("client")
	eventually(t, "the flow is allowed", func() error {
		if !answers(1) {
			return errors.New("no answer")
		}
		return nil
	})

	c.Nodes[0].Run("nft", "flush", "ruleset")
	eventually(t, "rules are back", func() error {
		if rules := c.Nodes[0].Run("nft", "list", "ruleset"); !strings.Contains(rules, "nothing allows it") {
			return errors.New(rules)
		}
		return nil
	})
	reaches("after a flush", other, false)
	reaches("after a flush", far, true)

	c.Nodes[0].Kill()
	reaches("without an agent", other, false)
	reaches("without an agent", far, true)
	write(filepath.Join(dir, "server.yaml"), "spec: [")
	c.Nodes[0].Start()
	reaches("with a broken file from the start", other, false)
	reaches("with a broken file from the start", far, true)
	if s, err := c.Nodes[0].Status(); err != nil || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "server.yaml") {
		t.Errorf("problems: %q, %v", s.Problems, err)
	}
	if _, err := c.Nodes[0].Namespace().Cnitool("add"); err != nil {
		t.Errorf("a pod without labels: %v", err)
	}
	bad := c.Nodes[0].Namespace()
	bad.Env = []string{"CNI_ARGS=LAMINA_LABELS=no label:x"}
	if _, err := bad.Add(); err == nil || !strings.Contains(err.Error(), "use labels as Kubernetes allows them") {
		t.Errorf("a label that is none: %v", err)
	}
}

// An agent that was killed in the middle of a change ends what the policies forbid when the next one starts, and no other
// connection.
func TestInterrupted(t *testing.T) {
	dir := t.TempDir()
	policy := func(ports string) {
		must(t, os.WriteFile(filepath.Join(dir, "web.yaml"), fmt.Appendf(nil, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: default}
spec: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [%s]}]}
`, ports), 0o644))
	}
	policy("{port: 7000}, {port: 7001}")
	c := cluster.New(t, 2, "--policies", dir)
	n := c.Nodes[0]
	web, far := n.Pod("CNI_ARGS=LAMINA_LABELS=app:web"), c.Nodes[1].Pod()
	conns := map[uint16]*lab.Conn{}
	for _, port := range []uint16{7000, 7001} {
		e := web.Echo(port)
		defer e.Close()
		conn, err := far.Dial("tcp", netip.AddrPortFrom(web.Addr, port))
		must(t, err)
		defer conn.Close()
		must(t, conn.Exchange(1000))
		conns[port] = conn
	}
	// The same entry is still there afterwards, and not one that was made of a packet in the middle.
	id := func(port uint16) string {
		out := n.Run("conntrack", "-L", "-o", "id", "-p", "tcp", "--orig-port-dst", fmt.Sprint(port))
		_, id, _ := strings.Cut(out, " id=")
		id, _, _ = strings.Cut(id, "\n")
		return id
	}
	allowed := id(7000)
	if allowed == "" || id(7001) == "" {
		t.Fatalf("conntrack has %q and %q", allowed, id(7001))
	}
	n.Kill()
	pins, err := ebpf.LoadPinnedMap(filepath.Join(n.Dir, "bpf", "lamina", "control"), nil)
	must(t, err)
	defer pins.Close()
	control, err := pins.LookupBytes(uint32(0))
	must(t, err)
	const generation = 8 // offset in struct control
	control[generation] |= 1
	must(t, pins.Update(uint32(0), control, ebpf.UpdateExist))
	policy("{port: 7000}")
	n.Start()
	must(t, conns[7000].Exchange(1000))
	if now := id(7000); now != allowed || id(7001) != "" {
		t.Errorf("the allowed connection was %q and is %q; the forbidden one is %q", allowed, now, id(7001))
	}
	must(t, conns[7001].SetDeadline(time.Now().Add(500*time.Millisecond)))
	if _, err := conns[7001].Write([]byte("\x00\x00\x00\x01x")); err == nil {
		if n, err := conns[7001].Read(make([]byte, 10)); err == nil {
			t.Errorf("what the policy forbids is answered: %d bytes", n)
		}
	}
}
