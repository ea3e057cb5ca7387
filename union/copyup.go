package union

import (
	"errors"
	"fmt"
	"strings"
	"unsafe"

	"lamina/block"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// maxChain bounds how many sketches may lie over one another before a copy-up brings the whole file: a read of an
// untouched block goes through all of them.
const maxChain = 16

// prepared is an object made for the upper layer, complete with owner, mode, attributes and times, but without its
// name: a nameless file, or one under a temporary name in the workdir.
type prepared struct {
	fd     int         // O_RDWR of a regular file, or -1
	file   *block.File // where it was opened on the way; fd is its own then
	tmp    string      // in the workdir, or ""
	mode   uint32      // that the file was made with
	ino    uint64
	size   int64
	sketch bool
	setID  bool // carries set-id bits
	caps   bool // carries capabilities
}

func (fs *FS) abandon(p *prepared) {
	switch {
	case p.file != nil:
		p.file.Abandon()
	case p.fd >= 0:
		unix.Close(p.fd)
	}
	if p.tmp != "" {
		fs.work.Unlink(p.tmp)
	}
}

// purpose says what a file is copied up for: what can be done on the way costs less than what is done afterwards.
type purpose struct {
	truncate bool     // to set the size to 0: not even a sketch is needed
	open     bool     // to open it for writing
	sparing  bool     // there was no space for the whole of a small file
	change   *SetAttr // to change its owner, mode or times
}

// copyUp materialises a file in the upper layer. Regular files become sketches: no data is copied.
func (fs *FS) copyUp(n *Node) error {
	_, err := fs.copyUpTo(n, purpose{})
	return err
}

// copyUpTo is copyUp for a purpose, and says whether that has been served: it has not if the file was in the upper layer
// already. A file opened on the way has one more descriptor.
func (fs *FS) copyUpTo(n *Node, why purpose) (served bool, err error) {
	if fs.upper == nil {
		return false, unix.EROFS
	}
	if isDir(n.mode) {
		fs.tree.Lock()
		defer fs.tree.Unlock()
		return false, fs.copyUpDir(n)
	}
	n.cu.Lock()
	defer n.cu.Unlock()
	fs.tree.RLock()
	done, detached := n.upper, n.detached
	fs.tree.RUnlock()
	switch {
	case detached:
		return false, unix.ESTALE
	case done:
		return false, nil
	}
	p, err := fs.prepare(n, why)
	if why.open && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
		why.sparing = true
		p, err = fs.prepare(n, why)
	}
	if err != nil {
		return false, err
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	err = fs.install(n, p, why.open)
	return err == nil, err
}

// install gives the prepared object its name and makes the node an upper one; open descriptors go on with the new file,
// and open counts one more. What can fail comes before the name is given. The caller holds tree for writing.
func (fs *FS) install(n *Node, p *prepared, open bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	old := n.cur.Load()
	if n.dead && old == nil && !open {
		fs.abandon(p)
		return unix.ESTALE // its last name and its last descriptor are gone
	}
	var next *content
	if old != nil || open {
		if err := fs.openPrepared(n, p); err != nil {
			fs.abandon(p)
			return err
		}
		next = &content{file: p.file, prev: old}
	}
	if err := fs.place(n, p); err != nil {
		fs.abandon(p)
		return err
	}
	n.upper, n.upIno, n.unsyncd = true, p.ino, true
	n.noCaps.Store(!p.caps)
	n.privClean.Store(!p.caps && !p.setID)
	if isReg(n.mode) {
		n.sketch, n.stack = p.sketch, n.stackOf(p)
		if !p.sketch {
			n.size = p.size
		}
	}
	switch {
	case next != nil:
		n.cur.Store(next)
	case p.fd >= 0:
		unix.Close(p.fd)
	}
	if open {
		n.opens++
		n.hold()
	}
	return nil
}

// openPrepared opens the prepared file unless that was done on the way.
func (fs *FS) openPrepared(n *Node, p *prepared) (err error) {
	if p.file != nil {
		return nil
	}
	if p.file, err = fs.cfg.Engine.Open(fs.store(p.fd), fs.lowerOf(n.stackOf(p))); err != nil {
		p.fd = -1 // Engine.Open has closed it
	}
	return err
}

// stackOf is where the node's data lies besides the prepared object.
func (n *Node) stackOf(p *prepared) []lowerRef {
	if p.sketch {
		return n.stack
	}
	return nil
}

// prepare makes the upper object of a lower file. It takes no lock of the tree's: the lower is immutable.
func (fs *FS) prepare(n *Node, why purpose) (*prepared, error) {
	ref := n.stack[0]
	l := fs.lowers[ref.layer]
	low, st, err := fs.lookBelow(n, why)
	if err != nil {
		return nil, err
	}
	if low != nil {
		defer low.Close()
	}
	p := &prepared{fd: -1}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if err = fs.newFile(p, st.Mode&0o777); err != nil {
			return nil, err
		}
		err = fs.fill(n, p, &st, low, why)
	case unix.S_IFLNK:
		var target string
		if target, err = l.Readlink(ref.path); err != nil {
			return nil, err
		}
		p.tmp = fs.tmpName()
		err = fs.work.Symlink(target, p.tmp)
	default:
		p.tmp = fs.tmpName()
		err = fs.work.Mknod(p.tmp, st.Mode, st.Rdev)
	}
	if err == nil {
		err = fs.copyMeta(l, ref.path, &st, p, n.bare, why.change)
	}
	if err == nil && !p.sketch {
		err = fs.setOrigin(p, key{l.FS(), st.Ino})
	}
	if err == nil && fs.cfg.Index && st.Nlink > 1 && fs.canMark(st.Mode) {
		err = p.setxattr(fs, fs.prefix+layer.XattrNlink, fmt.Appendf(nil, "=%d", st.Nlink))
	}
	if err == nil {
		err = p.setTimes(fs, timesOf(&st, why.change))
	}
	if err == nil && (p.ino == 0 || !p.sketch) {
		var up unix.Stat_t
		up, err = p.stat(fs)
		p.ino, p.size = up.Ino, up.Size
	}
	if err != nil {
		fs.abandon(p)
		return nil, err
	}
	return p, nil
}

