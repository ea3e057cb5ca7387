package uring

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// gate holds up the operations of one kind on files whose name begins with "slow", until it is opened.
type gate struct {
	op     string
	inside chan string
	open   chan struct{}
	once   sync.Once
}

func (g *gate) hook(op, name string) {
	if op == g.op && strings.HasPrefix(name, "slow") {
		g.inside <- op
		<-g.open
	}
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

// gated gives a mounted file system with one fast file and some slow ones, which are held up at a gate that opens when
// the test ends.
func gated(t testing.TB, op string, slow int) (*mounted, *gate) {
	t.Helper()
	fs, g := newMemFS(), &gate{op: op, inside: make(chan string, 1000), open: make(chan struct{})}
	fs.file("fast", pattern(1, 5000))
	for i := range slow {
		fs.file(fmt.Sprintf("slow%d", i), pattern(i, 5000))
	}
	fs.hook = g.hook
	m := serve(t, onUring, fs)
	t.Cleanup(g.release)
	return m, g
}

// cpus are those that this process may use.
func cpus(t testing.TB) []int {
	t.Helper()
	set, err := usableCPUs()
	must(t, err)
	var all []int
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			all = append(all, cpu)
		}
	}
	return all
}

// A request that is held up in the file system holds up none that comes after it on the same CPU, neither when it is of a
// kind that is expected to take long (fsync) nor when it is not, neither alone nor in company.
func TestSlowOnesAreOvertaken(t *testing.T) {
	all := cpus(t)
	for request, op := range map[string]string{"getattr": "stat", "fsync": "fsync", "open": "open", "lseek": "lseek"} {
		for _, n := range []int{1, depth(len(all)) - 1} {
			t.Run(fmt.Sprint(request, "/", n), func(t *testing.T) {
				m, g := gated(t, request, n)
				var slow []<-chan error
				for i := range n {
					_, done := act(t, all[0], op, m.path(fmt.Sprint("slow", i)))
					slow = append(slow, done)
					within(t, 20*time.Second, "a slow request's arrival", g.inside)
				}
				for _, cpu := range all {
					acted(t, cpu, "fast requests behind slow ones", "fast", m.dir)
				}
				g.release()
				for _, s := range slow {
					within(t, 20*time.Second, "a slow request's end", s)
				}
			})
		}
	}
}

// All of a CPU's entries at work: its later requests wait, those of other CPUs do not, and nothing is lost.
func TestMoreSlowOnesThanEntries(t *testing.T) {
	all := cpus(t)
	n := depth(len(all)) + 5
	m, g := gated(t, "getattr", n)
	var slow []<-chan error
	for i := range n {
		_, done := act(t, all[0], "stat", m.path(fmt.Sprint("slow", i)))
		slow = append(slow, done)
	}
	for range depth(len(all)) {
		within(t, 20*time.Second, "a slow request's arrival", g.inside)
	}
	for _, cpu := range all[1:] {
		acted(t, cpu, "requests of another CPU", "fast", m.dir)
	}
	g.release()
	for _, s := range slow {
		within(t, 20*time.Second, "a slow request's end", s)
	}
	acted(t, all[0], "requests afterwards", "fast", m.dir)
}

// Processes that are killed while the file system works on their requests, and signals that interrupt nothing, do no harm.
func TestInterruptsDoNoHarm(t *testing.T) {
	all := cpus(t)
	n := depth(len(all)) - 1
	m, g := gated(t, "getattr", n)
	var ends []<-chan error
	for i := range n {
		cmd, done := act(t, all[0], "stat", m.path(fmt.Sprint("slow", i)))
		ends = append(ends, done)
		within(t, 20*time.Second, "a slow request's arrival", g.inside)
		for range 20 {
			_ = cmd.Process.Signal(syscall.SIGURG) // which Go's runtime sends all the time
		}
		must(t, cmd.Process.Kill())
	}
	acted(t, all[0], "fast requests among dead ones", "fast", m.dir)
	g.release()
	for _, e := range ends {
		within(t, 20*time.Second, "the end of a killed process", e)
	}
	acted(t, all[0], "requests afterwards", "fast", m.dir)
	if log := m.log.String(); log != "" {
		t.Errorf("logged: %s", log)
	}
}

