package fusefs

import (
	"bytes"
	"errors"
	"io"
	"sync"

	"lamina/union"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// modes is how the kernel has one inode open. It exists while a descriptor does.
//
// The kernel keeps an inode in one of three states and refuses, with EIO in the application, an answer to OPEN or
// CREATE that does not fit (fs/fuse/iomode.c, Linux 6.9):
//
//	answer               idle           cached(n)      passthrough(n, B)
//	plain                cached(1)      cached(n+1)    EIO
//	passthrough, id B    passthrough    EIO            passthrough(n+1, B)
//	passthrough, id C    passthrough    EIO            EIO
//
// The last release makes the inode idle again, before RELEASE is sent: seen from here the kernel is never behind.
// A passthrough answer must not carry FOPEN_KEEP_CACHE, and so empties the inode's page cache; nothing fills it while
// reads go to the backing file. That is why a plain answer may always carry FOPEN_KEEP_CACHE: what the cache holds was
// read or written through it since the inode was last passed through, and nobody else writes the file.
//
// # What passes through
//
// A complete file of the upper layer stays what it is, so every descriptor of it passes through, for writing too. A
// lower file does as long as it is not written: the descriptors given out then cannot be called back, and keep showing
// the lower's bytes. For an executable image that is what one wants of a file in use; for data it is not, because a
// program that opened a file before somebody wrote it must see the writing. Hence the policies of [Passthrough].
//
// # Syncs that the server does not hear of
//
// What is written with O_SYNC or O_DSYNC, or through a shared mapping and then synced with msync, is made durable by the
// backing file's filesystem alone where the inode is passed through. That is not enough for a file that is provisional
// (see [union.Handle.Provisional]), so descriptors with which it can be done keep an idle inode of such a file cached, and
// make one that is passed through durable before they join. RWF_DSYNC with pwritev2 on any other descriptor cannot be
// foreseen.
//
// # A write to a passed-through lower file
//
// When an open for writing, or a truncation by name, meets such descriptors, the node loses its names
// (union.FS.Detach), the old node stays with its readers, and the answer is ESTALE: the VFS looks the name up again and
// finds the new node, which has the same inode number. A backing id is never carried over to it. Somebody who reopens
// the old node itself, through /proc/PID/fd, gets the ESTALE. Until the writer has come, the new node is not passed
// through: the VFS tries only once more.
type modes struct {
	refs int // guarded by the shard

	mu       sync.Mutex
	cached   int
	passed   int
	backing  int32             // while passed > 0
	kind     union.BackingKind // of backing
	detached bool              // the names have moved away
}

// modeTable finds the modes of a node. It is striped so that opens of different files do not meet.
type modeTable struct {
	shards [64]struct {
		sync.Mutex
		m map[uint64]*modes
		_ [48]byte // one cache line each
	}
}

// hold returns the node's modes, with a reference that drop gives back.
func (t *modeTable) hold(id uint64) *modes {
	s := &t.shards[id%uint64(len(t.shards))]
	s.Lock()
	defer s.Unlock()
	m := s.m[id]
	if m == nil {
		if s.m == nil {
			s.m = map[uint64]*modes{}
		}
		m = idleModes.Get().(*modes)
		s.m[id] = m
	}
	m.refs++
	return m
}

func (t *modeTable) drop(id uint64, m *modes) {
	s := &t.shards[id%uint64(len(t.shards))]
	s.Lock()
	defer s.Unlock()
	if m.refs--; m.refs == 0 {
		delete(s.m, id)
		m.detached = false // the rest is zero without a descriptor
		idleModes.Put(m)
	}
}

// idleModes are those of nodes that nobody has open: most files are opened by one process at a time, again and again.
var idleModes = sync.Pool{New: func() any { return new(modes) }}

// writes says that an open can change the file's bytes.
func writes(flags uint32) bool {
	return flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0
}

// unionFlags are the open flags that concern the union. The rest is the kernel's: O_APPEND arrives as an offset,
// O_SYNC as FSYNC, O_DIRECT as unaligned server buffers.
const unionFlags = unix.O_ACCMODE | unix.O_TRUNC

// open opens n as the kernel asks and fills out. ESTALE: the names of n belong to another node now.
func (s *server) open(n *union.Node, flags uint32, dropSetID bool, out *fuse.OpenOut) error {
	m := s.modes.hold(n.ID())
	open := s.openReader
	if writes(flags) {
		open = s.openWriter
	}
	h, err := open(n, m, flags, out)
	if err != nil {
		s.modes.drop(n.ID(), m)
		return err
	}
	if dropSetID {
		if err := s.dropSetID(n); err != nil {
			s.release(h)
			return err
		}
	}
	out.Fh = s.handles.add(h)
	return nil
}

// openReader opens for reading only. Readers wait for each other only while they are counted: to open a file of a slow
// layer may take long.
func (s *server) openReader(n *union.Node, m *modes, flags uint32, out *fuse.OpenOut) (*handle, error) {
	uh, err := s.fs.Open(n, flags&unionFlags)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.detached {
		uh.Release()
		return nil, unix.ESTALE
	}
	return s.admit(n, m, uh, flags, out), nil
}

// openWriter opens for writing, which copies the file up. It holds the lock throughout, so that no reader can be passed
// through to bytes that are about to change.
func (s *server) openWriter(n *union.Node, m *modes, flags uint32, out *fuse.OpenOut) (*handle, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := s.beforeWrite(n, m); err != nil {
		return nil, err
	}
	uh, err := s.fs.Open(n, flags&unionFlags)
	if err != nil {
		return nil, err
	}
	s.awaited.Delete(n.Ino())
	if m.passed > 0 && uh.Provisional() && s.syncsUnheard(flags) {
		if err := uh.Sync(true); err != nil {
			uh.Release()
			return nil, err
		}
	}
	return s.admit(n, m, uh, flags, out), nil
}

// syncsUnheard says that bytes can be written and synced through a passed-through open without a request. O_DIRECT is
// what programs use that sync every write by itself.
func (s *server) syncsUnheard(flags uint32) bool {
	switch flags & unix.O_ACCMODE {
	case unix.O_RDONLY:
		return false
	case unix.O_RDWR: // can be mapped
		return true
	}
	return flags&(unix.O_DSYNC|unix.O_DIRECT) != 0 || s.opt.MountFlags&unix.MS_SYNCHRONOUS != 0
}

// adopt makes the handle of a file that was just created.
func (s *server) adopt(n *union.Node, uh *union.Handle, flags uint32, out *fuse.OpenOut) {
	m := s.modes.hold(n.ID())
	m.mu.Lock()
	defer m.mu.Unlock()
	out.Fh = s.handles.add(s.admit(n, m, uh, flags, out))
}

// beforeWrite makes way for a write to n's bytes: readers that were passed through to the lower file are left behind,
// and then the answer is ESTALE. The caller holds m.mu.
func (s *server) beforeWrite(n *union.Node, m *modes) error {
	if m.detached {
		return unix.ESTALE
	}
	if m.passed == 0 || m.kind != union.BackingLower {
		return nil
	}
	if s.fs.ReadOnly() {
		return unix.EROFS
	}
	s.awaited.Store(n.Ino(), struct{}{})
	names, err := s.fs.Detach(n)
	if err != nil {
		return err
	}
	m.detached = true
	s.stats.detached.Add(1)
	go s.renew(n.ID(), names)
	return unix.ESTALE
}

// admit counts one more descriptor of n and says in out how the kernel is to treat it. The caller holds m.mu and a
// reference on m, which goes to the handle.
func (s *server) admit(n *union.Node, m *modes, uh *union.Handle, flags uint32, out *fuse.OpenOut) *handle {
	h := &handle{Handle: uh, id: n.ID(), modes: m}
	if m.passed == 0 && m.cached == 0 {
		s.tryPass(n, m, uh, flags)
	}
	if m.backing != 0 {
		h.passed = true
		m.passed++
		if flags&unix.O_ACCMODE == unix.O_RDWR {
			h.mtime, h.mappable = mtimeOf(uh)
		}
		out.OpenFlags = fuse.FOPEN_PASSTHROUGH | fuse.FOPEN_NOFLUSH
		out.BackingID = m.backing
		s.stats.passed.Add(1)
		return h
	}
	m.cached++
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	if !writes(flags) {
		// Saves the kernel a look for dirty pages at every close. Writers want it: it is where a failed write-back of
		// a shared mapping is reported.
		out.OpenFlags |= fuse.FOPEN_NOFLUSH
	}
	s.stats.cached.Add(1)
	return h
}

// tryPass registers the backing file of an idle inode if its opens may pass through.
func (s *server) tryPass(n *union.Node, m *modes, uh *union.Handle, flags uint32) {
	if !s.pass.enabled() {
		return
	}
	fd, kind := uh.Backing()
	if !s.mayPass(n, uh, kind, flags) {
		return
	}
	id, err := s.dev.registerBacking(fd)
	if err != nil {
		s.pass.failed(err)
		return
	}
	m.backing, m.kind = id, kind
}

func (s *server) mayPass(n *union.Node, uh *union.Handle, kind union.BackingKind, flags uint32) bool {
	switch kind {
	case union.BackingUpper:
		return !uh.Provisional() || !s.syncsUnheard(flags)
	case union.BackingLower:
		if writes(flags) {
			return false // never: the kernel would open the lower file for writing
		}
		if _, soon := s.awaited.Load(n.Ino()); soon {
			return false // its writer is on the way, and would meet this reader again
		}
		return s.opt.Passthrough == PassthroughOn || s.fs.ReadOnly() || isImage(n, uh)
	}
	return false
}

// isImage says that a lower file is an ELF object: a program or a library, which gains most from sharing its pages with
// all containers, and which nobody expects to change in use. Lower files do not change, so the node remembers it. The
// caller holds the lock of n's modes, which guards that too.
func isImage(n *union.Node, uh *union.Handle) bool {
	image, known := n.Aux().(bool)
	if known {
		return image
	}
	var magic [4]byte
	read, err := uh.ReadAt(magic[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return false // the read that follows will meet the error, or not
	}
	image = read == len(magic) && bytes.Equal(magic[:], []byte("\x7fELF"))
	n.SetAux(image)
	return image
}

// release ends a descriptor. The backing id goes with the last one: the next open may find another file.
func (s *server) release(h *handle) {
	s.noticeMapping(h)
	m := h.modes
	m.mu.Lock()
	if h.passed {
		m.passed--
		if m.passed == 0 {
			s.dev.unregisterBacking(m.backing)
			m.backing, m.kind = 0, union.BackingNone
		}
	} else {
		m.cached--
	}
	m.mu.Unlock()
	h.Release()
	s.modes.drop(h.id, m)
}

// releaseAll ends the descriptors whose RELEASE the kernel dropped when the mount went.
func (s *server) releaseAll() {
	for _, h := range s.handles.takeAll() {
		s.release(h)
	}
}

// noticeMapping makes the kernel ask for the attributes again if the file's bytes changed while h was open. The kernel
// sees what is written with write(2) itself, but what is written through a shared mapping of the backing file changes
// that file's times only.
func (s *server) noticeMapping(h *handle) {
	if !h.mappable {
		return
	}
	if mtime, ok := mtimeOf(h.Handle); ok && mtime != h.mtime {
		s.dev.invalAttr(h.id)
	}
}

// mtimeOf gives the modification time of a passed-through file; false if it has no backing file.
func mtimeOf(uh *union.Handle) (unix.Timespec, bool) {
	fd, kind := uh.Backing()
	if kind == union.BackingNone {
		return unix.Timespec{}, false
	}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return unix.Timespec{}, false
	}
	return st.Mtim, true
}

// renew makes the kernel look up the names of a detached node again, also those that are not being opened.
func (s *server) renew(id uint64, names []union.Name) {
	for _, name := range names {
		s.dev.forgetEntry(name.Dir, name.Name)
	}
	s.dev.prune(id)
}
