package union

import (
	"errors"
	"fmt"

	"lamina/block"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// Finding is one thing that fsck has to say.
type Finding struct {
	Path     string `json:"path"`            // from the upper layer's root
	Block    int64  `json:"block,omitempty"` // -1: not about one block
	What     string `json:"what"`
	Repaired bool   `json:"repaired"`
}

// Offline work on an upper layer that is not mounted: walks its names with the lower layers behind them.
type offline struct {
	*FS
	visit func(o *upperObject) error
}

// upperObject is one name of the upper layer.
type upperObject struct {
	dir  *Node
	name string
	path string
	f    found
}

func openOffline(cfg Config) (*FS, error) {
	if cfg.Upper == nil {
		return nil, errors.New("no upper layer given")
	}
	cfg.Follow = true
	fs := newFS(cfg)
	return fs, fs.makeRoot()
}

func (o *offline) walk(dir *Node, damaged func(path string, err error)) error {
	list, err := o.upper.ReadDir(dir.path())
	if err != nil {
		damaged(dir.path(), err)
		return nil
	}
	for _, e := range list {
		path := join(dir.path(), e.Name)
		f, err := o.resolve(dir, e.Name)
		if err != nil {
			damaged(path, err)
			continue
		}
		if !f.exists || !f.upper {
			continue
		}
		if err := o.visit(&upperObject{dir: dir, name: e.Name, path: path, f: f}); err != nil {
			return err
		}
		if isDir(f.st.Mode) {
			n, err := o.adopt(dir, e.Name, &f)
			if err != nil {
				return err
			}
			err = o.walk(n, damaged)
			o.Forget(n.id, 1)
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// Fsck checks an upper layer that is not mounted: every sketch's header, tables and lower file, and the index. Without
// lower layers in cfg the sketches are checked by themselves. repair mends what can be mended without guessing; report is
// called for every finding.
func Fsck(cfg Config, repair bool, report func(Finding)) error {
	fs, err := openOffline(cfg)
	if err != nil {
		return err
	}
	seen := map[uint64]bool{}
	o := &offline{FS: fs}
	o.visit = func(u *upperObject) error {
		if !u.f.marks.Metacopy || !isReg(u.f.st.Mode) || u.f.st.Nlink > 1 && seen[u.f.st.Ino] {
			return nil
		}
		seen[u.f.st.Ino] = true
		if u.f.damaged != nil {
			report(Finding{Path: u.path, Block: -1, What: u.f.damaged.Error()})
			return nil
		}
		if len(cfg.Lowers) > 0 && len(u.f.stack) == 0 && !u.f.header.Complete {
			report(Finding{Path: u.path, Block: -1, What: errNoLower.Error()})
		}
		return fs.checkSketch(u, repair, report)
	}
	if err := o.walk(fs.root, func(path string, err error) { report(Finding{Path: path, Block: -1, What: err.Error()}) }); err != nil {
		return err
	}
	if cfg.Work == nil {
		return nil
	}
	return fs.checkWork(repair, report)
}

func (fs *FS) checkSketch(u *upperObject, repair bool, report func(Finding)) error {
	flags := unix.O_RDONLY
	if repair {
		flags = unix.O_RDWR
	}
	fd, err := fs.upper.OpenFile(u.path, flags, 0)
	if err != nil {
		report(Finding{Path: u.path, Block: -1, What: err.Error()})
		return nil
	}
	var lower func() (block.Lower, error)
	if len(u.f.stack) > 0 {
		lower = fs.lowerOf(u.f.stack)
	}
	findings, err := block.Check(fs.store(fd), lower, repair)
	if err != nil {
		report(Finding{Path: u.path, Block: -1, What: err.Error()})
	}
	for _, f := range findings {
		report(Finding{Path: u.path, Block: f.Block, What: f.What, Repaired: f.Repaired})
	}
	return nil
}

// checkWork looks at what a mount keeps in its workdir.
func (fs *FS) checkWork(repair bool, report func(Finding)) error {
	if _, err := fs.work.Stat(dirtyMark); err == nil {
		report(Finding{Block: -1, What: ErrVolatile.Error()})
	}
	entries, err := fs.work.ReadDir(indexDir)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := join(indexDir, e.Name)
		f := Finding{Path: "workdir/" + path, Block: -1}
		st, err := fs.work.Stat(path)
		if err != nil {
			return err
		}
		delta, _, err := fs.nlinkOf(path, st.Nlink)
		switch {
		case err != nil:
			f.What = err.Error()
		case int64(st.Nlink)+delta < 1:
			f.What = "index entry of a file that has no name left"
			if repair {
				f.Repaired = fs.work.Unlink(path) == nil
			}
		default:
			continue
		}
		report(f)
	}
	return nil
}

// Flatten completes every sketch of an upper layer that is not mounted, and gives every name of a hard-linked file its
// own entry, so that kernel overlayfs, and any tool that reads the layer as it lies, sees what the union showed.
// progress is called for every sketch before it is completed.
func Flatten(cfg Config, progress func(path string)) error {
	fs, err := openOffline(cfg)
	if err != nil {
		return err
	}
	if len(cfg.Lowers) == 0 {
		return errors.New("flatten needs the lower layers that the upper layer was made on: give them with -o lowerdir=")
	}
	if cfg.Work == nil {
		return errors.New("flatten needs the upper layer's workdir: it lies beside the upper layer, or give it with -o workdir=")
	}
	if err := fs.prepareWork(); err != nil {
		return err
	}
	if err := fs.linkIndexed(fs.root); err != nil {
		return err
	}
	type sketch struct {
		paths []string
		f     found
	}
	byIno := map[uint64]*sketch{}
	var order []uint64
	o := &offline{FS: fs}
	o.visit = func(u *upperObject) error {
		if !u.f.marks.Metacopy || !isReg(u.f.st.Mode) {
			return nil
		}
		s := byIno[u.f.st.Ino]
		if s == nil {
			s = &sketch{f: u.f}
			byIno[u.f.st.Ino] = s
			order = append(order, u.f.st.Ino)
		}
		s.paths = append(s.paths, u.path)
		return nil
	}
	var first error
	err = o.walk(fs.root, func(path string, err error) { first = firstError(first, fmt.Errorf("/%s: %w", path, err)) })
	for _, ino := range order {
		if err != nil {
			break
		}
		s := byIno[ino]
		progress(s.paths[0])
		if e := fs.flattenOne(s.paths, &s.f); e != nil {
			first = firstError(first, fmt.Errorf("/%s: %w", s.paths[0], e))
		}
	}
	if err = firstError(err, first); err != nil {
		return err
	}
	if err := fs.dropIndex(); err != nil {
		return err
	}
	return unix.Syncfs(fs.upper.RootFD())
}

// Seal makes an upper layer that is not mounted a layer that another union can have below: every name of a hard-linked file
// gets its own entry, because the index that stood in for it is in the workdir, which nobody looks at then. Sketches stay
// sketches.
func Seal(cfg Config) error {
	if cfg.Upper == nil || cfg.Work == nil {
		return errors.New("no upper layer with its workdir given")
	}
	if list, err := cfg.Work.ReadDir(indexDir); errors.Is(err, unix.ENOENT) || err == nil && len(list) == 0 {
		return nil // as almost always
	}
	fs, err := openOffline(cfg)
	if err != nil {
		return err
	}
	if err := fs.prepareWork(); err != nil {
		return err
	}
	if err := fs.linkIndexed(fs.root); err != nil {
		return err
	}
	if err := fs.dropIndex(); err != nil {
		return err
	}
	return unix.Syncfs(fs.upper.RootFD())
}

// dropIndex removes the index: every name has its own link now, and the index's would count as one more.
func (fs *FS) dropIndex() error {
	entries, err := fs.work.ReadDir(indexDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := join(indexDir, e.Name)
		if err := fs.work.Removexattr(path, fs.prefix+layer.XattrNlink); err != nil && !errors.Is(err, unix.ENODATA) {
			return err
		}
		if err := fs.work.Unlink(path); err != nil {
			return err
		}
	}
	return nil
}

func (fs *FS) flattenOne(paths []string, f *found) error {
	if f.damaged != nil {
		return f.damaged
	}
	fd, err := fs.upper.OpenFile(paths[0], unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	file, err := fs.cfg.Engine.Open(fs.store(fd), fs.lowerOf(f.stack))
	if err != nil {
		return err
	}
	err = file.Complete()
	if err = firstError(err, file.Close()); err != nil {
		file.Abandon()
		return err
	}
	if _, plain := file.Plain(); !plain {
		// Its blocks lie in the order of writing: an ordinary file takes its place under every name.
		if err := fs.rewrite(paths, f); err != nil {
			return err
		}
	}
	err = fs.upper.Removexattr(paths[0], fs.prefix+layer.XattrRedirect)
	if errors.Is(err, unix.ENODATA) {
		err = nil
	}
	return err
}

// rewrite replaces a file by an ordinary one with the same contents and attributes.
func (fs *FS) rewrite(paths []string, f *found) error {
	p := &prepared{fd: -1, tmp: fs.tmpName(), mode: 0o600}
	fd, err := fs.work.OpenFile(p.tmp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	p.fd = fd
	st, err := fs.upper.Stat(paths[0])
	if err == nil {
		err = fs.flattenTo(fd, paths[0], f)
	}
	if err == nil {
		err = fs.copyMeta(fs.upper, paths[0], &f.st, p, false, nil)
	}
	if err == nil && !f.header.Kernel {
		err = fs.setOrigin(p, key{f.header.Ident.FS, f.header.Ident.Ino})
	}
	index := ""
	if err == nil {
		index, err = fs.copyIndexMark(p, f)
	}
	if err == nil {
		err = p.setTimes(fs, timesOf(&st, nil))
	}
	if err == nil {
		err = unix.Fsync(fd)
	}
	if err != nil {
		fs.abandon(p)
		return err
	}
	defer unix.Close(fd)
	if index != "" {
		link := p.tmp + "-index"
		if err := fs.work.Link(p.tmp, link); err != nil {
			return err
		}
		if err := layer.Rename(fs.work, link, fs.work, index, 0); err != nil {
			return err
		}
	}
	for i, path := range paths {
		from := p.tmp
		if i+1 < len(paths) {
			from = p.tmp + "-link"
			if err := fs.work.Link(p.tmp, from); err != nil {
				return err
			}
		}
		if err := fs.replaceKeepingTimes(from, path); err != nil {
			return err
		}
	}
	return nil
}

// copyIndexMark gives the new file the link count of the one it replaces, and says where the index has that one.
func (fs *FS) copyIndexMark(p *prepared, f *found) (index string, err error) {
	k, _ := fs.keyOf(f)
	index = indexPath(k)
	if st, err := fs.work.Stat(index); err != nil || st.Ino != f.st.Ino {
		return "", nil
	}
	v, err := fs.work.Getxattr(index, fs.prefix+layer.XattrNlink)
	if err != nil {
		return "", err
	}
	return index, p.setxattr(fs, fs.prefix+layer.XattrNlink, v)
}

func (fs *FS) flattenTo(fd int, path string, f *found) error {
	src, err := fs.upper.OpenFile(path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	dst := fs.store(dup(fd))
	defer dst.Close()
	return block.FlattenTo(dst, fs.store(src), fs.lowerOf(f.stack))
}

func (fs *FS) replaceKeepingTimes(from, path string) error {
	parent := parentOf(path)
	st, err := fs.upper.Stat(parent)
	if err != nil {
		return err
	}
	if err := layer.Rename(fs.work, from, fs.upper, path, 0); err != nil {
		return err
	}
	return fs.upper.Utimes(parent, [2]unix.Timespec{st.Atim, st.Mtim})
}

// linkIndexed gives every lower name of a copied-up hard-linked file its own link in the upper layer.
func (fs *FS) linkIndexed(dir *Node) error {
	if list, err := fs.work.ReadDir(indexDir); err != nil || len(list) == 0 {
		if errors.Is(err, unix.ENOENT) {
			err = nil
		}
		return err
	}
	names, err := fs.merge(dir)
	if err != nil {
		return err
	}
	for _, e := range names {
		f, err := fs.resolve(dir, e.Name)
		if err != nil || !f.exists {
			continue // reported by the walk that follows
		}
		inUpper := f.upper
		n, err := fs.adopt(dir, e.Name, &f)
		if err != nil {
			return err
		}
		switch {
		case isDir(n.mode):
			err = fs.linkIndexed(n)
		case n.indexed && !inUpper:
			if err = fs.copyUpDir(dir); err == nil {
				err = fs.keepTimes(dir, func(path string) error { return fs.linkUp(n, join(path, e.Name)) })
			}
			if err == nil {
				err = fs.relate(n)
			}
			if err == nil && n.isSketch() {
				err = fs.setRedirect(n)
			}
		}
		fs.Forget(n.id, 1)
		if err != nil {
			return err
		}
	}
	return nil
}
