package union

import (
	"cmp"
	"slices"
	"sort"

	"lamina/layer"

	"golang.org/x/sys/unix"
)

// listing is a merged directory in the order of its positions. A name's position is made of the name alone, so it stays
// while others come and go, in this handle, in the next, and without any handle at all.
type listing struct {
	entries []DirEntry
}

// The first positions are those of "." and "..".
const (
	offDot    = 1
	offDotDot = 2
	offNames  = 16
)

// position hashes a name to 62 bits (FNV-1a): seekdir takes signed offsets.
func position(name string) uint64 {
	h := uint64(14695981039346656037)
	for i := 0; i < len(name); i++ {
		h = (h ^ uint64(name[i])) * 1099511628211
	}
	h ^= h >> 29
	return max(h>>2, offNames)
}

// ReadDir gives the entries behind position off, in order, until yield says no. It takes no references.
func (fs *FS) ReadDir(n *Node, off uint64, yield func(DirEntry) bool) error {
	if !isDir(n.mode) {
		return unix.ENOTDIR
	}
	list, err := fs.list(n)
	if err != nil {
		return err
	}
	if off < offDot && !yield(DirEntry{Name: ".", Ino: n.ino, Type: unix.DT_DIR, Off: offDot}) {
		return nil
	}
	if off < offDotDot && !yield(DirEntry{Name: "..", Ino: fs.parentIno(n), Type: unix.DT_DIR, Off: offDotDot}) {
		return nil
	}
	i := sort.Search(len(list.entries), func(i int) bool { return list.entries[i].Off > off })
	for _, e := range list.entries[i:] {
		if !yield(e) {
			return nil
		}
	}
	n.list.CompareAndSwap(list, nil) // read to its end: the kernel keeps it from here on
	return nil
}

func (fs *FS) parentIno(n *Node) uint64 {
	if l, ok := fs.firstLink(n); ok {
		return l.dir.ino
	}
	return n.ino
}

// list merges a directory's parts, or returns the merge that a reader in the middle of it still needs.
func (fs *FS) list(n *Node) (*listing, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	if l := n.list.Load(); l != nil {
		return l, nil
	}
	if n.dead {
		return &listing{}, nil
	}
	names, err := fs.merge(n)
	if err != nil {
		return nil, err
	}
	l := &listing{entries: names}
	slices.SortFunc(l.entries, func(a, b DirEntry) int {
		return cmp.Or(cmp.Compare(a.Off, b.Off), cmp.Compare(a.Name, b.Name))
	})
	for i := 1; i < len(l.entries); i++ { // names of one hash follow one another
		l.entries[i].Off = max(l.entries[i].Off, l.entries[i-1].Off+1)
	}
	n.list.Store(l)
	return l, nil
}

// merge collects the visible names. The caller holds tree.
func (fs *FS) merge(n *Node) ([]DirEntry, error) {
	var entries []DirEntry
	single := len(n.stack) == 0 || !n.upper && len(n.stack) == 1
	var seen nameSet
	if !single {
		seen.m = map[string]struct{}{}
	}
	if n.upper {
		path := n.path()
		list, err := fs.upper.ReadDir(path)
		if err != nil {
			return nil, err
		}
		entries = slices.Grow(entries, len(list))
		// Most whiteouts are links of one inode: whoever empties a directory has it listed again and again among them.
		var whiteout uint64
		for _, e := range list {
			seen.add(e.Name)
			if e.Type == unix.DT_CHR && e.Ino == whiteout {
				continue
			}
			hidden, err := fs.hides(fs.upper, path, &e, n.xwh)
			if err != nil {
				return nil, err
			}
			if hidden {
				if e.Type == unix.DT_CHR {
					whiteout = e.Ino
				}
				continue
			}
			entries = append(entries, DirEntry{Name: e.Name, Ino: fs.upperIno(n, &e), Type: e.Type, Off: position(e.Name)})
		}
	}
	for _, ref := range n.stack {
		l := fs.lowers[ref.layer]
		list, err := l.ReadDir(ref.path)
		if err != nil {
			return nil, err
		}
		entries = slices.Grow(entries, len(list))
		for _, e := range list {
			if !seen.add(e.Name) {
				continue
			}
			hidden, err := fs.hides(l, ref.path, &e, ref.xwh)
			if err != nil {
				return nil, err
			}
			if !hidden {
				entries = append(entries, DirEntry{Name: e.Name, Ino: fs.inoOf(l.FS(), e.Ino), Type: e.Type, Off: position(e.Name)})
			}
		}
	}
	return entries, nil
}

// nameSet remembers names; without a map every name is new.
type nameSet struct{ m map[string]struct{} }

func (s nameSet) add(name string) bool {
	if s.m == nil {
		return true
	}
	before := len(s.m)
	s.m[name] = struct{}{}
	return len(s.m) > before
}

// hides says whether an entry is a whiteout. Only character devices, and regular files where a directory is marked for
// them, need a look.
func (fs *FS) hides(l layer.Layer, dir string, e *layer.Entry, xwh bool) (bool, error) {
	if e.Type != unix.DT_CHR && e.Type != unix.DT_UNKNOWN && (e.Type != unix.DT_REG || !xwh) {
		return false, nil
	}
	path := join(dir, e.Name)
	st, err := l.Stat(path)
	if err != nil {
		return false, err
	}
	if e.Type == unix.DT_UNKNOWN {
		e.Type = uint8(st.Mode & unix.S_IFMT >> 12)
	}
	return fs.isWhiteout(l, path, &st, xwh)
}

// upperIno is what stat would say of an upper entry, which may have been copied up from a lower one. An entry that
// cannot be looked up is listed all the same: one damaged object does not hide its neighbours.
func (fs *FS) upperIno(dir *Node, e *layer.Entry) uint64 {
	f, err := fs.resolve(dir, e.Name)
	if err != nil || !f.exists {
		return fs.inoOf(fs.upper.FS(), e.Ino)
	}
	if isDir(f.st.Mode) {
		return fs.dirIno(&f)
	}
	fs.tab.Lock()
	n := dir.kids[e.Name]
	fs.tab.Unlock()
	if n != nil && n.byName {
		return n.ino
	}
	k, _ := fs.keyOf(&f)
	return fs.inoOf(k.fs, k.ino)
}

// SyncDir makes the names of a directory durable.
func (fs *FS) SyncDir(n *Node) error {
	if fs.upper == nil || fs.cfg.Volatile {
		return nil
	}
	if err := fs.syncNames(n); err != nil {
		return err
	}
	return fs.syncUp(n)
}

// syncNames makes the names in the upper part of a directory durable. The directory may be renamed while that lasts, and
// another one may take its place: then it was that one.
func (fs *FS) syncNames(dir *Node) error {
	place := func() (string, bool) {
		fs.tree.RLock()
		defer fs.tree.RUnlock()
		return dir.path(), dir.upper && !dir.dead
	}
	path, there := place()
	for there {
		err := fs.upper.SyncDir(path)
		now, still := place()
		if still && now == path {
			return err
		}
		path, there = now, still
	}
	return nil
}
