package fusefs

import (
	"sync"
	"unsafe"

	"lamina/devfuse"
	"lamina/state"
	"lamina/union"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// journal answers requests such that they can come twice: once to a server that was killed before it answered, and again
// to its successor. Most may be done twice. Those that may not are written down in the state before they are begun, and
// struck out when the kernel has the answer. One that comes again and is in the state may have been done, wholly or, as the
// union goes from one good tree to the next, not at all; which of the two is looked up:
//
//   - Nobody has heard of an object that was made: the kernel holds the directory's lock until it has the answer. So it is
//     removed, and made again.
//   - A name that was to be removed and is not there was removed.
//   - A rename was done if the object is at its new place.
//   - An open file that nobody was told of is closed, and opened again. It is not cut to nothing a second time: somebody may
//     have written to it.
//   - A reference that the kernel was not told of is given back, and taken again.
//
// A request whose answer the kernel has does not come again. What was written down of it, if the server was killed before it
// struck that out, is never looked at.
type journal struct {
	*server
	a *state.Arena

	mu    sync.Mutex
	open  map[uint64]state.Rec // by the request's number
	files map[uint64]uint64    // handles that were opened by the process before, by the request's number
}

var _ fuse.RawFileSystem = (*journal)(nil)

// requestRec is a request that may not be done twice. For a rename the two names follow it.
type requestRec struct {
	unique    uint64
	ino       uint64 // of what is renamed; what was looked up, by the number of its node
	dir, dir2 uint64
	op        op
	done      bool
	n, n2     uint16
}

const sizeOfRequest = unsafe.Sizeof(requestRec{})

func (q *requestRec) names(r state.Rec) (from, to string) {
	b := r.Bytes()[sizeOfRequest:]
	return string(b[:q.n]), string(b[q.n:][:q.n2])
}

// handleRec is an open file.
type handleRec struct {
	fh, node, unique uint64
	flags            uint32
	backing          int32
	kind             uint8
	passed           bool
	mappable         bool
	mtime            unix.Timespec
}

func newJournal(s *server) *journal {
	return &journal{server: s, a: s.opt.Survive.State, open: map[uint64]state.Rec{}, files: map[uint64]uint64{}}
}

// write writes a request down, unless that was done before.
func (j *journal) write(h *fuse.InHeader, q requestRec, names ...string) {
	unique := h.Unique &^ devfuse.Resent
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, again := j.open[unique]; again {
		return
	}
	size := int(sizeOfRequest)
	for _, n := range names {
		size += len(n)
	}
	r := j.a.New(size)
	rec := state.As[requestRec](r)
	*rec = q
	rec.unique = unique
	b := r.Bytes()[sizeOfRequest:]
	for _, n := range names {
		b = b[copy(b, n):]
	}
	r.Publish(state.Request)
	j.open[unique] = r
}

// again returns what was written down of a request by a process that did not live to answer it; nil if nothing was, or if
// this is the first time that it comes.
func (j *journal) again(h *fuse.InHeader) (*requestRec, state.Rec) {
	if h.Unique&devfuse.Resent == 0 {
		return nil, state.Rec{}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	r, ok := j.open[h.Unique&^devfuse.Resent]
	if !ok {
		return nil, r
	}
	return state.As[requestRec](r), r
}

// answered strikes a request out.
func (j *journal) answered(unique uint64) {
	j.mu.Lock()
	r, ok := j.open[unique]
	if ok {
		delete(j.open, unique)
	}
	j.mu.Unlock()
	r.Free()
}

// exists says whether there is a name that is about to be made: then nothing will be.
func (j *journal) exists(dir uint64, name string) bool {
	n := j.fs.Node(dir)
	if n == nil {
		return true // the request fails
	}
	ino, err := j.fs.InoAt(n, name)
	return ino != 0 || err != nil
}

// make does a request that makes a name.
func (j *journal) make(h *fuse.InHeader, name string, do func() fuse.Status) fuse.Status {
	if q, _ := j.again(h); q != nil {
		j.closeUnheard(h)
		if dir := j.fs.Node(h.NodeId); dir != nil {
			if err := j.fs.Unmake(dir, name, q.op == opLink); err != nil {
				return j.status(err)
			}
		}
	} else if !j.exists(h.NodeId, name) {
		j.write(h, requestRec{op: opCreate})
	}
	return do()
}

func (j *journal) Mkdir(c <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return j.make(&in.InHeader, name, func() fuse.Status { return j.server.Mkdir(c, in, name, out) })
}

func (j *journal) Mknod(c <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return j.make(&in.InHeader, name, func() fuse.Status { return j.server.Mknod(c, in, name, out) })
}

func (j *journal) Symlink(c <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return j.make(h, name, func() fuse.Status { return j.server.Symlink(c, h, target, name, out) })
}

func (j *journal) Link(c <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	if q, _ := j.again(&in.InHeader); q != nil {
		if dir := j.fs.Node(in.NodeId); dir != nil {
			// It was written down only because the name was not there. If it leads to the file now, the link was made.
			if n, err := j.fs.Lookup(dir, name); err == nil {
				if n.ID() == in.Oldnodeid {
					if q.done {
						j.fs.Forget(n.ID(), 1) // of the answer that never came
					}
					return j.found(n, nil, out)
				}
				j.fs.Forget(n.ID(), 1)
			}
			if err := j.fs.Unmake(dir, name, true); err != nil {
				return j.status(err)
			}
		}
		if n := j.fs.Node(in.Oldnodeid); n != nil && q.done {
			j.fs.Forget(n.ID(), 1) // of the answer that never came
		}
	} else if !j.exists(in.NodeId, name) {
		j.write(&in.InHeader, requestRec{op: opLink})
	}
	status := j.server.Link(c, in, name, out)
	if status.Ok() {
		j.mu.Lock()
		if r, ok := j.open[in.Unique&^devfuse.Resent]; ok {
			state.As[requestRec](r).done = true
		}
		j.mu.Unlock()
	}
	return status
}

// unmake does a request that removes a name.
func (j *journal) unmake(h *fuse.InHeader, name string, do func() fuse.Status) fuse.Status {
	if q, _ := j.again(h); q != nil {
		if dir := j.fs.Node(h.NodeId); dir != nil {
			if ino, err := j.fs.InoAt(dir, name); err == nil && ino == 0 {
				return fuse.OK
			}
		}
	} else if j.exists(h.NodeId, name) {
		j.write(h, requestRec{op: opUnlink})
	}
	return do()
}

func (j *journal) Unlink(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return j.unmake(h, name, func() fuse.Status { return j.server.Unlink(c, h, name) })
}

func (j *journal) Rmdir(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return j.unmake(h, name, func() fuse.Status { return j.server.Rmdir(c, h, name) })
}

func (j *journal) Rename(c <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	dir, dir2 := j.fs.Node(in.NodeId), j.fs.Node(in.Newdir)
	if dir != nil && dir2 != nil {
		before, err := j.fs.InoAt(dir, from)
		if q, _ := j.again(&in.InHeader); q != nil {
			after, err2 := j.fs.InoAt(dir2, to)
			if err == nil && err2 == nil && after == q.ino && before != q.ino {
				return fuse.OK
			}
		} else if err == nil && before != 0 {
			j.write(&in.InHeader, requestRec{op: opRename, ino: before, dir: in.NodeId, dir2: in.Newdir, n: uint16(len(from)), n2: uint16(len(to))}, from, to)
		}
	}
	return j.server.Rename(c, in, from, to)
}

// hasXattr says whether a node has an attribute.
func (j *journal) hasXattr(node uint64, name string) bool {
	n := j.fs.Node(node)
	if n == nil {
		return false
	}
	_, err := j.fs.Getxattr(n, name)
	return err == nil
}

func (j *journal) SetXAttr(c <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	if in.Flags&unix.XATTR_CREATE == 0 {
		return j.server.SetXAttr(c, in, name, data)
	}
	q, _ := j.again(&in.InHeader)
	if q == nil && !j.hasXattr(in.NodeId, name) {
		j.write(&in.InHeader, requestRec{op: opXattr})
	}
	status := j.server.SetXAttr(c, in, name, data)
	if q != nil && status == fuse.Status(unix.EEXIST) {
		return fuse.OK // it was set before the death
	}
	return status
}

func (j *journal) RemoveXAttr(c <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	q, _ := j.again(h)
	if q == nil && j.hasXattr(h.NodeId, name) {
		j.write(h, requestRec{op: opXattr})
	}
	status := j.server.RemoveXAttr(c, h, name)
	if q != nil && status == fuse.Status(unix.ENODATA) {
		return fuse.OK // it was removed before the death
	}
	return status
}

func (j *journal) Lookup(c <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if q, _ := j.again(h); q != nil {
		node := q.ino
		j.answered(q.unique) // first: a reference too many is a node that stays, one too few a node that the kernel loses
		j.fs.Forget(node, 1)
	}
	status := j.server.Lookup(c, h, name, out)
	if status.Ok() && out.NodeId != 0 {
		j.write(h, requestRec{op: opLookup, ino: out.NodeId})
	}
	return status
}

// Open files.

func (j *journal) Open(c <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if j.closeUnheard(&in.InHeader) != nil {
		in.Flags &^= unix.O_TRUNC // it was done
	}
	status := j.server.Open(c, in, out)
	if status.Ok() {
		j.writeHandle(&in.InHeader, in.Flags, out)
	}
	return status
}

func (j *journal) Create(c <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	j.closeUnheard(&in.InHeader)
	return j.make(&in.InHeader, name, func() fuse.Status {
		status := j.server.Create(c, in, name, out)
		if status.Ok() {
			j.writeHandle(&in.InHeader, in.Flags, &out.OpenOut)
		}
		return status
	})
}

func (j *journal) Tmpfile(c <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	if n := j.closeUnheard(&in.InHeader); n != nil {
		j.fs.Drop(n)
	}
	status := j.server.Tmpfile(c, in, out)
	if status.Ok() {
		j.writeHandle(&in.InHeader, in.Flags, &out.OpenOut)
	}
	return status
}

// writeHandle writes an open file down.
func (j *journal) writeHandle(in *fuse.InHeader, flags uint32, out *fuse.OpenOut) {
	h := j.handles.get(out.Fh)
	if h == nil {
		return // it was released already: the connection is at its end
	}
	r := j.a.New(int(unsafe.Sizeof(handleRec{})))
	rec := state.As[handleRec](r)
	*rec = handleRec{fh: out.Fh, node: h.id, unique: in.Unique &^ devfuse.Resent, flags: flags & unionFlags &^ unix.O_TRUNC,
		passed: h.passed, mappable: h.mappable, mtime: h.mtime}
	if h.passed {
		h.modes.mu.Lock()
		rec.backing, rec.kind = h.modes.backing, uint8(h.modes.kind)
		h.modes.mu.Unlock()
	}
	r.Publish(state.Handle)
	h.rec = r
}

// forgetHandle strikes an open file out.
func (s *server) forgetHandle(h *handle) {
	h.rec.Free()
	h.rec = state.Rec{}
}

// closeUnheard closes the file that the process before opened for a request and did not live to tell of. It returns the
// file's node.
func (j *journal) closeUnheard(in *fuse.InHeader) *union.Node {
	if in.Unique&devfuse.Resent == 0 {
		return nil
	}
	j.mu.Lock()
	fh, ok := j.files[in.Unique&^devfuse.Resent]
	delete(j.files, in.Unique&^devfuse.Resent)
	j.mu.Unlock()
	if !ok {
		return nil
	}
	h := j.handles.remove(fh)
	if h == nil {
		return nil
	}
	n := h.Node()
	j.forgetHandle(h)
	j.server.release(h)
	return n
}

// resume reads what the process before has left.
func (j *journal) resume() {
	for _, r := range j.a.All(state.Request) {
		j.open[state.As[requestRec](r).unique] = r
	}
	for _, r := range j.a.All(state.Handle) {
		rec := state.As[handleRec](r)
		if err := j.reopen(rec, r); err != nil {
			j.opt.Logf("a file that is open (node %d) is lost to those who have it open: %v", rec.node, err)
			r.Free()
			continue
		}
		j.files[rec.unique] = rec.fh
	}
	j.handles.putDone()
	j.fs.Resumed()
}

func (j *journal) reopen(rec *handleRec, r state.Rec) error {
	n, err := j.node(rec.node)
	if err != nil {
		return err
	}
	uh, err := j.fs.Reopen(n, rec.flags)
	if err != nil {
		return err
	}
	m := j.modes.hold(rec.node)
	h := &handle{Handle: uh, id: rec.node, modes: m, rec: r, passed: rec.passed, mappable: rec.mappable, mtime: rec.mtime}
	if rec.passed {
		m.passed++
		m.backing, m.kind = rec.backing, union.BackingKind(rec.kind)
		m.detached = j.fs.Detached(n)
	} else {
		m.cached++
	}
	j.handles.put(rec.fh, h)
	return nil
}
