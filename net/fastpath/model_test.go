package fastpath

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// The model says what the programs have to do with a packet. It is written from design and RFCs, on slices, and shares nothing
// with the programs but the records.

const (
	actNext     = 0xffffffff
	actRedirect = 7
)

// outcome is what a program does.
type outcome struct {
	redirect bool
	mark     uint32
	why      Reason // not compared when the packet is not counted
	counted  bool
	packet   []byte // after it
}

// skb is a packet as a program gets it.
type skb struct {
	data    []byte
	index   int
	mark    uint32
	gso     uint32
	forHost bool
}

// state is what the records say of the flow the test is about.
type state struct {
	on, fresh    bool
	generation   uint32
	since        uint32
	node         netip.Addr // own
	vni          uint32
	port         uint16
	mtu          int
	deviceMAC    []byte
	pods         map[netip.Addr]Pod
	podSince     uint32
	nodes        map[netip.Prefix]netip.Addr
	flows        map[bpfFlow]modelFlow
	headers      map[netip.Addr]modelHeader
	verdictsNode map[uint16]netip.Addr
}

type modelFlow struct {
	out, in  verdict
	outTorn  bool
	inTorn   bool
	outStale bool
	inStale  bool
}

type modelHeader struct {
	bytes      []byte
	generation uint32
	torn       bool
}

type tuple5 struct {
	src, dst     netip.Addr
	sport, dport uint16
	proto        byte
	flags        byte
	headers      int
}

// parseIP reads an IPv4 packet that fills b.
func parseIP(b []byte) (tuple5, Reason) {
	var p tuple5
	if len(b) < 20 || b[0]>>4 != 4 {
		return p, Malformed
	}
	if b[0]&15 > 5 {
		return p, IPOptions
	}
	if b[0]&15 < 5 || int(binary.BigEndian.Uint16(b[2:])) != len(b) {
		return p, Malformed
	}
	if binary.BigEndian.Uint16(b[6:])&0x3fff != 0 {
		return p, Fragment
	}
	p.src, _ = netip.AddrFromSlice(b[12:16])
	p.dst, _ = netip.AddrFromSlice(b[16:20])
	p.proto = b[9]
	l4 := b[20:]
	switch p.proto {
	case unix.IPPROTO_UDP:
		if len(l4) < 8 || int(binary.BigEndian.Uint16(l4[4:])) != len(l4) {
			return p, Malformed
		}
		p.headers = 28
	case unix.IPPROTO_TCP:
		if len(l4) < 20 {
			return p, Malformed
		}
		n := int(l4[12]>>4) * 4
		if n < 20 || n > len(l4) {
			return p, Malformed
		}
		p.headers = 20 + n
		p.flags = l4[13]
	default:
		return p, Protocol
	}
	p.sport, p.dport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
	return p, Hit
}

func (p tuple5) key(outward bool) bpfFlow {
	f := bpfFlow{Local: toAddr(p.dst), Remote: toAddr(p.src), LocalPort: big(p.dport), RemotePort: big(p.sport), Protocol: p.proto}
	if outward {
		f = bpfFlow{Local: toAddr(p.src), Remote: toAddr(p.dst), LocalPort: big(p.sport), RemotePort: big(p.dport), Protocol: p.proto}
	}
	return f
}

func (s *state) nodeOf(a netip.Addr) (netip.Addr, bool) {
	best := -1
	var node netip.Addr
	for pre, n := range s.nodes {
		if pre.Contains(a) && pre.Bits() > best {
			best, node = pre.Bits(), n
		}
	}
	return node, best >= 0
}

func (s *state) gate(k skb) Reason {
	switch {
	case !s.on:
		return Disabled
	case !s.fresh:
		return Stale
	case k.mark != 0:
		return ForeignMark
	}
	return Hit
}

func (s *state) pass(k skb, why Reason) outcome {
	return outcome{mark: k.mark, why: why, counted: true, packet: k.data}
}

