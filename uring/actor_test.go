package uring

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// actorEnv makes the test's program something else: another process, for what is about processes. Those that wait for an
// answer must be other ones than the server, which could not die otherwise: it would wait for itself.
const actorEnv = "LAMINA_URING_ACTOR"

// actors by their name; the words after it are arguments. An error is what the actor says before it fails.
var actors = map[string]func(args []string) error{
	"stat":   func(args []string) error { return actStat(args[0]) },
	"fsync":  func(args []string) error { return actOpened(args[0], unix.Fsync) },
	"open":   func(args []string) error { return actOpened(args[0], func(int) error { return nil }) },
	"lseek":  func(args []string) error { return actOpened(args[0], seekData) },
	"fast":   func(args []string) error { return fastOnes(args[0]) },
	"server": actServer,
}

func runActor(spec string) {
	words := strings.Split(spec, "|")
	if err := actors[words[0]](words[1:]); err != nil {
		fmt.Fprintln(os.Stderr, spec, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// actor prepares a process that stays on a CPU, or, given -1, runs where it likes.
func actor(cpu int, name string, args ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	cmd := exec.Command(self)
	if cpu >= 0 {
		cmd = exec.Command("taskset", "-c", strconv.Itoa(cpu), self)
	}
	cmd.Env = append(os.Environ(), actorEnv+"="+strings.Join(append([]string{name}, args...), "|"))
	cmd.Stderr = os.Stderr
	return cmd
}

// act starts an actor, which is killed at the latest when the test ends, and tells of its end.
func act(t testing.TB, cpu int, name string, args ...string) (*exec.Cmd, <-chan error) {
	t.Helper()
	cmd, done := actor(cpu, name, args...), make(chan error, 1)
	must(t, cmd.Start())
	go func() { done <- cmd.Wait(); close(done) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		within(t, 20*time.Second, "the death of "+name, done)
	})
	return cmd, done
}

// acted runs an actor to its end, which must be a good one and come in time.
func acted(t testing.TB, cpu int, what, name string, args ...string) {
	t.Helper()
	_, done := act(t, cpu, name, args...)
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("%s: nothing for 20 s", what)
	}
}

func actStat(p string) error {
	var st unix.Stat_t
	return unix.Stat(p, &st)
}

func actOpened(p string, f func(fd int) error) error {
	fd, err := unix.Open(p, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return f(fd)
}

func seekData(fd int) error {
	_, err := unix.Seek(fd, 0, unix.SEEK_DATA)
	return err
}

// fastOnes does a little of everything with a file.
func fastOnes(dir string) error {
	p := filepath.Join(dir, "fast")
	for i := range 50 {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil || st.Size == 0 {
			return fmt.Errorf("stat: size %d, %w", st.Size, err)
		}
		if err := actOpened(p, func(fd int) error {
			if _, err := unix.Pwrite(fd, []byte("x"), int64(i)); err != nil {
				return err
			}
			_, err := unix.Pread(fd, make([]byte, 10), 0)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// actServer mounts a file system with a file on a directory, says so with a line of statistics, and serves until its
// standard input ends.
func actServer(args []string) error {
	fs := newMemFS()
	fs.file("fast", pattern(1, 5000))
	m, err := mountOn(args[0], onUring, fs)
	if err != nil {
		return err
	}
	s := m.conn.Stats()
	fmt.Println("serving", s.Threads, s.Pinned, s.Queues, s.Depth)
	bufio.NewScanner(os.Stdin).Scan()
	if err := unix.Unmount(m.dir, 0); err != nil {
		return err
	}
	<-m.ended
	return nil
}
