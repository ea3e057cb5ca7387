// Package peers says which nodes there are: each has a lease, which is a prefix of the pod network and the address at which
// the node answers for it. Where leases come from is a [Source]: a file ([File]), etcd or Kubernetes.
//
// Sources speak in snapshots. Whoever needs the changes compares ([Diff]): a snapshot can be lost, repeated or come late and
// the next one puts everything right.
package peers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// MAC is an Ethernet address. The zero value is none.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// Hardware is the address as package net has it.
func (m MAC) Hardware() net.HardwareAddr { return slices.Clone(m[:]) }

// MarshalText writes a MAC as text, an empty one for none.
func (m MAC) MarshalText() ([]byte, error) {
	if m == (MAC{}) {
		return nil, nil
	}
	return []byte(m.String()), nil
}

// UnmarshalText reads what MarshalText writes.
func (m *MAC) UnmarshalText(b []byte) (err error) {
	if len(b) == 0 {
		*m = MAC{}
		return nil
	}
	*m, err = ParseMAC(string(b))
	return err
}

// ParseMAC reads a unicast Ethernet address.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 || hw[0]&1 != 0 {
		return MAC{}, fmt.Errorf("%q is not a unicast Ethernet address such as 0e:6c:c0:a8:00:01", s)
	}
	return MAC(hw), nil
}

// NodeMAC is the address of the VXLAN device of a node that names none. Every node computes it alike, so that it needs no
// telling and stays the same when the device is made anew.
func NodeMAC(node netip.Addr) MAC {
	if node.Is4() {
		a := node.As4()
		return MAC{0x0e, 0x6c, a[0], a[1], a[2], a[3]}
	}
	sum := sha256.Sum256(node.AsSlice())
	return MAC{0x0e, 0x6d, sum[0], sum[1], sum[2], sum[3]}
}

// Lease is one node's part of the pod network.
type Lease struct {
	Prefix netip.Prefix `json:"prefix"` // the pods of the node
	Node   netip.Addr   `json:"node"`   // the node's address on the underlay
	MAC    MAC          `json:"mac"`    // of its VXLAN device
}

// Host is the address of the node inside the pod network: the first of its prefix. Its pods use it as their gateway.
func (l Lease) Host() netip.Addr { return l.Prefix.Masked().Addr().Next() }

func (l Lease) String() string { return fmt.Sprintf("%s on %s", l.Prefix, l.Node) }

// Update is what a source says.
type Update struct {
	Leases []Lease // all of them, the own node's as well if the source has it
	Err    error   // why the source cannot say; Leases is not valid then, and what was known before still holds
}

// Same says whether two updates say the same.
func (u Update) Same(v Update) bool {
	return fmt.Sprint(u.Err) == fmt.Sprint(v.Err) && slices.Equal(u.Leases, v.Leases)
}

// Source says which leases there are.
type Source interface {
	// Watch sends the leases there are, and again whenever they change, until ctx is done; it closes the channel then. An
	// update that was not received in time is replaced by a newer one.
	Watch(ctx context.Context) (<-chan Update, error)
}

// Smallest and largest prefix a node can have.
const (
	minBits = 8
	maxBits = 30
)

func (l Lease) check() error {
	switch {
	case !l.Prefix.IsValid() || !l.Node.IsValid():
		return fmt.Errorf("%s: prefix or address is missing", l)
	case !l.Prefix.Addr().Is4() || !l.Node.Is4():
		return fmt.Errorf("%s: only IPv4 is supported", l)
	case l.Prefix != l.Prefix.Masked():
		return fmt.Errorf("%s: the prefix has bits of a host in it: write %s", l, l.Prefix.Masked())
	case l.Prefix.Bits() < minBits || l.Prefix.Bits() > maxBits:
		return fmt.Errorf("%s: a pod prefix has between %d and %d bits", l, minBits, maxBits)
	case l.Node.IsUnspecified() || l.Node.IsMulticast() || l.Node.IsLoopback():
		return fmt.Errorf("%s: %s cannot be a node's address", l, l.Node)
	case l.MAC[0]&1 != 0:
		return fmt.Errorf("%s: %s is no unicast address", l, l.MAC)
	}
	return nil
}