// wholeMax is how long a lower file may be, in bytes, to be copied when it is opened for writing. Measured on ext4: up to
// here copying costs less than what a sketch needs besides, which is a request for every write and a copier's turn.
const wholeMax = 64 << 10

// lookBelow gives the attributes of a node's lower object, and the open file if the whole of it is to be copied.
func (fs *FS) lookBelow(n *Node, why purpose) (layer.File, unix.Stat_t, error) {
	ref := n.stack[0]
	l := fs.lowers[ref.layer]
	whole := fs.cfg.CopyUp == CopyUpAuto && why.open && !why.truncate && !why.sparing &&
		isReg(n.mode) && !ref.sketch && n.size > 0 && n.size <= wholeMax
	if !whole {
		st, err := l.Stat(ref.path)
		return nil, st, err
	}
	low, err := l.Open(ref.path)
	if err != nil {
		return nil, unix.Stat_t{}, err
	}
	st, err := low.Stat()
	if err != nil {
		low.Close()
		return nil, st, err
	}
	return low, st, nil
}

// timesOf is the lower file's times, or the ones to be set.
func timesOf(st *unix.Stat_t, change *SetAttr) [2]unix.Timespec {
	ts := [2]unix.Timespec{st.Atim, st.Mtim}
	if change != nil && change.Atime != nil {
		ts[0] = *change.Atime
	}
	if change != nil && change.Mtime != nil {
		ts[1] = *change.Mtime
	}
	return ts
}

// newFile gives p an empty regular file for reading and writing, nameless where the filesystem can. mode is what it is
// made with if nobody made one before.
func (fs *FS) newFile(p *prepared, mode uint32) (err error) {
	if fs.noTmpfile {
		p.tmp, p.mode = fs.tmpName(), mode
		p.fd, err = fs.work.OpenFile(p.tmp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, mode)
		return err
	}
	if s, ok := fs.spares.take(); ok {
		p.fd, p.ino, p.mode = s.fd, s.ino, spareMode
		return nil
	}
	p.mode = mode
	p.fd, err = fs.work.Tmpfile(tmpDir, mode)
	return err
}

