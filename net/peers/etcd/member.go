package etcd

import (
	"context"
	"errors"
	"net/netip"

	"lamina/net/peers"
)

// Member is a node's part in the leases.
type Member struct {
	*Source
	// Network and Bits say which prefix to take for a node that brings none: see Acquire.
	Network netip.Prefix
	Bits    int
}

var _ peers.Registry = Member{}

// Join writes the node's lease. Its address must be known; without a prefix it takes one.
func (m Member) Join(ctx context.Context, own peers.Lease) (peers.Lease, error) {
	if !own.Node.IsValid() {
		return own, errors.New("etcd: which address has this node? name it with --node-ip")
	}
	if own.MAC == (peers.MAC{}) {
		own.MAC = peers.NodeMAC(own.Node)
	}
	if !own.Prefix.IsValid() {
		return m.Acquire(ctx, m.Network, m.Bits, own.Node, own.MAC)
	}
	if err := m.put(ctx, own); err != nil {
		return own, err
	}
	v, err := m.read(ctx)
	if err != nil {
		return own, m.failed("reading leases", err)
	}
	return own, m.removeOthers(ctx, own, v.update(m.Source).Leases)
}
