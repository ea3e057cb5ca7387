package fusefs

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain fails the run when a descriptor, a goroutine or a mount outlives the tests. Under actorEnv the program is an
// actor instead.
func TestMain(m *testing.M) {
	if uid, ok := os.LookupEnv(actorEnv); ok {
		runActor(uid)
		return
	}
	if dir, ok := os.LookupEnv(guestEnv); ok {
		runGuest(dir)
		return
	}
	unix.Umask(0)
	// A fuzzing run catches signals, for which the runtime starts a goroutine that never ends: it starts before we count.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt)
	signal.Stop(signals)
	fds, routines := descriptors(), runtime.NumGoroutine()
	code := m.Run()
	// The runtime needs a moment to end goroutines that have nothing left to do.
	for i := 0; i < 3000 && runtime.NumGoroutine() > routines; i++ {
		time.Sleep(10 * time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > routines {
		fmt.Fprintf(os.Stderr, "%d goroutines left:\n", n-routines)
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		code = 1
	}
	for fd := range descriptors() {
		if !fds[fd] {
			fmt.Fprintf(os.Stderr, "descriptor left open: %s\n", fd)
			code = 1
		}
	}
	os.Exit(code)
}

func descriptors() map[string]bool {
	out := map[string]bool{}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		// The runtime's poller may start at any time and lives for ever.
		if err == nil && !strings.HasPrefix(target, "anon_inode:[event") && !strings.HasSuffix(target, "/fd") {
			out[e.Name()+" -> "+target] = true
		}
	}
	return out
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// abandon takes away a mount that does not want to go, so that the temporary directory can be removed.
func abandon(t testing.TB, mnt string) {
	if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
		t.Errorf("unmount %s: %v", mnt, err)
	}
}

// eventually waits for what happens without anybody waiting for it, such as the kernel's RELEASE.
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

// logLines collects what a server logs.
type logLines struct {
	mu    sync.Mutex
	lines []string
}

func (l *logLines) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
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
