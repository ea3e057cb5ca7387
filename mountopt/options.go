// Package mountopt reads Lamina's mount options: those of kernel overlayfs and of fuse-overlayfs with their meaning,
// the ones that mount(8) gives to every filesystem, and Lamina's own.
//
// The package is pure: it reads strings and returns a struct. One table (see [Table]) drives parsing, the help text and
// the manual page, so that an option is described in the place where it is implemented. An option that Lamina cannot
// honour is refused by name with the remedy, never ignored.
package mountopt

import (
	"fmt"
	"strconv"
	"strings"
)

// The choices below are strings, written as the user writes them. The empty string never occurs in parsed options.

// Tri is a choice that can be left to Lamina.
type Tri string

const (
	Auto Tri = "auto"
	On   Tri = "on"
	Off  Tri = "off"
)

// Transport says how requests reach the server.
type Transport string

const (
	TransportAuto  Transport = "auto"
	TransportUring Transport = "uring" // over io_uring, or not at all
	TransportDev   Transport = "dev"   // reading /dev/fuse
)

// RedirectDir is overlayfs's redirect_dir.
type RedirectDir string

const (
	RedirectOn       RedirectDir = "on"       // create and follow redirects
	RedirectFollow   RedirectDir = "follow"   // follow existing ones; also what "off" means
	RedirectNoFollow RedirectDir = "nofollow" // neither
)

// Format of new sketches; see package block.
type Format string

const (
	Sparse     Format = "sparse"
	BCoW       Format = "bcow"
	BCoWSingle Format = "bcow-single"
)

// CaW says when the rest of a partly written block is copied; see package block.
type CaW string

const (
	Eager CaW = "eager"
	Lazy  CaW = "lazy"
	Sync  CaW = "sync"
)

// Fill says whether untouched blocks are copied in the background; see package block.
type Fill string

const (
	FillNone Fill = "none"
	FillIdle Fill = "idle"
)

// CopyUp says how a file's data gets into the upper layer; see package union.
type CopyUp string

const (
	CopyUpAuto  CopyUp = "auto"
	CopyUpBlock CopyUp = "block"
	CopyUpClone CopyUp = "clone"
	CopyUpFull  CopyUp = "full"
)

// Whiteouts says how layers mark names that are gone.
type Whiteouts string

const (
	WhiteoutsAuto    Whiteouts = "auto"    // files in a store that says it has a mount program, else devices
	WhiteoutsDevices Whiteouts = "devices" // as kernel overlayfs
	WhiteoutsFiles   Whiteouts = "files"   // by .wh. files as well
)

// Perms says where the upper layer keeps owners and modes (fuse-overlayfs's xattr_permissions).
type Perms uint8

const (
	PermsInode      Perms = iota // in the inodes
	PermsPrivileged              // in security.fuseoverlayfs.override_stat
	PermsContainers              // in user.containers.override_stat
)

// IDRange maps Len ids: Disk+i in the layers is shown as Shown+i.
type IDRange struct {
	Disk, Shown, Len uint32
}

// Options is what a list of mount options asks for.
type Options struct {
	// Lower are the lower directories, topmost first; Data the data-only ones below them. Absolute paths.
	Lower, Data []string
	// Upper and Work are empty for a read-only mount. Absolute paths.
	Upper, Work string

	Redirect  RedirectDir
	Index     bool // hard links between lower files survive copy-up
	Volatile  bool // never sync
	UserXattr bool // overlay's attributes are user.overlay.*
	Perms     Perms

	UIDs, GIDs           []IDRange // nil: ids are shown as they are
	SquashUID, SquashGID *uint32   // every object is shown as owned by them
	NoACL                bool

	Format    Format
	BlockSize int // bytes; 0: the format's own
	CaW       CaW
	Fill      Fill
	CopyUp    CopyUp
	Whiteouts Whiteouts

	Transport     Transport
	Survive       bool // the mount outlives its server: a supervisor starts another
	Passthrough   Tri
	MaxStackDepth int // 1 or 2

	ReadOnly   bool
	MountFlags uintptr // MS_* for mount(2), MS_RDONLY included
	// Propagation is MS_PRIVATE, MS_SLAVE, MS_SHARED or MS_UNBINDABLE; 0: as the mount's surroundings have it.
	Propagation uintptr
	AllowOther  bool // asked for by name
	// Context are SELinux options for mount(2), such as `context="a:b:c,d"`, in the kernel's syntax.
	Context []string
	FSName  string // source shown in /proc/mounts; empty: "lamina"
	Debug   bool
}

func defaults() *Options {
	return &Options{Redirect: RedirectOn, Index: true, Format: Sparse, CaW: Eager, Fill: FillNone, CopyUp: CopyUpAuto, Whiteouts: WhiteoutsAuto,
		Transport: TransportAuto, Passthrough: Auto, MaxStackDepth: 1}
}

// Error is an option that was not accepted.
type Error struct {
	Option string // its name
	Reason string // what is wrong, and the remedy
}

func (e *Error) Error() string { return "option " + printable(e.Option) + ": " + e.Reason }

