package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/net/html"
)

var (
	update = flag.Bool("update", false, "write the golden files anew")
	show   = flag.String("page", "", "write the sample's page to this file, to look at it")
)

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; look at the difference, then run with -update\ngot:\n%s", path, got)
	}
}

// The JSON form is what others build on: it changes knowingly or not at all, and comes back as it was.
func TestJSONRoundTrip(t *testing.T) {
	r := sample()
	var out bytes.Buffer
	if err := r.WriteJSON(&out); err != nil {
		t.Fatal(err)
	}
	golden(t, "run.json", out.Bytes())
	back, err := ReadJSON(&out)
	if err != nil {
		t.Fatal(err)
	}
	r.Format = Format
	if !reflect.DeepEqual(r, back) {
		t.Errorf("came back as %+v", back)
	}
}

func TestJSONRefusals(t *testing.T) {
	change := func(f func(*Run)) *Run { r := sample(); f(r); return r }
	cell := func(r *Run) *Cell { return &r.Scenarios[0].Metrics[0].Cells[0] }
	for want, r := range map[string]*Run{
		"no contender of this run": change(func(r *Run) { cell(r).Contender = "nobody" }),
		"two cells":                change(func(r *Run) { m := &r.Scenarios[0].Metrics[0]; m.Cells = append(m.Cells, m.Cells[0]) }),
		"value NaN":                change(func(r *Run) { cell(r).Median = math.NaN() }),
		"value +Inf":               change(func(r *Run) { r.Scenarios[0].Metrics[0].Figures[0].Value = math.Inf(1) }),
		"its own name":             change(func(r *Run) { r.Contenders[1].Name = "native" }),
		"chart":                    change(func(r *Run) { r.Scenarios[0].Metrics[0].Chart = "pie" }),
		"logarithmic":              change(func(r *Run) { r.Scenarios[4].Metrics[0].Cells[0].X = 0 }),
	} {
		for form, write := range map[string]func(*Run) error{
			"json": func(r *Run) error { return r.WriteJSON(new(bytes.Buffer)) },
			"html": func(r *Run) error { return r.HTML(new(bytes.Buffer)) },
		} {
			if err := write(r); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s of a run with a wrong %q: %v", form, want, err)
			}
		}
	}
	for want, text := range map[string]string{"format 99": `{"format": 99}`, "unknown field": `{"surprise": 1}`, "EOF": `{`} {
		if _, err := ReadJSON(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("reading %s: %v; want %q", text, err, want)
		}
	}
}

func TestNewCell(t *testing.T) {
	c := NewCell("a", "b", 0, []float64{4, 1, 3, 2})
	if c.N != 4 || c.Median != 2.5 || c.Q1 != 1.75 || c.Q3 != 3.25 || c.Min != 1 || c.Max != 4 {
		t.Errorf("%+v", c)
	}
	if c := NewCell("a", "b", 0, []float64{7}); c.Median != 7 || c.Q1 != 7 || c.Q3 != 7 {
		t.Errorf("%+v", c)
	}
}

// A ratio says how many times better, whichever way the metric runs.
func TestRatio(t *testing.T) {
	r := &Run{Contenders: []Contender{{Name: "n", Kind: Native}, {Name: "l", Kind: Lamina}}}
	m := Metric{LessIsBetter: true, Chart: Bars, Cells: []Cell{{Contender: "n", Median: 2}, {Contender: "l", Median: 8}}}
	if v := r.Ratio(&m, &m.Cells[1], Native); v != 0.25 {
		t.Errorf("four times the time is %v", v)
	}
	m.LessIsBetter = false
	if v := r.Ratio(&m, &m.Cells[1], Native); v != 4 {
		t.Errorf("four times the rate is %v", v)
	}
	if v := r.Ratio(&m, &m.Cells[1], Overlay); !math.IsNaN(v) {
		t.Errorf("a ratio to nobody is %v", v)
	}
	m.Cells[0].Case = "other"
	if v := r.Ratio(&m, &m.Cells[1], Native); !math.IsNaN(v) {
		t.Errorf("a ratio to another case is %v", v)
	}
}