// fill gives a new upper file its contents: the whole of low, a clone, a sketch, or a full copy that is on disk before it
// gets a name.
func (fs *FS) fill(n *Node, p *prepared, st *unix.Stat_t, low layer.File, why purpose) (err error) {
	id := block.Ident{Size: st.Size, MtimeNS: st.Mtim.Nano(), FS: fs.lowers[n.stack[0].layer].FS(), Ino: st.Ino}
	if low != nil && st.Size > 0 && st.Size <= wholeMax {
		p.sketch = true // as long as it has a header
		if p.file, err = fs.cfg.Engine.CreateWhole(fs.store(p.fd), id, low); err != nil {
			p.fd = -1
		}
		return err
	}
	if why.truncate || st.Size == 0 && !n.stack[0].sketch {
		return nil
	}
	mode := fs.cfg.CopyUp
	lowerSketch := n.stack[0].sketch
	if mode == CopyUpAuto || mode == CopyUpClone {
		err := unix.EOPNOTSUPP
		if !lowerSketch {
			err = fs.clone(n, p.fd)
		}
		switch {
		case err == 0:
			return nil
		case mode == CopyUpClone && !lowerSketch:
			return fmt.Errorf("copyup=clone: %s: cannot clone into the upper layer (%w): use copyup=auto, or put upper and lowers on one XFS or btrfs", n.stack[0].path, err)
		}
	}
	depth := 0
	for _, r := range n.stack {
		if r.sketch {
			depth++
		}
	}
	if mode == CopyUpFull || depth >= maxChain {
		return fs.copyAll(n, p.fd)
	}
	if lowerSketch {
		id.Size = n.size
	}
	p.sketch = true
	if !why.open {
		return fs.cfg.Engine.Create(fs.store(p.fd), id)
	}
	if p.file, err = fs.cfg.Engine.CreateOpen(fs.store(p.fd), id, fs.lowerOf(n.stack)); err != nil {
		p.fd = -1
	}
	return err
}

// dup gives a second descriptor of the same open file, for an owner that closes it.
func dup(fd int) int {
	second, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1 // every use of it reports EBADF
	}
	return second
}

// clone shares the lower file's extents. The filesystem writes the source's dirty pages first, so a clone is as durable
// as its metadata. A layer that cannot be cloned from is not asked again.
func (fs *FS) clone(n *Node, fd int) unix.Errno {
	ref := n.stack[0]
	never := &fs.noClone[ref.layer]
	if e := unix.Errno(never.Load()); e != 0 {
		return e
	}
	f, err := fs.lowers[ref.layer].Open(ref.path)
	if err != nil {
		return errnoOf(err)
	}
	defer f.Close()
	src, ok := f.(layer.FDer)
	if !ok {
		return unix.EOPNOTSUPP
	}
	err = unix.IoctlFileClone(fd, src.FD())
	if err == nil {
		return 0
	}
	e := errnoOf(err)
	if e == unix.EOPNOTSUPP || e == unix.EXDEV || e == unix.ENOTTY { // of the filesystems, not of this file
		never.Store(uint32(e))
	}
	return e
}

// copyAll brings the whole file, holes as holes, and syncs it: nothing of it could be told from zeros after a crash.
func (fs *FS) copyAll(n *Node, fd int) error {
	src, err := fs.openLower(n.stack)
	if err != nil {
		return err
	}
	defer src.Close()
	dst := fs.store(dup(fd))
	defer dst.Close()
	return block.CopyAll(dst, src)
}

