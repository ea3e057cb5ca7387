package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rig is a server in this process, with layers for n mounts.
type rig struct {
	t      testing.TB
	dir    string
	server *Server
	client *Client
	served chan error
}

func newRig(t testing.TB, n int) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), served: make(chan error, 1)}
	t.Setenv(RuntimeDirVariable, filepath.Join(r.dir, "run"))
	must(t, os.Mkdir(r.path("lower"), 0o755))
	must(t, os.WriteFile(r.path("lower/file"), []byte(strings.Repeat("lower", 100_000)), 0o644))
	for i := range n {
		for _, name := range []string{"upper", "work", "mnt"} {
			must(t, os.MkdirAll(r.path(fmt.Sprint(i), name), 0o755))
		}
	}
	r.listen()
	t.Cleanup(func() {
		r.server.End()
		must(t, <-r.served)
	})
	return r
}

func (r *rig) listen() {
	r.t.Helper()
	s, err := Listen(ServerConfig{Socket: r.path("sock"), Logf: r.t.Logf, Version: "test"})
	must(r.t, err)
	r.server, r.client = s, &Client{Socket: r.path("sock")}
	served := r.served
	go func() { served <- s.Serve() }()
	r.t.Cleanup(r.client.Close)
}

func (r *rig) path(elem ...string) string { return filepath.Join(append([]string{r.dir}, elem...)...) }

func (r *rig) request(op Op, i int, more ...string) Request {
	base := r.path(fmt.Sprint(i))
	return Request{Op: op, Mountpoint: base + "/mnt", Options: append([]string{"lowerdir=" + r.path("lower"), "upperdir=" + base + "/upper", "workdir=" + base + "/work"}, more...)}
}

func (r *rig) do(req Request) Reply {
	r.t.Helper()
	reply, err := r.try(req)
	if err != nil {
		r.t.Fatalf("%s %s: %v", req.Op, req.Mountpoint, err)
	}
	return reply
}

