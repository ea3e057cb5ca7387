package crash

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

// How a mount ends, or does not, while 32 processes are at work in it.

var deathsFlag = flag.Int("crash.deaths", 1, "how often a mount dies of each cause")

const (
	clients = 32
	soon    = time.Minute // a client that hangs is told from one that the machine is slow to run
)

const clientEnv = "LAMINA_CRASH_CLIENT"

// client is a client process seen from outside.
type client struct {
	id   int
	cmd  *exec.Cmd
	mu   sync.Mutex
	said bytes.Buffer
	done chan struct{}
}

func (c *client) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.said.Write(b)
}

func (c *client) says() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.said.String()
}

// crowd starts clients on a mount and returns when all are at work and something is synced. Those that still live when the
// test ends are killed.
func crowd(t *testing.T, dir string) []*client {
	t.Helper()
	all := make([]*client, clients)
	for id := range all {
		c := &client{id: id, cmd: exec.Command("/proc/self/exe"), done: make(chan struct{})}
		c.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%s", clientEnv, id, dir))
		c.cmd.Stdout, c.cmd.Stderr = c, c
		if err := c.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { defer close(c.done); _ = c.cmd.Wait() }()
		t.Cleanup(func() { _ = c.cmd.Process.Kill(); <-c.done })
		all[id] = c
	}
	for _, c := range all {
		eventually(t, fmt.Sprintf("client %d works", c.id), func() bool { return strings.Contains(c.says(), "working") })
	}
	eventually(t, "something is synced", func() bool {
		return slices.ContainsFunc(all, func(c *client) bool { return synced(c.says()) > 0 })
	})
	return all
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(soon); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain: %s", what)
}

// gone are the errors that say that the mount is. ECANCELED is what the kernel answers, up to Linux 6.18 at least, when
// a server dies while its thread is being handed a request over io_uring (fuse_uring_send_in_task, IO_URING_F_TASK_DEAD).
var gone = []string{"ENOTCONN", "ECONNABORTED", "EIO", "ECANCELED"}

// wantEnds waits for the end of all clients: each with an error that says that the mount is gone.
func wantEnds(t *testing.T, all []*client) {
	t.Helper()
	deadline := time.After(soon)
	for _, c := range all {
		select {
		case <-c.done:
		case <-deadline:
			stack, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stack", c.cmd.Process.Pid))
			t.Fatalf("client %d hangs, it said %q and waits in\n%s", c.id, c.says(), stack)
		}
		lines := strings.Fields(c.says())
		if last := lines[len(lines)-1]; !slices.Contains(gone, last) {
			t.Errorf("client %d ended with %v, it said %q", c.id, c.cmd.ProcessState, c.says())
		}
	}
}

// wantSynced compares what was synced with what is there.
func wantSynced(t *testing.T, dir string, all []*client) {
	t.Helper()
	total := 0
	for _, c := range all {
		n := synced(c.says())
		if n == 0 {
			continue
		}
		total += n
		got, err := os.ReadFile(clientFile(dir, c.id))
		if err != nil || len(got) < n*record {
			t.Errorf("client %d: %d bytes, at least %d were synced (%v)", c.id, len(got), n*record, err)
			continue
		}
		for i := range len(got) / record { // the last may have been cut short
			if !bytes.Equal(got[i*record:][:record], recordBytes(c.id, i)) {
				t.Errorf("client %d: record %d of %d is not what was written", c.id, i, n)
				break
			}
		}
	}
	if total == 0 {
		t.Error("nothing was synced: this showed nothing")
	}
}

// eachDeath runs a test on a new mount of each transport, as often as was asked for.
func eachDeath(t *testing.T, f func(t *testing.T, m *mnt.T)) {
	lower, _ := lowerLayer(t)
	for _, transport := range mnt.Transports(t) {
		for i := range *deathsFlag {
			t.Run(fmt.Sprint(transport, "/", i), func(t *testing.T) {
				f(t, mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Foreground: true,
					Options: []string{"transport=" + transport}}))
			})
		}
	}
}

func serverOf(t *testing.T, m *mnt.T) int {
	t.Helper()
	pid, err := m.Server()
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// wantGone waits until a process is no more.
func wantGone(t *testing.T, pid int) {
	t.Helper()
	eventually(t, fmt.Sprintf("server %d ends", pid), func() bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) })
}

// again unmounts what is left, checks the layer, and mounts it again.
func again(t *testing.T, m *mnt.T) {
	t.Helper()
	if mounted, err := rival.Mounted(m.Dir); err != nil || mounted {
		if err := unix.Unmount(m.Dir, 0); err != nil {
			t.Fatalf("unmounting what nobody uses: %v", err)
		}
	}
	m.Fsck()
	m.Again()
}

