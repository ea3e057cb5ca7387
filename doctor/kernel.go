package doctor

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Kernel versions that matter, and why.
var (
	needed      = kernel{5, 11} // close_range(2) with CLOEXEC
	passthrough = kernel{6, 9}  // FUSE_PASSTHROUGH
	uringSince  = kernel{6, 14} // FUSE over io_uring
)

type kernel struct{ major, minor int }

func (k kernel) before(o kernel) bool {
	return k.major < o.major || k.major == o.major && k.minor < o.minor
}

func (k kernel) String() string { return fmt.Sprintf("%d.%d", k.major, k.minor) }

func kernelChecks(m *machine) []Finding {
	release := m.word("/proc/sys/kernel/osrelease")
	var k kernel
	if n, _ := fmt.Sscanf(release, "%d.%d", &k.major, &k.minor); n != 2 {
		return []Finding{{"kernel", Broken, fmt.Sprintf("its release is %q", release), "nothing can be said of it", "mount /proc"}}
	}
	all := []Finding{kernelVersion(k, release), fuseDevice(m), passthroughCheck(m, k)}
	all = append(all, uringCheck(m, k), requestSize(m))
	return append(all, overlayChecks(m)...)
}

func kernelVersion(k kernel, release string) Finding {
	f := Finding{Check: "kernel", Found: "Linux " + release}
	switch {
	case k.before(needed):
		f.Level, f.Cost, f.Fix = Broken, "Lamina does not mount on it", "use Linux "+needed.String()+" or later; 6.14 or later for all it can do"
	case k.before(uringSince):
		f.Fix = "use Linux " + uringSince.String() + " or later for all that Lamina can do"
	}
	return f
}

// fuseDevice looks for the character device 10:229.
func fuseDevice(m *machine) Finding {
	const path = "/dev/fuse"
	f := Finding{Check: "fuse", Found: path + " is there"}
	var st unix.Stat_t
	err := unix.Stat(m.path(path), &st)
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(10, 229)) {
		err = fmt.Errorf("not the FUSE device")
	}
	if err == nil {
		err = unix.Access(m.path(path), unix.R_OK|unix.W_OK)
	}
	if err != nil {
		f.Level, f.Found, f.Cost = Broken, fmt.Sprintf("%s: %v", path, err), "nothing can be mounted"
		f.Fix = "modprobe fuse; echo fuse > /etc/modules-load.d/fuse.conf; in a container: --device /dev/fuse"
	}
	return f
}

func passthroughCheck(m *machine, k kernel) Finding {
	f := Finding{Check: "passthrough", Found: "this kernel has FUSE passthrough"}
	const cost = "programs and complete files are read and written through the server instead of directly, and containers do not share their pages"
	switch {
	case k.before(passthrough):
		f.Level, f.Found, f.Cost, f.Fix = Costs, "Linux "+k.String()+" has no FUSE passthrough", cost, "use Linux "+passthrough.String()+" or later"
	case kconfig(m, "CONFIG_FUSE_PASSTHROUGH") == "n":
		f.Level, f.Found, f.Cost, f.Fix = Costs, "this kernel was built without CONFIG_FUSE_PASSTHROUGH", cost, "use a kernel that has it"
	}
	return f
}

// kconfig is the value of an option in the kernel's published configuration: "n" if it is not set, "" if there is none to
// read.
func kconfig(m *machine, option string) string {
	b, err := m.read("/boot/config-" + m.word("/proc/sys/kernel/osrelease"))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), option+"="); ok {
			return v
		}
	}
	return "n"
}

// uringParameter switches FUSE over io_uring on (fs/fuse/dev_uring.c).
const uringParameter = "/sys/module/fuse/parameters/enable_uring"

