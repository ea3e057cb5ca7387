package bench

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
	"lamina/bench/rival"
)

// tiny is a scenario that takes no time: one metric, one sample a contender and round.
func tiny(name string, f func(l *Lab, u *Union) error) Scenario {
	return Scenario{
		Name: name, Title: name, Contenders: []string{"plain", "overlayfs", "lamina", "lamina-dev"}, Weight: 1,
		Space: func(Mode) int64 { return mib },
		Run: func(l *Lab) error {
			layer := l.Layer("tiny", func(_ context.Context, dir string) error {
				return os.WriteFile(filepath.Join(dir, "file"), make([]byte, 64*kib), 0o644)
			})
			m := l.Metric(report.Metric{Name: "time", Unit: report.Microseconds, LessIsBetter: true})
			return l.Rounds(func(c *Contender) error {
				return l.On(c, Setup{Layer: layer}, func(u *Union) error {
					s, err := u.Time(func() error { return f(l, u) })
					if err == nil {
						m.Add(c, "", s)
					}
					return err
				})
			})
		},
	}
}

func writeByte(_ *Lab, u *Union) error { return firstByte(u.Path("file"), 1) }

// automatic is the Filesystem of a user who chose none; tests that choose none measure on the directory.
const automatic = "automatic"

// outcome is what a run said and left behind.
type outcome struct {
	*report.Run
	err  error
	said string
}

// bench runs scenarios in dir and checks that nothing is left there, or mounted, or attached.
func bench(t *testing.T, ctx context.Context, cfg Config, scenarios ...Scenario) outcome {
	t.Helper()
	binary, err := rival.BinaryPath()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cfg.Lamina, cfg.Mode, cfg.Progress, cfg.Rounds, cfg.image = binary, Quick, &said, 2, 512*mib
	switch cfg.Filesystem {
	case "":
		cfg.Filesystem = OnDir
	case automatic:
		cfg.Filesystem = ""
	}
	env := os.Environ()
	run, err := measure(ctx, cfg, scenarios)
	entries, readErr := os.ReadDir(cfg.Dir)
	mounts, mountsErr := rival.MountsBelow(cfg.Dir)
	loops, loopErr := rival.Run(context.Background(), "losetup", "-n", "-O", "BACK-FILE")
	if err := errors.Join(readErr, mountsErr, loopErr); err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "lost+found" {
			t.Errorf("left behind: %s", e.Name())
		}
	}
	if len(mounts) > 0 {
		t.Errorf("left mounted: %s", mounts)
	}
	if strings.Contains(loops, cfg.Dir) {
		t.Errorf("left attached: %s", loops)
	}
	if now := os.Environ(); !slices.Equal(env, now) {
		t.Errorf("the environment was %v and is %v", env, now)
	}
	return outcome{run, err, said.String()}
}

// measured are the contenders with two samples in a scenario.
func (o outcome) measured(t *testing.T, scenario string) (names []string) {
	t.Helper()
	for _, s := range o.Scenarios {
		if s.Name == scenario {
			for _, m := range s.Metrics {
				for _, c := range m.Cells {
					if c.N == 2 {
						names = append(names, c.Contender)
					}
				}
			}
		}
	}
	slices.Sort(names)
	return names
}

func wantMeasured(t *testing.T, o outcome, scenario string, want ...string) {
	t.Helper()
	if o.err != nil {
		t.Fatalf("%v; it said:\n%s", o.err, o.said)
	}
	slices.Sort(want)
	if got := o.measured(t, scenario); !slices.Equal(got, want) {
		t.Errorf("%s: measured %v, want %v; absent %+v, failed %+v", scenario, got, want, o.Absent, o.Failed)
	}
}

func wantFailed(t *testing.T, o outcome, scenario, contender, why string) {
	t.Helper()
	if !slices.ContainsFunc(o.Failed, func(f report.Failed) bool {
		return f.Scenario == scenario && f.Contender == contender && strings.Contains(f.Why, why)
	}) {
		t.Errorf("no failure of %s, %q, that says %q: %+v", scenario, contender, why, o.Failed)
	}
	if !strings.Contains(o.said, why) {
		t.Errorf("the progress does not say %q:\n%s", why, o.said)
	}
}

