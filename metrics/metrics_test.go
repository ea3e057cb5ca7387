package metrics

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"lamina/fusefs"
	"lamina/inventory"
	"lamina/pool"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sample() []inventory.Mount {
	st := pool.Status{Mountpoint: "/c1/merged", Device: "0:52", PID: os.Getpid(), Version: "v1", Started: time.Unix(1_700_000_000, 5e8), Transport: "dev",
		TransportReason: "old kernel", Passthrough: "auto", Format: "sparse", Sketches: 3, Blocks: pool.Blocks{Lower: 7, InTransit: 2, Upper: 5},
		Queue: 1, BytesNotCopied: 1 << 30, BytesCopied: 4096, Errors: 2, Damaged: 1, OpenFiles: 9,
		FUSE: fusefs.Status{Requests: map[string]uint64{"read": 11, "write": 12}, BytesRead: 100, BytesWritten: 200}}
	other := st
	other.Device, other.Mountpoint = "0:53", "/bad\xff name\n\"quoted\""
	return []inventory.Mount{{Status: st, Container: &inventory.Container{Engine: "containerd", Namespace: "k8s.io", ID: "abc"}}, {Status: other}, {Status: other}}
}

// serve starts an exporter and returns what it answers at /metrics.
func serve(t *testing.T, address string, c *Collector) func() (map[string]*dto.MetricFamily, string) {
	t.Helper()
	l, err := Listen(address)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, Handler(c)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	network, where := l.Addr().Network(), l.Addr().String()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, where)
	}}}
	return func() (map[string]*dto.MetricFamily, string) {
		t.Helper()
		resp, err := client.Get("http://exporter/metrics")
		must(t, err)
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		must(t, err)
		parser := expfmt.NewTextParser(model.LegacyValidation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(string(b)))
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %v: %s", resp.Status, err, b)
		}
		return families, string(b)
	}
}

func TestExporter(t *testing.T) {
	var failed error
	c := New("v2", func(err error) { failed = err })
	answer, trouble := sample(), error(nil)
	c.Mounts = func() ([]inventory.Mount, error) { return answer, trouble }
	socket := filepath.Join(t.TempDir(), "s")
	for _, address := range []string{"127.0.0.1:0", "unix:" + socket} {
		t.Run(address, func(t *testing.T) {
			answer, trouble = sample(), nil
			scrape := serve(t, address, c)
			families, text := scrape()
			for _, m := range All {
				f := families[m.Name]
				if f == nil {
					t.Errorf("%s is not shown", m.Name)
					continue
				}
				if strings.ToLower(f.GetType().String()) != m.TypeName() || f.GetHelp() != m.Help {
					t.Errorf("%s: %v %q", m.Name, f.GetType(), f.GetHelp())
				}
			}
			for _, want := range []string{
				`lamina_mount_info{container="abc",device="0:52",engine="containerd",format="sparse",mountpoint="/c1/merged",name="",namespace="k8s.io",passthrough="auto",pid="`,
				`lamina_requests_total{device="0:52",mountpoint="/c1/merged",op="read"} 11`,
				`lamina_blocks{device="0:52",mountpoint="/c1/merged",state="in_transit"} 2`,
				`lamina_mount_degraded{device="0:52",mountpoint="/c1/merged",what="transport"} 1`,
				`lamina_mount_degraded{device="0:52",mountpoint="/c1/merged",what="passthrough"} 0`,
				`lamina_not_copied_bytes{device="0:52",mountpoint="/c1/merged"} 1.073741824e+09`,
				`lamina_mount_start_time_seconds{device="0:52",mountpoint="/c1/merged"} 1.7000000005e+09`,
				"process_open_fds ", "go_goroutines ", "lamina_gather_failed 0",
			} {
				if !strings.Contains(text, want) {
					t.Errorf("missing: %s", want)
				}
			}
			// One mount is gone, and one server does not answer.
			answer, trouble = answer[:1], errors.New("a server does not answer")
			families, _ = scrape()
			if n := len(families["lamina_sketches"].Metric); n != 1 {
				t.Errorf("%d mounts are shown", n)
			}
			if families["lamina_gather_failed"].Metric[0].GetGauge().GetValue() != 1 || failed == nil {
				t.Errorf("the failure is not told: %v", failed)
			}
		})
	}
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := Listen("unix:" + path)
	must(t, err)
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if _, err := Listen("unix:" + path); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second one: %v", err)
	}
	// One that was killed leaves its socket.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	must(t, l.Close())
	l, err = Listen("unix:" + path)
	must(t, err)
	must(t, l.Close())
	must(t, os.WriteFile(path, nil, 0o600))
	for _, address := range []string{"unix:" + path, "unix:", "unix:" + dir + "/none/s", "nonsense"} {
		if l, err := Listen(address); err == nil {
			l.Close()
			t.Errorf("%s: listens", address)
		}
	}
}

