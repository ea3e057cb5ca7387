package uring

import (
	"fmt"
	"sort"
	"strings"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// memFS is a small file system in memory: one flat directory, whose subdirectories stay empty. It answers the same to the
// same requests in the same order, caches nothing in the kernel, so that every system call becomes a request, and notes
// what it was asked.
type memFS struct {
	fuse.RawFileSystem // ENOSYS for what is not here

	// hook, if not nil, is called first in every operation but Forget, Release and ReleaseDir, with the operation's
	// name and the file it is about.
	hook func(op, name string)
	// xattrLie is how many bytes longer than they are GetXAttr says that its values are.
	xattrLie int

	mu      sync.Mutex
	nodes   map[uint64]*memNode
	names   map[string]*memNode
	next    uint64
	trace   []string
	lookups map[uint64]int64 // the kernel's references
	forgets int              // messages
}

type memNode struct {
	id             uint64
	name           string // its last
	mode, uid, gid uint32
	nlink          uint32
	rdev           uint32
	mtime          uint64
	data           []byte
	xattrs         map[string][]byte
}

func newMemFS() *memFS {
	m := &memFS{RawFileSystem: fuse.NewDefaultRawFileSystem(), nodes: map[uint64]*memNode{}, names: map[string]*memNode{},
		lookups: map[uint64]int64{}, next: 1}
	m.add("/", unix.S_IFDIR|0o755, 0, 0)
	delete(m.names, "/")
	return m
}

// add makes a node. The caller has the lock, or is alone.
func (m *memFS) add(name string, mode, uid, gid uint32) *memNode {
	n := &memNode{id: m.next, name: name, mode: mode, uid: uid, gid: gid, nlink: 1, xattrs: map[string][]byte{}}
	m.next++
	m.nodes[n.id], m.names[name] = n, n
	return n
}

// file adds a regular file from outside.
func (m *memFS) file(name string, data []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.add(name, unix.S_IFREG|0o644, 0, 0).data = data
}

// begin notes an operation on a node and returns with the lock held.
func (m *memFS) begin(op string, id uint64, args ...any) *memNode {
	m.mu.Lock()
	n := m.nodes[id]
	m.trace = append(m.trace, op+fmt.Sprint(id, args))
	if m.hook != nil {
		name := n.name
		if len(args) > 0 {
			if s, ok := args[0].(string); ok {
				name = s
			}
		}
		m.mu.Unlock()
		m.hook(op, name)
		m.mu.Lock()
	}
	return n
}

// took gives what has been asked since the last time.
func (m *memFS) took() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := strings.Join(m.trace, "\n")
	m.trace = nil
	return t
}

// held is how many nodes the kernel has references to.
func (m *memFS) held() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, c := range m.lookups {
		if c > 0 {
			n++
		}
	}
	return n
}

func (n *memNode) attr(a *fuse.Attr) {
	a.Ino, a.Mode, a.Nlink, a.Size, a.Blocks, a.Blksize = n.id, n.mode, n.nlink, uint64(len(n.data)), uint64(len(n.data)+511)/512, 4096
	a.Owner = fuse.Owner{Uid: n.uid, Gid: n.gid}
	a.Rdev, a.Mtime, a.Ctime, a.Atime = n.rdev, n.mtime, n.mtime, n.mtime
}

func (m *memFS) entry(n *memNode, out *fuse.EntryOut) {
	m.lookups[n.id]++
	out.NodeId, out.Generation = n.id, 1
	n.attr(&out.Attr)
}

func (m *memFS) String() string { return "memFS" }

func (m *memFS) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	m.begin("lookup", in.NodeId, name)
	defer m.mu.Unlock()
	n := m.names[name]
	if n == nil || in.NodeId != 1 {
		return fuse.ENOENT
	}
	m.entry(n, out)
	return fuse.OK
}

func (m *memFS) Forget(id, count uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgets++
	m.lookups[id] -= int64(count)
}

func (m *memFS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := m.begin("getattr", in.NodeId, in.Flags())
	defer m.mu.Unlock()
	n.attr(&out.Attr)
	return fuse.OK
}

func (m *memFS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := m.begin("setattr", in.NodeId, in.Valid&^fuse.FATTR_FH)
	defer m.mu.Unlock()
	if mode, ok := in.GetMode(); ok {
		n.mode = n.mode&unix.S_IFMT | mode&0o7777
	}
	if uid, ok := in.GetUID(); ok {
		n.uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		n.gid = gid
	}
	if size, ok := in.GetSize(); ok {
		n.resize(int(size))
	}
	if in.Valid&fuse.FATTR_MTIME != 0 && in.Valid&fuse.FATTR_MTIME_NOW == 0 {
		n.mtime = in.Mtime
	}
	n.attr(&out.Attr)
	return fuse.OK
}

func (n *memNode) resize(size int) {
	if size <= len(n.data) {
		n.data = n.data[:size]
		return
	}
	n.data = append(n.data, make([]byte, size-len(n.data))...)
}

