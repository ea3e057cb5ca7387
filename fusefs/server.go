package fusefs

import (
	"errors"
	"io"
	"math"
	"sync"
	"sync/atomic"

	"lamina/union"
	"lamina/uring"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// forever is a time limit, in seconds, that the kernel never reaches.
const forever = 1 << 40

// maxCopy is the most that COPY_FILE_RANGE's 32-bit answer can report, in whole pages.
const maxCopy = math.MaxInt32 &^ 4095

// server answers the kernel's requests, whatever transport carries them.
type server struct {
	fuse.RawFileSystem // ENOSYS for what is not here

	answers fuse.RawFileSystem // who answers the kernel: the server itself, or the filesystem that MountRaw was given
	fs      *union.FS
	opt     Options
	dev     transport
	handles handles
	modes   modeTable
	pass    passthroughState
	stats   counters
	awaited sync.Map      // by st_ino: files that were detached and whose writer has yet to open the new node
	errors  atomic.Uint64 // answers of EIO
}

var (
	_ fuse.RawFileSystem = (*server)(nil)
	_ uring.Reader       = (*server)(nil)
)

func newServer(fs *union.FS, opt Options) *server {
	s := &server{RawFileSystem: fuse.NewDefaultRawFileSystem(), fs: fs, opt: opt}
	s.answers = s
	s.pass.init(&s.opt)
	return s
}

func (s *server) String() string { return "lamina" }

// node finds what the kernel means. A number it was never given, or gave back, is stale.
func (s *server) node(id uint64) (*union.Node, error) {
	if n := s.fs.Node(id); n != nil {
		return n, nil
	}
	return nil, unix.ESTALE
}

func (s *server) handle(fh uint64) (*handle, error) {
	if h := s.handles.get(fh); h != nil {
		return h, nil
	}
	return nil, unix.EBADF
}

// cred says who creates an object. EOVERFLOW: the owner has no number in the layers.
func (s *server) cred(c *fuse.Caller, umask uint32) (union.Cred, error) {
	uid, ok1 := s.opt.IDs.storeUID(c.Uid)
	gid, ok2 := s.opt.IDs.storeGID(c.Gid)
	if !ok1 || !ok2 {
		return union.Cred{}, unix.EOVERFLOW
	}
	return union.Cred{UID: uid, GID: gid, Umask: umask}, nil
}

func (s *server) fillAttr(a *fuse.Attr, st *union.Attr) {
	*a = fuse.Attr{
		Ino:       st.Ino,
		Size:      uint64(st.Size),
		Blocks:    uint64(st.Blocks),
		Atime:     uint64(st.Atim.Sec),
		Atimensec: uint32(st.Atim.Nsec),
		Mtime:     uint64(st.Mtim.Sec),
		Mtimensec: uint32(st.Mtim.Nsec),
		Ctime:     uint64(st.Ctim.Sec),
		Ctimensec: uint32(st.Ctim.Nsec),
		Mode:      st.Mode,
		Nlink:     uint32(st.Nlink),
		Owner:     fuse.Owner{Uid: s.opt.IDs.showUID(st.Uid), Gid: s.opt.IDs.showGID(st.Gid)},
		Rdev:      uint32(st.Rdev),
		Blksize:   uint32(st.Blksize),
	}
}

// entry describes a node that the kernel was just given a reference on. On an error it takes the reference back.
func (s *server) entry(n *union.Node, out *fuse.EntryOut) error {
	st, err := s.fs.Attr(n)
	if err != nil {
		s.fs.Forget(n.ID(), 1)
		return err
	}
	s.describe(n, &st, out)
	return nil
}

// describe is entry with attributes that are known.
func (s *server) describe(n *union.Node, st *union.Attr, out *fuse.EntryOut) {
	s.fillAttr(&out.Attr, st)
	out.NodeId = n.ID()
	out.EntryValid = forever
	out.AttrValid = forever
}

// found answers a request that looked a node up or gave it one more name.
func (s *server) found(n *union.Node, err error, out *fuse.EntryOut) fuse.Status {
	if err == nil {
		err = s.entry(n, out)
	}
	return s.status(err)
}

// made answers a request that made a node.
func (s *server) made(n *union.Node, err error, out *fuse.EntryOut) fuse.Status {
	if err == nil {
		st := s.fs.AttrMade(n)
		s.describe(n, &st, out)
	}
	return s.status(err)
}

// Names.

func (s *server) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	s.stats.count(opLookup)
	dir, err := s.node(h.NodeId)
	if err != nil {
		return s.status(err)
	}
	n, err := s.fs.Lookup(dir, name)
	if errors.Is(err, unix.ENOENT) {
		out.EntryValid = forever // node 0: the kernel remembers that there is no such name
		return fuse.OK
	}
	return s.found(n, err, out)
}

