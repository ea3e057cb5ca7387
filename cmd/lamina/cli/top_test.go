package cli

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestTopOnce(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw, "mnt")
	l.patch(100_000)
	var out struct {
		Time   time.Time
		Mounts []struct {
			Mountpoint string
			NotCopied  int64 `json:"not_copied_bytes"`
		}
	}
	must(t, json.Unmarshal([]byte(l.ok("top", "--once", "--json", "--interval", "100ms")), &out))
	if len(out.Mounts) != 1 || out.Mounts[0].Mountpoint != l.path("mnt") || out.Mounts[0].NotCopied <= 0 || out.Time.IsZero() {
		t.Errorf("%+v", out)
	}
	if text := l.ok("top", "--once", "--interval", "100ms", "--sort", "written"); !strings.Contains(text, "MOUNT POINT") || !strings.Contains(text, l.path("mnt")) {
		t.Errorf("%s", text)
	}
	l.ok("umount", "mnt")
	if text := l.ok("top", "--once", "--json", "--interval", "100ms"); !strings.Contains(text, `"mounts":[]`) {
		t.Errorf("no mounts: %s", text)
	}
	l.fails([]string{"top", "--sort", "colour"}, "colour", "errors")
	l.fails([]string{"top", "--interval", "1ms"}, "1ms", "100ms")
}

// In a real terminal: rows come, letters sort, q leaves it as it was.
func TestTopInTerminal(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw, "mnt")
	exe, err := os.Executable()
	must(t, err)
	must(t, os.Symlink(exe, l.path("lamina")))
	tmux := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("tmux", append([]string{"-u", "-f", "/dev/null", "-S", l.path("tmux")}, args...)...)
		cmd.Env = append(os.Environ(), "TERM=xterm-256color", "SHELL=/bin/sh")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("tmux %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	tmux("new-session", "-d", "-x", "140", "-y", "20", fmt.Sprintf("echo before; %s top --interval 500ms; echo after $?; exec sleep 1000", l.path("lamina")))
	t.Cleanup(func() { tmux("kill-server") })
	awaitScreen := func(wants ...string) {
		t.Helper()
		for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			got := tmux("capture-pane", "-p")
			missing := ""
			for _, w := range wants {
				if !strings.Contains(got, w) {
					missing = w
				}
			}
			if missing == "" {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("no %q on the screen:\n%s", missing, got)
			}
		}
	}
	awaitScreen("lamina top", "1 mounts, 1 servers", "MOUNT POINT", "by requests, every 500ms", "q quit")
	awaitScreen(filepath.Base(l.path("mnt")))
	// What happens is seen.
	stop := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			f, err := os.OpenFile(l.path("mnt/big"), os.O_WRONLY|os.O_SYNC, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("x"), 100_000)
				f.Close()
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	tmux("send-keys", "w")
	awaitScreen("by written", "252K") // avoided: 256 KiB but for the rest of one block
	close(stop)
	must(t, <-done)
	tmux("send-keys", "i")
	awaitScreen("by written inverted")
	tmux("send-keys", "?")
	awaitScreen("a avoided", "? to go back", "blocks that are to be completed")
	tmux("resize-window", "-x", "90", "-y", "12")
	tmux("send-keys", "?")
	awaitScreen("by written inverted", "q quit")
	tmux("send-keys", "q")
	awaitScreen("before", "after 0")
	if got := tmux("capture-pane", "-p"); strings.Contains(got, "MOUNT POINT") {
		t.Errorf("the table stays on the screen:\n%s", got)
	}
	l.ok("umount", "mnt")
}
