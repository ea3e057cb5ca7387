package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Filesystems below upper layers. Those that are known to lack what a union needs are refused by their name as well,
// because the reason is more helpful than a failed trial.
var (
	goodFilesystems = []string{"ext4", "xfs", "btrfs", "tmpfs"}
	badFilesystems  = map[string]string{
		"overlay":    "it is kernel overlayfs itself: names that one layer hides would come back in the other",
		"nfs":        "it keeps no trusted.* attributes",
		"nfs4":       "it keeps no trusted.* attributes",
		"vfat":       "it has no owners, modes or attributes",
		"exfat":      "it has no owners, modes or attributes",
		"9p":         "it has neither whiteouts nor attributes",
		"squashfs":   "it is read-only",
		"ecryptfs":   "it is stacked and has no whiteouts",
		"fuseblk":    "it is another FUSE filesystem",
		"fuse.sshfs": "it is another FUSE filesystem",
	}
)

const useGood = "use a directory on ext4, XFS, btrfs or tmpfs"

// filesystemChecks looks at what lies below dir, and tries there what upper layers need.
func filesystemChecks(m *machine, dir string) []Finding {
	real, err := filepath.EvalSymlinks(m.path(dir))
	if err != nil {
		return []Finding{{"filesystem", Broken, err.Error(), "no upper layer can lie there", "create it, or name another directory"}}
	}
	at, err := mountOf(real)
	if err != nil {
		return []Finding{{"filesystem", Broken, err.Error(), "no upper layer can lie there", useGood}}
	}
	all := []Finding{filesystemType(at, dir)}
	all = append(all, powerCutChecks(m, at)...)
	all = append(all, room(real, dir)...)
	all = append(all, quota(at))
	return append(all, trials(m, real, dir)...)
}

// mountOf finds the mount that a directory lies on.
func mountOf(dir string) (*mountinfo.Info, error) {
	var stx unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_MNT_ID|unix.STATX_TYPE, &stx); err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	if stx.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, fmt.Errorf("%s: not a directory", dir)
	}
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.ID != int(stx.Mnt_id), false })
	if err == nil && len(mounts) == 0 {
		err = fmt.Errorf("%s: its mount is not in /proc/self/mountinfo", dir)
	}
	if err != nil {
		return nil, err
	}
	return mounts[0], nil
}

func filesystemType(at *mountinfo.Info, dir string) Finding {
	f := Finding{Check: "filesystem", Found: fmt.Sprintf("%s lies on %s (%s)", dir, at.FSType, at.Mountpoint)}
	why, bad := badFilesystems[at.FSType]
	if strings.HasPrefix(at.FSType, "fuse") && !bad {
		why, bad = "it is another FUSE filesystem: what is passed through is not passed through there", true
	}
	switch {
	case bad:
		f.Level, f.Cost, f.Fix = Broken, "upper layers cannot lie on it: "+why, useGood
	case !slices.Contains(goodFilesystems, at.FSType):
		f.Level, f.Cost, f.Fix = Note, "Lamina is not tested on it; the trials below say what it can do", useGood
	}
	if slices.Contains(strings.Split(at.Options, ","), "ro") {
		f.Level, f.Cost, f.Fix = Broken, "it is mounted read-only", "mount -o remount,rw "+at.Mountpoint
	}
	return f
}

// powerCutChecks: Lamina's order on disk is that of the filesystem's journal.
func powerCutChecks(m *machine, at *mountinfo.Info) []Finding {
	const cost = "after a power cut files may hold zeros or old bytes in place of what fsync had promised"
	f := Finding{Check: "journal"}
	super := strings.Split(at.VFSOptions, ",")
	has := func(names ...string) string {
		for _, name := range names {
			if slices.Contains(super, name) {
				return name
			}
		}
		return ""
	}
	switch at.FSType {
	case "ext4":
		f.Found = "ext4 with a journal, data=ordered"
		device := filepath.Base(at.Source)
		if real, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", at.Major, at.Minor)); err == nil {
			device = filepath.Base(real)
		}
		journal := has("data=writeback", "data=journal")
		options, err := m.read("/proc/fs/ext4/" + device + "/options")
		ordered := strings.Contains(string(options), "data=")
		switch {
		case err != nil && journal == "":
			f.Level, f.Found = Note, "ext4; whether it has a journal cannot be read from "+"/proc/fs/ext4/"+device
		case err == nil && !ordered && journal == "":
			f.Level, f.Found, f.Cost = Costs, "ext4 without a journal", cost
			f.Fix = "unmount it; tune2fs -O has_journal " + at.Source
		case journal == "data=writeback" || strings.Contains(string(options), "data=writeback"):
			f.Level, f.Found, f.Cost, f.Fix = Costs, "ext4 with data=writeback", "after a power cut, what was not synced may show other files' old bytes", "mount it with data=ordered"
		case journal != "":
			f.Found = "ext4 with " + journal
		}
	case "xfs", "btrfs":
		f.Found = at.FSType + " keeps the order of metadata operations"
	case "tmpfs", "ramfs":
		f.Level, f.Found, f.Cost = Note, at.FSType+" lies in memory", "nothing survives a power cut or an unmount"
	default:
		f.Level, f.Found, f.Cost = Note, "whether "+at.FSType+" writes metadata operations in order is not known", "after a power cut sketches may be damaged: lamina fsck finds them"
	}
	if opt := has("nobarrier", "barrier=0"); opt != "" {
		f.Level, f.Found, f.Cost, f.Fix = Costs, at.FSType+" mounted with "+opt, cost, "mount it without "+opt
	}
	return []Finding{f}
}

