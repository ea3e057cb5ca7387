package traffic

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"lamina/net/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }

func TestEveryKind(t *testing.T) {
	l := lab.New(t, 2)
	a, b := l.Hosts[0], l.Hosts[1]
	for _, kind := range []Kind{TCPRR, UDPRR, TCPCRR, TCPStream, UDPRate} {
		for _, flows := range []int{1, 3} {
			r, err := Run{Kind: kind, Client: a.NS, Server: b.NS, At: netip.AddrPortFrom(b.Addr, 5201), Duration: 100 * time.Millisecond, Flows: flows}.Do(t.Context())
			if err != nil || r.Count == 0 || r.Elapsed < 100*time.Millisecond {
				t.Errorf("%s, %d flows: %+v %v", kind, flows, r, err)
			}
			if there := kind != TCPStream && kind != UDPRate; there != (r.Median > 0) {
				t.Errorf("%s: median %s", kind, r.Median)
			}
		}
	}
	if r, err := (Run{Kind: UDPRate, Greet: true, Client: a.NS, Server: b.NS, At: netip.AddrPortFrom(b.Addr, 5201), Duration: 100 * time.Millisecond}).Do(t.Context()); err != nil || r.Count == 0 {
		t.Errorf("with a greeting: %+v %v", r, err)
	}
	if r, err := (Run{Kind: TCPRR, Client: a.NS, Server: b.NS, At: netip.MustParseAddrPort("192.0.2.1:1"), Duration: time.Millisecond}).Do(t.Context()); err == nil {
		t.Errorf("an address that is nobody's: %+v", r)
	}
}

func TestEchoNoticesChanges(t *testing.T) {
	l := lab.New(t, 2)
	a, b := l.Hosts[0], l.Hosts[1]
	at := netip.AddrPortFrom(b.Addr, 7)
	e, err := NewEcho(b.NS, at, 'x')
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	c, err := Dial(a.NS, "tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, size := range []int{0, 1, 100_000} {
		if err := EchoTCP(c, size, 1); err != nil {
			t.Error(err)
		}
	}
	c.Write([]byte("something else"))
	if EchoTCP(c, 1000, 1) == nil {
		t.Error("other bytes came back, and nobody noticed")
	}
	u, err := Dial(a.NS, "udp4", at)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for number, size := range []int{8, 1000, 9000} {
		if name, lost, err := EchoUDP(u, size, uint64(number+1), time.Second); name != 'x' || lost || err != nil {
			t.Error(name, lost, err)
		}
	}
	e.Close()
	if _, lost, _ := EchoUDP(u, 8, 9, 100*time.Millisecond); !lost {
		t.Error("an answer of nobody")
	}
}