func TestKilledAmongClients(t *testing.T) {
	eachDeath(t, func(t *testing.T, m *mnt.T) {
		all := crowd(t, m.Dir)
		time.Sleep(100 * time.Millisecond)
		pid := serverOf(t, m)
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		wantEnds(t, all)
		wantGone(t, pid)
		again(t, m)
		wantSynced(t, m.Dir, all)
	})
}

// The administrator's way to end a connection: /sys/fs/fuse/connections/N/abort.
func TestAbortedAmongClients(t *testing.T) {
	control := mnt.Dirs(t, "control")[0]
	if err := unix.Mount("none", control, "fusectl", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(control, 0); err != nil {
			t.Error(err)
		}
	})
	eachDeath(t, func(t *testing.T, m *mnt.T) {
		var st unix.Stat_t
		if err := unix.Stat(m.Dir, &st); err != nil {
			t.Fatal(err)
		}
		all := crowd(t, m.Dir)
		pid := serverOf(t, m)
		knob := filepath.Join(control, fmt.Sprint(unix.Minor(st.Dev)), "abort")
		if err := os.WriteFile(knob, []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
		wantEnds(t, all)
		wantGone(t, pid)
		again(t, m)
		wantSynced(t, m.Dir, all)
	})
}

// A busy mount refuses to be unmounted, and nothing has changed; detached, it serves who is in it to his end.
func TestUnmountedAmongClients(t *testing.T) {
	eachDeath(t, func(t *testing.T, m *mnt.T) {
		all := crowd(t, m.Dir)
		pid := serverOf(t, m)
		if out, code := mnt.Lamina(t, "umount", m.Dir); code == 0 || !strings.Contains(out, "in use") {
			t.Errorf("unmounting a busy mount: exit status %d, %q", code, out)
		}
		if err := unix.Unmount(m.Dir, 0); !errors.Is(err, unix.EBUSY) {
			t.Errorf("umount(2) of a busy mount: %v", err)
		}
		wantProgress(t, all)
		if err := unix.Unmount(m.Dir, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if c.id%3 == 0 { // it opens files by name, and the name is gone
				<-c.done
			} else if err := c.cmd.Process.Kill(); err != nil {
				t.Errorf("client %d has ended: %s", c.id, c.says())
			}
		}
		for _, c := range all {
			<-c.done
		}
		wantGone(t, pid)
		again(t, m)
		wantSynced(t, m.Dir, all)
	})
}

// wantProgress fails unless every client that syncs goes on doing so.
func wantProgress(t *testing.T, all []*client) {
	t.Helper()
	for _, c := range all {
		if before := synced(c.says()); c.id%3 == 2 {
			eventually(t, fmt.Sprintf("client %d goes on", c.id), func() bool { return synced(c.says()) > before+1 })
		}
	}
}

// SIGTERM while the mount is in use detaches it, a second one cuts its users off.
func TestTerminatedAmongClients(t *testing.T) {
	eachDeath(t, func(t *testing.T, m *mnt.T) {
		all := crowd(t, m.Dir)
		pid := serverOf(t, m)
		if err := unix.Kill(pid, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the mount is detached", func() bool {
			mounted, err := rival.Mounted(m.Dir)
			return err == nil && !mounted
		})
		wantProgress(t, all)
		if err := unix.Kill(pid, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if c.id%3 == 0 {
				<-c.done // its files' names were gone before
			}
		}
		wantEnds(t, slices.DeleteFunc(slices.Clone(all), func(c *client) bool { return c.id%3 == 0 }))
		wantGone(t, pid)
		again(t, m)
		wantSynced(t, m.Dir, all)
	})
}

// A server that is stopped, as in a debugger, makes its clients wait, and nothing else.
func TestStoppedAmongClients(t *testing.T) {
	eachDeath(t, func(t *testing.T, m *mnt.T) {
		all := crowd(t, m.Dir)
		pid := serverOf(t, m)
		for range 3 {
			if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			time.Sleep(200 * time.Millisecond)
			if err := unix.Kill(pid, unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			wantProgress(t, all)
		}
		for _, c := range all {
			if err := c.cmd.Process.Kill(); err != nil {
				t.Errorf("client %d has ended: %s", c.id, c.says())
			}
			<-c.done
		}
		m.Unmount()
		m.Fsck()
		m.Again()
		wantSynced(t, m.Dir, all)
	})
}
