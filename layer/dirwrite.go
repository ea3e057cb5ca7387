package layer

import (
	"errors"

	"golang.org/x/sys/unix"
)

// writable gives EROFS on a layer that was opened read-only.
func (d *Dir) writable(op, path string) error {
	if d.readOnly {
		return d.fail(op, path, unix.EROFS)
	}
	return nil
}

// modify runs one change of the name at path.
func (d *Dir) modify(op, path string, change func(fd int, name string) error) error {
	if err := d.writable(op, path); err != nil {
		return err
	}
	parent, fd, name, err := d.at(path)
	if err != nil {
		return d.fail(op, path, err)
	}
	defer done(parent)
	return d.fail(op, path, change(fd, name))
}

const writeFlags = unix.O_WRONLY | unix.O_RDWR | unix.O_CREAT | unix.O_TRUNC

// OpenFile opens a regular file, and nothing else: ELOOP for a symlink, EISDIR for a directory, EINVAL for a device,
// fifo or socket, none of which it touches. flags are open(2)'s; mode is used with O_CREAT.
func (d *Dir) OpenFile(path string, flags int, mode uint32) (int, error) {
	if flags&writeFlags != 0 {
		if err := d.writable("open", path); err != nil {
			return -1, err
		}
	}
	parent, at, name, err := d.at(path)
	if err != nil {
		return -1, d.fail("open", path, err)
	}
	defer done(parent)
	flags |= unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NOCTTY
	if flags&unix.O_CREAT != 0 {
		fd, err := d.createFile(at, name, flags, mode)
		return fd, d.fail("open", path, err)
	}
	fd, err := d.openRegular(at, name, flags)
	return fd, d.fail("open", path, err)
}

// openRegular looks at the object before opening it for real, so that opening has no effect on a device, whose open
// may act, or on a fifo, whose open may block or wake a writer.
func (d *Dir) openRegular(at int, name string, flags int) (int, error) {
	if d.Cloned() {
		var st unix.Stat_t
		fd, err := openImmutable(at, name, flags, &st)
		if err != unix.EAGAIN {
			return fd, err
		}
		// Somebody holds a lease on the file: worth waiting for.
	}
	path, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(path)
	var st unix.Stat_t
	if err := unix.Fstat(path, &st); err != nil {
		return -1, err
	}
	if err := mustBeRegular(&st); err != nil {
		return -1, err
	}
	return openBlocking(unix.AT_FDCWD, fdPath(path), flags&^unix.O_NOFOLLOW)
}

// Reopen opens the regular file that the O_PATH descriptor fd, from [Dir.OpenPath], stands for.
func Reopen(fd, flags int) (int, error) {
	return openBlocking(unix.AT_FDCWD, fdPath(fd), flags|unix.O_CLOEXEC|unix.O_NOCTTY)
}

// openImmutable opens a file of a clone, whose attributes it gives: nobody should replace the object between the two calls, and if somebody does,
// nodev and O_NONBLOCK keep the harm away.
func openImmutable(at int, name string, flags int, st *unix.Stat_t) (int, error) {
	if err := unix.Fstatat(at, name, st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT); err != nil {
		return -1, err
	}
	if err := mustBeRegular(st); err != nil {
		return -1, err
	}
	return openBlocking(at, name, flags|unix.O_NONBLOCK)
}

func openBlocking(at int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(at, name, flags, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func mustBeRegular(st *unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return nil
	case unix.S_IFLNK:
		return unix.ELOOP
	case unix.S_IFDIR:
		return unix.EISDIR
	}
	return unix.EINVAL
}

// createFile opens with O_CREAT. With O_EXCL the result is new and therefore regular; without it an existing object
// goes the careful way first.
func (d *Dir) createFile(at int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(at, name, flags|unix.O_EXCL, mode)
		if err == unix.EINTR {
			continue
		}
		if err != unix.EEXIST || flags&unix.O_EXCL != 0 {
			return fd, err
		}
		fd, err = d.openRegular(at, name, flags&^unix.O_CREAT)
		if err != unix.ENOENT {
			return fd, err
		}
	}
}

// Tmpfile creates a file without a name, on the filesystem of the directory dir and with its default ACL (O_TMPFILE),
// open for reading and writing. [Dir.LinkFD] names it.
func (d *Dir) Tmpfile(dir string, mode uint32) (int, error) {
	if err := d.writable("tmpfile", dir); err != nil {
		return -1, err
	}
	at, name := d.root, "."
	if dir != "" {
		r, err := d.dir(dir)
		if err != nil {
			return -1, d.fail("tmpfile", dir, err)
		}
		defer r.release()
		at = r.fd
	}
	fd, err := unix.Openat(at, name, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, mode)
	return fd, d.fail("tmpfile", dir, err)
}

