package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
)

// requests counts the FUSE requests that f causes on a mount, by their names.
func requests(t *testing.T, dir string, f func() error) (map[string]int, error) {
	t.Helper()
	trace := fmt.Sprintf("/sys/kernel/tracing/instances/lamina-bench-%d", os.Getpid())
	if err := os.Mkdir(trace, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err := os.Remove(trace); err != nil { // rmdir(2): it is full of files that cannot be removed
			t.Error(err)
		}
	}()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	set := func(name, value string) error { return os.WriteFile(filepath.Join(trace, name), []byte(value), 0) }
	err := errors.Join(
		set("buffer_size_kb", "4096"),
		set("events/fuse/fuse_request_send/filter", fmt.Sprintf("connection == %d", unix.Minor(st.Dev))),
		set("events/fuse/fuse_request_send/enable", "1"))
	if err == nil {
		err = f()
	}
	err = errors.Join(err, set("tracing_on", "0"))
	lines, readErr := os.ReadFile(filepath.Join(trace, "trace"))
	count := map[string]int{}
	for _, m := range regexp.MustCompile(`opcode \d+ \((\w+)\)`).FindAllStringSubmatch(string(lines), -1) {
		count[m[1]]++
	}
	return count, errors.Join(err, set("events/fuse/fuse_request_send/enable", "0"), readErr)
}

// The floor is only one as long as the kernel sends it the requests that it sends Lamina.
func TestFloorGetsLaminasRequests(t *testing.T) {
	if _, err := os.Stat("/sys/kernel/tracing/events/fuse/fuse_request_send"); err != nil {
		t.Skipf("this kernel cannot count FUSE requests (Linux 6.10 with tracefs can): %v", err)
	}
	const blocks = 200
	got := map[string]map[string]int{}
	s := tiny("tiny", nil)
	s.Contenders = []string{"lamina", "lamina-dev", "floor", "floor-dev"}
	s.Run = func(l *Lab) error {
		layer := l.Layer("large", func(ctx context.Context, dir string) error {
			return fillFile(ctx, filepath.Join(dir, huge), 8*mib) // too large to be copied whole
		})
		m := l.Metric(report.Metric{Name: "time", Unit: report.Microseconds, LessIsBetter: true})
		return l.Rounds(func(c *Contender) error {
			return l.On(c, Setup{Layer: layer}, func(u *Union) error {
				if _, err := fileSize(u.Path(huge)); err != nil {
					return err
				}
				count, err := requests(t, u.Dir, func() error { return reopening(l.ctx, u.Path(huge), blocks) })
				got[c.Name] = count
				m.Add(c, "", Sample{Value: 1})
				return err
			})
		})
	}
	o := bench(t, t.Context(), Config{Dir: t.TempDir()}, s)
	wantMeasured(t, o, "tiny", s.Contenders...)
	for floor, lamina := range map[string]string{"floor": "lamina", "floor-dev": "lamina-dev"} {
		if !maps.Equal(got[floor], got[lamina]) {
			t.Errorf("%s got %v, and %s %v: make bench/floor answer as Lamina does", floor, got[floor], lamina, got[lamina])
		}
		if n := got[floor]["FUSE_WRITE"]; n != blocks+1 {
			t.Errorf("%s got %d writes, want %d: %s", floor, n, blocks+1, strings.TrimSpace(fmt.Sprint(got[floor])))
		}
	}
}
