package block

import (
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"lamina/state"

	"golang.org/x/sys/unix"
)

const (
	defaultBlockSize   = 4096
	defaultWorkers     = 2
	defaultSettleDelay = 5 * time.Second
	// defaultCommitInterval is how long kernels leave written pages in memory (vm.dirty_expire_centisecs).
	defaultCommitInterval = 30 * time.Second
	// maxWaiting files that wait to be settled make the engine start without delay.
	maxWaiting = 1024
	// maxFills files wait to be completed by fill=idle; what settles meanwhile stays a sketch.
	maxFills = 64
)

// Options of an Engine. The zero value is what a mount without options gets.
type Options struct {
	Format      Format        // of new sketches; 0: Sparse
	BlockSize   int           // bytes, a power of two from 4096 to 1 MiB; 0: 4096. BCoW has 4096 always; BCoWSingle takes it as the least
	CaW         CaW           // zero value: eager
	Fill        Fill          // zero value: none
	Volatile    bool          // never sync
	Workers     int           // background copiers; 0: 2
	SettleDelay time.Duration // from the last close to the table on disk; 0: 5 s
	// CommitInterval is how often sketches that are open are put on disk, InTransit blocks and table, whatever their
	// CaW mode; a power cut costs a file that nobody syncs no more than this. 0: 30 s.
	CommitInterval time.Duration
	// Memory outlives this process. What is in it when the Engine is made is of an Engine whose process was killed, and
	// which had the same upper layer. Nil: there is none.
	Memory *state.Arena
	// Logf receives one line per event that an operator must know of; nil: nobody is told.
	Logf func(format string, args ...any)
}

// check returns the options with defaults filled in.
func (o Options) check() (Options, error) {
	if o.Format == 0 {
		o.Format = Sparse
	}
	if o.BlockSize == 0 {
		o.BlockSize = defaultBlockSize
	}
	if o.Workers <= 0 {
		o.Workers = defaultWorkers
	}
	if o.SettleDelay <= 0 {
		o.SettleDelay = defaultSettleDelay
	}
	if o.CommitInterval <= 0 {
		o.CommitInterval = defaultCommitInterval
	}
	if o.Logf == nil {
		o.Logf = func(string, ...any) {}
	}
	if o.BlockSize < 1<<minBlockShift || o.BlockSize > 1<<maxBlockShift || bits.OnesCount(uint(o.BlockSize)) != 1 {
		return o, fmt.Errorf("block_size=%d: not a power of two from 4096 to 1048576", o.BlockSize)
	}
	if o.Format == BCoW && o.BlockSize != defaultBlockSize {
		return o, fmt.Errorf("block_size=%d: two-level bcow has blocks of 4096 bytes", o.BlockSize)
	}
	return o, nil
}

// Validate says whether an Engine can be made of the options, naming the one that is wrong.
func (o Options) Validate() error {
	_, err := o.check()
	return err
}

// Stats is what `lamina status` shows of one mount.
type Stats struct {
	Files            int64 // open
	Sketches         int64 // open and not complete
	Lower            int64 // blocks of the open sketches, by state
	InTransit        int64
	Upper            int64
	Queue            int64 // files that wait for the copier
	Settling         int64 // closed files whose tables are not yet on disk
	Commits          int64 // times that an open file was found with something new after CommitInterval, and put on disk
	BytesNotCopied   int64 // of lower files, which copying them up whole would have copied
	BytesCopied      int64
	Errors           int64 // failed copies, syncs and settlements; damage found
	Damaged          int64 // files of whose table some part was found unreadable
	SketchesCreated  int64
	SketchesComplete int64 // turned into ordinary files
}

// Engine serves the sketches of one mount: copier workers, the settler, the filler, statistics.
type Engine struct {
	opts Options

	mu      sync.Mutex
	wake    *sync.Cond // copier: queue or closing changed
	files   map[*File]struct{}
	queue   []*File
	waiting []waiting // settler, in the order of their deadlines
	alarm   time.Time // settler: when it looks at waiting again by itself, or sooner
	closing bool
	settle  chan struct{} // settler: waiting or closing changed
	end     chan struct{} // closed when closing is set
	fills   chan *File    // settled files to be completed
	filling atomic.Bool   // a file in use is being completed
	wg      sync.WaitGroup

	left map[uint64]state.Rec // what Options.Memory held when the engine was made, and nobody claimed; see memory.go

	syncFS func() error // syncs everything in the upper layer's filesystem; nil: there is no such thing
	// syncFailures counts the failures of syncFS.
	syncFailures atomic.Int64
	orders       bool // see Orders
	addendum     int  // the longest that it writes, bytes

	inTransit                               atomic.Int64
	created, createdBytes, copied, complete atomic.Int64
	commits, errs, damaged                  atomic.Int64
	discard                                 atomic.Bool
}

// NewEngine starts the workers of one mount. It panics on options that Validate refuses.
func NewEngine(o Options) *Engine {
	opts, err := o.check()
	if err != nil {
		panic("block: " + err.Error())
	}
	e := &Engine{opts: opts, addendum: maxAddendum, files: make(map[*File]struct{}), settle: make(chan struct{}, 1),
		end: make(chan struct{}), fills: make(chan *File, maxFills)}
	e.wake = sync.NewCond(&e.mu)
	e.left = e.remembered(opts.Memory)
	for range opts.Workers {
		e.wg.Go(e.copyLoop)
	}
	e.wg.Go(e.settleLoop)
	e.wg.Go(e.fillLoop)
	return e
}

