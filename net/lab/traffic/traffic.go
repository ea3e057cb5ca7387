// Package traffic sends, echoes and measures TCP and UDP between network namespaces. Sockets block and threads are the
// kernel's own, one for each end, so that what is measured is the network and not Go's poller.
package traffic

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"lamina/net/ns"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Kind is what a measurement does.
type Kind string

// Kinds, by netperf's names.
const (
	TCPRR     Kind = "TCP_RR"     // a byte there, a byte back, over one connection
	UDPRR     Kind = "UDP_RR"     // the same with datagrams
	TCPCRR    Kind = "TCP_CRR"    // the same with a connection for each
	TCPStream Kind = "TCP_STREAM" // as many bytes as fit, one way
	UDPRate   Kind = "UDP_RATE"   // as many small datagrams as arrive, one way
)

// Run is a measurement between two namespaces.
type Run struct {
	Kind     Kind
	Client   netns.NsHandle
	Server   netns.NsHandle
	At       netip.AddrPort // where the server listens
	Flows    int            // at once; 0: 1
	Duration time.Duration
	Size     int    // bytes of a request, a datagram or a write; 0: 1 (65536 of a TCPStream)
	Request  []byte // TCPRR: what to ask the server that is at At already, in place of Size bytes of one that echoes
	Answer   int    // bytes of its answer
	Greet    bool   // UDPRate: a datagram there and one back come first, as with iperf3: conntrack calls the flow established
	Pin      bool   // client threads on CPU 0, server threads on the last CPU
}

// Result is what a Run measured.
type Result struct {
	Count   uint64        // transactions, datagrams that arrived, or bytes that arrived
	Elapsed time.Duration //
	Median  time.Duration // of a transaction; 0 where there are none
	Quick   time.Duration // the same, 5th percentile: what others on the machine disturb least
	CPU     time.Duration // of the whole machine, busy
}

// Rate is Count a second.
func (r Result) Rate() float64 { return float64(r.Count) / r.Elapsed.Seconds() }

// Do measures.
func (r Run) Do(ctx context.Context) (Result, error) {
	if r.Flows == 0 {
		r.Flows = 1
	}
	if r.Size == 0 {
		r.Size = 1
		if r.Kind == TCPStream {
			r.Size = 65536
		}
	}
	m := &measurement{Run: r, begin: make(chan struct{}), done: make(chan struct{})}
	return m.do(ctx)
}

type measurement struct {
	Run
	connected sync.WaitGroup
	begin     chan struct{} // closed when all clients are connected or have failed to: a lost SYN alone takes a second
	end       time.Time     // to be read after begin
	done      chan struct{}

	mu      sync.Mutex
	latency []time.Duration
	count   uint64
	err     error
}

// slice is how long a blocking call may wait before it looks whether the measurement is over.
var slice = unix.Timeval{Usec: 100_000}

func (m *measurement) do(ctx context.Context) (Result, error) {
	var servers, clients sync.WaitGroup
	if m.Request == nil {
		listener, err := m.listen()
		if err != nil {
			return Result{}, err
		}
		defer unix.Close(listener)
		servers.Go(func() { m.thread(lastCPU(), func() error { return m.serve(listener, &servers) }) })
	}
	m.connected.Add(m.Flows)
	for range m.Flows {
		clients.Go(func() { m.thread(0, func() error { return m.client(ctx) }) })
	}
	m.connected.Wait()
	before, start := busy(), time.Now()
	m.end = start.Add(m.Duration)
	close(m.begin)
	clients.Wait()
	elapsed := time.Since(start)
	cpu := busy() - before
	close(m.done)
	servers.Wait()
	slices.Sort(m.latency)
	res := Result{Count: m.count, Elapsed: elapsed, CPU: cpu}
	if n := len(m.latency); n > 0 {
		res.Median, res.Quick = m.latency[n/2], m.latency[n/20]
	}
	return res, errors.Join(m.err, ctx.Err())
}

// thread runs f on a thread of its own.
func (m *measurement) thread(cpu int, f func() error) {
	runtime.LockOSThread() // and never unlocked: a pinned thread ends with its goroutine
	if m.Pin {
		var set unix.CPUSet
		set.Set(cpu)
		unix.SchedSetaffinity(0, &set)
	} else {
		defer runtime.UnlockOSThread()
	}
	if err := f(); err != nil {
		m.mu.Lock()
		m.err = errors.Join(m.err, err)
		m.mu.Unlock()
	}
}

func lastCPU() int { return runtime.NumCPU() - 1 }

func (m *measurement) over() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

func (m *measurement) tcp() bool { return m.Kind == TCPRR || m.Kind == TCPCRR || m.Kind == TCPStream }

