package overlay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// addressFilter matches connections with an address at either end, before or after translation.
type addressFilter func(netip.Addr) bool

func (f addressFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	for _, ip := range []net.IP{flow.Forward.SrcIP, flow.Forward.DstIP, flow.Reverse.SrcIP, flow.Reverse.DstIP} {
		if a, ok := netip.AddrFromSlice(ip); ok && f(a.Unmap()) {
			return true
		}
	}
	return false
}

// Forget removes the connections of the addresses that match from conntrack: their next packet is looked at anew.
func (o *Overlay) Forget(match func(netip.Addr) bool) error {
	_, err := o.nl.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, addressFilter(match))
	if errors.Is(err, unix.ENOENT) { // it ended meanwhile
		return nil
	}
	if err != nil {
		return fmt.Errorf("conntrack: %w", err)
	}
	return nil
}
