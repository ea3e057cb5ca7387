package union

import (
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"unsafe"

	"lamina/block"
	"lamina/layer"
	"lamina/state"

	"golang.org/x/sys/unix"
)

// With Config.State a union writes down, in memory that outlives the process, what the kernel has been told and the disk
// does not say: which number a node has, how often the kernel has looked it up, and by which names it was reached. The
// rest, which layers it lies in and so on, is found again by looking the names up. With Config.Resume the memory is one
// that a killed process has left, and New makes the same nodes of it.
//
// A file that lost its last name while the kernel has its number keeps one in the workdir (keptDir) until the kernel forgets
// it: a descriptor would have gone with the process. And because a name may have changed on disk in the moment before the
// death, what is written down are candidates: a name counts only if the file with the right inode number is there.

const keptDir = workRoot + "/kept" // one link for every nameless file that the kernel still knows

func keptPath(id uint64) string { return keptDir + "/" + strconv.FormatUint(id, 16) }

// nodeRec is a node. It is followed by nothing; its names are linkRecs, and the lower files that a nameless one is read
// from belowRecs.
type nodeRec struct {
	id, ino uint64
	refs    atomic.Int64
	mode    uint32
	flags   atomic.Uint32
	last    Attr // see Node.last; with flagDead
}

const (
	flagDead = 1 << iota
	flagUnborn
	flagDetached
)

// linkRec is a name of a node. The name follows it.
type linkRec struct {
	node, dir uint64
	n         uint32
}

// belowRec is one of a node's lower files. The path follows it.
type belowRec struct {
	node   uint64
	depth  uint32
	layer  int32
	sketch uint32
	n      uint32
}

const (
	sizeOfNode  = unsafe.Sizeof(nodeRec{})
	sizeOfLink  = unsafe.Offsetof(linkRec{}.n) + 4
	sizeOfBelow = unsafe.Sizeof(belowRec{})
)

func linkName(r state.Rec) string {
	return string(r.Bytes()[sizeOfLink:][:state.As[linkRec](r).n])
}

func belowPath(r state.Rec) string {
	return string(r.Bytes()[sizeOfBelow:][:state.As[belowRec](r).n])
}

// nodeMemory are a Node's fields that concern Config.State. Guarded by nodeTable.
type nodeMemory struct {
	rec   state.Rec
	names []state.Rec // of links, in the same order
	below []state.Rec
}

// writeDown makes the record of a new node. The caller holds tab, or nobody else knows the node.
func (n *Node) writeDown(a *state.Arena) {
	n.rec = a.New(int(sizeOfNode))
	r := state.As[nodeRec](n.rec)
	r.id, r.ino, r.mode = n.id, n.ino, n.mode
	r.refs.Store(n.refs)
	if n.dead {
		n.writeDeath(r)
	}
	n.rec.Publish(state.Node)
}

func (n *Node) writeDeath(r *nodeRec) {
	r.last = n.last
	flags := uint32(flagDead)
	if n.unborn {
		flags |= flagUnborn
	}
	if n.detached {
		flags |= flagDetached
	}
	r.flags.Store(flags)
}

// rememberLife writes down whether the node has names. The caller holds tree for writing.
func (n *Node) rememberLife() {
	if n.rec.None() {
		return
	}
	if r := state.As[nodeRec](n.rec); n.dead {
		n.writeDeath(r)
	} else {
		r.flags.Store(0)
	}
}

// addRefs changes the count of the kernel's references. The caller holds tab.
func (n *Node) addRefs(k int64) {
	n.refs += k
	if !n.rec.None() {
		state.As[nodeRec](n.rec).refs.Store(n.refs)
	}
}

// writeName writes down the name that was just appended to links. The caller holds tab.
func (n *Node) writeName(l link) {
	if n.rec.None() {
		return
	}
	a := n.fs.cfg.State
	r := a.New(int(sizeOfLink) + len(l.name))
	rec := state.As[linkRec](r)
	rec.node, rec.dir, rec.n = n.id, l.dir.id, uint32(len(l.name))
	copy(r.Bytes()[sizeOfLink:], l.name)
	r.Publish(state.Link)
	n.names = append(n.names, r)
}

// strikeOut removes name i. The caller holds tab.
func (n *Node) strikeOut(i int) {
	if n.rec.None() {
		return
	}
	n.names[i].Free()
	n.names = append(n.names[:i], n.names[i+1:]...)
}

// strikeAll removes all that was written down of a node that goes. The caller holds tab.
func (n *Node) strikeAll() {
	for _, r := range n.names {
		r.Free()
	}
	n.rec.Free()
	n.rec, n.names = state.Rec{}, nil
	n.strikeBelow()
}

