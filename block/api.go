// Package block is one overlay file: block states, copy-after-write, table formats, durability. It knows nothing of
// names or FUSE.
//
// # Terms
//
// A file of the union that lies in the upper layer is a [File]. It is a sketch while some of its blocks still live in
// the lower file, and complete (an ordinary file) afterwards. Every block is Lower, InTransit or Upper.
package block

import (
	"io"

	"golang.org/x/sys/unix"
)

// Store is the upper file as the engine sees it: bytes, one header attribute, times. [OpenStore] wraps a descriptor;
// the crash tests wrap it again with a layer that loses, tears and reorders what was not synced.
//
// The engine relies on the ordering that journalling filesystems give: the metadata operations on one inode
// (SetHeader, RemoveHeader, Truncate, Fallocate) reach the disk in the order they were issued; WriteAt's bytes reach
// it in any order until Sync returns.
type Store interface {
	io.ReaderAt
	io.WriterAt
	Stat() (unix.Stat_t, error)
	Truncate(size int64) error
	Fallocate(mode uint32, off, n int64) error
	Seek(off int64, whence int) (int64, error) // unix.SEEK_DATA, unix.SEEK_HOLE only
	Sync() error                               // data, size and attributes (fsync)
	SyncData() error                           // data, and what it takes to find them (fdatasync)
	Order() error                              // data written out, the disk's own cache not emptied; see Engine.Orders
	Header() ([]byte, error)                   // the header attribute; nil, nil if there is none
	SetHeader(b []byte) error
	RemoveHeader() error
	SetOrigin(b []byte) error // what remains of the header once the file is complete; see Ident.Origin
	SetTimes(atime, mtime unix.Timespec) error
	FD() int // -1 if there is none
	Close() error
}

// Lower is what a sketch reads for the blocks that it does not hold: a layer's file, or another sketch opened
// read-only (a chain).
type Lower interface {
	io.ReaderAt
	io.Closer
	Stat() (unix.Stat_t, error)
	SeekData(off int64) (start, end int64, err error)
}

// Ident is the identity of the lower file that a sketch was made from, recorded in its header and checked when it is
// opened: a lower that changed is an error (ErrLowerChanged), never a guess.
type Ident struct {
	Size    int64 // bytes
	MtimeNS int64 // modification time, nanoseconds since 1970
	FS      uint64
	Ino     uint64 // compared only if FS is equal: a store that was moved to another disk has new inode numbers
}

// CaW says when the rest of a partly written block is copied.
type CaW uint8

const (
	CaWEager CaW = iota // soon, in the background
	CaWLazy             // when somebody reads the block or syncs the file, when it settles, and every Options.CommitInterval
	CaWSync             // before the write returns: classic copy-on-write by block, for comparison
)

// Fill says whether untouched blocks are ever copied in the background.
type Fill uint8

const (
	FillNone Fill = iota // never, but for the few that a log will write next (bringAhead)
	FillIdle             // settled files that lack at most one block in nine are completed, and those to which as much was written as they lack; of those in use, the ones that are synced again and again
)

// Format of a sketch, as docs/format.md gives it.
type Format uint8

const (
	Sparse     Format = 1 // blocks at their natural offsets, bitmap pages behind the data
	BCoW       Format = 2 // header and two-level table of 4 KiB blocks, blocks appended in the order of writing
	BCoWSingle Format = 3 // same with a single-level table of fixed length: the block size grows with the file
)
