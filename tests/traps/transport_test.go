package traps

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
	"lamina/tests/probe"
)

// Where there is no io_uring for FUSE, transport=auto says so once and works without, and transport=uring fails with the
// reason and what would help, and leaves nothing mounted.

// A seccomp filter forbids rings, as container engines' profiles do.
func TestRingsForbidden(t *testing.T) {
	self, err := os.Executable()
	check(t, err)
	prefix := []string{"env", unringedEnv + "=1", self}
	lower := lowerWith(t, map[string][]byte{"file": data(1, 3*block)})

	m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Foreground: true, Prefix: prefix,
		Options: []string{"transport=auto"}})
	if got := m.Transport(); got != "dev" {
		t.Errorf("the transport is %s", got)
	}
	check(t, patch(m.Path("file"), "patched", 5000))
	wantReason(t, fmt.Sprint(status(t, m)), "io_uring is forbidden here", "kernel.io_uring_disabled", "seccomp")
	m.Unmount()
	wantReason(t, m.Log(), "/dev/fuse", "io_uring is forbidden here", "kernel.io_uring_disabled", "seccomp")
	if n := strings.Count(m.Log(), "forbidden"); n != 1 {
		t.Errorf("said %d times: %s", n, m.Log())
	}

	m, err = mnt.Try(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Foreground: true, Prefix: prefix,
		Options: []string{"transport=uring"}})
	if err == nil {
		t.Fatal("transport=uring mounted without rings")
	}
	wantReason(t, err.Error(), "transport=uring", "io_uring is forbidden here", "kernel.io_uring_disabled", "seccomp")
	if mounted, err := rival.Mounted(m.Dir); mounted || err != nil {
		t.Errorf("still mounted: %t, %v", mounted, err)
	}
}

func wantReason(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("nothing of %q in %s", w, text)
		}
	}
}

// The kernel's parameter is off and may not be written: a container sees sysfs read-only.
func TestParameterOffAndReadOnly(t *testing.T) {
	const parameter = "/sys/module/fuse/parameters/enable_uring"
	probe.FuseUring.Need(t)
	bin, err := rival.BinaryPath()
	check(t, err)
	for transport, want := range map[string]string{"auto": `"transport": "dev"`, "uring": "not mounted"} {
		t.Run(transport, func(t *testing.T) {
			d := mnt.Dirs(t, "low", "up", "work", "mnt", "sys")
			off := filepath.Join(d[4], "enable_uring")
			check(t, os.WriteFile(off, []byte("N\n"), 0o644))
			check(t, os.WriteFile(filepath.Join(d[0], "file"), data(1, block), 0o644))
			// In a mount namespace of its own, so that nobody else sees the parameter so.
			out := shell(t, `unshare -m sh -c '
				mount --bind %[1]s %[2]s && mount -o remount,bind,ro %[2]s || exit 9
				%[3]s mount -o lowerdir=%[4]s,upperdir=%[5]s,workdir=%[6]s,transport=%[8]s %[7]s 2>&1
				if ! grep -q " %[7]s " /proc/self/mountinfo; then echo not mounted; exit 0; fi
				%[3]s status --json %[7]s
				echo more >>%[7]s/file && cat %[7]s/file >/dev/null && echo works
				%[3]s umount %[7]s 2>&1'`, off, parameter, bin, d[0], d[1], d[2], d[3], transport)
			wantReason(t, out, want, "switched off", "as root on the host, echo Y", parameter)
			if transport == "auto" {
				wantReason(t, out, "works")
			} else {
				wantReason(t, out, "transport=uring")
			}
		})
	}
}

// unringedEnv makes this program forbid rings to itself and become the program that its arguments name.
const unringedEnv = "LAMINA_TRAPS_UNRINGED"

func runUnringed() error {
	if err := probe.ForbidRings(); err != nil {
		return err
	}
	if err := os.Unsetenv(unringedEnv); err != nil {
		return err
	}
	return unix.Exec(os.Args[1], os.Args[1:], os.Environ())
}
