package policy

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// The reference: what the comments in k8s.io/api/networking/v1 say, asked anew for every packet. It shares no code with the
// compiler, and is slow and literal on purpose. Quotations are from those comments.

type packet struct {
	src, dst netip.Addr
	proto    string // "TCP", "UDP", "SCTP"
	port     uint16
}

// referenceAllows says whether this node lets a packet that begins a flow pass.
func referenceAllows(s State, node map[netip.Addr]bool, p packet) bool {
	// "the traffic source is the pod's local node"; and pods reach their node and themselves.
	if node[p.src] || node[p.dst] || p.src == p.dst {
		return true
	}
	from, to := podAt(s, p.src), podAt(s, p.dst)
	if from != nil && isLocal(s, p.src) && !referenceSide(s, "Egress", *from, to, p) {
		return false
	}
	if to != nil && isLocal(s, p.dst) && !referenceSide(s, "Ingress", *to, from, p) {
		return false
	}
	return true
}

func isLocal(s State, a netip.Addr) bool {
	for _, n := range s.Node {
		if n.Contains(a) {
			return true
		}
	}
	return false
}

func podAt(s State, a netip.Addr) *Pod {
	for i := range s.Pods {
		if !s.Pods[i].HostNetwork && slices.Contains(s.Pods[i].Addrs, a) {
			return &s.Pods[i]
		}
	}
	return nil
}

// "Traffic is allowed to a pod if there are no NetworkPolicies selecting the pod [...] or if the traffic matches at least
// one ingress rule across all of the NetworkPolicy objects whose podSelector matches the pod."
func referenceSide(s State, side string, pod Pod, peer *Pod, p packet) bool {
	selected := false
	for _, np := range s.Policies {
		if np.Namespace != pod.Namespace || !referenceSelects(np.Spec.PodSelector, pod.Labels) || !referenceTypes(np)[side] {
			continue
		}
		selected = true
		if side == "Ingress" {
			for _, r := range np.Spec.Ingress {
				if referencePeers(s, np.Namespace, r.From, peer, p.src) && referencePorts(s, r.Ports, p) {
					return true
				}
			}
		} else {
			for _, r := range np.Spec.Egress {
				if referencePeers(s, np.Namespace, r.To, peer, p.dst) && referencePorts(s, r.Ports, p) {
					return true
				}
			}
		}
	}
	return !selected
}

// "If this field is not specified, it will default based on the existence of ingress or egress rules; policies that contain
// an egress section are assumed to affect egress, and all policies [...] are assumed to affect ingress."
func referenceTypes(np *networkingv1.NetworkPolicy) map[string]bool {
	out := map[string]bool{}
	for _, t := range np.Spec.PolicyTypes {
		out[string(t)] = true
	}
	if len(np.Spec.PolicyTypes) == 0 {
		out["Ingress"] = true
		out["Egress"] = len(np.Spec.Egress) > 0
	}
	return out
}

// "If this field is empty or missing, this rule matches all sources [...] Items in this list are combined using a logical OR."
func referencePeers(s State, namespace string, peers []networkingv1.NetworkPolicyPeer, peer *Pod, addr netip.Addr) bool {
	if len(peers) == 0 {
		return true
	}
	for _, q := range peers {
		if q.IPBlock != nil {
			if referenceBlock(*q.IPBlock, addr) {
				return true
			}
			continue
		}
		if peer == nil {
			continue
		}
		// "If namespaceSelector is also set, then the NetworkPolicyPeer as a whole selects the pods matching podSelector in
		// the namespaces selected by NamespaceSelector. Otherwise it selects the pods matching podSelector in the policy's
		// own namespace." "If podSelector is [not] set [it] selects all pods in the namespaces selected by namespaceSelector."
		if q.NamespaceSelector != nil {
			if !referenceSelects(*q.NamespaceSelector, namespaceLabels(s, peer.Namespace)) {
				continue
			}
		} else if peer.Namespace != namespace {
			continue
		}
		if q.PodSelector == nil || referenceSelects(*q.PodSelector, peer.Labels) {
			return true
		}
	}
	return false
}

func namespaceLabels(s State, name string) map[string]string {
	out := map[string]string{"kubernetes.io/metadata.name": name}
	for _, ns := range s.Namespaces {
		if ns.Name == name {
			for k, v := range ns.Labels {
				out[k] = v
			}
		}
	}
	return out
}

// "except is a slice of CIDRs that should not be included within an IPBlock"
func referenceBlock(b networkingv1.IPBlock, a netip.Addr) bool {
	if !netip.MustParsePrefix(b.CIDR).Contains(a) {
		return false
	}
	for _, e := range b.Except {
		if netip.MustParsePrefix(e).Contains(a) {
			return false
		}
	}
	return true
}

// "If this field is empty or missing, this rule matches all ports (traffic not restricted by port)."
func referencePorts(s State, ports []networkingv1.NetworkPolicyPort, p packet) bool {
	if len(ports) == 0 {
		return true
	}
	for _, q := range ports {
		// "If not specified, this field defaults to TCP."
		proto := corev1.ProtocolTCP
		if q.Protocol != nil {
			proto = *q.Protocol
		}
		if string(proto) != p.proto {
			continue
		}
		switch {
		case q.Port == nil: // "If this field is not provided, this matches all port names and numbers."
			return true
		case q.Port.Type == intstr.String: // "a numerical or named port on a pod"
			if to := podAt(s, p.dst); to != nil {
				for _, named := range to.Ports {
					if named.Name == q.Port.StrVal && strings.EqualFold(string(named.protocol()), p.proto) && named.Port == p.port {
						return true
					}
				}
			}
		case q.EndPort != nil: // "the range of ports from port to endPort if set, inclusive"
			if int32(p.port) >= q.Port.IntVal && int32(p.port) <= *q.EndPort {
				return true
			}
		case int32(p.port) == q.Port.IntVal:
			return true
		}
	}
	return false
}

// "The requirements are ANDed. An empty label selector matches all objects."
func referenceSelects(sel metav1.LabelSelector, labels map[string]string) bool {
	for k, v := range sel.MatchLabels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	for _, e := range sel.MatchExpressions {
		have, ok := labels[e.Key]
		switch e.Operator {
		case metav1.LabelSelectorOpIn:
			if !ok || !slices.Contains(e.Values, have) {
				return false
			}
		case metav1.LabelSelectorOpNotIn: // also objects without the label
			if ok && slices.Contains(e.Values, have) {
				return false
			}
		case metav1.LabelSelectorOpExists:
			if !ok {
				return false
			}
		case metav1.LabelSelectorOpDoesNotExist:
			if ok {
				return false
			}
		}
	}
	return true
}
