package supervise

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

const roleEnv = "LAMINA_SUPERVISE_TEST"

// The test binary is the server too.
func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(server(role))
	}
	os.Exit(m.Run())
}

// server is one process: every one adds a line to the kept file, and dies in the way of its role until there are ten.
func server(role string) int {
	store, kept, err := Dial(3)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if role == "fails" {
		return 7
	}
	if role == "never ready" || role == "ready once" {
		if err := store.Keep("x", os.Stdin); err != nil {
			return 1
		}
		if role == "ready once" && kept["x"] == nil && store.Ready() != nil {
			return 1
		}
		die()
	}
	if kept["file"] == nil {
		f, err := os.CreateTemp("", "")
		if err != nil || os.Remove(f.Name()) != nil || store.Keep("file", f, f) != nil {
			return 1
		}
		kept["file"] = []*os.File{f}
	}
	f := kept["file"][0]
	if _, err := f.WriteString("line\n"); err != nil || store.Ready() != nil {
		return 1
	}
	if role == "waits" {
		time.Sleep(time.Minute) // for the signal
	}
	text, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	if err != nil || strings.Count(string(text), "line\n") < 10 {
		die()
	}
	if store.Drop("file") != nil {
		return 1
	}
	return 42
}

func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

func run(t *testing.T, role string) (status int, deaths int, err error) {
	t.Helper()
	o := Options{
		Command: func(int) (*exec.Cmd, error) {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), roleEnv+"="+role)
			cmd.Stderr = os.Stderr
			return cmd, nil
		},
		Started:   func(generation, _ int) { deaths = generation },
		Logf:      t.Logf,
		MaxDeaths: 5,
	}
	status, err = Run(o)
	return status, deaths, err
}

func TestSuccessorsGetWhatIsKept(t *testing.T) {
	status, deaths, err := run(t, "dies")
	if err != nil || status != 42 || deaths != 9 {
		t.Errorf("status %d after %d deaths, %v; want 42 after 9", status, deaths, err)
	}
}

func TestWithoutAnythingKeptAnEndIsTheEnd(t *testing.T) {
	status, deaths, err := run(t, "fails")
	if err != nil || status != 7 || deaths != 0 {
		t.Errorf("status %d after %d deaths, %v; want 7 after none", status, deaths, err)
	}
}

func TestGivesUp(t *testing.T) {
	_, deaths, err := run(t, "ready once")
	if err == nil || deaths != 5 {
		t.Errorf("%v after %d deaths, want an error after 5", err, deaths)
	}
}

func TestWhoNeverServedHasNoSuccessor(t *testing.T) {
	_, deaths, err := run(t, "never ready")
	if !errors.Is(err, ErrNeverReady) || deaths != 0 {
		t.Errorf("%v after %d deaths, want %v after none", err, deaths, ErrNeverReady)
	}
}
