package union

import (
	"errors"
	"slices"
	"strings"

	"lamina/layer"

	"golang.org/x/sys/unix"
)

// stored is what the layers call an attribute: overlayfs's own namespace is escaped, so that a union can lie on a union.
func (fs *FS) stored(name string) string {
	if rest, ok := strings.CutPrefix(name, fs.prefix); ok {
		return fs.prefix + "overlay." + rest
	}
	return name
}

// shown is the reverse of stored; false for overlay's own attributes.
func (fs *FS) shown(name string) (string, bool) {
	if rest, ok := strings.CutPrefix(name, fs.prefix); ok {
		rest, ok = strings.CutPrefix(rest, "overlay.")
		return fs.prefix + rest, ok
	}
	return name, true
}

// xattrAt says where the attributes of a node are. The caller holds tree.
func (fs *FS) xattrAt(n *Node) (layer.Layer, string, error) {
	if n.upper {
		return asLayer(fs.upperAt(n))
	}
	return fs.lowers[n.stack[0].layer], n.stack[0].path, nil
}

func asLayer(d *layer.Dir, path string, err error) (layer.Layer, string, error) { return d, path, err }

// Getxattr returns ENODATA if there is no such attribute.
func (fs *FS) Getxattr(n *Node, name string) ([]byte, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	if n.dead && n.upper {
		return fs.namelessXattr(n, func(fd int, buf []byte) (int, error) { return unix.Fgetxattr(fd, fs.stored(name), buf) })
	}
	if name == capability && n.upper && n.noCaps.Load() {
		return nil, unix.ENODATA // the kernel asks before a change of owner, and before the first write
	}
	if !n.upper && n.bare {
		return nil, unix.ENODATA
	}
	l, path, err := fs.xattrAt(n)
	if err != nil {
		return nil, err
	}
	return l.Getxattr(path, fs.stored(name))
}

// namelessXattr asks the descriptor of a file that has no name: ENODATA if nobody has it open any more.
func (fs *FS) namelessXattr(n *Node, get func(fd int, buf []byte) (int, error)) ([]byte, error) {
	buf := make([]byte, 64<<10) // the most that the kernel gives
	size := 0
	err := fs.withObject(n, func(o object) (err error) {
		size, err = get(o.fd, buf)
		return err
	})
	if errors.Is(err, unix.ESTALE) {
		err = unix.ENODATA
	}
	if err != nil {
		return nil, err
	}
	return buf[:size], nil
}

// Listxattr names the attributes, overlay's own left out.
func (fs *FS) Listxattr(n *Node) ([]string, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	stored, err := fs.listStored(n)
	if err != nil {
		return nil, err
	}
	names := slices.Grow([]string(nil), len(stored))
	for _, s := range stored {
		if name, ok := fs.shown(s); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

func (fs *FS) listStored(n *Node) ([]string, error) {
	if n.dead && n.upper {
		list, err := fs.namelessXattr(n, unix.Flistxattr)
		if errors.Is(err, unix.ENODATA) || len(list) == 0 {
			return nil, nil
		}
		return strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00"), err
	}
	l, path, err := fs.xattrAt(n)
	if err != nil {
		return nil, err
	}
	return l.Listxattr(path)
}

// Setxattr sets an attribute; flags are XATTR_CREATE and XATTR_REPLACE. killSGID: the caller sets an ACL and may not
// keep the set-group-id bit.
func (fs *FS) Setxattr(n *Node, name string, value []byte, flags int, killSGID bool) error {
	return fs.changeXattr(n, func(o object) error {
		if err := o.setxattr(fs.stored(name), value, flags); err != nil || !killSGID {
			return err
		}
		st, err := o.stat()
		if err == nil && st.Mode&unix.S_ISGID != 0 {
			err = o.chmod(st.Mode & 0o7777 &^ unix.S_ISGID)
		}
		return err
	})
}

// Removexattr removes an attribute. An ACL that is not there is removed successfully, as on any filesystem with ACLs.
func (fs *FS) Removexattr(n *Node, name string) error {
	if fs.upper != nil { // do not copy up for an attribute that is not there
		_, err := fs.Getxattr(n, name)
		if errors.Is(err, unix.ENODATA) && (name == aclAccess || name == aclDefault) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return fs.changeXattr(n, func(o object) error { return o.removexattr(fs.stored(name)) })
}

func (fs *FS) changeXattr(n *Node, change func(object) error) error {
	if err := fs.copyUp(n); err != nil {
		return err
	}
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	defer n.heritage.Store(nil)
	return fs.withObject(n, func(o object) error {
		n.noCaps.Store(false) // under the lock that dropPriv finds it clean under
		n.privClean.Store(false)
		return change(o)
	})
}

// heritage is what new objects get from their directory.
type heritage struct {
	acl    bool // a default ACL, which stands in for the umask
	setGID bool
	gid    uint32 // with setGID
}

// heritageOf asks once, until the directory's attributes change. The caller holds tree for writing, and the directory is
// in the upper layer at path.
func (fs *FS) heritageOf(dir *Node, path string) (*heritage, error) {
	if h := dir.heritage.Load(); h != nil {
		return h, nil
	}
	_, err := fs.upper.Getxattr(path, aclDefault)
	h := &heritage{acl: err == nil}
	if err != nil {
		if e := errnoOf(err); e != unix.ENODATA && e != unix.EOPNOTSUPP {
			return nil, err
		}
	}
	st, err := fs.upper.Stat(path)
	if err != nil {
		return nil, err
	}
	h.setGID, h.gid = st.Mode&unix.S_ISGID != 0, st.Gid
	dir.heritage.Store(h)
	return h, nil
}

const (
	aclDefault = "system.posix_acl_default"
	aclAccess  = "system.posix_acl_access"
)

// Readlink gives a symbolic link's target.
func (fs *FS) Readlink(n *Node) (string, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	if n.dead && n.upper {
		return n.deadTarget()
	}
	l, path, err := fs.xattrAt(n)
	if err != nil {
		return "", err
	}
	return l.Readlink(path)
}

func (n *Node) deadTarget() (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.target == "" {
		return "", unix.ESTALE
	}
	return n.target, nil
}