// fail counts an error and tells the operator.
func (e *Engine) fail(format string, args ...any) {
	e.errs.Add(1)
	e.opts.Logf(format, args...)
}

// enqueue gives f's InTransit blocks to the copier, unless it has them already.
func (e *Engine) enqueue(f *File) {
	if f.queued.Swap(true) {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing || f.closed.Load() {
		f.queued.Store(false)
		return
	}
	e.queue = append(e.queue, f)
	e.wake.Signal()
}

// copyLoop is one copier.
func (e *Engine) copyLoop() {
	for {
		e.mu.Lock()
		for len(e.queue) == 0 && !e.closing {
			e.wake.Wait()
		}
		if e.closing {
			e.mu.Unlock()
			return
		}
		f := e.queue[0]
		e.queue = e.queue[1:]
		e.mu.Unlock()
		if e.inTransit.Load() < hurryBlocks {
			time.Sleep(copyDelay)
		}
		f.queued.Store(false)
		f.copyQueued()
	}
}

// Create makes an empty sketch of the lower file id in an empty upper file: header and length, nothing else. EFBIG: the
// file is larger than a sketch of this format can be, and has to be copied.
func (e *Engine) Create(s Store, id Ident) error {
	_, err := e.create(s, id)
	return err
}

func (e *Engine) create(s Store, id Ident) (Header, error) {
	h := Header{Format: e.opts.Format, BlockSize: e.opts.BlockSize, Ident: id, Limit: id.Size, Size: naturalSize}
	if h.Format == BCoWSingle {
		h.BlockSize = singleBlockSize(id.Size, h.BlockSize)
	}
	if id.Size < 0 || id.Size > maxBlocks*int64(h.BlockSize) {
		return h, fmt.Errorf("a sketch of %d bytes: %w", id.Size, unix.EFBIG)
	}
	if h.Format != Sparse {
		h.Size = id.Size
		h.TablePages = tablePages(h.Format, ceilDiv(id.Size, int64(h.BlockSize)))
	}
	if err := s.SetHeader(h.encode()); err != nil {
		return h, err
	}
	if h.Format == Sparse && id.Size > 0 {
		if err := s.Truncate(id.Size); err != nil {
			return h, err
		}
	}
	e.created.Add(1)
	e.createdBytes.Add(id.Size)
	return h, nil
}

// singleEntries is the fixed length of a single-level table.
const singleEntries = 65536

// singleBlockSize is the least power of two, not under least, with which singleEntries blocks hold size bytes.
func singleBlockSize(size int64, least int) int {
	bs := least
	for bs < 1<<maxBlockShift && int64(bs)*singleEntries < size {
		bs *= 2
	}
	return bs
}

// tablePages is how many pages a bcow table needs for so many blocks.
func tablePages(f Format, blocks int64) int64 {
	if f == BCoWSingle {
		blocks = max(blocks, singleEntries)
	}
	return max(1, ceilDiv(blocks, entriesPerPage(f)))
}

// Stats reads the tables of all open sketches: not for every second.
func (e *Engine) Stats() Stats {
	files := e.openFiles()
	e.mu.Lock()
	st := Stats{Files: int64(len(files)), Queue: int64(len(e.queue)), Settling: int64(len(e.waiting))}
	e.mu.Unlock()
	for _, f := range files {
		if !f.Sketch() {
			continue
		}
		st.Sketches++
		l, t, u := f.States()
		st.Lower, st.InTransit, st.Upper = st.Lower+l, st.InTransit+t, st.Upper+u
	}
	st.BytesCopied = e.copied.Load()
	st.BytesNotCopied = max(0, e.createdBytes.Load()-st.BytesCopied)
	st.Commits, st.Errors, st.Damaged = e.commits.Load(), e.errs.Load(), e.damaged.Load()
	st.SketchesCreated, st.SketchesComplete = e.created.Load(), e.complete.Load()
	return st
}

// openFiles returns the files that are open now.
func (e *Engine) openFiles() []*File {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.files))
}

// Close settles every open File, stops the workers and returns the first error. Whatever cannot be put on disk is named
// in the log, block range by block range: it is lost unless a later Sync of the File succeeds. The Files stay open:
// close them after.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closing {
		e.mu.Unlock()
		return nil
	}
	e.closing = true
	close(e.end)
	e.wake.Broadcast()
	e.mu.Unlock()
	e.nudge()
	e.wg.Wait()

	first := e.settleRest()
	if e.discard.Load() {
		return nil
	}
	for _, f := range e.openFiles() {
		if err := f.lastCommit(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// Flush puts what was written to every File on disk, and returns the first error. What fails stays in memory, and is tried
// again when it would have been anyway.
func (e *Engine) Flush() (first error) {
	for _, f := range e.settleWholes(e.openFiles()) {
		if f.nameless.Load() {
			continue
		}
		if err := f.commit(); err != nil && first == nil {
			first = fmt.Errorf("sketch of inode %d: %w", f.ino(), err)
		}
	}
	return first
}

// Discard lets Close leave everything as it is on disk: nobody will read it.
func (e *Engine) Discard() { e.discard.Store(true) }

// ended says whether Close was called: nothing is tried later any more.
func (e *Engine) ended() bool {
	select {
	case <-e.end:
		return true
	default:
		return false
	}
}
