package top

import (
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/jedib0t/go-pretty/v6/text"
)

// figure is a column right of the names; all have one width. On a narrow screen those with the highest spare go first.
type figure struct {
	title string
	spare int
	value func(*Row) string
}

var figures = []figure{
	{"REQ/S", 2, func(r *Row) string { return count(r.Requests) }},
	{"READ/S", 0, func(r *Row) string { return size(r.Read) }},
	{"WRITE/S", 0, func(r *Row) string { return size(r.Written) }},
	{"AVOIDED", 0, func(r *Row) string { return size(float64(r.NotCopied)) }},
	{"COPIED/S", 4, func(r *Row) string { return size(r.Copied) }},
	{"TRANSIT", 1, func(r *Row) string { return count(float64(r.InTransit)) }},
	{"QUEUE", 0, func(r *Row) string { return count(float64(r.Queue)) }},
	{"ERR/S", 0, func(r *Row) string { return count(r.Errors) }},
	{"ERRORS", 3, func(r *Row) string { return count(float64(r.AllErrors)) }},
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
		return printable(c)
	}
	return "-"
}

func where(r *Row) string {
	s := printable(r.Mountpoint)
	if r.Flushing {
		s += " (flushing)"
	}
	return s
}

// printable makes a name harmless for a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
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

// count shows a number in at most seven characters.
func count(f float64) string {
	switch {
	case f == 0:
		return "0"
	case f < 10:
		return fmt.Sprintf("%.1f", f)
	case f < 1e5:
		return fmt.Sprintf("%.0f", f)
	}
	return scaled(f, 1000, []string{"k", "M", "G", "T"})
}

// size shows a number of bytes in at most seven characters.
func size(f float64) string {
	if f < 1024 {
		return fmt.Sprintf("%.0f", f)
	}
	return scaled(f, 1024, []string{"K", "M", "G", "T", "P"})
}

func scaled(f, step float64, units []string) string {
	i := -1
	for i < len(units)-1 && (i < 0 || f >= step) {
		f, i = f/step, i+1
	}
	if f < 10 {
		return fmt.Sprintf("%.1f%s", f, units[i])
	}
	return fmt.Sprintf("%.0f%s", f, units[i])
}
