package floor

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// File is a file in the root directory of a [Null].
type File struct {
	Name string
	Size int64 // bytes
}

// Null returns a filesystem of files that do nothing: reads are zeros, and writes are accepted and forgotten.
func Null(files []File) fuse.RawFileSystem {
	f := &null{RawFileSystem: fuse.NewDefaultRawFileSystem(), files: files, ids: map[string]uint64{}}
	for i, file := range files {
		f.ids[file.Name] = firstFile + uint64(i)
	}
	return f
}

type null struct {
	fuse.RawFileSystem // ENOSYS for what is not here

	files []File
	ids   map[string]uint64
}

// Node numbers: the root's is FUSE's, the files follow.
const (
	root      = fuse.FUSE_ROOT_ID
	firstFile = root + 1
)

func (f *null) String() string { return "null" }

func (f *null) fill(a *fuse.Attr, id uint64) fuse.Status {
	*a = fuse.Attr{Ino: id, Nlink: 1, Blksize: 4096}
	switch {
	case id == root:
		a.Mode = unix.S_IFDIR | 0o755
	case id-firstFile < uint64(len(f.files)):
		a.Mode, a.Size = unix.S_IFREG|0o644, uint64(f.files[id-firstFile].Size)
		a.Blocks = a.Size / 512
	default:
		return fuse.Status(unix.ESTALE)
	}
	return fuse.OK
}

func (f *null) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	out.EntryValid = forever // without a node: the kernel remembers that there is no such name
	id := f.ids[name]
	if h.NodeId != root || id == 0 {
		return fuse.OK
	}
	out.NodeId, out.AttrValid = id, forever
	return f.fill(&out.Attr, id)
}

func (f *null) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = forever
	return f.fill(&out.Attr, in.NodeId)
}

func (f *null) GetXAttr(<-chan struct{}, *fuse.InHeader, string, []byte) (uint32, fuse.Status) {
	return 0, fuse.ENODATA
}

func (f *null) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.Fh, out.OpenFlags = in.NodeId, fuse.FOPEN_KEEP_CACHE
	if in.Flags&unix.O_ACCMODE == unix.O_RDONLY {
		out.OpenFlags |= fuse.FOPEN_NOFLUSH
	}
	return fuse.OK
}

func (f *null) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	clear(buf)
	return fuse.ReadResultData(buf), fuse.OK
}

func (f *null) Write(_ <-chan struct{}, _ *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	return uint32(len(data)), fuse.OK
}

func (f *null) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.OK }

func (f *null) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (f *null) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{Bsize: 4096, Frsize: 4096, NameLen: 255}
	return fuse.OK
}
