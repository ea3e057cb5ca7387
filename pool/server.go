package pool

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"lamina/mountopt"
	"lamina/supervise"
	"lamina/uring"

	"golang.org/x/sys/unix"
)

// ServerConfig of a pool server.
type ServerConfig struct {
	// Socket is where it is asked. A stale socket there is taken over, and one of a server that is about to end is waited for;
	// one that a living server listens on is refused.
	Socket string
	// Logf, Log, Version: see Config.
	Logf    func(format string, args ...any)
	Log     string
	Version string
	// Store makes the socket and the mounts outlive this process. Nil: they end with it. Kept is what a process before this
	// one has kept there.
	Store *supervise.Store
	Kept  map[string][]*os.File
}

// keptServer is the name under which a server keeps its socket and the lock on it. Mounts are kept under names of their own.
const keptServer = "server"

// Server serves the mounts of one pool in this process.
type Server struct {
	c    ServerConfig
	l    *net.UnixListener // nil: the server before had given the socket up
	lock *os.File
	free sync.Once     // the socket is given up
	quit chan struct{} // closed when the server is to end

	mu     sync.Mutex
	mounts map[string]*slot // by mount point
	live   int              // mounts that are served, those that were detached included
	ending bool             // asked to end with the last mount
	closed bool             // for good: no mount is made any more
	ended  bool

	answering sync.RWMutex // held for reading by who answers
}

// slot is one mount point's. Its mutex orders what is asked of it; the others' go on meanwhile.
type slot struct {
	mu      sync.Mutex
	m       *Mount   // nil: not mounted
	options []string // as asked for
}

// Listen opens the socket. The process is then prepared for mounts (Tune).
func Listen(c ServerConfig) (*Server, error) {
	l, lock, err := c.listen()
	if err != nil {
		return nil, err
	}
	Tune()
	uring.Keep(spareThreads)
	if os.Getenv("GOGC") == "" {
		// A mount allocates two large buffers, and little is alive: a collection for every mount would take a sixth of its time.
		debug.SetGCPercent(400)
	}
	s := &Server{c: c, l: l, lock: lock, quit: make(chan struct{}), mounts: map[string]*slot{}}
	s.closed, s.ending = l == nil, l == nil
	s.resume()
	s.mu.Lock()
	s.endIfIdle()
	s.mu.Unlock()
	return s, nil
}

// listen opens the socket and locks it, or takes over the one of the process before. That may have given it up, and have left
// mounts that somebody still uses: then there is none.
func (c *ServerConfig) listen() (*net.UnixListener, *os.File, error) {
	if files := c.Kept[keptServer]; len(files) == 2 {
		l, err := net.FileListener(files[0])
		files[0].Close()
		if err != nil {
			return nil, nil, fmt.Errorf("socket %s: %w", c.Socket, err)
		}
		return l.(*net.UnixListener), files[1], nil
	}
	if len(c.Kept) > 0 {
		return nil, nil, nil
	}
	lock, err := lockSocket(c.Socket)
	if err != nil {
		return nil, nil, fmt.Errorf("socket %s: %w", c.Socket, err)
	}
	l, err := listenFresh(c.Socket)
	if err == nil && c.Store != nil {
		err = c.keep(l, lock)
	}
	if err != nil {
		lock.Close()
		return nil, nil, err
	}
	return l, lock, nil
}

func (c *ServerConfig) keep(l *net.UnixListener, lock *os.File) error {
	f, err := l.File()
	if err != nil {
		return fmt.Errorf("socket %s: %w", c.Socket, err)
	}
	defer f.Close()
	return c.Store.Keep(keptServer, f, lock)
}

// resume takes over the mounts of the process before. One that cannot be is given up, so that the others live.
func (s *Server) resume() {
	var lost []string
	for name, files := range s.c.Kept {
		if name == keptServer {
			continue
		}
		note, err := ReadNote(files)
		var m *Mount
		if err == nil {
			m, err = Start(Config{Options: note.Options, Mountpoint: note.Mountpoint, Logf: s.c.Logf, Log: s.c.Log, Version: s.c.Version, Shared: true,
				Container: note.Container, Requested: note.Requested, Survival: &Survival{Store: s.c.Store, Kept: files, Name: name}})
		}
		if err != nil {
			s.c.Logf("%s: cannot be taken over, and is given up: %v", name, err)
			_ = s.c.Store.Drop(name)
			for _, f := range files { // those that Start did not get to; with the last one the connection ends
				f.Close()
			}
			lost = append(lost, note.Mountpoint)
			continue
		}
		s.live++
		sl := &slot{m: m, options: note.Requested}
		if s.mounts[m.Mountpoint] == nil || sl.living(m.Mountpoint) { // another one may have been detached from there
			s.mounts[m.Mountpoint] = sl
		}
		go s.mourn(m.Mountpoint, sl, m)
	}
	for _, mnt := range lost { // only now: each of the others would keep us waiting
		if mnt != "" {
			_ = takeDeadAway(mnt)
		}
	}
}

