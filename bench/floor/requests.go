package floor

import (
	"strconv"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Names.

func (f *loopback) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	f.enter()
	defer f.leave()
	dir, fd, err := f.dirOf(h.NodeId)
	if err != nil {
		return status(err)
	}
	err = f.find(dir, fd, name, out)
	if err == unix.ENOENT {
		out.EntryValid = forever // node 0: the kernel remembers that there is no such name
		return fuse.OK
	}
	return status(err)
}

// find describes what is at a name.
func (f *loopback) find(dir *node, fd int, name string, out *fuse.EntryOut) error {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	describe(f.seen(dir, name, &st), &st, out)
	return nil
}

// make is what all requests that make a name have in common.
func (f *loopback) make(h *fuse.InHeader, name string, out *fuse.EntryOut, call func(fd int) error) fuse.Status {
	f.enter()
	defer f.leave()
	dir, fd, err := f.dirOf(h.NodeId)
	if err == nil {
		err = call(fd)
	}
	if err == nil && (h.Uid != 0 || h.Gid != 0) {
		err = unix.Fchownat(fd, name, int(h.Uid), int(h.Gid), unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil {
		err = f.find(dir, fd, name, out)
	}
	return status(err)
}

func (f *loopback) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(&in.InHeader, name, out, func(fd int) error { return unix.Mkdirat(fd, name, in.Mode&^in.Umask) })
}

func (f *loopback) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(&in.InHeader, name, out, func(fd int) error { return unix.Mknodat(fd, name, in.Mode&^in.Umask, int(in.Rdev)) })
}

func (f *loopback) Symlink(_ <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(h, name, out, func(fd int) error { return unix.Symlinkat(target, fd, name) })
}

func (f *loopback) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	f.enter()
	defer f.leave()
	dir, fd, err := f.dirOf(in.NodeId)
	if err != nil {
		return status(err)
	}
	n, err := f.node(in.Oldnodeid)
	if err != nil {
		return status(err)
	}
	if parent, old, whereErr := f.parent(n); whereErr == nil {
		err = unix.Linkat(parent, old, fd, name, 0)
	} else if own := n.opened(); own >= 0 { // a nameless file
		err = unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(own), fd, name, unix.AT_SYMLINK_FOLLOW)
	} else {
		err = whereErr
	}
	if err == nil {
		err = f.find(dir, fd, name, out)
	}
	return status(err)
}

func (f *loopback) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.remove(h, name, 0)
}

func (f *loopback) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.remove(h, name, unix.AT_REMOVEDIR)
}

func (f *loopback) remove(h *fuse.InHeader, name string, flags int) fuse.Status {
	f.enter()
	defer f.leave()
	dir, fd, err := f.dirOf(h.NodeId)
	if err == nil {
		err = unix.Unlinkat(fd, name, flags)
	}
	if err == nil {
		f.removed(dir, name)
	}
	return status(err)
}

func (f *loopback) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	f.enter()
	defer f.leave()
	from, fromFD, err := f.dirOf(in.NodeId)
	if err != nil {
		return status(err)
	}
	to, toFD, err := f.dirOf(in.Newdir)
	if err == nil {
		err = unix.Renameat2(fromFD, oldName, toFD, newName, uint(in.Flags))
	}
	if err == nil {
		f.moved(from, oldName, to, newName, in.Flags&unix.RENAME_EXCHANGE != 0)
	}
	return status(err)
}

func (f *loopback) moved(from *node, oldName string, to *node, newName string, exchange bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	source, target := f.lose(from, oldName), f.lose(to, newName)
	put := func(n, dir *node, name string) {
		if n != nil {
			dir.children[name] = n
			n.places = append(n.places, place{dir, name})
		}
	}
	put(source, to, newName)
	switch {
	case exchange:
		put(target, from, oldName)
	case target != nil:
		f.unlinked(target)
	}
}

func (f *loopback) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	f.enter()
	defer f.leave()
	n, err := f.node(h.NodeId)
	if err != nil {
		return nil, status(err)
	}
	parent, name, err := f.parent(n)
	if err != nil {
		return nil, status(err)
	}
	b := make([]byte, unix.PathMax)
	size, err := unix.Readlinkat(parent, name, b)
	return b[:max(size, 0)], status(err)
}

// Attributes.

func (f *loopback) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	f.enter()
	defer f.leave()
	n, err := f.node(in.NodeId)
	if err == nil {
		err = f.answerAttr(n, out)
	}
	return status(err)
}

func (f *loopback) answerAttr(n *node, out *fuse.AttrOut) error {
	var st unix.Stat_t
	err := f.stat(n, &st)
	fill(&out.Attr, &st)
	out.AttrValid = forever
	return err
}

func (f *loopback) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	f.enter()
	defer f.leave()
	n, err := f.node(in.NodeId)
	if err == nil {
		err = f.change(n, in)
	}
	if err == nil {
		err = f.answerAttr(n, out)
	}
	return status(err)
}