func (m *measurement) socket(h netns.NsHandle) (fd int, err error) {
	kind := unix.SOCK_DGRAM
	if m.tcp() {
		kind = unix.SOCK_STREAM
	}
	err = ns.Do(h, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &slice)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &slice)
	if m.tcp() {
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

func (m *measurement) listen() (int, error) {
	fd, err := m.socket(m.Server)
	if err != nil {
		return -1, err
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err := unix.Bind(fd, sockaddr(m.At)); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("bind %s: %w", m.At, err)
	}
	if m.tcp() {
		if err := unix.Listen(fd, 1024); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

// waited says whether a call only ran out of its slice.
func waited(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)
}

func (m *measurement) serve(fd int, more *sync.WaitGroup) error {
	if !m.tcp() {
		return m.serveUDP(fd)
	}
	for !m.over() {
		c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if waited(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		unix.SetsockoptTimeval(c, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &slice)
		unix.SetsockoptInt(c, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		if m.Kind == TCPCRR {
			if err := m.serveTCP(c); err != nil {
				return err
			}
			continue
		}
		more.Go(func() { m.thread(lastCPU(), func() error { return m.serveTCP(c) }) })
	}
	return nil
}

func (m *measurement) serveTCP(c int) error {
	defer unix.Close(c)
	buf := make([]byte, max(m.Size, 65536))
	for !m.over() {
		n, err := unix.Read(c, buf)
		if waited(err) {
			continue
		}
		if n == 0 || errors.Is(err, unix.ECONNRESET) && m.Kind == TCPCRR {
			return nil
		}
		if err != nil {
			return err
		}
		if m.Kind == TCPStream {
			m.add(uint64(n), nil)
			continue
		}
		if _, err := unix.Write(c, buf[:n]); err != nil {
			return err
		}
	}
	return nil
}

func (m *measurement) serveUDP(fd int) error {
	buf := make([]byte, 65536)
	var n uint64
	for !m.over() {
		got, from, err := unix.Recvfrom(fd, buf, 0)
		if waited(err) {
			continue
		}
		if err != nil {
			return err
		}
		if m.Kind == UDPRate && got != m.Size { // a greeting
			unix.Sendto(fd, buf[:got], 0, from)
			continue
		}
		n++
		if m.Kind == UDPRR {
			if err := unix.Sendto(fd, buf[:got], 0, from); err != nil && !waited(err) {
				return err
			}
		}
	}
	if m.Kind == UDPRate {
		m.add(n, nil)
	}
	return nil
}

func (m *measurement) add(n uint64, latency []time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count += n
	m.latency = append(m.latency, latency...)
}

// connect opens a client's socket.
func (m *measurement) connect() (int, error) {
	fd, err := m.socket(m.Client)
	if err != nil {
		return -1, err
	}
	for tries := 0; ; tries++ {
		err = unix.Connect(fd, sockaddr(m.At))
		if err == nil || tries == 50 || !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EALREADY) && !waited(err) {
			break
		}
	}
	if err != nil && !errors.Is(err, unix.EISCONN) {
		unix.Close(fd)
		return -1, fmt.Errorf("connect %s: %w", m.At, err)
	}
	return fd, nil
}

func (m *measurement) client(ctx context.Context) error {
	fd, err := m.connect()
	if err == nil && m.Kind == TCPCRR { // it has brought the way up; the server serves one at a time
		unix.Close(fd)
	}
	m.connected.Done()
	if err != nil {
		return err
	}
	<-m.begin
	if m.Kind == TCPCRR {
		return m.connections(ctx)
	}
	defer unix.Close(fd)
	if m.Greet {
		greeting := make([]byte, m.Size+1)
		if err := m.transaction(fd, greeting, greeting); err != nil {
			return fmt.Errorf("greeting: %w", err)
		}
	}
	if m.Kind == TCPStream || m.Kind == UDPRate {
		return m.push(fd, ctx)
	}
	request, answer := m.Request, make([]byte, m.Answer)
	if request == nil {
		request = make([]byte, m.Size)
		answer = request
	}
	latency := make([]time.Duration, 0, 1<<16)
	var n uint64
	defer func() { m.add(n, latency) }()
	for now := time.Now(); now.Before(m.end) && ctx.Err() == nil; {
		if err := m.transaction(fd, request, answer); err != nil {
			return err
		}
		then := time.Now()
		latency = append(latency, then.Sub(now))
		now = then
		n++
	}
	return nil
}

// transaction sends a request and waits for all of its answer. A lost datagram is sent again.
func (m *measurement) transaction(fd int, request, answer []byte) error {
	if _, err := unix.Write(fd, request); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	for got := 0; got < len(answer); {
		n, err := unix.Read(fd, answer[got:])
		switch {
		case waited(err):
			if time.Now().After(m.end.Add(5 * time.Second)) {
				return errors.New("no answer")
			}
			if !m.tcp() {
				unix.Write(fd, request)
			}
		case err != nil:
			return fmt.Errorf("answer: %w", err)
		case n == 0:
			return errors.New("the connection was closed")
		default:
			got += n
		}
	}
	return nil
}

func (m *measurement) connections(ctx context.Context) error {
	var n uint64
	var latency []time.Duration
	defer func() { m.add(n, latency) }()
	buf := make([]byte, m.Size)
	for now := time.Now(); now.Before(m.end) && ctx.Err() == nil; {
		fd, err := m.connect()
		if err != nil {
			return err
		}
		err = m.transaction(fd, buf, buf)
		// A reset leaves no TIME_WAIT, of which there would be more than ports.
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(fd)
		if err != nil {
			return err
		}
		then := time.Now()
		latency = append(latency, then.Sub(now))
		now = then
		n++
	}
	return nil
}

func (m *measurement) push(fd int, ctx context.Context) error {
	buf := make([]byte, m.Size)
	for i := 0; ; i++ {
		if i%64 == 0 && (time.Now().After(m.end) || ctx.Err() != nil) {
			return nil
		}
		if _, err := unix.Write(fd, buf); err != nil && !waited(err) && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("sending: %w", err)
		}
	}
}
