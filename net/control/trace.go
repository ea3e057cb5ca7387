package control

import (
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// TracePath is GET with the parameter flow: Trace.
const TracePath = "/v1/trace"

// Flow names a flow, from the end that opens it, or every flow that fits: an address that is not valid, a port 0 and a
// protocol "" fit all.
type Flow struct {
	Protocol string         `json:"protocol"` // "tcp", "udp", "sctp", or the number of another
	Src      netip.AddrPort `json:"src"`
	Dst      netip.AddrPort `json:"dst"`
}

// protocols that have ports, by their IP protocol number.
var protocols = map[uint8]string{6: "tcp", 17: "udp", 132: "sctp"}

// ProtocolName is how a Flow calls an IP protocol.
func ProtocolName(number uint8) string {
	if name := protocols[number]; name != "" {
		return name
	}
	return strconv.Itoa(int(number))
}

// ProtocolNumber is that of f; 0 if it has none.
func (f Flow) ProtocolNumber() uint8 {
	for number, name := range protocols {
		if name == f.Protocol {
			return number
		}
	}
	n, _ := strconv.ParseUint(f.Protocol, 10, 8)
	return uint8(n)
}

// ParseFlow reads "10.42.1.5:4711-10.42.2.7:80/tcp", in which "->", ">" and white space separate as well, a port may
// stand by itself behind its address, and what is left out or is "*" fits all.
func ParseFlow(s string) (Flow, error) {
	var f Flow
	ends := []*netip.AddrPort{&f.Src, &f.Dst}
	at := -1 // of ends
	port := func(word string) bool {
		n, err := strconv.ParseUint(word, 10, 16)
		if word == "*" {
			n, err = 0, nil
		}
		if err == nil {
			*ends[at] = netip.AddrPortFrom(ends[at].Addr(), uint16(n))
		}
		return err == nil
	}
	for _, word := range strings.FieldsFunc(strings.ToLower(s), func(r rune) bool { return strings.ContainsRune(" \t->/", r) }) {
		if hasPorts(word) {
			f.Protocol = word
			continue
		}
		if at >= 0 && !strings.ContainsAny(word, ".:") && ends[at].Port() == 0 && port(word) {
			continue
		}
		if at++; at == len(ends) {
			return f, badFlow(s, word)
		}
		a, rest, ok := cutAddr(word)
		if !ok {
			return f, badFlow(s, word)
		}
		*ends[at] = netip.AddrPortFrom(a, 0)
		if rest != "" && !port(rest) {
			return f, badFlow(s, word)
		}
	}
	return f, nil
}

// hasPorts says whether a word is the name of a protocol with ports.
func hasPorts(word string) bool {
	for _, name := range protocols {
		if name == word {
			return true
		}
	}
	return false
}

func badFlow(s, word string) error {
	return fmt.Errorf("flow %q: %q is out of place: write a flow as 10.42.1.5:4711-10.42.2.7:80/tcp", s, word)
}

// cutAddr takes an address, or a *, from the beginning of ADDRESS[:PORT] or [ADDRESS]:PORT.
func cutAddr(s string) (a netip.Addr, port string, ok bool) {
	if rest, any := strings.CutPrefix(s, "*"); any {
		port, colon := strings.CutPrefix(rest, ":")
		return a, port, rest == "" || colon && port != ""
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Unmap(), "", true
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return a, "", false
	}
	a, err := netip.ParseAddr(strings.Trim(s[:i], "[]"))
	return a.Unmap(), s[i+1:], err == nil && s[i+1:] != ""
}

// String is a form that ParseFlow reads.
func (f Flow) String() string {
	s := endString(f.Src) + "-" + endString(f.Dst)
	if f.Protocol != "" {
		s += "/" + f.Protocol
	}
	return s
}

func endString(e netip.AddrPort) string {
	switch {
	case !e.Addr().IsValid() && e.Port() == 0:
		return "*"
	case !e.Addr().IsValid():
		return fmt.Sprint("*:", e.Port())
	case e.Port() == 0:
		return e.Addr().String()
	}
	return e.String()
}

// Whole says whether f is one flow.
func (f Flow) Whole() bool {
	return f.Src.Addr().IsValid() && f.Dst.Addr().IsValid() && f.Src.Port() != 0 && f.Dst.Port() != 0 && f.Protocol != ""
}

// Reverse is the flow as its other end sees it.
func (f Flow) Reverse() Flow { return Flow{f.Protocol, f.Dst, f.Src} }

// Fits says whether a whole flow, in either direction, is one that f names.
func (f Flow) Fits(whole Flow) bool { return f.fits(whole) || f.fits(whole.Reverse()) }

func (f Flow) fits(w Flow) bool {
	end := func(a, b netip.AddrPort) bool {
		return (!a.Addr().IsValid() || a.Addr() == b.Addr()) && (a.Port() == 0 || a.Port() == b.Port())
	}
	return (f.Protocol == "" || f.Protocol == w.Protocol) && end(f.Src, w.Src) && end(f.Dst, w.Dst)
}

// Trace says why a flow takes the path it takes.
type Trace struct {
	Flow  Flow   `json:"flow"`
	Steps []Step `json:"steps"` // in the order in which a packet meets them

	// Flow named a whole flow: what its packets do on this node.
	Out *Verdict `json:"out,omitempty"` // those to the other node
	In  *Verdict `json:"in,omitempty"`  // those from it

	// It did not: those that fit.
	Flows []TracedFlow `json:"flows,omitempty"`
	More  int          `json:"more,omitempty"` // that fit and are left out
}

// Step is one thing that decides, or does not.
type Step struct {
	Name   string `json:"step"`
	Result Result `json:"result"`
	Found  string `json:"found"`
	Fix    string `json:"fix,omitempty"`
}

// Result of a step.
type Result string

const (
	Passed  Result = "ok"
	Stopped Result = "no"   // this is why the flow misses, or does not flow
	Noted   Result = "note" // decides nothing
)

// Verdict is what becomes of packets.
type Verdict struct {
	Hit    bool   `json:"hit"`
	Reason string `json:"reason"` // as the counters call it
	Text   string `json:"text"`   // the same for people
	Fix    string `json:"fix,omitempty"`
}

// TracedFlow is one of several.
type TracedFlow struct {
	Flow       Flow        `json:"flow"` // as it was opened, if conntrack knows it, otherwise this node's end first
	Cached     bool        `json:"cached"`
	Connection *Connection `json:"conntrack,omitempty"`
	Out        string      `json:"out"` // reasons
	In         string      `json:"in"`
}

// Connection is what conntrack knows of a flow. Addresses are those the forward chain sees: after translation of the
// destination, before that of the source.
type Connection struct {
	Flow    Flow          `json:"flow"`
	State   string        `json:"state,omitempty"` // of TCP, as the conntrack tool calls it
	Replied bool          `json:"replied"`         // packets of both directions have been seen: the connection is established
	Assured bool          `json:"assured"`
	Timeout time.Duration `json:"timeout"` // that is left, in nanoseconds
}

// String tells it to people.
func (c *Connection) String() string {
	words := []string{}
	if c.State != "" {
		words = append(words, c.State)
	}
	if !c.Replied {
		words = append(words, "unreplied")
	}
	if c.Assured {
		words = append(words, "assured")
	}
	if len(words) == 0 {
		words = append(words, "replied")
	}
	return strings.Join(append(words, c.Timeout.String()+" left"), ", ")
}

// Trace asks why a flow takes the path it takes.
func (c *Client) Trace(f Flow) (t Trace, err error) {
	err = c.do(http.MethodGet, TracePath+"?flow="+url.QueryEscape(f.String()), nil, &t)
	return t, err
}