func TestMeasures(t *testing.T) {
	o := bench(t, t.Context(), Config{Dir: t.TempDir()}, tiny("tiny", writeByte))
	wantMeasured(t, o, "tiny", "plain", "overlayfs", "lamina", "lamina-dev")
	if len(o.Failed)+len(o.Absent) > 0 {
		t.Errorf("failed %+v, absent %+v", o.Failed, o.Absent)
	}
	for _, c := range o.Scenarios[0].Metrics[0].Cells {
		if server := strings.HasPrefix(c.Contender, "lamina"); c.Median <= 0 || server != (c.ServerCPU > 0) || server != (c.PeakMemory > 0) {
			t.Errorf("implausible: %+v", c)
		}
	}
	if o.Contenders[0].Kind != report.Native || o.First(report.Overlay) == nil || o.First(report.Lamina).Name != "lamina" {
		t.Errorf("contenders out of order: %+v", o.Contenders)
	}
}

// A directory on overlayfs cannot hold an upper layer: everything happens in an image file there.
func TestDirectoryOnOverlayfs(t *testing.T) {
	base := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "dir"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m, err := rival.Up(t.Context(), rival.Config{System: rival.Overlay, Lowers: []string{filepath.Join(base, "lower")},
		Upper: filepath.Join(base, "upper"), Work: filepath.Join(base, "work")}, filepath.Join(base, "dir"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Discard)
	// What the user chose is not overruled.
	if o := bench(t, t.Context(), Config{Dir: m.Dir}, tiny("tiny", writeByte)); o.err == nil || !strings.Contains(o.err.Error(), "overlayfs, which cannot hold an upper layer") {
		t.Errorf("measured on overlayfs: %v", o.err)
	}
	o := bench(t, t.Context(), Config{Dir: m.Dir, Filesystem: automatic}, tiny("tiny", writeByte))
	wantMeasured(t, o, "tiny", "plain", "overlayfs", "lamina", "lamina-dev")
	if !strings.Contains(o.said, "is on overlayfs, which cannot hold an upper layer") || !strings.Contains(o.Machine.Filesystem, "in a file on overlayfs") {
		t.Errorf("the filesystem is not named: %q, %q", o.said, o.Machine.Filesystem)
	}
}

// An ext4 without a journal is no ground either.
func TestNoJournal(t *testing.T) {
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 256*mib)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-O", "^has_journal", image}, {"mount", "-o", "loop", image, dir}} {
		if _, err := rival.Run(t.Context(), args[0], args[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	o := bench(t, t.Context(), Config{Dir: dir, Filesystem: automatic}, tiny("tiny", writeByte))
	wantMeasured(t, o, "tiny", "plain", "overlayfs", "lamina", "lamina-dev")
	if !strings.Contains(o.said, "ext4 without a journal") || !strings.HasPrefix(o.Machine.Filesystem, "ext4 on /dev/loop") {
		t.Errorf("the journal is not missed: %q, %q", o.said, o.Machine.Filesystem)
	}
}

// An image file has all of its blocks when it is mounted.
func TestImagesAreWritten(t *testing.T) {
	const size = 512 * mib
	for fstype := range filesystems {
		t.Run(fstype, func(t *testing.T) {
			dir := t.TempDir()
			mnt, err := mountImage(t.Context(), dir, fstype, cachedOnce, size)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(mnt, 0); err != nil {
					t.Error(err)
				}
			})
			var st unix.Stat_t
			if err := errors.Join(syncfs(mnt), unix.Stat(filepath.Join(dir, fstype+".img"), &st)); err != nil {
				t.Fatal(err)
			}
			if st.Size != size || st.Blocks*512 < size {
				t.Errorf("%d bytes of %d, want %d of each", st.Blocks*512, st.Size, size)
			}
		})
	}
}

func TestOwnFilesystem(t *testing.T) {
	o := bench(t, t.Context(), Config{Dir: t.TempDir(), Filesystem: "xfs"}, tiny("tiny", writeByte))
	wantMeasured(t, o, "tiny", "plain", "overlayfs", "lamina", "lamina-dev")
	if !strings.HasPrefix(o.Machine.Filesystem, "xfs on /dev/loop") {
		t.Errorf("measured on %s", o.Machine.Filesystem)
	}
}

// A scenario without room is named and left out; the next one runs.
func TestTooLittleSpace(t *testing.T) {
	large := tiny("large", writeByte)
	large.Space = func(Mode) int64 { return 1 << 60 }
	o := bench(t, t.Context(), Config{Dir: t.TempDir()}, large, tiny("small", writeByte))
	wantMeasured(t, o, "small", "plain", "overlayfs", "lamina", "lamina-dev")
	wantFailed(t, o, "large", "", "GB of disk")
}

// A full disk in the middle of a scenario is named too.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	full := tiny("full", func(_ *Lab, u *Union) error { return os.WriteFile(u.Path("large"), make([]byte, 16*mib), 0o644) })
	o := bench(t, t.Context(), Config{Dir: dir}, full, tiny("after", writeByte))
	wantFailed(t, o, "full", "overlayfs", "no space left on device")
	wantFailed(t, o, "full", "lamina", "no space left on device")
}