// spareThreads is for how many mounts threads are kept ready: a container that starts does not wait for them.
const spareThreads = 2

const (
	// endPatience bounds how long a server waits for one before it that is ending: it listens no more, and has the lock.
	endPatience = time.Minute
	// termPatience is how long a server that listens is waited for: it may just have been told to end.
	termPatience = time.Second
)

// lockSocket makes sure that one server has the socket.
func lockSocket(socket string) (*os.File, error) {
	for began := time.Now(); ; time.Sleep(claimPoll) {
		lock, err := Lock(socket+".lock", "another server listens on it")
		if _, taken := err.(takenError); !taken {
			return lock, err
		}
		if waited := time.Since(began); waited > endPatience || waited > termPatience && listens(socket) {
			return nil, err
		}
	}
}

// listens says whether a server accepts connections on a socket.
func listens(socket string) bool {
	c := &Client{Socket: socket}
	conn, _, err := c.get()
	if err == nil {
		conn.Close()
	}
	return !errors.Is(err, ErrNoServer)
}

// Serve answers until the server is told to end and has no mount any more.
func (s *Server) Serve() error {
	var accepting sync.WaitGroup
	if s.l != nil {
		accepting.Go(s.accept)
	}
	<-s.quit
	s.answering.Lock() // for good
	s.freeSocket()
	accepting.Wait()
	return nil
}

// accept lets in who asks, until the socket is given up.
func (s *Server) accept() {
	for {
		conn, err := s.l.AcceptUnix()
		switch {
		case err == nil:
			go s.converse(conn)
			continue
		case errors.Is(err, net.ErrClosed):
			return
		}
		s.c.Logf("socket %s: %v", s.c.Socket, err)
		time.Sleep(100 * time.Millisecond) // no descriptor is free: connections wait
	}
}

// freeSocket gives the socket up, for another server to have. Who still has a connection gets one answer more.
func (s *Server) freeSocket() {
	s.free.Do(func() {
		if s.l == nil {
			return
		}
		s.l.Close()
		if s.c.Store != nil {
			_ = s.c.Store.Drop(keptServer) // first: from here on no successor listens
		}
		_ = os.Remove(s.c.Socket)                      // somebody may have tidied up the directory
		_ = unix.Flock(int(s.lock.Fd()), unix.LOCK_UN) // the supervisor may have it open for another moment
		s.lock.Close()
	})
}

// converse answers one connection's requests.
func (s *Server) converse(conn *net.UnixConn) {
	defer conn.Close()
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)
	enc := json.NewEncoder(conn)
	for lines.Scan() {
		if s.answer(lines.Bytes(), enc) != nil {
			return // who asked has gone
		}
		if s.refuses() {
			return // let him look for another server
		}
	}
	if err := lines.Err(); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, unix.ECONNRESET) {
		s.c.Logf("socket %s: %v", s.c.Socket, err)
	}
}

// answer carries out the request in a line. The server does not end before the answer is given.
func (s *Server) answer(line []byte, enc *json.Encoder) error {
	s.answering.RLock()
	defer s.answering.RUnlock()
	reply := Reply{PID: os.Getpid(), Version: s.c.Version}
	r, err := ParseRequest(line)
	if err == nil {
		err = s.Do(r, &reply)
	}
	reply.setError(err)
	return enc.Encode(&reply)
}

// Do carries out one request.
func (s *Server) Do(r Request, reply *Reply) error {
	switch r.Op {
	case OpMount:
		return s.mount(r)
	case OpSync:
		return s.sync(r)
	case OpUnmount:
		return s.unmount(r)
	case OpSeal:
		return s.seal(r)
	case OpList:
		reply.Mounts = s.list()
	case OpStatus:
		reply.Status = s.status()
	case OpQuit:
		s.mu.Lock()
		s.ending = true
		s.endIfIdle()
		s.mu.Unlock()
	}
	return nil
}

