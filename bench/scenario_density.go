package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
	"lamina/bench/rival"
)

var density = Scenario{
	Name:   "density",
	Title:  "Many containers of one image",
	Source: "BAOverlay (SoCC 2020) and Danaus (Middleware 2021) share layers between containers",
	Describes: "n unions are mounted over the same layer, each with an upper layer of its own: with a server process each, as container " +
		"managers start them, and all served by one process. Then every one of them reads the same files. Memory is the " +
		"servers' proportional set size, shared pages divided by their users; what the kernel needs for a mount is nobody's. " +
		"Page cache is counted file by file, in the layer and in each mount (cachestat).",
	Contenders: []string{"overlayfs", "fuse-overlayfs", "lamina", "lamina-passthrough", "lamina-one-process"},
	Quick:      []string{"overlayfs", "lamina", "lamina-one-process"},
	Space:      func(Mode) int64 { return 512 * mib },
	Weight:     160,
	Run:        runDensity,
}

const (
	crowdFiles = 16        // programs, and as many data files
	crowdSize  = 256 * kib // each
)

func program(i int) string  { return fmt.Sprintf("program%02d", i) }
func dataFile(i int) string { return fmt.Sprintf("data%02d", i) }

type densityMetrics struct {
	mount, idle, used, dirty, programs, data *Metric
}

func runDensity(l *Lab) error {
	layer := l.Layer("density", crowdLayer)
	counts := Pick(l.Mode(), []int{1, 16}, []int{1, 8, 64}, []int{1, 4, 16, 64, 256})
	lines := func(name, unit string, aside bool) *Metric {
		return l.Metric(report.Metric{Name: name, Unit: unit, LessIsBetter: true, Chart: report.Lines, XName: "mounts", XLog: true, Log: true, Aside: aside})
	}
	m := densityMetrics{
		mount:    lines("time to mount one", report.Microseconds, false),
		idle:     lines("server memory a mount, idle", report.Bytes, false),
		used:     lines("server memory a mount, after use", report.Bytes, false),
		dirty:    lines("private memory a mount, after use", report.Bytes, true),
		programs: lines("page cache after all have read the same programs", report.Bytes, false),
		data:     lines("page cache after all have read the same data files", report.Bytes, false),
	}
	var things []string
	for _, n := range counts {
		things = append(things, fmt.Sprintf("%d mounts", n))
	}
	err := l.Turns(l.contenders, things, func(c *Contender, i int) error { return crowdOf(l, c, layer, counts[i], &m) })
	if err == nil {
		most := counts[len(counts)-1]
		if v, ok := m.used.MedianX("lamina-one-process", float64(most)); ok {
			m.used.Figure(report.AtMost(fmt.Sprintf("MB a mount, %d mounts in one process", most), v/1e6, 3))
		}
	}
	return errors.Join(err, l.Drop(layer))
}

