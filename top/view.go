package top

import (
	"fmt"
	"strings"
	"time"

	"lamina/inventory"
	"lamina/top/live"
)

// Source lists the mounts, and tells what could not be asked.
type Source func() ([]inventory.Mount, error)

// View is the mounts on a screen.
type View struct {
	Source  Source
	Sort    Key
	Reverse bool

	sampler Sampler
	rows    []Row
}

var _ live.View = (*View)(nil)

// Name implements live.View, as all of the following.
func (v *View) Name() string { return "lamina top" }

func (v *View) Sample() (any, error) { return v.Source() }

func (v *View) Take(at time.Time, sample any) {
	v.rows = v.sampler.Next(at, sample.([]inventory.Mount))
	v.sort()
}

func (v *View) sort() { Sort(v.rows, v.Sort, v.Reverse) }

func (v *View) Head() (how, summarized string) {
	how = "by " + v.Sort.String()
	if v.Reverse {
		how += " inverted"
	}
	return how, summary(v.rows)
}

func (v *View) Table(width int) []string { return Table(v.rows, width) }

func (v *View) Data(at time.Time) any {
	return struct {
		Time   time.Time `json:"time"`
		Mounts []Row     `json:"mounts"`
	}{at, v.rows}
}

func (v *View) Key(key string) {
	if key == "i" {
		v.Reverse = !v.Reverse
	} else if i := strings.Index(keyLetters, key); i >= 0 && len(key) == 1 {
		v.Sort = Key(i)
	}
	v.sort()
}

func (v *View) Keys() string {
	return "i invert  sort by: " + strings.Join(strings.Split(keyLetters, ""), " ")
}

func (v *View) Help() []string {
	lines := []string{"sort by"}
	for i := 0; i < len(keyNames); i += 2 {
		lines = append(lines, fmt.Sprintf("  %c %-14s %c %s", keyLetters[i], keyNames[i], keyLetters[i+1], keyNames[i+1]))
	}
	return append(lines, "i invert the order", "",
		"READ, WRITE: bytes through the server; what passes through to the kernel is not counted.",
		"AVOIDED: bytes of lower files that were not copied. TRANSIT: blocks that are to be completed.")
}

// summary says how much all mounts do.
func summary(rows []Row) string {
	var read, written, errors float64
	servers := map[int]bool{}
	for i := range rows {
		servers[rows[i].PID] = true
		read, written, errors = read+rows[i].Read, written+rows[i].Written, errors+rows[i].Errors
	}
	return fmt.Sprintf("%d mounts, %d servers  read %s/s  written %s/s  errors %s/s", len(rows), len(servers), live.Size(read), live.Size(written), live.Count(errors))
}
