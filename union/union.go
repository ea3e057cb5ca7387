// Package union stacks layers into one tree: lookup, whiteouts, opaque and redirected directories, copy-up, rename,
// hard links. It knows names; it knows nothing of FUSE, and leaves a file's bytes to package block.
//
// # Locks
//
// tree is held for reading by whoever looks names up and for writing by whoever changes one. No file data is ever
// copied under it: copy-up prepares a nameless file first and only links it under the lock. nodeTable's mutex guards
// the tables of live nodes and is held for a few instructions. Node.mu guards one file's open state. A read or a write
// of an open file takes none of them.
//
// Order: Node.cu, tree, Node.mu, nodeTable.
package union

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"lamina/block"
	"lamina/hostfs"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// FS is one mounted union. All methods are safe for concurrent use.
type FS struct {
	cfg    Config
	lowers []layer.Layer
	upper  *layer.Dir
	work   *layer.Dir
	prefix string // of overlay's private attributes
	fsids  map[uint64]uint64

	tree sync.RWMutex
	nodeTable
	root *Node

	tmpSeq           atomic.Uint64
	bornUID, bornGID uint32          // who owns what the server makes in the workdir
	noClone          []atomic.Uint32 // by lower layer: the errno with which it refused to be cloned from, for good
	closing          atomic.Bool
	through          atomic.Bool // see WriteThrough
	noTmpfile        bool        // the upper's filesystem knows no O_TMPFILE
	spares           spares
	discards         discards

	damage  sync.Map     // what logDamage has reported
	damaged atomic.Int64 // how many different ones
}

// Damaged is how many objects could not be trusted when they were looked at, maxDamaged at most.
func (fs *FS) Damaged() int64 { return fs.damaged.Load() }

// Directories that a mount keeps in its workdir.
const (
	workRoot  = "lamina"
	tmpDir    = workRoot + "/tmp"      // objects on their way into the upper layer; emptied at every mount
	indexDir  = workRoot + "/index"    // one link for every copied-up file that had several names below
	dirtyMark = workRoot + "/volatile" // present while a volatile mount has not been closed
)

// ErrVolatile: the upper layer belongs to a volatile mount that was not closed, so its bytes cannot be trusted.
var ErrVolatile = errors.New("upper layer was left by a volatile mount that did not end cleanly: its contents cannot be trusted; start from an empty upperdir and workdir")

// New makes a union of cfg's layers. It empties the workdir of what a crash left, and changes nothing else.
func New(cfg Config) (*FS, error) {
	if len(cfg.Lowers) == 0 {
		return nil, errors.New("a union needs at least one lower layer")
	}
	fs := newFS(cfg)
	if fs.upper != nil {
		if err := fs.prepareWork(); err != nil {
			return nil, err
		}
	}
	if err := fs.makeRoot(); err != nil {
		return nil, err
	}
	if cfg.Resume {
		if err := fs.resume(); err != nil {
			return nil, err
		}
	}
	return fs, nil
}

func newFS(cfg Config) *FS {
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	fs := &FS{cfg: cfg, lowers: cfg.Lowers, upper: cfg.Upper, work: cfg.Work, prefix: cfg.NS.Prefix(), fsids: map[uint64]uint64{}}
	fs.noClone = make([]atomic.Uint32, len(fs.lowers))
	fs.nodeTable.init()
	fs.state = cfg.State
	fs.spares.make = fs.newSpare
	if fs.upper != nil {
		fs.fsids[fs.upper.FS()] = 0
		cfg.Engine.SyncsWith(func() error { return unix.Syncfs(fs.upper.RootFD()) })
		if hostfs.Orders(fs.upper.RootFD()) == nil {
			cfg.Engine.Orders()
		}
	}
	for _, l := range fs.lowers {
		if _, ok := fs.fsids[l.FS()]; !ok {
			fs.fsids[l.FS()] = uint64(len(fs.fsids))
		}
	}
	return fs
}

