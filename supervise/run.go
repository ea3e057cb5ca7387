package supervise

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options of a supervisor.
type Options struct {
	// Command makes the command of the first server (generation 0) and of its successors. Descriptor 3 of the process will
	// be the socket for Dial; ExtraFiles of the command follow it.
	Command func(generation int) (*exec.Cmd, error)
	// MaxDeaths servers in a row may die before one of them is ready, and three times as many at once after. 0: 20.
	MaxDeaths int
	// Started is called when a server runs. Nil: nobody is told.
	Started func(generation, pid int)
	// Logf receives one line per event that an operator must know of.
	Logf func(format string, args ...any)
}

const (
	defaultMaxDeaths = 20
	// A successor starts at once, unless deaths follow each other quickly: then after a delay that doubles with each.
	freeDeaths  = 3
	firstDelay  = 10 * time.Millisecond
	maxDelay    = time.Second
	quickDeath  = 100 * time.Millisecond // from ready to death
	signalQueue = 16
)

// ErrNeverReady: the first server died before it served, with something kept. No successor was started.
var ErrNeverReady = errors.New("the server died before it was ready")

type supervisor struct {
	o Options

	mu     sync.Mutex
	kept   map[string][]*os.File
	ready  time.Time // when the server that runs said so; zero: not yet
	server *os.Process
	passed []os.Signal // to the servers so far
}

// Run starts servers until one ends that has dropped everything, and returns its exit status. SIGTERM and SIGINT are passed
// on to the server. An error means that nobody serves any more what was kept: it has been closed.
func Run(o Options) (status int, err error) {
	if o.MaxDeaths == 0 {
		o.MaxDeaths = defaultMaxDeaths
	}
	s := &supervisor{o: o, kept: map[string][]*os.File{}}
	defer s.closeKept()
	signals := make(chan os.Signal, signalQueue)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	defer signal.Stop(signals)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case sig := <-signals:
				s.pass(sig)
			case <-stop:
				return
			}
		}
	}()
	quick, unready := 0, 0 // deaths in a row
	for generation := 0; ; generation++ {
		state, lived, err := s.serve(generation)
		if err != nil && generation == 0 {
			return 0, err
		}
		if err != nil { // no memory, no process: perhaps in a moment
			o.Logf("%v", err)
		}
		names := s.names()
		if len(names) == 0 {
			return state.ExitCode(), nil
		}
		if generation == 0 && lived == 0 {
			return 0, fmt.Errorf("%w (%v)", ErrNeverReady, state)
		}
		if unready++; lived > 0 {
			unready = 0
		}
		if quick++; lived > quickDeath {
			quick = 0
		}
		if unready == o.MaxDeaths {
			return 0, fmt.Errorf("%d servers in a row died before they could go on (the last: %v): giving up %v", unready, state, names)
		}
		if quick == 3*o.MaxDeaths {
			return 0, fmt.Errorf("%d servers in a row died as soon as they went on (the last: %v): giving up %v", quick, state, names)
		}
		delay := time.Duration(0)
		if quick > freeDeaths {
			delay = min(maxDelay, firstDelay<<min(quick-freeDeaths, 16))
		}
		o.Logf("the server died (%v): a successor takes over %v in %v", state, names, delay)
		time.Sleep(delay)
	}
}

// serve runs one server, and says how long it lived after it was ready; 0 if it never was.
func (s *supervisor) serve(generation int) (state *os.ProcessState, lived time.Duration, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "server"), os.NewFile(uintptr(pair[1]), "supervisor")
	cmd, err := s.o.Command(generation)
	if err == nil {
		cmd.ExtraFiles = append([]*os.File{theirs}, cmd.ExtraFiles...)
		err = cmd.Start()
		closeAll(cmd.ExtraFiles[1:])
	}
	theirs.Close()
	if err != nil {
		ours.Close()
		return nil, 0, fmt.Errorf("starting the server: %w", err)
	}
	s.mu.Lock()
	s.server, s.ready = cmd.Process, time.Time{}
	s.mu.Unlock()
	if s.o.Started != nil {
		s.o.Started(generation, cmd.Process.Pid)
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		s.answer(int(pair[0]))
	}()
	_ = cmd.Wait()
	// The server is dead, but one of its children may have the other end.
	_ = unix.Shutdown(pair[0], unix.SHUT_RD)
	<-answered
	ours.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.server = nil
	if !s.ready.IsZero() {
		lived = max(time.Since(s.ready), 1)
	}
	return cmd.ProcessState, lived, nil
}

// answer answers one server until it is gone. What it said before it died still counts.
func (s *supervisor) answer(fd int) {
	for {
		op, name, files, err := receive(fd)
		if err == errTruncated {
			s.o.Logf("%v", err)
			_ = send(fd, failed, "", nil) // it may be gone
			continue
		}
		if err != nil {
			if err != ErrNoSupervisor {
				s.o.Logf("%v", err)
				_ = unix.Shutdown(fd, unix.SHUT_RDWR) // or it waits for an answer for ever
			}
			return
		}
		switch op {
		case opKeep:
			s.put(name, files)
		case opDrop:
			s.put(name, nil)
		case opReady:
			s.becomeReady()
		case opList:
			if err := s.tell(fd); err != nil && err != ErrNoSupervisor {
				s.o.Logf("telling the successor what is kept: %v", err)
				return
			}
			continue
		default:
			s.o.Logf("a message that no server of this version sends: %q", op)
			closeAll(files)
			_ = unix.Shutdown(fd, unix.SHUT_RDWR)
			return
		}
		if send(fd, ok, "", nil) != nil {
			continue // it is gone, and there may be more that it said
		}
	}
}

func (s *supervisor) tell(fd int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, files := range s.kept {
		if err := send(fd, kept, name, files); err != nil {
			return err
		}
	}
	return send(fd, end, "", nil)
}

func (s *supervisor) put(name string, files []*os.File) {
	s.mu.Lock()
	old := s.kept[name]
	if files == nil {
		delete(s.kept, name)
	} else {
		s.kept[name] = files
	}
	s.mu.Unlock()
	closeAll(old)
}

func (s *supervisor) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.kept))
}

func (s *supervisor) closeKept() {
	for _, name := range s.names() {
		s.put(name, nil)
	}
}

// pass gives a signal to the server, unless that is not ready: it would only die of it. Every successor gets it too: the
// server may have died before it could act on it, and what one has begun the next has to go on with.
func (s *supervisor) pass(sig os.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.passed) < signalQueue {
		s.passed = append(s.passed, sig)
	}
	if s.server != nil && !s.ready.IsZero() {
		_ = s.server.Signal(sig) // it may have died
	}
}

func (s *supervisor) becomeReady() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = time.Now()
	for _, sig := range s.passed {
		_ = s.server.Signal(sig)
	}
}
