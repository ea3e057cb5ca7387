// Package live shows something that is asked for anew at an interval, in a terminal: what `lamina top` and `lamina net top`
// have in common.
package live

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
)

// View is what is shown. Only Sample is called beside the others.
type View interface {
	// Name is the command's.
	Name() string
	// Sample asks. What fails is told beside what did not.
	Sample() (sample any, err error)
	// Take takes over a sample.
	Take(at time.Time, sample any)
	// Head is what stands behind name and time, after how and how often it is asked.
	Head() (how, summary string)
	// Table is a line of headings and others, none longer than width where that is possible. Width 0: as long as it takes.
	Table(width int) []string
	// Data is the same for programs, of a time.
	Data(at time.Time) any
	// Key is called with keys that mean nothing to the screen.
	Key(key string)
	// Keys names them in the screen's last line.
	Keys() string
	// Help explains.
	Help() []string
}

// Bounds and steps of the interval.
const (
	minInterval = 500 * time.Millisecond
	maxInterval = time.Minute
)

// Run shows a view in a terminal until q is pressed or ctx ends.
func Run(ctx context.Context, in io.Reader, out io.Writer, view View, interval time.Duration) error {
	_, err := tea.NewProgram(NewScreen(view, interval), tea.WithContext(ctx), tea.WithInput(in), tea.WithOutput(out)).Run()
	if ctx.Err() != nil {
		return nil // asked to end
	}
	return err
}

// Screen is the program's state; Bubble Tea calls it from one goroutine.
type Screen struct {
	view     View
	interval time.Duration

	width, height int
	at            time.Time
	err           error
	scroll        int
	paused, help  bool
	turn          int // of the ticks: a changed interval makes the old one void
}

// NewScreen makes the screen of a view.
func NewScreen(view View, interval time.Duration) *Screen {
	return &Screen{view: view, interval: interval}
}

type (
	// Sampled is what a screen is told when it has been asked.
	Sampled struct {
		At     time.Time
		Sample any
		Err    error
	}
	tick int
)

// Init implements tea.Model.
func (s *Screen) Init() tea.Cmd { return s.sample }

// sample asks beside the screen: what hangs must not keep q from working.
func (s *Screen) sample() tea.Msg {
	sample, err := s.view.Sample()
	return Sampled{time.Now(), sample, err}
}

func (s *Screen) next() tea.Cmd {
	s.turn++
	turn := tick(s.turn)
	return tea.Tick(s.interval, func(time.Time) tea.Msg { return turn })
}

// Update implements tea.Model.
func (s *Screen) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		s.width, s.height = msg.Width, msg.Height
	case Sampled:
		s.view.Take(msg.At, msg.Sample)
		s.at, s.err = msg.At, msg.Err
		return s, s.next()
	case tick:
		if int(msg) == s.turn && !s.paused {
			return s, s.sample
		}
	case tea.KeyPressMsg:
		return s, s.key(msg.String())
	}
	return s, nil
}

func (s *Screen) key(key string) tea.Cmd {
	switch key {
	case "q", "ctrl+c":
		return tea.Quit
	case "?", "h":
		s.help = !s.help
	case "esc":
		s.help = false
	case "space", "p":
		if s.paused = !s.paused; !s.paused {
			return s.sample
		}
	case "+":
		s.interval = min(s.interval*2, maxInterval)
		return s.next()
	case "-":
		s.interval = max(s.interval/2, minInterval)
		return s.next()
	case "down", "j":
		s.scroll++
	case "up", "k":
		s.scroll--
	case "pgdown":
		s.scroll += s.visible()
	case "pgup":
		s.scroll -= s.visible()
	default:
		s.view.Key(key)
	}
	s.scroll = max(0, min(s.scroll, len(s.view.Table(s.width))-1-s.visible()))
	return nil
}

// visible is how many rows fit: beside them there are a line about all, one of headings, one of keys, and one of trouble.
func (s *Screen) visible() int { return max(1, s.height-4) }

// View implements tea.Model.
func (s *Screen) View() tea.View {
	v := tea.NewView(strings.Join(s.Lines(), "\n"))
	v.AltScreen = true
	return v
}

// Lines are what is on the screen.
func (s *Screen) Lines() []string {
	if s.help {
		return s.helpLines()
	}
	state := fmt.Sprintf("every %s", s.interval)
	if s.paused {
		state = "paused"
	}
	at := "asking"
	if !s.at.IsZero() {
		at = s.at.Format(time.TimeOnly)
	}
	how, summary := s.view.Head()
	if how != "" {
		how += ", "
	}
	lines := []string{cut(fmt.Sprintf("%s  %s  %s%s  %s", s.view.Name(), at, how, state, Printable(summary)), s.width)}
	trouble := ""
	if s.err != nil {
		trouble = cut(Printable(strings.ReplaceAll(s.err.Error(), "\n", "; ")), s.width)
	}
	lines = append(lines, trouble)
	table := s.view.Table(s.width)
	lines = append(lines, cut(table[0], s.width))
	body := table[1:]
	from := max(0, min(s.scroll, len(body)-s.visible()))
	for _, l := range body[from:min(len(body), from+s.visible())] {
		lines = append(lines, cut(l, s.width))
	}
	for s.height > 0 && len(lines) < s.height-1 {
		lines = append(lines, "")
	}
	return append(lines, cut(strings.TrimSpace("q quit  ? keys  space pause  "+s.view.Keys()), s.width))
}

// helpLines are bounded by the screen; on a small one the last are missing.
func (s *Screen) helpLines() []string {
	lines := append([]string{"? to go back", ""}, s.view.Help()...)
	lines = append(lines, "", "+ - longer or shorter interval   space stop, and go on   j k, arrows, page keys: scroll   q quit")
	for i := range lines {
		lines[i] = cut(lines[i], s.width)
	}
	if s.height > 0 && len(lines) > s.height {
		lines = lines[:s.height]
	}
	return lines
}

// cut bounds a line; the terminal would wrap it.
func cut(s string, width int) string {
	if width <= 0 {
		return s
	}
	n := 0
	for i := range s {
		if n == width {
			return s[:i]
		}
		n++
	}
	return s
}
