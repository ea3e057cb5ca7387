package bench

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
	"lamina/bench/rival"
)

// measuring makes a scenario of f over some contenders.
func measuring(name string, f func(l *Lab) error, contenders ...string) Scenario {
	return Scenario{Name: name, Contenders: contenders, Weight: 1, Space: func(Mode) int64 { return 100 * mib }, Run: f}
}

// wantCases checks that every contender has an answer in each case of a metric, and that none failed.
func wantCases(t *testing.T, o outcome, metric int, contenders, cases []string) {
	t.Helper()
	if o.err != nil || len(o.Failed) > 0 {
		t.Fatalf("%v; failed: %+v", o.err, o.Failed)
	}
	m := o.Scenarios[0].Metrics[metric]
	for _, c := range contenders {
		for _, k := range cases {
			if cell := m.Cell(c, k, 0); cell == nil || cell.Median <= 0 {
				t.Errorf("%s: %s has no answer for %q: %+v", m.Name, c, k, cell)
			}
		}
	}
}

// Every step of the metadata scenario does on every kind of tree what its name says: it would be an error if a program
// failed.
func TestMetadataSteps(t *testing.T) {
	contenders := []string{"plain", "overlayfs", "lamina"}
	o := bench(t, t.Context(), Config{Dir: t.TempDir()},
		measuring("metadata", func(l *Lab) error { return runTree(l, []string{"src/errors", "src/sort"}) }, contenders...))
	wantCases(t, o, 0, contenders,
		[]string{findFirst, findWarm, duWarm, gitStatus, checkout, chownTree, untar, copyAll, rmLower, rmOwn})
	for _, want := range []string{untar, rmLower, checkout, findWarm, duWarm, gitStatus, chownTree} {
		figures := o.Scenarios[0].Metrics[0].Figures
		if !slices.ContainsFunc(figures, func(f report.Figure) bool {
			return strings.Contains(f.Says, want) && strings.Contains(f.Says, "overlayfs")
		}) {
			t.Errorf("no target about %s: %+v", want, figures)
		}
	}
}

