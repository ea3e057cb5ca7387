package policy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// conntrack is the connection table of a network namespace.
type conntrack struct {
	h     *netlink.Handle
	local map[netip.Addr]bool // addresses of the host itself
}

// openConntrack opens the table of the calling thread's namespace.
func openConntrack() (*conntrack, error) {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	ct := &conntrack{h: h, local: map[netip.Addr]bool{}}
	addrs, err := retry(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("own addresses: %w", err)
	}
	for _, a := range addrs {
		ct.local[toAddr(a.IP)] = true
	}
	return ct, nil
}

func (ct *conntrack) close() { ct.h.Close() }

// host says whether a flow begins or ends at the host itself, which is nobody's to forbid.
func (ct *conntrack) host(f Flow) bool { return ct.local[f.Src] || ct.local[f.Dst] }

func (ct *conntrack) list(fams []family) ([]Flow, error) {
	var out []Flow
	for _, f := range fams {
		flows, err := retry(func() ([]*netlink.ConntrackFlow, error) {
			return ct.h.ConntrackTableList(netlink.ConntrackTable, f.inet())
		})
		if err != nil {
			return nil, fmt.Errorf("conntrack: %w", err)
		}
		for _, fl := range flows {
			out = append(out, flowOf(fl))
		}
	}
	return out, nil
}

func (f family) inet() netlink.InetFamily {
	if f == 4 {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// flowOf is a connection as the forward chain saw its first packet: the destination after NAT is where answers come
// from, the source before NAT is where it came from.
func flowOf(c *netlink.ConntrackFlow) Flow {
	f := Flow{Src: toAddr(c.Forward.SrcIP), Dst: toAddr(c.Reverse.SrcIP), Proto: c.Forward.Protocol}
	switch f.Proto {
	case protoTCP, protoUDP, protoSCTP:
		f.SrcPort, f.DstPort = c.Forward.SrcPort, c.Reverse.SrcPort
	}
	return f
}

func toAddr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// flows is a filter of conntrack entries.
type flows map[Flow]bool

// MatchConntrackFlow is for package netlink.
func (f flows) MatchConntrackFlow(c *netlink.ConntrackFlow) bool { return f[flowOf(c)] }

// forget deletes the entries of flows; one that is gone already is forgotten.
func (ct *conntrack) forget(fams []family, fs flows) error {
	for _, f := range fams {
		_, err := retry(func() (uint, error) {
			return ct.h.ConntrackDeleteFilters(netlink.ConntrackTable, f.inet(), fs)
		})
		if err != nil {
			return fmt.Errorf("conntrack: %w", err)
		}
	}
	return nil
}

// retry repeats a dump that changes of the table have interrupted.
func retry[T any](dump func() (T, error)) (out T, err error) {
	for range 10 {
		if out, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, nil // as complete as it gets: a busy table is dumped again by the next pass
}