// room: a full filesystem loses nothing, but containers get ENOSPC.
func room(real, dir string) []Finding {
	var st unix.Statfs_t
	if err := unix.Statfs(real, &st); err != nil {
		return []Finding{{"space", Broken, fmt.Sprintf("%s: %v", dir, err), "no upper layer can lie there", useGood}}
	}
	f := Finding{Check: "space"}
	free := percent(st.Bavail, st.Blocks)
	f.Found = fmt.Sprintf("%d %% of the space", free)
	inodes := uint64(100)
	if st.Files > 0 { // btrfs has no fixed number
		inodes = percent(st.Ffree, st.Files)
		f.Found += fmt.Sprintf(" and %d %% of the inodes are free", inodes)
	} else {
		f.Found += " is free"
	}
	const low = 5
	if st.Blocks > 0 && free < low || inodes < low {
		f.Level, f.Cost, f.Fix = Costs, "containers will soon meet ENOSPC (blocks that are still to be copied stay readable, and wait)", "remove unused images and snapshots, or enlarge the filesystem"
	}
	return []Finding{f}
}

func percent(part, whole uint64) uint64 {
	if whole == 0 {
		return 100
	}
	return uint64(float64(part) / float64(whole) * 100)
}

// quota: project quotas bound what one container may write.
func quota(at *mountinfo.Info) Finding {
	super := strings.Split(at.VFSOptions, ",")
	for _, name := range []string{"prjquota", "pquota"} {
		if slices.Contains(super, name) {
			return Finding{Check: "quota", Found: at.FSType + " counts by project (" + name + ")"}
		}
	}
	f := Finding{Check: "quota", Level: Note, Found: "no project quota on " + at.Mountpoint, Cost: "one container can fill the filesystem"}
	switch at.FSType {
	case "xfs":
		f.Fix = "mount it with prjquota (for the root filesystem: rootflags=prjquota)"
	case "ext4":
		f.Fix = "unmount it; tune2fs -O project,quota " + at.Source + "; mount it with prjquota"
	}
	return f
}

// trials does in a scratch directory what a union does in its workdir.
func trials(m *machine, real, dir string) []Finding {
	scratch, err := os.MkdirTemp(real, ".lamina-doctor-")
	if err != nil {
		return []Finding{{"trials", Broken, fmt.Sprintf("%s: %v", dir, err), "no upper layer can be made there", "let this user write there"}}
	}
	defer os.RemoveAll(scratch)
	if err := os.WriteFile(scratch+"/file", []byte("lamina"), 0o600); err != nil {
		return []Finding{{"trials", Broken, fmt.Sprintf("%s: %v", dir, err), "no upper layer can be made there", "make room"}}
	}
	namespace := "user.overlay."
	if privileged(m) {
		namespace = "trusted.overlay."
	}
	var all []Finding
	try := func(check, good string, bad Level, cost, fix string, err error) {
		f := Finding{Check: check, Found: good}
		if err != nil {
			f.Level, f.Found, f.Cost, f.Fix = bad, check+": "+err.Error(), cost, fix
		}
		all = append(all, f)
	}
	header := make([]byte, 256) // a sketch's header is an attribute of this size at most
	try("xattrs", namespace+"* attributes are kept", Broken, "sketches, opaque and redirected directories have nowhere to be noted", useGood+"; on ext4, check that user_xattr is on",
		unix.Setxattr(scratch+"/file", namespace+"lamina.probe", header, 0))
	try("whiteouts", "whiteouts (character device 0:0) can be made", Broken, "files of lower layers cannot be removed", useGood,
		unix.Mknod(scratch+"/whiteout", unix.S_IFCHR, 0))
	try("rename-exchange", "two names can be exchanged (RENAME_EXCHANGE)", Broken, "the union cannot replace what has a whiteout in one step", useGood, exchange(scratch))
	try("rename-whiteout", "a rename can leave a whiteout (RENAME_WHITEOUT)", Broken, "the union cannot rename in one step", useGood, renameWhiteout(scratch))
	fd, err := unix.Open(scratch, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	try("tmpfile", "nameless files can be made (O_TMPFILE)", Costs, "copy-up takes a detour, and the mount has no O_TMPFILE", useGood, err)
	return append(all, reflink(scratch))
}

func exchange(scratch string) error {
	if err := os.WriteFile(scratch+"/other", nil, 0o600); err != nil {
		return err
	}
	return unix.Renameat2(unix.AT_FDCWD, scratch+"/file", unix.AT_FDCWD, scratch+"/other", unix.RENAME_EXCHANGE)
}

func renameWhiteout(scratch string) error {
	return unix.Renameat2(unix.AT_FDCWD, scratch+"/other", unix.AT_FDCWD, scratch+"/moved", unix.RENAME_WHITEOUT)
}

// reflink: where upper and lower layers share a filesystem that can clone, copyup=auto clones.
func reflink(scratch string) Finding {
	f := Finding{Check: "reflink", Found: "files can be cloned (FICLONE): copyup=clone works between layers on this filesystem"}
	src, err := os.CreateTemp(scratch, "src")
	if err == nil {
		defer src.Close()
		_, err = src.Write(make([]byte, 4096))
	}
	var dst *os.File
	if err == nil {
		dst, err = os.CreateTemp(scratch, "dst")
	}
	if err == nil {
		defer dst.Close()
		err = unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	}
	switch {
	case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL):
		f.Level, f.Found = OK, "files cannot be cloned here: copy-up is by block"
	case err != nil:
		f.Level, f.Found = Note, "cloning was not tried: "+err.Error()
	}
	return f
}
