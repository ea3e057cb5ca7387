package bench

import (
	"strings"
	"testing"

	"lamina/bench/rival"
)

// Two containers start, one after the other, and one is committed; everything else is a matter of sizes.
func TestContainers(t *testing.T) {
	dir := t.TempDir()
	lamina, err := rival.BinaryPath()
	if err != nil {
		t.Fatal(err)
	}
	run, err := RunContainers(t.Context(), Config{Lamina: lamina, Dir: dir, Mode: Quick, Rounds: 1, Scenarios: []string{"container-small", "container-commit"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(run.Failed) > 0 || len(run.Scenarios) != 2 {
		t.Fatalf("%d scenarios; failed: %+v", len(run.Scenarios), run.Failed)
	}
	for _, s := range run.Scenarios {
		if len(s.Metrics) == 0 {
			t.Errorf("%s has no metrics", s.Name)
		}
		for _, m := range s.Metrics {
			for _, c := range m.Cells {
				if c.Median <= 0 {
					t.Errorf("%s, %s: %+v", s.Name, m.Name, c)
				}
			}
		}
	}
	if _, err := RunContainers(t.Context(), Config{Dir: dir, Scenarios: []string{"metadata"}}); err == nil || !strings.Contains(err.Error(), "metadata") {
		t.Errorf("a scenario of others: %v", err)
	}
	if _, err := RunContainers(t.Context(), Config{Dir: dir, Contenders: []string{"plain"}}); err == nil || !strings.Contains(err.Error(), "plain") {
		t.Errorf("a contender of others: %v", err)
	}
}
