package union

import (
	"errors"
	"strings"

	"lamina/block"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// found is what the layers together say about one name.
type found struct {
	exists   bool
	upper    bool         // the topmost part is in the upper layer
	whiteout bool         // the upper layer hides the name
	st       unix.Stat_t  // of the topmost part
	marks    layer.Marks  // of the topmost part
	stack    []lowerRef   // see Node.stack
	lst      unix.Stat_t  // of stack[0]
	lmarks   layer.Marks  // of stack[0]
	lpath    string       // see Node.lpath
	header   block.Header // of a sketch, as the topmost part's attribute gives it
	damaged  error        // the header cannot be trusted
}

// marker is offered by the layers that overlayfs's conventions can be read from in one call.
type marker interface {
	Marks(path string, mode uint32) (layer.Marks, error)
	IsWhiteout(path string, st *unix.Stat_t, dirXWhiteouts bool) (bool, error)
}

func (fs *FS) marks(l layer.Layer, path string, mode uint32) (layer.Marks, error) {
	if m, ok := l.(marker); ok {
		return m.Marks(path, mode)
	}
	return layer.Marks{}, nil
}

func (fs *FS) isWhiteout(l layer.Layer, path string, st *unix.Stat_t, xwh bool) (bool, error) {
	if m, ok := l.(marker); ok {
		return m.IsWhiteout(path, st, xwh)
	}
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0, nil
}

// resolve asks the layers for name in dir, from the upper one down, as fs/overlayfs/namei.c's ovl_lookup does. A name
// that no layer has is found{exists: false}, not an error. The caller holds tree.
func (fs *FS) resolve(dir *Node, name string) (found, error) {
	var f found
	if dir.dead {
		return f, unix.ENOENT
	}
	f.lpath = join(dir.lpath, name)
	redirect := ""
	if dir.upper {
		path := join(dir.path(), name)
		st, err := fs.upper.Stat(path)
		switch {
		case err == nil:
			if f.whiteout, err = fs.upper.IsWhiteout(path, &st, dir.xwh); err != nil || f.whiteout {
				return f, err
			}
			f.exists, f.upper, f.st = true, true, st
			if f.marks, err = fs.upper.Marks(path, st.Mode); err != nil {
				return f, err
			}
			if isDir(st.Mode) && f.marks.Opaque || !isDir(st.Mode) && !f.marks.Metacopy {
				return f, nil
			}
			f.readHeader()
			redirect = f.marks.Redirect
		case !isAbsent(err):
			return f, err
		}
	}
	if err := fs.resolveLower(dir, name, redirect, &f); err != nil {
		return f, err
	}
	return f, nil
}

// readHeader reads what a sketch's attribute says; damage is kept for whoever opens the file.
func (f *found) readHeader() {
	if !f.marks.Metacopy {
		return
	}
	f.header, f.damaged = block.ParseHeader(f.marks.Header)
}

// ours says that the topmost part is a sketch that Lamina made. Its redirect is not a matter of redirect_dir: it came
// about when the file itself was renamed, and the header says which lower file it must lead to.
func (f *found) ours() bool { return f.marks.Metacopy && f.damaged == nil && !f.header.Kernel }

// visibleBelow says whether the lower layers alone show the name, so that removing it takes a whiteout.
func (fs *FS) visibleBelow(dir *Node, name string) (bool, error) {
	var f found
	f.lpath = join(dir.lpath, name)
	err := fs.resolveLower(dir, name, "", &f)
	return f.exists, err
}

// resolveLower goes on with the lower layers: along the parent's stack while no redirect was met, and from the roots of
// the layers below after an absolute one. Layers are asked downwards only, so redirects cannot form a cycle.
func (fs *FS) resolveLower(dir *Node, name, redirect string, f *found) error {
	rel, abs := name, ""
	follow := func(redirect string, first bool) error {
		if redirect == "" {
			return nil
		}
		if !fs.cfg.Follow && !f.ours() {
			return unix.EPERM // as kernel overlayfs with redirect_dir=nofollow
		}
		switch {
		case redirect[0] == '/':
			abs = redirect[1:]
			rel = ""
		case abs != "":
			abs = join(parentOf(abs), redirect)
		default:
			rel = redirect
		}
		if first && abs != "" {
			f.lpath = abs
		} else if first {
			f.lpath = join(dir.lpath, rel)
		}
		return nil
	}
	if err := follow(redirect, true); err != nil {
		return err
	}
	absolute := redirect != "" && redirect[0] == '/'
	for next, k := int32(0), 0; ; {
		var (
			ref   lowerRef
			st    unix.Stat_t
			xwh   bool
			stop  bool
			below string
			err   error
		)
		if absolute {
			if int(next) >= len(fs.lowers) {
				return nil
			}
			ref = lowerRef{layer: next, path: abs}
			st, xwh, stop, below, err = fs.walk(fs.lowers[next], abs)
			next++
		} else {
			for k < len(dir.stack) && dir.stack[k].layer < next {
				k++
			}
			if k == len(dir.stack) {
				return nil
			}
			parent := dir.stack[k]
			ref = lowerRef{layer: parent.layer, path: join(parent.path, rel)}
			st, err = fs.lowers[ref.layer].Stat(ref.path)
			xwh = parent.xwh
			next, k = parent.layer+1, k+1
		}
		l := fs.lowers[ref.layer]
		if isAbsent(err) {
			if stop {
				return nil
			}
			if absolute {
				abs = below
			}
			continue
		}
		if err != nil {
			return err
		}
		hidden, err := fs.isWhiteout(l, ref.path, &st, xwh)
		if err != nil || hidden {
			return err
		}
		if f.exists && isDir(st.Mode) != isDir(f.st.Mode) {
			return nil // the lower one is hidden by another kind; a sketch finds no data
		}
		if f.exists && !isDir(st.Mode) && !isReg(st.Mode) {
			return nil
		}
		m, err := fs.marks(l, ref.path, st.Mode)
		if err != nil {
			return err
		}
		ref.sketch = m.Metacopy
		ref.xwh = m.XWhiteouts
		if len(f.stack) == 0 {
			f.lst, f.lmarks = st, m
		}
		f.stack = append(f.stack, ref)
		if !f.exists {
			f.exists, f.st, f.marks = true, st, m
			f.readHeader()
			if !isDir(st.Mode) && ref.path == f.lpath {
				f.lpath = ref.path // one string, not two
			}
		}
		if stop || isDir(st.Mode) && m.Opaque || !isDir(st.Mode) && !m.Metacopy {
			return nil
		}
		if absolute {
			abs = below
		}
		if m.Redirect != "" {
			if err := follow(m.Redirect, false); err != nil {
				return err
			}
			absolute = absolute || m.Redirect[0] == '/'
		}
	}
}

// walk looks an absolute path up in one layer, component by component, because a whiteout or an opaque directory on the
// way hides what is below, and a redirected one changes the way for the layers below. ENOENT with stop: something on
// the way hides the path from here down.
func (fs *FS) walk(l layer.Layer, path string) (st unix.Stat_t, xwh, stop bool, below string, err error) {
	prefix := ""
	rest := path
	for {
		var comp string
		comp, rest, _ = strings.Cut(rest, "/")
		prefix = join(prefix, comp)
		below = join(below, comp)
		st, err = l.Stat(prefix)
		if err != nil {
			if rest != "" {
				below = join(below, rest)
			}
			return st, false, stop, below, err
		}
		if rest == "" {
			return st, xwh, stop, below, nil
		}
		if !isDir(st.Mode) { // a whiteout, or a file in the way
			return st, false, true, below, unix.ENOENT
		}
		m, err := fs.marks(l, prefix, st.Mode)
		if err != nil {
			return st, false, stop, below, err
		}
		stop = stop || m.Opaque
		xwh = m.XWhiteouts
		if m.Redirect != "" {
			if m.Redirect[0] == '/' {
				below = m.Redirect[1:]
			} else {
				below = join(parentOf(below), m.Redirect)
			}
		}
	}
}

// isAbsent: the layer has nothing there, or something else than a directory on the way.
func isAbsent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

func parentOf(path string) string {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return ""
	}
	return path[:i]
}

