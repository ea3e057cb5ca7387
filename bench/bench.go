// Package bench measures Lamina beside its rivals, in the same run, on the same disk: plain files, kernel overlayfs with
// and without its syncs, and fuse-overlayfs where it is installed. Every figure is a median; the systems take turns, so
// that whatever else the machine does meets all of them.
package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
)

// Config says what to measure.
type Config struct {
	Dir    string                      // scratch directory; empty: a temporary one, removed afterwards
	Lamina string                      // the binary
	Rows   func(name string) bool      // which rows; nil: all
	Logf   func(f string, args ...any) // progress; nil: silence
	Reps   int                         // repetitions where one is expensive (a kernel overlayfs copies 1 GiB); 0: 3
}

// contender is one system with its options.
type contender struct {
	name    string
	system  rival.System // empty: plain files
	options []string
}

var (
	plain      = contender{name: "plain"}
	lamina     = contender{"lamina", rival.Lamina, nil}
	laminaBCoW = contender{"lamina bcow", rival.Lamina, []string{"format=bcow"}}
	laminaPass = contender{"lamina passthrough=on", rival.Lamina, []string{"passthrough=on"}}
	overlay    = contender{"overlayfs", rival.Overlay, nil}
	volatile   = contender{"overlayfs volatile", rival.Overlay, []string{"volatile"}}
	fuse       = contender{"fuse-overlayfs", rival.FuseOverlay, nil}
)

// run is one run's state.
type run struct {
	Config
	ctx    context.Context
	lower  string // the generated layer
	serial int
	report Report
}

// Run measures and reports. It leaves nothing mounted and no file behind, also when ctx ends early.
func Run(ctx context.Context, c Config) (_ *Report, err error) {
	if c.Logf == nil {
		c.Logf = func(string, ...any) {}
	}
	if c.Reps == 0 {
		c.Reps = 3
	}
	scratch, remove, err := scratchDir(ctx, c)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	c.Dir = scratch
	r := &run{Config: c, ctx: ctx, lower: filepath.Join(c.Dir, "lower")}
	if err := r.describe(); err != nil {
		return nil, err
	}
	r.Logf("generating layers below %s", c.Dir)
	if err := generate(ctx, r.lower); err != nil {
		return nil, err
	}
	start := time.Now()
	for _, row := range []struct {
		name    string
		measure func(*run) error
	}{
		{"first-write", firstWrites},
		{"allocated", allocated},
		{"partial-writes", partialWrites},
		{"reads", reads},
		{"metadata", metadata},
		{"chown", chown},
		{"memory", memory},
	} {
		if c.Rows != nil && !c.Rows(row.name) {
			continue
		}
		r.Logf("%-14s [%3.0fs]", row.name, time.Since(start).Seconds())
		if err := row.measure(r); err != nil {
			return nil, fmt.Errorf("%s: %w", row.name, err)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	r.report.Seconds = time.Since(start).Seconds()
	return &r.report, nil
}

// scratchDir returns a directory on ext4, which is what the figures are about: a loop device's if the temporary
// directory is on something else.
func scratchDir(ctx context.Context, c Config) (dir string, remove func() error, err error) {
	base, err := os.MkdirTemp(c.Dir, "lamina-bench.")
	if err != nil {
		return "", nil, err
	}
	remove = func() error { return os.RemoveAll(base) }
	var st unix.Statfs_t
	if err := unix.Statfs(base, &st); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	if st.Type == unix.EXT4_SUPER_MAGIC {
		return base, remove, nil
	}
	c.Logf("%s is not on ext4: using a loop device", base)
	img, dir := filepath.Join(base, "ext4"), filepath.Join(base, "mnt")
	script := fmt.Sprintf("truncate -s 12G %[1]q && mkfs.ext4 -q %[1]q && mkdir %[2]q && mount -o loop %[1]q %[2]q", img, dir)
	if _, err := rival.Run(ctx, "sh", "-c", script); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return dir, func() error { return errors.Join(unix.Unmount(dir, 0), remove()) }, nil
}

func (r *run) describe() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	r.report.Kernel = unix.ByteSliceToString(u.Release[:])
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		return err
	}
	r.report.CPUs = cpus.Count()
	return nil
}

// contenders leaves out what is not installed.
func (r *run) contenders(all ...contender) []contender {
	return slices.DeleteFunc(all, func(c contender) bool {
		if c.system != rival.FuseOverlay {
			return false
		}
		_, err := exec.LookPath("fuse-overlayfs")
		return err != nil
	})
}

// on runs f over a fresh mount of the layer. The upper layer is removed afterwards, unmeasured.
func (r *run) on(c contender, f func(m *rival.Mount) error) error {
	base, err := r.keep(c, f)
	return errors.Join(err, os.RemoveAll(base))
}

// keep is on without the removal, which is left to the caller.
func (r *run) keep(c contender, f func(m *rival.Mount) error) (base string, err error) {
	if err := r.ctx.Err(); err != nil {
		return "", err
	}
	r.serial++
	base = filepath.Join(r.Dir, fmt.Sprintf("run%d", r.serial))
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			return base, err
		}
	}
	m, err := rival.Up(r.ctx, rival.Config{
		System: c.system, Lowers: []string{r.lower}, Options: c.options, Binary: r.Lamina,
		Upper: filepath.Join(base, "upper"), Work: filepath.Join(base, "work"),
	}, filepath.Join(base, "merged"))
	if err != nil {
		return base, err
	}
	defer m.Discard()
	if err := f(m); err != nil {
		return base, fmt.Errorf("%s: %w", c.name, err)
	}
	if mounted, err := rival.Mounted(m.Dir); err != nil || !mounted {
		return base, err
	}
	return base, m.Down()
}

// timed runs f and appends how long it took, in microseconds.
func timed(samples *[]float64, f func() error) error {
	start := time.Now()
	err := f()
	*samples = append(*samples, float64(time.Since(start).Nanoseconds())/1e3)
	return err
}

func median(samples []float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(samples))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
