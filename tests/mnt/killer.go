package mnt

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"lamina/pool"
)

// Killer kills the servers of a mount with survive=on, one after another.
type Killer struct {
	supervisor int
	socket     string
	stop, done chan struct{}
	deaths     atomic.Int64
}

// kill starts a killer if the tests are to run with one.
func (m *T) kill() {
	if slices.Contains(m.Options, "survive=on") && *deaths > 0 {
		m.killer = m.KillEvery(*deaths)
	}
}

// newKiller finds the mount's supervisor and the socket on which its servers answer.
func (m *T) newKiller() *Killer {
	m.t.Helper()
	out, code := Lamina(m.t, "status", "--json", m.Dir)
	var status struct{ Supervisor int }
	if err := json.Unmarshal([]byte(out), &status); err != nil || code != 0 || status.Supervisor == 0 {
		m.t.Fatalf("status tells of no supervisor: %v, exit status %d\n%s", err, code, out)
	}
	k := &Killer{supervisor: status.Supervisor, stop: make(chan struct{}), done: make(chan struct{})}
	sockets, err := pool.Sockets(m.Dir)
	if err != nil || len(sockets) == 0 {
		m.t.Fatalf("no control socket: %v", err)
	}
	for _, s := range sockets {
		if st, pidfd, err := pool.Ask(s); err == nil {
			unix.Close(pidfd)
			if st.Supervisor == k.supervisor {
				k.socket = s
			}
		}
	}
	if k.socket == "" {
		m.t.Fatal("no control socket of the supervisor's server")
	}
	return k
}

// child is the supervisor's child; 0 if there is none just now.
func (k *Killer) child() int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", k.supervisor))
	for _, l := range lists {
		list, _ := os.ReadFile(l)
		for _, f := range strings.Fields(string(list)) {
			if pid, err := strconv.Atoi(f); err == nil {
				return pid
			}
		}
	}
	return 0
}

// serving waits for a server that answers, and returns its process; 0 if the killer is stopped first.
func (k *Killer) serving() int {
	for {
		st, pidfd, err := pool.Ask(k.socket)
		if pidfd >= 0 {
			unix.Close(pidfd)
		}
		if err == nil && !st.Flushing {
			return st.PID
		}
		select {
		case <-k.stop:
			return 0
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Processes gives the supervisor and the server that serves now, of a mount with survive=on.
func (m *T) Processes() (supervisor, server int) {
	m.t.Helper()
	k := m.newKiller()
	return k.supervisor, k.serving()
}

// Die kills the server once and returns when its successor serves.
func (m *T) Die() {
	m.t.Helper()
	k := m.newKiller()
	before := k.serving()
	if err := unix.Kill(before, unix.SIGKILL); err != nil {
		m.t.Fatalf("killing the server: %v", err)
	}
	for end := time.Now().Add(Timeout); k.serving() == before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatal("no successor came")
		}
	}
}

// KillEvery kills the mount's server again and again, after a time that is every on average, until Stop. One time in four
// it is one that is just taking over.
func (m *T) KillEvery(every time.Duration) *Killer {
	m.t.Helper()
	k := m.newKiller()
	go func() {
		defer close(k.done)
		for last := 0; ; {
			pid := 0
			if rand.IntN(4) == 0 {
				if k.pause(time.Duration(rand.Int64N(int64(40 * time.Millisecond)))) {
					pid = k.child()
				}
			} else if k.serving(); k.pause(time.Duration(rand.Int64N(int64(2 * every)))) {
				pid = k.serving()
			}
			if k.stopped() {
				return
			}
			if pid != 0 && pid != last && unix.Kill(pid, unix.SIGKILL) == nil {
				last = pid
				k.deaths.Add(1)
			}
		}
	}()
	m.t.Cleanup(k.Stop)
	return k
}

// pause sleeps; false if the killer was stopped meanwhile.
func (k *Killer) pause(d time.Duration) bool {
	select {
	case <-k.stop:
		return false
	case <-time.After(d):
		return true
	}
}

func (k *Killer) stopped() bool {
	select {
	case <-k.stop:
		return true
	default:
		return false
	}
}

// Stop ends the killing. It may be called again, and on nil.
func (k *Killer) Stop() {
	if k == nil {
		return
	}
	if !k.stopped() {
		close(k.stop)
	}
	<-k.done
}

// Deaths is how many servers were killed so far.
func (k *Killer) Deaths() int { return int(k.deaths.Load()) }