// printable keeps a message on one line, of bounded length, whatever was typed.
func printable(name string) string {
	const enough = 60
	if len(name) > enough {
		name = name[:enough] + "..."
	}
	if q := strconv.Quote(name); name == "" || q != `"`+name+`"` {
		return q
	}
	return name
}

// Env is what the meaning of options depends on.
type Env struct {
	// Dir is the working directory against which relative paths are resolved: an absolute path.
	Dir string
}

// Parse reads option strings, as given to one or several -o: comma-separated, where a backslash takes the special
// meaning from the character behind it. A later option overrides an earlier one, except those that add to a list.
func Parse(args []string, env Env) (*Options, error) {
	o := defaults()
	p := &parser{o: o, env: env}
	for _, arg := range args {
		for _, item := range splitOptions(arg) {
			if err := p.option(item); err != nil {
				return nil, err
			}
		}
	}
	if err := p.conflicts(); err != nil {
		return nil, err
	}
	return o, nil
}

// Complete reports what a mount still misses.
func (o *Options) Complete() error {
	switch {
	case len(o.Lower) == 0:
		return &Error{"lowerdir", "missing: name the lower directories, topmost first, as -o lowerdir=DIR[:DIR...]"}
	case o.Upper != "" && o.Work == "":
		return &Error{"workdir", "missing: upperdir needs an empty directory on the same filesystem as -o workdir=DIR"}
	case o.Work != "" && o.Upper == "":
		return &Error{"workdir", "useless without upperdir: name one, or leave workdir out for a read-only mount"}
	}
	return nil
}

type parser struct {
	o        *Options
	env      Env
	metacopy string
	copyUp   CopyUp // as asked for
}

// conflicts are found when all options are read, because their order means nothing.
func (p *parser) conflicts() error {
	if p.o.Survive && p.o.Transport == TransportUring {
		return &Error{"survive", "on, and transport=uring: the queues of io_uring end with the process that made them: use transport=dev or auto with survive=on, or survive=off"}
	}
	if p.o.Survive && !p.o.Index {
		return &Error{"survive", "on, and index=off: nothing on disk says which names of a lower file were one: leave index=off out, or use survive=off"}
	}
	if p.o.Survive && p.o.UserXattr {
		return &Error{"survive", "on, and userxattr: symbolic links cannot say there what they were copied from: leave userxattr out, or use survive=off"}
	}
	if p.o.Survive {
		p.o.Transport = TransportDev
	}
	if p.metacopy != "off" {
		return nil
	}
	switch p.copyUp {
	case "":
		p.o.CopyUp = CopyUpFull
	case CopyUpFull, CopyUpClone:
	default:
		return &Error{"metacopy", "off asks for whole files in the upper layer, which copyup=" + string(p.copyUp) + " contradicts: leave one out"}
	}
	return nil
}

// splitOptions cuts at commas that are neither escaped nor within the double quotes of an SELinux context. Escapes
// stay for the value's own reader. Empty pieces are left out.
func splitOptions(s string) []string {
	var items []string
	start, quoted := 0, false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && !quoted:
			i++
		case s[i] == '"' && (quoted || strings.HasSuffix(s[start:i], "context=")):
			quoted = !quoted
		case s[i] == ',' && !quoted:
			items = append(items, s[start:i])
			start = i + 1
		}
	}
	items = append(items, s[start:])
	kept := items[:0]
	for _, item := range items {
		if item != "" {
			kept = append(kept, item)
		}
	}
	return kept
}

// unescape takes the backslashes away.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Escape protects a path in an option's value, or in a list of paths.
func Escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(path)
}

// splitList cuts at colons that are not escaped, and unescapes the pieces.
func splitList(s string) []string {
	var items []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case ':':
			items = append(items, unescape(s[start:i]))
			start = i + 1
		}
	}
	return append(items, unescape(s[start:]))
}

func (p *parser) option(item string) error {
	name, value, hasValue := strings.Cut(item, "=")
	def := find(name)
	switch {
	case def == nil:
		return &Error{name, unknown(name)}
	case hasValue && def.Value == "":
		return &Error{name, fmt.Sprintf("takes no value, but was given %q", value)}
	case !hasValue && def.needsValue():
		return &Error{name, "needs a value: " + name + "=" + def.Value}
	}
	if reason := def.set(p, value); reason != "" {
		return &Error{name, reason}
	}
	return nil
}

// unknown says so, with the nearest name that is known.
func unknown(name string) string {
	best, bestDist := "", 1+min(len(name)/2, 3)
	for i := range table {
		if d := distance(name, table[i].Name); d < bestDist {
			best, bestDist = table[i].Name, d
		}
	}
	if best == "" {
		return "unknown; see lamina-mount(8) for the list"
	}
	return "unknown; did you mean " + best + "?"
}

// distance is the number of single-byte insertions, deletions and replacements between a and b.
func distance(a, b string) int {
	const tooLong = 64
	if len(a) > tooLong || len(b) > tooLong {
		return tooLong
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j]+1, row[j+1]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
