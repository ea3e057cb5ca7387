package block

import (
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

	"lamina/state"
)

// With Options.Memory an Engine writes down, in memory that outlives the process, what its sketches know and the disk does
// not: which bytes are new, which blocks are Upper, where they lie, how long the file is. An Engine that is given the memory
// of one whose process was killed goes on from there: Open finds what belongs to the upper file.
//
// It is a log, one for each sketch. An entry is written after the bytes that it speaks of and before anybody can act on it:
// a request that was killed in between is asked again, and what is seen until then is what was there before. Once the table
// is on disk the log begins anew.

// What an entry of the log says.
const (
	bytesNew    = iota + 1 // bytes [a, b) of the file were written
	blocksUpper            // blocks [a, b) are Upper
	blocksAt               // blocks [a, b) lie at block c of the upper file and the following
	blocksZero             // blocks [a, b) are zeros without a place
	blocksLower            // blocks [a, b) are Lower, and have no place
)

type entry struct {
	kind    int64
	a, b, c int64
}

const (
	chunkEntries = 127
	// longLog entries make a log worth writing anew, if it is also growFactor times as long as when that was last done.
	longLog    = 1024
	growFactor = 4
)

// chunkRec is a piece of a log.
type chunkRec struct {
	prev  uint64 // the piece before; constant once published
	count atomic.Uint64
	entry [chunkEntries]entry
}

// sketchRec is a sketch, or a provisional file.
type sketchRec struct {
	ino         uint64        // of the upper file
	size        atomic.Int64  // logical size, bytes; used where the upper file's own length is not that
	cutTo       atomic.Int64  // 1 more than the size that a truncation has begun to make; 0: none
	provisional atomic.Uint32 // see whole.go
	broken      atomic.Uint32 // the error number of the sync that has failed; 0: none has
	head        atomic.Uint64 // newest piece of the log; 0: it is empty
}

const (
	sizeOfSketch = unsafe.Sizeof(sketchRec{})
	sizeOfChunk  = unsafe.Sizeof(chunkRec{})
)

// memory is a sketchRec in use.
type memory struct {
	a   *state.Arena
	rec state.Rec
	*sketchRec
	// Under File.mu.
	tail    *chunkRec
	entries int
	least   int // entries when the log was last begun
}

// remembered is what an engine before this one has left, until it is claimed. It drops what is in nobody's log.
func (e *Engine) remembered(a *state.Arena) map[uint64]state.Rec {
	if a == nil {
		return nil
	}
	all := map[uint64]state.Rec{}
	used := map[uint64]bool{}
	for _, r := range a.All(state.Sketch) {
		s := state.As[sketchRec](r)
		all[s.ino] = r
		for ref := s.head.Load(); ref != 0; ref = state.As[chunkRec](a.At(ref)).prev {
			used[ref] = true
		}
	}
	for _, r := range a.All(state.Chunk) {
		if !used[r.Ref()] {
			r.Free()
		}
	}
	return all
}

// Resume tells that every file which the engine before had open has been opened again: what is left of its memory is of
// files that are no more.
func (e *Engine) Resume() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range e.left {
		(&memory{a: e.opts.Memory, rec: r, sketchRec: state.As[sketchRec](r)}).free()
	}
	e.left = nil
}

// Left says whether the engine before knew something of the upper file with this inode number that the disk does not know.
func (e *Engine) Left(ino uint64) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ok := e.left[ino]
	return ok
}

// claim takes what the engine before knew of a file. Its log can be read, but not written until it is begun anew.
func (e *Engine) claim(ino uint64) *memory {
	e.mu.Lock()
	defer e.mu.Unlock()
	r, ok := e.left[ino]
	if !ok {
		return nil
	}
	delete(e.left, ino)
	return &memory{a: e.opts.Memory, rec: r, sketchRec: state.As[sketchRec](r)}
}

// unclaim puts back what was claimed for a file that could not be opened.
func (e *Engine) unclaim(m *memory) {
	if m == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.left[m.ino] = m.rec
}

// newMemory makes a record of f. It is visible only when it is published.
func (f *File) newMemory() *memory {
	a := f.e.opts.Memory
	r := a.New(int(sizeOfSketch))
	m := &memory{a: a, rec: r, sketchRec: state.As[sketchRec](r)}
	m.ino = f.ino()
	return m
}