func (s *server) Forget(id, nlookup uint64) {
	s.stats.count(opForget)
	s.fs.Forget(id, nlookup)
}

func (s *server) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	s.stats.count(opCreate)
	dir, c, err := s.creation(&in.InHeader, in.Umask)
	if err != nil {
		return s.status(err)
	}
	n, err := s.fs.Mkdir(dir, name, in.Mode, c)
	return s.made(n, err, out)
}

func (s *server) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	s.stats.count(opCreate)
	dir, c, err := s.creation(&in.InHeader, in.Umask)
	if err != nil {
		return s.status(err)
	}
	n, err := s.fs.Mknod(dir, name, in.Mode, in.Rdev, c)
	return s.made(n, err, out)
}

func (s *server) Symlink(_ <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	s.stats.count(opCreate)
	dir, c, err := s.creation(h, 0)
	if err != nil {
		return s.status(err)
	}
	n, err := s.fs.Symlink(dir, name, target, c)
	return s.made(n, err, out)
}

func (s *server) creation(h *fuse.InHeader, umask uint32) (*union.Node, union.Cred, error) {
	dir, err := s.node(h.NodeId)
	if err != nil {
		return nil, union.Cred{}, err
	}
	c, err := s.cred(&h.Caller, umask)
	return dir, c, err
}

func (s *server) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	s.stats.count(opLink)
	dir, err := s.node(in.NodeId)
	if err != nil {
		return s.status(err)
	}
	old, err := s.node(in.Oldnodeid)
	if err != nil {
		return s.status(err)
	}
	n, err := s.fs.Link(old, dir, name)
	return s.found(n, err, out)
}

func (s *server) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	s.stats.count(opUnlink)
	dir, err := s.node(h.NodeId)
	if err == nil {
		err = s.fs.Unlink(dir, name)
	}
	return s.status(err)
}

func (s *server) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	s.stats.count(opUnlink)
	dir, err := s.node(h.NodeId)
	if err == nil {
		err = s.fs.Rmdir(dir, name)
	}
	return s.status(err)
}

func (s *server) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	s.stats.count(opRename)
	oldDir, err := s.node(in.NodeId)
	if err != nil {
		return s.status(err)
	}
	newDir, err := s.node(in.Newdir)
	if err != nil {
		return s.status(err)
	}
	return s.status(s.fs.Rename(oldDir, oldName, newDir, newName, in.Flags))
}

func (s *server) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	s.stats.count(opReadlink)
	n, err := s.node(h.NodeId)
	if err != nil {
		return nil, s.status(err)
	}
	target, err := s.fs.Readlink(n)
	return []byte(target), s.status(err)
}

// Attributes.

func (s *server) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	s.stats.count(opGetattr)
	n, err := s.node(in.NodeId)
	if err != nil {
		return s.status(err)
	}
	st, err := s.fs.Attr(n)
	if err == nil {
		s.fillAttr(&out.Attr, &st)
		out.AttrValid = forever
	}
	return s.status(err)
}

func (s *server) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	s.stats.count(opSetattr)
	n, err := s.node(in.NodeId)
	if err != nil {
		return s.status(err)
	}
	want, err := s.setAttrOf(in)
	if err == nil && onlyDropsSetID(in.Valid) {
		err = s.dropSetID(n)
	}
	if err != nil {
		return s.status(err)
	}
	st, err := s.setAttr(n, in, want)
	if err == nil {
		s.fillAttr(&out.Attr, &st)
		out.AttrValid = forever
	}
	return s.status(err)
}

