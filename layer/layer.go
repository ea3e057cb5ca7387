// Package layer gives access to the directory trees that a union is stacked from.
//
// A [Layer] is a read-only tree addressed by slash-separated paths relative to its root ("" is the root itself; no
// leading or trailing slash, no "." or ".." component). It is asked for attributes and bytes, never for descriptors:
// a backend that has descriptors offers them through [FDer] for passthrough and clones. [Dir] is the directory backend;
// the upper layer and the workdir of a mount are a Dir opened for writing.
//
// Nothing in a layer is trusted. No path component is ever followed if it is a symbolic link (openat2 with
// RESOLVE_BENEATH|RESOLVE_NO_SYMLINKS|RESOLVE_NO_MAGICLINKS), so nothing in an image can lead outside its root.
// Errors are unix.Errno values, wrapped so that errors.Is and errors.As find them.
package layer

import (
	"io"

	"golang.org/x/sys/unix"
)

// Layer is one immutable tree. All methods are safe for concurrent use.
type Layer interface {
	// Name is what messages call this layer: the path it was given as.
	Name() string
	// FS identifies the filesystem that holds the layer (statfs f_fsid): inode numbers are unique within one FS.
	FS() uint64

	// Stat is lstat: the attributes of the object itself. ENOENT, or ENOTDIR/ELOOP where the way to it is not made of
	// directories.
	Stat(path string) (unix.Stat_t, error)
	// ReadDir returns every entry but "." and "..", unsorted. Ino and Type are as getdents64 gives them.
	ReadDir(path string) ([]Entry, error)
	Readlink(path string) (string, error)
	// Getxattr returns ENODATA for an absent attribute. Symbolic links are not followed.
	Getxattr(path, name string) ([]byte, error)
	Listxattr(path string) ([]string, error)
	// Open opens a regular file for reading, and nothing else (ELOOP for a symlink, EINVAL for a device, fifo or
	// socket: a hostile layer must not make the server block or reach a device).
	Open(path string) (File, error)
	Close() error
}

// Entry is one directory entry.
type Entry struct {
	Name string
	Ino  uint64
	Type uint8 // unix.DT_*
}

// File is an open regular file of a layer.
type File interface {
	io.ReaderAt
	io.Closer
	// Stat returns the file's attributes now.
	Stat() (unix.Stat_t, error)
	// SeekData returns the first extent [start, end) that holds data at or after off, in bytes, as SEEK_DATA followed by
	// SEEK_HOLE. ENXIO: no data from off to the end. A backend that does not know answers [off, size).
	SeekData(off int64) (start, end int64, err error)
}

// FDer is offered by a File that has a kernel descriptor. The descriptor stays owned by the File.
type FDer interface {
	FD() int
}