// Lookup finds name in dir and takes a kernel reference on what it finds. ENOENT if there is nothing.
func (fs *FS) Lookup(dir *Node, name string) (*Node, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	return fs.lookup(dir, name)
}

func (fs *FS) lookup(dir *Node, name string) (*Node, error) {
	if !isDir(dir.mode) {
		return nil, unix.ENOTDIR
	}
	f, err := fs.resolve(dir, name)
	if err != nil {
		return nil, err
	}
	if !f.exists {
		return nil, unix.ENOENT
	}
	return fs.adopt(dir, name, &f)
}

// adopt returns the one node of what was found, made if need be, with a kernel reference taken.
func (fs *FS) adopt(dir *Node, name string, f *found) (*Node, error) {
	if isDir(f.st.Mode) {
		return fs.adoptDir(dir, name, f)
	}
	k, own := fs.keyOf(f)
	indexed := false
	byName := !f.upper && !fs.canMark(f.st.Mode)
	if !f.upper && f.st.Nlink > 1 {
		if !fs.cfg.Index || byName {
			// Without an index every name of a lower file is a file of its own once it is copied up.
			k, byName = key{}, true
		} else if fs.upper != nil {
			// Another name of this file may have been copied up, in this mount or an earlier one.
			if st, err := fs.work.Stat(indexPath(k)); err == nil {
				if err := fs.adoptIndexed(f, k, &st); err != nil {
					return nil, err
				}
				indexed = true
			} else if !isAbsent(err) {
				return nil, err
			}
		}
	}
	var delta int64
	absolute := false
	if f.upper && !indexed && fs.cfg.Index && f.st.Nlink > 1 {
		if st, err := fs.work.Stat(indexPath(k)); err == nil && st.Ino == f.st.Ino {
			indexed = true
		}
	}
	if indexed {
		var err error
		if delta, absolute, err = fs.nlinkOf(indexPath(k), f.st.Nlink); err != nil {
			return nil, err
		}
	}
	fs.tab.Lock()
	defer fs.tab.Unlock()
	if n := dir.kids[name]; n != nil && n.byName && n.mode == f.st.Mode&unix.S_IFMT {
		n.addRefs(1)
		return n, nil
	}
	if n := fs.byKey[k]; n != nil && k != (key{}) && fs.same(n, dir, name, f) {
		n.addRefs(1)
		n.addLink(dir, name)
		return n, nil
	}
	n := &Node{fs: fs, ino: fs.inoOf(k.fs, k.ino), mode: f.st.Mode & unix.S_IFMT, key: k, upper: f.upper, stack: f.stack, lpath: f.lpath, refs: 1, indexed: indexed, delta: delta, absolute: absolute, bare: f.lmarks.Bare, byName: byName}
	n.several = !f.upper && f.st.Nlink > 1 && k != key{}
	if k == (key{}) {
		n.ino = fs.inoOf(own.fs, own.ino)
	}
	if f.upper {
		n.upIno = f.st.Ino
		n.redir = strings.HasPrefix(f.marks.Redirect, "/") // a relative one speaks of this parent only
		n.noCaps.Store(isReg(n.mode) && !f.marks.Capable)
	}
	n.sketch = f.marks.Metacopy
	n.size = f.st.Size
	if f.marks.Metacopy && f.damaged == nil {
		n.size = f.header.LogicalSize(f.st.Size)
	}
	fs.register(n)
	n.addLink(dir, name)
	return n, nil
}

