package union

import (
	"errors"

	"lamina/layer"

	"golang.org/x/sys/unix"
)

// Mkdir makes a directory.
func (fs *FS) Mkdir(dir *Node, name string, mode uint32, c Cred) (*Node, error) {
	return fs.create(dir, name, unix.S_IFDIR|mode, c, func(d *layer.Dir, path string, mode uint32) (int, error) {
		return -1, d.Mkdir(path, mode&0o7777)
	})
}

// Mknod makes a regular file, fifo, socket or device node. A character device 0:0 is overlayfs's whiteout and is refused
// with EPERM, as kernel overlayfs refuses it.
func (fs *FS) Mknod(dir *Node, name string, mode, rdev uint32, c Cred) (*Node, error) {
	if mode&unix.S_IFMT == unix.S_IFCHR && rdev == 0 {
		return nil, unix.EPERM
	}
	if mode&unix.S_IFMT == 0 {
		mode |= unix.S_IFREG
	}
	return fs.create(dir, name, mode, c, func(d *layer.Dir, path string, mode uint32) (int, error) {
		return -1, d.Mknod(path, mode, uint64(rdev))
	})
}

// Symlink makes a symbolic link.
func (fs *FS) Symlink(dir *Node, name, target string, c Cred) (*Node, error) {
	c.Umask = 0
	return fs.create(dir, name, unix.S_IFLNK|0o777, c, func(d *layer.Dir, path string, _ uint32) (int, error) {
		return -1, d.Symlink(target, path)
	})
}

// Create makes a regular file and opens it; without O_EXCL it opens the one that is there.
func (fs *FS) Create(dir *Node, name string, flags, mode uint32, c Cred) (*Node, *Handle, error) {
	fd := -1
	n, err := fs.create(dir, name, unix.S_IFREG|mode&0o7777, c, func(d *layer.Dir, path string, mode uint32) (_ int, err error) {
		fd, err = d.OpenFile(path, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, mode&0o7777)
		return fd, err
	})
	if errors.Is(err, unix.EEXIST) && flags&unix.O_EXCL == 0 {
		if n, err = fs.Lookup(dir, name); err != nil {
			return nil, nil, err
		}
		h, err := fs.Open(n, flags)
		if err != nil {
			fs.Forget(n.id, 1)
		}
		return n, h, err
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, nil, err
	}
	return n, fs.openNew(n, fd, flags&^unix.O_EXCL), nil
}

// openNew opens a file that was just made, through the descriptor that made it.
func (fs *FS) openNew(n *Node, fd int, flags uint32) *Handle {
	f := fs.cfg.Engine.OpenOrdinary(fs.store(fd))
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cur.Load() != nil { // somebody found the name and was faster
		f.Close()
	} else {
		n.cur.Store(&content{file: f})
	}
	n.hold()
	n.opens++
	return &Handle{n: n, flags: flags}
}

// Tmpfile makes a nameless file (O_TMPFILE), which Link may name.
func (fs *FS) Tmpfile(dir *Node, flags, mode uint32, c Cred) (*Node, *Handle, error) {
	if fs.upper == nil {
		return nil, nil, unix.EROFS
	}
	fs.tree.Lock()
	n, fd, err := fs.tmpfile(dir, mode, c)
	fs.tree.Unlock()
	if err != nil {
		return nil, nil, err
	}
	return n, fs.openNew(n, fd, flags), nil
}

func (fs *FS) tmpfile(dir *Node, mode uint32, c Cred) (*Node, int, error) {
	if dir.dead {
		return nil, -1, unix.ENOENT
	}
	if err := fs.copyUpDir(dir); err != nil {
		return nil, -1, err
	}
	path := dir.path()
	o, err := fs.ownership(dir, path, unix.S_IFREG|mode&0o7777, c)
	if err != nil {
		return nil, -1, err
	}
	fd, err := fs.upper.Tmpfile(path, o.born()&0o7777)
	if err != nil {
		return nil, -1, err
	}
	st, err := o.apply(object{d: fs.upper, fd: fd})
	if err != nil {
		unix.Close(fd)
		return nil, -1, err
	}
	k := key{fs.upper.FS(), st.Ino}
	n := &Node{fs: fs, ino: fs.inoOf(k.fs, k.ino), mode: unix.S_IFREG, key: k, upper: true, upIno: st.Ino, dead: true, unborn: true, refs: 1, last: st}
	fs.tab.Lock()
	fs.register(n)
	fs.tab.Unlock()
	if !n.rec.None() {
		if err := fs.keepNameless(n, fd); err != nil {
			unix.Close(fd)
			fs.Forget(n.id, 1)
			return nil, -1, err
		}
		n.kept = &keeper{fd: -1}
	}
	return n, fd, nil
}

// maker makes an object with a mode, and returns a descriptor of it or -1. EEXIST: something is there.
type maker func(d *layer.Dir, path string, mode uint32) (fd int, err error)