// crowdLayer has programs, which are what programs begin with and zeros, and data files.
func crowdLayer(ctx context.Context, dir string) error {
	for i := range crowdFiles {
		if err := fillFile(ctx, filepath.Join(dir, dataFile(i)), crowdSize); err != nil {
			return err
		}
		elf := append([]byte("\x7fELF"), make([]byte, crowdSize-4)...)
		if err := os.WriteFile(filepath.Join(dir, program(i)), elf, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// crowd is n mounts of a contender over one layer.
type crowd struct {
	dirs    []string
	took    []time.Duration // each mount
	servers []int
	end     []func() error // how to take it down, the last first
}

func crowdOf(l *Lab, c *Contender, layer *Layer, n int, m *densityMetrics) (err error) {
	l.Progress("%d mounts", n)
	var cr crowd
	late := false
	watch := l.watch(func(timeUp bool) { late = timeUp; l.abortBelow(l.grounds[c.ground].dir) })
	defer func() {
		if watch(); late {
			err = errors.Join(fmt.Errorf("given up after %v", l.patience()), err)
		}
		for _, f := range slices.Backward(cr.end) {
			err = errors.Join(err, f())
		}
	}()
	if c.together {
		err = cr.mountTogether(l, c, layer, n)
	} else {
		err = cr.mountEach(l, c, layer, n)
	}
	if err != nil {
		return err
	}
	x := float64(n)
	for _, took := range cr.took {
		m.mount.AddX(c, x, Sample{Value: Micros(took)})
	}
	idle, err := cr.memory("Pss:")
	if err != nil {
		return err
	}
	root, err := layer.At(c)
	if err != nil {
		return err
	}
	programs, err := cr.cacheOf(root, program)
	if err != nil {
		return err
	}
	data, err := cr.cacheOf(root, dataFile)
	if err != nil {
		return err
	}
	used, err := cr.memory("Pss:")
	if err != nil {
		return err
	}
	dirty, err := cr.memory("Private_Dirty:")
	if err != nil {
		return err
	}
	if len(cr.servers) > 0 {
		m.idle.AddX(c, x, Sample{Value: idle / x})
		m.used.AddX(c, x, Sample{Value: used / x})
		m.dirty.AddX(c, x, Sample{Value: dirty / x})
	}
	m.programs.AddX(c, x, Sample{Value: programs})
	m.data.AddX(c, x, Sample{Value: data})
	return nil
}

// mountEach mounts as container managers do: a command, and a server where there is one, for each.
func (cr *crowd) mountEach(l *Lab, c *Contender, layer *Layer, n int) error {
	for range n {
		if err := l.ctx.Err(); err != nil {
			return err
		}
		u, err := l.prepare(c, Setup{Layer: layer})
		if err != nil {
			return err
		}
		cr.end = append(cr.end, func() error { return errors.Join(u.Down(), u.discard(), u.remove(Setup{})) })
		if err := u.Up(); err != nil {
			return err
		}
		cr.dirs, cr.took = append(cr.dirs, u.Dir), append(cr.took, u.took)
		if u.server != 0 {
			cr.servers = append(cr.servers, u.server)
		}
	}
	return nil
}

// mountTogether has one process mount them all.
func (cr *crowd) mountTogether(l *Lab, c *Contender, layer *Layer, n int) error {
	root, err := layer.At(c)
	if err != nil {
		return err
	}
	base, err := l.place(c.ground, c.Name)
	if err != nil {
		return err
	}
	cr.end = append(cr.end, func() error { return removeUnmounted(base) })
	for i := range n {
		for _, d := range []string{"upper", "work", "tree"} {
			if err := os.MkdirAll(filepath.Join(base, strconv.Itoa(i), d), 0o755); err != nil {
				return err
			}
		}
		cr.dirs = append(cr.dirs, filepath.Join(base, strconv.Itoa(i), "tree"))
	}
	args := []string{"bench", "many", "--count", strconv.Itoa(n), "-o", "lowerdir=" + rival.Escape(root)}
	for _, o := range c.Options {
		args = append(args, "-o", o)
	}
	cmd := exec.Command(l.cfg.Lamina, append(args, base)...)
	// In a process group of its own a Ctrl-C reaches us alone, and we unmount in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	cr.end = append(cr.end, func() error { return endServer(cmd, in, out, base) })
	cr.servers = []int{cmd.Process.Pid}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if lines.Text() == "ready" {
			return nil
		}
		ns, err := strconv.ParseInt(lines.Text(), 10, 64)
		if err != nil {
			return err
		}
		cr.took = append(cr.took, time.Duration(ns))
	}
	return fmt.Errorf("lamina %s: %s", strings.Join(args[:2], " "), strings.TrimSpace(stderr.String()))
}

// endServer ends a server by closing its input, and within a minute.
func endServer(cmd *exec.Cmd, in io.Closer, out io.Reader, base string) error {
	in.Close()
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_, _ = io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		mounts, listErr := rival.MountsBelow(base)
		for _, dir := range mounts {
			err = errors.Join(err, unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH))
		}
		return errors.Join(fmt.Errorf("the server of %s: %w", base, err), listErr)
	}
	return nil
}

// removeUnmounted removes a directory, and nothing through a mount below it.
func removeUnmounted(dir string) error {
	mounts, err := rival.MountsBelow(dir)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("still mounted: %s", strings.Join(mounts, " "))
	}
	return os.RemoveAll(dir)
}

// memory sums a field of smaps_rollup over the servers, in bytes.
func (cr *crowd) memory(field string) (float64, error) {
	var sum int64
	for _, pid := range cr.servers {
		n, err := procField(fmt.Sprintf("/proc/%d/smaps_rollup", pid), field)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return float64(sum), nil
}

// cacheOf reads some files of the layer in every mount, and tells how many bytes of page cache hold them then.
func (cr *crowd) cacheOf(root string, name func(int) string) (float64, error) {
	var sum int64
	for _, dir := range cr.dirs {
		for i := range crowdFiles {
			if err := Warm(filepath.Join(dir, name(i))); err != nil {
				return 0, err
			}
		}
	}
	for _, dir := range append([]string{root}, cr.dirs...) {
		for i := range crowdFiles {
			n, err := cached(filepath.Join(dir, name(i)))
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	return float64(sum), nil
}

// cached is how many bytes of page cache a file has, of its own (cachestat, Linux 6.5).
func cached(path string) (int64, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var whole unix.CachestatRange
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(fd), &whole, &stat, 0); err != nil {
		return 0, fmt.Errorf("cachestat %s: %w", path, err)
	}
	return int64(stat.Cache) * int64(os.Getpagesize()), nil
}