// copyMeta gives the prepared object, which belongs to the server, the lower one's owner, mode and attributes, but for
// those that change says otherwise. bare: it is known to have no attributes. Order matters: a change of owner drops set-id
// bits and capabilities.
func (fs *FS) copyMeta(l layer.Layer, path string, st *unix.Stat_t, p *prepared, bare bool, change *SetAttr) error {
	uid, gid, mode := st.Uid, st.Gid, st.Mode&0o7777
	chowned := false
	if change != nil {
		chowned = change.UID != nil || change.GID != nil
		uid, gid = orElse(change.UID, uid), orElse(change.GID, gid)
		if chowned && st.Mode&unix.S_IFMT == unix.S_IFREG {
			mode = afterChown(mode)
		}
		mode = orElse(change.Mode, mode) & 0o7777
	}
	p.setID = setID(mode)
	if uid != fs.bornUID || gid != fs.bornGID || fs.work.Override() != layer.OverrideNone {
		if err := p.chown(fs, uid, gid); err != nil {
			return err
		}
	}
	var names []string
	if !bare {
		var err error
		if names, err = l.Listxattr(path); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	for _, name := range names {
		if fs.private(name) || chowned && name == capability {
			continue
		}
		v, err := l.Getxattr(path, name)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		p.caps = p.caps || name == capability
		if err != nil {
			return err
		}
		if err := p.setxattr(fs, name, v); err != nil {
			return fmt.Errorf("%s: cannot copy attribute %s to the upper layer: %w", path, name, err)
		}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	if p.fd >= 0 && mode == p.mode && fs.work.Override() == layer.OverrideNone {
		return nil
	}
	return p.chmod(fs, mode)
}

func orElse(v *uint32, otherwise uint32) uint32 {
	if v == nil {
		return otherwise
	}
	return *v
}

// afterChown is what chown(2) leaves of a regular file's mode, whoever calls it.
func afterChown(mode uint32) uint32 {
	mode &^= unix.S_ISUID
	if mode&unix.S_IXGRP != 0 {
		mode &^= unix.S_ISGID
	}
	return mode
}

// private says whether an attribute as a layer stores it is overlayfs's own, and so neither shown nor copied. What a
// user of the union calls <prefix>X is stored as <prefix>overlay.X (Documentation/filesystems/overlayfs.rst, nesting).
func (fs *FS) private(name string) bool {
	rest, ok := strings.CutPrefix(name, fs.prefix)
	return ok && !strings.HasPrefix(rest, "overlay.")
}

// canMark tells whether an object of this type can carry overlay's attributes: user.* exists on regular files and
// directories only.
func (fs *FS) canMark(mode uint32) bool { return fs.cfg.NS != layer.User || isReg(mode) || isDir(mode) }

func (fs *FS) setOrigin(p *prepared, k key) error {
	err := p.setxattr(fs, fs.prefix+layer.XattrOrigin, block.Ident{FS: k.fs, Ino: k.ino}.Origin())
	if errors.Is(err, unix.EPERM) && fs.cfg.NS == layer.User {
		return nil // see canMark: the inode number of this special file is another one in the next mount
	}
	return err
}

// place gives a prepared object its name: the index's where the lower file has several, then the one in the tree. The
// caller holds tree for writing.
func (fs *FS) place(n *Node, p *prepared) error {
	l, named := fs.firstLink(n)
	if n.dead || !named {
		if p.fd >= 0 && !n.rec.None() {
			if err := fs.keepNameless(n, p.fd); err != nil {
				return err
			}
			n.kept = &keeper{fd: -1} // install holds the lock
		}
		if p.tmp != "" { // an unlinked file that only open descriptors reach
			return fs.work.Unlink(p.tmp)
		}
		return nil
	}
	if err := fs.copyUpDir(l.dir); err != nil {
		return err
	}
	if fs.hasSeveralNames(n) {
		return fs.placeIndexed(n, p, l)
	}
	return fs.keepTimes(l.dir, func(dir string) error { return fs.link(p, fs.upper, join(dir, l.name)) })
}

// placeIndexed is place for a file with several names. The index's link comes first: from there on every name shows the
// upper file.
func (fs *FS) placeIndexed(n *Node, p *prepared, l link) error {
	index := indexPath(n.key)
	if err := fs.link(p, fs.work, index); err != nil {
		return err
	}
	err := fs.keepTimes(l.dir, func(dir string) error {
		return layer.LinkBetween(fs.work, index, fs.upper, join(dir, l.name))
	})
	if err == nil {
		n.delta, n.absolute, err = fs.nlinkOf(index, 2)
	}
	if err != nil {
		fs.discardFile(index)
		return err
	}
	n.indexed = true
	return nil
}

func (fs *FS) link(p *prepared, d *layer.Dir, path string) error {
	if p.tmp == "" {
		return d.LinkFD(p.fd, path)
	}
	if err := layer.Rename(fs.work, p.tmp, d, path, unix.RENAME_NOREPLACE); err != nil {
		return err
	}
	p.tmp = ""
	return nil
}

// keepTimes runs f on a directory of the upper layer and puts its times back: copying up is not a change that the
// container made. If only the times cannot be put back, f has still been done, and the caller has to know that.
func (fs *FS) keepTimes(dir *Node, f func(path string) error) error {
	path := dir.path()
	st, err := fs.upper.Stat(path)
	if err != nil {
		return err
	}
	if err := f(path); err != nil {
		return err
	}
	if err := fs.upper.Utimes(path, [2]unix.Timespec{st.Atim, st.Mtim}); err != nil {
		fs.cfg.Logf("/%s: the directory's times could not be put back after a copy-up: %v", path, err)
	}
	return nil
}

// copyUpDir makes a directory and those above it exist in the upper layer. The caller holds tree for writing.
func (fs *FS) copyUpDir(n *Node) error {
	if n.upper {
		return nil
	}
	if fs.upper == nil {
		return unix.EROFS
	}
	if n.dead {
		return unix.ENOENT
	}
	at := n.links[0]
	if err := fs.copyUpDir(at.dir); err != nil {
		return err
	}
	ref := n.stack[0]
	l := fs.lowers[ref.layer]
	st, err := l.Stat(ref.path)
	if err != nil {
		return err
	}
	p := &prepared{fd: -1, tmp: fs.tmpName()}
	if err := fs.work.Mkdir(p.tmp, 0o700); err != nil {
		return err
	}
	err = fs.copyMeta(l, ref.path, &st, p, n.bare, nil)
	if err == nil {
		err = p.setTimes(fs, timesOf(&st, nil))
	}
	var up unix.Stat_t
	if err == nil {
		up, err = p.stat(fs)
	}
	tmp := p.tmp
	if err == nil {
		err = fs.keepTimes(at.dir, func(dir string) error { return fs.link(p, fs.upper, join(dir, at.name)) })
	}
	if err != nil {
		fs.work.Rmdir(tmp)
		return err
	}
	fs.work.Invalidate(tmp)
	n.upper, n.upIno, n.unsyncd = true, up.Ino, true
	return nil
}

// The operations below reach a prepared object by its descriptor if it has one: it may have no name.

func (p *prepared) chown(fs *FS, uid, gid uint32) error {
	if p.fd >= 0 {
		return fs.work.FChown(p.fd, int(uid), int(gid))
	}
	return fs.work.Chown(p.tmp, int(uid), int(gid))
}

func (p *prepared) chmod(fs *FS, mode uint32) error {
	if p.fd >= 0 {
		return fs.work.FChmod(p.fd, mode)
	}
	return fs.work.Chmod(p.tmp, mode)
}

func (p *prepared) setxattr(fs *FS, name string, v []byte) error {
	if p.fd >= 0 {
		return unix.Fsetxattr(p.fd, name, v, 0)
	}
	return fs.work.Setxattr(p.tmp, name, v, 0)
}

func (p *prepared) setTimes(fs *FS, ts [2]unix.Timespec) error {
	if p.fd >= 0 {
		return futimens(p.fd, ts[0], ts[1])
	}
	return fs.work.Utimes(p.tmp, ts)
}

func (p *prepared) stat(fs *FS) (st unix.Stat_t, err error) {
	if p.fd >= 0 {
		return fs.work.FStat(p.fd)
	}
	return fs.work.Stat(p.tmp)
}

// syncUp makes the names that copy-up gave to a file and to the directories above it durable, once.
func (fs *FS) syncUp(n *Node) error {
	for !fs.cfg.Volatile {
		fs.tree.RLock()
		pending := n.unsyncd
		l, ok := fs.firstLink(n)
		fs.tree.RUnlock()
		if !ok || n == fs.root {
			return nil
		}
		if pending {
			if err := fs.syncNames(l.dir); err != nil {
				return err
			}
			fs.tree.Lock()
			n.unsyncd = false
			fs.tree.Unlock()
		}
		n = l.dir
	}
	return nil
}

func futimens(fd int, atime, mtime unix.Timespec) error {
	ts := [2]unix.Timespec{atime, mtime}
	_, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	if e != 0 {
		return e
	}
	return nil
}

func errnoOf(err error) unix.Errno {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return unix.EIO
}
