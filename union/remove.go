package union

import (
	"errors"

	"lamina/layer"

	"golang.org/x/sys/unix"
)

const whiteoutName = workRoot + "/whiteout"

// whiteout puts a whiteout at an empty place. All whiteouts of a mount are links of one device node, as overlayfs's are:
// a link costs less than an inode.
func (fs *FS) whiteout(d *layer.Dir, path string) error {
	err := layer.LinkBetween(fs.work, whiteoutName, d, path)
	if errors.Is(err, unix.EMLINK) {
		err = fs.work.Unlink(whiteoutName)
		if err == nil {
			err = unix.ENOENT
		}
	}
	if errors.Is(err, unix.ENOENT) {
		if err := fs.work.Mknod(whiteoutName, unix.S_IFCHR|0o600, 0); err != nil {
			return err
		}
		err = layer.LinkBetween(fs.work, whiteoutName, d, path)
	}
	return err
}

// Unlink removes a name of a file.
func (fs *FS) Unlink(dir *Node, name string) error {
	if fs.upper == nil {
		return unix.EROFS
	}
	for {
		first, err := fs.unlink(dir, name)
		if first == nil {
			return err
		}
		// One of several names of a lower file: the count of those left needs an upper inode to be kept on.
		err = fs.copyUp(first)
		fs.Forget(first.id, 1)
		if err != nil {
			return err
		}
	}
}

// unlink removes a name, or says which node must be copied up first (with a reference on it).
func (fs *FS) unlink(dir *Node, name string) (*Node, error) {
	fs.tree.Lock()
	defer fs.tree.Unlock()
	f, err := fs.resolve(dir, name)
	if err != nil {
		return nil, err
	}
	if !f.exists {
		return nil, unix.ENOENT
	}
	if isDir(f.st.Mode) {
		return nil, unix.EISDIR
	}
	inUpper := f.upper
	n, err := fs.adopt(dir, name, &f)
	if err != nil {
		return nil, err
	}
	if fs.hasSeveralNames(n) {
		return n, nil
	}
	defer fs.Forget(n.id, 1)
	last := f.st
	if n.upper || n.stack[0].sketch {
		if st, err := fs.attr(n); err == nil { // a damaged file is still to be removed
			last = st
		}
	}
	fs.keep(n, &last)
	defer func() {
		if !n.dead {
			n.unkeep()
		}
	}()
	if n.indexed {
		inUpper, err = true, fs.beforeUnlink(n, dir, name, inUpper)
		if err != nil {
			return nil, err
		}
	}
	if inUpper {
		err = fs.removeUpper(dir, name)
	} else if err = fs.copyUpDir(dir); err == nil {
		err = fs.whiteout(fs.upper, join(dir.path(), name))
	}
	if err != nil {
		return nil, err
	}
	dir.list.Store(nil)
	fs.unnamed(n, dir, name, last)
	return nil, nil
}

// beforeUnlink sees to it that taking a name of an indexed file away is one step that changes both link counts.
func (fs *FS) beforeUnlink(n, dir *Node, name string, inUpper bool) error {
	if !inUpper {
		if err := fs.copyUpDir(dir); err != nil {
			return err
		}
		if err := fs.linkUp(n, join(dir.path(), name)); err != nil {
			return err
		}
	}
	return fs.relate(n)
}

// removeUpper removes a file of the upper layer, leaving a whiteout where the lower layers have the name too.
func (fs *FS) removeUpper(dir *Node, name string) error {
	below, err := fs.visibleBelow(dir, name)
	if err != nil {
		return err
	}
	path := join(dir.path(), name)
	if !below {
		return fs.upper.Unlink(path)
	}
	tmp := fs.tmpName()
	if err := fs.whiteout(fs.work, tmp); err != nil {
		return err
	}
	if err := layer.RenameFile(fs.work, tmp, fs.upper, path, 0); err != nil {
		fs.work.Unlink(tmp)
		return err
	}
	return nil
}

// unnamed records that a file lost a name. was: its attributes before. The caller holds tree for writing.
func (fs *FS) unnamed(n, dir *Node, name string, was Attr) {
	left := was.Nlink - 1
	if !n.upper && !fs.cfg.Index {
		left = 0 // without an index a lower name is a file of its own
	}
	if left == 0 {
		n.die(was)
		if n.indexed {
			fs.discardFile(indexPath(n.key))
		}
	}
	fs.tab.Lock()
	n.dropLink(dir, name)
	if left == 0 {
		fs.unshare(n) // the inode number may be given to a new file
	}
	fs.tab.Unlock()
}

// die marks a node that has no name any more. Open descriptors go on. The caller holds tree for writing.
func (n *Node) die(last Attr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dead = true
	if c := n.cur.Load(); c != nil && c.file != nil {
		c.file.Nameless()
	}
	last.Nlink = 0
	last.Ino = n.ino
	n.last = last
	n.rememberLife()
	n.list.Store(nil)
}

// Rmdir removes an empty directory.
func (fs *FS) Rmdir(dir *Node, name string) error {
	if fs.upper == nil {
		return unix.EROFS
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	f, err := fs.resolve(dir, name)
	if err != nil {
		return err
	}
	if !f.exists {
		return unix.ENOENT
	}
	if !isDir(f.st.Mode) {
		return unix.ENOTDIR
	}
	n, err := fs.adopt(dir, name, &f)
	if err != nil {
		return err
	}
	defer fs.Forget(n.id, 1)
	if err := fs.mustBeEmpty(n); err != nil {
		return err
	}
	last, err := fs.attr(n)
	if err != nil {
		return err
	}
	below := true
	if n.upper {
		if below, err = fs.visibleBelow(dir, name); err != nil {
			return err
		}
	} else if err := fs.copyUpDir(dir); err != nil {
		return err
	}
	path := join(dir.path(), name)
	switch {
	case !n.upper:
		err = fs.whiteout(fs.upper, path)
	case below:
		err = fs.exchangeForWhiteout(path)
	default:
		if err = fs.emptyUpper(n, path); err == nil {
			err = fs.upper.Rmdir(path)
		}
	}
	if err != nil {
		return err
	}
	fs.upper.Invalidate(path)
	dir.list.Store(nil)
	n.die(last)
	fs.tab.Lock()
	n.dropLink(dir, name)
	fs.tab.Unlock()
	return nil
}

func (fs *FS) exchangeForWhiteout(path string) error {
	tmp := fs.tmpName()
	if err := fs.whiteout(fs.work, tmp); err != nil {
		return err
	}
	if err := layer.Rename(fs.work, tmp, fs.upper, path, unix.RENAME_EXCHANGE); err != nil {
		fs.work.Unlink(tmp)
		return err
	}
	fs.upper.Invalidate(path)
	fs.discardLater(tmp)
	return nil
}

func (fs *FS) mustBeEmpty(n *Node) error {
	names, err := fs.merge(n)
	if err == nil && len(names) > 0 {
		err = unix.ENOTEMPTY
	}
	return err
}

// emptyUpper removes the whiteouts from a directory that shows no name, after making it opaque, so that it shows none at
// any time. The caller holds tree for writing.
func (fs *FS) emptyUpper(n *Node, path string) error {
	entries, err := fs.upper.RawReadDir(path)
	if err != nil || len(entries) == 0 {
		return err
	}
	if err := fs.setOpaque(fs.upper, path); err != nil {
		return err
	}
	n.stack = nil
	for _, e := range entries {
		if err := fs.upper.UnlinkIn(path, e.Name); err != nil {
			return err
		}
	}
	return nil
}
