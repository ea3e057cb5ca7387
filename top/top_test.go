package top

import (
	"errors"
	"strings"
	"testing"
	"time"

	"lamina/fusefs"
	"lamina/inventory"
	"lamina/pool"
	"lamina/top/live"

	tea "charm.land/bubbletea/v2"
	"github.com/jedib0t/go-pretty/v6/text"
)

var began = time.Unix(1_800_000_000, 0)

func mount(mnt string, read, written, errs uint64, transit int64) inventory.Mount {
	return inventory.Mount{Status: pool.Status{Mountpoint: mnt, Device: "0:1", PID: 1, Started: began, Errors: errs, Blocks: pool.Blocks{InTransit: transit},
		BytesNotCopied: int64(read) * 3, FUSE: fusefs.Status{BytesRead: read, BytesWritten: written, Requests: map[string]uint64{"read": read / 10, "write": written / 10}}}}
}

func TestRates(t *testing.T) {
	var s Sampler
	rows := s.Next(began, []inventory.Mount{mount("/a", 100, 1000, 1, 5)})
	if r := rows[0]; len(rows) != 1 || r.Read != 0 || r.Requests != 0 || r.InTransit != 5 || r.AllErrors != 1 || r.NotCopied != 300 {
		t.Errorf("the first sample: %+v", rows)
	}
	rows = s.Next(began.Add(2*time.Second), []inventory.Mount{mount("/a", 300, 5000, 4, 6), mount("/new", 9, 9, 9, 9)})
	if r := rows[0]; r.Read != 100 || r.Written != 2000 || r.Errors != 1.5 || r.Requests != 210 || r.InTransit != 6 {
		t.Errorf("%+v", r)
	}
	if r := rows[1]; r.Read != 0 || r.Errors != 0 {
		t.Errorf("a new mount has rates: %+v", r)
	}
	// A server that took over counts anew.
	if r := s.Next(began.Add(4*time.Second), []inventory.Mount{mount("/a", 10, 6000, 0, 6)})[0]; r.Read != 0 || r.Written != 500 || r.Errors != 0 {
		t.Errorf("%+v", r)
	}
	// Another mount in the same place is not the same mount.
	other := mount("/a", 1000, 10000, 0, 0)
	other.Started = began.Add(time.Hour)
	if r := s.Next(began.Add(6*time.Second), []inventory.Mount{other})[0]; r.Read != 0 || r.Written != 0 {
		t.Errorf("%+v", r)
	}
}

func TestSort(t *testing.T) {
	rows := func() []Row {
		return []Row{
			{Mountpoint: "/b", Read: 3, Container: &inventory.Container{ID: "z"}, Queue: 1},
			{Mountpoint: "/a", Read: 1, Written: 9, NotCopied: 5, AllErrors: 7},
			{Mountpoint: "/c", Read: 2, Requests: 1, Copied: 1, InTransit: 4, Errors: 1},
		}
	}
	for key, want := range map[Key]string{ByMount: "/a/b/c", ByContainer: "/a/c/b", ByRequests: "/c/a/b", ByRead: "/b/c/a", ByWritten: "/a/b/c",
		ByAvoided: "/a/b/c", ByCopied: "/c/a/b", ByTransit: "/c/a/b", ByQueue: "/b/a/c", ByErrors: "/c/a/b"} {
		r := rows()
		Sort(r, key, false)
		if got := r[0].Mountpoint + r[1].Mountpoint + r[2].Mountpoint; got != want {
			t.Errorf("by %v: %s, want %s", key, got, want)
		}
		if k, err := ParseKey(key.String()); err != nil || k != key {
			t.Errorf("%v: %v %v", key, k, err)
		}
	}
	r := rows()
	if Sort(r, ByRead, true); r[0].Mountpoint != "/a" {
		t.Errorf("inverted: %+v", r)
	}
	if len(keyLetters) != len(keyNames) {
		t.Error("a key without a letter")
	}
	if _, err := ParseKey("size"); err == nil {
		t.Error("a key that is none")
	}
}

