package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"lamina/pool"

	"golang.org/x/sys/unix"
)

// maxLog bounds a log file, in bytes; the one before it is kept beside it.
const maxLog = 1 << 20

// A hostile layer can make the server say the same thing as fast as somebody asks. So a message is written maxRepeats
// times within a window; what came beyond that is counted, and the count written when the window ends.
const (
	maxRepeats = 5
	logWindow  = time.Minute
	maxTracked = 1000 // different messages in a window; more are not counted apart
)

// logging is how this process logs.
var logging logSettings

type logSettings struct {
	level slog.Level // the least that is written; the zero value is info
	json  bool
}

// Variables that say how to log to the servers that this process starts, and to whom no flags can be given.
const (
	logLevelVariable  = "LAMINA_LOG_LEVEL"
	logFormatVariable = "LAMINA_LOG_FORMAT"
)

// setLogging takes the settings from the flags, or without them from the environment, and hands them on there.
func setLogging(level, format string) error {
	level, format = orVariable(level, logLevelVariable, "info"), orVariable(format, logFormatVariable, "text")
	var s logSettings
	switch level {
	case "debug", "info", "warn", "error":
		if err := s.level.UnmarshalText([]byte(level)); err != nil {
			return err
		}
	default:
		return fmt.Errorf("log level %q: use debug, info, warn or error", level)
	}
	switch format {
	case "text":
	case "json":
		s.json = true
	default:
		return fmt.Errorf("log format %q: use text or json", format)
	}
	logging = s
	return errors.Join(os.Setenv(logLevelVariable, level), os.Setenv(logFormatVariable, format))
}

func orVariable(value, variable, usual string) string {
	if value == "" {
		value = os.Getenv(variable)
	}
	if value == "" {
		value = usual
	}
	return value
}

func (s logSettings) handler(w io.Writer) slog.Handler {
	opts := &slog.HandlerOptions{Level: slog.LevelDebug} // the logger has chosen
	if s.json {
		return slog.NewJSONHandler(w, opts)
	}
	return slog.NewTextHandler(w, opts)
}

// logger writes lines that say when, who and what, by log/slog.
type logger struct {
	handler slog.Handler // made with the first line
	mu      sync.Mutex
	out     *os.File
	path    string // empty: standard error
	size    int64
	began   int64     // size when it was opened
	since   time.Time // begin of the window
	repeats map[string]int
	notices int64 // bytes of the file that only say how the mount was made
	all     bool  // write everything: somebody asked for every request
}

func newStderrLog() *logger { return &logger{out: os.Stderr} }

// openLog opens the log file at path, makes it standard error as well, and starts a new one where it is full.
func openLog(path string) (*logger, error) {
	if err := pool.MakeRuntimeDir(); err != nil {
		return nil, err
	}
	lg := &logger{path: path}
	err := lg.open()
	lg.began = lg.size
	return lg, err
}

func (lg *logger) open() error {
	f, err := os.OpenFile(lg.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("log file: %w", err)
	}
	st, err := f.Stat()
	if err == nil {
		err = unix.Dup3(int(f.Fd()), 2, 0)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("log file %s: %w", lg.path, err)
	}
	if lg.out != nil {
		lg.out.Close()
	}
	lg.out, lg.size = f, st.Size()
	return nil
}

// printf writes what an operator must know: something went wrong, or is not as it was to be.
func (lg *logger) printf(format string, args ...any) { lg.log(slog.LevelWarn, format, args...) }

// infof writes what somebody asked for and happened.
func (lg *logger) infof(format string, args ...any) { lg.log(slog.LevelInfo, format, args...) }

func (lg *logger) log(level slog.Level, format string, args ...any) {
	if lg.all {
		level = slog.LevelDebug // every request, and what else is said
	} else if level < logging.level {
		return
	}
	msg := fmt.Sprintf(format, args...)
	lg.mu.Lock()
	defer lg.mu.Unlock()
	now := time.Now()
	if now.Sub(lg.since) > logWindow {
		lg.endWindow(now)
	}
	if lg.all || !lg.suppressed(msg) {
		lg.write(now, level, msg)
	}
}

// suppressed counts a message and tells whether it has been written often enough.
func (lg *logger) suppressed(msg string) bool {
	if _, known := lg.repeats[msg]; !known && len(lg.repeats) >= maxTracked {
		msg = "messages of other kinds"
	}
	lg.repeats[msg]++
	return lg.repeats[msg] > maxRepeats
}

// endWindow writes what was held back and begins to count anew.
func (lg *logger) endWindow(now time.Time) {
	held := make([]string, 0, len(lg.repeats))
	for msg, n := range lg.repeats {
		if n > maxRepeats {
			held = append(held, fmt.Sprintf("%s (%d times more)", msg, n-maxRepeats))
		}
	}
	slices.Sort(held)
	for _, msg := range held {
		lg.write(now, slog.LevelWarn, msg)
	}
	lg.since, lg.repeats = now, make(map[string]int)
}

func (lg *logger) write(now time.Time, level slog.Level, msg string) {
	if lg.path != "" && lg.size > maxLog {
		lg.rotate()
	}
	if lg.handler == nil {
		lg.handler = logging.handler((*logFile)(lg))
	}
	r := slog.NewRecord(now.UTC(), level, msg, 0)
	r.AddAttrs(slog.Int("pid", os.Getpid()))
	_ = lg.handler.Handle(context.Background(), r) // nowhere is left to say that the log is full
}

// logFile is the file that a logger has open now. Its owner holds the lock.
type logFile logger

func (f *logFile) Write(line []byte) (int, error) {
	n, err := f.out.Write(line)
	f.size += int64(n)
	return n, err
}

func (lg *logger) rotate() {
	if err := os.Rename(lg.path, lg.path+".1"); err == nil {
		err = lg.open()
		if err == nil {
			return
		}
	}
	lg.size = 0 // stay with the file and try again later
}

// made says that the mount has been made: what was written until now, lamina status tells too as long as it is there.
// Engines mount every container on a directory of its own, and each would leave a log.
func (lg *logger) made() {
	lg.mu.Lock()
	defer lg.mu.Unlock()
	lg.notices += lg.size - lg.began
}

// close ends the log. One that says nothing that went wrong is of no use to anybody, unless another server of the same mount point may
// still write into it.
func (lg *logger) close(mnt string) {
	lg.mu.Lock()
	defer lg.mu.Unlock()
	lg.endWindow(time.Now())
	if lg.path == "" {
		return
	}
	others, err := pool.Sockets(mnt)
	if st, statErr := lg.out.Stat(); err == nil && len(others) == 0 && statErr == nil && st.Size() == lg.notices {
		_ = os.Remove(lg.path)
	}
	lg.out.Close()
}

// logPath names the log of the mount on mnt, readably.
func logPath(mnt string) string {
	name := strings.ReplaceAll(strings.Trim(mnt, "/"), "/", "-")
	if name == "" {
		name = "root"
	}
	const enough = 150
	if len(name) > enough {
		name = name[len(name)-enough:] + "-" + pool.MountHash(mnt)
	}
	return filepath.Join(pool.RuntimeDir(), name+".log")
}
