// Package exportertest tests exporters: their answers, documentation and dashboards.
package exportertest

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"lamina/metrics/exporter"

	"github.com/prometheus/client_golang/prometheus"
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

// Serve starts an exporter and returns what it answers at /metrics.
func Serve(t *testing.T, address string, c prometheus.Collector) func() (map[string]*dto.MetricFamily, string) {
	t.Helper()
	l, err := exporter.Listen(address)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- exporter.Serve(ctx, l, exporter.Handler(c, "a test", func(error) {})) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	network, where := l.Addr().Network(), l.Addr().String()
	return func() (map[string]*dto.MetricFamily, string) {
		t.Helper()
		return Scrape(t, network, where)
	}
}

// Scrape is what an exporter answers at /metrics.
func Scrape(t testing.TB, network, where string) (map[string]*dto.MetricFamily, string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, where)
	}}}
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

// Shown checks that every metric is in an answer, as it was declared.
func Shown(t testing.TB, families map[string]*dto.MetricFamily, all []exporter.Metric) {
	t.Helper()
	for _, m := range all {
		f := families[m.Name]
		if f == nil {
			t.Errorf("%s is not shown", m.Name)
			continue
		}
		if strings.ToLower(f.GetType().String()) != m.TypeName() || f.GetHelp() != m.Help {
			t.Errorf("%s: %v %q", m.Name, f.GetType(), f.GetHelp())
		}
	}
}

// Documentation checks that a document has the table of every metric, and no other.
func Documentation(t testing.TB, path string, all []exporter.Metric) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	if want := exporter.Table(all); !strings.Contains(string(b), want) {
		t.Errorf("%s must have this table:\n%s", path, want)
	}
	if n := len(regexp.MustCompile("\n\\| `lamina_[a-z_]+` \\|").FindAll(b, -1)); n != len(all) {
		t.Errorf("%s has %d rows of metrics, there are %d", path, n, len(all))
	}
}

var (
	word     = regexp.MustCompile(`lamina_[a-z0-9_]+`)
	selector = regexp.MustCompile(`(lamina_[a-z0-9_]+)\{([^}]*)\}`)
	matcher  = regexp.MustCompile(`([a-z_]+)(=~|=|!=|!~)"`)
	grouping = regexp.MustCompile(`by \(([a-z_, ]+)\)`)
)

// Dashboard checks that a dashboard's queries use metrics that the exporter shows, with labels that they have, and all metrics
// but those of except.
func Dashboard(t testing.TB, path string, shown map[string]*dto.MetricFamily, all []exporter.Metric, except ...string) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	var board any
	must(t, json.Unmarshal(b, &board))
	queries := queriesOf(board)
	if len(queries) < len(all)/2 {
		t.Fatalf("%d queries", len(queries))
	}
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
	for _, m := range all {
		if !used[m.Name] && !slices.Contains(except, m.Name) {
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