// LinkFD gives the open file fd, which may come from Tmpfile, the name path.
func (d *Dir) LinkFD(fd int, path string) error {
	return d.modify("link", path, func(at int, name string) error {
		err := unix.Linkat(fd, "", at, name, unix.AT_EMPTY_PATH)
		if err == unix.ENOENT { // not for who lacks CAP_DAC_READ_SEARCH; a file without a name can be linked otherwise
			err = unix.Linkat(unix.AT_FDCWD, fdPath(fd), at, name, unix.AT_SYMLINK_FOLLOW)
		}
		return err
	})
}

// Mkdir creates a directory.
func (d *Dir) Mkdir(path string, mode uint32) error {
	return d.modify("mkdir", path, func(at int, name string) error { return unix.Mkdirat(at, name, mode) })
}

// Mknod creates a device, fifo, socket or empty file; mode holds the type. Where owner and mode are kept in an
// attribute, a device becomes an empty file whose attribute says which device it stands for.
func (d *Dir) Mknod(path string, mode uint32, rdev uint64) error {
	return d.modify("mknod", path, func(at int, name string) error {
		typ := mode & unix.S_IFMT
		if d.override == OverrideNone || rdev == 0 || (typ != unix.S_IFCHR && typ != unix.S_IFBLK) {
			return unix.Mknodat(at, name, mode, int(rdev))
		}
		if err := unix.Mknodat(at, name, unix.S_IFREG|mode&0o7777, 0); err != nil {
			return err
		}
		var st unix.Stat_t
		err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil {
			st.Mode, st.Rdev = mode, rdev
			err = d.writeOverride(atPath(at, name), &st)
		}
		if err != nil {
			return errors.Join(err, unix.Unlinkat(at, name, 0))
		}
		return nil
	})
}

// Symlink creates a symbolic link to target, which is stored as it is.
func (d *Dir) Symlink(target, path string) error {
	return d.modify("symlink", path, func(at int, name string) error { return unix.Symlinkat(target, at, name) })
}

// Link gives the object at oldPath a second name. A symbolic link is linked itself.
func (d *Dir) Link(oldPath, newPath string) error { return LinkBetween(d, oldPath, d, newPath) }

// LinkBetween is Link between two directories of one mount, such as workdir and upper.
func LinkBetween(from *Dir, oldPath string, to *Dir, newPath string) error {
	parent, at, name, err := from.at(oldPath)
	if err != nil {
		return from.fail("link", oldPath, err)
	}
	defer done(parent)
	return to.modify("link", newPath, func(newAt int, newName string) error {
		return unix.Linkat(at, name, newAt, newName, 0)
	})
}

// Unlink removes a name that is not a directory.
func (d *Dir) Unlink(path string) error {
	return d.modify("unlink", path, func(at int, name string) error { return unix.Unlinkat(at, name, 0) })
}

// Rmdir removes an empty directory.
func (d *Dir) Rmdir(path string) error {
	return d.modify("rmdir", path, func(at int, name string) error {
		err := unix.Unlinkat(at, name, unix.AT_REMOVEDIR)
		if err == nil {
			sharedDirs().forget(d, path) // nothing was below it
		}
		return err
	})
}

