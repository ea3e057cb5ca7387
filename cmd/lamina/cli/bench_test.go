package cli

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"lamina/bench"
)

const sampleRun = "../../../bench/report/testdata/run.json"

// A saved run is shown in every form, and comes back as it was.
func TestBenchFrom(t *testing.T) {
	l := newLayers(t)
	saved, err := os.ReadFile(sampleRun)
	must(t, err)
	must(t, os.WriteFile(l.path("run.json"), saved, 0o644))
	if got := l.ok("bench", "--from", "run.json", "--json"); got != string(saved) {
		t.Errorf("came back as %s", got)
	}
	if got := l.ok("bench", "--from", "run.json"); !strings.Contains(got, "targets met") {
		t.Errorf("no table: %s", got)
	}
	if got := l.ok("bench", "--from", "run.json", "--markdown", "--html", "page.html"); !strings.Contains(got, "<!-- bench: first-write -->") {
		t.Errorf("no tables: %s", got)
	}
	page, err := os.ReadFile(l.path("page.html"))
	must(t, err)
	if !bytes.HasPrefix(page, []byte("<!doctype html>")) {
		t.Errorf("no page: %.100s", page)
	}
	l.fails([]string{"bench", "--from", "run.json", "--strict"}, "targets missed")
	l.fails([]string{"bench", "--from", "no.json"}, "--from", "no.json")
	must(t, os.WriteFile(l.path("bad.json"), saved[:len(saved)/2], 0o644))
	l.fails([]string{"bench", "--from", "bad.json", "--html", "none.html"}, "bad.json", "not the result of a bench run")
	if _, err := os.Stat(l.path("none.html")); err == nil {
		t.Error("a page of nothing")
	}
}

// The document has a place for every scenario's tables, and the script that puts them there leaves the text alone.
func TestBenchmarksDocument(t *testing.T) {
	for name, scenarios := range map[string][]bench.Scenario{"benchmarks.md": bench.Scenarios(), "benchmarks-net.md": bench.NetScenarios()} {
		doc, err := os.ReadFile("../../../docs/" + name)
		must(t, err)
		for _, s := range append(scenarios, bench.Scenario{Name: "machine"}, bench.Scenario{Name: "targets"}, bench.Scenario{Name: "absent"}) {
			if !bytes.Contains(doc, []byte("<!-- bench: "+s.Name+" -->")) {
				t.Errorf("docs/%s has no place for %s", name, s.Name)
			}
		}
	}
	path := filepath.Join(t.TempDir(), "doc.md")
	must(t, os.WriteFile(path, []byte("Before.\n<!-- bench: first-write -->\nold\n<!-- end -->\nBetween.\n<!-- bench: elsewhere -->\nkept\n<!-- end -->\nAfter.\n"), 0o644))
	exe, err := os.Executable()
	must(t, err)
	lamina := filepath.Join(t.TempDir(), "lamina") // which this program is under that name
	must(t, os.Symlink(exe, lamina))
	cmd := exec.Command("../../../scripts/benchmarks.sh", sampleRun, path)
	cmd.Env = append(os.Environ(), "LAMINA="+lamina)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	now, err := os.ReadFile(path)
	must(t, err)
	for _, want := range []string{"Before.\n<!-- bench: first-write -->\n\nopen, write 1 byte", "|\n\n<!-- end -->\nBetween.\n", "elsewhere -->\nkept\n<!-- end -->\nAfter.\n"} {
		if !strings.Contains(string(now), want) {
			t.Errorf("no %q in\n%s", want, now)
		}
	}
	if strings.Contains(string(now), "old") {
		t.Errorf("the old table is still there:\n%s", now)
	}
}