// The kernel's references come back while requests come over io_uring.
func TestForgetsArrive(t *testing.T) {
	fs := newMemFS()
	m := serve(t, onUring, fs)
	const n = 500
	for i := range n {
		if s := create(m.path(fmt.Sprint(i))); s != "ok" {
			t.Fatal(s)
		}
	}
	if held := fs.held(); held < n {
		t.Fatalf("the kernel holds %d nodes of %d", held, n)
	}
	for i := range n {
		must(t, unix.Unlink(m.path(fmt.Sprint(i))))
	}
	eventually(t, "the kernel lets go of what was removed", func() bool { return fs.held() == 0 })
}

// Memory of large requests is given back; what later comes into it is right.
func TestMemoryIsGivenBack(t *testing.T) {
	fs := newMemFS()
	const size = 8 << 20
	want := pattern(1, size)
	fs.file("direct", want)
	m := serve(t, onUring, fs)
	all := cpus(t)
	transfer := func() {
		for _, cpu := range all {
			var wg sync.WaitGroup
			for i := range depth(len(all)) {
				wg.Add(1)
				done := onCPU(t, cpu, func() {
					fd, err := unix.Open(m.path("direct"), unix.O_RDWR|unix.O_CLOEXEC, 0)
					if err != nil {
						t.Error(err)
						return
					}
					defer unix.Close(fd)
					buf := make([]byte, 1<<20)
					for k := range 5 {
						off := int64((i + k) % 8 << 20)
						if n, err := unix.Pread(fd, buf, off); err != nil || n != len(buf) || !bytes.Equal(buf, want[off:off+1<<20]) {
							t.Errorf("reading at %d: %d, %v, or other bytes", off, n, err)
						}
					}
				})
				go func() { <-done; wg.Done() }()
			}
			wg.Wait()
		}
	}
	limit := len(m.conn.entries) * (keep + headerStride + os.Getpagesize())
	transfer()
	if resident(t, m.conn.memory) < 1<<20 {
		t.Fatal("no large request has left anything: this shows nothing")
	}
	eventually(t, "memory is given back", func() bool { return resident(t, m.conn.memory) <= limit })
	transfer()
}

// resident is how much of a mapping is in memory, in bytes.
func resident(t testing.TB, b []byte) int {
	t.Helper()
	page := os.Getpagesize()
	vec := make([]byte, len(b)/page)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&vec[0]))); errno != 0 {
		t.Fatal(errno)
	}
	n := 0
	for _, v := range vec {
		n += int(v&1) * page
	}
	return n
}

// Mounts that come and go in any order, under load, leave nothing: not a thread, mapping, descriptor or goroutine.
func TestMountsComeAndGo(t *testing.T) {
	before := takeStock()
	r := rand.New(rand.NewPCG(1, 2))
	var open []*mounted
	for i := range 100 {
		if len(open) == 0 || len(open) < 6 && r.IntN(2) == 0 {
			fs := newMemFS()
			fs.file("fast", pattern(1, 5000))
			m, err := mountOn(t.TempDir(), onUring, fs)
			must(t, err)
			m.t = t
			open = append(open, m)
		} else {
			k := r.IntN(len(open))
			open[k].unmount()
			open = append(open[:k], open[k+1:]...)
		}
		for _, m := range open {
			if r.IntN(3) == 0 {
				if err := fastOnes(m.dir); err != nil {
					t.Errorf("step %d: %v", i, err)
				}
			}
		}
		if len(open) > 0 {
			if s := open[0].conn.Stats(); s.Threads > (len(cpus(t))+1)*s.Depth {
				t.Fatalf("%d threads for %d mounts", s.Threads, len(open))
			}
		}
		if len(open) == 0 || i%25 == 24 {
			for _, m := range open {
				m.unmount()
			}
			open = nil
			if err := before.settled(); err != nil {
				t.Fatalf("step %d: %v", i, err)
			}
		}
	}
}

