package layer

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Override says where the owner and mode of a layer's objects are kept instead of in the inodes, by a store whose user
// may not own files as somebody else.
type Override uint8

const (
	OverrideNone       Override = iota // in the inodes
	OverrideAuto                       // in the attribute that the layer's root carries, if it carries one
	OverrideContainers                 // user.containers.override_stat (xattr_permissions=2, force_mask)
	OverridePrivileged                 // security.fuseoverlayfs.override_stat (xattr_permissions=1)
)

const (
	xattrOverrideContainers = "user.containers.override_stat"
	xattrOverridePrivileged = "security.fuseoverlayfs.override_stat"
)

// maxOverride is more than the longest valid value: three numbers and a device.
const maxOverride = 128

func (o Override) attr() string {
	switch o {
	case OverrideContainers:
		return xattrOverrideContainers
	case OverridePrivileged:
		return xattrOverridePrivileged
	}
	return ""
}

// overrideStat is the value of the attribute: "uid:gid:mode[:type]", decimal, decimal, octal. fuse-overlayfs writes the
// first three and may include the file type bits in mode; containers/storage appends the type, which says what a
// regular file stands for when the store could not make a device, fifo or socket.
type overrideStat struct {
	uid, gid uint32
	mode     uint32 // permission and set-id bits only
	typ      uint32 // S_IFMT bits, or 0 if the value does not say
	rdev     uint64
}

var overrideTypes = map[string]uint32{
	"file": unix.S_IFREG, "dir": unix.S_IFDIR, "symlink": unix.S_IFLNK, "pipe": unix.S_IFIFO, "socket": unix.S_IFSOCK,
	"block": unix.S_IFBLK, "char": unix.S_IFCHR,
}

func parseOverride(v string) (overrideStat, error) {
	bad := func(what string) (overrideStat, error) {
		return overrideStat{}, fmt.Errorf("override_stat %q: %s", v, what)
	}
	f := strings.SplitN(v, ":", 4)
	if len(f) < 3 {
		return bad("not uid:gid:mode")
	}
	uid, err1 := strconv.ParseUint(f[0], 10, 32)
	gid, err2 := strconv.ParseUint(f[1], 10, 32)
	mode, err3 := strconv.ParseUint(f[2], 8, 32)
	if err1 != nil || err2 != nil || err3 != nil {
		return bad("not uid:gid:mode")
	}
	o := overrideStat{uid: uint32(uid), gid: uint32(gid), mode: uint32(mode) & 0o7777}
	if len(f) == 3 {
		return o, nil
	}
	kind, numbers, isDev := strings.Cut(f[3], "-")
	o.typ = overrideTypes[kind]
	switch {
	case o.typ == 0:
		return bad("unknown file type")
	case isDev != (kind == "block" || kind == "char"):
		return bad("device numbers belong to block and char, and to nothing else")
	case isDev:
		a, b, _ := strings.Cut(numbers, "-")
		major, err1 := strconv.ParseUint(a, 10, 32)
		minor, err2 := strconv.ParseUint(b, 10, 32)
		if err1 != nil || err2 != nil {
			return bad("bad device number")
		}
		o.rdev = unix.Mkdev(uint32(major), uint32(minor))
	}
	return o, nil
}

func (o overrideStat) String() string {
	s := fmt.Sprintf("%d:%d:%04o", o.uid, o.gid, o.mode)
	for name, typ := range overrideTypes {
		if typ != o.typ {
			continue
		}
		if typ == unix.S_IFBLK || typ == unix.S_IFCHR {
			return fmt.Sprintf("%s:%s-%d-%d", s, name, unix.Major(o.rdev), unix.Minor(o.rdev))
		}
		return s + ":" + name
	}
	return s
}

// apply makes st say what o says. Only an empty regular file can stand for something else: a type that contradicts any
// other object is a forgery, reported by false.
func (o overrideStat) apply(st *unix.Stat_t) bool {
	if o.typ != 0 && o.typ != st.Mode&unix.S_IFMT {
		standsIn := st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0 && o.typ != unix.S_IFDIR && o.typ != unix.S_IFLNK
		if !standsIn {
			return false
		}
		st.Mode = st.Mode&^unix.S_IFMT | o.typ
		st.Rdev = o.rdev
	}
	st.Uid, st.Gid = o.uid, o.gid
	st.Mode = st.Mode&unix.S_IFMT | o.mode
	return true
}

// overrideOf returns the override that describes st.
func overrideOf(st *unix.Stat_t) overrideStat {
	return overrideStat{uid: st.Uid, gid: st.Gid, mode: st.Mode & 0o7777, typ: st.Mode & unix.S_IFMT, rdev: st.Rdev}
}
