// Package floor has FUSE filesystems that do as little as one can: what an operation costs on them is what the kernel, the
// transport, the waking of processes and the filesystem below cost. No union in user space can be faster over the same
// transport while it is asked the same things.
//
// [Loopback] shows a directory as it is. [Null] has no files at all behind it.
//
// They stay comparable only as long as each answer makes the kernel send the same requests as Lamina's would: which opened
// files the kernel reads and writes by itself (fusefs, admit), names and attributes without a time limit, FLUSH and OPENDIR
// answered with ENOSYS.
package floor

import (
	"strconv"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// forever is a time limit, in seconds, that the kernel never reaches.
const forever = 1 << 40

// Pass says which files the kernel reads and writes without asking.
type Pass int

const (
	// PassAsLamina passes through what Lamina does by default: files that are new or small enough to be copied whole when
	// they are opened for writing, and programs.
	PassAsLamina Pass = iota
	PassAll
	PassNone
)

// maxDirs is how many directories keep a descriptor; the others are opened when they are asked for.
const maxDirs = 4096

// Loopback returns a filesystem that shows the directory that root is a descriptor of. Nobody else may change what is in
// there. It is for measuring: whoever is let into the mount acts with this process's rights, but for owning what he makes.
func Loopback(root int, pass Pass) (fuse.RawFileSystem, error) {
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return nil, err
	}
	f := &loopback{RawFileSystem: fuse.NewDefaultRawFileSystem(), pass: pass, nodes: map[uint64]*node{}, byIno: map[uint64]*node{}, last: fuse.FUSE_ROOT_ID}
	n := &node{id: fuse.FUSE_ROOT_ID, ino: st.Ino, dir: true, children: map[string]*node{}}
	n.fd.Store(int32(root))
	f.nodes[n.id], f.byIno[n.ino] = n, n
	return f, nil
}

type loopback struct {
	fuse.RawFileSystem // ENOSYS for what is not here

	pass   Pass
	server *fuse.Server

	mu    sync.Mutex // what follows, and what it guards of nodes
	nodes map[uint64]*node
	byIno map[uint64]*node
	last  uint64 // id given

	// dirs is held for reading while a directory's descriptor is in use, and for writing to close some.
	dirs     sync.RWMutex
	openDirs atomic.Int32
}

// place is where a node is found.
type place struct {
	dir  *node
	name string
}

// node is a file that the kernel knows.
type node struct {
	id, ino uint64
	dir     bool

	// Guarded by loopback.mu.
	lookups  uint64
	nlink    uint64
	places   []place // known to the kernel; empty: removed
	children map[string]*node

	fd   atomic.Int32 // of a directory; -1: none
	list sync.Mutex   // the position of fd

	mu             sync.Mutex
	open           []int // descriptors of a file
	cached, passed int   // how the kernel has it open: it is either or
	backing        int32 // while passed > 0
	kind           kind
}

// kind is what the file would be in Lamina.
type kind int

const (
	lower  kind = iota // not written yet
	image              // not written yet, and a program
	whole              // all of it is in the upper layer
	partly             // a sketch
)

// wholeMax is up to which size Lamina copies a file whole (union, copyup.go).
const wholeMax = 64 << 10

func (f *loopback) String() string { return "floor" }

// Init is called when the connection is there.
func (f *loopback) Init(s *fuse.Server) { f.server = s }

// enter makes sure that no directory's descriptor is closed until leave.
func (f *loopback) enter() {
	if f.openDirs.Load() > maxDirs {
		f.closeDirs()
	}
	f.dirs.RLock()
}

func (f *loopback) leave() { f.dirs.RUnlock() }

func (f *loopback) closeDirs() {
	f.dirs.Lock()
	defer f.dirs.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.nodes {
		if n.id != fuse.FUSE_ROOT_ID && len(n.places) > 0 { // a removed one could not be opened again
			f.closeDir(n)
		}
	}
}

func (f *loopback) closeDir(n *node) {
	if fd := n.fd.Swap(-1); fd >= 0 {
		unix.Close(int(fd))
		f.openDirs.Add(-1)
	}
}

func (f *loopback) node(id uint64) (*node, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.nodes[id]; n != nil {
		return n, nil
	}
	return nil, unix.ESTALE
}

// where is the place that a node was seen at last.
func (f *loopback) where(n *node) (place, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(n.places) == 0 {
		return place{}, unix.ESTALE
	}
	return n.places[len(n.places)-1], nil
}

// dirFD gives a directory's descriptor. The caller has entered.
func (f *loopback) dirFD(n *node) (int, error) {
	if fd := n.fd.Load(); fd >= 0 {
		return int(fd), nil
	}
	if !n.dir {
		return -1, unix.ENOTDIR
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if fd := n.fd.Load(); fd >= 0 {
		return int(fd), nil
	}
	parent, name, err := f.parent(n)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	n.fd.Store(int32(fd))
	f.openDirs.Add(1)
	return fd, nil
}

// parent gives the descriptor of the directory that a node lies in, and its name there.
func (f *loopback) parent(n *node) (int, string, error) {
	p, err := f.where(n)
	if err != nil {
		return -1, "", err
	}
	fd, err := f.dirFD(p.dir)
	return fd, p.name, err
}

// dirOf is node and dirFD of a request's directory.
func (f *loopback) dirOf(id uint64) (*node, int, error) {
	n, err := f.node(id)
	if err != nil {
		return nil, -1, err
	}
	fd, err := f.dirFD(n)
	return n, fd, err
}

// opened is a descriptor of a file that is open; -1 if none is.
func (n *node) opened() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.open) == 0 {
		return -1
	}
	return n.open[0]
}

