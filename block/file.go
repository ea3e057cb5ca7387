package block

import (
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// File is one overlay file that lies in the upper layer: a sketch, or an ordinary file, which a sketch becomes when it
// is complete. All methods are safe for concurrent use.
//
// Locks, in the order in which they are taken:
//
//	commitMu  one commit, truncation, table move or completion at a time; held across fsync, so no reader or writer takes it
//	          unless the table has to make room
//	shape     read: every operation on bytes. write: limit, bound, table place, kind of file (never held across fsync)
//	mu        block states, in-transit ranges and the bcow append position: taken by writes to blocks that are not Upper
//	times     read: writes of the application. write: background writes, which put the modification time back
//
// A write whose blocks are all Upper takes shape and times for reading, and nothing else.
type File struct {
	e        *Engine
	s        Store
	readOnly bool
	open     func() (Lower, error)
	lower    struct {
		sync.Mutex
		file   atomic.Pointer[lowerFile]
		failed error // why it is refused for good
	}

	commitMu    sync.Mutex
	hdr         Header       // what is on disk; under commitMu. hdr.Kernel: nothing of ours is on disk yet
	logSyncs    int          // syncs that went on where the one before ended; under commitMu
	attrsSynced bool         // no attribute of ours has changed since the last full sync; under commitMu
	fresh       []blockRange // sparse: Upper in the table in memory, with nothing on disk that says so; under commitMu
	folded      bool         // the table has what hdr.Addendum names, as soon as it is written out; under commitMu
	broken      error        // a failed fsync or the like: nothing says any more what the disk holds; under commitMu
	fullTo      int64        // regions below this one are all Upper; under commitMu

	shape     sync.RWMutex
	format    Format // constant
	ident     Ident  // of the lower file, as the header had it when the file was opened; constant
	noIdent   bool   // the header was kernel overlayfs's, which records none; constant
	bs, shift int64  // block size and its logarithm; constant
	limit     int64  // lower limit, bytes
	bound     int64  // bytes at or past it need makeRoom first
	tailClean bool   // all bytes from size to bound are known to be zeros
	dir       directory
	tab       *table
	plain     atomic.Bool // complete: an ordinary file
	// provisional: plain, but the header may still be on disk and say what counts after a power cut, see whole.go
	provisional atomic.Bool
	headerless  bool  // provisional, and the header is removed; under commitMu
	syncFailure int64 // Engine.syncFailures when the file was opened
	nameless    atomic.Bool
	committing  atomic.Bool  // by the settler, which left it to itself
	size        atomic.Int64 // logical size, bytes; not used when plain

	mu      sync.Mutex
	transit map[int64][]span // of every InTransit block: what is new in it
	bcow    appender         // bcow only

	times sync.RWMutex

	memoryState

	written   atomic.Int64 // bytes that applications wrote since the file was opened as a sketch
	syncs     atomic.Int32 // that applications asked for and that found something new
	queued    atomic.Bool  // in the copier's queue
	retries   atomic.Int32 // copies that failed in a row
	settling  func(*File)  // under Engine.mu
	settleAt  time.Time    // when settling is not nil: no sooner; under Engine.mu
	closed    atomic.Bool
	logged    sync.Map               // damage that was reported already
	hurt      atomic.Bool            // some was
	complaint atomic.Pointer[string] // the background failure that was reported last
	mourned   atomic.Bool            // its losses were named
}

type lowerFile struct {
	Lower
	stat unix.Stat_t
}

// initSketch sets up f from a parsed header. stSize is the upper file's own size.
func (f *File) initSketch(h Header, stSize int64) error {
	f.hdr, f.format, f.bs = h, h.Format, int64(h.BlockSize)
	f.ident, f.noIdent = h.Ident, h.Kernel
	for f.shift = minBlockShift; 1<<f.shift < f.bs; f.shift++ {
	}
	size := h.LogicalSize(stSize)
	if size > f.maxSize() { // without a size in the header it is the upper file's, which nobody has checked
		return fmt.Errorf("%w: a file of %d bytes", ErrInvalid, size)
	}
	if h.Kernel {
		f.hdr.Limit = size
	}
	f.limit = f.hdr.Limit
	f.size.Store(size)
	f.transit = make(map[int64][]span)
	f.bound = math.MaxInt64
	f.tailClean = h.Size == naturalSize
	blocks := ceilDiv(f.limit, f.bs)
	switch f.format {
	case Sparse:
		f.tab = newTable(kindBits, h.TablePos, h.TablePages)
		if h.TablePages != 0 {
			f.bound = h.TablePos
		}
	default:
		kind := kindPhys
		if f.format == BCoW {
			kind = kindLeaf
		}
		f.tab = newTable(kind, h.TablePos, h.TablePages)
		blocks = h.TablePages * entriesPerPage(f.format)
		f.bound = blocks * f.bs
		if err := f.bcow.init(f, stSize); err != nil {
			return err
		}
	}
	f.dir = newDirectory(blocks)
	return f.takeAddendum()
}

// region returns the states of region n, loading them from the table if they are not in memory. The caller holds shape.
func (f *File) region(n int64) (*region, error) {
	p := f.dir.at(n)
	if r := p.Load(); r != nil {
		return r, nil
	}
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	if r := p.Load(); r != nil {
		return r, nil
	}
	r, err := f.load(n)
	if err != nil {
		return nil, err
	}
	p.Store(r)
	return r, nil
}

// load reads region n from the table. The caller holds tab.mu.
func (f *File) load(n int64) (*region, error) {
	if f.format == Sparse {
		return f.loadBits(n)
	}
	return f.loadPhys(n)
}

// nextRegion returns the first region at or after n that may have other states than Lower; without one, a region behind
// the last. The caller holds shape.
func (f *File) nextRegion(n int64) int64 {
	per := int64(bitsPerPage)
	if f.format != Sparse {
		per = entriesPerPage(f.format)
	}
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	next, err := f.tab.nextPage(f.s, n*regionBlocks/per)
	if err != nil {
		return n
	}
	end := int64(len(f.dir.chunks)) * chunkRegions
	if next != noMorePages {
		end = min(end, max(n, next*per/regionBlocks))
	}
	return f.dir.inMemory(n, end)
}

// mutable returns region n for a change. The caller holds mu, and has loaded the region.
func (f *File) mutable(n int64) *region {
	p := f.dir.at(n)
	r := p.Load()
	if r == emptyRegion {
		r = &region{}
		if f.format != Sparse {
			r.phys = new([regionBlocks]atomic.Uint32)
		}
		p.Store(r)
	}
	return r
}

// damaged returns the error for block b, for which a damaged piece of the table speaks, and logs it once a place.
func (f *File) damaged(b int64) error {
	per := f.blocksPerPage()
	err := &damagedError{first: b / per * per, last: b/per*per + per - 1, why: "table page without a valid copy"}
	if _, again := f.logged.LoadOrStore(err.first, true); !again {
		if !f.hurt.Swap(true) {
			f.e.damaged.Add(1)
		}
		f.e.fail("sketch of inode %d: %v", f.ino(), err)
	}
	return err
}

// blocksPerPage is how many blocks the smallest piece of the table that can be damaged by itself speaks for.
func (f *File) blocksPerPage() int64 {
	switch f.format {
	case Sparse:
		return bitsPerPage
	case BCoW:
		return leafEntries
	}
	return wordsPerPage
}

func (f *File) ino() uint64 {
	st, err := f.s.Stat()
	if err != nil {
		return 0
	}
	return st.Ino
}

// lowerFor returns the lower file, opening it and checking its identity the first time.
func (f *File) lowerFor() (*lowerFile, error) {
	if l := f.lower.file.Load(); l != nil {
		return l, nil
	}
	f.lower.Lock()
	defer f.lower.Unlock()
	if l := f.lower.file.Load(); l != nil {
		return l, nil
	}
	if f.lower.failed != nil {
		return nil, f.lower.failed
	}
	if f.open == nil {
		return nil, fmt.Errorf("%w: no lower file given", ErrLowerChanged)
	}
	low, err := f.open()
	if err != nil {
		return nil, err
	}
	l := &lowerFile{Lower: low}
	if l.stat, err = low.Stat(); err != nil {
		low.Close()
		return nil, err
	}
	if err := f.checkIdent(l); err != nil {
		low.Close()
		f.lower.failed = err
		f.e.fail("sketch of inode %d: %v", f.ino(), err)
		return nil, err
	}
	f.lower.file.Store(l)
	return l, nil
}

// FSer is offered by a Lower that knows its filesystem (statfs f_fsid): then the inode number is compared too.
type FSer interface{ FS() uint64 }

func (f *File) checkIdent(l *lowerFile) error {
	id := f.ident
	if f.noIdent {
		if l.stat.Size < f.limit {
			return fmt.Errorf("%w: size %d, the metacopy file has %d", ErrLowerChanged, l.stat.Size, f.limit)
		}
		return nil
	}
	if l.stat.Size != id.Size || l.stat.Mtim.Nano() != id.MtimeNS {
		return fmt.Errorf("%w: size %d mtime %d, recorded %d and %d (restore the lower layer)",
			ErrLowerChanged, l.stat.Size, l.stat.Mtim.Nano(), id.Size, id.MtimeNS)
	}
	if fs, ok := l.Lower.(FSer); ok && fs.FS() == id.FS && l.stat.Ino != id.Ino {
		return fmt.Errorf("%w: inode %d, recorded %d (restore the lower layer)", ErrLowerChanged, l.stat.Ino, id.Ino)
	}
	return nil
}

// readLower fills p from the lower file. A lower file that ends too early has changed since it was checked.
func (f *File) readLower(p []byte, off int64) error {
	l, err := f.lowerFor()
	if err != nil {
		return err
	}
	n, err := l.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) || err == nil {
		return fmt.Errorf("%w: it ends at %d", ErrLowerChanged, off+int64(n))
	}
	return err
}

