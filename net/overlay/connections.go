package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"lamina/net/control"
	"lamina/net/ns"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Bits of CTA_STATUS, which package netlink does not read (linux/netfilter/nf_conntrack_common.h).
const (
	seenReply = 1 << 1
	assured   = 1 << 2
)

// tcpStates by CTA_PROTOINFO_TCP_STATE.
var tcpStates = [...]string{"NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2"}

// Connections are those that conntrack knows and f names.
func (o *Overlay) Connections(f control.Flow) (found []control.Connection, err error) {
	var msgs [][]byte
	err = ns.Do(o.cfg.NS, func() error {
		req := nl.NewNetlinkRequest(int(netlink.ConntrackTable)<<8|nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP)
		req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
		msgs, err = req.Execute(unix.NETLINK_NETFILTER, 0)
		if errors.Is(err, nl.ErrDumpInterrupted) {
			return nil // as complete as a busy table gets
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("conntrack: %w", err)
	}
	for _, m := range msgs {
		if c, ok := parseConnection(m); ok && f.Fits(c.Flow) {
			found = append(found, c)
		}
	}
	return found, nil
}

// attributes of a nested attribute.
type attributes map[uint16][]byte

func parseAttributes(b []byte) attributes {
	all, err := nl.ParseRouteAttr(b)
	if err != nil {
		return nil
	}
	m := attributes{}
	for _, a := range all {
		m[a.Attr.Type&nl.NLA_TYPE_MASK] = a.Value
	}
	return m
}

func (a attributes) in(t uint16) attributes { return parseAttributes(a[t]) }

// number is a value of one, two or four bytes; 0 if it is not there.
func (a attributes) number(t uint16) uint32 {
	switch b := a[t]; len(b) {
	case 1:
		return uint32(b[0])
	case 2:
		return uint32(binary.BigEndian.Uint16(b))
	case 4:
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func parseConnection(msg []byte) (c control.Connection, ok bool) {
	if len(msg) < nl.SizeofNfgenmsg {
		return c, false
	}
	a := parseAttributes(msg[nl.SizeofNfgenmsg:])
	orig, reply := a.in(nl.CTA_TUPLE_ORIG), a.in(nl.CTA_TUPLE_REPLY)
	proto := orig.in(nl.CTA_TUPLE_PROTO)
	end := func(tuple attributes) netip.AddrPort {
		addr, _ := netip.AddrFromSlice(tuple.in(nl.CTA_TUPLE_IP)[nl.CTA_IP_V4_SRC])
		return netip.AddrPortFrom(addr, uint16(tuple.in(nl.CTA_TUPLE_PROTO).number(nl.CTA_PROTO_SRC_PORT)))
	}
	c.Flow = control.Flow{Protocol: control.ProtocolName(uint8(proto.number(nl.CTA_PROTO_NUM))), Src: end(orig), Dst: end(reply)}
	status := a.number(nl.CTA_STATUS)
	c.Replied, c.Assured = status&seenReply != 0, status&assured != 0
	c.Timeout = time.Duration(a.number(nl.CTA_TIMEOUT)) * time.Second
	if tcp := a.in(nl.CTA_PROTOINFO).in(nl.CTA_PROTOINFO_TCP); tcp != nil {
		if state := int(tcp.number(nl.CTA_PROTOINFO_TCP_STATE)); state < len(tcpStates) {
			c.State = tcpStates[state]
		}
	}
	return c, c.Flow.Src.IsValid() && c.Flow.Dst.IsValid()
}
