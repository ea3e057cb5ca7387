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

// CreateWhole makes a provisional copy of the lower file id in an empty upper file, and opens it. from is the lower file;
// it is not kept. It owns s from then on, also when it fails.
func (e *Engine) CreateWhole(s Store, id Ident, from io.ReaderAt) (*File, error) {
	f := &File{e: e, s: s, format: Sparse, ident: id}
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
	if err := f.order(); err != nil {
		return false, err
	}
	if err := f.dropHeader(); err != nil {
		return false, err
	}
	return true, f.syncStore(false)
}

// dropHeader is the last step of a commit: what the lower file had at CreateWhole is on disk. Bytes that were written
// since are in the keeping of the filesystem, as those of any file are. The caller holds commitMu.
func (f *File) dropHeader() error {
	if err := f.setOrigin(); err != nil {
		return err
	}
	if err := f.s.RemoveHeader(); err != nil {
		return err
	}
	f.provisional.Store(false)
	f.forget()
	f.e.complete.Add(1)
	return nil
}

// settleWhole is dropHeader for a file whose bytes somebody else has synced.
func (f *File) settleWhole() error {
	f.commitMu.Lock()
	defer f.commitMu.Unlock()
	if f.closed.Load() || !f.provisional.Load() {
		return nil
	}
	if f.broken != nil {
		return f.broken
	}
	return f.dropHeader()
}

// syncMany makes it worth syncing the whole filesystem instead of so many files, each of which takes its journal a
// transaction.
const syncMany = 8

// settleWholes settles the provisional ones among the files with a single sync, and returns the rest. If that sync fails
// it returns all of them: the sync of each file tells which it was.
func (e *Engine) settleWholes(files []*File) (rest []*File) {
	var whole []*File
	for _, f := range files {
		if f.provisional.Load() && !f.nameless.Load() {
			whole = append(whole, f)
		} else {
			rest = append(rest, f)
		}
	}
	if len(whole) < syncMany || e.syncFS == nil {
		return files
	}
	if !e.opts.Volatile {
		if err := e.syncFS(); err != nil {
			e.fail("syncing the filesystem of the upper layer: %v", err)
			return files
		}
	}
	for _, f := range whole {
		if err := f.settleWhole(); err != nil {
			rest = append(rest, f)
			continue
		}
		e.settled(f)
	}
	return rest
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
	f := &File{e: e, s: s, open: lower}
	if err := f.initSketch(h, length); err != nil {
		s.Close()
		return nil, err
	}
	e.register(f)
	return f, nil
}

// OpenOrdinary opens an upper file that was just made and is no sketch, and owns s from then on.
func (e *Engine) OpenOrdinary(s Store) *File {
	f := &File{e: e, s: s, attrsSynced: true}
	f.plain.Store(true)
	e.register(f)
	return f
}
