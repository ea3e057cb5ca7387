package union

import (
	"errors"

	"lamina/layer"

	"golang.org/x/sys/unix"
)

// Rename moves a name. flags: RENAME_NOREPLACE or RENAME_EXCHANGE. Lower directories move too: the upper part says in
// overlay.redirect where its lower parts lie.
func (fs *FS) Rename(oldDir *Node, oldName string, newDir *Node, newName string, flags uint32) error {
	if fs.upper == nil {
		return unix.EROFS
	}
	if flags != 0 && flags != unix.RENAME_NOREPLACE && flags != unix.RENAME_EXCHANGE {
		return unix.EINVAL
	}
	for {
		r := rename{fs: fs, old: place{dir: oldDir, name: oldName}, new: place{dir: newDir, name: newName}, exchange: flags == unix.RENAME_EXCHANGE}
		first, err := r.run(flags == unix.RENAME_NOREPLACE)
		if first == nil {
			return err
		}
		err = fs.copyUp(first) // outside the lock, where it may have to copy
		fs.Forget(first.id, 1)
		if err != nil {
			return err
		}
	}
}

// place is one end of a rename.
type place struct {
	dir     *Node
	name    string
	n       *Node // nil: nothing is there
	f       found
	inUpper bool // the upper layer has an object of this name
	below   bool // the lower layers have one
	path    string
}

type rename struct {
	fs       *FS
	old, new place
	exchange bool
}

// run does the rename, or says which file must be copied up first (with a reference on it).
func (r *rename) run(noReplace bool) (*Node, error) {
	fs := r.fs
	fs.tree.Lock()
	defer fs.tree.Unlock()
	defer r.release()
	if err := r.look(&r.old); err != nil {
		return nil, err
	}
	if r.old.n == nil {
		return nil, unix.ENOENT
	}
	if err := r.look(&r.new); err != nil {
		return nil, err
	}
	if done, err := r.check(noReplace); done || err != nil {
		return nil, err
	}
	for _, p := range []*place{&r.old, &r.new} {
		if n := p.n; n != nil && !isDir(n.mode) && !n.upper && (p == &r.old || r.exchange || fs.hasSeveralNames(n)) {
			p.n = nil // release keeps the reference for the caller
			return n, nil
		}
	}
	if err := r.prepare(); err != nil {
		return nil, err
	}
	if r.exchange {
		return nil, r.swap()
	}
	return nil, r.move()
}

func (r *rename) release() {
	for _, p := range []*place{&r.old, &r.new} {
		if p.n != nil {
			r.fs.Forget(p.n.id, 1)
		}
	}
}

func (r *rename) look(p *place) error {
	f, err := r.fs.resolve(p.dir, p.name)
	if err != nil {
		return err
	}
	p.f, p.inUpper = f, f.upper
	if f.exists {
		p.n, err = r.fs.adopt(p.dir, p.name, &p.f)
	}
	return err
}

// check gives rename(2)'s errors. done: both names are one file, and nothing is to be done.
func (r *rename) check(noReplace bool) (done bool, err error) {
	s, d := r.old.n, r.new.n
	switch {
	case noReplace && d != nil:
		return false, unix.EEXIST
	case r.exchange && d == nil:
		return false, unix.ENOENT
	case s == d:
		return true, nil
	case isDir(s.mode) && inside(r.new.dir, s):
		return false, unix.EINVAL
	case r.exchange && isDir(d.mode) && inside(r.old.dir, d):
		return false, unix.EINVAL
	case d == nil || r.exchange:
		return false, nil
	case isDir(s.mode) && !isDir(d.mode):
		return false, unix.ENOTDIR
	case !isDir(s.mode) && isDir(d.mode):
		return false, unix.EISDIR
	case isDir(d.mode):
		return false, r.fs.mustBeEmpty(d)
	}
	return false, nil
}

// inside says whether dir is top or lies below it.
func inside(dir, top *Node) bool {
	for dir != top {
		if dir == dir.fs.root || len(dir.links) == 0 {
			return false
		}
		dir = dir.links[0].dir
	}
	return true
}

