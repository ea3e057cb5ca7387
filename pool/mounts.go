package pool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// IsLaminaMount tells whether the topmost mount on the directory is one of ours.
func IsLaminaMount(abs string) bool {
	_, rest := topMount(abs)
	return strings.HasPrefix(rest, "fuse.lamina ")
}

// TopDevice is the device number, MAJOR:MINOR, of the topmost mount on a directory; empty if there is none.
func TopDevice(abs string) string {
	device, _ := topMount(abs)
	return device
}

// topMount tells the topmost mount's device number and, after the " - " of its line, its type and what follows.
func topMount(abs string) (device, rest string) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", ""
	}
	for line := range bytes.Lines(info) {
		before, after, _ := strings.Cut(string(line), " - ")
		if fields := strings.Fields(before); len(fields) > 4 && UnescapeMountinfo(fields[4]) == abs {
			device, rest = fields[2], after
		}
	}
	return device, rest
}

// UnmountPath unmounts with umount2(2), or with fusermount3 where that is not allowed.
func UnmountPath(mnt string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(mnt, flags)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	args := []string{"-u", "-q", "--", mnt}
	if lazy {
		args = slices.Insert(args, 1, "-z")
	}
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return errors.New("unmounting without privileges needs fusermount3: install the package fuse3")
	case err != nil && bytes.Contains(out, []byte("busy")):
		return unix.EBUSY
	case err != nil:
		return fmt.Errorf("fusermount3: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Holders names processes that use the mount on mnt, as far as this user may see them.
func Holders(mnt string) string {
	const enough = 5
	var found []string
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return "somebody"
	}
	self := fmt.Sprintf("/proc/%d", os.Getpid())
	for _, proc := range procs {
		if proc == self {
			continue
		}
		if how := holdsOpen(proc, mnt); how != "" {
			comm, _ := os.ReadFile(proc + "/comm") // it may be gone
			found = append(found, fmt.Sprintf("%s %q (%s)", filepath.Base(proc), strings.TrimSpace(string(comm)), how))
		}
		if len(found) > enough {
			found[enough] = "others"
			break
		}
	}
	if len(found) == 0 {
		return "somebody this user cannot see, or a mount inside it"
	}
	return "process " + strings.Join(found, ", ")
}

// holdsOpen says what a process has in mnt: links in /proc are read, never followed.
func holdsOpen(proc, mnt string) string {
	inside := func(link string) (string, bool) {
		target, err := os.Readlink(link)
		return target, err == nil && (target == mnt || strings.HasPrefix(target, mnt+"/"))
	}
	for _, name := range []string{"cwd", "root", "exe"} {
		if _, ok := inside(proc + "/" + name); ok {
			return name
		}
	}
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return ""
	}
	for _, fd := range fds {
		if target, ok := inside(proc + "/fd/" + fd.Name()); ok {
			return target
		}
	}
	maps, err := os.ReadFile(proc + "/maps")
	if err == nil && bytes.Contains(maps, []byte(" "+mnt+"/")) {
		return "a mapped file"
	}
	return ""
}

// elsewhere names the other places where this mount's filesystem is mounted, in this mount namespace.
func (in *Mount) elsewhere() []string {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	major, minor := in.server.Device()
	device := fmt.Sprintf("%d:%d", major, minor)
	var places []string
	for line := range bytes.Lines(info) {
		before, _, _ := strings.Cut(string(line), " - ")
		if f := strings.Fields(before); len(f) > 4 && f[2] == device && UnescapeMountinfo(f[4]) != in.Mountpoint {
			places = append(places, UnescapeMountinfo(f[4]))
		}
	}
	return places
}
