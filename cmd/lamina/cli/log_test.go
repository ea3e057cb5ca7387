package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// writeLog writes one line of each level under some settings.
func writeLog(t *testing.T, level, format string) []string {
	t.Helper()
	t.Setenv(logLevelVariable, "") // and put back what was there
	t.Setenv(logFormatVariable, "")
	old := logging
	defer func() { logging = old }()
	must(t, setLogging(level, format))
	path := filepath.Join(t.TempDir(), "log")
	f, err := os.Create(path)
	must(t, err)
	lg := &logger{out: f}
	lg.infof("an event")
	lg.printf("trouble\nwith %q", "a name")
	must(t, f.Close())
	b, err := os.ReadFile(path)
	must(t, err)
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
}

// One line an event, whatever is in it, in the format and from the level that was asked for.
func TestLogFormats(t *testing.T) {
	text := writeLog(t, "", "")
	if len(text) != 2 || !regexp.MustCompile(`^time=\S+Z level=INFO msg="an event" pid=\d+$`).MatchString(text[0]) ||
		!strings.Contains(text[1], `level=WARN msg="trouble\nwith \"a name\"" pid=`) {
		t.Errorf("%q", text)
	}
	lines := writeLog(t, "warn", "json")
	var line struct {
		Time, Level, Msg string
		PID              int
	}
	if len(lines) != 1 {
		t.Fatalf("%q", lines)
	}
	must(t, json.Unmarshal([]byte(lines[0]), &line))
	if line.Level != "WARN" || line.Msg != "trouble\nwith \"a name\"" || line.PID != os.Getpid() || line.Time == "" {
		t.Errorf("%+v", line)
	}
	if lines := writeLog(t, "error", "text"); len(lines) != 1 || lines[0] != "" {
		t.Errorf("%q", lines)
	}
	l := newLayers(t)
	l.fails([]string{"--log-level", "loud", "status"}, "loud", "info")
	l.fails([]string{"status", "--log-format", "xml"}, "xml", "json")
}

// The server in the background logs as its command was told to.
func TestLogFormatOfServer(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "--log-format", "json", "-o", rw, "mnt")
	l.patch(50_000)
	l.ok("umount", "mnt")
	l.forge()
	l.ok("mount", "--log-format", "json", "-o", rw, "mnt")
	if _, err := os.ReadFile(l.path("mnt/big")); err == nil {
		t.Error("a damaged file was read")
	}
	log := filepath.Join(runtimeRoot, filepath.Base(logPath(l.path("mnt"))))
	b, err := os.ReadFile(log)
	must(t, err)
	var line map[string]any
	if err := json.Unmarshal([]byte(strings.SplitN(string(b), "\n", 2)[0]), &line); err != nil || !strings.Contains(line["msg"].(string), "/big") {
		t.Errorf("%v: %s", err, b)
	}
	l.ok("umount", "mnt")
	must(t, os.Remove(log))
}
