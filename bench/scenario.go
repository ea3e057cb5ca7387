package bench

// Mode says how much a run may take: disk, repetitions and time.
type Mode string

const (
	Quick  Mode = "quick"  // 3 minutes for everything: a look
	Normal Mode = "normal" // 10 minutes
	Full   Mode = "full"   // 36 minutes: sizes as in the papers
)

// Scenario is one thing that the bench shows. Its Run asks the [Lab] for layers and for contenders mounted over them, and
// hands in samples; everything else (turns, time, space, failures, cleaning up) is the Lab's business.
type Scenario struct {
	Name      string // as on the command line
	Title     string // in a few words, for tables and charts
	Source    string // the paper's table or figure that asks the same; empty: none
	Describes string // what is done, and what is kept fair; a newcomer reads this

	// Contenders are measured unless the user names others, in the order in which they are shown. Those that are absent
	// are left out.
	Contenders []string
	// Quick are Contenders of a quick run; nil: all of them. More are measured in a full run too.
	Quick, More []string
	// Tools are programs that the scenario runs, beside those of its contenders.
	Tools []Tool
	// Space is how many bytes the scenario occupies on the bench's main filesystem at most, layers included.
	Space func(Mode) int64
	// Weight is the scenario's share of the run's time, in arbitrary units: about the seconds of one round of a full run, its
	// layers included, on two CPUs of 2026.
	Weight float64

	Run func(*Lab) error
}

// Tool is a program that must be in PATH, and what installs it.
type Tool struct {
	Program string
	Package string // Debian's
}

// Scenarios are all there are, in the order in which they run.
func Scenarios() []Scenario {
	return []Scenario{
		firstWrite, writeMany, readAfterWrite, bcow, fio, metadata, build, database, space, density, transportTable,
	}
}

// Pick chooses a value by the mode of the run.
func Pick[T any](m Mode, quick, normal, full T) T {
	switch m {
	case Quick:
		return quick
	case Full:
		return full
	}
	return normal
}
