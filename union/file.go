package union

import (
	"errors"
	"io"

	"lamina/block"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// content is what the open descriptors of a node read and write: the lower file until copy-up, the upper one afterwards.
// A descriptor opened before copy-up follows along, because it goes through the node.
type content struct {
	file  *block.File       // upper
	lower block.Lower       // lower only
	stack []lowerRef        // lower only: where it lies
	pass  bool              // lower can be handed to the kernel for passthrough
	done  func(*block.File) // Node.settled, made once
	prev  *content          // what the descriptors used before: calls in flight may still do, so it stays until the last goes
}

// close closes everything that the descriptors ever used. An upper file whose bytes have to last has been closed before.
func (c *content) close() {
	for ; c != nil; c = c.prev {
		if c.lower != nil {
			c.lower.Close()
		}
		if c.file != nil {
			c.file.Abandon()
		}
	}
}

// Handle is one open regular file.
type Handle struct {
	n     *Node
	flags uint32
}

// Node gives the node that the handle was opened on.
func (h *Handle) Node() *Node { return h.n }

const writing = unix.O_WRONLY | unix.O_RDWR | unix.O_TRUNC

// Open opens a regular file. A file opened for writing is copied up first, so that what can fail (no space, a read-only
// union) fails here and not in a write-back.
func (fs *FS) Open(n *Node, flags uint32) (*Handle, error) {
	if !isReg(n.mode) {
		return nil, unix.EINVAL
	}
	opened := false
	if flags&writing != 0 {
		var err error
		if opened, err = fs.copyUpTo(n, purpose{truncate: flags&unix.O_TRUNC != 0, open: true}); err != nil {
			return nil, err
		}
	}
	if !opened {
		if err := fs.acquire(n); err != nil {
			return nil, err
		}
	}
	h := &Handle{n: n, flags: flags}
	var err error
	if flags&unix.O_TRUNC != 0 {
		err = h.truncate(0)
	} else if flags&writing != 0 {
		err = h.writeThrough() // a small file that was copied whole may be written past us from now on
	}
	if err != nil {
		h.Release()
		return nil, err
	}
	return h, nil
}

// acquire opens the node's content, or takes another reference on it.
func (fs *FS) acquire(n *Node) error {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	if n.detached {
		return unix.ESTALE
	}
	return fs.openAgain(n)
}

// openAgain is acquire of a node that may be detached. The caller holds tree.
func (fs *FS) openAgain(n *Node) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cur.Load() == nil {
		c, err := fs.openContent(n)
		if err != nil {
			return err
		}
		n.cur.Store(c)
	}
	n.hold()
	n.opens++
	return nil
}

// unkeep undoes keep: the name stayed after all. The caller holds tree for writing.
func (n *Node) unkeep() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.strikeBelow()
	if n.kept == nil {
		return
	}
	if n.kept.fd >= 0 {
		unix.Close(n.kept.fd)
	}
	n.kept = nil
	if !n.rec.None() {
		n.fs.dropKept(n.id)
	}
}

// keeper keeps a file that lost its last name.
type keeper struct {
	fd int // O_PATH; -1 where the content was open anyway
}

// unkept is what kept a file that can be closed now. Closing a file without a name is what removes it, which can take
// its time.
type unkept struct {
	fd int
	c  *content
	id uint64
}

func (fs *FS) closeUnkept(list []unkept) {
	for _, u := range list {
		if fs.state != nil {
			fs.dropKept(u.id)
		}
		if u.fd >= 0 {
			unix.Close(u.fd)
		}
		u.c.close()
	}
}

// takeUnkept gives what has to be closed, outside the lock. The caller holds tab.
func (fs *FS) takeUnkept() []unkept {
	gone := fs.unkept
	fs.unkept = nil
	return gone
}

// hold keeps the node alive until its content is closed. The caller holds mu.
func (n *Node) hold() {
	if !n.held {
		n.held = true
		n.fs.pin(n)
	}
}