// setAttr truncates under the lock that decides about passing through, unless the caller's own descriptor is for
// writing already and so has been counted.
func (s *server) setAttr(n *union.Node, in *fuse.SetAttrIn, want union.SetAttr) (union.Attr, error) {
	if _, byHandle := in.GetFh(); want.Size == nil || byHandle {
		return s.fs.SetAttr(n, want)
	}
	m := s.modes.hold(n.ID())
	defer s.modes.drop(n.ID(), m)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := s.beforeWrite(n, m); err != nil {
		return union.Attr{}, err
	}
	st, err := s.fs.SetAttr(n, want)
	if err == nil {
		s.awaited.Delete(n.Ino())
	}
	return st, err
}

// setAttrOf translates a request. EINVAL: an owner has no number in the layers.
func (s *server) setAttrOf(in *fuse.SetAttrIn) (union.SetAttr, error) {
	var want union.SetAttr
	if mode, ok := in.GetMode(); ok {
		want.Mode = &mode
	}
	if uid, ok := in.GetUID(); ok {
		if uid, ok = s.opt.IDs.storeUID(uid); !ok {
			return want, unix.EINVAL
		}
		want.UID = &uid
	}
	if gid, ok := in.GetGID(); ok {
		if gid, ok = s.opt.IDs.storeGID(gid); !ok {
			return want, unix.EINVAL
		}
		want.GID = &gid
	}
	if size, ok := in.GetSize(); ok {
		if size > math.MaxInt64 {
			return want, unix.EFBIG
		}
		n := int64(size)
		want.Size = &n
	}
	want.Atime = timeOf(in.Valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec)
	want.Mtime = timeOf(in.Valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec)
	want.KillPriv = in.Valid&fuse.FATTR_KILL_SUIDGID != 0
	return want, nil
}

// onlyDropsSetID recognises what the kernel makes of "drop the set-id bits" before it changes a file's bytes. With
// FUSE_HANDLE_KILLPRIV_V2 it takes the mode out of the SETATTR and trusts that the request which follows asks for the
// same (fuse_setattr in fs/fuse/dir.c). But a write to a passed-through file follows on the backing file, under the
// server's credentials, which may keep the bits, and FALLOCATE has no way to ask. What arrives is a SETATTR that changes
// nothing.
func onlyDropsSetID(valid uint32) bool {
	return valid&^(fuse.FATTR_FH|fuse.FATTR_LOCKOWNER|fuse.FATTR_CTIME) == 0
}

// dropSetID takes the set-id bits away as a write by an unprivileged process does: the set-group-id bit of a file that
// its group cannot execute means something else, and stays.
func (s *server) dropSetID(n *union.Node) error {
	st, err := s.fs.Attr(n)
	if err != nil {
		return err
	}
	mode := st.Mode & 0o7777 &^ unix.S_ISUID
	if mode&unix.S_IXGRP != 0 {
		mode &^= unix.S_ISGID
	}
	if mode == st.Mode&0o7777 {
		return nil
	}
	_, err = s.fs.SetAttr(n, union.SetAttr{Mode: &mode})
	return err
}

func timeOf(valid, set, now uint32, sec uint64, nsec uint32) *unix.Timespec {
	switch {
	case valid&set == 0:
		return nil
	case valid&now != 0:
		return &unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return &unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

// Extended attributes.

func (s *server) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	s.stats.count(opXattr)
	n, err := s.node(h.NodeId)
	if err != nil {
		return 0, s.status(err)
	}
	v, err := s.fs.Getxattr(n, name)
	if err != nil {
		return 0, s.status(err)
	}
	if isACL(name) {
		v = s.opt.IDs.showACL(v)
	}
	return answer(dest, v)
}

func (s *server) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	s.stats.count(opXattr)
	n, err := s.node(h.NodeId)
	if err != nil {
		return 0, s.status(err)
	}
	names, err := s.fs.Listxattr(n)
	if err != nil {
		return 0, s.status(err)
	}
	var list []byte
	for _, name := range names {
		list = append(append(list, name...), 0)
	}
	return answer(dest, list)
}

