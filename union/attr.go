package union

import (
	"errors"
	"time"

	"lamina/block"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// Attr is stat. Ino is the union's own number; Dev is not set: the mount has one.
func (fs *FS) Attr(n *Node) (Attr, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	return fs.attr(n)
}

// AttrMade is Attr of a node that was just made, and that nobody but the caller has been told of.
func (fs *FS) AttrMade(n *Node) Attr {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	st := n.last
	st.Ino = n.ino
	if n.dead {
		st.Nlink = 0
	}
	return st
}

func (fs *FS) attr(n *Node) (Attr, error) {
	st, err := fs.rawAttr(n)
	if err != nil {
		return st, err
	}
	st.Ino = n.ino
	return st, nil
}

func (fs *FS) rawAttr(n *Node) (Attr, error) {
	if st, open, err := fs.openAttr(n); open {
		return st, err
	}
	if n.dead {
		return n.last, nil
	}
	if !n.upper {
		ref := n.stack[0]
		st, err := fs.lowers[ref.layer].Stat(ref.path)
		if err == nil && ref.sketch {
			st.Size = n.size
			st.Blocks = max(st.Blocks, fs.lowerBlocks(n.stack[1:]))
		}
		if err == nil && isDir(st.Mode) && len(n.stack) > 1 {
			st.Nlink = 1
		}
		return st, err
	}
	d, path, err := fs.upperAt(n)
	if err != nil {
		return Attr{}, err
	}
	st, err := d.Stat(path)
	if err != nil {
		return st, err
	}
	if isDir(st.Mode) {
		if len(n.stack) > 0 {
			st.Nlink = 1 // a merged directory does not count its subdirectories, as kernel overlayfs's does not
		}
		return st, nil
	}
	n.mu.Lock()
	if n.sketch {
		st.Size = n.size
		st.Blocks = max(st.Blocks, fs.lowerBlocks(n.stack))
	}
	n.mu.Unlock()
	st.Nlink = fs.nlink(n, &st)
	return st, nil
}

// openAttr is stat of a node whose upper file is open; false if it is not. It holds the lock that closing takes: the
// descriptor's number may be another file's the moment it is closed.
func (fs *FS) openAttr(n *Node) (st Attr, open bool, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := n.cur.Load()
	if c == nil || c.file == nil {
		return st, false, nil
	}
	st, err = c.file.Stat()
	if err == nil && fs.upper.Override() != layer.OverrideNone {
		st, err = fs.overridden(c.file, st)
	}
	if err == nil {
		st.Nlink = fs.nlink(n, &st)
	}
	return st, true, err
}

// overridden asks the layer for owner and mode where they are not the inode's.
func (fs *FS) overridden(f *block.File, st Attr) (Attr, error) {
	fd, _ := f.Plain()
	o, err := fs.upper.FStat(fd)
	st.Mode, st.Uid, st.Gid, st.Rdev = o.Mode, o.Uid, o.Gid, o.Rdev
	return st, err
}

// lowerBlocks is what the lower file of a sketch has allocated. GNU tar takes st_blocks == 0 for a file without data.
func (fs *FS) lowerBlocks(stack []lowerRef) int64 {
	var blocks int64
	for _, ref := range stack {
		if st, err := fs.lowers[ref.layer].Stat(ref.path); err == nil {
			blocks = max(blocks, st.Blocks)
		}
	}
	return blocks
}

func (fs *FS) nlink(n *Node, st *Attr) uint64 {
	if n.dead {
		return 0
	}
	if n.indexed {
		return uint64(int64(st.Nlink) + n.delta)
	}
	return st.Nlink
}

// SetAttr changes attributes, copying the file up without its data if it is a lower one.
func (fs *FS) SetAttr(n *Node, s SetAttr) (Attr, error) {
	why := purpose{truncate: s.Size != nil && *s.Size == 0}
	// The kernel asks to drop privileges with every change of owner, and copying up for one drops them anyway.
	if s.Size == nil && (!s.KillPriv || s.UID != nil || s.GID != nil) {
		why.change = &s
	}
	served, err := fs.copyUpTo(n, why)
	if err != nil {
		return Attr{}, err
	}
	if served && why.change != nil {
		return fs.Attr(n)
	}
	switch {
	case s.Size != nil:
		err = fs.resize(n, *s.Size, s.KillPriv)
	case s.KillPriv && !n.privClean.Load():
		err = fs.dropPriv(n, true)
	}
	if err != nil {
		return Attr{}, err
	}
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	if err := fs.setMeta(n, &s); err != nil {
		return Attr{}, err
	}
	return fs.attr(n)
}

func (fs *FS) resize(n *Node, size int64, killPriv bool) error {
	if !isReg(n.mode) {
		return unix.EINVAL
	}
	if err := fs.dropPriv(n, killPriv); err != nil {
		return err
	}
	if err := fs.acquire(n); err != nil {
		return err
	}
	h := &Handle{n: n}
	defer h.Release()
	return h.truncate(size)
}

// setMeta changes owner, mode and times of an upper object. A change of owner drops set-id bits, so it comes first. The
// caller holds tree.
func (fs *FS) setMeta(n *Node, s *SetAttr) error {
	defer n.heritage.Store(nil)
	return fs.withObject(n, func(o object) error {
		if s.UID != nil || s.GID != nil {
			if err := o.chown(orKeep(s.UID), orKeep(s.GID)); err != nil {
				return err
			}
		}
		if s.Mode != nil {
			n.privClean.Store(false)
			if err := o.chmod(*s.Mode & 0o7777); err != nil {
				return err
			}
			n.privClean.Store(n.noCaps.Load() && !setID(*s.Mode))
		}
		if s.Atime == nil && s.Mtime == nil {
			return nil
		}
		at, mt := orOmit(s.Atime), orOmit(s.Mtime)
		if c := n.cur.Load(); c != nil && c.file != nil {
			return c.file.SetTimes(at, mt) // so that no copy in the background puts older ones back
		}
		return o.utimes(at, mt)
	})
}

func orKeep(id *uint32) int {
	if id == nil {
		return -1
	}
	return int(*id)
}

func orOmit(t *unix.Timespec) unix.Timespec {
	if t == nil {
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	}
	return *t
}

// setID says that a mode has a bit which lends the file's owner or group to whoever runs it.
func setID(mode uint32) bool { return mode&(unix.S_ISUID|unix.S_ISGID) != 0 }

func nowTimespec() unix.Timespec { return unix.NsecToTimespec(time.Now().UnixNano()) }

const capability = "security.capability"

// dropPriv does what the kernel does before a write by somebody without privileges: capabilities go with any write,
// set-id bits if kill says so (setgid only on a group-executable file, otherwise it means mandatory locking).
func (fs *FS) dropPriv(n *Node, kill bool) error {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	if !n.upper {
		return nil
	}
	return fs.withObject(n, func(o object) error {
		var err error
		if !n.noCaps.Load() {
			err = o.removexattr(capability)
		}
		if errors.Is(err, unix.EPERM) && fs.cfg.NS == layer.User {
			err = nil // who may not remove it could not have brought it into the upper layer either
		}
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		st, err := o.stat()
		if err != nil {
			return err
		}
		mode := st.Mode & 0o7777
		drop := uint32(0)
		if kill {
			drop = mode & unix.S_ISUID
			if mode&unix.S_IXGRP != 0 {
				drop |= mode & unix.S_ISGID
			}
		}
		if drop != 0 {
			if err := o.chmod(mode &^ drop); err != nil {
				return err
			}
		}
		n.noCaps.Store(true)
		n.privClean.Store(!setID(mode &^ drop))
		return nil
	})
}

// object reaches a node's upper object: by its descriptor where it is open, otherwise by its path.
type object struct {
	d    *layer.Dir
	path string
	fd   int
}

// withObject calls do with the node's upper object. It holds the lock that closing takes, because the descriptor of a
// nameless file may be another file's the moment it is closed. The caller holds tree.
func (fs *FS) withObject(n *Node, do func(object) error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c := n.cur.Load(); c != nil && c.file != nil {
		if fd := c.file.FD(); fd >= 0 { // shorter than any path
			return do(object{d: fs.upper, fd: fd})
		}
	}
	if n.upper && !n.dead {
		d, path, err := fs.upperAt(n)
		if !errors.Is(err, unix.ESTALE) { // ESTALE: it has names, but this mount has not looked them up
			if err == nil {
				err = do(object{d: d, path: path, fd: -1})
			}
			return err
		}
	}
	if n.cur.Load() == nil && n.upper { // dead; it stays open from here on
		c, err := fs.openContent(n)
		if err != nil {
			return err
		}
		n.cur.Store(c)
	}
	c := n.cur.Load()
	if c == nil || c.file == nil {
		return unix.ESTALE
	}
	fd, _ := c.file.Plain()
	return do(object{d: fs.upper, fd: fd})
}

func (o object) chown(uid, gid int) error {
	if o.fd >= 0 {
		return o.d.FChown(o.fd, uid, gid)
	}
	return o.d.Chown(o.path, uid, gid)
}

func (o object) chmod(mode uint32) error {
	if o.fd >= 0 {
		return o.d.FChmod(o.fd, mode)
	}
	return o.d.Chmod(o.path, mode)
}

func (o object) utimes(at, mt unix.Timespec) error {
	if o.fd >= 0 {
		return futimens(o.fd, at, mt)
	}
	return o.d.Utimes(o.path, [2]unix.Timespec{at, mt})
}

func (o object) stat() (unix.Stat_t, error) {
	if o.fd >= 0 {
		return o.d.FStat(o.fd)
	}
	return o.d.Stat(o.path)
}

func (o object) setxattr(name string, v []byte, flags int) error {
	if o.fd >= 0 {
		return unix.Fsetxattr(o.fd, name, v, flags)
	}
	return o.d.Setxattr(o.path, name, v, flags)
}

func (o object) removexattr(name string) error {
	if o.fd >= 0 {
		return unix.Fremovexattr(o.fd, name)
	}
	return o.d.Removexattr(o.path, name)
}
