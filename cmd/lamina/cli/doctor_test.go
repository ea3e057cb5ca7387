package cli

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"lamina/doctor"
)

// The doctor mounts a union where it is told to, and leaves nothing there.
func TestDoctor(t *testing.T) {
	l := newLayers(t)
	r := l.run("doctor", "--json", "upper")
	var report struct {
		Worst    doctor.Level
		Findings []doctor.Finding
	}
	if err := json.Unmarshal([]byte(r.out), &report); err != nil || r.err != "" {
		t.Fatalf("%v: %+v", err, r)
	}
	if want := map[doctor.Level]int{doctor.OK: 0, doctor.Note: 0, doctor.Costs: exitCosts, doctor.Broken: exitBroken}[report.Worst]; r.code != want {
		t.Errorf("exit status %d, worst finding %v", r.code, report.Worst)
	}
	last := report.Findings[len(report.Findings)-1]
	if last.Check != "trial" || last.Level == doctor.Broken || !strings.Contains(last.Found, "transport") {
		t.Errorf("the trial: %+v", last)
	}
	if left, err := os.ReadDir(l.path("upper")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}

	// For people: one finding, then its cost and its remedy.
	must(t, os.WriteFile(l.path("daemon.json"), []byte("{"), 0o600))
	r = l.run("doctor", "--daemon-json", l.path("daemon.json"))
	if r.code != exitBroken && !strings.Contains(r.out, "Docker Engine is not installed") {
		t.Errorf("exit status %d", r.code)
	}
	if !strings.Contains(r.out, "broken  docker-storage") || !strings.Contains(r.out, "fix: correct the file") {
		t.Errorf("%s", r.out)
	}
	if r := l.run("doctor", "none"); r.code != exitBroken || !strings.Contains(r.out, "none") {
		t.Errorf("a directory that is not there: %+v", r)
	}
}
