package bench

import (
	"fmt"
	"slices"
	"strings"

	"lamina/bench/report"
	"lamina/bench/rival"
)

// kind is how a contender makes a tree of a layer.
type kind int

const (
	plainCopy kind = iota // a copy of the layer's files
	union                 // a union filesystem, with the layer as its lower
	snapshot              // a btrfs snapshot of the layer
	floorFS               // a FUSE server that shows a copy of the layer's files as they are
	nullFS                // a FUSE server that only answers
)

// Contender is one system with its options.
type Contender struct {
	report.Contender

	kind   kind
	system rival.System // of a union
	ground groundName   // what it stands on
	tools  []Tool

	together bool // one process serves all mounts
	special  bool // only for the scenarios that ask for it

	transport string // what carries the requests of a Lamina that is present: "uring" or "dev"
}

// IsLamina tells whether it is a variant of this program.
func (c *Contender) IsLamina() bool { return c.Kind == report.Lamina }

// floorOf names the floor of a variant of Lamina: the same settings without a union.
func (c *Contender) floorOf() string {
	switch {
	case slices.Contains(c.Options, "transport=dev"):
		return "floor-dev"
	case slices.Contains(c.Options, "passthrough=on"):
		return "floor-passthrough"
	}
	return "floor"
}

// Catalogue is every contender with a name of its own.
func Catalogue() []*Contender {
	overlay := func(name, describes string, ground groundName, kind report.Kind, options ...string) *Contender {
		return &Contender{
			Contender: report.Contender{Name: name, Kind: kind, Describes: describes, Options: options},
			kind:      union, system: rival.Overlay, ground: ground,
		}
	}
	lamina := func(name, describes string, options ...string) *Contender {
		return &Contender{
			Contender: report.Contender{Name: name, Kind: report.Lamina, Describes: describes, Options: options},
			kind:      union, system: rival.Lamina, ground: mainGround,
		}
	}
	floor := func(name string, kind kind, describes string, options ...string) *Contender {
		return &Contender{
			Contender: report.Contender{Name: name, Kind: report.Floor, Options: options, Describes: describes},
			kind:      kind, ground: mainGround, special: true,
		}
	}
	const loopback = "a FUSE server of the same transport and settings that shows ordinary files as they are: no union is faster in user space"
	together := lamina("lamina-one-process", "Lamina, all mounts of the host served by one process")
	together.together, together.special = true, true
	return []*Contender{
		{
			Contender: report.Contender{Name: "plain", Kind: report.Native, Describes: "ordinary files on the filesystem that holds the directory, no union"},
			kind:      plainCopy, ground: mainGround,
		},
		overlay("overlayfs", "kernel overlayfs", mainGround, report.Overlay),
		overlay("overlayfs-volatile", "kernel overlayfs that never syncs, copy-ups included", mainGround, report.Rival, "volatile"),
		overlay("overlayfs-metacopy", "kernel overlayfs that copies data up at the first open for writing, not when only metadata change", mainGround, report.Rival, "metacopy=on"),
		overlay("overlayfs-xfs", "kernel overlayfs, lower and upper on XFS with reflinks (a loop device, so that blocks are cached twice): copies up by cloning", xfsGround, report.Rival),
		{
			Contender: report.Contender{Name: "fuse-overlayfs", Kind: report.Rival, Describes: "containers/fuse-overlayfs, a union in user space"},
			kind:      union, system: rival.FuseOverlay, ground: mainGround, tools: []Tool{{"fuse-overlayfs", "fuse-overlayfs"}},
		},
		{
			Contender: report.Contender{Name: "btrfs-snapshot", Kind: report.Rival, Describes: "a writable btrfs snapshot of the layer (a loop device, so that blocks are cached twice): no union at all"},
			kind:      snapshot, ground: btrfsGround,
		},
		lamina("lamina", "Lamina as it mounts by default"),
		lamina("lamina-uring", "Lamina, requests carried by io_uring", "transport=uring"),
		lamina("lamina-dev", "Lamina, requests carried by /dev/fuse", "transport=dev"),
		lamina("lamina-bcow", "Lamina, BCoW files with a two-level table", "format=bcow"),
		lamina("lamina-bcow-single", "Lamina, BCoW files with a single-level table", "format=bcow-single"),
		lamina("lamina-lazy", "Lamina, the rest of a block copied only when somebody reads it", "caw=lazy"),
		lamina("lamina-sync", "Lamina, the rest of a block copied within the write: classic copy-on-write of blocks", "caw=sync"),
		lamina("lamina-passthrough", "Lamina, lower files read without asking the server", "passthrough=on"),
		lamina("lamina-nopassthrough", "Lamina, every read and write asks the server", "passthrough=off"),
		together,
		floor("floor", floorFS, loopback),
		floor("floor-dev", floorFS, loopback+", requests carried by /dev/fuse", "transport=dev"),
		floor("floor-passthrough", floorFS, loopback+"; every file read and written without asking the server", "passthrough=on"),
		floor("floor-null", nullFS, "a FUSE server that answers what Lamina answers and has nothing behind it: the least that the transport costs"),
	}
}

// find returns the contender of a name. Besides the names of the catalogue, "lamina:OPTION+OPTION..." and
// "overlayfs:OPTION+OPTION..." are any other variants.
func find(name string) (*Contender, error) {
	all := Catalogue()
	if i := slices.IndexFunc(all, func(c *Contender) bool { return c.Name == name }); i >= 0 {
		return all[i], nil
	}
	base, options, has := strings.Cut(name, ":")
	if has && options != "" && (base == "lamina" || base == "overlayfs") {
		c, err := find(base)
		if err != nil {
			return nil, err
		}
		c.Name, c.Options = name, strings.Split(options, "+")
		c.Describes += ", " + strings.Join(c.Options, ", ")
		if c.Kind == report.Overlay {
			c.Kind = report.Rival // the reference is the one without options
		}
		return c, nil
	}
	return nil, fmt.Errorf("contender %s: unknown: use %s, lamina:OPTION+OPTION or overlayfs:OPTION+OPTION", name, strings.Join(ContenderNames(), ", "))
}

// ContenderNames are the names of the catalogue.
func ContenderNames() []string {
	var names []string
	for _, c := range Catalogue() {
		names = append(names, c.Name)
	}
	return names
}