func (n *Node) strikeBelow() {
	for _, r := range n.below {
		r.Free()
	}
	n.below = nil
}

// writeBelow writes down where a file that is about to lose its names is read from. The caller holds tree for writing.
func (n *Node) writeBelow() {
	if n.rec.None() || len(n.below) > 0 || !isReg(n.mode) {
		return
	}
	for i, ref := range n.stack {
		if int(sizeOfBelow)+len(ref.path) > state.MaxRecord {
			n.fs.cfg.Logf("/%s: has such a long name in its layer that it could not be read any more after the death of this process", ref.path)
			break
		}
		r := n.fs.cfg.State.New(int(sizeOfBelow) + len(ref.path))
		rec := state.As[belowRec](r)
		rec.node, rec.depth, rec.layer, rec.n = n.id, uint32(i), ref.layer, uint32(len(ref.path))
		if ref.sketch {
			rec.sketch = 1
		}
		copy(r.Bytes()[sizeOfBelow:], ref.path)
		r.Publish(state.Below)
		n.below = append(n.below, r)
	}
}

// keepLink gives an upper file that is about to lose its last name one in the workdir. The caller holds tree for writing.
func (fs *FS) keepLink(n *Node) bool {
	if n.rec.None() {
		return false
	}
	d, path, err := fs.upperAt(n)
	if err == nil {
		err = layer.LinkBetween(d, path, fs.work, keptPath(n.id))
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		fs.cfg.Logf("/%s: cannot be kept for those who have it open, in case that this process is killed: %v", path, err)
		return false
	}
	return true
}

