package uring

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// TestMain fails the run when a thread, a mapping, a goroutine or a descriptor outlives the tests. Under actorEnv the
// program is an actor instead.
func TestMain(m *testing.M) {
	if name, ok := os.LookupEnv(actorEnv); ok {
		runActor(name)
		return
	}
	unix.Umask(0)
	// A fuzzing run catches signals, for which the runtime starts a goroutine that never ends: it starts before we count.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt)
	signal.Stop(signals)
	before := takeStock()
	code := m.Run()
	if err := before.settled(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}

// stock is what a process holds that the package could leave behind.
type stock struct {
	goroutines int
	fds        map[string]bool
	rings      int // mappings of rings
}

func takeStock() stock {
	s := stock{goroutines: runtime.NumGoroutine(), fds: map[string]bool{}}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		// The runtime's poller, an epoll and an eventfd, may start at any time and lives for ever.
		if err == nil && !strings.HasPrefix(target, "anon_inode:[eventpoll]") && !strings.HasSuffix(target, "/fd") {
			s.fds[e.Name()+" -> "+target] = true
		}
	}
	maps, _ := os.ReadFile("/proc/self/maps")
	s.rings = strings.Count(string(maps), "io_uring")
	return s
}

// settled waits until nothing is held that was not before: on a busy machine that takes a while.
func (s stock) settled() error {
	var err error
	for range 3000 {
		now := takeStock()
		err = nil
		if now.goroutines > s.goroutines {
			err = fmt.Errorf("%d goroutines, %d before", now.goroutines, s.goroutines)
		}
		if now.rings > s.rings {
			err = errors.Join(err, fmt.Errorf("%d mappings of rings, %d before", now.rings, s.rings))
		}
		eventfds := 0
		for fd := range now.fds {
			if strings.HasSuffix(fd, "anon_inode:[eventfd]") && !s.fds[fd] {
				if eventfds++; eventfds == 1 {
					continue // the runtime's
				}
			}
			if !s.fds[fd] {
				err = errors.Join(err, fmt.Errorf("descriptor left open: %s", fd))
			}
		}
		if err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	var trace strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&trace, 1)
	return fmt.Errorf("%w\n%s", err, trace.String())
}

// onDev and onUring name a transport.
type carrier bool

const (
	onDev   carrier = false
	onUring carrier = true
)

func (c carrier) String() string { return map[carrier]string{onDev: "dev", onUring: "uring"}[c] }

// mounted is a file system on a directory.
type mounted struct {
	dir    string
	server *fuse.Server
	conn   *Conn // nil on /dev/fuse
	log    *logLines
	ended  chan struct{}
	t      testing.TB
	gone   bool
}

// serve mounts fs for the length of the test.
func serve(t testing.TB, c carrier, fs fuse.RawFileSystem, change ...func(*fuse.MountOptions)) *mounted {
	t.Helper()
	m, err := tryServe(t, c, fs, change...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func tryServe(t testing.TB, c carrier, fs fuse.RawFileSystem, change ...func(*fuse.MountOptions)) (*mounted, error) {
	t.Helper()
	m, err := mountOn(t.TempDir(), c, fs, change...)
	if err != nil {
		return nil, err
	}
	m.t = t
	t.Cleanup(func() {
		if !m.gone {
			m.unmount()
		}
		if t.Failed() {
			t.Logf("%v's log: %s", c, m.log)
		}
	})
	return m, nil
}

// mountOn mounts fs on a directory until the caller unmounts it.
func mountOn(dir string, c carrier, fs fuse.RawFileSystem, change ...func(*fuse.MountOptions)) (*mounted, error) {
	m := &mounted{dir: dir, log: &logLines{}, ended: make(chan struct{})}
	opts := &fuse.MountOptions{MaxWrite: 1 << 20, Name: "test", FsName: "test", DisableSplice: true, MaxBackground: 64,
		Logger: log.New(m.log, "", 0)}
	for _, f := range change {
		f(opts)
	}
	var pool *Pool
	if c == onUring {
		if err := Enable(); err != nil {
			return nil, err
		}
		var err error
		if pool, err = Open(); err != nil {
			return nil, err
		}
		defer pool.Close()
		opts.ExtraCapabilities |= fuse.CAP_OVER_IO_URING
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,max_read=%d", fd, opts.MaxWrite)
	if err := unix.Mount("test", m.dir, "fuse.test", 0, data); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if m.server, err = fuse.NewServer(fs, fmt.Sprintf("/dev/fd/%d", fd), opts); err != nil {
		unix.Unmount(m.dir, unix.MNT_DETACH)
		return nil, err
	}
	if c == onUring {
		m.conn, err = pool.Serve(fd, fs, Options{Mount: opts, Init: m.server.KernelSettings(), Logf: m.log.add})
		if err != nil {
			go m.server.Serve()
			return nil, errors.Join(err, unix.Unmount(m.dir, unix.MNT_DETACH))
		}
	}
	go func() {
		defer close(m.ended)
		if m.conn != nil {
			if err := m.conn.ServeForgets(fd); err != nil {
				m.log.add("ServeForgets: %v", err)
			}
		}
		m.server.Serve()
		if m.conn != nil {
			m.conn.Wait()
		}
	}()
	return m, nil
}

// unmount takes the mount away, and fails the test if that is not possible or its server does not end.
func (m *mounted) unmount() {
	m.t.Helper()
	m.gone = true
	if err := unix.Unmount(m.dir, 0); err != nil {
		m.t.Errorf("unmount: %v", err)
		if err := unix.Unmount(m.dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
			m.t.Errorf("unmount by force: %v", err)
		}
	}
	within(m.t, 30*time.Second, "the end of the server", m.ended)
}

func (m *mounted) path(name string) string { return filepath.Join(m.dir, name) }

// within fails the test if nothing comes in time.
func within[T any](t testing.TB, limit time.Duration, what string, c <-chan T) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(limit):
		buf := make([]byte, 1<<20)
		t.Fatalf("%s: nothing for %v\n%s", what, limit, buf[:runtime.Stack(buf, true)])
	}
}

// eventually waits for what happens without anybody waiting for it.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 12000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("waited in vain: %s", what)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// onCPU runs f on a thread of its own that stays on one CPU, so that its requests come in the CPU's queue.
func onCPU(t testing.TB, cpu int, f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			t.Errorf("staying on CPU %d: %v", cpu, err)
			return
		}
		f()
	}()
	return done
}

// sum stands for bytes in a comparison.
func sum(b []byte) string {
	h := sha256.Sum256(b)
	return fmt.Sprintf("%d:%x", len(b), h[:6])
}

// pattern gives n bytes that depend on where they are.
func pattern(seed, n int) []byte {
	b := make([]byte, n)
	x := uint32(seed)*2654435761 + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// logLines collects what is logged.
type logLines struct {
	mu    sync.Mutex
	lines []string
}

func (l *logLines) Write(p []byte) (int, error) {
	l.add("%s", strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

func (l *logLines) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

func (l *logLines) count(part string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, line := range l.lines {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}