// known returns f's memory, made if need be; nil if the engine has none.
func (f *File) known() *memory {
	if m := f.mem.Load(); m != nil || f.e.opts.Memory == nil {
		return m
	}
	f.memMu.Lock()
	defer f.memMu.Unlock()
	if m := f.mem.Load(); m != nil {
		return m
	}
	m := f.newMemory()
	m.size.Store(f.size.Load())
	m.rec.Publish(state.Sketch)
	f.mem.Store(m)
	m.grow(f.size.Load()) // whoever has grown it meanwhile did not see m
	return m
}

func (m *memory) grow(end int64) {
	for {
		old := m.size.Load()
		if end <= old || m.size.CompareAndSwap(old, end) {
			return
		}
	}
}

// setSize is a size that is not to be seen from the upper file. The caller holds shape for writing, or is alone.
func (f *File) setSize(size int64) {
	f.memMu.Lock() // or known, if it is just making m, grows m to the size before
	f.size.Store(size)
	if m := f.mem.Load(); m != nil {
		m.size.Store(size)
	}
	f.memMu.Unlock()
	f.known()
}

// remember writes an entry. The caller holds mu and shape.
func (f *File) remember(kind, a, b, c int64) {
	if f.replaying {
		return
	}
	m := f.known()
	if m == nil {
		return
	}
	if m.entries >= max(longLog, growFactor*m.least) {
		f.beginLog(m)
	}
	m.add(entry{kind, a, b, c})
}

func (m *memory) add(e entry) {
	if t := m.tail; t != nil {
		n := t.count.Load()
		if last := &t.entry[max(n, 1)-1]; n > 0 && e.kind == bytesNew && last.kind == bytesNew && last.b == e.a {
			atomic.StoreInt64(&last.b, e.b) // as writes that follow each other do
			return
		}
		if n < chunkEntries {
			t.entry[n] = e
			t.count.Store(n + 1)
			m.entries++
			return
		}
	}
	r := m.a.New(int(sizeOfChunk))
	t := state.As[chunkRec](r)
	t.prev, t.entry[0] = m.head.Load(), e
	t.count.Store(1)
	r.Publish(state.Chunk)
	m.head.Store(r.Ref())
	m.tail = t
	m.entries++
}

// beginLog replaces the log by one that says what is in memory now and not on disk. The caller holds mu and shape.
func (f *File) beginLog(m *memory) {
	fresh := &memory{a: m.a, sketchRec: &sketchRec{}}
	f.describe(fresh)
	old := m.head.Load()
	m.head.Store(fresh.head.Load())
	m.tail, m.entries, m.least = fresh.tail, fresh.entries, fresh.entries
	m.freeChunks(old)
}

// describe writes a log of everything that is not known to be on disk. The caller holds mu and shape.
func (f *File) describe(m *memory) {
	for n, p := range f.dir.all() {
		r := p.Load()
		if r.dirty.Load() || slices.Contains(f.staged, n) {
			f.describeRegion(m, n, r)
		}
	}
	for b, spans := range f.transit {
		start := b << f.shift
		if f.format != Sparse {
			m.add(entry{blocksLower, b, b + 1, 0})
			m.add(entry{blocksAt, b, b + 1, f.upperAt(b) >> f.shift})
		}
		for _, s := range spans {
			m.add(entry{bytesNew, start + int64(s.lo), start + int64(s.hi), 0})
		}
	}
}

func (f *File) describeRegion(m *memory, n int64, r *region) {
	for i := int64(0); i < regionBlocks; {
		st := r.state(i)
		end := r.runEnd(i, regionBlocks, st)
		b := n * regionBlocks
		switch {
		case st == stateUpper && f.format == Sparse:
			m.add(entry{blocksUpper, b + i, b + end, 0})
		case st == stateUpper:
			end = f.describePlaces(m, b, r, i, end)
			m.add(entry{blocksUpper, b + i, b + end, 0})
		case st == stateLower && f.format != Sparse: // the table on disk may give it a place that it has no more
			m.add(entry{blocksLower, b + i, b + end, 0})
		}
		i = end
	}
}

