// Package doctor looks at a machine and says what Lamina will miss on it, what that costs and what helps.
//
// A check reads files and tries things in a scratch directory; it changes nothing that stays. Configuration files are
// taken as hostile: one that is huge, no file, of other types than expected or no TOML at all becomes a finding.
package doctor

import (
	"fmt"
)

// Level says how much a finding matters.
type Level uint8

const (
	// OK: as it should be.
	OK Level = iota
	// Note: worth knowing, such as an engine that does not use Lamina. Nothing is lost.
	Note
	// Costs: works, but slower or with less than it could.
	Costs
	// Broken: does not work.
	Broken
)

var levelNames = [...]string{"ok", "note", "costs", "broken"}

func (l Level) String() string {
	if int(l) < len(levelNames) {
		return levelNames[l]
	}
	return fmt.Sprintf("Level(%d)", uint8(l))
}

// MarshalText makes a level a word in JSON.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (l *Level) UnmarshalText(text []byte) error {
	for i, name := range levelNames {
		if name == string(text) {
			*l = Level(i)
			return nil
		}
	}
	return fmt.Errorf("level %q: not one of ok, note, costs, broken", text)
}

// Finding is what one check saw.
type Finding struct {
	Check string `json:"check"` // its name, for programs
	Level Level  `json:"level"`
	Found string `json:"found"`
	Cost  string `json:"cost,omitempty"` // what it means for Lamina's users
	Fix   string `json:"fix,omitempty"`  // what to do; empty if nothing has to be done
}

// Options say where to look. Empty paths are the engines' usual places.
type Options struct {
	// Root is put before every path of the machine, so that the configuration of an image or of a test can be looked at.
	// Empty: this machine.
	Root string
	// Only is the wing that is looked at, Files or Net. Empty: the files, and the container network where something of it is set
	// up.
	Only string
	// Dir is where upper layers are going to lie. Empty: no filesystem is checked.
	Dir string

	ContainerdConfig string // /etc/containerd/config.toml
	ContainerdSocket string // /run/containerd/containerd.sock, or what its configuration says
	StorageConf      string // the first of /etc/containers/storage.conf and /usr/share/containers/storage.conf
	DaemonJSON       string // /etc/docker/daemon.json
}

// Run makes all checks, in the order in which a mount would meet them.
func Run(opt Options) []Finding {
	m := &machine{root: opt.Root}
	var all []Finding
	if opt.Only != Net {
		all = append(all, filesChecks(m, opt)...)
	}
	if opt.Only != Files {
		all = append(all, networkChecks(m, opt, opt.Only == Net)...)
	}
	return all
}

func filesChecks(m *machine, opt Options) (all []Finding) {
	all = append(all, kernelChecks(m)...)
	all = append(all, rightsChecks(m)...)
	if opt.Dir != "" {
		all = append(all, filesystemChecks(m, opt.Dir)...)
	}
	all = append(all, containerdChecks(m, opt)...)
	all = append(all, podmanChecks(m, opt)...)
	return append(all, dockerChecks(m, opt)...)
}

// Worst is the highest level among findings.
func Worst(all []Finding) Level {
	worst := OK
	for _, f := range all {
		worst = max(worst, f.Level)
	}
	return worst
}
