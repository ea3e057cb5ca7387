package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Event says what may have changed.
type Event struct {
	Links  bool   // devices, addresses, routes, ARP or FDB entries
	Rules  bool   // the nftables table
	NewPod string // the name of an interface of a pod's that has appeared, or ""
}

// receiveBuffer is that of a notification socket, in bytes. If it overflows all the same, everything is looked at.
const receiveBuffer = 1 << 20

// Watch calls f for every notification of the kernel's that may concern the overlay, until ctx is done; calls do not
// overlap. When notifications are lost it calls f with everything set.
func (o *Overlay) Watch(ctx context.Context, f func(Event)) error {
	route, err := subscribe(o.cfg.NS, unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE)
	if err != nil {
		return err
	}
	nft, err := subscribe(o.cfg.NS, unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		route.Close()
		return err
	}
	// Closing makes Receive return.
	stop := context.AfterFunc(ctx, func() {
		route.Close()
		nft.Close()
	})
	defer stop()
	var mu sync.Mutex
	one := func(e Event) {
		if e != (Event{}) && ctx.Err() == nil {
			mu.Lock()
			defer mu.Unlock()
			f(e)
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { receive(ctx, route, o.routeEvent, one) })
	wg.Go(func() { receive(ctx, nft, nftEvent, one) })
	wg.Wait()
	if ctx.Err() == nil {
		route.Close()
		nft.Close()
		return errors.New("notifications of the kernel have ended")
	}
	return nil
}

func subscribe(h netns.NsHandle, protocol int, groups ...uint) (*nl.NetlinkSocket, error) {
	s, err := nl.SubscribeAt(h, netns.None(), protocol, groups...)
	if err != nil {
		return nil, fmt.Errorf("notifications of the kernel: %w", err)
	}
	if err := s.SetReceiveBufferSize(receiveBuffer, true); err != nil {
		_ = s.SetReceiveBufferSize(receiveBuffer, false)
	}
	return s, nil
}

// receive ends when the socket is closed.
func receive(ctx context.Context, s *nl.NetlinkSocket, event func(h uint16, data []byte) Event, f func(Event)) {
	for ctx.Err() == nil {
		messages, from, err := s.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			f(Event{Links: true, Rules: true})
			continue
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return
		case from.Pid != nl.PidKernel:
			continue
		}
		for _, m := range messages {
			f(event(m.Header.Type, m.Data))
		}
	}
}

// routeEvent reads a notification of rtnetlink's. What our own changes cause is left out where it is easily known; for the
// rest looking once more does no harm.
func (o *Overlay) routeEvent(kind uint16, data []byte) Event {
	if len(data) < 12 {
		return Event{}
	}
	switch kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return o.linkEvent(kind, data)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return Event{Links: true} // rare
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		index := binary.NativeEndian.Uint32(data[4:])
		return Event{Links: kind == unix.RTM_DELNEIGH || o.isDevice(int(index))}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		const protocolAt, attributesAt = 5, 12
		if deleted := kind == unix.RTM_DELROUTE; deleted || data[protocolAt] == byte(protocol) {
			return Event{Links: deleted && data[protocolAt] == byte(protocol)}
		}
		return Event{Links: o.inPodNetwork(data[attributesAt:])} // somebody may have replaced one of ours
	}
	return Event{}
}

func (o *Overlay) linkEvent(kind uint16, data []byte) Event {
	link, err := netlink.LinkDeserialize(nil, data)
	if err != nil {
		return Event{Links: true}
	}
	a := link.Attrs()
	e := Event{}
	if strings.HasPrefix(a.Name, "lam") && a.Name != o.cfg.Device && kind == unix.RTM_NEWLINK {
		e.NewPod = a.Name
	}
	e.Links = a.Name == o.cfg.Device || a.Index == o.Underlay().Index || e.NewPod != ""
	return e
}

func (o *Overlay) isDevice(index int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.device != nil && o.device.Attrs().Index == index
}

func (o *Overlay) inPodNetwork(attributes []byte) bool {
	list, err := nl.ParseRouteAttr(attributes)
	if err != nil {
		return true
	}
	for _, a := range list {
		if a.Attr.Type != unix.RTA_DST {
			continue
		}
		dst, _ := netip.AddrFromSlice(a.Value)
		o.mu.Lock()
		defer o.mu.Unlock()
		for _, l := range o.peers {
			if l.Prefix.Contains(dst) {
				return true
			}
		}
		return o.cfg.Self.Prefix.Contains(dst)
	}
	return false
}

// nftEvent reads a notification of nf_tables': ours is the first attribute, which is always the table's name.
func nftEvent(kind uint16, data []byte) Event {
	const header = 4 // nfgenmsg
	if kind>>8 != unix.NFNL_SUBSYS_NFTABLES || kind&0xff == unix.NFT_MSG_NEWGEN || len(data) < header {
		return Event{}
	}
	list, err := nl.ParseRouteAttr(data[header:])
	if err != nil || len(list) == 0 {
		return Event{}
	}
	return Event{Rules: unix.ByteSliceToString(list[0].Value) == Table}
}