// create makes an object that is not there yet. Where a whiteout stands in its place the object is made in the workdir
// and exchanged for it in one step: at no time does the hidden lower object show.
func (fs *FS) create(dir *Node, name string, mode uint32, c Cred, make maker) (*Node, error) {
	if fs.upper == nil {
		return nil, unix.EROFS
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	if dir.upper && len(dir.stack) == 0 && !dir.dead {
		// Whatever the name could be is in the upper layer, and then making another fails. What it is matters only then.
		st, err := fs.makeHere(dir, name, mode, c, make)
		if err == nil {
			return fs.adoptMade(dir, name, st)
		}
		if !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	f, err := fs.resolve(dir, name)
	if err != nil {
		return nil, err
	}
	if f.exists {
		return nil, unix.EEXIST
	}
	if err := fs.copyUpDir(dir); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if f.whiteout {
		if err = fs.replaceWhiteout(dir, name, mode, c, make); err == nil {
			st, err = fs.upper.Stat(join(dir.path(), name)) // its way there has changed it
		}
	} else {
		st, err = fs.makeHere(dir, name, mode, c, make)
	}
	if err != nil {
		return nil, err
	}
	return fs.adoptMade(dir, name, st)
}

// makeHere makes an object where nothing is. The caller holds tree for writing.
func (fs *FS) makeHere(dir *Node, name string, mode uint32, c Cred, make maker) (unix.Stat_t, error) {
	parent := dir.path()
	o, err := fs.ownership(dir, parent, mode, c)
	if err != nil {
		return unix.Stat_t{}, err
	}
	path := join(parent, name)
	fd, err := make(fs.upper, path, o.born())
	if err != nil {
		return unix.Stat_t{}, err
	}
	st, err := o.apply(object{d: fs.upper, path: path, fd: fd})
	if err != nil {
		removeObject(fs.upper, path, mode)
	}
	return st, err
}

// adoptMade is adopt of an object that was just made.
func (fs *FS) adoptMade(dir *Node, name string, st unix.Stat_t) (*Node, error) {
	dir.list.Store(nil)
	made := found{exists: true, upper: true, st: st, lpath: join(dir.lpath, name)}
	n, err := fs.adopt(dir, name, &made)
	if err != nil {
		return nil, err
	}
	n.privClean.Store(n.noCaps.Load() && !setID(st.Mode))
	n.last = st
	if h := dir.heritage.Load(); isDir(st.Mode) && h != nil { // a default ACL passes on, and is not there otherwise
		n.heritage.Store(&heritage{acl: h.acl, setGID: st.Mode&unix.S_ISGID != 0, gid: st.Gid})
	}
	return n, nil
}

func removeObject(d *layer.Dir, path string, mode uint32) {
	if isDir(mode) {
		d.Rmdir(path)
	} else {
		d.Unlink(path)
	}
}

func (fs *FS) replaceWhiteout(dir *Node, name string, mode uint32, c Cred, make maker) error {
	parent := dir.path()
	o, err := fs.ownership(dir, parent, mode, c)
	if err != nil {
		return err
	}
	path, tmp := join(parent, name), fs.tmpName()
	if o.acl { // a directory with the parent's default ACL, so that the new object inherits it
		if err := fs.work.Mkdir(tmp, 0o700); err != nil {
			return err
		}
		holder := tmp
		defer func() { fs.work.Rmdir(holder); fs.work.Invalidate(holder) }()
		acl, err := fs.upper.Getxattr(parent, aclDefault)
		if err == nil {
			err = fs.work.Setxattr(tmp, aclDefault, acl, 0)
		}
		if err != nil {
			return err
		}
		tmp = join(tmp, "new")
	}
	fd, err := make(fs.work, tmp, o.born())
	if err != nil {
		return err
	}
	_, err = o.apply(object{d: fs.work, path: tmp, fd: fd})
	if err == nil && isDir(o.mode) {
		if err = fs.setOpaque(fs.work, tmp); err == nil {
			err = layer.Rename(fs.work, tmp, fs.upper, path, unix.RENAME_EXCHANGE)
		}
		if err == nil {
			fs.work.Invalidate(tmp)
			fs.discardFile(tmp) // now the whiteout
			return nil
		}
		if errors.Is(err, unix.ENOENT) { // the whiteout is a file of another name, which stays
			err = layer.Rename(fs.work, tmp, fs.upper, path, unix.RENAME_NOREPLACE)
		}
	} else if err == nil {
		err = layer.RenameFile(fs.work, tmp, fs.upper, path, 0)
	}
	if err != nil {
		removeObject(fs.work, tmp, o.mode)
	}
	return err
}

func (fs *FS) setOpaque(d *layer.Dir, path string) error {
	return d.Setxattr(path, fs.prefix+layer.XattrOpaque, []byte("y"), 0)
}

// ownership is what a new object gets from its creator and its directory.
type ownership struct {
	uid, gid uint32
	mode     uint32 // with type bits; the umask applied where no default ACL stands in for it
	acl      bool   // the directory has a default ACL
	inherit  bool   // gid is the directory's, because that has S_ISGID
}

func (fs *FS) ownership(dir *Node, parent string, mode uint32, c Cred) (ownership, error) {
	h, err := fs.heritageOf(dir, parent)
	if err != nil {
		return ownership{}, err
	}
	o := ownership{uid: c.UID, gid: c.GID, mode: mode, acl: h.acl}
	if !h.acl {
		o.mode &^= c.Umask & 0o777
	}
	if h.setGID {
		o.gid, o.inherit = h.gid, true
		if isDir(mode) {
			o.mode |= unix.S_ISGID
		}
	}
	return o, nil
}

// born is the mode that an object is made with: it gets set-id bits only when it has its owner, or a crash in between
// could leave a file that is set-id for the server's user.
func (o *ownership) born() uint32 { return o.mode &^ (unix.S_ISUID | unix.S_ISGID) }

// apply gives a new object its owner, and then its set-id bits. It returns the object's attributes.
func (o *ownership) apply(u object) (unix.Stat_t, error) {
	special := o.mode & (unix.S_ISUID | unix.S_ISGID | unix.S_ISVTX)
	isLink := o.mode&unix.S_IFMT == unix.S_IFLNK
	st, err := u.stat()
	if err != nil {
		return st, err
	}
	if st.Uid != o.uid || st.Gid != o.gid {
		if err := u.chown(int(o.uid), int(o.gid)); err != nil {
			return st, err
		}
	} else if special == 0 || st.Mode&0o7000 == special || isLink {
		return st, nil
	}
	if special != 0 && !isLink { // a change of owner drops them, and mkdir takes no set-id bits
		if err := u.chmod(st.Mode&0o777 | special); err != nil {
			return st, err
		}
	}
	return u.stat()
}

// Link gives a file another name.
func (fs *FS) Link(n, dir *Node, name string) (*Node, error) {
	if isDir(n.mode) {
		return nil, unix.EPERM
	}
	if fs.upper == nil {
		return nil, unix.EROFS
	}
	if err := fs.copyUp(n); err != nil {
		return nil, err
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	if n.dead && !n.unborn {
		return nil, unix.ENOENT // as link(2) says of a file whose last name is gone
	}
	f, err := fs.resolve(dir, name)
	if err != nil {
		return nil, err
	}
	if f.exists {
		return nil, unix.EEXIST
	}
	if err := fs.copyUpDir(dir); err != nil {
		return nil, err
	}
	if err := fs.relate(n); err != nil {
		return nil, err
	}
	if n.isSketch() {
		if err := fs.setRedirect(n); err != nil {
			return nil, err
		}
	}
	to, path, tmp := fs.upper, join(dir.path(), name), ""
	if f.whiteout {
		tmp = fs.tmpName()
		to, path = fs.work, tmp
	}
	if err := fs.linkTo(n, to, path); err != nil {
		return nil, err
	}
	if tmp != "" {
		if err := layer.RenameFile(fs.work, tmp, fs.upper, join(dir.path(), name), 0); err != nil {
			fs.work.Unlink(tmp)
			return nil, err
		}
	}
	dir.list.Store(nil)
	unborn := n.unborn
	n.mu.Lock()
	n.dead, n.unborn = false, false
	n.mu.Unlock()
	fs.tab.Lock()
	if fs.byKey[n.key] == nil {
		fs.byKey[n.key] = n
	}
	n.addRefs(1)
	n.addLink(dir, name)
	fs.tab.Unlock()
	n.rememberLife() // only now: a successor finds the file by its name, or else by what was kept
	if unborn && !n.rec.None() {
		n.unkeep()
	}
	return n, nil
}

func (fs *FS) linkTo(n *Node, to *layer.Dir, path string) error {
	return fs.withObject(n, func(o object) error {
		if o.fd >= 0 {
			return to.LinkFD(o.fd, path)
		}
		return layer.LinkBetween(o.d, o.path, to, path)
	})
}

func (n *Node) isSketch() bool {
	if c := n.cur.Load(); c != nil && c.file != nil {
		return c.file.Sketch()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sketch
}

// setRedirect writes down where the lower counterpart lies before the object leaves the place where its name says so.
// The caller holds tree for writing.
func (fs *FS) setRedirect(n *Node) error {
	if n.redir {
		return nil
	}
	value := "/" + n.lpath
	if len(value) >= unix.PathMax {
		return unix.EXDEV // overlay.redirect holds a path; beyond PATH_MAX mv(1) copies
	}
	err := fs.withObject(n, func(o object) error {
		return o.setxattr(fs.prefix+layer.XattrRedirect, []byte(value), 0)
	})
	n.redir = err == nil
	return err
}