func (fs *FS) makeRoot() error {
	root := &Node{fs: fs, mode: unix.S_IFDIR, refs: 1}
	root.upper = fs.upper != nil
	opaque := false
	if root.upper {
		m, err := fs.upper.Marks("", unix.S_IFDIR)
		if err != nil {
			return fmt.Errorf("upper layer %s: %w", fs.upper.Name(), err)
		}
		opaque, root.xwh = m.Opaque, m.XWhiteouts
	}
	for i, l := range fs.lowers {
		if opaque {
			break
		}
		m, err := fs.marks(l, "", unix.S_IFDIR)
		if err != nil {
			return fmt.Errorf("lower layer %s: %w", l.Name(), err)
		}
		root.stack = append(root.stack, lowerRef{layer: int32(i), xwh: m.XWhiteouts})
		opaque = m.Opaque
	}
	st, err := fs.dirInoStat(root)
	if err != nil {
		return err
	}
	root.ino = st
	fs.root = root
	if fs.cfg.Resume {
		fs.state = nil // it has its record already
	}
	fs.register(root)
	fs.state = fs.cfg.State
	return nil
}

// prepareWork makes the workdir ready: a marked volatile leftover is refused, temporaries are removed, and what the
// filesystem can do is probed once.
func (fs *FS) prepareWork() error {
	if _, err := fs.work.Stat(dirtyMark); err == nil && !fs.cfg.Resume {
		return fmt.Errorf("%s: %w", fs.work.Name(), ErrVolatile)
	}
	for _, dir := range []string{workRoot, tmpDir, indexDir} {
		if err := fs.work.Mkdir(dir, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("workdir %s: cannot create %s: %w", fs.work.Name(), dir, err)
		}
	}
	if err := removeContents(fs.work, tmpDir); err != nil {
		return fmt.Errorf("workdir %s: cannot remove leftovers: %w", fs.work.Name(), err)
	}
	if err := fs.prepareKept(); err != nil {
		return fmt.Errorf("workdir %s: cannot prepare %s: %w", fs.work.Name(), keptDir, err)
	}
	if err := fs.dropNameless(); err != nil {
		return fmt.Errorf("workdir %s: cannot clean the index: %w", fs.work.Name(), err)
	}
	if err := fs.probe(); err != nil {
		return err
	}
	if fs.cfg.Volatile && !fs.cfg.Resume {
		if err := fs.work.Mkdir(dirtyMark, 0o700); err != nil {
			return fmt.Errorf("workdir %s: %w", fs.work.Name(), err)
		}
		return fs.work.SyncDir(workRoot)
	}
	return nil
}

// prepareKept sees to the directory of nameless files: what is in it belongs to the process before this one, or to a
// mount that is no more.
func (fs *FS) prepareKept() error {
	if fs.cfg.Resume {
		return nil
	}
	_, err := fs.work.Stat(keptDir)
	switch {
	case err == nil:
		return removeContents(fs.work, keptDir)
	case !errors.Is(err, unix.ENOENT):
		return err
	case fs.cfg.State == nil:
		return nil
	}
	return fs.work.Mkdir(keptDir, 0o700)
}

// Close settles every file and closes the layers. It returns the first error that concerns data.
func (fs *FS) Close() error {
	fs.closing.Store(true)
	err := fs.cfg.Engine.Close()
	fs.discards.running.Wait()
	fs.closeKept()
	fs.spares.close()
	if fs.upper != nil && fs.state != nil {
		if e := removeContents(fs.work, keptDir); e != nil {
			fs.cfg.Logf("workdir %s: leftovers in %s: %v", fs.work.Name(), keptDir, e)
		}
	}
	if fs.upper != nil && err == nil && fs.cfg.Volatile {
		if err = unix.Syncfs(fs.upper.RootFD()); err == nil {
			err = fs.work.Rmdir(dirtyMark)
		}
		if errors.Is(err, unix.ENOENT) {
			err = nil // a container engine removes the layer as soon as it has unmounted it
		}
	}
	for _, l := range fs.lowers {
		err = firstError(err, l.Close())
	}
	if fs.upper != nil {
		err = firstError(err, fs.upper.Close())
		err = firstError(err, fs.work.Close())
	}
	return err
}

// Sync puts everything that was written on disk, the names too. What could not be is tried again later.
func (fs *FS) Sync() error {
	if fs.upper == nil {
		return nil
	}
	if err := fs.cfg.Engine.Flush(); err != nil || fs.cfg.Volatile {
		return err
	}
	return unix.Syncfs(fs.upper.RootFD())
}

// WriteThrough makes every later change of a file's bytes durable before it is answered. With a Sync after it the end of this
// process takes nothing with it that the end of a program would not take from a filesystem of the kernel. A volatile union
// has nothing to lose.
func (fs *FS) WriteThrough() { fs.through.Store(!fs.cfg.Volatile) }

