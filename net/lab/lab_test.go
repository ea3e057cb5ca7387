package lab

import (
	"net/netip"
	"os"
	"testing"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

// Hosts reach each other and the outside, and content that is changed on its way is noticed.
func TestHosts(t *testing.T) {
	l := New(t, 3)
	for _, to := range append(l.Hosts, l.Outside) {
		e := to.Echo(0)
		for _, from := range l.Hosts {
			who, err := from.Talk(to.Addr, e, 3)
			if err != nil {
				t.Fatal(err)
			}
			if who != from.Addr {
				t.Errorf("%s was seen as %s", from.Addr, who)
			}
		}
	}
	sent := []byte("content")
	got := answer(sent, &fakeAddr{})
	got[len(got)-1]++
	if _, err := checkAnswer(sent, got); err == nil {
		t.Error("changed content passed")
	}
	if _, err := l.Hosts[0].Dial("tcp", netipPort(l.Hosts[1], 1)); err == nil {
		t.Error("connected to a port where nobody listens")
	}
}

type fakeAddr struct{}

func (fakeAddr) Network() string { return "tcp" }
func (fakeAddr) String() string  { return "192.0.2.1:1" }

func netipPort(h *Host, port uint16) netip.AddrPort { return netip.AddrPortFrom(h.Addr, port) }
