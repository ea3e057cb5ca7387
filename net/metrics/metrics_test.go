package metrics_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/cmd/lamina/cli"
	"lamina/metrics/exporter/exportertest"
	"lamina/net/control"
	"lamina/net/lab/cluster"
	"lamina/net/metrics"
)

func TestMain(m *testing.M) { os.Exit(cluster.MainAs(m, cli.Main)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// An agent's own exporter tells of packets, drops, repairs and peers; every metric is in the documentation and the dashboard.
func TestAgent(t *testing.T) {
	dir, err := os.MkdirTemp("", "lamnm") // a socket's path must be short
	must(t, err)
	defer os.RemoveAll(dir)
	socket, rules := filepath.Join(dir, "m"), filepath.Join(dir, "policies")
	must(t, os.Mkdir(rules, 0o755))
	must(t, os.WriteFile(filepath.Join(rules, "web.yaml"), []byte(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 7000}]}]}
`), 0o644))
	c := cluster.New(t, 2, "--policies", rules, "--steering=on")
	n1, n2 := c.Nodes[0], c.Nodes[1]
	n1.Kill()
	n1.Args = append(n1.Args, "--metrics", "unix:"+socket)
	n1.Start()
	web, far := n1.Pod("CNI_ARGS=K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;LAMINA_LABELS=app:web"), n2.Pod()
	e := web.Echo(7000)
	defer e.Close()
	conn, err := far.Dial("tcp", netip.AddrPortFrom(web.Addr, 7000))
	must(t, err)
	defer conn.Close()
	for range 200 {
		must(t, conn.Exchange(1000))
	}
	udp, err := far.Dial("udp", netip.AddrPortFrom(web.Addr, 7000))
	must(t, err)
	defer udp.Close()
	if udp.Answered() {
		t.Error("a datagram that the policy forbids is answered")
	}
	n1.Run("ip", "route", "del", n2.Prefix.String())

	var text string
	missing := func() error {
		families, now := exportertest.Scrape(t, "unix", socket)
		text = now
		exportertest.Shown(t, families, metrics.All)
		for _, want := range []string{
			`lamina_net_node_info{device="lamina0",interface="phys0",node="192.168.77.1",port="4789",prefix="10.99.1.0/24",vni="1"} 1`,
			"lamina_net_pods 1\n", `lamina_net_addresses{state="leased"} 1`, `lamina_net_addresses{state="free"} 252`,
			`lamina_net_peers{state="ok"} 1`, `lamina_net_peers{state="broken"} 0`, "lamina_net_fastpath_on 1\n",
			`lamina_net_policy_pods{state="isolated"} 1`, `lamina_net_policies 1`, `lamina_net_policy_dropped_packets_total{why="ingress"} 1`,
			`lamina_net_packets_total{program="ingress",reason="hit"} `, `lamina_net_packets_total{program="ingress_learn",reason="learned"} `,
			"lamina_net_gather_failed 0\n", "lamina_net_problems 0\n", "lamina_net_pod_mtu_bytes 1450\n", "lamina_net_underlay_mtu_bytes 1500\n", "process_open_fds ",
		} {
			if !strings.Contains(text, want) {
				return fmt.Errorf("no %s in\n%s", want, text)
			}
		}
		if strings.Contains(text, "lamina_net_repairs_total 0\n") {
			return errors.New("no repair")
		}
		return nil
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err = missing(); err == nil || time.Now().After(deadline) {
			break
		}
	}
	must(t, err)
	families, _ := exportertest.Scrape(t, "unix", socket)
	exportertest.Documentation(t, "../../docs/network.md", metrics.All)
	exportertest.Dashboard(t, "../../deploy/grafana/lamina-net.json", families, metrics.All, "lamina_net_build_info", "lamina_net_start_time_seconds")

	// A second one cannot have the socket, and changes nothing.
	n1.Args = append(n1.Args, "--socket", filepath.Join(dir, "other"))
	if out, err := n1.Command(filepath.Join(cluster.Bin(t), "lamina"), append([]string{"net", "agent", "--peers", c.Peers, "--state", n1.State()}, n1.Args...)...).CombinedOutput(); err == nil || !strings.Contains(string(out), "--metrics: ") {
		t.Errorf("a second agent on the socket: %v %s", err, out)
	}
}

// An agent that cannot say how things are is told from one that has nothing to say.
func TestFailed(t *testing.T) {
	var said error
	c := metrics.New("v", func() (control.Status, error) { return control.Status{}, errors.New("no") }, func(err error) { said = err })
	_, text := exportertest.Serve(t, "127.0.0.1:0", c)()
	if !strings.Contains(text, "lamina_net_gather_failed 1\n") || strings.Contains(text, "lamina_net_pods") || said == nil {
		t.Errorf("%v %s", said, text)
	}
}
