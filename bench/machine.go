package bench

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
	"lamina/bench/rival"
)

// versions are programs whose version a report should name, if they are here.
var versions = []struct {
	name    string
	command []string
}{
	{"fuse-overlayfs", []string{"fuse-overlayfs", "--version"}},
	{"fio", []string{"fio", "--version"}},
	{"mkfs.xfs", []string{"mkfs.xfs", "-V"}},
	{"btrfs", []string{"btrfs", "--version"}},
}

// describeMachine says where the run takes place. dir is the directory that is measured in.
func describeMachine(ctx context.Context, dir, lamina string) (m report.Machine, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, err
	}
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		return m, err
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:])
	m.CPUs = cpus.Count()
	m.CPUModel = cpuModel()
	if m.Memory, err = procField("/proc/meminfo", "MemTotal:"); err != nil {
		return m, err
	}
	if m.Filesystem, err = mountOf(ctx, dir); err != nil {
		return m, err
	}
	m.Versions = append(m.Versions, report.Version{Name: "lamina", Version: firstLine(ctx, lamina, "--version")})
	for _, v := range versions {
		if _, err := exec.LookPath(v.command[0]); err == nil {
			m.Versions = append(m.Versions, report.Version{Name: v.name, Version: firstLine(ctx, v.command[0], v.command[1:]...)})
		}
	}
	return m, nil
}

func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	for line := range strings.Lines(string(b)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// mountOf describes the mount that dir is on: type, device, options.
func mountOf(ctx context.Context, dir string) (string, error) {
	out, err := rival.Run(ctx, "findmnt", "-n", "-o", "FSTYPE,SOURCE,OPTIONS", "-T", dir)
	if err != nil {
		return "", fmt.Errorf("findmnt: %w", err)
	}
	f := strings.Fields(out)
	if len(f) != 3 {
		return "", fmt.Errorf("findmnt said %q of %s", out, dir)
	}
	what := fmt.Sprintf("%s on %s (%s)", f[0], f[1], f[2])
	if backing, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(f[1]), "loop/backing_file")); err == nil {
		what += ", in a file on " + filesystemOf(filepath.Dir(strings.TrimSpace(string(backing))))
	}
	return what, nil
}
