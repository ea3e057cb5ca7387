package top_test

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/cmd/lamina/cli"
	"lamina/net/control"
	"lamina/net/lab/cluster"
	"lamina/net/top"
	"lamina/top/live"

	tea "charm.land/bubbletea/v2"
)

func TestMain(m *testing.M) { os.Exit(cluster.MainAs(m, cli.Main)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// status is what an agent could tell, as it comes over its socket.
func status(t *testing.T, started time.Time, hits, misses, dropped uint64) *control.Status {
	t.Helper()
	count := map[string]map[string]uint64{"egress": {"hit": hits, "lease_over": misses, "not_remote": 1000 * misses}, "ingress": {"hit": 2 * hits}, "egress_learn": {"learned": misses, "not_ipv4": 9}}
	b, err := json.Marshal(control.Status{Started: started, Peers: []control.Peer{{State: control.PeerOK}, {State: "no route"}}, Repairs: 1,
		Repaired: []control.Repair{{Time: started, What: "route to x\x1b"}}, Problems: []string{"peers: two\nlines"}, Pods: 3, Parts: map[string]any{
			"fastpath": map[string]any{"state": "on", "counters": count}, "policies": map[string]any{"policies": 2, "dropped": map[string]uint64{"ingress": dropped}},
			"steering": map[string]any{"state": "on", "saturated": true, "stages": map[string]any{"vxlan": map[string]any{"moves": dropped, "packets": map[string]any{"0": map[string]uint64{"0": hits, "1": misses}}}}}}})
	must(t, err)
	var s control.Status
	must(t, json.Unmarshal(b, &s))
	return &s
}

func TestRates(t *testing.T) {
	began := time.Unix(1_800_000_000, 0)
	var s top.Sampler
	if r := s.Next(began, status(t, began, 500, 50, 5)); r.Out.Packets != 0 || r.Out.Hits != 0 || r.Dropped["ingress"] != 0 || r.Pods != 3 || len(r.Broken) != 1 {
		t.Errorf("the first sample: %+v", r)
	}
	r := s.Next(began.Add(2*time.Second), status(t, began, 680, 70, 9))
	if r.Out.Packets != 100 || r.Out.Hits != 0.9 || r.Out.Misses["lease_over"] != 10 || len(r.Out.Misses) != 1 || r.In.Packets != 180 || r.In.Hits != 1 ||
		r.Learning["learned"] != 10 || len(r.Learning) != 1 || r.Dropped["ingress"] != 2 || r.Stages["vxlan"] != (top.Stage{Packets: 100, Over: 10, Moves: 2}) {
		t.Errorf("%+v", r)
	}
	// Another agent, and maps that were made anew.
	if r := s.Next(began.Add(4*time.Second), status(t, began.Add(3*time.Second), 900, 90, 90)); r.Out.Packets != 0 || r.Dropped["ingress"] != 0 {
		t.Errorf("another agent: %+v", r)
	}
	if r := s.Next(began.Add(6*time.Second), status(t, began.Add(3*time.Second), 0, 110, 0)); r.Out.Packets != 10 || r.Out.Hits != 0 || r.Dropped["ingress"] != 0 {
		t.Errorf("maps made anew: %+v", r)
	}
}

func TestScreen(t *testing.T) {
	began := time.Unix(1_800_000_000, 0)
	s := live.NewScreen(&top.View{}, time.Second)
	s.Update(tea.WindowSizeMsg{Width: 120, Height: 30})
	s.Update(live.Sampled{At: began, Sample: status(t, began, 500, 50, 5)})
	s.Update(live.Sampled{At: began.Add(2 * time.Second), Sample: status(t, began, 680, 70, 9)})
	got := strings.Join(s.Lines(), "\n")
	for _, want := range []string{"lamina net top", "3 pods, 2 peers", "fast path on", "90.00 %  100.00 %", "  lease_over ", "confirm the flow", "dropped ingress      2.0/s", "on, saturated", "  before vxlan           100        10  2.0/s flows moved", "no route",
		"REPAIRS                    1            last: route to x", "PROBLEM  peers: two lines", "q quit"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "\x1b") || strings.Contains(got, "not_remote") {
		t.Errorf("%q", got)
	}
	s.Update(live.Sampled{At: began.Add(3 * time.Second), Err: errors.New("no agent")})
	if got := strings.Join(s.Lines(), "\n"); !strings.Contains(got, "no agent") || !strings.Contains(got, "does not answer") {
		t.Errorf("%s", got)
	}
}

// A real agent's counters, and the command.
func TestAgent(t *testing.T) {
	c := cluster.New(t, 2)
	n1 := c.Nodes[0]
	web, far := n1.Pod(), c.Nodes[1].Pod()
	e := web.Echo(7000)
	defer e.Close()
	conn, err := far.Dial("tcp", netip.AddrPortFrom(web.Addr, 7000))
	must(t, err)
	defer conn.Close()
	for range 20 {
		must(t, conn.Exchange(1000))
	}
	var sampler top.Sampler
	st, err := n1.Status()
	must(t, err)
	sampler.Next(time.Now(), &st)
	for range 200 {
		must(t, conn.Exchange(1000))
	}
	st, err = n1.Status()
	must(t, err)
	if r := sampler.Next(time.Now(), &st); r.FastPath != "on" || r.Out.Packets == 0 || r.Out.Hits < 0.9 || r.In.Hits < 0.9 || r.Peers != 1 || len(r.Broken) != 0 {
		t.Errorf("%+v", r)
	}
	lamina := filepath.Join(cluster.Bin(t), "lamina")
	if out := n1.Run(lamina, "net", "top", "--once", "--interval", "100ms", "--socket", n1.Socket()); !strings.Contains(out, "PACKETS") || !strings.Contains(out, "REPAIRS") {
		t.Errorf("%s", out)
	}
	var r top.Rates
	must(t, json.Unmarshal([]byte(n1.Run(lamina, "net", "top", "--once", "--json", "--interval", "100ms", "--socket", n1.Socket())), &r))
	if r.Node != n1.Addr.String() || r.Pods != 1 || r.FastPath != "on" {
		t.Errorf("%+v", r)
	}
	cmd := n1.Command(lamina, "net", "top", "--once", "--interval", "100ms", "--socket", n1.Socket()+".none")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "start it") {
		t.Errorf("without an agent: %v %s", err, out)
	}
}