func (m *memFS) make(op string, in *fuse.InHeader, name string, mode uint32, out *fuse.EntryOut) (*memNode, fuse.Status) {
	m.begin(op, in.NodeId, name, mode)
	defer m.mu.Unlock()
	if in.NodeId != 1 {
		return nil, fuse.Status(unix.EXDEV)
	}
	if m.names[name] != nil {
		return nil, fuse.Status(unix.EEXIST)
	}
	n := m.add(name, mode, in.Uid, in.Gid)
	m.entry(n, out)
	return n, fuse.OK
}

func (m *memFS) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	n, status := m.make("mknod", &in.InHeader, name, in.Mode, out)
	if status.Ok() {
		n.rdev, out.Attr.Rdev = in.Rdev, in.Rdev
	}
	return status
}

func (m *memFS) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	_, status := m.make("mkdir", &in.InHeader, name, unix.S_IFDIR|in.Mode, out)
	return status
}

func (m *memFS) Symlink(_ <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	n, status := m.make("symlink "+target, in, name, unix.S_IFLNK|0o777, out)
	if status.Ok() {
		n.data = []byte(target)
		n.attr(&out.Attr)
	}
	return status
}

func (m *memFS) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	n := m.begin("readlink", in.NodeId)
	defer m.mu.Unlock()
	return n.data, fuse.OK
}

func (m *memFS) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	n, status := m.make("create", &in.InHeader, name, in.Mode, &out.EntryOut)
	if status.Ok() {
		out.Fh = n.id + 1000
	}
	return status
}

func (m *memFS) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	m.begin("link", in.NodeId, name, in.Oldnodeid)
	defer m.mu.Unlock()
	if m.names[name] != nil {
		return fuse.Status(unix.EEXIST)
	}
	n := m.nodes[in.Oldnodeid]
	m.names[name] = n
	n.nlink++
	m.entry(n, out)
	return fuse.OK
}

func (m *memFS) unlink(op string, in *fuse.InHeader, name string) fuse.Status {
	m.begin(op, in.NodeId, name)
	defer m.mu.Unlock()
	n := m.names[name]
	if n == nil {
		return fuse.ENOENT
	}
	n.nlink--
	delete(m.names, name)
	return fuse.OK
}

func (m *memFS) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return m.unlink("unlink", in, name)
}

func (m *memFS) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return m.unlink("rmdir", in, name)
}

func (m *memFS) Rename(_ <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	m.begin("rename", in.NodeId, from, to, in.Flags)
	defer m.mu.Unlock()
	if m.names[from] == nil {
		return fuse.ENOENT
	}
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		m.names[from], m.names[to] = m.names[to], m.names[from]
		return fuse.OK
	}
	m.names[to] = m.names[from]
	m.names[to].name = to
	delete(m.names, from)
	return fuse.OK
}

func (m *memFS) GetXAttr(_ <-chan struct{}, in *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	n := m.begin("getxattr", in.NodeId, name, len(dest))
	defer m.mu.Unlock()
	v, ok := n.xattrs[name]
	if !ok {
		return 0, fuse.Status(unix.ENODATA)
	}
	if len(v) > len(dest) {
		return uint32(len(v)), fuse.ERANGE
	}
	return uint32(copy(dest, v) + m.xattrLie), fuse.OK
}

func (m *memFS) ListXAttr(_ <-chan struct{}, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	n := m.begin("listxattr", in.NodeId, len(dest))
	defer m.mu.Unlock()
	var names []string
	for k := range n.xattrs {
		names = append(names, k+"\x00")
	}
	sort.Strings(names)
	list := strings.Join(names, "")
	if len(list) > len(dest) {
		return uint32(len(list)), fuse.ERANGE
	}
	return uint32(copy(dest, list)), fuse.OK
}

func (m *memFS) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, v []byte) fuse.Status {
	n := m.begin("setxattr", in.NodeId, name, sum(v), in.Flags)
	defer m.mu.Unlock()
	n.xattrs[name] = append([]byte(nil), v...)
	return fuse.OK
}

func (m *memFS) RemoveXAttr(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	n := m.begin("removexattr", in.NodeId, name)
	defer m.mu.Unlock()
	if _, ok := n.xattrs[name]; !ok {
		return fuse.Status(unix.ENODATA)
	}
	delete(n.xattrs, name)
	return fuse.OK
}

func (m *memFS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := m.begin("open", in.NodeId, in.Flags)
	defer m.mu.Unlock()
	if strings.HasPrefix(n.name, "direct") {
		out.OpenFlags = fuse.FOPEN_DIRECT_IO
	}
	out.Fh = in.NodeId + 1000
	return fuse.OK
}

