package pool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"lamina/mountopt"

	"golang.org/x/sys/unix"
)

// CheckMountPoint returns the absolute name of the mount point, without symbolic links.
func CheckMountPoint(mnt string) (string, error) {
	abs, err := filepath.Abs(mnt)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	var st unix.Stat_t
	if err == nil {
		err = unix.Stat(abs, &st)
	}
	if err == nil && IsLaminaMount(abs) {
		// The kernel knows a dead mount's attributes by heart; statfs is always asked.
		var fs unix.Statfs_t
		err = unix.Statfs(abs, &fs)
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return "", fmt.Errorf("mount point %s: does not exist: create it with mkdir", mnt)
	case ServerGone(err):
		return "", fmt.Errorf("mount point %s: its server is gone: take the dead mount away with lamina umount", mnt)
	case err != nil:
		return "", fmt.Errorf("mount point %s: %w", mnt, Reason(err))
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return "", fmt.Errorf("mount point %s: not a directory", mnt)
	}
	return abs, nil
}

// ServerGone recognises what the kernel answers for a mount whose server is no more, or is dying: ECONNABORTED to who asked
// before its end, and ECANCELED to who asked over io_uring in that moment.
func ServerGone(err error) bool {
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.ECANCELED)
}

// Reason strips the operation and the name that os errors carry.
func Reason(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// dirID tells directories apart, whatever they are called.
type dirID struct{ dev, ino uint64 }

// checkedDir is a directory of the options.
type checkedDir struct {
	option string
	path   string
	id     dirID
	above  []dirID // its ancestors, up to the root of its filesystem
}

func (d *checkedDir) String() string { return d.option + " " + d.path }

func StatDir(option, path string) (checkedDir, error) {
	d := checkedDir{option: option, path: path}
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return d, fmt.Errorf("%s %s: does not exist: create it, or correct the path", option, path)
	case err != nil:
		return d, fmt.Errorf("%s %s: %w", option, path, err)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return d, fmt.Errorf("%s %s: not a directory", option, path)
	}
	d.id = dirID{st.Dev, st.Ino}
	d.above, err = ancestors(path, d.id)
	if err != nil {
		return d, fmt.Errorf("%s %s: looking for its parents: %w", option, path, err)
	}
	return d, nil
}

// CheckDirs refuses combinations of directories that could not be mounted, or would eat themselves.
func CheckDirs(o *mountopt.Options) error {
	if len(o.Data) > 0 {
		return fmt.Errorf("datadir %s: Lamina has no data-only layers: name it as the last lower directory, where its files are found too", o.Data[0])
	}
	var lowers []checkedDir
	byID := map[dirID]string{}
	for _, path := range o.Lower {
		d, err := StatDir("lowerdir", path)
		if err != nil {
			return err
		}
		if first, twice := byID[d.id]; twice {
			return fmt.Errorf("lowerdir %s: is the same directory as lowerdir %s: name it once", path, first)
		}
		byID[d.id] = path
		lowers = append(lowers, d)
	}
	if o.Upper == "" {
		return nil
	}
	return checkUpper(o, lowers)
}

func checkUpper(o *mountopt.Options, lowers []checkedDir) error {
	upper, err := StatDir("upperdir", o.Upper)
	if err != nil {
		return err
	}
	work, err := StatDir("workdir", o.Work)
	if err != nil {
		return err
	}
	if err := checkApart(&upper, &work); err != nil {
		return err
	}
	for i := range lowers {
		for _, own := range []*checkedDir{&upper, &work} {
			if err := checkApart(own, &lowers[i]); err != nil {
				return err
			}
		}
	}
	if err := checkSameMount(&upper, &work); err != nil {
		return err
	}
	if err := checkVolatile(&work); err != nil {
		return err
	}
	if err := checkKernelMount(&upper, &work); err != nil || o.CopyUp != mountopt.CopyUpClone {
		return err
	}
	return checkClone(&work, lowers)
}

// checkApart refuses two directories of which one is the other or lies inside it. A mount boundary keeps them apart:
// layers do not reach across it.
func checkApart(a, b *checkedDir) error {
	if a.id == b.id {
		return fmt.Errorf("%s: is the same directory as %s: use another one", a, b)
	}
	for _, pair := range [][2]*checkedDir{{a, b}, {b, a}} {
		if slices.Contains(pair[0].above, pair[1].id) {
			return fmt.Errorf("%s: lies inside %s: use one outside", pair[0], pair[1])
		}
	}
	return nil
}