// A mount that is busy stays as it is.
func TestUnmountWhileBusy(t *testing.T) {
	fs := newMemFS()
	fs.file("fast", pattern(1, 5000))
	m := serve(t, onUring, fs)
	fd, err := unix.Open(m.path("fast"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	if err := unix.Unmount(m.dir, 0); !errors.Is(err, unix.EBUSY) {
		t.Errorf("unmount: %v", err)
	}
	if err := fastOnes(m.dir); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	// Detached, it serves who has it open, and ends with him.
	must(t, unix.Unmount(m.dir, unix.MNT_DETACH))
	if n, err := unix.Pwrite(fd, []byte("x"), 0); n != 1 || err != nil {
		t.Errorf("detached: %d, %v", n, err)
	}
	select {
	case <-m.ended:
		t.Error("the server of a detached mount that is in use has ended")
	default:
	}
	unix.Close(fd)
	m.gone = true
	within(t, 20*time.Second, "the end of the server", m.ended)
}

// What one mount of a process waits for holds up no other, neither its requests, nor its end, nor a new one's beginning.
func TestMountsDoNotHoldUpEachOther(t *testing.T) {
	all := cpus(t)
	for _, n := range []int{1, depth(len(all))} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			older, _ := gated(t, "none", 0)
			m, g := gated(t, "getattr", n)
			newer, _ := gated(t, "none", 0)
			var slow []<-chan error
			for i := range n {
				_, done := act(t, all[0], "stat", m.path(fmt.Sprint("slow", i)))
				slow = append(slow, done)
				within(t, 20*time.Second, "a slow request's arrival", g.inside)
			}
			acted(t, all[0], "requests of an older mount", "fast", older.dir)
			acted(t, all[0], "requests of a newer mount", "fast", newer.dir)
			ended := make(chan struct{})
			go func() { defer close(ended); older.unmount() }()
			within(t, 40*time.Second, "an unmount meanwhile", ended)
			begun := make(chan *mounted)
			go func() { m, _ := gated(t, "none", 0); begun <- m }()
			select {
			case m := <-begun:
				acted(t, all[0], "requests of a mount that began meanwhile", "fast", m.dir)
			case <-time.After(20 * time.Second):
				g.release()
				t.Error("a mount meanwhile does not begin")
			}
			g.release()
			for _, s := range slow {
				within(t, 20*time.Second, "a slow request's end", s)
			}
		})
	}
}

// More mounts than there may be groups of threads share them, and what is known to take long leaves a shared lane.
func TestManyMountsShareThreads(t *testing.T) {
	before := takeStock()
	first := serve(t, onUring, newMemFS())
	lanes := first.conn.Stats().Threads
	open := []*mounted{first}
	for range maxGroups(lanes) + 3 {
		fs := newMemFS()
		fs.file("fast", pattern(1, 5000))
		open = append(open, serve(t, onUring, fs))
	}
	if rings := takeStock().rings - before.rings; rings > 2*lanes*maxGroups(lanes) { // a ring has two mappings
		t.Errorf("%d mappings of rings for %d groups of %d lanes", rings, maxGroups(lanes), lanes)
	}
	n := depth(len(cpus(t)))
	m, g := gated(t, "fsync", n)
	var slow []<-chan error
	for i := range n {
		_, done := act(t, cpus(t)[0], "fsync", m.path(fmt.Sprint("slow", i)))
		slow = append(slow, done)
		within(t, 20*time.Second, "a slow request's arrival", g.inside)
	}
	for _, m := range open[1:] {
		acted(t, cpus(t)[0], "requests of a mount that may share the lanes", "fast", m.dir)
	}
	g.release()
	for _, s := range slow {
		within(t, 20*time.Second, "a slow request's end", s)
	}
	for _, m := range append(open, m) {
		m.unmount()
	}
	if err := before.settled(); err != nil {
		t.Error(err)
	}
}