func TestContenderFails(t *testing.T) {
	once := 0
	o := bench(t, t.Context(), Config{Dir: t.TempDir()},
		tiny("first", func(l *Lab, u *Union) error {
			switch u.Contender.Name {
			case "overlayfs":
				if once++; once == 2 {
					return errors.New("the test's own trouble")
				}
			case "lamina-dev": // a server that dies while its mount is in use
				if err := unix.Kill(u.Server(), unix.SIGKILL); err != nil {
					return err
				}
				_, err := os.ReadFile(u.Path("file"))
				return err
			}
			return writeByte(l, u)
		}),
		tiny("second", writeByte))
	wantMeasured(t, o, "first", "plain", "lamina")
	wantFailed(t, o, "first", "overlayfs", "the test's own trouble")
	wantFailed(t, o, "first", "lamina-dev", "tree/file: ")
	wantMeasured(t, o, "second", "plain", "overlayfs", "lamina", "lamina-dev")
}

// A server that does not answer any more holds nothing up for ever.
func TestContenderHangs(t *testing.T) {
	dir := t.TempDir()
	o := bench(t, t.Context(), Config{Dir: dir, patience: 8 * time.Second}, tiny("tiny", func(l *Lab, u *Union) error {
		if u.Contender.Name == "lamina-dev" {
			if err := unix.Kill(u.Server(), unix.SIGSTOP); err != nil {
				return err
			}
		}
		return writeByte(l, u)
	}))
	wantMeasured(t, o, "tiny", "plain", "overlayfs", "lamina")
	wantFailed(t, o, "tiny", "lamina-dev", "given up after 8s")
}

// What is not there is named with its reason; the rest runs.
func TestContenderAbsent(t *testing.T) {
	o := bench(t, t.Context(), Config{Dir: t.TempDir(), Contenders: []string{"plain", "lamina:format=stone", "overlayfs:nonsense", "lamina"}},
		tiny("tiny", writeByte))
	wantMeasured(t, o, "tiny", "plain", "lamina")
	for name, why := range map[string]string{"lamina:format=stone": "format=stone", "overlayfs:nonsense": "invalid argument"} {
		if !slices.ContainsFunc(o.Absent, func(a report.Absent) bool { return a.Name == name && strings.Contains(a.Why, why) }) {
			t.Errorf("%s is not absent because of %q: %+v", name, why, o.Absent)
		}
	}
}

// Ctrl-C while something is mounted.
func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := bench(t, ctx, Config{Dir: t.TempDir()},
		tiny("first", writeByte),
		tiny("second", func(l *Lab, u *Union) error {
			if u.Contender.Name == "lamina" {
				cancel()
			}
			return errors.Join(l.Context().Err(), writeByte(l, u))
		}),
		tiny("third", writeByte))
	if !errors.Is(o.err, context.Canceled) {
		t.Fatalf("interrupted: %v", o.err)
	}
	if got := o.measured(t, "first"); len(got) != 4 {
		t.Errorf("what had been measured is lost: %v", got)
	}
	if len(o.Failed) > 0 || len(o.Scenarios) > 2 {
		t.Errorf("it went on: %+v, %+v", o.Failed, o.Scenarios)
	}
}

func TestUnknownNames(t *testing.T) {
	for _, cfg := range []Config{{Scenarios: []string{"first-wirte"}}, {Contenders: []string{"zfs"}}, {Contenders: []string{"plain:x"}}} {
		if _, err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "unknown: use") {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}

// Without the rights to mount nothing is even begun.
func TestMissingRights(t *testing.T) {
	binary, err := rival.BinaryPath()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, drop := range []string{"--bounding-set=-sys_admin", "--reuid=65534"} {
		out, err := exec.Command("setpriv", drop, binary, "bench", "--dir", dir).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "CAP_SYS_ADMIN") {
			t.Errorf("%s: %v: %s", drop, err, out)
		}
	}
}

// Nothing outside the chosen directory is touched: everything else is read-only here.
func TestWritesNowhereElse(t *testing.T) {
	binary, err := rival.BinaryPath()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	const script = `set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount -o remount,bind,ro /
! touch "$1/../outside" 2>/dev/null
exec "$2" bench --quick --rounds 1 --dir "$1" --scenarios read-after-write --strict --contenders plain,overlayfs,overlayfs-xfs,btrfs-snapshot,lamina`
	out, err := exec.Command("unshare", "-m", "sh", "-c", script, "sh", dir, binary).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}