// answer copies v, or says how much room it needs.
func answer(dest, v []byte) (uint32, fuse.Status) {
	if len(v) > len(dest) {
		return uint32(len(v)), fuse.ERANGE
	}
	return uint32(copy(dest, v)), fuse.OK
}

func (s *server) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	s.stats.count(opXattr)
	n, err := s.node(in.NodeId)
	if err != nil {
		return s.status(err)
	}
	if isACL(name) {
		if data, err = s.opt.IDs.storeACL(data); err != nil {
			return s.status(err)
		}
	}
	killSGID := in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0
	return s.status(s.fs.Setxattr(n, name, data, int(in.Flags), killSGID))
}

func (s *server) RemoveXAttr(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	s.stats.count(opXattr)
	n, err := s.node(h.NodeId)
	if err == nil {
		err = s.fs.Removexattr(n, name)
	}
	return s.status(err)
}

// Open files.

func (s *server) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	s.stats.count(opOpen)
	n, err := s.node(in.NodeId)
	if err == nil {
		err = s.open(n, in.Flags, in.Mode&fuse.OPEN_KILL_SUIDGID != 0, out)
	}
	return s.status(err)
}

func (s *server) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	s.stats.count(opCreate)
	dir, c, err := s.creation(&in.InHeader, in.Umask)
	if err != nil {
		return s.status(err)
	}
	n, uh, err := s.fs.Create(dir, name, in.Flags&unionFlags|unix.O_EXCL, in.Mode, c)
	if errors.Is(err, unix.EEXIST) && in.Flags&unix.O_EXCL == 0 {
		return s.status(s.openExisting(dir, name, in, out))
	}
	return s.created(n, uh, err, in, out)
}

func (s *server) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	s.stats.count(opCreate)
	dir, c, err := s.creation(&in.InHeader, in.Umask)
	if err != nil {
		return s.status(err)
	}
	n, uh, err := s.fs.Tmpfile(dir, in.Flags&unionFlags, in.Mode, c)
	return s.created(n, uh, err, in, out)
}

func (s *server) created(n *union.Node, uh *union.Handle, err error, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	if err != nil {
		return s.status(err)
	}
	s.adopt(n, uh, in.Flags, &out.OpenOut)
	return s.made(n, nil, &out.EntryOut)
}

// openExisting answers a CREATE whose name has come to exist since the kernel looked.
func (s *server) openExisting(dir *union.Node, name string, in *fuse.CreateIn, out *fuse.CreateOut) error {
	n, err := s.fs.Lookup(dir, name)
	if err != nil {
		return err
	}
	if err := s.open(n, in.Flags, in.OpenFlags&fuse.OPEN_KILL_SUIDGID != 0, &out.OpenOut); err != nil {
		s.fs.Forget(n.ID(), 1)
		return err
	}
	if err := s.entry(n, &out.EntryOut); err != nil {
		s.release(s.handles.remove(out.Fh))
		return err
	}
	return nil
}

func (s *server) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	s.stats.count(opRelease)
	if h := s.handles.remove(in.Fh); h != nil {
		s.forgetHandle(h)
		s.release(h)
	}
}

func (s *server) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, status := s.ReadInto(cancel, in, buf)
	if !status.Ok() {
		return nil, status
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// ReadInto is Read for a transport whose buffer is the answer.
func (s *server) ReadInto(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (int, fuse.Status) {
	s.stats.count(opRead)
	h, err := s.handle(in.Fh)
	if err != nil {
		return 0, s.status(err)
	}
	n, err := h.ReadAt(buf, int64(in.Offset))
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, s.status(err)
	}
	s.stats.read.Add(uint64(n))
	return n, fuse.OK
}

func (s *server) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	s.stats.count(opWrite)
	h, err := s.handle(in.Fh)
	if err != nil {
		return 0, s.status(err)
	}
	n, err := h.WriteAt(data, int64(in.Offset), in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0)
	s.stats.written.Add(uint64(max(n, 0)))
	if n > 0 && n < len(data) && in.WriteFlags&fuse.WRITE_CACHE == 0 {
		return uint32(n), fuse.OK // a short write: the caller meets the error when it goes on
	}
	return uint32(n), s.status(err)
}