// adoptIndexed replaces what the lower layers say of a name by the upper file that another name of it was copied up to.
func (fs *FS) adoptIndexed(f *found, k key, st *unix.Stat_t) error {
	m, err := fs.work.Marks(indexPath(k), st.Mode)
	if err != nil {
		return err
	}
	f.upper, f.st, f.marks = true, *st, m
	f.header, f.damaged = block.Header{}, nil
	f.readHeader()
	if !m.Metacopy {
		f.stack = nil
	}
	return nil
}

// same says whether the live node n is the file that was found under another or the same name. A forged origin must not
// make two files one: the upper inode, or the lower one and its count of names, has to agree.
func (fs *FS) same(n, dir *Node, name string, f *found) bool {
	if n.mode != f.st.Mode&unix.S_IFMT || n.dead {
		return false
	}
	if f.upper || n.upper {
		return f.upper && n.upper && n.upIno == f.st.Ino
	}
	for _, l := range n.links {
		if l.dir == dir && l.name == name {
			return true
		}
	}
	return f.st.Nlink > 1
}

func (fs *FS) adoptDir(dir *Node, name string, f *found) (*Node, error) {
	fs.tab.Lock()
	if n := dir.kids[name]; n != nil && isDir(n.mode) {
		n.addRefs(1)
		fs.tab.Unlock()
		return n, nil
	}
	fs.tab.Unlock()
	n := &Node{fs: fs, mode: unix.S_IFDIR, upper: f.upper, stack: f.stack, lpath: f.lpath, refs: 1, bare: f.lmarks.Bare}
	if f.upper {
		n.upIno = f.st.Ino
		n.xwh = f.marks.XWhiteouts
		n.redir = strings.HasPrefix(f.marks.Redirect, "/") // a relative one speaks of this parent only
	}
	n.ino = fs.dirIno(f)
	fs.tab.Lock()
	defer fs.tab.Unlock()
	if other := dir.kids[name]; other != nil && isDir(other.mode) {
		other.addRefs(1)
		return other, nil
	}
	fs.register(n)
	n.addLink(dir, name)
	return n, nil
}