func (m *memFS) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n := m.begin("read", in.NodeId, in.Fh, in.Offset, in.Size, len(buf))
	defer m.mu.Unlock()
	b := n.data[min(int(in.Offset), len(n.data)):]
	b = b[:min(len(b), len(buf))]
	if n.name == "own-buffer" { // its bytes lie elsewhere than in buf
		return fuse.ReadResultData(b), fuse.OK
	}
	return fuse.ReadResultData(buf[:copy(buf, b)]), fuse.OK
}

func (m *memFS) Write(_ <-chan struct{}, in *fuse.WriteIn, b []byte) (uint32, fuse.Status) {
	n := m.begin("write", in.NodeId, in.Fh, in.Offset, in.Size, sum(b))
	defer m.mu.Unlock()
	if end := int(in.Offset) + len(b); end > len(n.data) {
		n.resize(end)
	}
	return uint32(copy(n.data[in.Offset:], b)), fuse.OK
}

func (m *memFS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	n := m.begin("lseek", in.NodeId, in.Offset, in.Whence)
	defer m.mu.Unlock()
	if in.Offset >= uint64(len(n.data)) {
		return fuse.Status(unix.ENXIO)
	}
	out.Offset = in.Offset
	if in.Whence == unix.SEEK_HOLE {
		out.Offset = uint64(len(n.data))
	}
	return fuse.OK
}

func (m *memFS) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	n := m.begin("fallocate", in.NodeId, in.Offset, in.Length, in.Mode)
	defer m.mu.Unlock()
	if end := int(in.Offset + in.Length); end > len(n.data) {
		n.resize(end)
	}
	return fuse.OK
}

func (m *memFS) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	from := m.begin("copy_file_range", in.NodeId, in.OffIn, in.NodeIdOut, in.OffOut, in.Len)
	defer m.mu.Unlock()
	to := m.nodes[in.NodeIdOut]
	b := from.data[min(int(in.OffIn), len(from.data)):]
	b = b[:min(len(b), int(in.Len))]
	if end := int(in.OffOut) + len(b); end > len(to.data) {
		to.resize(end)
	}
	return uint32(copy(to.data[in.OffOut:], b)), fuse.OK
}

// Ioctl answers with the bytes it was given, backwards, and how many they were.
func (m *memFS) Ioctl(_ <-chan struct{}, in *fuse.IoctlIn, inbuf []byte, out *fuse.IoctlOut, outbuf []byte) fuse.Status {
	m.begin("ioctl", in.NodeId, in.Cmd, in.InSize, in.OutSize, sum(inbuf), len(outbuf))
	defer m.mu.Unlock()
	for i := range outbuf {
		outbuf[i] = 0xee
		if i < len(inbuf) {
			outbuf[i] = inbuf[len(inbuf)-1-i]
		}
	}
	out.Result = int32(len(inbuf))
	return fuse.OK
}

func (m *memFS) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	m.begin("fsync", in.NodeId, in.FsyncFlags)
	defer m.mu.Unlock()
	return fuse.OK
}

func (m *memFS) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	m.begin("fsyncdir", in.NodeId, in.FsyncFlags)
	defer m.mu.Unlock()
	return fuse.OK
}

func (m *memFS) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	m.begin("flush", in.NodeId)
	defer m.mu.Unlock()
	return fuse.OK
}

func (m *memFS) Access(_ <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	m.begin("access", in.NodeId, in.Mask)
	defer m.mu.Unlock()
	return fuse.ENOSYS
}

func (m *memFS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	m.begin("opendir", in.NodeId)
	defer m.mu.Unlock()
	return fuse.OK
}

// list gives the names from an offset on: one name is behind one offset.
func (m *memFS) list(in *fuse.ReadIn) []fuse.DirEntry {
	if in.NodeId != 1 {
		return nil
	}
	var all []fuse.DirEntry
	for name, n := range m.names {
		all = append(all, fuse.DirEntry{Name: name, Ino: n.id, Mode: n.mode})
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Name < all[j].Name })
	for i := range all {
		all[i].Off = uint64(i + 1)
	}
	return all[min(int(in.Offset), len(all)):]
}

func (m *memFS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	m.begin("readdir", in.NodeId, in.Offset, in.Size)
	defer m.mu.Unlock()
	for _, e := range m.list(in) {
		if !out.AddDirEntry(e) {
			break
		}
	}
	return fuse.OK
}

func (m *memFS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	m.begin("readdirplus", in.NodeId, in.Offset, in.Size)
	defer m.mu.Unlock()
	for _, e := range m.list(in) {
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			break
		}
		m.entry(m.names[e.Name], entry)
	}
	return fuse.OK
}

func (m *memFS) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	m.begin("statfs", in.NodeId)
	defer m.mu.Unlock()
	*out = fuse.StatfsOut{Blocks: 1000, Bfree: 500, Bavail: 400, Files: 77, Ffree: 7, Bsize: 4096, NameLen: 255, Frsize: 4096}
	return fuse.OK
}

var _ fuse.RawFileSystem = (*memFS)(nil)
