package agent_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"lamina/net/control"
	"lamina/net/lab/cluster"
)

// A trace says what a flow does and why, from before its first packet to its end.
func TestTrace(t *testing.T) {
	dir := t.TempDir()
	policy := func(app string) {
		must(t, os.WriteFile(filepath.Join(dir, "web.yaml"), fmt.Appendf(nil, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: other}}}]}, {from: [{ipBlock: {cidr: 10.99.0.0/16}}], ports: [{port: %s}, {port: 7001, protocol: UDP}]}]
`, app), 0o644))
	}
	policy("7000")
	c := cluster.New(t, 2, "--policies", dir)
	n1, n2 := c.Nodes[0], c.Nodes[1]
	web := n1.Pod("CNI_ARGS=K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;LAMINA_LABELS=app:web")
	sibling, far := n1.Pod(), n2.Pod()
	e := web.Echo(7000)
	defer e.Close()
	client := control.NewClient(n1.Socket())
	defer client.Close()
	ask := func(f control.Flow) control.Trace {
		t.Helper()
		tr, err := client.Trace(f)
		must(t, err)
		return tr
	}
	step := func(tr control.Trace, name string) control.Step {
		t.Helper()
		i := slices.IndexFunc(tr.Steps, func(s control.Step) bool { return s.Name == name })
		if i < 0 {
			t.Fatalf("no step %s: %+v", name, tr.Steps)
		}
		return tr.Steps[i]
	}
	expect := func(tr control.Trace, name string, result control.Result, found string) {
		t.Helper()
		s := step(tr, name)
		if s.Result != result || !strings.Contains(s.Found, found) || result == control.Stopped && s.Fix == "" {
			t.Errorf("%s: %+v, not %s with %q", name, s, result, found)
		}
	}
	end := func(p *cluster.Pod, port uint16) netip.AddrPort { return netip.AddrPortFrom(p.Addr, port) }

	quiet := control.Flow{Protocol: "tcp", Src: end(far, 5555), Dst: end(web, 7000)}
	tr := ask(quiet)
	expect(tr, "route", control.Passed, n2.Addr.String())
	expect(tr, "conntrack", control.Noted, "no connection")
	expect(tr, "policy ingress", control.Passed, "shop/web-0: allowed by shop/web ingress[1].from[0]")
	expect(tr, "pod", control.Passed, web.Host)
	expect(tr, "flow", control.Stopped, "no entry")
	if tr.Out.Hit || tr.Out.Reason != "not_learned" || tr.In.Reason != "not_learned" || tr.Out.Fix == "" {
		t.Errorf("%+v %+v", tr.Out, tr.In)
	}
	tr = ask(control.Flow{Protocol: "tcp", Src: end(far, 5555), Dst: end(web, 80)})
	expect(tr, "policy ingress", control.Stopped, "selected by shop/web, and none of their rules allows it")
	if tr := ask(control.Flow{Protocol: "tcp", Src: end(sibling, 5555), Dst: end(web, 7000)}); tr.Out.Reason != "not_remote" {
		t.Errorf("between pods of a node: %+v", tr)
	}
	if tr := ask(control.Flow{Protocol: "sctp", Src: end(far, 5555), Dst: end(web, 7000)}); tr.Out.Reason != "protocol" {
		t.Errorf("SCTP: %+v", tr)
	}
	if tr := ask(control.Flow{Protocol: "tcp", Src: end(far, 1), Dst: netip.MustParseAddrPort("10.99.2.77:1")}); tr.Out.Reason != "not_local" {
		t.Errorf("of another node alone: %+v", tr)
	}

	// A flow that is carried, from the side of either node.
	conn, err := far.Dial("tcp", end(web, 7000))
	must(t, err)
	defer conn.Close()
	flow := control.Flow{Protocol: "tcp", Src: netip.MustParseAddrPort(conn.LocalAddr().String()), Dst: end(web, 7000)}
	eventually(t, "hits", func() error {
		must(t, conn.Exchange(100))
		if tr = ask(flow.Reverse()); !tr.Out.Hit || !tr.In.Hit {
			return fmt.Errorf("%+v", tr)
		}
		return nil
	})
	if tr.Flow != flow {
		t.Errorf("opened as %v, told as %v", flow, tr.Flow)
	}
	expect(tr, "conntrack", control.Passed, "ESTABLISHED, assured")
	expect(tr, "outward", control.Passed, "map filters: seen allowed")
	expect(tr, "inward", control.Passed, "map filters: seen allowed")
	expect(tr, "header", control.Passed, n2.Addr.String())
	udp, err := far.Dial("udp", end(web, 7001)) // nobody answers
	must(t, err)
	defer udp.Close()
	_, err = udp.Write([]byte("anybody?"))
	must(t, err)
	eventually(t, "an unanswered flow", func() error {
		tr = ask(control.Flow{Src: end(far, 0), Dst: end(web, 0)})
		if len(tr.Flows) != 2 || tr.More != 0 || tr.Out != nil {
			return fmt.Errorf("%+v", tr)
		}
		return nil
	})
	for _, f := range tr.Flows {
		if tcp := f.Flow == flow; f.Cached != tcp || (f.Out == "hit") != tcp || f.Connection == nil || f.Connection.Replied != tcp {
			t.Errorf("%+v", f)
		}
	}

	// The command, for people and programs.
	lamina := filepath.Join(cluster.Bin(t), "lamina")
	out := n1.Run(lamina, "net", "trace", "--socket", n1.Socket(), flow.String())
	if !strings.HasPrefix(out, flow.String()+"\n") || !strings.Contains(out, "policy ingress") || strings.Count(out, "  hit  ") != 2 {
		t.Errorf("%s", out)
	}
	t.Log("\n" + out)
	out = n1.Run(lamina, "net", "trace", "--socket", n1.Socket(), far.Addr.String(), "web"[:0], "tcp")
	if !strings.Contains(out, flow.String()) || strings.Contains(out, "/udp") {
		t.Errorf("%s", out)
	}
	for _, wrong := range []struct {
		args string
		code int
		says string
	}{{quiet.String(), 1, "not_learned"}, {"nonsense", 2, `"nonsense" is out of place`}, {"--nonsense", 2, "nonsense"}} {
		cmd := n1.Command(lamina, "net", "trace", "--socket", n1.Socket(), wrong.args)
		out, _ := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != wrong.code || !strings.Contains(string(out), wrong.says) {
			t.Errorf("%s: %d %s", wrong.args, cmd.ProcessState.ExitCode(), out)
		}
	}

	// A policy that ends it.
	policy("80")
	eventually(t, "the policy ends the flow", func() error {
		if tr = ask(flow); tr.Out.Hit || step(tr, "policy ingress").Result != control.Stopped {
			return fmt.Errorf("%+v", tr)
		}
		return nil
	})

	n1.Kill()
	n1.Args = append(n1.Args, "--fastpath", "off")
	n1.Start()
	if tr := ask(quiet); tr.Out.Reason != "disabled" || step(tr, "fast path").Fix == "" {
		t.Errorf("off: %+v", tr)
	}
	if tr := ask(control.Flow{Protocol: "udp"}); len(tr.Flows) != 1 || tr.Flows[0].Out != "disabled" || tr.Flows[0].Cached {
		t.Errorf("off: %+v", tr)
	}
}