func (s *state) miss(k skb, why Reason) outcome {
	if s.generation%2 == 1 {
		return s.pass(k, Changing)
	}
	o := s.pass(k, why)
	o.mark = MarkMiss | s.generation/2&MarkGeneration
	return o
}

func known(v verdict, torn bool, since uint32) Reason {
	switch {
	case v.Generation == 0:
		return OneSided
	case torn:
		return Torn
	case older(v.Generation, since):
		return Outdated
	}
	return Hit
}

// older compares generations, which wrap around.
func older(a, b uint32) bool { return b-a-1 < 1<<31 }

const (
	fin = 1
	syn = 2
	rst = 4
	ack = 16
)

func (s *state) egress(k skb) outcome {
	if len(k.data) < 14 || binary.BigEndian.Uint16(k.data[12:]) != 0x0800 || !k.forHost {
		return s.pass(k, NotIPv4)
	}
	if why := s.gate(k); why != Hit {
		return s.pass(k, why)
	}
	ip := k.data[14:]
	p, why := parseIP(ip)
	if why != Hit {
		return s.pass(k, why)
	}
	if pod, ok := s.pods[p.src]; !ok || pod.Index != k.index {
		return s.pass(k, NotLocal)
	}
	_, remote := s.nodeOf(p.dst)
	if p.flags&(syn|fin|rst) != 0 {
		if p.flags&(fin|rst) == 0 && p.flags&ack != 0 && remote {
			return s.miss(k, TCPFlags)
		}
		return s.pass(k, TCPFlags)
	}
	size := len(ip)
	if k.gso != 0 {
		size = p.headers + int(k.gso)
	}
	switch {
	case size > s.mtu || len(ip)+50 > 65535:
		return s.pass(k, TooBig)
	case ip[8] <= 1:
		return s.pass(k, TTL)
	}
	f, ok := s.flows[p.key(true)]
	if !ok && !remote {
		return s.pass(k, NotRemote)
	}
	if !ok {
		return s.miss(k, NotLearned)
	}
	since := max(s.since, s.podSince)
	if why := known(f.out, f.outTorn, since); why != Hit {
		return s.miss(k, why)
	}
	if why := known(f.in, f.inTorn, since); why != Hit && p.proto != unix.IPPROTO_UDP {
		return s.miss(k, why)
	}
	if f.outStale {
		return s.miss(k, LeaseOver)
	}
	node := s.verdictsNode[f.out.Node]
	h, ok := s.headers[node]
	if !ok || h.generation == 0 || older(h.generation, s.since) {
		return s.miss(k, NoHeader)
	}
	if h.torn {
		return s.miss(k, Torn)
	}
	if k.gso != 0 {
		return s.pass(k, Kernel) // BPF_PROG_TEST_RUN's packets have no segmentation type
	}
	out := append(bytes.Clone(h.bytes), ip...)
	inner := out[64:]
	inner[8]--
	setChecksum(inner)
	out[15] |= inner[1] & 3
	binary.BigEndian.PutUint16(out[16:], uint16(len(ip)+50))
	binary.BigEndian.PutUint16(out[34:], binary.BigEndian.Uint16(bytesOf(&f.out.Port)))
	binary.BigEndian.PutUint16(out[38:], uint16(len(ip)+30))
	return outcome{redirect: true, why: Hit, counted: true, packet: out}
}

// setChecksum makes an IPv4 header's checksum valid, whatever it was. The programs update it, so a wrong one stays wrong;
// tests of headers with wrong checksums compare all but the checksum.
func setChecksum(h []byte) {
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:], ^ones(h[:20]))
}