// Size is the logical size in bytes.
func (f *File) Size() int64 {
	f.shape.RLock()
	defer f.shape.RUnlock()
	if f.plain.Load() {
		st, err := f.s.Stat()
		if err != nil {
			return 0
		}
		return st.Size
	}
	return f.size.Load()
}

// Stat is fstat of the upper file with the logical size, and the larger of the two files' Blocks: GNU tar takes a file
// without any for one long hole.
func (f *File) Stat() (unix.Stat_t, error) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	st, err := f.s.Stat()
	if err != nil || f.plain.Load() {
		return st, err
	}
	st.Size = f.size.Load()
	below := ceilDiv(f.limit, 512)
	if l := f.lower.file.Load(); l != nil {
		below = min(below, l.stat.Blocks)
	}
	st.Blocks = max(st.Blocks, below)
	return st, nil
}

// SetTimes sets the access and modification times; Nsec may be UTIME_NOW or UTIME_OMIT.
func (f *File) SetTimes(atime, mtime unix.Timespec) error {
	f.times.Lock()
	defer f.times.Unlock()
	return f.s.SetTimes(atime, mtime)
}

var (
	omitTime = unix.Timespec{Nsec: unix.UTIME_OMIT}
	nowTime  = unix.Timespec{Nsec: unix.UTIME_NOW}
)