func (f *loopback) change(n *node, in *fuse.SetAttrIn) error {
	path, err := f.path(n)
	if err != nil {
		return err
	}
	if size, ok := in.GetSize(); ok {
		if err := f.truncate(n, in, path, int64(size)); err != nil {
			return err
		}
	}
	uid, setUID := in.GetUID()
	gid, setGID := in.GetGID()
	if setUID || setGID {
		ids := [2]int{-1, -1}
		if setUID {
			ids[0] = int(uid)
		}
		if setGID {
			ids[1] = int(gid)
		}
		if err := unix.Lchown(path, ids[0], ids[1]); err != nil {
			return err
		}
	}
	if mode, ok := in.GetMode(); ok {
		if err := unix.Chmod(path, mode&0o7777); err != nil {
			return err
		}
	}
	times := [2]unix.Timespec{
		timeOf(in.Valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec),
		timeOf(in.Valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec),
	}
	if times[0].Nsec == unix.UTIME_OMIT && times[1].Nsec == unix.UTIME_OMIT {
		return nil
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, times[:], unix.AT_SYMLINK_NOFOLLOW)
}

func (f *loopback) truncate(n *node, in *fuse.SetAttrIn, path string, size int64) error {
	if fh, ok := in.GetFh(); ok {
		return unix.Ftruncate(int(fh), size)
	}
	n.mu.Lock()
	n.written(size == 0 || n.kind == whole, func() int64 { return sizeOf(path) })
	n.mu.Unlock()
	return unix.Truncate(path, size)
}

func sizeOf(path string) int64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Size
}

func timeOf(valid, set, now uint32, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case valid&set == 0:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case valid&now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

// Extended attributes.

func (f *loopback) withPath(id uint64, call func(path string) error) fuse.Status {
	f.enter()
	defer f.leave()
	n, err := f.node(id)
	if err != nil {
		return status(err)
	}
	path, err := f.path(n)
	if err == nil {
		err = call(path)
	}
	return status(err)
}

func (f *loopback) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (size uint32, code fuse.Status) {
	code = f.withPath(h.NodeId, func(path string) error {
		n, err := unix.Lgetxattr(path, name, dest)
		size = uint32(max(n, 0))
		return err
	})
	return size, code
}

func (f *loopback) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (size uint32, code fuse.Status) {
	code = f.withPath(h.NodeId, func(path string) error {
		n, err := unix.Llistxattr(path, dest)
		size = uint32(max(n, 0))
		return err
	})
	return size, code
}

func (f *loopback) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	return f.withPath(in.NodeId, func(path string) error { return unix.Lsetxattr(path, name, data, int(in.Flags)) })
}

func (f *loopback) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.withPath(h.NodeId, func(path string) error { return unix.Lremovexattr(path, name) })
}

// Directories. Positions are those of the filesystem below, which are good for any descriptor.

func (f *loopback) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(in, func(_ *node, _ int, e *dirent) bool {
		return out.AddDirEntry(fuse.DirEntry{Name: e.name, Ino: e.ino, Mode: uint32(e.kind) << 12, Off: uint64(e.off)})
	})
}

func (f *loopback) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(in, func(dir *node, fd int, e *dirent) bool {
		place := out.AddDirLookupEntry(fuse.DirEntry{Name: e.name, Ino: e.ino, Mode: uint32(e.kind) << 12, Off: uint64(e.off)})
		if place == nil {
			return false
		}
		if e.name != "." && e.name != ".." {
			_ = f.find(dir, fd, e.name, place) // one that went meanwhile stays without attributes
		}
		return true
	})
}

func (f *loopback) readDir(in *fuse.ReadIn, add func(dir *node, fd int, e *dirent) bool) fuse.Status {
	f.enter()
	defer f.leave()
	dir, fd, err := f.dirOf(in.NodeId)
	if err != nil {
		return status(err)
	}
	dir.list.Lock()
	defer dir.list.Unlock()
	if _, err := unix.Seek(fd, int64(in.Offset), unix.SEEK_SET); err != nil {
		return status(err)
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil || n == 0 {
			return status(err)
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e dirent
			if e, rest = nextEntry(rest); !add(dir, fd, &e) {
				return fuse.OK
			}
		}
	}
}

func (f *loopback) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	f.enter()
	defer f.leave()
	_, fd, err := f.dirOf(in.NodeId)
	if err == nil {
		err = unix.Fsync(fd)
	}
	return status(err)
}

func (f *loopback) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	f.enter()
	defer f.leave()
	_, fd, err := f.dirOf(fuse.FUSE_ROOT_ID)
	if err != nil {
		return status(err)
	}
	var st unix.Statfs_t
	err = unix.Fstatfs(fd, &st)
	*out = fuse.StatfsOut{Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), NameLen: uint32(st.Namelen), Frsize: uint32(st.Frsize)}
	return status(err)
}