// keepNameless is keepLink for a file that has only a descriptor.
func (fs *FS) keepNameless(n *Node, fd int) error {
	if n.rec.None() {
		return nil
	}
	if err := fs.work.LinkFD(fd, keptPath(n.id)); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// dropKept removes what keepLink made.
func (fs *FS) dropKept(id uint64) {
	if err := fs.work.Unlink(keptPath(id)); err != nil && !errors.Is(err, unix.ENOENT) {
		fs.cfg.Logf("workdir %s: leftover %s: %v", fs.work.Name(), keptPath(id), err)
	}
}

// Place is a name in a directory that is known by its node's number.
type Place struct {
	Dir  uint64
	Name string
}

// revival is a node that comes back.
type revival struct {
	rec   state.Rec
	names []state.Rec
	below []state.Rec
	begun bool
	node  *Node
}

// resume makes the nodes that a killed process had.
func (fs *FS) resume() error {
	all := map[uint64]*revival{}
	a := fs.cfg.State
	for _, r := range a.All(state.Node) {
		id := state.As[nodeRec](r).id
		all[id] = &revival{rec: r}
		fs.lastID = max(fs.lastID, id)
	}
	for _, r := range a.All(state.Link) {
		if v := all[state.As[linkRec](r).node]; v != nil {
			v.names = append(v.names, r)
		} else {
			r.Free()
		}
	}
	for _, r := range a.All(state.Below) {
		if v := all[state.As[belowRec](r).node]; v != nil {
			v.below = append(v.below, r)
		} else {
			r.Free()
		}
	}
	root := all[fs.root.id]
	if root == nil {
		return errors.New("the state of the process before has no root directory")
	}
	fs.root.rec, fs.root.refs = root.rec, state.As[nodeRec](root.rec).refs.Load()
	root.begun, root.node = true, fs.root
	for id := range all {
		fs.revive(all, id)
	}
	if err := fs.settleKept(); err != nil {
		return err
	}
	fs.resumeFiles()
	fs.cfg.Engine.Resume()
	return nil
}

// Resumed tells that the files which were open are open again: nodes that neither they nor the kernel need are let go.
func (fs *FS) Resumed() {
	var all []*Node
	fs.byID.Range(func(_, v any) bool {
		all = append(all, v.(*Node))
		return true
	})
	fs.tab.Lock()
	for _, n := range all {
		fs.collect(n)
	}
	gone := fs.takeUnkept()
	fs.tab.Unlock()
	fs.closeUnkept(gone)
}

// revive makes one node, and first the directories that lead to it. nil: its directories form a circle, which no tree has.
func (fs *FS) revive(all map[uint64]*revival, id uint64) *Node {
	v := all[id]
	if v == nil || v.begun {
		if v == nil {
			return nil
		}
		return v.node
	}
	v.begun = true
	var gone []state.Rec
	for _, r := range v.names {
		if !fs.reviveName(all, v, Place{state.As[linkRec](r).dir, linkName(r)}) {
			gone = append(gone, r)
			continue
		}
		v.node.names = append(v.node.names, r)
	}
	if v.node == nil && state.As[nodeRec](v.rec).flags.Load()&flagDead == 0 { // it may have been renamed just before the death
		for _, p := range fs.cfg.Moved {
			if !isClaimed(all, v, p) && fs.reviveName(all, v, p) {
				v.node.writeName(v.node.links[0])
				break
			}
		}
	}
	if v.node == nil {
		v.node = fs.reviveNameless(v)
	}
	for _, r := range gone {
		r.Free()
	}
	v.node.below = v.below
	if !v.node.dead {
		v.node.strikeBelow()
	}
	return v.node
}

// isClaimed says that what is at p may be another node than v, as that was written down: an inode number can be given again.
func isClaimed(all map[uint64]*revival, v *revival, p Place) bool {
	rec := state.As[nodeRec](v.rec)
	for _, other := range all {
		o := state.As[nodeRec](other.rec)
		if other == v || o.ino != rec.ino || o.mode != rec.mode {
			continue
		}
		for _, r := range other.names {
			if l := state.As[linkRec](r); l.dir == p.Dir && linkName(r) == p.Name {
				return true
			}
		}
	}
	return false
}

// reviveName makes v's node of what is at p, or gives it one more name. false: something else is there, or nothing.
func (fs *FS) reviveName(all map[uint64]*revival, v *revival, p Place) bool {
	dir := fs.revive(all, p.Dir)
	if dir == nil || dir.dead || !isDir(dir.mode) {
		return false
	}
	f, err := fs.resolve(dir, p.Name)
	if err != nil {
		fs.logDamage("after the death of the process before", join(dir.path(), p.Name), err)
		return false
	}
	rec := state.As[nodeRec](v.rec)
	if !f.exists || f.st.Mode&unix.S_IFMT != rec.mode || !fs.hasIno(&f, rec.ino) {
		return false
	}
	if n := v.node; n != nil {
		if isDir(n.mode) || n.upper != f.upper || n.upper && n.upIno != f.st.Ino {
			return false
		}
		fs.tab.Lock()
		defer fs.tab.Unlock()
		before := len(n.links)
		n.attach(link{dir, p.Name})
		return len(n.links) > before
	}
	fs.reviving = v.rec
	n, err := fs.adopt(dir, p.Name, &f)
	fs.reviving = state.Rec{}
	if err != nil {
		fs.logDamage("after the death of the process before", join(dir.path(), p.Name), err)
		return false
	}
	if n.rec != v.rec { // another node has taken the name
		fs.tab.Lock()
		if len(n.names) < len(n.links) {
			n.writeName(n.links[len(n.links)-1])
		}
		fs.tab.Unlock()
		fs.Forget(n.id, 1)
		return false
	}
	n.refs = rec.refs.Load()
	n.unsyncd = n.upper // perhaps: then it is synced once more than needed
	rec.flags.Store(0)
	v.node = n
	return true
}

func (fs *FS) hasIno(f *found, ino uint64) bool {
	if isDir(f.st.Mode) {
		return fs.dirIno(f) == ino
	}
	k, own := fs.keyOf(f)
	return fs.inoOf(k.fs, k.ino) == ino || fs.inoOf(own.fs, own.ino) == ino
}

// reviveNameless makes a node that has no name any more.
func (fs *FS) reviveNameless(v *revival) *Node {
	rec := state.As[nodeRec](v.rec)
	n := &Node{fs: fs, ino: rec.ino, mode: rec.mode, refs: rec.refs.Load(), dead: true, last: rec.last}
	flags := rec.flags.Load()
	n.unborn, n.detached = flags&flagUnborn != 0, flags&flagDetached != 0
	if flags&flagDead == 0 { // it lost its name in the moment of the death
		n.last = Attr{Mode: rec.mode, Ino: rec.ino}
	}
	n.stack = make([]lowerRef, len(v.below))
	for _, r := range v.below {
		b := state.As[belowRec](r)
		if int(b.depth) >= len(n.stack) || int(b.layer) >= len(fs.lowers) {
			n.stack = nil // only a part of it was written down
			break
		}
		n.stack[b.depth] = lowerRef{layer: b.layer, sketch: b.sketch != 0, path: belowPath(r)}
	}
	if isReg(n.mode) && fs.upper != nil {
		if err := fs.reviveKept(n, rec.id, flags&flagDead == 0); err != nil && !isAbsent(err) {
			fs.logDamage("after the death of the process before", keptPath(rec.id), err)
		}
	}
	fs.tab.Lock()
	defer fs.tab.Unlock()
	fs.reviving = v.rec
	fs.register(n)
	fs.reviving = state.Rec{}
	n.rememberLife()
	return n
}

// reviveKept finds the upper file of a nameless node in the workdir.
func (fs *FS) reviveKept(n *Node, id uint64, sudden bool) error {
	path := keptPath(id)
	fd, err := fs.work.OpenPath(path)
	if err != nil {
		if sudden && len(n.stack) > 0 {
			if st, err := fs.lowers[n.stack[0].layer].Stat(n.stack[0].path); err == nil {
				n.last = st
				n.last.Ino, n.last.Nlink = n.ino, 0
			}
		}
		return err
	}
	st, err := fs.work.Stat(path)
	var m layer.Marks
	if err == nil {
		m, err = fs.work.Marks(path, st.Mode)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	n.upper, n.upIno, n.kept = true, st.Ino, &keeper{fd: fd}
	n.key = key{fs.upper.FS(), st.Ino}
	n.sketch, n.size = m.Metacopy, st.Size
	if h, err := block.ParseHeader(m.Header); m.Metacopy && err == nil {
		n.size = h.LogicalSize(st.Size)
	}
	if sudden {
		n.last = st
		n.last.Size = n.size
		n.last.Ino, n.last.Nlink = n.ino, 0
	}
	return nil
}

// settleKept removes the links in the workdir of files that have their names still, or that nobody knows.
func (fs *FS) settleKept() error {
	if fs.upper == nil {
		return nil
	}
	entries, err := fs.work.ReadDir(keptDir)
	if err != nil {
		return fmt.Errorf("workdir %s: %w", fs.work.Name(), err)
	}
	for _, e := range entries {
		id, err := strconv.ParseUint(e.Name, 16, 64)
		if n := fs.Node(id); err == nil && n != nil && n.kept != nil {
			continue
		}
		if err := fs.work.Unlink(join(keptDir, e.Name)); err != nil {
			return fmt.Errorf("workdir %s: %w", fs.work.Name(), err)
		}
	}
	return nil
}

// resumeFiles opens what the engine before had not put on disk, so that it settles.
func (fs *FS) resumeFiles() {
	var files []*Node
	fs.byID.Range(func(_, v any) bool {
		if n := v.(*Node); isReg(n.mode) && n.upper && fs.cfg.Engine.Left(n.upIno) {
			files = append(files, n)
		}
		return true
	})
	for _, n := range files {
		if err := fs.acquire(n); err != nil {
			fs.cfg.Logf("inode %d of the union: what was written before the death of the process and not synced is lost: %v", n.ino, err)
			continue
		}
		(&Handle{n: n}).Release()
	}
}

// Reopen opens a file as the process before had it open.
func (fs *FS) Reopen(n *Node, flags uint32) (*Handle, error) {
	if !isReg(n.mode) {
		return nil, unix.EINVAL
	}
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	if err := fs.openAgain(n); err != nil {
		return nil, err
	}
	return &Handle{n: n, flags: flags}, nil
}

// Detached says that the node shows the bytes of a lower file whose names belong to another node; see Detach.
func (fs *FS) Detached(n *Node) bool {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	return n.detached
}

// InoAt tells which object a name leads to, by its inode number in the union; 0 if to none.
func (fs *FS) InoAt(dir *Node, name string) (uint64, error) {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	f, err := fs.resolve(dir, name)
	if err != nil || !f.exists {
		return 0, err
	}
	if isDir(f.st.Mode) {
		return fs.dirIno(&f), nil
	}
	k, _ := fs.keyOf(&f)
	return fs.inoOf(k.fs, k.ino), nil
}

// Unmake takes back the making of an object, or of one more name of a file, that nobody has heard of.
func (fs *FS) Unmake(dir *Node, name string, link bool) error {
	n, err := fs.Lookup(dir, name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	if isDir(n.mode) {
		err = fs.Rmdir(dir, name)
	} else {
		err = fs.Unlink(dir, name)
	}
	if link || err != nil {
		fs.Forget(n.id, 1)
		return err
	}
	fs.Drop(n)
	return nil
}

// Drop gives back all references that the kernel could have on a node, which it never heard of.
func (fs *FS) Drop(n *Node) {
	fs.tab.Lock()
	n.addRefs(-n.refs)
	fs.collect(n)
	gone := fs.takeUnkept()
	fs.tab.Unlock()
	fs.closeUnkept(gone)
}
