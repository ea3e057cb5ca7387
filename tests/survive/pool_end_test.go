package survive

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/pool"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

// poolRig is a pool's server with a lower layer, which has one file, "a".
type poolRig struct {
	t        *testing.T
	spawn    pool.Spawn
	client   pool.Client
	lower    string
	contents []byte
}

func newPoolRig(t *testing.T, survive bool) *poolRig {
	t.Helper()
	bin, err := rival.BinaryPath()
	if err != nil {
		t.Fatal(err)
	}
	d := mnt.Dirs(t, "lower", "run")
	r := &poolRig{t: t, lower: d[0], contents: layers.Bytes(3, fileSize),
		spawn: pool.Spawn{Program: bin, Socket: filepath.Join(d[1], "pool.sock"), Log: filepath.Join(d[1], "log"), Survive: survive}}
	r.client.Socket = r.spawn.Socket
	if err := os.WriteFile(filepath.Join(r.lower, "a"), r.contents, 0o644); err != nil {
		t.Fatal(err)
	}
	r.start()
	t.Cleanup(func() {
		for _, m := range r.ask(pool.Request{Op: pool.OpList}).Mounts {
			r.ask(pool.Request{Op: pool.OpUnmount, Mountpoint: m, Lazy: true})
		}
		r.ask(pool.Request{Op: pool.OpQuit})
		r.client.Close()
		eventually(t, "the socket goes", func() bool {
			_, err := os.Lstat(r.spawn.Socket)
			return os.IsNotExist(err)
		})
		if log, _ := os.ReadFile(r.spawn.Log); t.Failed() {
			t.Logf("%s", log)
		}
	})
	return r
}

func (r *poolRig) start() {
	r.t.Helper()
	if err := r.spawn.Start(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *poolRig) ask(req pool.Request) pool.Reply {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
	defer cancel()
	reply, err := r.client.Do(ctx, req)
	if err != nil {
		r.t.Fatalf("%s %s: %v", req.Op, req.Mountpoint, err)
	}
	return reply
}

func (r *poolRig) server() int { return r.ask(pool.Request{Op: pool.OpList}).PID }

// signal sends one to the server that answers now.
func (r *poolRig) signal(sig unix.Signal) {
	r.t.Helper()
	if err := unix.Kill(r.server(), sig); err != nil {
		r.t.Fatal(err)
	}
}

// mount mounts on a mount point; layers of its own.
func (r *poolRig) mount(at string) {
	r.t.Helper()
	d := mnt.Dirs(r.t, "upper", "work")
	r.ask(pool.Request{Op: pool.OpMount, Mountpoint: at, Options: []string{fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", r.lower, d[0], d[1])}})
}

func (r *poolRig) open(dir string) *os.File {
	r.t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "a"), os.O_RDWR, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { f.Close() })
	return f
}

// write writes to a file and looks at all of it.
func (r *poolRig) write(f *os.File, off int64) {
	r.t.Helper()
	if _, err := f.WriteAt(make([]byte, 100), off); err != nil {
		r.t.Fatal(err)
	}
	got := make([]byte, 100)
	if _, err := f.ReadAt(got, off); err != nil {
		r.t.Fatal(err)
	}
	if err := same("what was written", got, make([]byte, 100)); err != nil {
		r.t.Fatal(err)
	}
	if _, err := f.ReadAt(got, off+100_000); err != nil {
		r.t.Fatal(err)
	}
	if err := same("what was not", got, r.contents[off+100_000:off+100_100]); err != nil {
		r.t.Fatal(err)
	}
}

// TestPoolRestarts: a server can be started at the moment when the one before is told to end.
func TestPoolRestarts(t *testing.T) {
	for _, survive := range []bool{false, true} {
		t.Run(fmt.Sprint("survive=", survive), func(t *testing.T) {
			r := newPoolRig(t, survive)
			at := mnt.Dirs(t, "1", "2", "3", "4", "5", "6", "7", "8")
			for range 3 {
				for _, m := range at { // all of which it has to take away and flush first
					r.mount(m)
					f := r.open(m)
					r.write(f, 0)
					if err := f.Close(); err != nil {
						t.Fatal(err)
					}
				}
				old := r.server()
				r.signal(unix.SIGTERM)
				r.start()
				if r.server() == old {
					t.Fatal("the server that was told to end answers")
				}
			}
		})
	}
}

// TestPoolToldToEnd: a server that was told to end serves what is in use, through deaths, while another one has its socket.
func TestPoolToldToEnd(t *testing.T) {
	r := newPoolRig(t, true)
	d := mnt.Dirs(t, "one", "two")
	r.mount(d[0])
	f := r.open(d[0])
	sockets, err := pool.Sockets(d[0])
	if err != nil || len(sockets) != 1 {
		t.Fatalf("%v, %v", sockets, err)
	}
	r.signal(unix.SIGTERM)
	r.start()
	r.mount(d[1])
	for i := range int64(3) {
		r.write(f, 1000*i)
		st, pidfd, err := pool.Ask(sockets[0])
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(pidfd)
		if st.PID == r.server() {
			t.Fatal("both are one process")
		}
		if err := unix.Kill(st.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	r.write(f, 5000)
	r.write(r.open(d[1]), 0)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, "it ends with the last user", func() bool {
		_, pidfd, err := pool.Ask(sockets[0])
		if pidfd >= 0 {
			unix.Close(pidfd)
		}
		return err == pool.ErrGone
	})
	if got := r.ask(pool.Request{Op: pool.OpList}).Mounts; len(got) != 1 || got[0] != d[1] {
		t.Errorf("the other one has %v", got)
	}
}

// TestPoolReusesMountPoint: what was detached from a mount point and what was mounted there next survive both, and the end
// of one is not the other's.
func TestPoolReusesMountPoint(t *testing.T) {
	r := newPoolRig(t, true)
	at := mnt.Dirs(t, "merged")[0]
	r.mount(at)
	old := r.open(at)
	r.ask(pool.Request{Op: pool.OpUnmount, Mountpoint: at, Lazy: true})
	r.mount(at)
	next := r.open(at)
	for i := range int64(3) {
		r.write(old, 1000*i)
		r.write(next, 1000*i+200)
		r.signal(unix.SIGKILL)
	}
	r.write(old, 5000)
	if err := old.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, "one is gone", func() bool {
		all, err := pool.MountsOn(at)
		return err == nil && len(all) == 1
	})
	r.signal(unix.SIGKILL)
	r.write(next, 6000)
	r.write(r.open(at), 7000)
}