// ones is the ones' complement sum of 16-bit words.
func ones(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

func (s *state) ingress(k skb) outcome {
	other := outcome{mark: k.mark, packet: k.data}
	d := k.data
	if len(d) < 64+28 || binary.BigEndian.Uint16(d[12:]) != 0x0800 || !k.forHost {
		return other
	}
	dst, _ := netip.AddrFromSlice(d[30:34])
	src, _ := netip.AddrFromSlice(d[26:30])
	if d[14] != 0x45 || d[23] != unix.IPPROTO_UDP || dst != s.node {
		return other
	}
	if binary.BigEndian.Uint16(d[20:])&0x3fff != 0 {
		return s.pass(k, Fragment)
	}
	if binary.BigEndian.Uint16(d[36:]) != s.port {
		return other
	}
	if int(binary.BigEndian.Uint16(d[16:])) != len(d)-14 || int(binary.BigEndian.Uint16(d[38:])) != len(d)-34 {
		return s.pass(k, Malformed)
	}
	if binary.BigEndian.Uint32(d[42:]) != 0x08000000 || binary.BigEndian.Uint32(d[46:]) != s.vni<<8 {
		return s.pass(k, VNI)
	}
	if !bytes.Equal(d[50:56], s.deviceMAC) || binary.BigEndian.Uint16(d[62:]) != 0x0800 {
		return other
	}
	if why := s.gate(k); why != Hit {
		return s.pass(k, why)
	}
	p, why := parseIP(d[64:])
	if why != Hit {
		return s.pass(k, why)
	}
	pod, ok := s.pods[p.dst]
	if !ok {
		return s.pass(k, NotLocal)
	}
	node, remote := s.nodeOf(p.src)
	f, ok := s.flows[p.key(false)]
	first := p.flags&(syn|fin|rst) != 0
	since := max(s.since, s.podSince)
	why = Hit
	if ok && !first {
		if why = known(f.in, f.inTorn, since); why == Hit && p.proto != unix.IPPROTO_UDP {
			why = known(f.out, f.outTorn, since)
		}
	}
	if !ok || first || why != Hit {
		switch {
		case !remote:
			return s.pass(k, NotRemote)
		case node != src:
			return s.pass(k, WrongNode)
		case first && (p.flags&(fin|rst) != 0 || p.flags&ack == 0):
			return s.pass(k, TCPFlags)
		case first:
			return s.miss(k, TCPFlags)
		case !ok:
			return s.miss(k, NotLearned)
		}
		return s.miss(k, why)
	}
	if s.verdictsNode[f.in.Node] != src {
		return s.pass(k, WrongNode)
	}
	h := s.headers[src]
	switch {
	case p.proto != unix.IPPROTO_UDP && (h.generation == 0 || older(h.generation, s.since)):
		return s.miss(k, NoHeader)
	case f.inStale:
		return s.miss(k, LeaseOver)
	case d[40] != 0 || d[41] != 0:
		return s.miss(k, OuterChecksum)
	case k.gso != 0:
		return s.pass(k, Segments)
	case d[64+8] <= 1:
		return s.pass(k, TTL)
	}
	out := append(append(append([]byte{}, pod.MAC...), pod.Gateway...), 8, 0)
	out = append(out, d[64:]...)
	ip := out[14:]
	ecn, drop := decapsulatedECN(d[15]&3, ip[1]&3)
	if drop {
		return s.pass(k, ECN)
	}
	ip[1] = ip[1]&^3 | ecn
	ip[8]--
	setChecksum(ip)
	return outcome{redirect: true, why: Hit, counted: true, packet: out}
}

// decapsulatedECN is figure 4 of RFC 6040. 0: not ECT, 1: ECT(1), 2: ECT(0), 3: CE.
func decapsulatedECN(outer, inner byte) (ecn byte, drop bool) {
	table := [4][4]int{ // inner, outer
		0: {0: 0, 1: 0, 2: 0, 3: -1},
		1: {0: 1, 1: 1, 2: 1, 3: 3},
		2: {0: 2, 1: 1, 2: 2, 3: 3},
		3: {0: 3, 1: 3, 2: 3, 3: 3},
	}
	e := table[inner][outer]
	return byte(max(e, 0)), e < 0
}