// Others checks leases against each other and against the own one, and returns those of other nodes, sorted by prefix, each
// with a MAC. The own lease may be among all. The error names every conflict.
func Others(self Lease, all []Lease) ([]Lease, error) {
	var errs []error
	if err := self.check(); err != nil {
		return nil, fmt.Errorf("own node: %w", err)
	}
	var others []Lease
	for _, l := range all {
		if l.MAC == (MAC{}) {
			l.MAC = NodeMAC(l.Node)
		}
		if err := l.check(); err != nil {
			errs = append(errs, err)
		} else if l.Node != self.Node {
			others = append(others, l)
		} else if l.Prefix != self.Prefix {
			errs = append(errs, fmt.Errorf("%s: %s is this node's own address, whose prefix is %s: give the peer its own address, or this node that prefix",
				l, l.Node, self.Prefix))
		}
	}
	slices.SortFunc(others, func(a, b Lease) int {
		if c := a.Prefix.Addr().Compare(b.Prefix.Addr()); c != 0 {
			return c
		}
		return a.Prefix.Bits() - b.Prefix.Bits()
	})
	errs = append(errs, conflicts(self, others)...)
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return others, nil
}

// conflicts compares neighbours in order of their prefixes: of two that overlap one holds the other's first address.
func conflicts(self Lease, others []Lease) (errs []error) {
	nodes := map[netip.Addr]Lease{}
	macs := map[MAC]Lease{orNodeMAC(self): self}
	var widest Lease
	for _, l := range others {
		if widest.Prefix.IsValid() && widest.Prefix.Overlaps(l.Prefix) {
			errs = append(errs, fmt.Errorf("%s overlaps %s: give each node a prefix of its own", l, widest))
		} else {
			widest = l
		}
		if l.Prefix.Overlaps(self.Prefix) {
			errs = append(errs, fmt.Errorf("%s overlaps this node's own prefix %s: give each node a prefix of its own", l, self.Prefix))
		}
		if same, there := nodes[l.Node]; there {
			errs = append(errs, fmt.Errorf("%s: the same node as %s: a node has one prefix", l, same))
		} else if same, there := macs[l.MAC]; there {
			errs = append(errs, fmt.Errorf("%s: the same MAC %s as %s: leave it out, or give each its own", l, l.MAC, same))
		}
		nodes[l.Node], macs[l.MAC] = l, l
	}
	for _, holder := range append([]Lease{self}, others...) {
		for _, l := range append([]Lease{self}, others...) {
			if holder.Prefix.Contains(l.Node) {
				errs = append(errs, fmt.Errorf("%s: the prefix contains the address of node %s, which could not be reached any more: use a prefix outside the underlay",
					holder, l.Node))
			}
		}
	}
	return errs
}

func orNodeMAC(l Lease) MAC {
	if l.MAC == (MAC{}) {
		return NodeMAC(l.Node)
	}
	return l.MAC
}

// Diff compares two sets of leases, each with at most one lease for a prefix. A lease that is in both with another node or
// MAC is changed.
func Diff(before, after []Lease) (added, changed, removed []Lease) {
	old := map[netip.Prefix]Lease{}
	for _, l := range before {
		old[l.Prefix] = l
	}
	for _, l := range after {
		if was, there := old[l.Prefix]; !there {
			added = append(added, l)
		} else if was != l {
			changed = append(changed, l)
		}
		delete(old, l.Prefix)
	}
	for _, l := range before {
		if _, there := old[l.Prefix]; there {
			removed = append(removed, l)
		}
	}
	return added, changed, removed
}
