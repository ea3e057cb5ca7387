package pool

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"lamina/mountopt"

	"golang.org/x/sys/unix"
)

// What the stores of Podman, Buildah and CRI-O (containers/storage) ask of a mount program and do not say in its options.

// mountProgramFlag lies beside the layers of a store that is set up with a mount program, and holds "true". Layers are
// HOME/ID/diff, named by links HOME/l/LINK.
const mountProgramFlag = ".has-mount-program"

// WhiteoutFiles tells whether ".wh." files are whiteouts in the layer at path: containers/storage unpacks images as they
// are for a mount program (drivers/overlay, getWhiteoutFormat).
func WhiteoutFiles(o *mountopt.Options, path string) bool {
	if o.Whiteouts != mountopt.WhiteoutsAuto {
		return o.Whiteouts == mountopt.WhiteoutsFiles
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return false // opening it will say why
	}
	flag, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(real)), mountProgramFlag))
	return err == nil && strings.TrimSpace(string(flag)) == "true"
}

// unmapped returns another path to a directory that lies on an id-mapped mount, on a mount that is not. Podman 4 hands
// lower directories over on such mounts and asks for uidmapping too: ids would be mapped twice, and nobody be anybody.
func unmapped(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	var want unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, real, 0, unix.STATX_INO|unix.STATX_MNT_ID, &want); err != nil {
		return "", &os.PathError{Op: "statx", Path: path, Err: err}
	}
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	mounts := parseMounts(string(info))
	at := mounts[want.Mnt_id]
	if at == nil || !at.idMapped {
		return path, nil
	}
	inFS := filepath.Join(at.root, strings.TrimPrefix(real, at.point))
	for _, m := range mounts {
		rest, below := strings.CutPrefix(inFS, strings.TrimSuffix(m.root, "/")+"/")
		if m.device != at.device || m.idMapped || !below {
			continue
		}
		other := filepath.Join(m.point, rest)
		if throughFUSE(string(info), other, at.device) {
			continue
		}
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, other, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_MNT_ID, &st)
		if err == nil && st.Mnt_id == m.id && st.Ino == want.Ino { // else something is mounted over it
			return other, nil
		}
	}
	return "", fmt.Errorf("%s is on the id-mapped mount %s, and uidmapping would map its ids again: name it by a path without that mount, or leave uidmapping and gidmapping out", path, at.point)
}

// mountPoint is a line of mountinfo.
type mountPoint struct {
	id       uint64
	device   string
	root     string // the directory of the filesystem that is mounted
	point    string
	idMapped bool
}

func parseMounts(info string) map[uint64]*mountPoint {
	mounts := map[uint64]*mountPoint{}
	for line := range strings.Lines(info) {
		f := strings.Fields(line)
		var m mountPoint
		if len(f) < 6 {
			continue
		}
		if _, err := fmt.Sscan(f[0], &m.id); err != nil {
			continue
		}
		m.device, m.root, m.point = f[2], UnescapeMountinfo(f[3]), UnescapeMountinfo(f[4])
		for option := range strings.SplitSeq(f[5], ",") {
			m.idMapped = m.idMapped || option == "idmapped"
		}
		mounts[m.id] = &m
	}
	return mounts
}
