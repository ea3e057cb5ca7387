package lab

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"
)

// patience bounds every exchange: what should arrive arrives within it, or never.
const patience = 5 * time.Second

// MaxUDP is the largest content of a datagram, in bytes; those over the MTU travel as fragments.
const MaxUDP = 8000

// Echo answers on TCP and UDP, on one port of all addresses of a node. An answer is the hash of what came, the address it
// came from as the node sees it, and what came.
type Echo struct {
	Port uint16
	tcp  net.Listener
	udp  net.PacketConn
	wg   sync.WaitGroup
}

// Echo starts answering; port 0 chooses one. It ends with the test.
func (n *Node) Echo(port uint16) *Echo {
	n.t.Helper()
	e := &Echo{}
	n.must(func() (err error) {
		if e.tcp, err = net.Listen("tcp4", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		e.Port = uint16(e.tcp.Addr().(*net.TCPAddr).Port)
		e.udp, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", e.Port))
		return err
	})
	e.wg.Go(e.serveTCP)
	e.wg.Go(e.serveUDP)
	n.t.Cleanup(e.Close)
	return e
}

// Close ends it.
func (e *Echo) Close() {
	e.tcp.Close()
	e.udp.Close()
	e.wg.Wait()
}

func (e *Echo) serveTCP() {
	var open sync.Map
	defer open.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
	for {
		c, err := e.tcp.Accept()
		if err != nil {
			return
		}
		open.Store(c, true)
		e.wg.Go(func() {
			defer open.Delete(c)
			defer c.Close()
			for {
				b, err := readFrame(c)
				if err != nil {
					return
				}
				if writeFrame(c, answer(b, c.RemoteAddr())) != nil {
					return
				}
			}
		})
	}
}

func (e *Echo) serveUDP() {
	b := make([]byte, 64<<10)
	for {
		n, from, err := e.udp.ReadFrom(b)
		if err != nil {
			return
		}
		_, _ = e.udp.WriteTo(answer(b[:n], from), from)
	}
}

const hashLen = sha256.Size

func answer(b []byte, from net.Addr) []byte {
	sum := sha256.Sum256(b)
	who := from.String()
	return bytes.Join([][]byte{sum[:], []byte{byte(len(who))}, []byte(who), b}, nil)
}

// checkAnswer compares an answer with what was sent, and returns who the other end says it came from.
func checkAnswer(sent, got []byte) (netip.Addr, error) {
	if len(got) < hashLen+1 || len(got) < hashLen+1+int(got[hashLen]) {
		return netip.Addr{}, fmt.Errorf("an answer of %d bytes is too short", len(got))
	}
	sum := sha256.Sum256(sent)
	who, back := got[hashLen+1:hashLen+1+int(got[hashLen])], got[hashLen+1+int(got[hashLen]):]
	if !bytes.Equal(got[:hashLen], sum[:]) || !bytes.Equal(back, sent) {
		return netip.Addr{}, fmt.Errorf("%d bytes were changed on their way", len(sent))
	}
	from, err := netip.ParseAddrPort(string(who))
	return from.Addr(), err
}

func writeFrame(w io.Writer, b []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

func random(most int) []byte {
	b := make([]byte, 1+mrand.IntN(most))
	_, _ = rand.Read(b)
	return b
}

// Conn is a connection to an Echo.
type Conn struct {
	net.Conn
	udp  bool
	From netip.Addr // who the other end said it talks to, last
}

// Dial connects from the node; network is tcp or udp.
func (n *Node) Dial(network string, to netip.AddrPort) (c *Conn, err error) {
	c = &Conn{udp: network == "udp"}
	err = n.Do(func() error {
		c.Conn, err = net.DialTimeout(network+"4", to.String(), patience)
		return err
	})
	return c, err
}

// Exchange sends random content of at most most bytes and checks the answer. Datagrams are sent again when they are lost.
func (c *Conn) Exchange(most int) error {
	sent := random(most)
	if c.udp {
		return c.exchangeUDP(sent)
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if err := writeFrame(c, sent); err != nil {
		return err
	}
	got, err := readFrame(c)
	if err == nil {
		c.From, err = checkAnswer(sent, got)
	}
	return err
}

// Answered says whether a datagram is answered within a moment: for ends that should not.
func (c *Conn) Answered() bool {
	const moment = 300 * time.Millisecond
	_, _ = c.Write([]byte("?")) // a refused one before this was an answer too, and has been read
	_ = c.SetReadDeadline(time.Now().Add(moment))
	_, err := c.Read(make([]byte, 64<<10))
	return err == nil
}

func (c *Conn) exchangeUDP(sent []byte) (err error) {
	b := make([]byte, 64<<10)
	for range 5 {
		if _, err = c.Write(sent); err != nil {
			continue
		}
		if err = c.SetReadDeadline(time.Now().Add(patience / 5)); err != nil {
			return err
		}
		var n int
		if n, err = c.Read(b); err == nil {
			c.From, err = checkAnswer(sent, b[:n])
			return err
		}
	}
	return err
}

// Talk exchanges with an Echo over TCP and UDP, rounds times each, and returns who the other end says it talks to.
func (n *Node) Talk(to netip.Addr, e *Echo, rounds int) (netip.Addr, error) {
	return n.TalkOver([]string{"tcp", "udp"}, to, e, rounds)
}

// TalkOver is Talk over the networks named.
func (n *Node) TalkOver(networks []string, to netip.Addr, e *Echo, rounds int) (netip.Addr, error) {
	var from netip.Addr
	var errs []error
	for _, network := range networks {
		err := func() error {
			c, err := n.Dial(network, netip.AddrPortFrom(to, e.Port))
			if err != nil {
				return err
			}
			defer c.Close()
			most := 200_000
			if c.udp {
				most = MaxUDP
			}
			for range rounds {
				if err := c.Exchange(most); err != nil {
					return err
				}
			}
			from = c.From
			return nil
		}()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s to %s over %s: %w", n.Name, to, network, err))
		}
	}
	return from, errors.Join(errs...)
}