// The documentation has the table of every metric, and no other.
func TestDocumentation(t *testing.T) {
	var want strings.Builder
	want.WriteString("| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, m := range All {
		labels := strings.Join(m.Labels, ", ")
		want.WriteString("| `" + m.Name + "` | " + m.TypeName() + " | " + labels + " | " + m.Help + " |\n")
	}
	b, err := os.ReadFile("../docs/operations.md")
	must(t, err)
	if !strings.Contains(string(b), want.String()) {
		t.Errorf("docs/operations.md must have this table:\n%s", want.String())
	}
	if n := len(regexp.MustCompile("\n\\| `lamina_[a-z_]+` \\|").FindAll(b, -1)); n != len(All) {
		t.Errorf("docs/operations.md has %d rows of metrics, there are %d", n, len(All))
	}
}

var (
	word     = regexp.MustCompile(`lamina_[a-z0-9_]+`)
	selector = regexp.MustCompile(`(lamina_[a-z0-9_]+)\{([^}]*)\}`)
	matcher  = regexp.MustCompile(`([a-z_]+)(=~|=|!=|!~)"`)
	grouping = regexp.MustCompile(`by \(([a-z_, ]+)\)`)
)

// The dashboard's queries use metrics that the exporter shows, with labels that they have.
func TestDashboard(t *testing.T) {
	b, err := os.ReadFile("../deploy/grafana/lamina.json")
	must(t, err)
	var board any
	must(t, json.Unmarshal(b, &board))
	queries := queriesOf(board)
	if len(queries) < 20 {
		t.Fatalf("%d queries", len(queries))
	}
	c := New("v", func(error) {})
	c.Mounts = func() ([]inventory.Mount, error) { return sample(), nil }
	shown, _ := serve(t, "127.0.0.1:0", c)()
	used := map[string]bool{}
	for _, q := range queries {
		names := word.FindAllString(q, -1)
		if len(names) == 0 {
			t.Errorf("%s: asks for nothing", q)
		}
		labels := map[string]bool{"instance": true} // Prometheus adds it
		for _, name := range names {
			used[name] = true
			f := shown[name]
			if f == nil {
				t.Errorf("%s: %s is not shown", q, name)
				continue
			}
			for _, l := range f.Metric[0].Label {
				labels[l.GetName()] = true
			}
			if counts := strings.HasSuffix(name, "_total"); counts != (f.GetType() == dto.MetricType_COUNTER) {
				t.Errorf("%s is a %v", name, f.GetType())
			} else if counts && !strings.Contains(q, "rate(") && !strings.Contains(q, "increase(") {
				t.Errorf("%s: a counter as it is", q)
			}
		}
		for _, s := range selector.FindAllStringSubmatch(q, -1) {
			for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
				if !labels[m[1]] {
					t.Errorf("%s: no label %s", q, m[1])
				}
			}
		}
		for _, g := range grouping.FindAllStringSubmatch(q, -1) {
			for l := range strings.SplitSeq(g[1], ",") {
				if !labels[strings.TrimSpace(l)] {
					t.Errorf("%s: no label %s", q, l)
				}
			}
		}
		for _, pair := range []string{"()", "{}", "[]"} {
			if strings.Count(q, pair[:1]) != strings.Count(q, pair[1:]) {
				t.Errorf("%s: %s", q, pair)
			}
		}
	}
	for _, m := range All {
		if m.Name != "lamina_build_info" && m.Name != "lamina_mount_start_time_seconds" && !used[m.Name] {
			t.Errorf("the dashboard does not show %s", m.Name)
		}
	}
}

// queriesOf collects the queries of panels and variables, wherever they are.
func queriesOf(v any) []string {
	var out []string
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			out = append(out, queriesOf(e)...)
		}
	case map[string]any:
		for key, e := range v {
			if s, ok := e.(string); ok && (key == "expr" || key == "query" && s != "prometheus") {
				out = append(out, s)
			} else {
				out = append(out, queriesOf(e)...)
			}
		}
	}
	slices.Sort(out)
	return out
}
