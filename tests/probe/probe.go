// Package probe tells tests what the running kernel can do. A test that needs a feature calls [Feature.Need]: on a kernel
// older than the feature's version the test is skipped, on a newer one that lacks it the test fails, so that a skip can
// never hide a bug. What a kernel of any version may do without is skipped where the kernel itself says so ([ErrAbsent]).
package probe

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Feature is something of the kernel's.
type Feature struct {
	Name    string
	Version [2]int                 // the first kernel that has it
	Probe   func(dir string) error // nil if the kernel has it; dir is a scratch directory
}

// ErrAbsent is what a probe finds where the kernel says that it was built without a feature, or runs on a machine without
// what the feature is about.
var ErrAbsent = errors.New("the kernel has none")

// Kernel returns the running kernel's major and minor version.
func Kernel() ([2]int, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return [2]int{}, err
	}
	release := unix.ByteSliceToString(u.Release[:])
	var v [2]int
	if _, err := fmt.Sscanf(release, "%d.%d", &v[0], &v[1]); err != nil {
		return v, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return v, nil
}

// Need skips the test on a kernel older than f, or whose own word is that it has no f, and fails it on any other that
// cannot do f.
func (f Feature) Need(t testing.TB) {
	t.Helper()
	if missing := f.Missing(t); missing != nil {
		t.Skip(missing)
	}
}

// Missing says why a test can do without f: nil where the kernel has it. It fails the test where [Feature.Need] would.
func (f Feature) Missing(t testing.TB) error {
	t.Helper()
	err := f.Probe(t.TempDir())
	if err == nil {
		return nil
	}
	have, verr := Kernel()
	if verr != nil {
		t.Fatal(verr)
	}
	if errors.Is(err, ErrAbsent) {
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	if have[0] < f.Version[0] || have[0] == f.Version[0] && have[1] < f.Version[1] {
		return fmt.Errorf("%s needs Linux %d.%d (this is %d.%d): %w", f.Name, f.Version[0], f.Version[1], have[0], have[1], err)
	}
	t.Fatalf("%s has been in Linux since %d.%d, this is %d.%d, and yet: %v", f.Name, f.Version[0], f.Version[1], have[0], have[1], err)
	return nil
}

// Filesystem is the kernel's support for a filesystem type.
func Filesystem(name string, since [2]int) Feature {
	return Feature{Name: "filesystem " + name, Version: since, Probe: func(string) error {
		is, err := listed(name)
		if err == nil && !is {
			err = fmt.Errorf("/proc/filesystems does not list %s: load its module (modprobe %s)", name, name)
		}
		return err
	}}
}

// listed says whether the kernel lists a filesystem type, which it does as long as the type's module is loaded.
func listed(name string) (bool, error) {
	b, err := os.ReadFile("/proc/filesystems")
	for line := range strings.SplitSeq(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == name {
			return true, err
		}
	}
	return false, err
}

// Features that tests ask for.
var (
	Overlayfs = Filesystem("overlay", [2]int{3, 18})
	XFS       = Filesystem("xfs", [2]int{2, 6})

	// OverlayTmpfile: O_TMPFILE on kernel overlayfs, so that it can be compared.
	OverlayTmpfile = Feature{Name: "O_TMPFILE on overlayfs", Version: [2]int{6, 1}, Probe: onOverlay(func(merged string) error {
		fd, err := unix.Open(merged, unix.O_TMPFILE|unix.O_RDWR, 0o600)
		if err == nil {
			unix.Close(fd)
		}
		return err
	})}
	// XattrEscape: trusted.overlay.* set through an overlay mount is stored under an escaped name instead of refused.
	XattrEscape = Feature{Name: "escaped overlay xattrs", Version: [2]int{6, 7}, Probe: onOverlay(func(merged string) error {
		return unix.Setxattr(merged, "trusted.overlay.probe", []byte("y"), 0)
	})}
	// FuseUring: FUSE requests over io_uring, whether it is switched on or not.
	FuseUring = Feature{Name: "FUSE over io_uring", Version: [2]int{6, 14}, Probe: func(string) error {
		fuse, err := os.Open("/dev/fuse") // the first open loads the module
		if err == nil {
			_, err = os.Stat("/sys/module/fuse/parameters/enable_uring")
			fuse.Close()
		}
		return err
	}}
	// Passthrough: FUSE hands reads and writes to a backing file.
	Passthrough = Feature{Name: "FUSE passthrough", Version: [2]int{6, 9}, Probe: func(string) error {
		v, err := Kernel()
		if err == nil && (v[0] < 6 || v[0] == 6 && v[1] < 9) {
			err = fmt.Errorf("this is Linux %d.%d", v[0], v[1])
		}
		return err
	}}
	// FuseTrace: the kernel tells of every request that it sends to a FUSE server. Tracing can be left out of a kernel
	// (CONFIG_TRACING), and cannot be a module.
	FuseTrace = Feature{Name: "tracing of FUSE requests", Version: [2]int{6, 10}, Probe: func(dir string) error {
		if is, err := listed("tracefs"); err != nil || !is {
			return errors.Join(err, fmt.Errorf("tracefs: %w", ErrAbsent))
		}
		if err := unix.Mount("probe", dir, "tracefs", 0, ""); err != nil {
			return fmt.Errorf("mounting tracefs: %w", err)
		}
		_, err := os.Stat(filepath.Join(dir, "events/fuse/fuse_request_send"))
		return errors.Join(err, unix.Unmount(dir, 0))
	}}
	// CPUHotplug: some CPU can be switched off. Kernels can be built without (CONFIG_HOTPLUG_CPU), and the only CPU of a
	// machine stays.
	CPUHotplug = Feature{Name: "CPUs that can be switched off", Version: [2]int{2, 6}, Probe: func(string) error {
		cpus, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
		knobs, kerr := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/online")
		if len(cpus) < 2 || len(knobs) == 0 {
			return errors.Join(err, kerr, ErrAbsent)
		}
		return nil
	}}
)

// onOverlay runs f on the root of a fresh overlay mount.
func onOverlay(f func(merged string) error) func(dir string) error {
	return func(dir string) error {
		for _, d := range []string{"l", "u", "w", "m"} {
			if err := os.Mkdir(dir+"/"+d, 0o755); err != nil {
				return err
			}
		}
		opts := fmt.Sprintf("lowerdir=%[1]s/l,upperdir=%[1]s/u,workdir=%[1]s/w", dir)
		if err := unix.Mount("overlay", dir+"/m", "overlay", 0, opts); err != nil {
			return err
		}
		err := f(dir + "/m")
		if uerr := unix.Unmount(dir+"/m", 0); err == nil {
			err = uerr
		}
		return err
	}
}