// refuses says whether the server was told to end for good.
func (s *Server) refuses() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// hold returns the slot of a mount point, locked.
func (s *Server) hold(mnt string) (*slot, error) {
	for {
		s.mu.Lock()
		if s.ended {
			s.mu.Unlock()
			return nil, endingError(mnt)
		}
		sl := s.mounts[mnt]
		if sl == nil {
			sl = &slot{}
			s.mounts[mnt] = sl
		}
		s.mu.Unlock()
		sl.mu.Lock()
		s.mu.Lock()
		current := s.mounts[mnt] == sl
		s.mu.Unlock()
		if current {
			return sl, nil
		}
		sl.mu.Unlock() // it was given up while we waited
	}
}

func endingError(mnt string) error {
	return fmt.Errorf("%s: the server is about to end: %w", mnt, unix.ESHUTDOWN)
}

// release unlocks a slot, and gives up one without a mount.
func (s *Server) release(mnt string, sl *slot) {
	s.mu.Lock()
	if sl.m == nil && s.mounts[mnt] == sl {
		delete(s.mounts, mnt)
	}
	s.endIfIdle()
	s.mu.Unlock()
	sl.mu.Unlock()
}

// endIfIdle ends a server that was told to and has nothing left. The caller holds mu.
func (s *Server) endIfIdle() {
	if s.ending && len(s.mounts) == 0 && s.live == 0 && !s.ended {
		s.ended = true
		close(s.quit)
	}
}

// living says whether the mount is in the tree. The kernel answers from what it knows; the mount is not asked.
func (sl *slot) living(mnt string) bool {
	if sl.m == nil {
		return false
	}
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, mnt, unix.AT_STATX_DONT_SYNC|unix.AT_SYMLINK_NOFOLLOW, 0, &st) != nil {
		return false
	}
	major, minor := sl.m.server.Device()
	return st.Dev_major == major && st.Dev_minor == minor
}

func (s *Server) mount(r Request) error {
	sl, err := s.hold(r.Mountpoint)
	if err != nil {
		return err
	}
	defer s.release(r.Mountpoint, sl)
	s.mu.Lock()
	refused := s.closed // from then on End finds the slot
	s.ending = s.ending && refused
	s.mu.Unlock()
	if refused {
		return endingError(r.Mountpoint)
	}
	if sl.living(r.Mountpoint) {
		if slices.Equal(sl.options, r.Options) {
			return nil
		}
		return fmt.Errorf("mount point %s: is mounted with other options: unmount it first: %w", r.Mountpoint, unix.EBUSY)
	}
	m, err := s.make(r)
	if err != nil {
		return err
	}
	sl.m, sl.options = m, r.Options
	s.mu.Lock()
	s.live++
	s.mu.Unlock()
	go s.mourn(r.Mountpoint, sl, m)
	return nil
}

// options reads those of a request, and looks at the directories.
func (r *Request) options(survive bool) (*mountopt.Options, error) {
	asked := r.Options
	if survive {
		asked = append(slices.Clone(asked), "survive=on")
	}
	o, err := mountopt.Parse(asked, mountopt.Env{Dir: "/"})
	if err == nil {
		err = o.Complete()
	}
	if err == nil {
		err = CheckDirs(o)
	}
	return o, err
}

// make mounts what a request asks for. Whoever restores a mount after the death of a server asks the same.
func (s *Server) make(r Request) (*Mount, error) {
	o, err := r.options(s.c.Store != nil)
	if err != nil {
		return nil, err
	}
	if err := takeDeadAway(r.Mountpoint); err != nil {
		return nil, err
	}
	c := Config{Options: o, Mountpoint: r.Mountpoint, Logf: s.c.Logf, Log: s.c.Log, Version: s.c.Version, Shared: true,
		Container: r.Container, Requested: r.Options}
	if s.c.Store != nil {
		c.Survival = &Survival{Store: s.c.Store}
	}
	return Start(c)
}

// takeDeadAway unmounts what a server that was killed has left on a mount point.
func takeDeadAway(mnt string) error {
	for {
		var st unix.Statfs_t // the kernel always asks the server
		err := unix.Statfs(mnt, &st)
		if !ServerGone(err) {
			return nil // whatever is wrong else will be found out
		}
		if err := UnmountPath(mnt, true); err != nil {
			return fmt.Errorf("mount point %s: its server is gone, and it cannot be taken away: %w", mnt, err)
		}
	}
}

