package doctor

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What the server needs to show and store every owner, mode and device of a container.
var wantedCaps = []struct {
	bit  uint
	name string
}{
	{unix.CAP_CHOWN, "CAP_CHOWN"}, {unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE"}, {unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"},
	{unix.CAP_FOWNER, "CAP_FOWNER"}, {unix.CAP_FSETID, "CAP_FSETID"}, {unix.CAP_MKNOD, "CAP_MKNOD"}, {unix.CAP_SETFCAP, "CAP_SETFCAP"},
}

func rightsChecks(m *machine) []Finding {
	return append(privilegeChecks(m), descriptorCheck(m))
}

func privilegeChecks(m *machine) []Finding {
	f := Finding{Check: "rights", Found: "CAP_SYS_ADMIN on this machine"}
	if !privileged(m) {
		f.Level, f.Found = Costs, "no CAP_SYS_ADMIN in the initial user namespace"
		f.Cost = "no passthrough, no read-only clones of lower layers, attributes in user.overlay.*; containerd needs root"
		f.Fix = "run as root, or go without"
		return append([]Finding{f}, unprivilegedChecks(m)...)
	}
	caps := capabilities(m)
	var missing []string
	for _, c := range wantedCaps {
		if caps&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		f.Level, f.Found = Broken, "missing: "+strings.Join(missing, ", ")
		f.Cost = "files of other users, devices and set-id bits cannot be shown or stored as containers need them"
		f.Fix = "give the server these capabilities (CapabilityBoundingSet= in its unit)"
	}
	return []Finding{f}
}

// unprivilegedChecks: without privileges fusermount3 mounts.
func unprivilegedChecks(m *machine) []Finding {
	f := Finding{Check: "fusermount3", Found: "fusermount3 is there"}
	if m.program("fusermount3") == "" {
		f.Level, f.Found, f.Cost, f.Fix = Broken, "fusermount3 is missing", "users without privileges cannot mount (the root of a user namespace can)", "apt-get install fuse3"
	}
	o := Finding{Check: "fuse.conf", Found: "other users may be let in (user_allow_other)"}
	conf, _ := m.read("/etc/fuse.conf") // none is one without the line
	allowed := false
	for line := range strings.Lines(string(conf)) {
		allowed = allowed || strings.TrimSpace(line) == "user_allow_other"
	}
	if !allowed {
		o.Level, o.Found = Note, "/etc/fuse.conf does not say user_allow_other"
		o.Cost, o.Fix = "the option allow_other is refused to users without privileges", "echo user_allow_other >> /etc/fuse.conf"
	}
	return []Finding{f, o}
}

// descriptorCheck: every open file of a mount is a descriptor of its server or two.
func descriptorCheck(m *machine) Finding {
	const wanted, little = 1 << 20, 1 << 16
	f := Finding{Check: "descriptors"}
	const cost = "every open file of a container is a descriptor of the server or two: with more the container gets EMFILE"
	limit := hardDescriptorLimit(m)
	open, err := strconv.ParseUint(m.word("/proc/sys/fs/nr_open"), 10, 64)
	if err != nil {
		open = wanted
	}
	canRaise := capabilities(m)&(1<<unix.CAP_SYS_RESOURCE) != 0
	f.Found = fmt.Sprintf("RLIMIT_NOFILE allows %d", limit)
	if canRaise {
		f.Found += "; servers raise it"
	}
	switch {
	case canRaise && open < wanted:
		f.Level, f.Found, f.Cost, f.Fix = Costs, fmt.Sprintf("fs.nr_open is %d", open), cost, fmt.Sprintf("sysctl fs.nr_open=%d", wanted)
	case !canRaise && limit < little:
		f.Level, f.Cost, f.Fix = Costs, cost, fmt.Sprintf("ulimit -n %d, LimitNOFILE=%d in the unit, or limits.conf(5)", wanted, wanted)
	}
	return f
}

func hardDescriptorLimit(m *machine) uint64 {
	b, _ := m.read("/proc/self/limits")
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Max open files"); ok {
			if fields := strings.Fields(rest); len(fields) > 1 {
				n, _ := strconv.ParseUint(fields[1], 10, 64)
				return n
			}
		}
	}
	return 0
}
