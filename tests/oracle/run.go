package oracle

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

// compareEvery is how many operations lie between two comparisons of the whole trees.
const compareEvery = 40

// run is one sequence of operations on both mounts.
type run struct {
	t           testing.TB
	combination mnt.Combination
	lowers      []string
	since       int64

	overlayMount, laminaMount *mnt.T
	overlay, lamina           *side
}

// mismatch is where the two mounts parted.
type mismatch struct {
	after int // operations performed
	what  string
}

func (m *mismatch) Error() string { return fmt.Sprintf("after operation %d: %s", m.after, m.what) }

// newRun mounts both sides with new uppers.
func newRun(t testing.TB, lowers []string, c mnt.Combination) *run {
	t.Helper()
	r := &run{t: t, combination: c, lowers: lowers, since: time.Now().Unix() - 1}
	r.overlayMount = mnt.Start(t, rival.Config{System: rival.Overlay, Lowers: lowers})
	r.laminaMount = mnt.Start(t, rival.Config{System: mnt.Subject(), Lowers: lowers, Options: c.Options()})
	r.open()
	t.Cleanup(r.close)
	return r
}

func (r *run) open() {
	r.t.Helper()
	var err error
	if r.overlay, err = openSide(r.overlayMount.Dir, r.since); err != nil {
		r.t.Fatal(err)
	}
	if r.lamina, err = openSide(r.laminaMount.Dir, r.since); err != nil {
		r.t.Fatal(err)
	}
}

func (r *run) close() {
	for _, s := range []**side{&r.overlay, &r.lamina} {
		if *s != nil {
			(*s).close()
			*s = nil
		}
	}
}

func (r *run) remount() {
	r.t.Helper()
	r.close()
	r.overlayMount.Remount()
	r.laminaMount.Remount()
	r.open()
}

// play performs the operations, comparing results always and trees now and then, and the trees at the end.
func (r *run) play(ops []op) error {
	r.t.Helper()
	for i, o := range ops {
		if o.kind == "remount" {
			r.remount()
			continue
		}
		want := r.overlay.do(o)
		got := r.lamina.do(o)
		if want != got && r.forgiven(o, want, got) == nil {
			return &mismatch{i, fmt.Sprintf("%v\n    overlayfs: %s\n    subject:   %s", o, want, got)}
		}
		if i%compareEvery == compareEvery-1 {
			if err := r.compare(i); err != nil {
				return err
			}
		}
	}
	return r.compare(len(ops))
}

// compare compares everything that there is to see.
func (r *run) compare(after int) error {
	want, err := r.overlay.snapshot()
	if err != nil {
		return &mismatch{after, "overlayfs: " + err.Error()}
	}
	got, err := r.lamina.snapshot()
	if err != nil {
		return &mismatch{after, "subject: " + err.Error()}
	}
	if diffs := r.diffSnapshots(want, got); len(diffs) > 0 {
		slices.Sort(diffs)
		return &mismatch{after, fmt.Sprintf("%d differences\n  %s", len(diffs), strings.Join(diffs[:min(8, len(diffs))], "\n  "))}
	}
	return nil
}

// afterwards compares once more from a fresh mount, and then the flattened upper layer on kernel overlayfs itself.
func (r *run) afterwards(n int) error {
	r.t.Helper()
	r.remount()
	if err := r.compare(n); err != nil {
		return fmt.Errorf("after remount: %w", err)
	}
	r.close()
	r.laminaMount.Unmount()
	if r.laminaMount.System == rival.Lamina {
		r.laminaMount.Fsck()
		r.laminaMount.Flatten()
	}
	flat := mnt.Start(r.t, rival.Config{System: rival.Overlay, Lowers: r.lowers,
		Upper: r.laminaMount.Upper, Work: r.laminaMount.Work})
	var err error
	if r.overlay, err = openSide(r.overlayMount.Dir, r.since); err != nil {
		return err
	}
	if r.lamina, err = openSide(flat.Dir, r.since); err != nil {
		return err
	}
	if err := r.compare(n); err != nil {
		return fmt.Errorf("after flatten, on kernel overlayfs: %w", err)
	}
	r.close()
	flat.Unmount()
	return nil
}

func (r *run) playAndAfterwards(ops []op) error {
	r.t.Helper()
	if err := r.play(ops); err != nil {
		return err
	}
	return r.afterwards(len(ops))
}

// shrink looks for a short sequence that still fails: it drops ever smaller parts as long as the rest fails, within the
// time given.
func shrink(fails func([]op) bool, ops []op, budget time.Duration) []op {
	deadline := time.Now().Add(budget)
	for size := len(ops) / 2; size > 0; size /= 2 {
		for from := 0; from < len(ops); {
			if time.Now().After(deadline) {
				return ops
			}
			without := slices.Concat(ops[:from], ops[min(from+size, len(ops)):])
			if fails(without) {
				ops = without
			} else {
				from += size
			}
		}
	}
	return ops
}

// cut keeps the operations up to where a mismatch showed.
func cut(ops []op, err error) []op {
	var m *mismatch
	if errors.As(err, &m) {
		return ops[:min(m.after+1, len(ops))]
	}
	return ops
}