func (s *Server) seal(r Request) error {
	o, err := r.options(false)
	if err != nil {
		return err
	}
	return Seal(o, s.c.Logf)
}

// mourn forgets a mount when it is gone, whoever took it away.
func (s *Server) mourn(mnt string, sl *slot, m *Mount) {
	_ = m.Wait() // the log has it, and who unmounts gets it
	sl.mu.Lock()
	defer sl.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live--
	if sl.m == m {
		sl.m = nil
		if s.mounts[mnt] == sl {
			delete(s.mounts, mnt)
		}
	}
	s.endIfIdle()
}

// mounted returns the slot, locked, of a mount point that has a mount.
func (s *Server) mounted(mnt string) (*slot, error) {
	sl, err := s.hold(mnt)
	if err != nil {
		return nil, err
	}
	if sl.m == nil {
		s.release(mnt, sl)
		return nil, fmt.Errorf("mount point %s: nothing is mounted there: %w", mnt, unix.ENOENT)
	}
	return sl, nil
}

// notGone keeps ENOENT for "nothing is mounted there", and ESHUTDOWN for "the server is about to end".
func notGone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESHUTDOWN) {
		return fmt.Errorf("%v: %w", err, unix.EIO)
	}
	return err
}

func (s *Server) sync(r Request) error {
	sl, err := s.mounted(r.Mountpoint)
	if err != nil {
		return err
	}
	defer s.release(r.Mountpoint, sl)
	return notGone(sl.m.Sync())
}

func (s *Server) unmount(r Request) error {
	sl, err := s.mounted(r.Mountpoint)
	if err != nil {
		return err
	}
	defer s.release(r.Mountpoint, sl)
	m := sl.m
	if !r.Lazy {
		if others := m.elsewhere(); len(others) > 0 {
			return fmt.Errorf("mount point %s: is mounted on %s too: %w", r.Mountpoint, others[0], unix.EBUSY)
		}
	}
	if r.Discard {
		m.engine.Discard()
	}
	err = UnmountPath(r.Mountpoint, r.Lazy)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("mount point %s: in use by %s: %w", r.Mountpoint, Holders(r.Mountpoint), err)
	case err != nil && !errors.Is(err, unix.EINVAL): // EINVAL: somebody was faster
		return fmt.Errorf("mount point %s: %w", r.Mountpoint, err)
	}
	if r.Lazy {
		sl.m = nil
		select {
		case <-m.Done():
			return notGone(m.Wait())
		case <-time.After(lazyWait):
			return nil
		}
	}
	select {
	case <-m.gone:
		sl.m = nil
		return notGone(m.Wait())
	case <-time.After(detachedWait):
		return fmt.Errorf("mount point %s: somebody still uses the mount, which was detached: end him, and try again: %w", r.Mountpoint, unix.EBUSY)
	}
}

const (
	// lazyWait is how long a lazy unmount waits all the same: with nobody using the mount, its end is a matter of
	// milliseconds, and whoever asked wants to remove the layers.
	lazyWait = time.Second
	// detachedWait is how long it may take others to let go of a mount that is in no tree any more.
	detachedWait = 5 * time.Second
)

func (s *Server) list() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := []string{}
	for mnt := range s.mounts {
		names = append(names, mnt)
	}
	slices.Sort(names)
	return names
}

func (s *Server) status() []Status {
	all := []Status{}
	for _, mnt := range s.list() {
		sl, err := s.hold(mnt)
		if err != nil {
			return all
		}
		m := sl.m
		s.release(mnt, sl)
		if m != nil {
			all = append(all, m.Status())
		}
	}
	return all
}

// End unmounts everything that nobody uses, detaches the rest, and ends the server when the last user is gone. From here on
// it makes no mounts; with everything out of the tree it gives up its socket, for another server to have.
func (s *Server) End() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	for _, mnt := range s.list() {
		if sl, err := s.mounted(mnt); err == nil {
			sl.m.Ending()
			s.release(mnt, sl)
		}
		err := s.unmount(Request{Mountpoint: mnt})
		if errors.Is(err, unix.EBUSY) {
			s.c.Logf("%v: detaching it; it is served until the last user is gone", err)
			err = s.unmount(Request{Mountpoint: mnt, Lazy: true})
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			s.c.Logf("%v", err)
		}
	}
	s.freeSocket()
	_ = s.Do(Request{Op: OpQuit}, &Reply{})
}