func TestQuantity(t *testing.T) {
	for _, c := range []struct {
		v    float64
		unit string
		want string
	}{
		{0, "us", "0 µs"}, {0.25, "us", "250 ns"}, {5.8, "us", "5.8 µs"}, {383.4, "us", "383 µs"}, {999.7, "us", "1 ms"},
		{3_959_000, "us", "3.96 s"}, {171, "s", "171 s"}, {0.09, "s", "90 ms"}, {8192, "B", "8 KiB"}, {1 << 30, "B", "1 GiB"},
		{1023.9 * 1024, "B", "1 MiB"}, {1012, "/s", "1\u202f012 /s"}, {12, "furlongs", "12 furlongs"}, {3, "", "3"},
	} {
		if got := quantity(c.v, c.unit); got != c.want {
			t.Errorf("quantity(%v, %q) is %q, want %q", c.v, c.unit, got, c.want)
		}
	}
}

func render(t *testing.T, r *Run) (string, *html.Node) {
	t.Helper()
	var out bytes.Buffer
	if err := r.HTML(&out); err != nil {
		t.Fatal(err)
	}
	doc, err := html.Parse(bytes.NewReader(out.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), doc
}

func attr(n *html.Node, key string) string {
	for _, a := range n.Attr {
		if a.Key == key {
			return a.Val
		}
	}
	return ""
}

func textOf(n *html.Node) string {
	var b strings.Builder
	for d := range n.Descendants() {
		if d.Type == html.TextNode {
			b.WriteString(d.Data)
		}
	}
	return b.String()
}

// The page needs no network: nothing in it names another place, and its policy would stop a script that tried.
func TestHTMLReachesNowhere(t *testing.T) {
	text, doc := render(t, sample())
	if *show != "" {
		if err := os.WriteFile(*show, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var policy string
	for n := range doc.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		switch n.Data {
		case "link", "img", "iframe", "object", "embed", "base", "video", "audio", "form":
			t.Errorf("the page has an element %s", n.Data)
		case "meta":
			if attr(n, "http-equiv") == "Content-Security-Policy" {
				policy = attr(n, "content")
			}
		case "style":
			if css := textOf(n); strings.Contains(css, "url(") || strings.Contains(css, "@import") {
				t.Error("the style fetches something")
			}
		}
		for _, a := range n.Attr {
			switch a.Key {
			case "src", "srcset", "action", "ping", "background":
				t.Errorf("%s has %s=%q", n.Data, a.Key, a.Val)
			case "href":
				if !strings.HasPrefix(a.Val, "#") {
					t.Errorf("a link to %q", a.Val)
				}
			}
			if strings.HasPrefix(a.Key, "on") {
				t.Errorf("%s has a script in %s", n.Data, a.Key)
			}
		}
	}
	if !strings.HasPrefix(policy, "default-src 'none';") || strings.Contains(policy, "script-src 'unsafe-inline'") {
		t.Errorf("the policy is %q", policy)
	}
	namespace := regexp.MustCompile(`^https?://www\.w3\.org/(1999|2000|XML)`) // names, which nothing fetches
	for _, url := range regexp.MustCompile(`(https?|wss?|ftp)://[^\s"'<>`+"`"+`]+`).FindAllString(text, -1) {
		if !namespace.MatchString(url) {
			t.Errorf("the page names %s", url)
		}
	}
}

// Links within the page lead somewhere.
func TestHTMLLinks(t *testing.T) {
	_, doc := render(t, sample())
	ids := map[string]bool{}
	for n := range doc.Descendants() {
		if id := attr(n, "id"); id != "" {
			ids[id] = true
		}
	}
	links := 0
	for n := range doc.Descendants() {
		if to := attr(n, "href"); to != "" {
			links++
			if !ids[strings.TrimPrefix(to, "#")] {
				t.Errorf("a link to %s, which is not there", to)
			}
		}
	}
	if links == 0 {
		t.Error("no links")
	}
}

// Names come from mount options, error messages and programs' versions: none of them becomes markup or script.
func TestHTMLEscapesHostileNames(t *testing.T) {
	const evil = `</script><script>alert(1)</script><img src=x onerror=alert(2)>"'&-->`
	clean := sample()
	r := sample()
	for i := range r.Contenders {
		c := &r.Contenders[i]
		was := c.Name
		c.Name, c.Describes, c.Options = c.Name+evil, evil, []string{evil}
		for s := range r.Scenarios {
			for m := range r.Scenarios[s].Metrics {
				for k := range r.Scenarios[s].Metrics[m].Cells {
					if cell := &r.Scenarios[s].Metrics[m].Cells[k]; cell.Contender == was {
						cell.Contender = c.Name
						if r.Scenarios[s].Metrics[m].Chart == Bars {
							cell.Case += evil
						}
					}
				}
			}
		}
	}
	for i := range r.Scenarios {
		s := &r.Scenarios[i]
		s.Title, s.Source, s.Describes = evil, evil, evil
		for j := range s.Metrics {
			m := &s.Metrics[j]
			m.Name, m.XName = evil, evil
			for k := range m.Figures {
				m.Figures[k].Says, m.Figures[k].Note = evil, evil
			}
		}
	}
	r.Machine = Machine{Kernel: evil, CPUModel: evil, Filesystem: evil, Versions: []Version{{evil, evil}}}
	r.Mode = evil
	r.Absent = []Absent{{evil, evil}}
	r.Failed = []Failed{{"density", evil, evil}}

	_, want := render(t, clean)
	_, got := render(t, r)
	count := func(doc *html.Node, name string) (n int) {
		for d := range doc.Descendants() {
			if d.Type == html.ElementNode && d.Data == name {
				n++
			}
		}
		return n
	}
	for _, name := range []string{"script", "img"} {
		if g, w := count(got, name), count(want, name); g != w {
			t.Errorf("%d elements %s, want %d", g, name, w)
		}
	}
	if body := textOf(got); !strings.Contains(body, evil) {
		t.Error("the name is not shown as it is")
	}
}

// Every number of every contender is in its chart's data, in the words for those who do not see it, and in the table.
func TestHTMLShowsEveryCell(t *testing.T) {
	r := sample()
	_, doc := render(t, r)
	var charts []chartData
	var words, tables []string
	for n := range doc.Descendants() {
		switch {
		case n.Data == "script" && attr(n, "class") == "chart-data":
			var d chartData
			if err := json.Unmarshal([]byte(textOf(n)), &d); err != nil {
				t.Fatal(err)
			}
			charts = append(charts, d)
		case attr(n, "class") == "chart":
			words = append(words, attr(n, "aria-label"))
		case n.Data == "details":
			tables = append(tables, textOf(n))
		}
	}
	i := 0
	for _, s := range r.Scenarios {
		for _, m := range s.Metrics {
			if len(charts[i].Cells) != len(m.Cells) {
				t.Errorf("%s: %d cells drawn of %d", m.Name, len(charts[i].Cells), len(m.Cells))
			}
			for _, c := range m.Cells {
				text := quantity(c.Median, m.Unit)
				d := charts[i].Cells[slices.IndexFunc(charts[i].Cells, func(d chartCell) bool { return d.Contender == c.Contender && d.Case == c.Case && d.X == c.X })]
				if d.V != c.Median || d.Text != text || d.Q1 != c.Q1 || d.Max != c.Max {
					t.Errorf("%s: drawn as %+v: %+v", m.Name, d, c)
				}
				if !strings.Contains(words[i], c.Contender+" "+text) {
					t.Errorf("%s: %s %s is not in words", m.Name, c.Contender, text)
				}
				if !strings.Contains(tables[i], text) {
					t.Errorf("%s: %s %s is not in the table", m.Name, c.Contender, text)
				}
			}
			i++
		}
	}
	if i != len(charts) {
		t.Errorf("%d charts for %d metrics", len(charts), i)
	}
}

// The page also says what was not measured, and why.
func TestHTMLNamesTheMissing(t *testing.T) {
	r := sample()
	text, doc := render(t, r)
	body := textOf(doc)
	for _, want := range []string{r.Absent[0].Name, r.Absent[0].Why, r.Failed[0].Why, r.Machine.Kernel, "two round trips"} {
		if !strings.Contains(body, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if strings.Contains(text, "ZgotmplZ") {
		t.Error("the template was refused a value")
	}
}

// Runs of parts, and failed ones, have a page too.
func TestHTMLOfLittle(t *testing.T) {
	full := sample()
	for name, r := range map[string]*Run{
		"nothing":     {},
		"no overlay":  {Contenders: full.Contenders[:1], Scenarios: nil},
		"no lamina":   {Contenders: full.Contenders[:6]},
		"only lamina": {Contenders: full.Contenders[6:7], Scenarios: []Scenario{{Name: "s", Metrics: []Metric{{Chart: Bars, Cells: []Cell{{Contender: "lamina", Median: 1}}}}}}},
		"zeros":       {Contenders: full.Contenders, Scenarios: []Scenario{{Name: "s", Metrics: []Metric{{Chart: Bars, Cells: []Cell{{Contender: "lamina"}, {Contender: "overlayfs"}}}}}}},
	} {
		text, _ := render(t, r)
		if strings.Contains(text, "NaN") && strings.Contains(text, ">NaN") {
			t.Errorf("%s: shows NaN", name)
		}
		if err := r.Table(new(bytes.Buffer), TableOptions{}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	if err := sample().Table(&out, TableOptions{Width: 100}); err != nil {
		t.Fatal(err)
	}
	golden(t, "table.txt", out.Bytes())
	if strings.Contains(out.String(), "\x1b") {
		t.Error("colours for a terminal that has none")
	}
	out.Reset()
	if err := sample().Table(&out, TableOptions{Width: 100, Color: true}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "\x1b[32m") || !strings.Contains(out.String(), "\x1b[31m") {
		t.Error("no colours")
	}
}

// A document gets every number, and the same tables for the same run.
func TestMarkdown(t *testing.T) {
	r := sample()
	var out bytes.Buffer
	if err := r.Markdown(&out); err != nil {
		t.Fatal(err)
	}
	golden(t, "run.md", out.Bytes())
	for _, s := range r.Scenarios {
		_, part, found := strings.Cut(out.String(), "<!-- bench: "+s.Name+" -->")
		part, _, ended := strings.Cut(part, "<!-- end -->")
		if !found || !ended {
			t.Errorf("%s has no part of its own", s.Name)
		}
		for _, m := range s.Metrics {
			for _, c := range m.Cells {
				if text := "| " + quantity(c.Median, m.Unit) + " |"; !m.Aside && !strings.Contains(part, text) {
					t.Errorf("%s: %s %s is missing", s.Name, c.Contender, text)
				}
			}
		}
	}
}

// What errors and versions say ends no row, no part and no table.
func TestMarkdownOfHostileNames(t *testing.T) {
	const evil = "a|b\n\n<!-- end --><b>"
	clean, r := sample(), sample()
	r.Scenarios[0].Metrics[0].Name, r.Scenarios[0].Metrics[0].Figures[0].Says = evil, evil
	r.Machine.Kernel, r.Absent[0].Why, r.Failed[0].Why = evil, evil, evil
	var want, got bytes.Buffer
	if err := errors.Join(clean.Markdown(&want), r.Markdown(&got)); err != nil {
		t.Fatal(err)
	}
	for _, mark := range []string{"\n", "<!--", "-->"} {
		if w, g := strings.Count(want.String(), mark), strings.Count(strings.ReplaceAll(got.String(), "&lt;!-- end -->", ""), mark); w != g {
			t.Errorf("%d times %q, want %d:\n%s", g, mark, w, got.String())
		}
	}
	if strings.Contains(got.String(), "<b>") {
		t.Error("markup of others")
	}
}

// What the floor misses too is told apart from what could be better.
func TestBeyond(t *testing.T) {
	for _, c := range []struct {
		f    Figure
		want bool
	}{
		{Figure{Value: 2, Target: 1}, false},
		{Figure{Value: 2, Target: 1, Floor: 0.9}, false},
		{Figure{Value: 2, Target: 1, Floor: 1.5}, true},
		{Figure{Value: 0.5, Target: 1, AtLeast: true, Floor: 0.9}, true},
		{Figure{Value: 0.5, Target: 1, AtLeast: true, Floor: 1.1}, false},
		{Figure{Value: 1, Target: 1, Floor: 1.5, OK: true}, false},
	} {
		if got := c.f.Beyond(); got != c.want {
			t.Errorf("%+v: %v", c.f, got)
		}
	}
}

// Tables fit the terminal.
func TestTableWidths(t *testing.T) {
	for _, width := range []int{80, 100, 140} {
		var out bytes.Buffer
		if err := sample().Table(&out, TableOptions{Width: width}); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			line = strings.TrimRight(line, " \n")
			if n := utf8.RuneCountInString(line); n > width {
				t.Errorf("width %d: a line of %d: %s", width, n, line)
			}
		}
	}
}