// dirIno: a merged directory keeps the number of its topmost lower part, so that copy-up does not change it.
func (fs *FS) dirIno(f *found) uint64 {
	if len(f.stack) > 0 {
		return fs.inoOf(fs.lowers[f.stack[0].layer].FS(), f.lst.Ino)
	}
	return fs.inoOf(fs.upper.FS(), f.st.Ino)
}

// keyOf identifies a file by the inode that gives its st_ino: what it was copied up from, or itself.
func (fs *FS) keyOf(f *found) (k, own key) {
	if !f.upper {
		own = key{fs.lowers[f.stack[0].layer].FS(), f.st.Ino}
		return own, own
	}
	own = key{fs.upper.FS(), f.st.Ino}
	if f.marks.Metacopy && f.damaged == nil && !f.header.Kernel {
		if k, ok := fs.known(f.header.Ident.FS, f.header.Ident.Ino); ok {
			return k, own
		}
	} else if f.marks.Metacopy && len(f.stack) > 0 {
		return key{fs.lowers[f.stack[0].layer].FS(), f.lst.Ino}, own
	} else if len(f.marks.Origin) > 0 {
		if fsid, ino, err := block.ParseOrigin(f.marks.Origin); err == nil {
			if k, ok := fs.known(fsid, ino); ok {
				return k, own
			}
		}
	}
	return own, own
}

// known accepts an origin only on a filesystem that holds one of the layers: numbers of another one could collide.
func (fs *FS) known(fsid, ino uint64) (key, bool) {
	_, ok := fs.fsids[fsid]
	return key{fsid, ino}, ok && ino != 0
}

// dirInoStat is dirIno for a node whose parts are known but were not looked up: the root.
func (fs *FS) dirInoStat(n *Node) (uint64, error) {
	if len(n.stack) > 0 {
		l := fs.lowers[n.stack[0].layer]
		st, err := l.Stat(n.stack[0].path)
		return fs.inoOf(l.FS(), st.Ino), err
	}
	st, err := fs.upper.Stat("")
	return fs.inoOf(fs.upper.FS(), st.Ino), err
}
