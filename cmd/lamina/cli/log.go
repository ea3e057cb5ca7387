package cli

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

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

// logger writes lines that say when, who and what.
type logger struct {
	mu      sync.Mutex
	out     *os.File
	path    string // empty: standard error
	size    int64
	since   time.Time // begin of the window
	repeats map[string]int
	all     bool // write everything: somebody asked for every request
}

func newStderrLog() *logger { return &logger{out: os.Stderr} }

// openLog opens the log file at path, makes it standard error as well, and starts a new one where it is full.
func openLog(path string) (*logger, error) {
	if err := makeRuntimeDir(); err != nil {
		return nil, err
	}
	lg := &logger{path: path}
	return lg, lg.open()
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

func (lg *logger) printf(format string, args ...any) {
	msg := strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", `\n`)
	lg.mu.Lock()
	defer lg.mu.Unlock()
	now := time.Now()
	if now.Sub(lg.since) > logWindow {
		lg.endWindow(now)
	}
	if lg.all || !lg.suppressed(msg) {
		lg.write(now, msg)
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
		lg.write(now, msg)
	}
	lg.since, lg.repeats = now, make(map[string]int)
}

func (lg *logger) write(now time.Time, msg string) {
	if lg.path != "" && lg.size > maxLog {
		lg.rotate()
	}
	line := fmt.Sprintf("%s lamina[%d]: %s\n", now.UTC().Format("2006-01-02T15:04:05.000Z"), os.Getpid(), msg)
	n, _ := lg.out.WriteString(line) // nowhere is left to say that the log is full
	lg.size += int64(n)
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

// close ends the log. One without a line is of no use to anybody, unless another server of the same mount point may
// still write into it.
func (lg *logger) close(mnt string) {
	lg.mu.Lock()
	defer lg.mu.Unlock()
	lg.endWindow(time.Now())
	if lg.path == "" {
		return
	}
	others, err := sockets(mnt)
	if st, statErr := lg.out.Stat(); err == nil && len(others) == 0 && statErr == nil && st.Size() == 0 {
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
		name = name[len(name)-enough:] + "-" + mountHash(mnt)
	}
	return filepath.Join(runtimeDir(), name+".log")
}

// mountHash names a mount point in few bytes: a unix socket's path has at most 107.
func mountHash(mnt string) string {
	sum := sha256.Sum256([]byte(mnt))
	return hex.EncodeToString(sum[:8])
}