// Rename moves an object, within one directory tree or between two of one mount. flags are renameat2(2)'s.
func Rename(from *Dir, oldPath string, to *Dir, newPath string, flags uint) error {
	return rename(from, oldPath, to, newPath, flags, func(newAt int, newName string) {
		var st unix.Stat_t
		err := unix.Fstatat(newAt, newName, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil || st.Mode&unix.S_IFMT == unix.S_IFDIR || flags&unix.RENAME_EXCHANGE != 0 {
			from.Invalidate(oldPath)
			to.Invalidate(newPath)
		}
	})
}

// RenameFile is Rename for who knows that neither what is moved nor what is in its place is a directory.
func RenameFile(from *Dir, oldPath string, to *Dir, newPath string, flags uint) error {
	return rename(from, oldPath, to, newPath, flags, func(int, string) {})
}

func rename(from *Dir, oldPath string, to *Dir, newPath string, flags uint, moved func(newAt int, newName string)) error {
	if err := from.writable("rename", oldPath); err != nil {
		return err
	}
	parent, at, name, err := from.at(oldPath)
	if err != nil {
		return from.fail("rename", oldPath, err)
	}
	defer done(parent)
	return to.modify("rename", newPath, func(newAt int, newName string) error {
		if err := unix.Renameat2(at, name, newAt, newName, flags); err != nil {
			return err
		}
		moved(newAt, newName)
		return nil
	})
}

// Invalidate forgets the directories kept open at and below path. Rename and Rmdir do it themselves; it is for moves
// made through descriptors.
func (d *Dir) Invalidate(path string) { sharedDirs().forgetTree(d, path) }

// Chown changes the owner; -1 leaves it. A symbolic link is changed itself.
func (d *Dir) Chown(path string, uid, gid int) error {
	return d.modify("chown", path, func(at int, name string) error {
		if d.override != OverrideNone {
			return d.rewriteOverride(at, name, path, func(st *unix.Stat_t) { setOwner(st, uid, gid) })
		}
		return unix.Fchownat(at, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// Chmod changes the permission and set-id bits. A symbolic link, which has none, gives EOPNOTSUPP.
func (d *Dir) Chmod(path string, mode uint32) error {
	mode &= 0o7777
	return d.modify("chmod", path, func(at int, name string) error {
		if d.override != OverrideNone {
			return d.rewriteOverride(at, name, path, func(st *unix.Stat_t) { setPerm(st, mode) })
		}
		err := unix.Fchmodat(at, name, mode, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EOPNOTSUPP {
			return err
		}
		// A symlink, or a kernel before 6.6, which has no fchmodat2.
		return chmodPath(at, name, mode)
	})
}

func chmodPath(at int, name string, mode uint32) error {
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return unix.EOPNOTSUPP
	}
	return unix.Chmod(fdPath(fd), mode)
}

// FChown is Chown of an open file of this layer.
func (d *Dir) FChown(fd, uid, gid int) error {
	if err := d.writable("chown", "(open file)"); err != nil {
		return err
	}
	if d.override != OverrideNone {
		return d.rewriteOverrideFD(fd, func(st *unix.Stat_t) { setOwner(st, uid, gid) })
	}
	return d.fail("chown", "(open file)", unix.Fchown(fd, uid, gid))
}

// FChmod is Chmod of an open file of this layer.
func (d *Dir) FChmod(fd int, mode uint32) error {
	mode &= 0o7777
	if err := d.writable("chmod", "(open file)"); err != nil {
		return err
	}
	if d.override != OverrideNone {
		return d.rewriteOverrideFD(fd, func(st *unix.Stat_t) { setPerm(st, mode) })
	}
	return d.fail("chmod", "(open file)", unix.Fchmod(fd, mode))
}

// Utimes sets the access and modification times; Nsec may be UTIME_NOW or UTIME_OMIT. A symbolic link is set itself.
func (d *Dir) Utimes(path string, ts [2]unix.Timespec) error {
	return d.modify("utimes", path, func(at int, name string) error {
		return unix.UtimesNanoAt(at, name, ts[:], unix.AT_SYMLINK_NOFOLLOW)
	})
}

// Setxattr sets an attribute; flags are XATTR_CREATE or XATTR_REPLACE. Symbolic links are not followed.
func (d *Dir) Setxattr(path, attr string, value []byte, flags int) error {
	return d.modify("setxattr", path, func(at int, name string) error {
		return unix.Lsetxattr(atPath(at, name), attr, value, flags)
	})
}

// Removexattr removes an attribute: ENODATA if there is none.
func (d *Dir) Removexattr(path, attr string) error {
	return d.modify("removexattr", path, func(at int, name string) error {
		return unix.Lremovexattr(atPath(at, name), attr)
	})
}

// SyncDir makes the names in a directory durable.
func (d *Dir) SyncDir(path string) error {
	fd, err := d.openDirRead(path)
	if err != nil {
		return d.fail("sync", path, err)
	}
	defer unix.Close(fd)
	return d.fail("sync", path, unix.Fsync(fd))
}

func setOwner(st *unix.Stat_t, uid, gid int) {
	if uid != -1 {
		st.Uid = uint32(uid)
	}
	if gid != -1 {
		st.Gid = uint32(gid)
	}
	// chown(2) drops the set-id bits of an executable; an attribute is not an inode, so nobody else does.
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&0o111 != 0 {
		st.Mode &^= unix.S_ISUID
		if st.Mode&0o010 != 0 {
			st.Mode &^= unix.S_ISGID
		}
	}
}

func setPerm(st *unix.Stat_t, mode uint32) { st.Mode = st.Mode&unix.S_IFMT | mode }

// rewriteOverride changes what the override attribute of an entry says.
func (d *Dir) rewriteOverride(at int, name, path string, change func(*unix.Stat_t)) error {
	var st unix.Stat_t
	if err := d.statAt(at, name, path, &st); err != nil {
		return err
	}
	change(&st)
	return d.writeOverride(atPath(at, name), &st)
}

func (d *Dir) rewriteOverrideFD(fd int, change func(*unix.Stat_t)) error {
	st, err := d.FStat(fd)
	if err != nil {
		return err
	}
	change(&st)
	v := overrideOf(&st).String()
	return d.fail("setxattr", "(open file)", unix.Setxattr(fdPath(fd), d.override.attr(), []byte(v), 0))
}

// writeOverride stores st's owner, mode and type. A symbolic link or special file cannot carry user.* attributes and
// keeps what its inode says, as with fuse-overlayfs.
func (d *Dir) writeOverride(path string, st *unix.Stat_t) error {
	err := unix.Lsetxattr(path, d.override.attr(), []byte(overrideOf(st).String()), 0)
	if err == unix.EPERM && !d.canOverride(st) {
		return nil
	}
	return err
}