// describePlaces says where those of blocks [i, end) lie that lie one after another, and returns where these end.
func (f *File) describePlaces(m *memory, b int64, r *region, i, end int64) int64 {
	first := r.phys[i].Load()
	k := i + 1
	for k < end {
		next := r.phys[k].Load()
		if first == physZero && next != physZero || first != physZero && int64(next) != int64(first)+k-i {
			break
		}
		k++
	}
	if first == physZero {
		m.add(entry{blocksZero, b + i, b + k, 0})
	} else {
		m.add(entry{blocksAt, b + i, b + k, int64(first)})
	}
	return k
}

// told tells that everything which was staged is on disk.
func (f *File) told() {
	f.shape.RLock()
	defer f.shape.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.staged = nil
	if m := f.mem.Load(); m != nil && !f.plain.Load() {
		f.beginLog(m)
	}
}

// forget drops f's memory: the disk knows it all, or nobody will ask. The caller holds shape for writing, or f is plain.
func (f *File) forget() {
	if m := f.mem.Swap(nil); m != nil {
		m.free()
	}
}

func (m *memory) free() {
	head := m.head.Load()
	m.rec.Free()
	m.freeChunks(head)
}

func (m *memory) freeChunks(head uint64) {
	for head != 0 {
		r := m.a.At(head)
		head = state.As[chunkRec](r).prev
		r.Free()
	}
}

// log returns the entries in the order of writing.
func (m *memory) log() []entry {
	var chunks []*chunkRec
	for ref := m.head.Load(); ref != 0; {
		c := state.As[chunkRec](m.a.At(ref))
		chunks = append(chunks, c)
		ref = c.prev
	}
	var all []entry
	for _, c := range slices.Backward(chunks) {
		all = append(all, c.entry[:min(c.count.Load(), chunkEntries)]...)
	}
	return all
}

// resume brings a sketch that was just opened to where the process before had it. Nobody else has f yet.
func (f *File) resume(m *memory) error {
	if f.bound != unbounded || f.format != Sparse {
		f.size.Store(m.size.Load())
	}
	f.mem.Store(m)
	log := m.log()
	f.mu.Lock()
	err := f.replay(log)
	if err == nil {
		f.beginLog(m)
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	if cut := m.cutTo.Load(); cut > 0 {
		if err := f.Truncate(cut - 1); err != nil {
			return err
		}
	}
	if len(f.transit) > 0 && f.e.opts.CaW == CaWEager {
		f.e.enqueue(f)
	}
	return nil
}

// replay makes the entries' changes again. The caller holds mu.
func (f *File) replay(log []entry) error {
	f.replaying = true
	defer func() { f.replaying = false }()
	for _, e := range log {
		first, last := e.a, e.b
		if e.kind == bytesNew {
			end := e.b
			if f.format == Sparse {
				end = min(end, f.limit)
			}
			first, last = e.a>>f.shift, ceilDiv(end, f.bs)
		}
		for n := first / regionBlocks; n*regionBlocks < last; n++ {
			if _, err := f.region(n); err != nil {
				return err
			}
		}
		switch e.kind {
		case bytesNew:
			f.mark(e.a, e.b)
		case blocksUpper:
			f.markFull(first, last)
		case blocksAt:
			eachRegion(first, last, func(b, end int64) { f.place(b, end, e.c+b-first) })
		case blocksZero:
			eachRegion(first, last, f.placeZero)
		case blocksLower:
			eachRegion(first, last, f.makeLower)
		}
	}
	return nil
}

func eachRegion(b, end int64, do func(b, end int64)) {
	for b < end {
		stop := min(end, (b/regionBlocks+1)*regionBlocks)
		do(b, stop)
		b = stop
	}
}

// makeLower makes blocks [b, end) of one region Lower, without a place. The caller holds mu and shape.
func (f *File) makeLower(b, end int64) {
	f.remember(blocksLower, b, end, 0)
	r := f.mutable(b / regionBlocks)
	f.forgetTransit(b, end)
	for i := b; i < end; i++ {
		r.phys[i%regionBlocks].Store(physNone)
		r.set(i%regionBlocks, stateLower)
	}
	r.dirty.Store(true)
}

// memoryState are a File's fields that concern Options.Memory.
type memoryState struct {
	memMu     sync.Mutex // while mem is made, or the size is set
	mem       atomic.Pointer[memory]
	staged    []int64 // regions that the table in memory was told of, and perhaps not the one on disk; under mu
	replaying bool    // under mu
}
