package uring

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Pool is the threads that serve FUSE queues. All pools that are open at a time are the same: the mounts of a process
// share its threads.
//
// Each CPU that the process may use has Depth lanes pinned to it. The queues of all other possible CPUs, which are
// offline or belong to others' cpusets, are served by Depth lanes that run where they may.
//
// A file system must not use another mount of the same process while it answers: the request could come to the lane that
// waits for it.
type Pool struct {
	threads *threads
	once    sync.Once
}

type threads struct {
	queues    int // one for each possible CPU
	depth     int
	pinned    map[int][]*lane
	elsewhere []*lane
	turn      int // which lane the next connection prefers
	trimming  atomic.Bool
}

var shared struct {
	sync.Mutex
	*threads
	users int
}

// Open starts the threads, or finds them running. It is called before a filesystem is mounted: a kernel that has been
// promised FUSE over io_uring in INIT waits until it gets it. An error that wraps ErrNotSupported says that it cannot be
// had here, and why.
func Open() (*Pool, error) {
	shared.Lock()
	defer shared.Unlock()
	if shared.users == 0 {
		t, err := startThreads()
		if err != nil {
			return nil, err
		}
		shared.threads = t
	}
	shared.users++
	return &Pool{threads: shared.threads}, nil
}

// Close ends the threads when nobody else has them open and the last connection has ended.
func (p *Pool) Close() { p.once.Do(release) }

func (p *Pool) retain() {
	shared.Lock()
	defer shared.Unlock()
	shared.users++
}

func release() {
	shared.Lock()
	defer shared.Unlock()
	if shared.users--; shared.users == 0 {
		shared.threads.stop()
		shared.threads = nil
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
	if shared.threads != t {
		return // ended meanwhile
	}
	t.each(func(l *lane) {
		if l.bulky.Load() {
			l.post(l.trim)
		}
	})
}