func (s *server) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	s.stats.count(opCopy)
	src, err := s.handle(in.FhIn)
	if err != nil {
		return 0, s.status(err)
	}
	dst, err := s.handle(in.FhOut)
	if err != nil {
		return 0, s.status(err)
	}
	n, err := s.fs.CopyRange(src.Handle, int64(in.OffIn), dst.Handle, int64(in.OffOut), int64(min(in.Len, maxCopy)))
	if n > 0 {
		return uint32(n), fuse.OK
	}
	return 0, s.status(err)
}

func (s *server) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	s.stats.count(opFsync)
	h, err := s.handle(in.Fh)
	if err == nil {
		err = h.Sync(in.FsyncFlags&fsyncDataOnly != 0)
	}
	return s.status(err)
}

// fsyncDataOnly is FUSE_FSYNC_FDATASYNC.
const fsyncDataOnly = 1

func (s *server) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	s.stats.count(opFallocate)
	h, err := s.handle(in.Fh)
	if err == nil {
		err = h.Fallocate(in.Mode, int64(in.Offset), int64(in.Length))
	}
	return s.status(err)
}

func (s *server) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	s.stats.count(opLseek)
	h, err := s.handle(in.Fh)
	if err != nil {
		return s.status(err)
	}
	off, err := h.Seek(int64(in.Offset), int(in.Whence))
	out.Offset = uint64(off)
	return s.status(err)
}

// Flush is never needed: a write has reached the server when it returns.
func (s *server) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Ioctl: none reaches the layers. ENOTTY is what the kernel says of a filesystem without ioctls.
func (s *server) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(unix.ENOTTY)
}

// Directories. There are no directory handles: positions are made of the names.

func (s *server) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	s.stats.count(opReaddir)
	dir, err := s.node(in.NodeId)
	if err == nil {
		err = s.fs.ReadDir(dir, in.Offset, func(e union.DirEntry) bool { return out.AddDirEntry(dirEntry(e)) })
	}
	return s.status(err)
}

func (s *server) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	s.stats.count(opReaddir)
	dir, err := s.node(in.NodeId)
	if err == nil {
		err = s.fs.ReadDir(dir, in.Offset, func(e union.DirEntry) bool { return s.addEntry(dir, e, out) })
	}
	return s.status(err)
}

// addEntry adds a name with its attributes. The kernel counts a reference for each that it finds in the answer, so one
// is taken only when the entry has its place there. A name that went since it was listed stays without attributes.
func (s *server) addEntry(dir *union.Node, e union.DirEntry, out *fuse.DirEntryList) bool {
	place := out.AddDirLookupEntry(dirEntry(e))
	if place == nil {
		return false
	}
	if e.Name == "." || e.Name == ".." {
		return true
	}
	if n, err := s.fs.Lookup(dir, e.Name); err == nil {
		if s.entry(n, place) == nil {
			out.FixMode(place.Mode)
		}
	}
	return true
}

func dirEntry(e union.DirEntry) fuse.DirEntry {
	return fuse.DirEntry{Name: e.Name, Ino: e.Ino, Mode: uint32(e.Type) << 12, Off: e.Off}
}

func (s *server) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	s.stats.count(opFsync)
	dir, err := s.node(in.NodeId)
	if err == nil {
		err = s.fs.SyncDir(dir)
	}
	return s.status(err)
}

func (s *server) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	s.stats.count(opStatfs)
	st, err := s.fs.Statfs()
	if err != nil {
		return s.status(err)
	}
	*out = fuse.StatfsOut{
		Blocks:  st.Blocks,
		Bfree:   st.Bfree,
		Bavail:  st.Bavail,
		Files:   st.Files,
		Ffree:   st.Ffree,
		Bsize:   uint32(st.Bsize),
		NameLen: uint32(st.Namelen),
		Frsize:  uint32(st.Frsize),
	}
	return fuse.OK
}