func (r *rig) try(req Request) (Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return r.client.Do(ctx, req)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestServer(t *testing.T) {
	r := newRig(t, 2)
	for i := range 2 {
		r.do(r.request(OpMount, i))
		r.do(r.request(OpMount, i)) // once more changes nothing
		must(t, os.WriteFile(r.path(fmt.Sprint(i), "mnt/new"), []byte("new"), 0o644))
	}
	if list := r.do(Request{Op: OpList}).Mounts; !slices.Equal(list, []string{r.path("0/mnt"), r.path("1/mnt")}) {
		t.Errorf("list: %v", list)
	}
	if st := r.do(Request{Op: OpStatus}).Status; len(st) != 2 || !st[0].Shared || st[1].Mountpoint != r.path("1/mnt") {
		t.Errorf("status: %+v", st)
	}
	if _, err := r.try(r.request(OpMount, 0, "caw=lazy")); !errors.Is(err, unix.EBUSY) {
		t.Errorf("mounted with other options: %v", err)
	}
	// Told to end, it serves what it has.
	r.do(Request{Op: OpQuit})
	r.do(r.request(OpSync, 0))
	r.do(r.request(OpUnmount, 0))
	if _, err := r.try(r.request(OpUnmount, 0)); !errors.Is(err, unix.ENOENT) {
		t.Errorf("unmounted twice: %v", err)
	}
	if b, err := os.ReadFile(r.path("0/upper/new")); err != nil || string(b) != "new" {
		t.Errorf("upper: %q, %v", b, err)
	}
	r.do(r.request(OpMount, 0)) // and is not told any more
	r.do(r.request(OpUnmount, 1))
	r.do(r.request(OpUnmount, 0))
	if list := r.do(Request{Op: OpList}).Mounts; len(list) > 0 {
		t.Errorf("list: %v", list)
	}
}

// A mount that is in use stays; with Lazy it goes from the tree, and the server serves it until the user is gone.
func TestServerBusy(t *testing.T) {
	r := newRig(t, 1)
	r.do(r.request(OpMount, 0))
	f, err := os.OpenFile(r.path("0/mnt/file"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	if _, err := r.try(r.request(OpUnmount, 0)); !errors.Is(err, unix.EBUSY) {
		t.Errorf("unmounting a mount in use: %v", err)
	}
	must(t, os.Mkdir(r.path("bind"), 0o755))
	must(t, unix.Mount(r.path("0/mnt"), r.path("bind"), "", unix.MS_BIND, ""))
	defer unix.Unmount(r.path("bind"), unix.MNT_DETACH)
	if _, err := r.try(r.request(OpUnmount, 0)); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), r.path("bind")) {
		t.Errorf("unmounting what is mounted elsewhere too: %v", err)
	}
	lazy := r.request(OpUnmount, 0)
	lazy.Lazy = true
	r.do(lazy)
	r.do(Request{Op: OpQuit})
	if _, err := f.WriteAt([]byte("late"), 300_000); err != nil {
		t.Errorf("writing to a mount that was detached: %v", err)
	}
	must(t, f.Close())
	must(t, unix.Unmount(r.path("bind"), 0))
	must(t, <-r.served)
	r.listen() // for the clean-up
	r.do(r.request(OpMount, 0))
	b, err := os.ReadFile(r.path("0/mnt/file"))
	if err != nil || string(b[300_000:300_005]) != "latel" && string(b[300_000:300_004]) != "late" {
		t.Errorf("what was written late: %q, %v", b[300_000:300_005], err)
	}
}

// A mount that somebody else has detached, and still uses, cannot be taken away for good, nor replaced; then it can.
func TestServerDetached(t *testing.T) {
	r := newRig(t, 1)
	r.do(r.request(OpMount, 0))
	f, err := os.OpenFile(r.path("0/mnt/file"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	must(t, unix.Unmount(r.path("0/mnt"), unix.MNT_DETACH))
	if _, err := r.try(r.request(OpUnmount, 0)); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "detached") {
		t.Errorf("unmounting it: %v", err)
	}
	_, err = f.WriteAt([]byte("late"), 300_000)
	must(t, err)
	must(t, f.Close())
	if _, err := r.try(r.request(OpUnmount, 0)); err != nil && !errors.Is(err, unix.ENOENT) { // it may be forgotten already
		t.Errorf("unmounting it when nobody uses it: %v", err)
	}
	r.do(r.request(OpMount, 0))
	b, err := os.ReadFile(r.path("0/mnt/file"))
	if err != nil || string(b[300_000:300_004]) != "late" {
		t.Errorf("what was written late: %q, %v", b[300_000:300_004], err)
	}
}

// While a detached mount is in use by somebody, its layers cannot be mounted anew; whoever asks for that waits.
func TestServerMountsAgain(t *testing.T) {
	r := newRig(t, 1)
	r.do(r.request(OpMount, 0))
	f, err := os.OpenFile(r.path("0/mnt/file"), os.O_RDWR, 0)
	must(t, err)
	lazy := r.request(OpUnmount, 0)
	lazy.Lazy = true
	r.do(lazy)
	mounted := make(chan error, 1)
	go func() {
		_, err := r.try(r.request(OpMount, 0))
		mounted <- err
	}()
	select {
	case err := <-mounted:
		t.Errorf("mounted while the one before is in use: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	_, err = f.WriteAt([]byte("late"), 300_000)
	must(t, err)
	must(t, f.Close())
	must(t, <-mounted)
	b, err := os.ReadFile(r.path("0/mnt/file"))
	if err != nil || string(b[300_000:300_004]) != "late" {
		t.Errorf("what was written late: %q, %v", b[300_000:300_004], err)
	}
}

// What was detached from a mount point and what was mounted there next are two mounts, to everybody who asks.
func TestServerReusesMountPoint(t *testing.T) {
	r := newRig(t, 2)
	r.do(r.request(OpMount, 0))
	f, err := os.Open(r.path("0/mnt/file"))
	must(t, err)
	lazy := r.request(OpUnmount, 0)
	lazy.Lazy = true
	r.do(lazy)
	next := r.request(OpMount, 1)
	next.Mountpoint = r.path("0/mnt")
	r.do(next)
	all, err := MountsOn(r.path("0/mnt"))
	if err != nil || len(all) != 2 || all[0].Upper == all[1].Upper {
		t.Fatalf("asked for both: %+v, %v", all, err)
	}
	must(t, f.Close())
	for len(all) != 1 {
		all, err = MountsOn(r.path("0/mnt"))
		must(t, err)
		if len(all) == 0 {
			t.Fatal("the end of one took the other one's socket away")
		}
	}
	if all[0].Upper != r.path("1/upper") || all[0].Device != TopDevice(r.path("0/mnt")) {
		t.Errorf("left: %s, %s; want %s, %s", all[0].Upper, all[0].Device, r.path("1/upper"), TopDevice(r.path("0/mnt")))
	}
}

// A server that was told to end makes no more mounts, and another one can have its socket while it serves what it must.
func TestServerToldToEnd(t *testing.T) {
	r := newRig(t, 3)
	r.do(r.request(OpMount, 0))
	f, err := os.OpenFile(r.path("0/mnt/file"), os.O_RDWR, 0)
	must(t, err)
	old := r.served
	r.server.End()
	for range maxIdle + 1 { // connections from before have one answer each
		if _, err := r.try(r.request(OpMount, 1)); !errors.Is(err, unix.ESHUTDOWN) && !errors.Is(err, ErrNoServer) {
			t.Fatalf("mounting: %v", err)
		}
	}
	r.served = make(chan error, 1)
	r.listen()
	r.do(r.request(OpMount, 1))
	_, err = f.WriteAt([]byte("late"), 300_000)
	must(t, err)
	// It may be killed now: what is on its disk is what another would find.
	if out, err := exec.Command("cp", "-a", r.path("0/upper")+"/.", r.path("2/upper")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r.do(r.request(OpMount, 2))
	if b, err := os.ReadFile(r.path("2/mnt/file")); err != nil || string(b[300_000:300_004]) != "late" {
		t.Errorf("written late, and not on disk: %q, %v", b[300_000:300_004], err)
	}
	select {
	case <-old:
		t.Error("it has ended while somebody uses its mount")
	default:
	}
	must(t, f.Close())
	must(t, <-old)
	r.do(r.request(OpMount, 0))
	b, err := os.ReadFile(r.path("0/mnt/file"))
	if err != nil || string(b[300_000:300_004]) != "late" {
		t.Errorf("what was written late: %q, %v", b[300_000:300_004], err)
	}
	if list := r.do(Request{Op: OpList}).Mounts; len(list) != 3 {
		t.Errorf("list: %v", list)
	}
}

// A server that is ending is waited for: it listens no more and has not let go of the lock yet.
func TestServerSocketOfOneThatEnds(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "sock")
	lock, err := lockSocket(socket)
	must(t, err)
	listening := make(chan error, 1)
	go func() {
		s, err := Listen(ServerConfig{Socket: socket, Logf: t.Logf})
		if err == nil {
			_ = s.Do(Request{Op: OpQuit}, &Reply{})
			err = s.Serve()
		}
		listening <- err
	}()
	select {
	case err := <-listening:
		t.Errorf("it did not wait: %v", err)
	case <-time.After(termPatience + 5*claimPoll):
		must(t, lock.Close())
		must(t, <-listening)
	}
}

// One server has a socket; what a dead one left is taken over.
func TestServerSocket(t *testing.T) {
	r := newRig(t, 0)
	if _, err := Listen(ServerConfig{Socket: r.path("sock"), Logf: t.Logf}); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("a second server: %v", err)
	}
	stale, err := listenFresh(r.path("stale"))
	must(t, err)
	must(t, stale.Close())
	s, err := Listen(ServerConfig{Socket: r.path("stale"), Logf: t.Logf})
	must(t, err)
	must(t, s.Do(Request{Op: OpQuit}, &Reply{}))
	must(t, s.Serve())
	if _, err := os.Lstat(r.path("stale")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its socket after its end: %v", err)
	}
}

// What cannot be mounted is refused, and leaves nothing.
func TestServerRefuses(t *testing.T) {
	r := newRig(t, 1)
	for what, req := range map[string]Request{
		"upper":    {Op: OpMount, Mountpoint: r.path("0/mnt"), Options: []string{"lowerdir=" + r.path("lower"), "upperdir=/nonexistent", "workdir=" + r.path("0/work")}},
		"lowerdir": {Op: OpMount, Mountpoint: r.path("0/mnt")},
		"colour":   {Op: OpMount, Mountpoint: r.path("0/mnt"), Options: []string{"lowerdir=/", "colour=red"}},
		"absolute": {Op: OpMount, Mountpoint: "mnt"},
		"mount po": {Op: OpMount, Mountpoint: "/nonexistent", Options: []string{"lowerdir=" + r.path("lower")}},
		"older":    {Op: "fold"},
	} {
		if _, err := r.try(req); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%+v: %v, want an error about %q", req, err, what)
		}
	}
	if list := r.do(Request{Op: OpList}).Mounts; len(list) > 0 {
		t.Errorf("left: %v", list)
	}
	r.do(r.request(OpMount, 0))
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"op":"mount","mountpoint":"/m","options":["lowerdir=/a"]}`))
	f.Add([]byte(`{"op":"unmount","mountpoint":"/m","lazy":true,"discard":true}`))
	f.Add([]byte(`{"op":"list"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := ParseRequest(line)
		if err == nil && (r.Op == OpMount || r.Op == OpUnmount) && r.Mountpoint[0] != '/' {
			t.Errorf("accepted %q", r.Mountpoint)
		}
	})
}

// What a container's start and end cost the server: a mount, the first look at it, and its end.
func BenchmarkServerMount(b *testing.B) {
	for _, transport := range []string{"dev", "uring"} {
		b.Run(transport, func(b *testing.B) {
			r := newRig(b, 1)
			for b.Loop() {
				r.do(r.request(OpMount, 0, "transport="+transport))
				if _, err := os.Stat(r.path("0/mnt/file")); err != nil {
					b.Fatal(err)
				}
				r.do(Request{Op: OpUnmount, Mountpoint: r.path("0/mnt"), Lazy: true, Discard: true})
			}
		})
	}
}
