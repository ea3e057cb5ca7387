package uring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Conn is one mount's connection to the kernel, as far as it is carried over io_uring.
type Conn struct {
	pool    *threads
	fd      int // our own descriptor of the connection
	handler *handler
	logf    func(format string, args ...any)
	memory  []byte
	entries []*entry

	alive atomic.Int64  // entries that the kernel has, or may hand out again
	done  chan struct{} // closed when none is

	mu      sync.Mutex
	ready   bool
	perQ    []int // entries of each queue
	refused error // the first refusal of a registration
}

// Options of a connection.
type Options struct {
	// Mount are the options that the connection's fuse.Server was made with.
	Mount *fuse.MountOptions
	// Init is what the kernel said in INIT: fuse.Server.KernelSettings.
	Init *fuse.InitIn
	// Logf receives one line per event that an operator must know of. Nil: nothing is logged.
	Logf func(format string, args ...any)
}

// Serve takes over the requests of the connection that fd is a descriptor of, an open /dev/fuse on which INIT has been
// answered with fuse.CAP_OVER_IO_URING, and hands them to fs. It returns when requests come this way. FORGET, INTERRUPT
// and the answers to notifications keep coming over fd, to whoever reads it: ServeForgets, fuse.Server.Serve. fd stays the
// caller's.
//
// If it fails everything comes over fd.
func (p *Pool) Serve(fd int, fs fuse.RawFileSystem, opt Options) (*Conn, error) {
	c, err := p.prepare(fd, fs, opt)
	if err != nil {
		return nil, errors.Join(err, p.renounce(fd))
	}
	if err := c.register(); err != nil {
		return nil, err // the kernel's refusal: it expects nothing any more
	}
	return c, nil
}

func (p *Pool) prepare(fd int, fs fuse.RawFileSystem, opt Options) (*Conn, error) {
	h, err := newHandler(fs, opt)
	if err != nil {
		return nil, err
	}
	c := &Conn{pool: p.threads, handler: h, logf: opt.Logf, done: make(chan struct{})}
	if c.logf == nil {
		c.logf = func(string, ...any) {}
	}
	if c.fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("duplicating the connection's descriptor: %w", err)
	}
	if err := c.makeEntries(payloadSize(opt.Mount.MaxWrite)); err != nil {
		unix.Close(c.fd)
		return nil, err
	}
	p.threads.retain()
	p.threads.conns.Add(1)
	return c, nil
}

// renounce tells the kernel that io_uring will not be used. It has been promised in INIT, and the kernel holds every
// request back until it is there, or until a registration is refused: so one is sent that must be, for a queue that does
// not exist.
func (p *Pool) renounce(fd int) error {
	l := p.threads.of(0)[0]
	refused := make(chan error)
	l.post(func() {
		s := l.next()
		s.opcode, s.fd, s.off, s.userData = sqeURingCmd, int32(fd), cmdRegister, ignored
		binary.NativeEndian.PutUint16(s.cmd[16:], math.MaxUint16)
		err := l.ring.enter(0)
		refused <- err
	})
	return <-refused
}

// payloadSize is the least that the kernel accepts for the largest write it will send: it counts in whole pages.
func payloadSize(maxWrite int) int {
	page := os.Getpagesize()
	return max(8192, (maxWrite+page-1)/page*page)
}

// makeEntries reserves the connection's memory: for each entry its headers and its payload. Nothing of it is in use
// before a request fills it.
func (c *Conn) makeEntries(payload int) error {
	n := 0
	for q := range c.pool.queues {
		n += len(c.pool.of(q))
	}
	page := os.Getpagesize()
	heads := (n*headerStride + page - 1) / page * page
	memory, err := unix.Mmap(-1, 0, heads+n*payload, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("reserving %d MiB of address space for requests: %w", (heads+n*payload)>>20, err)
	}
	// A huge page for a request of a few bytes would be a waste.
	_ = unix.Madvise(memory, unix.MADV_NOHUGEPAGE)
	c.memory = memory
	c.perQ = make([]int, c.pool.queues)
	for q := range c.pool.queues {
		for _, l := range c.pool.of(q) {
			i := len(c.entries)
			head := memory[i*headerStride:][:headerArea:headerArea]
			body := memory[heads+i*payload:][:payload:payload]
			e := &entry{conn: c, lane: l, queue: uint16(q), head: head, payload: body}
			e.iov[0].Base, e.iov[0].Len = &head[0], uint64(len(head))
			e.iov[1].Base, e.iov[1].Len = &body[0], uint64(len(body))
			c.entries = append(c.entries, e)
		}
		c.perQ[q] = len(c.pool.of(q))
	}
	c.alive.Store(int64(len(c.entries)))
	return nil
}

