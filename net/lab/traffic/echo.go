package traffic

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"lamina/net/ns"

	"github.com/vishvananda/netns"
)

// Echo answers TCP and UDP on an address with what it gets.
type Echo struct {
	tcp   net.Listener
	udp   *net.UDPConn
	mu    sync.Mutex
	conns map[net.Conn]bool
	all   sync.WaitGroup
}

// NewEcho starts one in a namespace. Its answers to datagrams begin with name, so that senders know who answers.
func NewEcho(h netns.NsHandle, at netip.AddrPort, name byte) (*Echo, error) {
	e := &Echo{conns: map[net.Conn]bool{}}
	err := ns.Do(h, func() (err error) {
		if e.tcp, err = net.Listen("tcp4", at.String()); err != nil {
			return err
		}
		e.udp, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
		return err
	})
	if err != nil {
		return nil, err
	}
	e.all.Go(e.serveTCP)
	e.all.Go(func() { e.serveUDP(name) })
	return e, nil
}

func (e *Echo) serveTCP() {
	for {
		c, err := e.tcp.Accept()
		if err != nil {
			return
		}
		e.mu.Lock()
		e.conns[c] = true
		e.mu.Unlock()
		e.all.Go(func() {
			io.Copy(c, c)
			c.Close()
			e.mu.Lock()
			delete(e.conns, c)
			e.mu.Unlock()
		})
	}
}

func (e *Echo) serveUDP(name byte) {
	buf := make([]byte, 65536)
	for {
		n, from, err := e.udp.ReadFromUDPAddrPort(buf[1:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		buf[0] = name
		e.udp.WriteToUDPAddrPort(buf[:n+1], from)
	}
}

// Close ends it with all of its connections.
func (e *Echo) Close() {
	e.tcp.Close()
	e.udp.Close()
	e.mu.Lock()
	for c := range e.conns {
		c.Close()
	}
	e.mu.Unlock()
	e.all.Wait()
}

// patience is how long an answer may take.
const patience = 20 * time.Second

// Dial connects from a namespace.
func Dial(h netns.NsHandle, network string, to netip.AddrPort) (c net.Conn, err error) {
	err = ns.Do(h, func() (err error) {
		c, err = (&net.Dialer{Timeout: patience, FallbackDelay: -1}).Dial(network, to.String())
		return err
	})
	return c, err
}

// EchoTCP sends size random bytes over a connection and compares hashes of what went and what came back.
func EchoTCP(c net.Conn, size int, seed uint64) error {
	c.SetDeadline(time.Now().Add(patience))
	var b [32]byte
	binary.LittleEndian.PutUint64(b[:], seed)
	sent := sha256.New()
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, io.TeeReader(io.LimitReader(rand.NewChaCha8(b), int64(size)), sent))
		wrote <- err
	}()
	got := sha256.New()
	n, err := io.Copy(got, io.LimitReader(c, int64(size)))
	if err = errors.Join(err, <-wrote); err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", n, size, err)
	}
	if n != int64(size) || string(got.Sum(nil)) != string(sent.Sum(nil)) {
		return fmt.Errorf("%d bytes came back of %d, and not the same", n, size)
	}
	return nil
}

// EchoUDP sends a datagram and waits for its answer, for at most wait. It returns who answered, or an error if the answer was
// not what was sent; lost is set if there was none.
func EchoUDP(c net.Conn, size int, number uint64, wait time.Duration) (name byte, lost bool, err error) {
	buf := make([]byte, max(size, 8))
	var b [32]byte
	binary.LittleEndian.PutUint64(b[:], number)
	rand.NewChaCha8(b).Read(buf)
	binary.LittleEndian.PutUint64(buf, number)
	if _, err := c.Write(buf); err != nil {
		return 0, true, nil // an ICMP error of an earlier one
	}
	answer := make([]byte, 65536)
	for deadline := time.Now().Add(wait); ; {
		c.SetReadDeadline(deadline)
		n, err := c.Read(answer)
		if err != nil {
			return 0, true, nil
		}
		if n < 9 {
			return 0, false, fmt.Errorf("an answer of %d bytes", n)
		}
		if got := binary.LittleEndian.Uint64(answer[1:]); got < number {
			continue // late
		}
		if sha256.Sum256(answer[1:n]) != sha256.Sum256(buf) {
			return 0, false, fmt.Errorf("datagram %d came back changed: %d bytes of %d", number, n-1, len(buf))
		}
		return answer[0], false, nil
	}
}
