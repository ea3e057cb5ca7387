package uring

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lane is one thread with a ring of its own. Of each queue that it serves it holds one entry of each connection, so a
// lane at work is a lane that the kernel gives nothing else of that connection to: a request that takes long holds up
// none that comes after it. The kernel gives a request to the entry that became free last (fuse_uring_ent_avail), so that
// one lane of a CPU, warm in its caches, does nearly everything as long as nothing takes long.
type lane struct {
	threads *threads

	cpu   int // -1: it runs where it likes
	ring  *ring
	event int // eventfd: there is mail

	ahead   int  // how much of what it served lately was read ahead, see roam
	roaming bool // it may run on other CPUs than its own

	slots []*entry // by user data - 1
	free  []int
	ended bool

	requests atomic.Uint64 // carried so far
	bulky    atomic.Bool   // an entry has more of its buffer in memory than it should keep

	elsewhere sync.WaitGroup // until the thread is not the main one

	mu   sync.Mutex
	mail []func() // to be called on the lane's thread

	wake [8]byte // what the eventfd is read into
	done chan struct{}
}

// User data of what is not an entry.
const (
	mailData = 0              // the eventfd's read
	ignored  = math.MaxUint64 // nobody waits for the outcome
)

// startLane starts the thread and returns when its ring is there.
func startLane(t *threads, cpu int) (*lane, error) {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	l := &lane{threads: t, cpu: cpu, event: event, done: make(chan struct{})}
	l.elsewhere.Add(1)
	started := make(chan error)
	go l.run(started)
	if err := <-started; err != nil {
		unix.Close(event)
		return nil, err
	}
	return l, nil
}

// run is the life of the thread. It stays locked, so the thread ends with it, and with it whatever the kernel has tied
// to the thread.
func (l *lane) run(started chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// The main thread's affinity is what others see as the process's, and it cannot end: another one it has to be.
		go l.run(started)
		l.elsewhere.Wait()
		runtime.UnlockOSThread()
		return
	}
	l.elsewhere.Done()
	yieldToWakers()
	if l.cpu >= 0 {
		pin(l.cpu)
	}
	r, err := newRing(256)
	if err != nil {
		started <- err
		return
	}
	l.ring = r
	l.listen()
	started <- nil
	defer close(l.done)
	defer unix.Close(l.event)
	defer r.close()
	for !l.ended {
		l.enter(1)
		l.drain()
	}
}

// drain takes what has come in. An answer is sent before the next request is looked at.
func (l *lane) drain() {
	for l.ring.pending() {
		c := l.ring.take()
		switch c.userData {
		case mailData:
			l.readMail()
		case ignored:
		default:
			l.arrived(l.slots[c.userData-1], c.res)
		}
		if l.ring.pending() && l.ring.queued() > 0 {
			l.enter(0)
		}
	}
}

// enter has nobody to tell of an error, and none can come but through a fault of this package: a lane that went quiet
// would hang whoever uses its mounts, whereas a server that ends gives them an error.
func (l *lane) enter(wait uint32) {
	if err := l.ring.enter(wait); err != nil {
		panic(err)
	}
}

func (l *lane) next() *sqe {
	e, err := l.ring.next()
	if err != nil {
		panic(err)
	}
	return e
}

// post has f called on the lane's thread.
func (l *lane) post(f func()) {
	l.mu.Lock()
	l.mail = append(l.mail, f)
	l.mu.Unlock()
	one := [8]byte{0: 1}
	for {
		// Nothing but an interruption can fail: the counter does not come near its limit.
		if _, err := unix.Write(l.event, one[:]); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// listen arms the read of the eventfd.
func (l *lane) listen() {
	e := l.next()
	e.opcode = sqeRead
	e.fd = int32(l.event)
	e.addr = uint64(uintptr(unsafe.Pointer(&l.wake)))
	e.len = uint32(len(l.wake))
	e.userData = mailData
}

func (l *lane) readMail() {
	l.listen()
	l.mu.Lock()
	mail := l.mail
	l.mail = nil
	l.mu.Unlock()
	for _, f := range mail {
		f()
	}
}

// register gives an entry to the kernel, to be filled with a request of its queue. A refusal arrives as a completion.
func (l *lane) register(e *entry) {
	if n := len(l.free); n > 0 {
		e.slot, l.free = l.free[n-1], l.free[:n-1]
	} else {
		e.slot = len(l.slots)
		l.slots = append(l.slots, nil)
	}
	l.slots[e.slot] = e
	s := l.next()
	e.command(s, cmdRegister)
	s.addr = uint64(uintptr(unsafe.Pointer(&e.iov)))
	s.len = uint32(len(e.iov))
}

// commit gives the entry's answer to the kernel and waits for the next request in it.
func (l *lane) commit(e *entry) { e.command(l.next(), cmdCommitAndFetch) }

// arrived looks at a completion: a request, or the end of the entry.
func (l *lane) arrived(e *entry, res int32) {
	if res < 0 {
		l.slots[e.slot] = nil
		l.free = append(l.free, e.slot)
		e.conn.gone(e, unix.Errno(-res))
		return
	}
	l.requests.Add(1)
	// Nobody else needs the lane of a connection that is alone, and on the spot it takes two wake-ups less.
	if l.threads.conns.Load() > 1 && e.slow() {
		e.away = true
		go func() {
			e.conn.handler.handle(e)
			l.post(func() { l.answered(e) })
		}()
		return
	}
	e.conn.handler.handle(e)
	l.roam(e.readsAhead)
	l.answered(e)
}

// A lane that answers what the kernel reads ahead may leave its CPU. Nobody waits for such an answer before it is there:
// the reader goes on with what has come before, and needs the CPU to copy it to the program while the lane copies the next
// part. On one CPU they would take turns. All others wait for their answer, and get it sooner where they are.
const (
	roamAfter = 4 // requests more that were read ahead than others
	homeAfter = 8 // requests more of others, from when nothing else but reading ahead was done
)

// roam notes whether a request was one of the kernel's reading ahead.
func (l *lane) roam(ahead bool) {
	switch {
	case l.cpu < 0 || !ahead && l.ahead == 0:
		return
	case ahead:
		l.ahead = min(l.ahead+1, homeAfter)
	default:
		l.ahead--
	}
	switch {
	case !l.roaming && l.ahead >= roamAfter:
		l.roaming = unpin()
	case l.roaming && l.ahead == 0:
		l.roaming = false
		pin(l.cpu)
	}
}

func (l *lane) answered(e *entry) {
	e.away = false
	if e.used && !l.bulky.Load() {
		l.keepsMuch()
	}
	l.commit(e)
}

func (l *lane) keepsMuch() {
	l.bulky.Store(true)
	l.threads.trimLater()
}

// trim gives the memory of large requests back. A buffer that the kernel has filled is one whose completion is there: all
// copying is done on this thread, while it waits.
func (l *lane) trim() {
	l.bulky.Store(false)
	l.drain()
	again := false
	for _, e := range l.slots {
		if e != nil && !e.away {
			again = e.trim() || again // used since: look again next time
		}
	}
	if again {
		l.keepsMuch()
	}
}

// stop ends the thread. No connection may be left.
func (l *lane) stop() {
	l.post(func() { l.ended = true })
	<-l.done
}