// keep holds on to an upper file that is about to lose its last name, until the kernel forgets the node: somebody may
// have looked the name up and be about to open it, or to follow it. A lower file needs no keeping. The caller holds tree
// for writing.
func (fs *FS) keep(n *Node, was *Attr) {
	if was.Nlink > 1 {
		return
	}
	n.writeBelow()
	if !n.upper {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	switch n.mode {
	case unix.S_IFLNK:
		if d, path, err := fs.upperAt(n); err == nil {
			n.target, _ = d.Readlink(path)
		}
		return
	case unix.S_IFREG:
	default:
		return
	}
	k := &keeper{fd: -1}
	if n.cur.Load() == nil {
		d, path, err := fs.upperAt(n)
		if err == nil {
			k.fd, err = d.OpenPath(path)
		}
		if err != nil {
			return // nobody could open it under its name either
		}
	}
	fs.keepLink(n)
	n.kept = k
}

func (fs *FS) openContent(n *Node) (*content, error) {
	if !n.upper {
		return fs.openBelow(n.stack)
	}
	fd, path, err := fs.openUpper(n)
	if err != nil {
		return nil, err
	}
	f, err := fs.cfg.Engine.Open(fs.store(fd), fs.lowerOf(n.stack))
	if err != nil {
		fs.logDamage("sketch", path, err)
		return nil, err
	}
	return &content{file: f}, nil
}

// openUpper opens a node's upper file for reading and writing, and says what to call it.
func (fs *FS) openUpper(n *Node) (fd int, path string, err error) {
	if n.dead {
		if n.kept == nil || n.kept.fd < 0 {
			return -1, "", unix.ESTALE // its last name and its last descriptor are gone
		}
		fd, err = layer.Reopen(n.kept.fd, unix.O_RDWR)
		return fd, "(nameless)", err
	}
	d, path, err := fs.upperAt(n)
	if err != nil {
		return -1, "", err
	}
	fd, err = d.OpenFile(path, unix.O_RDWR, 0)
	return fd, path, err
}

// openBelow opens a lower file.
func (fs *FS) openBelow(stack []lowerRef) (*content, error) {
	low, err := fs.openLower(stack)
	if err != nil {
		return nil, err
	}
	d, ok := fs.lowers[stack[0].layer].(*layer.Dir)
	return &content{lower: low, stack: stack, pass: ok && d.Cloned() && !stack[0].sketch}, nil
}

// upperAt says where the upper object of a node is: under its name, or in the index. The caller holds tree.
func (fs *FS) upperAt(n *Node) (*layer.Dir, string, error) {
	if n.indexed {
		return fs.work, indexPath(n.key), nil
	}
	if n == fs.root {
		return fs.upper, "", nil
	}
	l, ok := fs.firstLink(n)
	if !ok {
		return nil, "", unix.ESTALE
	}
	return fs.upper, join(l.dir.path(), l.name), nil
}

func (fs *FS) store(fd int) block.Store {
	return block.OpenStore(fd, fs.prefix+layer.XattrMetacopy, fs.prefix+layer.XattrOrigin)
}

// lowerOf opens, when first asked, the chain of lower files that a sketch's blocks are read from.
func (fs *FS) lowerOf(stack []lowerRef) func() (block.Lower, error) {
	return func() (block.Lower, error) { return fs.openLower(stack) }
}

var errNoLower = errors.New("the lower file that this sketch was made from is missing: mount with the layers it was made on")

func (fs *FS) openLower(stack []lowerRef) (block.Lower, error) {
	if len(stack) == 0 {
		return nil, &dataError{errNoLower}
	}
	ref := stack[0]
	f, err := fs.lowers[ref.layer].Open(ref.path)
	if err != nil {
		return nil, err
	}
	if !ref.sketch {
		return lowerFile{f, fs.lowers[ref.layer].FS()}, nil
	}
	defer f.Close()
	src, ok := f.(layer.FDer)
	if !ok {
		return nil, unix.EOPNOTSUPP
	}
	fd, err := unix.FcntlInt(uintptr(src.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	low, err := block.OpenReadOnly(fs.store(fd), fs.lowerOf(stack[1:]))
	if err != nil {
		fs.logDamage("sketch in layer "+fs.lowers[ref.layer].Name(), ref.path, err)
	}
	return low, err
}

// lowerFile is a layer's file that knows its filesystem, so that a sketch can tell it from another file of its size and
// time.
type lowerFile struct {
	layer.File
	fs uint64
}

func (l lowerFile) FS() uint64 { return l.fs }

// FD is the file's descriptor, -1 where the backend has none.
func (l lowerFile) FD() int {
	if f, ok := l.File.(layer.FDer); ok {
		return f.FD()
	}
	return -1
}

// dataError is EIO with a reason.
type dataError struct{ err error }

func (e *dataError) Error() string   { return e.err.Error() }
func (e *dataError) Unwrap() []error { return []error{e.err, unix.EIO} }

// Release closes the handle. Bytes written through it stay with the engine until they settle.
func (h *Handle) Release() {
	n := h.n
	if c := n.lastClose(); c != nil {
		c.file.Settle(c.done)
	}
}

// lastClose counts a handle out. After the last one it closes the content, or returns it if it is a sketch that must
// settle first.
func (n *Node) lastClose() *content {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.opens--
	if n.opens > 0 {
		return nil
	}
	c := n.cur.Load()
	if c.file == nil {
		n.closeContent(c)
		return nil
	}
	if c.file.Sketch() && !n.dead {
		if c.done == nil {
			c.done = n.settled
		}
		return c
	}
	n.remember(c.file)
	n.closeContent(c) // an ordinary file, or one that nobody will ever read again
	return nil
}

// settled is called by the engine when f's bytes and table are in place.
func (n *Node) settled(f *block.File) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := n.cur.Load()
	if n.opens > 0 || c == nil || c.file != f {
		return
	}
	if n.kept != nil {
		n.closeContent(c)
		return
	}
	n.remember(f)
	if err := f.Close(); err != nil {
		if !n.fs.closing.Load() {
			n.fs.cfg.Logf("closing inode %d of the union, tried again later: %v", n.ino, err)
			go f.Settle(n.settled)
			return
		}
		n.fs.cfg.Logf("inode %d of the union could not be settled; blocks written since its last fsync show the lower file again: %v", n.ino, err)
		f.Abandon()
	}
	n.closeContent(c)
}

// remember keeps what stat needs to know of a file while it is closed. The caller holds mu.
func (n *Node) remember(f *block.File) {
	if n.sketch = f.Sketch(); n.sketch {
		n.size = f.Size()
	}
}

// closeContent closes a content, unless it is kept, without saving what its upper file has not yet put on disk. The
// caller holds mu.
func (n *Node) closeContent(c *content) {
	if n.kept == nil {
		n.cur.Store(nil)
		c.close()
	}
	if n.held {
		n.held = false
		n.fs.unpin(n)
	}
}

// ReadAt reads from the file as it is now; io.EOF at its end.
func (h *Handle) ReadAt(p []byte, off int64) (int, error) {
	c := h.n.cur.Load()
	if c.file != nil {
		return c.file.ReadAt(p, off)
	}
	return c.lower.ReadAt(p, off)
}

// WriteAt writes to the file, which was copied up when the handle was opened. killPriv: the writer may not keep set-id
// bits; capabilities go with any write.
func (h *Handle) WriteAt(p []byte, off int64, killPriv bool) (int, error) {
	c := h.n.cur.Load()
	if c.file == nil {
		return 0, unix.EBADF
	}
	if !h.n.privClean.Load() {
		if err := h.n.fs.dropPriv(h.n, killPriv); err != nil {
			return 0, err
		}
	}
	wrote, err := c.file.WriteAt(p, off)
	if err := h.writeThrough(); err != nil {
		return 0, err
	}
	return wrote, err
}

// writeThrough ends every change of a file's bytes: see FS.WriteThrough. What passes through to the upper file, or always
// did, needs nothing.
func (h *Handle) writeThrough() error {
	if !h.n.fs.through.Load() {
		return nil
	}
	if c := h.n.cur.Load(); c.file != nil && c.file.Sketch() {
		return c.file.Sync(false)
	}
	return nil
}

// Sync makes what was written through any handle of the file durable, with the names that copy-up made for it.
func (h *Handle) Sync(dataOnly bool) error {
	c := h.n.cur.Load()
	if c.file == nil {
		return nil
	}
	if err := c.file.Sync(dataOnly); err != nil {
		return err
	}
	return h.n.fs.syncUp(h.n)
}

// Fallocate is fallocate(2), all modes that the upper's filesystem knows.
func (h *Handle) Fallocate(mode uint32, off, n int64) error {
	c := h.n.cur.Load()
	if c.file == nil {
		return unix.EBADF
	}
	if err := c.file.Fallocate(mode, off, n); err != nil {
		return err
	}
	return h.writeThrough()
}

// Seek is lseek(2) with SEEK_DATA or SEEK_HOLE.
func (h *Handle) Seek(off int64, whence int) (int64, error) {
	c := h.n.cur.Load()
	if c.file != nil {
		return c.file.Seek(off, whence)
	}
	return seekLower(c.lower, off, whence)
}

func seekLower(l block.Lower, off int64, whence int) (int64, error) {
	st, err := l.Stat()
	if err != nil {
		return 0, err
	}
	if off < 0 || off >= st.Size {
		return 0, unix.ENXIO
	}
	start, end, err := l.SeekData(off)
	switch {
	case whence == unix.SEEK_DATA:
		return start, err
	case errors.Is(err, unix.ENXIO) || err == nil && start > off:
		return off, nil
	}
	for err == nil && end < st.Size { // an extent that another one follows directly is no hole
		var next int64
		if start, next, err = l.SeekData(end); err != nil || start > end {
			return end, nil
		}
		end = next
	}
	return min(end, st.Size), err
}

// CopyRange is copy_file_range(2) between two open files of the union. The kernel has asked for set-id bits to go, if
// they must, before it sends the request.
func (fs *FS) CopyRange(src *Handle, srcOff int64, dst *Handle, dstOff, n int64) (int64, error) {
	to := dst.n.cur.Load()
	if to.file == nil {
		return 0, unix.EBADF
	}
	if !dst.n.privClean.Load() {
		if err := fs.dropPriv(dst.n, false); err != nil {
			return 0, err
		}
	}
	from := src.n.cur.Load()
	var r io.ReaderAt = from.lower
	if from.file != nil {
		r = from.file
	}
	copied, err := to.file.CopyFrom(dstOff, r, srcOff, n)
	if err := dst.writeThrough(); err != nil {
		return 0, err
	}
	return copied, err
}

func (h *Handle) truncate(size int64) error {
	c := h.n.cur.Load()
	if err := c.file.Truncate(size); err != nil {
		return err
	}
	now := nowTimespec()
	if err := c.file.SetTimes(unix.Timespec{Nsec: unix.UTIME_OMIT}, now); err != nil {
		return err
	}
	return h.writeThrough()
}

// BackingKind says what a handle's descriptor stands for.
type BackingKind uint8

const (
	BackingNone  BackingKind = iota // a sketch, or a backend without descriptors
	BackingLower                    // a lower file through a read-only clone of its mount; a later write makes it a sketch
	BackingUpper                    // a complete file of the upper layer: it stays what it is
)

// Backing gives the descriptor that holds all of the file's bytes now, for passthrough. It belongs to the node's
// content and lives as long as the handle.
func (h *Handle) Backing() (fd int, kind BackingKind) {
	c := h.n.cur.Load()
	if c.file != nil {
		if fd, ok := c.file.Plain(); ok {
			return fd, BackingUpper
		}
		return -1, BackingNone
	}
	if f, ok := c.lower.(layer.FDer); ok && c.pass && f.FD() >= 0 {
		return f.FD(), BackingLower
	}
	return -1, BackingNone
}

// Provisional says that after a power cut the file would be the lower one again, whatever of the upper file is on disk:
// until the next Sync nothing that is written to the descriptor that Backing gives is durable.
func (h *Handle) Provisional() bool {
	c := h.n.cur.Load()
	return c.file != nil && c.file.Provisional()
}

// Name is one name of a node, by the number of its directory's node.
type Name struct {
	Dir  uint64
	Name string
}

// Detach takes the names of a lower file away from n, so that the file can be copied up while readers of n whose reads
// the kernel passes to the lower file live on: n keeps showing the lower's bytes. The names are returned: whoever looks
// them up again finds another node (another node number, the same st_ino). Until the kernel has, and whenever somebody
// comes to n by a descriptor, opening n or changing anything about it is ESTALE, which has the kernel look the name up.
func (fs *FS) Detach(n *Node) ([]Name, error) {
	// A copy-up that has begun gives its file to the names it finds in the end: they must still be n's.
	n.cu.Lock()
	defer n.cu.Unlock()
	// The next node does not know which names of a copy-up are not on disk yet.
	if err := fs.syncUp(n); err != nil {
		return nil, err
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	if n.dead {
		return nil, nil // another was faster
	}
	last, err := fs.attr(n)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	c := n.cur.Load()
	stack := n.stack
	for below := c; len(stack) == 0 && below != nil; below = below.prev {
		stack = below.stack // it was copied up whole while readers had it open
	}
	if len(stack) == 0 {
		return nil, nil // nobody has the lower file open
	}
	if c != nil && c.file != nil {
		// Copied up for its metadata or a name only: what was made of it stays with the names.
		below, err := fs.openBelow(stack)
		if err != nil {
			return nil, err
		}
		n.remember(c.file)
		below.prev = c
		n.cur.Store(below)
	}
	n.dead, n.detached, n.last, n.upper, n.indexed, n.stack = true, true, last, false, false, stack
	n.writeBelow()
	n.rememberLife()
	return fs.dropLinks(n), nil
}