func uringCheck(m *machine, k kernel) Finding {
	f := Finding{Check: "io_uring", Found: "FUSE over io_uring is on"}
	const cost = "requests come over /dev/fuse: a round trip to the server takes about twice as long"
	const boot = "echo Y > " + uringParameter + "; to keep it: echo options fuse enable_uring=1 > /etc/modprobe.d/lamina.conf, or fuse.enable_uring=1 on the kernel's command line"
	disabled := m.word("/proc/sys/kernel/io_uring_disabled")
	value := m.word(uringParameter)
	switch {
	case value == "" && k.before(uringSince):
		f.Level, f.Found, f.Cost, f.Fix = Costs, "Linux "+k.String()+" does not carry FUSE over io_uring", cost, "use Linux "+uringSince.String()+" or later"
	case value == "" && !m.exists("/sys/module/fuse"):
		f.Level, f.Found, f.Fix = Note, "the module fuse is not loaded: whether it can use io_uring is not known", "modprobe fuse, and run lamina doctor again"
	case value == "":
		f.Level, f.Found, f.Cost, f.Fix = Costs, "this kernel was built without CONFIG_FUSE_IO_URING", cost, "use a kernel that has it"
	case disabled == "2":
		f.Level, f.Found, f.Cost, f.Fix = Costs, "kernel.io_uring_disabled is 2: nobody may use io_uring", cost, "sysctl kernel.io_uring_disabled=1 lets root use it"
	case value != "Y" && privileged(m):
		f.Level, f.Found, f.Fix = Note, "FUSE over io_uring is off; Lamina switches it on at its first mount", boot
	case value != "Y":
		f.Level, f.Found, f.Cost, f.Fix = Costs, "FUSE over io_uring is off, and may not be switched on from here", cost, "as root on the host: "+boot
	case disabled == "1" && !privileged(m):
		f.Level, f.Found, f.Cost, f.Fix = Costs, "kernel.io_uring_disabled is 1: only root and one group may use io_uring", cost, "sysctl kernel.io_uring_disabled=0, or add the user to the group of kernel.io_uring_group"
	}
	return f
}

// requestSize: max_pages_limit (Linux 6.13) caps what one request carries, in pages.
func requestSize(m *machine) Finding {
	const parameter, usual = "/proc/sys/fs/fuse/max_pages_limit", 256
	f := Finding{Check: "request-size", Found: "requests of up to 1 MiB"}
	value := m.word(parameter)
	n, err := strconv.Atoi(value)
	if value == "" || err == nil && n >= usual {
		return f
	}
	f.Level, f.Found = Costs, fmt.Sprintf("fs.fuse.max_pages_limit is %s pages", value)
	f.Cost, f.Fix = "large reads and writes take more requests", fmt.Sprintf("sysctl fs.fuse.max_pages_limit=%d", usual)
	return f
}

// overlayChecks: engines unpack layers through kernel overlayfs, and flattened layers go back to it.
func overlayChecks(m *machine) []Finding {
	f := Finding{Check: "overlayfs", Found: "kernel overlayfs is there, for unpacking layers"}
	b, err := m.read("/proc/filesystems")
	if err != nil || !strings.Contains(string(b), "\toverlay\n") {
		f.Level, f.Found = Note, "kernel overlayfs is not loaded"
		f.Cost, f.Fix = "containerd mounts it to unpack images", "modprobe overlay"
		return []Finding{f}
	}
	x := Finding{Check: "xino", Found: "kernel overlayfs keeps inode numbers apart (xino)"}
	if m.word("/sys/module/overlay/parameters/xino_auto") == "N" {
		x.Level, x.Found = Note, "kernel overlayfs runs with xino_auto=N"
		x.Cost = "Lamina's inode numbers are stable all the same; those of layers taken back to kernel overlayfs (lamina flatten) change at copy-up if they lie on several filesystems"
		x.Fix = "mount -o xino=auto, or echo Y > /sys/module/overlay/parameters/xino_auto"
	}
	return []Finding{f, x}
}

// initialUserNS is the inode number of the first user namespace (PROC_USER_INIT_INO).
const initialUserNS = "user:[4026531837]"

// privileged tells whether this process has CAP_SYS_ADMIN in the initial user namespace.
func privileged(m *machine) bool {
	if ns, err := os.Readlink("/proc/self/ns/user"); m.root == "" && (err != nil || ns != initialUserNS) {
		return false
	}
	return capabilities(m)&(1<<unix.CAP_SYS_ADMIN) != 0
}

// capabilities are the effective ones of this process, a bit each.
func capabilities(m *machine) uint64 {
	b, err := m.read("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, _ := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return caps
		}
	}
	return 0
}