func TestTable(t *testing.T) {
	rows := []Row{
		{Mountpoint: "/var/lib/containers/" + strings.Repeat("層", 40) + "/merged", Container: &inventory.Container{Namespace: "k8s.io", ID: strings.Repeat("a", 64)},
			Read: 1e15, Written: 1e12, NotCopied: 1 << 60, Requests: 1e7, Errors: 0.25, AllErrors: 1e18, InTransit: 123456},
		{Mountpoint: "/evil\x1b[2J\n", Container: &inventory.Container{ID: "x\x1b]0;y\a"}, Flushing: true},
	}
	for _, width := range []int{80, 120, 200, 0} {
		lines := Table(rows, width)
		if len(lines) != 3 {
			t.Fatalf("%q", lines)
		}
		for _, l := range lines {
			if w := text.StringWidth(l); w != text.StringWidth(lines[0]) || width > 0 && w != width {
				t.Errorf("width %d: a line of %d: %q", width, w, l)
			}
			if strings.ContainsAny(l, "\x1b\n\a") {
				t.Errorf("%q reaches the terminal", l)
			}
		}
		if !strings.Contains(lines[1], "/merged ") || !strings.Contains(lines[2], "(flushing)") {
			t.Errorf("width %d: %q", width, lines)
		}
	}
	for f, want := range map[float64]string{0: "0", 0.25: "0.2", 9.96: "10.0", 12: "12", 99999: "99999", 123456: "123k", 1e18: "1000000T"} {
		if got := live.Count(f); got != want {
			t.Errorf("%v: %s, want %s", f, got, want)
		}
	}
	for f, want := range map[float64]string{0: "0", 1023: "1023", 1024: "1.0K", 20 << 20: "20M", 1 << 60: "1024P"} {
		if got := live.Size(f); got != want {
			t.Errorf("%v: %s, want %s", f, got, want)
		}
	}
}

func press(s *live.Screen, keys ...rune) (quits bool) {
	for _, k := range keys {
		_, cmd := s.Update(tea.KeyPressMsg{Code: k, Text: string(k)})
		if cmd != nil {
			if _, quits = cmd().(tea.QuitMsg); quits {
				return true
			}
		}
	}
	return false
}

func TestScreen(t *testing.T) {
	s := live.NewScreen(&View{Source: func() ([]inventory.Mount, error) { return nil, nil }, Sort: ByRead}, time.Millisecond)
	if got := strings.Join(s.Lines(), "\n"); !strings.Contains(got, "asking") {
		t.Errorf("before the first answer: %s", got)
	}
	s.Update(tea.WindowSizeMsg{Width: 120, Height: 8})
	var mounts []inventory.Mount
	for i := range 20 {
		mounts = append(mounts, mount("/m"+string(rune('a'+i)), uint64(i), 0, 0, 0))
	}
	s.Update(live.Sampled{At: began, Sample: mounts, Err: errors.New("one server\nhangs\x1b")})
	screenful := func() string {
		lines := s.Lines()
		if len(lines) != 8 {
			t.Errorf("%d lines on a screen of 8", len(lines))
		}
		for _, l := range lines {
			if text.StringWidth(l) > 120 || strings.Contains(l, "\x1b") {
				t.Errorf("%q", l)
			}
		}
		return strings.Join(lines, "\n")
	}
	got := screenful()
	for _, want := range []string{"20 mounts, 1 servers", "by read", "one server; hangs", "MOUNT POINT", "/ma", "/md", "q quit"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	press(s, 'm', 'i')
	if got := screenful(); !strings.Contains(got, "by mount inverted") || !strings.Contains(got, "/mt") || strings.Contains(got, "/ma ") {
		t.Errorf("inverted:\n%s", got)
	}
	press(s, 'j', 'j')
	if got := screenful(); strings.Contains(got, "/mt") || !strings.Contains(got, "/mr") {
		t.Errorf("scrolled:\n%s", got)
	}
	for range 50 {
		press(s, 'j')
	}
	if got := screenful(); !strings.Contains(got, "/ma") {
		t.Errorf("at the end:\n%s", got)
	}
	s.Update(live.Sampled{At: began.Add(time.Second), Sample: mounts[:1]}) // the list got shorter than what was scrolled past
	if got := screenful(); !strings.Contains(got, "/ma") || strings.Contains(got, "hangs") {
		t.Errorf("after it:\n%s", got)
	}
	press(s, '?')
	if got := strings.Join(s.Lines(), "\n"); !strings.Contains(got, "a avoided") || len(s.Lines()) > 8 {
		t.Errorf("help:\n%s", got)
	}
	if press(s, '?', 'x', '1') || !press(s, 'q') {
		t.Error("q, and only q, quits")
	}
}
