package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
)

// Time runs f on a thread of its own and takes its time, the CPU time of that thread and of the programs that f runs, that
// of the server, and the server's peak memory. Value is the wall clock in microseconds.
//
// What kernel threads do is nobody's: for kernel overlayfs the server's time is 0, and so is write-back's for everybody.
func (u *Union) Time(f func() error) (Sample, error) {
	var s Sample
	errs := make(chan error, 1)
	go func() { errs <- undisturbed(func() error { return u.measure(&s, f) }) }()
	err := <-errs
	return s, err
}

// undisturbed runs f on a thread that Go's runtime leaves alone. Without it the scheduler sends a long loop a signal every
// 10 ms, and a request that FUSE has under way at that moment costs another one, INTERRUPT. And the garbage collector
// would wait for a raw system call to end, with everything else stopped, for ever if a server hangs: it does not run.
func undisturbed(f func() error) error {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	preempt := unix.Sigset_t{Val: [len(unix.Sigset_t{}.Val)]uint64{1 << (unix.SIGURG - 1)}}
	var before unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &preempt, &before); err != nil {
		return fmt.Errorf("blocking SIGURG: %w", err)
	}
	return errors.Join(f(), unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil))
}

func (u *Union) measure(s *Sample, f func() error) error {
	client, err := clientCPU()
	if err != nil {
		return err
	}
	server, err := processCPU(u.server)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := f(); err != nil {
		return err
	}
	s.Took = time.Since(began)
	s.Value = Micros(s.Took)
	clientAfter, err1 := clientCPU()
	serverAfter, err2 := processCPU(u.server)
	peak, err3 := u.PeakMemory()
	s.ClientCPU, s.ServerCPU, s.PeakMemory = (clientAfter - client).Seconds(), (serverAfter - server).Seconds(), peak
	return errors.Join(err1, err2, err3)
}

// Micros is d in microseconds.
func Micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// Per makes a sample of n operations one of a single operation.
func (s Sample) Per(n int) Sample {
	s.Value /= float64(n)
	s.ClientCPU /= float64(n)
	s.ServerCPU /= float64(n)
	return s
}

// InSeconds makes the wall clock the value, in seconds.
func (s Sample) InSeconds() Sample {
	s.Value = s.Took.Seconds()
	return s
}

// Rate makes the value n operations, or bytes, a second.
func (s Sample) Rate(n float64) Sample {
	s.Value = n / s.Took.Seconds()
	return s
}

// Command runs a program; its error carries what it printed.
func (u *Union) Command(name string, args ...string) error {
	_, err := rival.Run(u.lab.ctx, name, args...)
	return err
}

// clientCPU is what this thread and all programs that have ended used of the CPU. The thread's clock is exact, where
// getrusage(2) would count up to the last tick.
func clientCPU() (time.Duration, error) {
	var thread unix.Timespec
	var children unix.Rusage
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &thread), unix.Getrusage(unix.RUSAGE_CHILDREN, &children)); err != nil {
		return 0, fmt.Errorf("CPU time: %w", err)
	}
	return time.Duration(thread.Nano() + children.Utime.Nano() + children.Stime.Nano()), nil
}

// processCPU is what a process has used of the CPU with all its threads, 0 for pid 0. Its clock has the number that
// MAKE_PROCESS_CPUCLOCK in the kernel's linux/posix-timers.h makes of the pid.
func processCPU(pid int) (time.Duration, error) {
	if pid == 0 {
		return 0, nil
	}
	const schedClock = 2 // CPUCLOCK_SCHED
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|schedClock, &ts); err != nil {
		return 0, fmt.Errorf("CPU time of the server %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// statusField is a size in /proc/PID/status, in bytes.
func statusField(pid int, name string) (int64, error) {
	return procField(fmt.Sprintf("/proc/%d/status", pid), name)
}

// procField reads "NAME N kB".
func procField(path, name string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, name); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}

// Warm brings a file into the page cache.
func Warm(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for {
		if _, err := f.Read(buf); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func warmTree(root string) error {
	return filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		return Warm(p)
	})
}

// copyTree copies what is in from into to, blocks included: nothing is shared, and everything is in the page cache then.
func copyTree(ctx context.Context, from, to string) error {
	_, err := rival.Run(ctx, "cp", "-a", "--reflink=never", "--sparse=never", from+"/.", to)
	return err
}

// findTools names what is missing, with its remedy.
func findTools(tools ...Tool) error {
	var err error
	for _, t := range tools {
		if _, lookErr := exec.LookPath(t.Program); lookErr != nil {
			err = errors.Join(err, fmt.Errorf("%s is not installed: package %s", t.Program, t.Package))
		}
	}
	return err
}

// firstLine of a program's output: its version, for most.
func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil && len(out) == 0 {
		return ""
	}
	first, _, _ := bytes.Cut(out, []byte("\n"))
	for line := range bytes.Lines(out) { // some name their libraries and complain about their environment before
		if bytes.HasPrefix(line, []byte(name)) {
			first = line
			break
		}
	}
	return strings.TrimSpace(string(first))
}
