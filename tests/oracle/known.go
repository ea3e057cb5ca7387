package oracle

import (
	"strings"

	"golang.org/x/sys/unix"
)

// A known difference between kernel overlayfs and a standard filesystem (Documentation/filesystems/overlayfs.rst,
// "Non-standard behavior"), or a documented choice of Lamina's. This table is the only place that forgives one.
type difference struct {
	what   string
	reason string
	// forgives says whether this difference explains the two results. Nil: operations that would show it are not
	// generated, because their effects would differ for the rest of the run.
	forgives func(r *run, o op, overlay, lamina string) bool
}

var known = []difference{
	{
		what: "mmap through a descriptor that was opened read-only before copy-up",
		reason: "overlayfs keeps mapping the lower file: the mapping shows old bytes for ever. Lamina, being standard, " +
			"shows what was written",
		forgives: func(r *run, o op, _, _ string) bool {
			h := r.lamina.held[o.slot]
			return o.kind == "mread" && h.flags&unix.O_ACCMODE == unix.O_RDONLY
		},
	},
	{
		what: "passthrough=on: reads through a descriptor opened read-only before the first write",
		reason: "the option's documented price: such readers keep the old bytes and the old size, as a mapping on " +
			"overlayfs does. passthrough=auto, the default, has no such readers but of executables",
		forgives: func(r *run, o op, _, _ string) bool {
			h := r.lamina.held[o.slot]
			if r.combination.Passthrough != "on" || h.fd < 0 || h.flags&unix.O_ACCMODE != unix.O_RDONLY {
				return false
			}
			switch o.kind {
			case "pread", "read", "mread", "fseek", "fstat", "copyrange", slotLine:
				return true
			}
			return false
		},
	},
	{
		what:   "fallocate with COLLAPSE_RANGE, INSERT_RANGE and UNSHARE_RANGE",
		reason: "the kernel's FUSE client refuses them with EOPNOTSUPP before any server is asked",
	},
	{
		what:   "absolute and .. targets of symbolic links that are then followed, O_DIRECT without alignment",
		reason: "would leave the mount; depends on the disk below",
	},
}

// slotLine is the kind of operation that comparing a held descriptor in a snapshot counts as.
const slotLine = "slot"

// forgiven returns the entry that explains a difference.
func (r *run) forgiven(o op, overlay, lamina string) *difference {
	for i := range known {
		if k := &known[i]; k.forgives != nil && k.forgives(r, o, overlay, lamina) {
			return k
		}
	}
	return nil
}

// diffSnapshots lists what two snapshots disagree on.
func (r *run) diffSnapshots(overlay, lamina map[string]string) []string {
	var diffs []string
	for path, want := range overlay {
		got, ok := lamina[path]
		switch {
		case !ok:
			diffs = append(diffs, "only on overlayfs: "+path+": "+want)
		case got != want:
			if slot, is := strings.CutPrefix(path, "slot "); is {
				if r.forgiven(op{kind: slotLine, slot: int(slot[0] - '0')}, want, got) != nil {
					continue
				}
			}
			diffs = append(diffs, path+"\n    overlayfs: "+want+"\n    subject:   "+got)
		}
	}
	for path, got := range lamina {
		if _, ok := overlay[path]; !ok {
			diffs = append(diffs, "not on overlayfs: "+path+": "+got)
		}
	}
	return diffs
}
