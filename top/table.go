package top

import (
	"fmt"
	"slices"
	"strings"

	"lamina/top/live"

	"github.com/jedib0t/go-pretty/v6/text"
)

// figure is a column right of the names; all have one width. On a narrow screen those with the highest spare go first.
type figure struct {
	title string
	spare int
	value func(*Row) string
}

var figures = []figure{
	{"REQ/S", 2, func(r *Row) string { return live.Count(r.Requests) }},
	{"READ/S", 0, func(r *Row) string { return live.Size(r.Read) }},
	{"WRITE/S", 0, func(r *Row) string { return live.Size(r.Written) }},
	{"AVOIDED", 0, func(r *Row) string { return live.Size(float64(r.NotCopied)) }},
	{"COPIED/S", 4, func(r *Row) string { return live.Size(r.Copied) }},
	{"TRANSIT", 1, func(r *Row) string { return live.Count(float64(r.InTransit)) }},
	{"QUEUE", 0, func(r *Row) string { return live.Count(float64(r.Queue)) }},
	{"ERR/S", 0, func(r *Row) string { return live.Count(r.Errors) }},
	{"ERRORS", 3, func(r *Row) string { return live.Count(float64(r.AllErrors)) }},
}

// fitting are the figures for a screen of that width.
func fitting(width int) []figure {
	shown := figures
	for spare := 4; width > 0 && spare > 0 && len(shown)*figureWidth+leastNames > width; spare-- {
		shown = slices.DeleteFunc(slices.Clone(shown), func(f figure) bool { return f.spare == spare })
	}
	return shown
}

const (
	figureWidth   = 9 // with the space before it
	leastNames    = 24
	containerPart = 3 // of the names' width, the container gets 1/containerPart
)

// Table is a heading and a line for each row, none longer than width where that is possible. Width 0: as long as it takes.
func Table(rows []Row, width int) []string {
	shown := fitting(width)
	names := max(leastNames, width-len(shown)*figureWidth)
	owner := names/containerPart - 1
	if width == 0 {
		names, owner = 0, 0
		for i := range rows {
			owner = max(owner, text.StringWidth(who(&rows[i])))
			names = max(names, text.StringWidth(where(&rows[i])))
		}
		owner = max(owner, len("CONTAINER"))
		names = max(names, len("MOUNT POINT")) + owner + 1
	}
	lines := make([]string, 0, len(rows)+1)
	line := func(container, mount string, figure func(i int) string) {
		var b strings.Builder
		b.WriteString(text.Pad(text.Snip(container, owner, "…"), owner, ' ') + " ")
		b.WriteString(text.Pad(tail(mount, names-owner-1), names-owner-1, ' '))
		for i := range shown {
			fmt.Fprintf(&b, "%*s", figureWidth, figure(i))
		}
		lines = append(lines, b.String())
	}
	line("CONTAINER", "MOUNT POINT", func(i int) string { return shown[i].title })
	for i := range rows {
		line(who(&rows[i]), where(&rows[i]), func(j int) string { return shown[j].value(&rows[i]) })
	}
	return lines
}

func who(r *Row) string {
	if c := r.Container.String(); c != "" {
		return live.Printable(c)
	}
	return "-"
}

func where(r *Row) string {
	s := live.Printable(r.Mountpoint)
	if r.Flushing {
		s += " (flushing)"
	}
	return s
}

// tail keeps the end of a path, which says more than its beginning.
func tail(s string, width int) string {
	for cut := false; text.StringWidth(s) > width; cut = true {
		_, n := firstRune(s)
		if cut {
			_, skip := firstRune(s[len("…"):])
			s = s[len("…")+skip:]
		} else {
			s = s[n:]
		}
		s = "…" + s
		if s == "…" {
			break
		}
	}
	return s
}

func firstRune(s string) (r rune, size int) {
	for i, c := range s {
		if i > 0 {
			return r, i
		}
		r = c
	}
	return r, len(s)
}
