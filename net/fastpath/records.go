package fastpath

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"lamina/net/overlay"
)

// abi is ABI of bpf/fastpath.h.
const abi = 2

// Marks, as in bpf/fastpath.h.
const (
	MarkGeneration  = overlay.MarkGeneration
	MarkMiss        = overlay.MarkMiss
	MarkEstablished = overlay.MarkEstablished
)

// Program is one of the four.
type Program uint8

// Programs, as in bpf/fastpath.h.
const (
	Egress Program = iota
	Ingress
	EgressLearn
	IngressLearn
	programs
)

var programNames = [programs]string{"egress", "ingress", "egress_learn", "ingress_learn"}

func (p Program) String() string { return programNames[p] }

// Reason is why a program did with a packet what it did.
type Reason uint8

// Reasons, as in bpf/fastpath.h, which explains them.
const (
	Hit Reason = iota
	Disabled
	Stale
	Changing
	ForeignMark
	NotIPv4
	Malformed
	IPOptions
	Fragment
	Protocol
	TCPFlags
	TooBig
	TTL
	NotLocal
	NotRemote
	WrongNode
	NotLearned
	OneSided
	Outdated
	LeaseOver
	Torn
	NoHeader
	VNI
	OuterChecksum
	ECN
	Segments
	Kernel
	Learned
	Confirmed
	Unestablished
	Superseded
	Uncacheable
	reasons
)

// Each reason's name in counters and what it means for people.
var reasonTexts = [reasons]struct{ name, text string }{
	Hit:           {"hit", "takes the fast path"},
	Disabled:      {"disabled", "the fast path is switched off"},
	Stale:         {"stale", "the agent's heartbeat is missing"},
	Changing:      {"changing", "a change is being applied"},
	ForeignMark:   {"foreign_mark", "another program has marked the packet"},
	NotIPv4:       {"not_ipv4", "not IPv4, or not for this host"},
	Malformed:     {"malformed", "lengths that contradict each other"},
	IPOptions:     {"options", "IP options"},
	Fragment:      {"fragment", "a fragment"},
	Protocol:      {"protocol", "neither TCP nor UDP"},
	TCPFlags:      {"tcp_flags", "TCP's SYN, FIN and RST are for conntrack to see"},
	TooBig:        {"too_big", "larger than the overlay's MTU"},
	TTL:           {"ttl", "expires on the way"},
	NotLocal:      {"not_local", "the local address is no pod's, or not of this interface's pod"},
	NotRemote:     {"not_remote", "the remote address is no pod's of another node"},
	WrongNode:     {"wrong_node", "the remote pod lives at another node"},
	NotLearned:    {"not_learned", "the ordinary path has not shown the flow as allowed, and established or UDP's"},
	OneSided:      {"one_sided", "this direction of the flow has not been seen as allowed, or TCP's other one"},
	Outdated:      {"outdated", "learned before the latest change"},
	LeaseOver:     {"lease_over", "the ordinary path has to confirm the flow"},
	Torn:          {"torn", "the record was being replaced"},
	NoHeader:      {"no_header", "no packet has been seen on its way to the node"},
	VNI:           {"vni", "of another overlay"},
	OuterChecksum: {"outer_checksum", "an outer UDP checksum is for the ordinary path to verify"},
	ECN:           {"ecn", "congestion experienced outside and not ECN-capable inside"},
	Segments:      {"segments", "received with segmentation offload"},
	Kernel:        {"kernel", "a kernel function refused"},
	Learned:       {"learned", "recorded"},
	Confirmed:     {"confirmed", "known and still true"},
	Unestablished: {"unestablished", "conntrack does not call the flow established, it is the first packet of UDP, or the rules that say so are missing"},
	Superseded:    {"superseded", "sent before the latest change"},
	Uncacheable:   {"uncacheable", "an outer header that varies"},
}

func (r Reason) String() string { return reasonTexts[r].name }

// ParseReason knows a reason by its name in counters.
func ParseReason(name string) (Reason, bool) {
	for r := range reasons {
		if reasonTexts[r].name == name {
			return r, true
		}
	}
	return 0, false
}

// Others says that the packets are none between pods of different nodes.
func (r Reason) Others() bool { return r == NotIPv4 || r == NotLocal || r == NotRemote }

// Text is the reason for people.
func (r Reason) Text() string { return reasonTexts[r].text }

func toAddr(a netip.Addr) (w bpfAddr) {
	b := a.As16()
	for i := range w.W {
		w.W[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

func fromAddr(w bpfAddr) netip.Addr {
	var b [16]byte
	for i := range w.W {
		binary.NativeEndian.PutUint32(b[4*i:], w.W[i])
	}
	return netip.AddrFrom16(b).Unmap()
}

func toPrefix(p netip.Prefix) bpfPrefix {
	length := p.Bits()
	if p.Addr().Is4() {
		length += 96
	}
	return bpfPrefix{Length: uint32(length), Addr: toAddr(p.Masked().Addr())}
}

func fromPrefix(p bpfPrefix) netip.Prefix {
	a := fromAddr(p.Addr)
	if a.Is4() {
		return netip.PrefixFrom(a, int(p.Length)-96)
	}
	return netip.PrefixFrom(a, int(p.Length))
}

// big is a number as its bytes are on the wire.
func big(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

var factors = [...]uint64{
	0x243f6a8885a308d3, 0x13198a2e03707345, 0xa4093822299f31d1, 0x082efa98ec4e6c89, 0x452821e638d01377,
	0xbe5466cf34e90c6d, 0xc0ac29b7c97c50dd, 0x3f84d5b5b5470917, 0x9216d5d98979fb1b, 0xd1310ba698dfb5ad,
}

func mix(words []byte, sum uint64) uint64 {
	for i := range len(words) / 8 {
		sum += binary.NativeEndian.Uint64(words[8*i:]) * factors[i]
	}
	return sum ^ sum>>32
}

func bytesOf[T any](v *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v)) }

func podTag(p *bpfPod, secret uint64) uint64 { return mix(bytesOf(p)[:40], secret) }

func flowKey(f *bpfFlow, secret uint64) uint64 { return mix(bytesOf(f), secret) }

// verdict is struct verdict.
type verdict struct {
	Generation uint32
	Node, Port uint16
	At, Tag    uint64
}

func (f *bpfFilter) out() verdict { return *(*verdict)(unsafe.Pointer(&f.Out)) }
func (f *bpfFilter) in() verdict  { return *(*verdict)(unsafe.Pointer(&f.In)) }

func verdictTag(v *verdict, key uint64) uint64 { return mix(bytesOf(v)[:16], key) }

func headerTag(n *bpfNode, secret uint64) uint64 { return mix(bytesOf(&n.Header)[:80], secret) }

// voided is what the programs think of a record of a generation.
func voided(generation, since uint32) bool { return generation == 0 || int32(generation-since) < 0 }

func younger(a, b uint32) uint32 {
	if int32(a-b) > 0 {
		return a
	}
	return b
}