// register gives all entries to the kernel, the lane that this connection prefers last: it will be used first. Different
// connections prefer different lanes.
func (c *Conn) register() error {
	shared.Lock()
	turn := c.pool.turn
	c.pool.turn++
	shared.Unlock()
	rank := map[*lane]int{}
	for q := range c.pool.queues {
		for i, l := range c.pool.of(q) {
			rank[l] = (i + turn) % c.pool.depth
		}
	}
	for i := range c.pool.depth {
		byLane := map[*lane][]*entry{}
		for _, e := range c.entries {
			if rank[e.lane] == i {
				byLane[e.lane] = append(byLane[e.lane], e)
			}
		}
		var sent sync.WaitGroup
		for l, entries := range byLane {
			sent.Add(1)
			l.post(func() {
				for _, e := range entries {
					l.register(e)
				}
				l.enter(0)
				l.drain()
				sent.Done()
			})
		}
		sent.Wait()
	}
	return c.registered()
}

// registered judges the outcome. Requests come this way once every queue has an entry; then it is not taken back.
func (c *Conn) registered() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for q, n := range c.perQ {
		if n == 0 {
			return fmt.Errorf("%w: the kernel refused the entries of queue %d: %w", ErrNotSupported, q, c.refused)
		}
	}
	if c.refused != nil {
		c.logf("io_uring: some entries were refused, fewer requests are worked on at a time: %v", c.refused)
	}
	c.ready = true
	return nil
}

// gone notes the end of an entry. It is called on the entry's lane.
func (c *Conn) gone(e *entry, errno unix.Errno) {
	c.mu.Lock()
	c.perQ[e.queue]--
	left := c.perQ[e.queue]
	if !c.ready && c.refused == nil {
		c.refused = errno
	}
	if c.ready && !ended(errno) {
		c.logf("io_uring: an entry of queue %d was lost, %d are left: %v", e.queue, left, errno)
	}
	c.mu.Unlock()
	if c.alive.Add(-1) == 0 {
		unix.Close(c.fd)
		_ = unix.Munmap(c.memory)
		close(c.done)
		c.pool.conns.Add(-1)
		go c.pool.release() // it may end this very thread
	}
}

// ended recognises what the kernel says when the connection is no more.
func ended(errno unix.Errno) bool {
	return errors.Is(errno, unix.ENOTCONN) || errors.Is(errno, unix.ECONNABORTED) || errors.Is(errno, unix.ECANCELED)
}

// Wait returns when the connection has ended and the last request was answered.
func (c *Conn) Wait() { <-c.done }

// Stats is what a connection tells about itself.
type Stats struct {
	// Queues is the number of possible CPUs; Depth is how many requests of one are worked on at a time.
	Queues int `json:"queues"`
	Depth  int `json:"depth"`
	// Threads serve the connection, and other mounts of the process if there are many; Pinned of them stay on their CPU.
	Threads int `json:"threads"`
	Pinned  int `json:"pinned"`
	// Buffers is the address space, in bytes, that the connection reserves for requests. Memory is used for what was
	// filled lately: of each entry at most 64 KiB for longer than ten seconds.
	Buffers int `json:"buffer_bytes"`
	// Requests that these threads have carried, all their mounts together.
	Requests uint64 `json:"requests"`
}

// Stats may be called at any time.
func (c *Conn) Stats() Stats {
	s := Stats{Queues: c.pool.queues, Depth: c.pool.depth, Buffers: len(c.memory)}
	c.pool.each(func(l *lane) {
		s.Threads++
		if l.cpu >= 0 {
			s.Pinned++
		}
		s.Requests += l.requests.Load()
	})
	return s
}
