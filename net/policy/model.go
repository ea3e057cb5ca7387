package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// Pod is what policies need to know of one pod, on this node or elsewhere.
type Pod struct {
	Namespace string
	Name      string
	Labels    map[string]string
	// Addrs are the pod's own addresses. A pod without any is not looked at.
	Addrs []netip.Addr
	// Ports are the named ports of its containers.
	Ports []Port
	// HostNetwork marks a pod that uses its host's network: policies treat it as the host.
	HostNetwork bool
}

// Port is one named container port.
type Port struct {
	Name     string
	Protocol corev1.Protocol // empty: TCP
	Port     uint16
}

func (p Port) protocol() corev1.Protocol { return cmp.Or(p.Protocol, corev1.ProtocolTCP) }

func (p Pod) key() string { return p.Namespace + "/" + p.Name }

// Namespace is a namespace with its labels. The label kubernetes.io/metadata.name is there without being given. A
// namespace that is not listed but has pods has no other labels.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// State is everything a ruleset is compiled from.
type State struct {
	// Node holds the prefixes of the pods on this node: pods with an address in one of them are local.
	Node       []netip.Prefix
	Pods       []Pod
	Namespaces []Namespace
	Policies   []*networkingv1.NetworkPolicy
}

// Inventory is what one source knows of pods and namespaces.
type Inventory struct {
	Pods       []Pod
	Namespaces []Namespace
}

// Merge makes one inventory of several. A pod named by more than one of them has all their addresses, ports and
// labels. Of two values for one label, and of two pods that claim one address, the later inventory's counts: give the
// source that knows best last (the node's own leases after a file).
func Merge(inventories ...Inventory) Inventory {
	pods := map[string]*Pod{}
	owner := map[netip.Addr]string{}
	spaces := map[string]map[string]string{}
	for _, inv := range inventories {
		for _, ns := range inv.Namespaces {
			spaces[ns.Name] = joined(spaces[ns.Name], ns.Labels)
		}
		for _, p := range inv.Pods {
			have := pods[p.key()]
			if have == nil {
				have = &Pod{Namespace: p.Namespace, Name: p.Name}
				pods[p.key()] = have
			}
			have.Labels = joined(have.Labels, p.Labels)
			have.Ports = mergePorts(have.Ports, p.Ports)
			have.HostNetwork = have.HostNetwork || p.HostNetwork
			for _, a := range p.Addrs {
				if before, ok := owner[a]; ok && before != p.key() {
					b := pods[before]
					b.Addrs = slices.DeleteFunc(b.Addrs, func(x netip.Addr) bool { return x == a })
				}
				if owner[a] != p.key() {
					have.Addrs = append(have.Addrs, a)
				}
				owner[a] = p.key()
			}
		}
	}
	var out Inventory
	for _, k := range slices.Sorted(maps.Keys(pods)) {
		out.Pods = append(out.Pods, *pods[k])
	}
	for _, k := range slices.Sorted(maps.Keys(spaces)) {
		out.Namespaces = append(out.Namespaces, Namespace{Name: k, Labels: spaces[k]})
	}
	return out
}

// joined returns a new map with both maps' entries, b's where both have one.
func joined(a, b map[string]string) map[string]string {
	out := make(map[string]string, len(a)+len(b))
	maps.Copy(out, a)
	maps.Copy(out, b)
	return out
}

// mergePorts appends those of b, which replace ports of the same name and protocol.
func mergePorts(a, b []Port) []Port {
	out := slices.Clone(a)
	for _, p := range b {
		out = slices.DeleteFunc(out, func(q Port) bool { return q.Name == p.Name && q.protocol() == p.protocol() })
		out = append(out, p)
	}
	return out
}
