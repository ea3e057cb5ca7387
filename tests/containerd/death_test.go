package containerd

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"

	"lamina/bench/engine"
)

// writer writes record after record into the image's log, each on the disk before it says so, and reads back what it wrote
// ten records before.
const writer = `n=0
while :; do
	printf '%08d' $n | dd of=/srv/big.log bs=8 seek=$((n * 511)) conv=notrunc,fsync 2>/dev/null || echo FAILED write $n
	if [ $n -ge 10 ]; then
		o=$((n - 10)); got=$(dd if=/srv/big.log bs=8 skip=$((o * 511)) count=1 2>/dev/null) || echo FAILED read $o
		[ "$got" = "$(printf '%08d' $o)" ] || echo FAILED $o is "$got"
	fi
	n=$((n + 1)); [ $n -lt 8000 ] || n=0
	echo $n
done`

// written is how many records the writer has said to be written. A failure it met fails the test.
func (r *rig) written(c *engine.Container) int {
	r.t.Helper()
	out, err := c.Output()
	r.must(err)
	if strings.Contains(out, "FAILED") {
		r.t.Fatalf("the container noticed:\n%s", out[max(0, len(out)-2000):])
	}
	return strings.Count(out, "\n")
}

// goesOn waits until the writer has written more.
func (r *rig) goesOn(c *engine.Container) {
	r.t.Helper()
	had := r.written(c)
	r.eventually("the container writes on", func() bool { return r.written(c) >= had+20 })
}

// Daemons are killed while containers write. The containers notice nothing; the daemons' successors know them, run new ones
// beside them, and remove everything.
func TestDaemonsAreKilled(t *testing.T) {
	each(t, func(t *testing.T, s string) {
		r := start(t, engine.Config{})
		image := r.image(s)
		var writers []*engine.Container
		for i := range 3 {
			c, err := r.Run(r.ctx, engine.Spec{ID: fmt.Sprint("writer", i), Image: image, Snapshotter: s, Args: []string{"sh", "-c", writer}})
			r.must(err)
			writers = append(writers, c)
		}
		all := func() {
			t.Helper()
			for _, c := range writers {
				r.goesOn(c)
			}
		}
		again := func() {
			t.Helper()
			image, err := r.Client.GetImage(r.ctx, image.Name())
			r.must(err)
			for _, c := range writers {
				pid := c.Pid()
				r.must(r.Load(r.ctx, c))
				if st, err := c.Status(r.ctx); err != nil || st != client.Running || c.Pid() != pid {
					t.Fatalf("%s is %v, pid %d, was %d: %v", c.ID(), st, c.Pid(), pid, err)
				}
				r.says(c, "cat /srv/tree/a", "a")
			}
			all()
			fresh := r.sleeper(image, s, "fresh")
			r.says(fresh, "cat /srv/tree/a", "a")
			r.must(fresh.Remove(r.ctx))
		}
		all()
		if s == engine.Lamina {
			r.must(r.KillSnapshotter())
			all()
			r.must(r.StartSnapshotter(r.ctx))
			again()
		}
		r.must(r.KillContainerd())
		all()
		r.must(r.StartContainerd(r.ctx))
		again()
		if s == engine.Lamina {
			r.must(r.KillContainerd())
			r.must(r.KillSnapshotter())
			all()
			r.must(r.StartSnapshotter(r.ctx))
			r.must(r.StartContainerd(r.ctx))
			again()
		}
		for _, c := range writers {
			n := r.written(c)
			r.must(c.Stop(r.ctx))
			r.must(c.Again(r.ctx)) // from the start, over what it has written
			r.goesOn(c)
			if got := strings.TrimSpace(r.sh(c, "dd if=/srv/big.log bs=8 skip=511 count=1 2>/dev/null")); got != "00000001" {
				t.Errorf("%s, %d records: the second is %q", c.ID(), n, got)
			}
			r.must(c.Remove(r.ctx))
		}
		names, err := r.SnapshotNames(r.ctx, s)
		r.must(err)
		if len(names) != len(must(layers())) {
			t.Errorf("%d snapshots are left of %d layers: %q", len(names), len(must(layers())), names)
		}
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Lamina's snapshotter, when it is stopped in order, as on an upgrade, goes on where it was. (overlayfs's is a part of
// containerd.)
func TestUpgrade(t *testing.T) {
	r := start(t, engine.Config{})
	image := r.image(engine.Lamina)
	c := r.sleeper(image, engine.Lamina, "c")
	r.sh(c, "echo one >>/srv/tree/a")
	for i := range 3 {
		r.must(r.StopSnapshotter())
		r.sh(c, "echo "+strconv.Itoa(i)+" >>/srv/tree/a; sync")
		r.must(r.StartSnapshotter(r.ctx))
	}
	r.says(c, "cat /srv/tree/a", "a\none\n0\n1\n2")
	r.says(r.sleeper(image, engine.Lamina, "d"), "cat /srv/tree/a", "a")
}
