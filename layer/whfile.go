package layer

import (
	"strings"

	"golang.org/x/sys/unix"
)

// Image archives say that a name is gone by an empty file ".wh.NAME", and that a directory hides what is below it by
// ".wh..wh..opq" in it (OCI image layer specification, "Whiteouts"). Most engines turn that into overlayfs's conventions
// when they unpack. Podman does not where a mount program serves its store: it leaves both to the program. A Dir opened
// with [Options].WhiteoutFiles shows such a layer as if overlayfs's conventions had been used, and has no other names that
// begin with ".wh.".

const (
	whPrefix = ".wh."
	whOpaque = ".wh..wh..opq"
)

// reserved tells whether path's last name belongs to the convention.
func (d *Dir) reserved(path string) bool {
	return d.whFiles && strings.HasPrefix(path[strings.LastIndexByte(path, '/')+1:], whPrefix)
}

// whiteoutFile tells whether a file says that name, which is in the directory fd, is gone in this layer.
func (d *Dir) whiteoutFile(fd int, name string) bool {
	if !d.whFiles || name == "." {
		return false
	}
	var st unix.Stat_t
	return unix.Fstatat(fd, whPrefix+name, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT) == nil
}

// opaqueFile tells whether a file in the directory name, which is in the directory fd, makes it opaque.
func (d *Dir) opaqueFile(fd int, name string) bool {
	if !d.whFiles {
		return false
	}
	got, err := openat2(fd, name+"/"+whOpaque, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: resolveInside})
	if err != nil {
		return false
	}
	unix.Close(got)
	return true
}

// translate replaces the convention's files by the whiteouts that they stand for. What the layer itself has under a name
// counts more than a file that says it is gone: that speaks of the layers below.
func translate(entries []Entry) []Entry {
	var gone []string
	kept := entries[:0]
	for _, e := range entries {
		if name, is := strings.CutPrefix(e.Name, whPrefix); !is {
			kept = append(kept, e)
		} else if !strings.HasPrefix(name, whPrefix) && checkName(name) == nil {
			gone = append(gone, name)
		}
	}
	if len(gone) == 0 {
		return kept
	}
	has := make(map[string]struct{}, len(kept))
	for _, e := range kept {
		has[e.Name] = struct{}{}
	}
	for _, name := range gone {
		if _, there := has[name]; !there {
			kept = append(kept, Entry{Name: name, Type: unix.DT_CHR})
		}
	}
	return kept
}

// RawReadDir is ReadDir of what really lies there.
func (d *Dir) RawReadDir(path string) ([]Entry, error) {
	fd, err := d.openDirRead(path)
	if err != nil {
		return nil, d.fail("readdir", path, err)
	}
	defer unix.Close(fd)
	entries, err := readEntries(fd)
	return entries, d.fail("readdir", path, err)
}

// UnlinkIn removes an entry that RawReadDir gave from the directory dir.
func (d *Dir) UnlinkIn(dir, name string) error {
	if err := d.writable("unlink", dir); err != nil {
		return err
	}
	fd, err := d.openDirRead(dir)
	if err != nil {
		return d.fail("unlink", dir, err)
	}
	defer unix.Close(fd)
	return d.fail("unlink", dir, unix.Unlinkat(fd, name, 0))
}
