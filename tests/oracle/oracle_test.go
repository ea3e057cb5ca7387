// Package oracle plays random operations on two mounts of the same layers, Lamina and kernel overlayfs, and compares
// what programs could tell.
//
//	go test ./tests/oracle -oracle.seed=N -run TestRandom/COMBINATION    replays a failure
//	go test ./tests/oracle -oracle.soak=1h                               looks for rare ones
package oracle

import (
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
	"lamina/tests/probe"
)

var (
	seedFlag = flag.Uint64("oracle.seed", 1, "seed of the first run; 0 takes one from the clock")
	opsFlag  = flag.Int("oracle.ops", 600, "operations in a run")
	runsFlag = flag.Int("oracle.runs", 1, "runs of every combination, each with the next seed")
	fullFlag = flag.Bool("oracle.full", false, "every combination, not just a Latin square of them")
	soakFlag = flag.Duration("oracle.soak", 0, "go on with new seeds for this long")
)

func TestMain(m *testing.M) { mnt.Main(m) }

func TestRandom(t *testing.T) {
	probe.OverlayTmpfile.Need(t)
	probe.XattrEscape.Need(t)
	seed := mnt.Seed(t, "oracle.seed", *seedFlag)
	combinations := mnt.Square()
	if *fullFlag || *soakFlag > 0 {
		combinations = mnt.Matrix()
	}
	lowers := layers.Generate(t)
	end := time.Now().Add(*soakFlag)
	for n := 0; n < *runsFlag || time.Now().Before(end); n++ {
		for _, c := range combinations {
			s := seed + uint64(n)
			t.Run(fmt.Sprint(c), func(t *testing.T) {
				t.Logf("-oracle.seed=%d -oracle.ops=%d", s, *opsFlag)
				oneRun(t, lowers, c, s)
			})
			if t.Failed() && *soakFlag > 0 {
				return
			}
		}
		seed++
	}
}

func oneRun(t *testing.T, lowers []string, c mnt.Combination, seed uint64) {
	ops := generate(seed, *opsFlag)
	r := newRun(t, lowers, c)
	// A failure while playing is shrunk by playing alone, a later one with all that follows.
	trial := (*run).play
	err := r.play(ops)
	if err == nil {
		trial = (*run).playAndAfterwards
		err = r.afterwards(len(ops))
	}
	if err == nil {
		return
	}
	r.close()
	t.Errorf("seed %d: %v", seed, err)
	again := func(ops []op) (err error) {
		t.Run("shrinking", func(t *testing.T) {
			r := newRun(t, lowers, c)
			r.laminaMount.SkipFsck = true
			defer r.close()
			err = trial(r, ops)
		})
		return err
	}
	short := shrink(func(ops []op) bool { return again(ops) != nil }, cut(ops, err), 30*time.Second)
	var log strings.Builder
	for i, o := range short {
		fmt.Fprintf(&log, "%4d  %v\n", i, o)
	}
	t.Errorf("fails with these %d operations:\n%s%v", len(short), log.String(), again(short))
}

// Inode numbers and the device number need no oracle: they must be stable.
func TestNumbersAreStable(t *testing.T) {
	lowers := layers.Generate(t)
	m := mnt.Start(t, rival.Config{Lowers: lowers})
	before := numbers(t, m.Dir)
	if len(before) < 50 {
		t.Fatalf("only %d objects", len(before))
	}

	touchEverything(t, m.Dir, before)
	same(t, "copy-up", before, numbers(t, m.Dir))
	m.Remount()
	same(t, "remount", before, numbers(t, m.Dir))
	m.Remount()
	same(t, "another remount", before, numbers(t, m.Dir))
}

// number is what must not change about an object.
type number struct {
	ino  uint64
	mode uint32 // its type
}

// numbers maps every path to its number, checking that readdir and stat agree and that there is one device.
func numbers(t *testing.T, root string) map[string]number {
	t.Helper()
	var top unix.Stat_t
	if err := unix.Stat(root, &top); err != nil {
		t.Fatal(err)
	}
	dev := top.Dev
	all := map[string]number{}
	var walk func(dir string)
	walk = func(dir string) {
		for name, ino := range dirInodes(t, dir) {
			var st unix.Stat_t
			p := dir + "/" + name
			if err := unix.Lstat(p, &st); err != nil {
				t.Fatal(err)
			}
			if ino != st.Ino {
				t.Errorf("%s: readdir says inode %d, stat %d", p, ino, st.Ino)
			}
			if st.Dev != dev {
				t.Errorf("%s: device %#x, the root has %#x", p, st.Dev, dev)
			}
			all[strings.TrimPrefix(p, root)] = number{st.Ino, st.Mode & unix.S_IFMT}
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				walk(p)
			}
		}
	}
	walk(root)
	return all
}

// dirInodes reads d_ino, which package os hides.
func dirInodes(t *testing.T, dir string) map[string]uint64 {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	all := map[string]uint64{}
	buf := make([]byte, 1<<16)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return all
		}
		for b := buf[:n]; len(b) > 0; {
			reclen := int(b[16]) | int(b[17])<<8
			var ino uint64
			for i := 7; i >= 0; i-- {
				ino = ino<<8 | uint64(b[i])
			}
			if name := unix.ByteSliceToString(b[19:reclen]); name != "." && name != ".." {
				all[name] = ino
			}
			b = b[reclen:]
		}
	}
}

// touchEverything makes every object move to the upper layer.
func touchEverything(t *testing.T, root string, all map[string]number) {
	t.Helper()
	for p, n := range all {
		var err error
		switch n.mode {
		case unix.S_IFREG:
			var fd int
			if fd, err = unix.Open(root+p, unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
				_, err = unix.Pwrite(fd, []byte("x"), 3)
				unix.Close(fd)
			}
		default:
			err = unix.Lchown(root+p, 7, 7)
		}
		if err != nil {
			t.Errorf("touching %s: %v", p, err)
		}
	}
}

func same(t *testing.T, what string, before, after map[string]number) {
	t.Helper()
	for p, n := range before {
		if after[p] != n {
			t.Errorf("%s changed %s: %+v -> %+v", what, p, n, after[p])
		}
	}
	if len(after) != len(before) {
		t.Errorf("%s: %d objects before, %d after", what, len(before), len(after))
	}
}

// No rename within the mount gives EXDEV, whichever layers source and target come from.
func TestNoRenameCrossesDevices(t *testing.T) {
	lowers := layers.Generate(t)
	m := mnt.Start(t, rival.Config{Lowers: lowers})
	for i, from := range []string{"f3", "h0", "d0", "d1/s0", "d4", "sg", "l0", "c0", "p0", "d2/f0"} {
		for _, into := range []string{"", "tmp/"} {
			to := fmt.Sprintf("%smoved%d", into, i)
			if err := unix.Rename(m.Path(from), m.Path(to)); err != nil {
				t.Errorf("rename %s to %s: %v", from, to, err)
			}
			from = to
		}
	}
	if err := unix.Link(m.Path("f1"), m.Path("tmp/linked")); err != nil {
		t.Errorf("link: %v", err)
	}
}