// The two branches differ in a fifth of the files, and git finds the tree as the layer's builder left it.
func TestTwoBranches(t *testing.T) {
	dir := t.TempDir()
	const files = 40
	for i := range files {
		if err := os.WriteFile(filepath.Join(dir, string(rune('A'+i))), []byte("text\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := twoBranches(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	out, err := rival.Run(t.Context(), "git", "-C", dir, "diff", "--name-status", "--no-renames", "main", otherFiles)
	if err != nil {
		t.Fatal(err)
	}
	if m, d, a := strings.Count(out, "M\t"), strings.Count(out, "D\t"), strings.Count(out, "A\t"); m != files/5-files/20 || d != files/20 || a != d {
		t.Errorf("%d modified, %d deleted, %d added:\n%s", m, d, a, out)
	}
	out, err = rival.Run(t.Context(), "git", "-C", dir, "status", "--porcelain", "--branch")
	if err != nil || out != "## main\n" {
		t.Errorf("status is %q, %v", out, err)
	}
}

// The compiler runs from the tree, with its cache there, and needs nothing else.
func TestCompileInTree(t *testing.T) {
	dir := t.TempDir()
	if err := wholeGo(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := compileIn(t.Context(), dir, "internal/goos"); err != nil {
		t.Fatal(err)
	}
	for _, made := range []string{"program", "cache/README"} {
		if _, err := os.Stat(filepath.Join(dir, made)); err != nil {
			t.Error(err)
		}
	}
}

// Both databases answer, on every kind of tree, and nothing of them stays behind.
func TestDatabases(t *testing.T) {
	contenders := []string{"plain", "overlayfs", "lamina"}
	o := bench(t, t.Context(), Config{Dir: reachable(t)},
		measuring("database", func(l *Lab) error { return runDatabases(l, mib, time.Second) }, contenders...))
	wantCases(t, o, 0, contenders, []string{caseSQLite, caseMariaDB})
	wantCases(t, o, 1, contenders, []string{caseSQLite, caseSQLiteWAL, caseMariaDB})
	wantCases(t, o, 3, contenders[1:], []string{caseSQLite, caseMariaDB})
	if m := o.Scenarios[0].Metrics[2]; m.Cell("lamina", "", 1) == nil {
		t.Errorf("no transactions over time: %+v", m.Cells)
	}
}

// A run that is interrupted while MariaDB works stops it, and leaves nothing.
func TestDatabaseInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	dir := reachable(t)
	o := bench(t, ctx, Config{Dir: dir}, measuring("database", func(l *Lab) error {
		go func() { // once the server has written to the mount
			for ctx.Err() == nil {
				if written, _ := filepath.Glob(filepath.Join(l.scratch, "main/*/upper/data/ibdata1")); len(written) > 0 {
					cancel()
				}
				time.Sleep(10 * time.Millisecond)
			}
		}()
		return runDatabases(l, mib, 4*time.Second)
	}, "lamina"))
	if o.err == nil || o.err.Error() != context.Canceled.Error() {
		t.Fatalf("interrupted: %v", o.err)
	}
}

// reachable is a temporary directory that other users can come to: the tests' own is not one.
func reachable(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != filepath.Clean(os.TempDir()) && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Who cannot reach the directory is told which one it is; who can may pass, for as long as it is needed.
func TestLetIn(t *testing.T) {
	who, err := unprivileged()
	if err != nil {
		t.Fatal(err)
	}
	top := reachable(t)
	closed := filepath.Join(top, "closed")
	inner := filepath.Join(closed, "inner")
	if err := errors.Join(os.Mkdir(closed, 0o700), os.Mkdir(inner, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := letIn(inner, who); err == nil || !strings.Contains(err.Error(), closed+" cannot be entered") {
		t.Errorf("through a closed directory: %v", err)
	}
	lock, err := letIn(closed, who)
	if err != nil {
		t.Fatal(err)
	}
	mode := func() uint32 {
		var st unix.Stat_t
		if err := unix.Stat(closed, &st); err != nil {
			t.Fatal(err)
		}
		return st.Mode & 0o777
	}
	if mode() != 0o711 {
		t.Errorf("let in with mode %o", mode())
	}
	if err := lock(); err != nil || mode() != 0o700 {
		t.Errorf("locked again with mode %o, %v", mode(), err)
	}
}

func TestParseSysbench(t *testing.T) {
	const out = `Threads started!

[ 1s ] thds: 4 tps: 627.04 qps: 12573.70 (r/w/o: 8807.47/2508.16/1258.07) lat (ms,95%): 14.21 err/s: 0.00 reconn/s: 0.00
[ 2s ] thds: 4 tps: 0.00 qps: 13635.71 (r/w/o: 9547.70/2727.34/1360.67) lat (ms,95%): 13.46 err/s: 0.00 reconn/s: 0.00
SQL statistics:
    transactions:                        2813   (702.19 per sec.)
`
	if got, err := parseSysbench(out); err != nil || !slices.Equal(got.rates, []float64{627.04, 0}) || got.transactions != 2813 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, wrong := range []string{"[ 1s ] thds: 4 tps: many qps: 1\n", "    transactions:   some  (1 per sec.)\n"} {
		if _, err := parseSysbench(wrong); err == nil {
			t.Errorf("%q passed", wrong)
		}
	}
}

func TestSecondHalf(t *testing.T) {
	got := secondHalf([]Sample{{Value: 1000}, {Value: 1000}, {Value: 3}, {Value: 5, PeakMemory: 7}, {Value: 4, PeakMemory: 9}})
	if got.Value != 4 || got.PeakMemory != 9 {
		t.Errorf("%+v", got)
	}
}
