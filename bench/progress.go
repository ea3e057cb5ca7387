package bench

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// progress shows what is being done: on a terminal in one line that is rewritten, elsewhere in a line a scenario.
type progress struct {
	mu       sync.Mutex
	w        io.Writer // nil: silence
	terminal bool
	began    time.Time
	number   int // of this scenario
	of       int
	line     string // the scenario, the contender, the round
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, began: time.Now()}
	if f, ok := w.(*os.File); ok {
		_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		p.terminal = err == nil
	}
	return p
}

func (p *progress) overall(done, of int) { p.number, p.of = done+1, of }

// step says who is being measured.
func (p *progress) step(what, contender string, round int) {
	p.line = what
	if contender != "" {
		p.line += " · " + contender
	}
	if round > 0 {
		p.line += fmt.Sprintf(" · round %d", round)
	}
	p.show(p.line)
}

// detail says what is being done with them.
func (p *progress) detail(text string) { p.show(p.line + " · " + text) }

func (p *progress) show(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w == nil || !p.terminal {
		return
	}
	at := ""
	if p.of > 0 {
		at = fmt.Sprintf("%d/%d ", p.number, p.of)
	}
	line := []rune(fmt.Sprintf("[%s] %s%s", p.elapsed(), at, text))
	// A line that wraps could not be rewritten.
	if size, err := unix.IoctlGetWinsize(int(p.w.(*os.File).Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 && len(line) >= int(size.Col) {
		line = line[:size.Col-1]
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", string(line))
}

// note is a line that stays.
func (p *progress) note(format string, args ...any) {
	p.clear()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w != nil {
		fmt.Fprintf(p.w, format+"\n", args...)
	}
}

// done notes that a scenario is over.
func (p *progress) done(scenario string, took time.Duration) {
	p.note("[%s] %d/%d %s took %s", p.elapsed(), p.number, p.of, scenario, took.Round(time.Second))
}

func (p *progress) elapsed() time.Duration { return time.Since(p.began).Round(time.Second) }

func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w != nil && p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
