package block

import (
	"errors"
	"fmt"
	"io"

	"lamina/state"
)

// A small lower file is copied when it is first opened for writing: that takes less time than one request of the kernel,
// and from then on the file can pass through. The copy is not synced. Until a commit has done that, its header says on
// disk what it says of a sketch that holds no block: a power cut leaves the lower file, as it was and as long as it was.
// The commit that syncs the bytes drops the header. In between the File is provisional: an ordinary file, but for that.
//
// So is every file that has just become an ordinary one: until a sync has put the removal of the header on disk a power cut
// can bring it back, and what it says would count more than what was written and synced past it, as O_DSYNC and msync of a
// file that is passed through are.

// CreateWhole makes a provisional copy of the lower file id in an empty upper file, and opens it. from is the lower file;
// it is not kept. It owns s from then on, also when it fails.
func (e *Engine) CreateWhole(s Store, id Ident, from io.ReaderAt) (*File, error) {
	f := e.newFile(s)
	f.format, f.ident = Sparse, id
	f.hdr = Header{Format: Sparse, BlockSize: defaultBlockSize, Ident: id, Limit: id.Size, Size: id.Size}
	f.plain.Store(true)
	f.provisional.Store(true)
	if err := f.copyWhole(from); err != nil {
		s.Close()
		return nil, err
	}
	if e.opts.Memory != nil {
		m := f.newMemory()
		m.provisional.Store(1)
		m.rec.Publish(state.Sketch)
		f.mem.Store(m)
	}
	e.created.Add(1)
	e.createdBytes.Add(id.Size)
	e.copied.Add(id.Size)
	e.register(f)
	return f, nil
}

// copyWhole puts the header on disk, and the bytes into the upper file. The header has the size, so that it does not
// matter which length the upper file has after a power cut.
func (f *File) copyWhole(from io.ReaderAt) error {
	size := f.ident.Size
	buf := getBuf(int(size))
	defer putBuf(buf)
	n, err := from.ReadAt(*buf, 0)
	switch {
	case int64(n) == size:
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("%w: it ends at %d, not at %d", ErrLowerChanged, n, size)
	default:
		return err
	}
	if err := f.s.SetHeader(f.hdr.encode()); err != nil {
		return err
	}
	_, err = f.s.WriteAt(*buf, 0)
	return err
}

// commitWhole makes an ordinary file of a provisional one. The caller holds commitMu.
func (f *File) commitWhole() (synced bool, err error) {
	if f.broken != nil {
		return false, f.broken
	}
	if !f.headerless {
		if err := f.order(); err != nil {
			return false, err
		}
		if err := f.dropHeader(); err != nil {
			return false, err
		}
	}
	return true, f.makeOrdinary()
}

// dropHeader removes the header: what the lower file had at CreateWhole is on disk. Bytes that were written since are in
// the keeping of the filesystem, as those of any file are. The caller holds commitMu.
func (f *File) dropHeader() error {
	if err := f.setOrigin(); err != nil {
		return err
	}
	if err := f.s.RemoveHeader(); err != nil {
		return err
	}
	f.headerless = true
	f.e.complete.Add(1)
	return nil
}

// makeOrdinary puts the removal of the header on disk. The caller holds commitMu.
func (f *File) makeOrdinary() error {
	if err := f.syncStore(false); err != nil {
		return err
	}
	f.ordinary()
	return nil
}

// ordinary says that the file is an ordinary one for good. The caller holds commitMu.
func (f *File) ordinary() {
	f.provisional.Store(false)
	f.forget()
}

// settleWhole does what is left for a file whose bytes somebody else has synced, and step is what is left.
func (f *File) settleWhole(step func() error) error {
	f.commitMu.Lock()
	defer f.commitMu.Unlock()
	if f.closed.Load() || !f.provisional.Load() {
		return nil
	}
	if f.broken != nil {
		return f.broken
	}
	return step()
}

// syncMany makes it worth syncing the whole filesystem instead of so many files, each of which takes its journal a
// transaction.
const syncMany = 8

// settleWholes settles the provisional ones among the files with two syncs of the filesystem, one before their headers are
// removed and one after, and returns the rest. If such a sync fails they all are the rest: the sync of each file tells which
// it was. The kernel tells such a failure once, to whoever asks first, so that it is the rest for every file that is open
// then, whenever its turn comes.
func (e *Engine) settleWholes(files []*File) (rest []*File) {
	var whole []*File
	for _, f := range files {
		if f.provisional.Load() && !f.nameless.Load() && f.syncFailure == e.syncFailures.Load() {
			whole = append(whole, f)
		} else {
			rest = append(rest, f)
		}
	}
	if len(whole) < syncMany || e.syncFS == nil || !e.syncAll() {
		return files
	}
	var dropped []*File
	for _, f := range whole {
		err := f.settleWhole(func() error {
			if f.headerless {
				return nil
			}
			return f.dropHeader()
		})
		if err != nil {
			rest = append(rest, f)
		} else {
			dropped = append(dropped, f)
		}
	}
	if !e.syncAll() {
		return append(rest, dropped...)
	}
	for _, f := range dropped {
		if err := f.settleWhole(func() error { f.ordinary(); return nil }); err != nil {
			rest = append(rest, f)
			continue
		}
		e.settled(f)
	}
	return rest
}

// syncAll syncs the filesystem of the upper layer.
func (e *Engine) syncAll() (ok bool) {
	if e.opts.Volatile {
		return true
	}
	err := e.syncFS()
	if err != nil {
		e.syncFailures.Add(1)
		e.fail("syncing the filesystem of the upper layer, whose files are now synced one by one: %v", err)
	}
	return err == nil
}

// SyncsWith gives the engine a way to sync everything that lies on the upper layer's filesystem, syncfs(2), for when
// many files are settled at once. It is called before the first file is opened.
func (e *Engine) SyncsWith(syncFS func() error) { e.syncFS = syncFS }

// Nameless tells that the file's last name is gone, and so that nobody will find it after a crash: nothing of it is put
// on disk any more unless Sync asks for it.
func (f *File) Nameless() { f.nameless.Store(true) }

// CreateOpen is Create, and opens the sketch. It owns s from then on, also when it fails.
func (e *Engine) CreateOpen(s Store, id Ident, lower func() (Lower, error)) (*File, error) {
	h, err := e.create(s, id)
	if err != nil {
		s.Close()
		return nil, err
	}
	length := id.Size
	if h.Format != Sparse {
		length = 0
	}
	f := e.newFile(s)
	f.open = lower
	if err := f.initSketch(h, length); err != nil {
		s.Close()
		return nil, err
	}
	e.register(f)
	return f, nil
}

// OpenOrdinary opens an upper file that was just made and is no sketch, and owns s from then on.
func (e *Engine) OpenOrdinary(s Store) *File {
	f := e.newFile(s)
	f.attrsSynced = true
	f.plain.Store(true)
	e.register(f)
	return f
}
