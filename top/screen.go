package top

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"lamina/inventory"

	tea "charm.land/bubbletea/v2"
)

// Source lists the mounts, and tells what could not be asked.
type Source func() ([]inventory.Mount, error)

// Bounds and steps of the interval.
const (
	minInterval = 500 * time.Millisecond
	maxInterval = time.Minute
)

// Options of the screen.
type Options struct {
	Interval time.Duration
	Sort     Key
	Reverse  bool
}

// Run shows the table in a terminal until q is pressed or ctx ends.
func Run(ctx context.Context, in io.Reader, out io.Writer, source Source, opt Options) error {
	_, err := tea.NewProgram(&screen{source: source, opt: opt, sampler: &Sampler{}}, tea.WithContext(ctx), tea.WithInput(in), tea.WithOutput(out)).Run()
	if ctx.Err() != nil {
		return nil // asked to end
	}
	return err
}

// screen is the program's state; Bubble Tea calls it from one goroutine.
type screen struct {
	source  Source
	opt     Options
	sampler *Sampler

	width, height int
	rows          []Row
	at            time.Time
	err           error
	scroll        int
	paused, help  bool
	turn          int // of the ticks: a changed interval makes the old one void
}

type (
	sampled struct {
		at     time.Time
		mounts []inventory.Mount
		err    error
	}
	tick int
)

func (s *screen) Init() tea.Cmd { return s.sample }

// sample asks the servers, beside the screen: one that hangs must not keep q from working.
func (s *screen) sample() tea.Msg {
	mounts, err := s.source()
	return sampled{time.Now(), mounts, err}
}

func (s *screen) next() tea.Cmd {
	s.turn++
	turn := tick(s.turn)
	return tea.Tick(s.opt.Interval, func(time.Time) tea.Msg { return turn })
}

func (s *screen) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		s.width, s.height = msg.Width, msg.Height
	case sampled:
		s.rows, s.at, s.err = s.sampler.Next(msg.at, msg.mounts), msg.at, msg.err
		Sort(s.rows, s.opt.Sort, s.opt.Reverse)
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

func (s *screen) key(key string) tea.Cmd {
	switch key {
	case "q", "ctrl+c":
		return tea.Quit
	case "?", "h":
		s.help = !s.help
	case "esc":
		s.help = false
	case "i":
		s.opt.Reverse = !s.opt.Reverse
	case "space", "p":
		if s.paused = !s.paused; !s.paused {
			return s.sample
		}
	case "+":
		s.opt.Interval = min(s.opt.Interval*2, maxInterval)
		return s.next()
	case "-":
		s.opt.Interval = max(s.opt.Interval/2, minInterval)
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
		if i := strings.Index(keyLetters, key); i >= 0 && len(key) == 1 {
			s.opt.Sort = Key(i)
		}
	}
	Sort(s.rows, s.opt.Sort, s.opt.Reverse)
	s.scroll = max(0, min(s.scroll, len(s.rows)-s.visible()))
	return nil
}

// visible is how many rows fit: beside them there are a line about all, one of headings, one of keys, and one of trouble.
func (s *screen) visible() int { return max(1, s.height-4) }

const keysLine = "q quit  ? keys  space pause  i invert  sort by: m c o r w a y t u e"

func (s *screen) View() tea.View {
	v := tea.NewView(strings.Join(s.lines(), "\n"))
	v.AltScreen = true
	return v
}

func (s *screen) lines() []string {
	if s.help {
		return s.helpLines()
	}
	state := fmt.Sprintf("every %s", s.opt.Interval)
	if s.paused {
		state = "paused"
	}
	at := "asking the servers"
	if !s.at.IsZero() {
		at = s.at.Format(time.TimeOnly)
	}
	order := s.opt.Sort.String()
	if s.opt.Reverse {
		order += " inverted"
	}
	lines := []string{cut(fmt.Sprintf("lamina top  %s  by %s, %s  %s", at, order, state, summary(s.rows)), s.width)}
	trouble := ""
	if s.err != nil {
		trouble = cut(printable(strings.ReplaceAll(s.err.Error(), "\n", "; ")), s.width)
	}
	lines = append(lines, trouble)
	table := Table(s.rows, s.width)
	lines = append(lines, cut(table[0], s.width))
	body := table[1:]
	from := max(0, min(s.scroll, len(body)-s.visible()))
	for _, l := range body[from:min(len(body), from+s.visible())] {
		lines = append(lines, cut(l, s.width))
	}
	for s.height > 0 && len(lines) < s.height-1 {
		lines = append(lines, "")
	}
	return append(lines, cut(keysLine, s.width))
}

// helpLines fit on a screen of 16 lines; on a smaller one the last are missing.
func (s *screen) helpLines() []string {
	lines := []string{"? to go back", "", "sort by"}
	for i := 0; i < len(keyNames); i += 2 {
		lines = append(lines, fmt.Sprintf("  %c %-14s %c %s", keyLetters[i], keyNames[i], keyLetters[i+1], keyNames[i+1]))
	}
	lines = append(lines, "", "i invert the order   + - longer or shorter interval   space stop, and go on",
		"j k, arrows, page keys: scroll   q quit", "",
		"READ, WRITE: bytes through the server; what passes through to the kernel is not counted.",
		"AVOIDED: bytes of lower files that were not copied. TRANSIT: blocks that are to be completed.")
	for i := range lines {
		lines[i] = cut(lines[i], s.width)
	}
	if s.height > 0 && len(lines) > s.height {
		lines = lines[:s.height]
	}
	return lines
}

// summary says how much all mounts do.
func summary(rows []Row) string {
	var read, written, errors float64
	servers := map[int]bool{}
	for i := range rows {
		servers[rows[i].PID] = true
		read, written, errors = read+rows[i].Read, written+rows[i].Written, errors+rows[i].Errors
	}
	return fmt.Sprintf("%d mounts, %d servers  read %s/s  written %s/s  errors %s/s", len(rows), len(servers), size(read), size(written), count(errors))
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