// Engine gives the block engine, for statistics.
func (fs *FS) Engine() *block.Engine { return fs.cfg.Engine }

// ReadOnly says that there is no upper layer.
func (fs *FS) ReadOnly() bool { return fs.upper == nil }

// Statfs describes the filesystem that new bytes go to: the upper's, or the topmost lower's of a read-only union.
func (fs *FS) Statfs() (unix.Statfs_t, error) {
	if fs.upper != nil {
		return fs.upper.Statfs()
	}
	if d, ok := fs.lowers[0].(*layer.Dir); ok {
		return d.Statfs()
	}
	return unix.Statfs_t{Namelen: 255, Bsize: 4096}, nil
}

func firstError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// inoOf makes a union inode number of a layer's: as it is on the first filesystem, with the filesystem's index in the
// top bits on the others (overlayfs's xino), mixed where the number itself reaches that far.
func (fs *FS) inoOf(fsid, ino uint64) uint64 {
	idx := fs.fsids[fsid]
	if idx == 0 {
		return ino
	}
	const shift = 48
	if ino>>shift == 0 {
		return ino | idx<<shift
	}
	x := (ino ^ idx*0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9
	return x ^ x>>31
}

// maxDamaged bounds the names that are remembered of damaged objects: a hostile layer may be full of them.
const maxDamaged = 10_000

// logDamage reports an object that cannot be trusted, once per event.
func (fs *FS) logDamage(what, path string, err error) {
	if fs.damaged.Load() < maxDamaged {
		if _, known := fs.damage.LoadOrStore(what+path, struct{}{}); !known {
			fs.damaged.Add(1)
		}
	}
	fs.cfg.Logf("%s: /%s: %v", what, path, err)
}

// removeContents empties dir, which holds only what Lamina put there.
func removeContents(d *layer.Dir, dir string) error {
	entries, err := d.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := join(dir, e.Name)
		if err := d.Unlink(p); err == nil || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err := removeContents(d, p); err != nil {
			return err
		}
		if err := d.Rmdir(p); err != nil {
			return err
		}
		d.Invalidate(p)
	}
	return nil
}

// discard empties and removes a directory that was moved into the workdir. What fails stays for the next mount to
// remove: the tree no longer shows it.
func (fs *FS) discard(tmp string) {
	err := removeContents(fs.work, tmp)
	if err == nil {
		err = fs.work.Rmdir(tmp)
		fs.work.Invalidate(tmp)
	}
	if err != nil {
		fs.cfg.Logf("workdir %s: leftover %s: %v", fs.work.Name(), tmp, err)
	}
}

// discards is what is being discarded in the background: nobody has to wait for a directory that is not shown any more.
type discards struct {
	running sync.WaitGroup
	pending atomic.Int32
	turn    sync.Mutex
}

// maxDiscards bounds how many directories wait to be discarded. Whoever removes more of them does it himself.
const maxDiscards = 256

// discardLater is discard in the background. Close waits for it.
func (fs *FS) discardLater(tmp string) {
	d := &fs.discards
	if d.pending.Add(1) > maxDiscards {
		d.pending.Add(-1)
		fs.discard(tmp)
		return
	}
	d.running.Go(func() {
		d.turn.Lock()
		defer d.turn.Unlock()
		fs.discard(tmp)
		d.pending.Add(-1)
	})
}

// discardFile is discard for what is no directory.
func (fs *FS) discardFile(tmp string) {
	if err := fs.work.Unlink(tmp); err != nil {
		fs.cfg.Logf("workdir %s: leftover %s: %v", fs.work.Name(), tmp, err)
	}
}

func (fs *FS) tmpName() string {
	return fmt.Sprintf("%s/%d-%d", tmpDir, os.Getpid(), fs.tmpSeq.Add(1))
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	if name == "" {
		return dir
	}
	return dir + "/" + name
}

func isDir(mode uint32) bool { return mode&unix.S_IFMT == unix.S_IFDIR }
func isReg(mode uint32) bool { return mode&unix.S_IFMT == unix.S_IFREG }

// closeKept closes what was kept for a kernel that went without forgetting it.
func (fs *FS) closeKept() {
	fs.byID.Range(func(_, v any) bool {
		n := v.(*Node)
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.kept != nil && n.opens == 0 {
			n.fs.closeUnkept([]unkept{{n.kept.fd, n.cur.Swap(nil), n.id}})
			n.kept = nil
		}
		return true
	})
}