// prepare brings both ends into the upper layer and writes down what their new places would no longer say.
func (r *rename) prepare() error {
	fs := r.fs
	for _, p := range []*place{&r.old, &r.new} {
		if err := fs.copyUpDir(p.dir); err != nil {
			return err
		}
		p.path = join(p.dir.path(), p.name)
		var err error
		if p.below, err = fs.visibleBelow(p.dir, p.name); err != nil {
			return err
		}
	}
	if err := r.raise(&r.old, &r.new); err != nil {
		return err
	}
	if r.exchange {
		return r.raise(&r.new, &r.old)
	}
	switch d := r.new.n; {
	case d == nil:
		return nil
	case isDir(d.mode) && d.upper:
		return fs.emptyUpper(d, r.new.path)
	case d.indexed:
		return fs.beforeUnlink(d, r.new.dir, r.new.name, r.new.inUpper)
	}
	return nil
}

// raise makes the object at p ready to go to q.
func (r *rename) raise(p, q *place) error {
	fs, n := r.fs, p.n
	if isDir(n.mode) {
		if err := fs.copyUpDir(n); err != nil {
			return err
		}
		p.inUpper = true
		if len(n.stack) == 0 {
			if !q.below {
				return nil
			}
			return fs.setOpaque(fs.upper, p.path) // or it would merge with what the new name hides
		}
		if !fs.cfg.Redirect {
			return unix.EXDEV
		}
		return fs.setRedirect(n)
	}
	if !p.inUpper { // a name of an indexed file that was copied up under another name
		if err := fs.linkUp(n, p.path); err != nil {
			return err
		}
		p.inUpper = true
	}
	if n.isSketch() {
		return fs.setRedirect(n)
	}
	return nil
}

func (r *rename) swap() error {
	fs := r.fs
	if err := layer.Rename(fs.upper, r.old.path, fs.upper, r.new.path, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	r.moved()
	s, d := r.old.n, r.new.n
	fs.tab.Lock()
	defer fs.tab.Unlock()
	s.dropLink(r.old.dir, r.old.name)
	d.dropLink(r.new.dir, r.new.name)
	s.addLink(r.new.dir, r.new.name)
	d.addLink(r.old.dir, r.old.name)
	return nil
}

func (r *rename) move() error {
	fs, s, d := r.fs, r.old.n, r.new.n
	var was Attr
	if d != nil {
		var err error
		if was, err = fs.attr(d); err != nil {
			was = r.new.f.st
		}
		fs.keep(d, &was)
	}
	if err := r.rename(); err != nil {
		if d != nil {
			d.unkeep()
		}
		return err
	}
	r.moved()
	fs.moveLink(s, r.old.dir, r.old.name, r.new.dir, r.new.name)
	switch {
	case d == nil:
		return nil
	case isDir(d.mode):
		d.die(was)
		fs.tab.Lock()
		d.dropLink(r.new.dir, r.new.name)
		fs.tab.Unlock()
		return nil
	}
	fs.unnamed(d, r.new.dir, r.new.name, was)
	return nil
}

// rename moves the upper object in one step, leaving a whiteout behind where the lower layers have the old name.
func (r *rename) rename() error {
	fs := r.fs
	if r.new.f.whiteout && isDir(r.old.n.mode) { // a directory does not replace a device node
		err := layer.Rename(fs.upper, r.old.path, fs.upper, r.new.path, unix.RENAME_EXCHANGE)
		if errors.Is(err, unix.ENOENT) {
			return r.simply() // the whiteout is a file of another name
		}
		if err != nil || r.old.below {
			return err
		}
		if err := fs.upper.Unlink(r.old.path); err != nil { // it hides nothing: no reason to say that the rename failed
			fs.cfg.Logf("/%s: leftover whiteout: %v", r.old.path, err)
		}
		return nil
	}
	return r.simply()
}

func (r *rename) simply() error {
	fs := r.fs
	flags := uint(0)
	if r.old.below {
		flags = unix.RENAME_WHITEOUT
	}
	if !r.movesDirs() {
		return layer.RenameFile(fs.upper, r.old.path, fs.upper, r.new.path, flags)
	}
	return layer.Rename(fs.upper, r.old.path, fs.upper, r.new.path, flags)
}

// movesDirs says that a directory is moved or replaced.
func (r *rename) movesDirs() bool {
	return isDir(r.old.n.mode) || r.new.n != nil && isDir(r.new.n.mode)
}

// moved forgets what was known by the old paths.
func (r *rename) moved() {
	for _, p := range []*place{&r.old, &r.new} {
		if r.movesDirs() {
			r.fs.upper.Invalidate(p.path)
		}
		p.dir.list.Store(nil)
	}
}
