// Package podlink is what a host has for a pod of its own: what the CNI plugin makes and the agent holds. It is apart from
// package overlay because the plugin starts anew for every pod and has no use for nftables.
package podlink

import (
	"net"
	"net/netip"

	"lamina/net/control"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Protocol marks the network's routes (rtm_protocol; `ip route` shows "proto 108").
const Protocol netlink.RouteProtocol = 108

// Route is the host's route to a pod. The host speaks to its own pods from its underlay address, node.
func Route(pod, node netip.Addr, index int) netlink.Route {
	return netlink.Route{
		Dst: &net.IPNet{IP: pod.AsSlice(), Mask: net.CIDRMask(pod.BitLen(), pod.BitLen())}, LinkIndex: index, Scope: netlink.SCOPE_LINK, Src: node.AsSlice(),
		Protocol: Protocol, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST,
	}
}

// Neigh is the host's ARP entry of a pod.
func Neigh(p control.Pod, index int) netlink.Neigh {
	return netlink.Neigh{
		LinkIndex: index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, IP: p.Address.AsSlice(), HardwareAddr: p.MAC.Hardware(),
	}
}