// quietly runs a write that no application asked for, and puts the modification time back.
func (f *File) quietly(write func() error) error {
	f.times.Lock()
	defer f.times.Unlock()
	st, err := f.s.Stat()
	if err != nil {
		return err
	}
	err = write()
	return errors.Join(err, f.s.SetTimes(omitTime, st.Mtim))
}

// Sketch says whether the file needs its lower file: because some of its blocks may still live there, or because after a
// power cut all of them would.
func (f *File) Sketch() bool { return !f.plain.Load() || f.provisional.Load() }

// Provisional says that the file is an ordinary one only until a power cut: the next Sync makes it one for good.
func (f *File) Provisional() bool { return f.provisional.Load() }

// FD is the upper file's descriptor, -1 if it has none. It holds the file's bytes only if the file is Plain.
func (f *File) FD() int { return f.s.FD() }

// Plain returns the upper file's descriptor if the file is an ordinary one, and so will stay.
func (f *File) Plain() (fd int, ok bool) {
	fd = f.s.FD()
	return fd, f.plain.Load() && fd >= 0
}

// blocks is how many blocks the lower file still shows.
func (f *File) blocks() int64 { return ceilDiv(f.limit, f.bs) }

// States counts the blocks that the lower file still shows, by state. Blocks in a damaged part of the table count as
// Lower. It reads the whole table.
func (f *File) States() (lower, inTransit, upper int64) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	if f.plain.Load() || f.closed.Load() {
		return 0, 0, 0
	}
	blocks := f.blocks()
	for n := f.nextRegion(0); n*regionBlocks < blocks; n = f.nextRegion(n + 1) {
		r, err := f.region(n)
		if err != nil {
			continue
		}
		k := min(blocks-n*regionBlocks, regionBlocks)
		inTransit += r.count(k, stateTransit)
		upper += r.count(k, stateUpper)
	}
	return blocks - inTransit - upper, inTransit, upper
}
