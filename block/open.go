package block

import (
	"errors"
	"math"

	"golang.org/x/sys/unix"
)

// unbounded is File.bound while there is no table.
const unbounded = math.MaxInt64

// Open returns the File over an upper file, a sketch or an ordinary one, and owns s from then on, also when it fails.
// lower is called when a block of the lower file is first needed, and again only if it failed; the identity of what it
// returns is checked. It is never called for complete files.
func (e *Engine) Open(s Store, lower func() (Lower, error)) (*File, error) {
	f, err := e.openFile(s, lower, false)
	if err != nil {
		s.Close()
		return nil, err
	}
	e.register(f)
	return f, nil
}

func (e *Engine) newFile(s Store) *File {
	return &File{e: e, s: s, syncFailure: e.syncFailures.Load()}
}

// register makes the engine know an open file.
func (e *Engine) register(f *File) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.files[f] = struct{}{}
}

func (e *Engine) openFile(s Store, lower func() (Lower, error), readOnly bool) (*File, error) {
	f := e.newFile(s)
	f.open, f.readOnly = lower, readOnly
	left, err := f.openSketch()
	if err != nil {
		e.unclaim(left)
		return nil, err
	}
	return f, nil
}

// openSketch finds out what the upper file is. left is what the process before knew of it, for putting it back on an error.
func (f *File) openSketch() (left *memory, err error) {
	s := f.s
	b, err := s.Header()
	if err != nil {
		return nil, err
	}
	if b == nil {
		f.plain.Store(true)
		if f.e.opts.Memory == nil || f.readOnly {
			return nil, nil
		}
	}
	st, err := s.Stat()
	if err != nil {
		return nil, err
	}
	if b == nil {
		if left = f.e.claim(st.Ino); left != nil { // the process before had removed the header, and perhaps not synced that
			f.headerless = true
			f.inherit(left)
		}
		return left, nil
	}
	h, err := ParseHeader(b)
	if err != nil {
		return nil, err
	}
	if h.Complete && f.readOnly {
		h.Limit, h.TablePages = 0, 0
	}
	left = f.e.claim(st.Ino)
	if left != nil && left.provisional.Load() != 0 {
		f.hdr, f.format, f.ident = h, Sparse, h.Ident
		f.plain.Store(true)
		f.inherit(left)
		return left, nil
	}
	if err := f.initSketch(h, st.Size); err != nil || f.readOnly {
		return left, err
	}
	if err := f.recover(st.Size); err != nil || left == nil {
		return left, err
	}
	if f.plain.Load() { // it was about to be completed, and has a memory of its own now
		left.free()
		return nil, nil
	}
	if errno := left.broken.Load(); errno != 0 {
		f.broken = unix.Errno(errno)
	}
	return left, f.resume(left)
}

// inherit makes f the provisional file that it was in the process before. Whether syncing the filesystem has failed there
// is not known.
func (f *File) inherit(m *memory) {
	f.provisional.Store(true)
	f.mem.Store(m)
	f.syncFailure = -1
	if errno := m.broken.Load(); errno != 0 {
		f.broken = unix.Errno(errno)
	}
}

// recover finishes what a crash interrupted between the steps of a completion or of a truncation without a table, and gives
// the upper file, stSize bytes long, the length that the sketch has.
func (f *File) recover(stSize int64) error {
	switch {
	case f.hdr.Size == naturalSize && !f.hdr.Complete && stSize < f.size.Load():
		return f.quietly(func() error { return f.s.Truncate(f.size.Load()) })
	case f.hdr.Complete:
		return f.finish()
	case f.format == Sparse && f.hdr.TablePages == 0 && f.hdr.Size != naturalSize:
		if err := f.quietly(func() error { return f.s.Truncate(f.hdr.Size) }); err != nil {
			return err
		}
		f.tailClean = true
		h := f.hdr
		h.Size = naturalSize
		return f.setHeader(h)
	}
	return nil
}

// setHeader puts h on disk. The caller holds commitMu, or is alone.
func (f *File) setHeader(h Header) error {
	if h.Kernel {
		// The first header of our own over kernel overlayfs's: now the lower file's identity is recorded.
		l, err := f.lowerFor()
		if err != nil {
			return err
		}
		h.Kernel = false
		h.Ident = Ident{Size: l.stat.Size, MtimeNS: l.stat.Mtim.Nano(), Ino: l.stat.Ino}
		if fs, ok := l.Lower.(FSer); ok {
			h.Ident.FS = fs.FS()
		}
	}
	f.attrsSynced = false
	if err := f.s.SetHeader(h.encode()); err != nil {
		return err
	}
	f.hdr = h
	return nil
}

// Close puts the table on disk and closes the file. If that fails the File stays open, so that nothing written is lost:
// call Close again, or Abandon it. Once the Engine is closed there is no later: then the File is closed all the same, the
// error is returned, and the log names what is lost. A nameless file is closed as it is.
func (f *File) Close() error {
	if f.readOnly || f.nameless.Load() {
		return f.Abandon()
	}
	if f.e.ended() {
		return errors.Join(f.lastCommit(), f.Abandon())
	}
	if err := f.commit(); err != nil {
		return err
	}
	return f.Abandon()
}

// Abandon closes the file as it is: what no Sync, Settle or Close has put on disk falls back to the lower file.
func (f *File) Abandon() error {
	f.commitMu.Lock()
	defer f.commitMu.Unlock()
	f.shape.Lock()
	defer f.shape.Unlock()
	if f.closed.Swap(true) {
		return nil
	}
	f.mu.Lock()
	f.e.inTransit.Add(-int64(len(f.transit)))
	f.transit = nil
	f.mu.Unlock()
	f.e.mu.Lock()
	delete(f.e.files, f)
	f.e.mu.Unlock()
	f.closeLower()
	f.forget()
	return f.s.Close()
}

func (f *File) closeLower() {
	f.lower.Lock()
	defer f.lower.Unlock()
	if l := f.lower.file.Swap(nil); l != nil {
		if err := l.Close(); err != nil {
			f.e.fail("closing a lower file: %v", err)
		}
	}
	f.lower.failed = unix.EBADF
}

// sketchLower is a sketch of a lower layer, read as the Lower of the sketch above.
type sketchLower struct{ *File }

var _ Lower = sketchLower{}

// readers is the engine of the files that OpenReadOnly opens: nothing is ever queued there.
var readers = &Engine{opts: Options{Logf: func(string, ...any) {}}, files: make(map[*File]struct{})}

// OpenReadOnly opens a sketch of a lower layer, or an ordinary file, as the Lower of the sketch above it: chains of
// layers are resolved link by link. It never writes. It owns s, also when it fails.
func OpenReadOnly(s Store, lower func() (Lower, error)) (Lower, error) {
	f, err := readers.openFile(s, lower, true)
	if err != nil {
		s.Close()
		return nil, err
	}
	return sketchLower{f}, nil
}

// SeekData returns the first extent with data at or after off.
func (l sketchLower) SeekData(off int64) (start, end int64, err error) {
	if start, err = l.Seek(off, unix.SEEK_DATA); err != nil {
		return 0, 0, err
	}
	end, err = l.Seek(start, unix.SEEK_HOLE)
	return start, end, err
}

// FD is offered for passthrough where the file is an ordinary one; -1 otherwise.
func (l sketchLower) FD() int {
	if fd, ok := l.Plain(); ok {
		return fd
	}
	return -1
}
