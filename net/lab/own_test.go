package lab

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A test program that is killed leaves its namespaces: scripts/own.sh names them as leaks and removes them, and no others.
func TestKilled(t *testing.T) {
	const victim = "LAMINA_LAB_VICTIM"
	if os.Getenv(victim) != "" {
		NewNode(t, "left")
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	other := NewNode(t, "other")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	own := exec.Command("../../scripts/own.sh", "lab", self, "-test.run", "^TestKilled$")
	own.Env = append(os.Environ(), victim+"=1")
	out, err := own.CombinedOutput()
	_, name, _ := strings.Cut(string(out), "LEAK: network namespace: ")
	name, _, _ = strings.Cut(name, "\n")
	if err == nil || !strings.HasSuffix(name, "-left") {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := os.Stat(filepath.Join(namedDir, name)); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", name, err)
	}
	if _, err := os.Stat(other.Path); err != nil {
		t.Errorf("somebody else's namespace: %v", err)
	}
}
