package uring

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Pool is the threads that serve the FUSE queues of a connection.
//
// Each CPU that the process may use has Depth lanes pinned to it. The queues of all other possible CPUs, which are
// offline or belong to others' cpusets, are served by Depth lanes that run where they may.
//
// Every pool has threads of its own, so that what one mount waits for holds up no other, until there are as many as
// maxGroups allows. From then on pools share those of the ones that are open: a request of one mount may then come to a
// lane that is at work for another, and waits for it. So a file system must not use another mount of the same process
// while it answers.
type Pool struct {
	threads *threads
	once    sync.Once
}

// threads is one group of lanes: all that a connection needs.
type threads struct {
	queues    int // one for each possible CPU
	depth     int
	pinned    map[int][]*lane
	elsewhere []*lane
	users     int // open pools, and connections
	conns     atomic.Int32
	turn      int // which lane the next connection prefers
	trimming  atomic.Bool
}

// shared are the groups that run in this process. Its lock also guards their users and turns.
var shared struct {
	sync.Mutex
	groups []*threads // with users
	spares []*threads // without
	keep   int        // how many spares there should be
	making bool       // somebody makes some
}

// maxGroups is how many groups of so many lanes a process has at most: some 256 threads, which cost about 100 KiB of memory
// each, but 8 groups even where there are many CPUs.
func maxGroups(lanes int) int { return max(8, 256/lanes) }

// Open starts threads, or shares those of others. It is called before a filesystem is mounted: a kernel that has been
// promised FUSE over io_uring in INIT waits until it gets it. An error that wraps ErrNotSupported says that it cannot be
// had here, and why.
func Open() (*Pool, error) {
	shared.Lock()
	defer shared.Unlock()
	t := leastUsed(shared.groups)
	if t == nil || len(shared.groups) < maxGroups(t.lanes()) {
		var err error
		if t, err = spareOrNew(); err != nil {
			return nil, err
		}
		shared.groups = append(shared.groups, t)
	}
	t.users++
	return &Pool{threads: t}, nil
}

// spareOrNew is called with shared locked.
func spareOrNew() (*threads, error) {
	n := len(shared.spares)
	if n == 0 {
		return startThreads()
	}
	t := shared.spares[n-1]
	shared.spares = shared.spares[:n-1]
	makeSpares()
	return t, nil
}

// Keep has the process keep the threads of so many pools ready, which makes Open a matter of microseconds. It is for a
// process that opens and closes pools all the time. Keep(0) ends those that nobody uses.
func Keep(spares int) {
	shared.Lock()
	defer shared.Unlock()
	shared.keep = spares
	for len(shared.spares) > spares {
		n := len(shared.spares)
		go shared.spares[n-1].stop()
		shared.spares = shared.spares[:n-1]
	}
	makeSpares()
}

// makeSpares has spares made if there are too few. An error is left to the Open that will find none. It is called with shared
// locked.
func makeSpares() {
	if shared.making || !fewSpares() {
		return
	}
	shared.making = true
	go func() {
		shared.Lock()
		defer shared.Unlock()
		defer func() { shared.making = false }()
		for fewSpares() {
			shared.Unlock()
			t, err := startThreads()
			shared.Lock()
			if err != nil {
				return
			}
			shared.spares = append(shared.spares, t)
		}
	}()
}

// fewSpares says whether another spare would be kept. More groups than there may be are none.
func fewSpares() bool {
	if t := leastUsed(shared.groups); t != nil && len(shared.groups)+len(shared.spares) >= maxGroups(t.lanes()) {
		return false
	}
	return len(shared.spares) < shared.keep
}

func leastUsed(groups []*threads) *threads {
	var least *threads
	for _, t := range groups {
		if least == nil || t.users < least.users {
			least = t
		}
	}
	return least
}

// Close ends the threads when nobody else has them open and the last connection has ended.
func (p *Pool) Close() { p.once.Do(p.threads.release) }

func (t *threads) retain() {
	shared.Lock()
	defer shared.Unlock()
	t.users++
}

func (t *threads) release() {
	shared.Lock()
	t.users--
	last := t.users == 0
	if last {
		shared.groups = slices.DeleteFunc(shared.groups, func(g *threads) bool { return g == t })
		if fewSpares() {
			shared.spares = append(shared.spares, t)
			last = false
		}
	}
	shared.Unlock()
	if last {
		t.stop()
	}
}

// depth is how many lanes a CPU has, and so how many requests of one CPU are worked on at a time. The more CPUs, the fewer
// are needed for each: a request that waits leaves its CPU to others.
func depth(cpus int) int { return min(8, max(2, 128/max(cpus, 1))) }

func startThreads() (*threads, error) {
	queues, err := possibleCPUs()
	if err != nil {
		return nil, err
	}
	usable, err := usableCPUs()
	if err != nil {
		return nil, err
	}
	t := &threads{queues: queues, pinned: map[int][]*lane{}}
	t.depth = depth(usable.Count())
	for q := range queues {
		if usable.IsSet(q) {
			lanes, err := t.start(q)
			if err != nil {
				return nil, err
			}
			t.pinned[q] = lanes
		}
	}
	if len(t.pinned) < queues {
		if t.elsewhere, err = t.start(-1); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// start starts one CPU's lanes. If one fails, all that run are stopped.
func (t *threads) start(cpu int) ([]*lane, error) {
	var lanes []*lane
	for range t.depth {
		l, err := startLane(t, cpu)
		if err != nil {
			t.each(func(l *lane) { l.stop() })
			for _, l := range lanes {
				l.stop()
			}
			return nil, withRemedy(err)
		}
		lanes = append(lanes, l)
	}
	return lanes, nil
}

// withRemedy says what helps against a limit.
func withRemedy(err error) error {
	switch {
	case errors.Is(err, unix.ENOMEM):
		return errors.Join(err, errors.New("io_uring: raise RLIMIT_MEMLOCK or the memory cgroup's limit"))
	case errors.Is(err, unix.EMFILE):
		return errors.Join(err, errors.New("io_uring: raise RLIMIT_NOFILE"))
	}
	return err
}

func (t *threads) stop() {
	t.each(func(l *lane) { l.stop() })
}

func (t *threads) each(f func(*lane)) {
	for _, lanes := range t.pinned {
		for _, l := range lanes {
			f(l)
		}
	}
	for _, l := range t.elsewhere {
		f(l)
	}
}

func (t *threads) lanes() int {
	n := 0
	t.each(func(*lane) { n++ })
	return n
}

// of gives the lanes that serve a queue.
func (t *threads) of(queue int) []*lane {
	if lanes := t.pinned[queue]; lanes != nil {
		return lanes
	}
	return t.elsewhere
}

// trimEvery is how long memory of large requests is kept after its last use, at least.
const trimEvery = 5 * time.Second

// trimLater has memory given back after a while. An idle process is not woken.
func (t *threads) trimLater() {
	if t.trimming.CompareAndSwap(false, true) {
		time.AfterFunc(trimEvery, t.trim)
	}
}

func (t *threads) trim() {
	t.trimming.Store(false)
	shared.Lock()
	defer shared.Unlock()
	if t.users == 0 {
		return // ended meanwhile
	}
	t.each(func(l *lane) {
		if l.bulky.Load() {
			l.post(l.trim)
		}
	})
}
