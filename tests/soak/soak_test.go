// Package soak loads one mount from many processes for a long time: they create, write, map, rename, truncate and remove
// files of their own, write to lower files in part, and read lower files together, each checking everything against a
// model. In between the mount is taken away and made anew, in order or by killing its server; then what was synced must
// be there.
//
//	go test ./tests/soak -soak.time=10m -transport=uring
package soak

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

var (
	timeFlag    = flag.Duration("soak.time", 12*time.Second, "how long to load each transport")
	roundFlag   = flag.Duration("soak.round", 3*time.Second, "how long to load a mount before it is taken away, on average")
	workersFlag = flag.Int("soak.workers", 64, "processes")
	seedFlag    = flag.Uint64("soak.seed", 1, "seed; 0 takes one from the clock")
)

// workerEnv makes this program a worker: its mount point, number and seed.
const workerEnv = "LAMINA_SOAK_WORKER"

func TestMain(m *testing.M) {
	if v, ok := os.LookupEnv(workerEnv); ok {
		p := strings.SplitN(v, ":", 3)
		id, _ := strconv.ParseUint(p[0], 10, 64)
		seed, _ := strconv.ParseUint(p[1], 10, 64)
		newWorker(p[2], id, seed).obey(os.Stdin, os.Stdout)
		return
	}
	mnt.Main(m)
}

// process is a worker seen from outside.
type process struct {
	id      int
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	answers chan string
}

func startWorker(t *testing.T, top string, id int, seed uint64) *process {
	t.Helper()
	p := &process{id: id, cmd: exec.Command("/proc/self/exe"), answers: make(chan string, 1)}
	p.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%d:%s", workerEnv, id, seed, top))
	p.cmd.Stderr = os.Stderr
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.stdin = stdin
	go func() {
		defer close(p.answers)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			p.answers <- lines.Text()
		}
	}()
	return p
}

func (p *process) end() error {
	p.stdin.Close()
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(time.Minute):
		_ = p.cmd.Process.Kill()
		return fmt.Errorf("worker %d does not end: %s", p.id, where(p.cmd.Process.Pid))
	}
}

// where tells what a process waits for in the kernel.
func where(pid int) string {
	stacks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", pid))
	var out strings.Builder
	for _, s := range stacks {
		if b, err := os.ReadFile(s); err == nil && strings.Contains(string(b), "fuse") {
			fmt.Fprintf(&out, "%s: %s; ", s, strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", " "))
		}
	}
	return out.String()
}

type crowd []*process

// tell sends a command to everybody.
func (c crowd) tell(command string) error {
	var err error
	for _, p := range c {
		_, e := fmt.Fprintln(p.stdin, command)
		err = errors.Join(err, e)
	}
	return err
}

// hear collects an answer of everybody, and sums up the numbers in them.
func (c crowd) hear(limit time.Duration) (sum int, err error) {
	deadline := time.After(limit)
	for _, p := range c {
		select {
		case said, ok := <-p.answers:
			n := 0
			if _, e := fmt.Sscanf(said, "done: %d", &n); !ok || e != nil {
				err = errors.Join(err, fmt.Errorf("worker %d: %s", p.id, said))
			}
			sum += n
		case <-deadline:
			return sum, errors.Join(err, fmt.Errorf("worker %d does not answer: %s", p.id, where(p.cmd.Process.Pid)))
		}
	}
	return sum, err
}

func TestSoak(t *testing.T) {
	if mnt.Subject() != rival.Lamina {
		t.Fatalf("%s has no server to kill", mnt.Subject())
	}
	seed := mnt.Seed(t, "soak.seed", *seedFlag)
	for _, transport := range mnt.Transports(t) {
		t.Run(transport, func(t *testing.T) { soak(t, transport, seed) })
	}
}

func soak(t *testing.T, transport string, seed uint64) {
	m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lowerLayer(t)}, Foreground: true,
		Options: []string{"transport=" + transport, "format=" + []string{"sparse", "bcow"}[seed%2]}})
	var all crowd
	defer func() {
		for _, p := range all {
			if err := p.end(); err != nil {
				t.Error(err)
			}
		}
	}()
	for id := range *workersFlag {
		all = append(all, startWorker(t, m.Dir, id, seed))
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	rounds, ops := 0, 0
	for end := time.Now().Add(*timeFlag); time.Now().Before(end) || rounds < 2; rounds++ {
		must(all.tell("load"))
		time.Sleep(*roundFlag/2 + time.Duration(rounds%3)*(*roundFlag)/2)
		if kill := rounds%2 == 1; kill {
			must(all.tell("die"))
			must(m.Kill())
			n, err := all.hear(time.Minute)
			must(err)
			ops += n
			m.Fsck()
		} else {
			must(all.tell("stop"))
			n, err := all.hear(time.Minute)
			must(err)
			ops += n
			m.Unmount()
		}
		m.Again()
		must(all.tell("verify"))
		files, err := all.hear(2 * time.Minute)
		must(err)
		if files < len(all) {
			t.Errorf("only %d files in round %d", files, rounds)
		}
		if t.Failed() {
			t.Fatalf("in round %d", rounds)
		}
	}
	if ops < 10*len(all) {
		t.Errorf("only %d operations: this showed nothing", ops)
	}
	m.Unmount()
	left, err := filepath.Glob(filepath.Join(m.Work, "lamina", "tmp", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left in the work directory: %q (%v)", left, err)
	}
	t.Logf("%d operations in %d rounds", ops, rounds)
}

func lowerLayer(t *testing.T) string {
	t.Helper()
	dir := mnt.Dirs(t, "lower")[0]
	write := func(name string, data []byte) {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range sharedFiles {
		write(fmt.Sprintf("shared/%d", i), sharedContents(i))
	}
	for w := range *workersFlag {
		for i := range ownFiles {
			write(fmt.Sprintf("w%d/lower%d", w, i), ownContents(uint64(w), i))
		}
	}
	return dir
}