// stat asks for a node's attributes.
func (f *loopback) stat(n *node, st *unix.Stat_t) error {
	if fd := n.fd.Load(); n.dir && fd >= 0 {
		return unix.Fstat(int(fd), st)
	}
	parent, name, err := f.parent(n)
	if err == nil {
		return unix.Fstatat(parent, name, st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if fd := n.opened(); fd >= 0 {
		return unix.Fstat(fd, st)
	}
	return err
}

// path is one that leads to a node, for calls that take no descriptor.
func (f *loopback) path(n *node) (string, error) {
	if fd := n.fd.Load(); n.dir && fd >= 0 {
		return "/proc/self/fd/" + strconv.Itoa(int(fd)) + "/.", nil
	}
	parent, name, err := f.parent(n)
	if err == nil {
		return "/proc/self/fd/" + strconv.Itoa(parent) + "/" + name, nil
	}
	if fd := n.opened(); fd >= 0 {
		return "/proc/self/fd/" + strconv.Itoa(fd), nil
	}
	return "", err
}

// seen notes that there is a file at a place, and gives the kernel a reference to it.
func (f *loopback) seen(dir *node, name string, st *unix.Stat_t) *node {
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.byIno[st.Ino]
	if n == nil || n.dir != isDir {
		f.last++
		n = &node{id: f.last, ino: st.Ino, dir: isDir}
		n.fd.Store(-1)
		if isDir {
			n.children = map[string]*node{}
		}
		f.nodes[n.id], f.byIno[n.ino] = n, n
	}
	n.lookups++
	n.nlink = uint64(st.Nlink)
	if name != "" && dir.children[name] != n {
		f.lose(dir, name)
		dir.children[name] = n
		n.places = append(n.places, place{dir, name})
	}
	return n
}

// lose forgets what lies at a place. The caller holds f.mu.
func (f *loopback) lose(dir *node, name string) *node {
	n := dir.children[name]
	if n == nil {
		return nil
	}
	delete(dir.children, name)
	for i, p := range n.places {
		if p.dir == dir && p.name == name {
			n.places = append(n.places[:i], n.places[i+1:]...)
			break
		}
	}
	return n
}

// removed notes that the name is gone. Its inode number may be another file's soon.
func (f *loopback) removed(dir *node, name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.lose(dir, name); n != nil {
		f.unlinked(n)
	}
}

func (f *loopback) unlinked(n *node) {
	n.nlink--
	if (n.dir || n.nlink == 0) && f.byIno[n.ino] == n {
		delete(f.byIno, n.ino)
	}
}

func (f *loopback) Forget(id, nlookup uint64) {
	f.enter()
	defer f.leave()
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[id]
	if n == nil {
		return
	}
	if n.lookups -= min(n.lookups, nlookup); n.lookups > 0 || id == fuse.FUSE_ROOT_ID {
		return
	}
	delete(f.nodes, id)
	if f.byIno[n.ino] == n {
		delete(f.byIno, n.ino)
	}
	for len(n.places) > 0 {
		f.lose(n.places[0].dir, n.places[0].name)
	}
	for name := range n.children {
		f.lose(n, name)
	}
	f.closeDir(n)
}

func fill(a *fuse.Attr, st *unix.Stat_t) {
	*a = fuse.Attr{
		Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: uint64(st.Atim.Sec), Atimensec: uint32(st.Atim.Nsec),
		Mtime: uint64(st.Mtim.Sec), Mtimensec: uint32(st.Mtim.Nsec),
		Ctime: uint64(st.Ctim.Sec), Ctimensec: uint32(st.Ctim.Nsec),
		Mode: st.Mode, Nlink: uint32(st.Nlink), Owner: fuse.Owner{Uid: st.Uid, Gid: st.Gid},
		Rdev: uint32(st.Rdev), Blksize: uint32(st.Blksize),
	}
}

func describe(n *node, st *unix.Stat_t, out *fuse.EntryOut) {
	out.NodeId, out.EntryValid, out.AttrValid = n.id, forever, forever
	fill(&out.Attr, st)
}

// status is an error's number.
func status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	return fuse.ToStatus(err)
}

// dirent is one entry of getdents64(2): struct linux_dirent64.
type dirent struct {
	ino  uint64
	off  int64
	kind byte
	name string
}

// nextEntry takes the first entry from what getdents64 gave.
func nextEntry(b []byte) (e dirent, rest []byte) {
	d := (*unix.Dirent)(unsafe.Pointer(&b[0]))
	const nameAt = int(unsafe.Offsetof(unix.Dirent{}.Name))
	name := b[nameAt:d.Reclen]
	for i, c := range name {
		if c == 0 {
			name = name[:i]
			break
		}
	}
	return dirent{d.Ino, d.Off, d.Type, string(name)}, b[d.Reclen:]
}
