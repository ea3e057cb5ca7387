package cli

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What a real mount does is in the metrics, printed once and over a socket.
func TestMetrics(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw, "mnt")
	f, err := os.OpenFile(l.path("mnt/big"), os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("0123456789"), 100_000)
	must(t, err)
	_, err = io.ReadFull(io.NewSectionReader(f, 100_000, 10), make([]byte, 10))
	must(t, err)
	must(t, f.Close())

	check := func(text string) {
		t.Helper()
		mount := fmt.Sprintf(`\{device="[0-9]+:[0-9]+",mountpoint="%s"`, l.path("mnt"))
		for _, want := range []string{
			`lamina_mounts 1`, `lamina_gather_failed 0`,
			`lamina_written_bytes_total` + mount + `\} 10`, `lamina_requests_total` + mount + `,op="write"\} 1`, `lamina_requests_total` + mount + `,op="read"\} [1-9]`,
			`lamina_read_bytes_total` + mount + `\} [1-9]`, `lamina_sketches_created_total` + mount + `\} 1`, `lamina_not_copied_bytes` + mount + `\} [1-9]`,
			`lamina_errors_total` + mount + `\} 0`, `lamina_damaged_files` + mount + `\} 0`, `lamina_server_mounts\{pid="[0-9]+"\} 1`,
			`lamina_server_resident_memory_bytes\{pid="[0-9]+"\} [1-9]`,
		} {
			if !regexp.MustCompile(`(?m)^` + want).MatchString(text) {
				t.Errorf("no line %s in\n%s", want, text)
			}
		}
	}
	check(l.ok("metrics", "--listen", "-"))

	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe, "metrics", "--listen", "unix:m")
	cmd.Args[0], cmd.Dir = "lamina", l.dir
	stderr, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.path("m"))
	}}}
	var text []byte
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		resp, err := client.Get("http://exporter/metrics")
		if err == nil {
			text, err = io.ReadAll(resp.Body)
			resp.Body.Close()
			must(t, err)
			break
		}
		if time.Now().After(deadline) {
			_ = cmd.Process.Kill()
			t.Fatal(err)
		}
	}
	check(string(text))
	must(t, cmd.Process.Signal(unix.SIGTERM))
	said, err := io.ReadAll(bufio.NewReader(stderr))
	must(t, err)
	if err := cmd.Wait(); err != nil || len(bytes.TrimSpace(said)) > 0 {
		t.Errorf("%v: %s", err, said)
	}
	l.ok("umount", "mnt")
	if text := l.ok("metrics", "--listen", "-"); !strings.Contains(text, "lamina_mounts 0") || strings.Contains(text, "lamina_sketches{") {
		t.Errorf("without a mount:\n%s", text)
	}
	l.fails([]string{"metrics", "--listen", "unix:l1/file"}, "l1/file", "no socket")
}

// Damage is counted by file, however often it is met.
func TestDamagedIsCounted(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw, "mnt")
	l.patch(50_000)
	l.ok("umount", "mnt")
	l.forge()
	l.ok("mount", "-o", rw, "mnt")
	for range 3 {
		if _, err := os.ReadFile(l.path("mnt/big")); err == nil {
			t.Error("a damaged file was read")
		}
	}
	if text := l.ok("metrics", "--listen", "-"); !regexp.MustCompile(`(?m)^lamina_damaged_files\{.*\} 1$`).MatchString(text) {
		t.Errorf("%s", text)
	}
	if out := l.ok("status", "mnt"); !strings.Contains(out, "1 damaged files") {
		t.Errorf("%s", out)
	}
	l.ok("umount", "mnt")
	must(t, os.Remove(filepath.Join(runtimeRoot, filepath.Base(logPath(l.path("mnt"))))))
}