// ancestors walks from a directory up to the root of its filesystem.
func ancestors(path string, at dirID) ([]dirID, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { unix.Close(fd) }()
	var above []dirID
	for {
		up, err := unix.Openat(fd, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		unix.Close(fd)
		fd = up
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return nil, err
		}
		parent := dirID{st.Dev, st.Ino}
		if parent == at || parent.dev != at.dev {
			return above, nil
		}
		above = append(above, parent)
		at = parent
	}
}

// checkSameMount: files are made in the workdir and renamed into the upper directory, which no rename can do from one
// mount to another.
func checkSameMount(upper, work *checkedDir) error {
	if upper.id.dev != work.id.dev {
		return fmt.Errorf("%s: lies on another filesystem than %s: use a directory beside the upper one", work, upper)
	}
	var u, w unix.Statx_t
	for path, st := range map[string]*unix.Statx_t{upper.path: &u, work.path: &w} {
		if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, st); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if u.Mnt_id != w.Mnt_id {
		return fmt.Errorf("%s: lies on another mount of the filesystem than %s: use a directory beside the upper one", work, upper)
	}
	return nil
}

// checkVolatile refuses what a volatile mount of kernel overlayfs left; Lamina's own mark is package union's.
func checkVolatile(work *checkedDir) error {
	mark := filepath.Join(work.path, "work/incompat/volatile")
	if _, err := os.Lstat(mark); err == nil {
		return fmt.Errorf("%s: a volatile mount did not end cleanly (%s exists): its contents cannot be trusted; start from an empty upperdir and workdir", work, mark)
	}
	return nil
}

const cloneRemedy = "use copyup=auto, or put upper and lowers on one XFS or btrfs"

// checkClone refuses copyup=clone where every copy-up would fail.
func checkClone(work *checkedDir, lowers []checkedDir) error {
	to, err := filesystemOf(unix.AT_FDCWD, work.path)
	if err != nil {
		return fmt.Errorf("%s: %w", work, err)
	}
	for i := range lowers {
		from, err := filesystemOf(unix.AT_FDCWD, lowers[i].path)
		if err != nil {
			return fmt.Errorf("%s: %w", &lowers[i], err)
		}
		if from != to {
			return fmt.Errorf("copyup=clone: %s lies on another filesystem than %s: %s", &lowers[i], work, cloneRemedy)
		}
	}
	err = tryClone(work.path)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) {
		return fmt.Errorf("copyup=clone: the filesystem of %s cannot clone files (%w): %s", work, err, cloneRemedy)
	}
	if err != nil {
		return fmt.Errorf("copyup=clone: %s: %w", work, err)
	}
	return nil
}

// tryClone clones one nameless file into another.
func tryClone(dir string) error {
	var fds [2]int
	for i := range fds {
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	return unix.IoctlFileClone(fds[0], fds[1])
}

// checkKernelMount refuses an upper directory or workdir that kernel overlayfs has in use.
func checkKernelMount(upper, work *checkedDir) error {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	device := fmt.Sprintf("%d:%d", unix.Major(upper.id.dev), unix.Minor(upper.id.dev))
	for line := range bytes.Lines(info) {
		before, after, _ := strings.Cut(string(line), " - ")
		if !strings.HasPrefix(after, "overlay ") {
			continue
		}
		fields := strings.Fields(before)
		for opt := range strings.SplitSeq(strings.TrimSpace(after), ",") {
			name, path, _ := strings.Cut(opt, "=")
			if name != "upperdir" && name != "workdir" {
				continue
			}
			path = UnescapeMountinfo(path)
			var st unix.Stat_t
			if throughFUSE(string(info), path, device) || unix.Stat(path, &st) != nil {
				continue
			}
			for _, own := range []*checkedDir{upper, work} {
				if (dirID{st.Dev, st.Ino}) == own.id {
					return fmt.Errorf("%s: in use by the overlay mount on %s: unmount that first", own, UnescapeMountinfo(fields[4]))
				}
			}
		}
	}
	return nil
}

// throughFUSE says whether the way to path leads through a FUSE mount, but for those of one filesystem (MAJOR:MINOR). The
// server of any other may answer nobody, so what lies there is not looked at, unless something asked for lies there too.
func throughFUSE(info, path, but string) bool {
	for line := range strings.Lines(info) {
		before, after, _ := strings.Cut(line, " - ")
		kind, _, _ := strings.Cut(after, " ")
		f := strings.Fields(before)
		if len(f) < 5 || f[2] == but || kind != "fuse" && kind != "fuseblk" && !strings.HasPrefix(kind, "fuse.") {
			continue
		}
		if strings.HasPrefix(path+"/", strings.TrimSuffix(UnescapeMountinfo(f[4]), "/")+"/") {
			return true
		}
	}
	return false
}

// UnescapeMountinfo turns \040 and its like into the characters they stand for.
func UnescapeMountinfo(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
