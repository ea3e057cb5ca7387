package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Random states, small enough that rules meet pods, with every feature of the API in them.

var (
	testNode   = []netip.Prefix{netip.MustParsePrefix("10.42.1.0/24"), netip.MustParsePrefix("fd42:0:0:1::/64")}
	testPorts  = []uint16{53, 80, 443, 8080, 9090}
	portNames  = []string{"http", "dns", "peer"}
	namespaces = []string{"red", "green", "blue"}
)

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

func randomLabels(r *rand.Rand) map[string]string {
	out := map[string]string{}
	if r.IntN(5) > 0 {
		out["app"] = pick(r, "web", "db", "cache")
	}
	if r.IntN(2) > 0 {
		out["tier"] = pick(r, "1", "2")
	}
	return out
}

func randomSelector(r *rand.Rand) *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	switch r.IntN(6) {
	case 0: // everything
	case 1, 2:
		s.MatchLabels = map[string]string{"app": pick(r, "web", "db", "cache")}
	case 3:
		s.MatchLabels = map[string]string{"tier": pick(r, "1", "2")}
	default:
		op := pick(r, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)
		e := metav1.LabelSelectorRequirement{Key: pick(r, "app", "tier"), Operator: op}
		if op == metav1.LabelSelectorOpIn || op == metav1.LabelSelectorOpNotIn {
			e.Values = []string{pick(r, "web", "1"), pick(r, "db", "2")}
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

func randomNamespaceSelector(r *rand.Rand) *metav1.LabelSelector {
	switch r.IntN(4) {
	case 0:
		return &metav1.LabelSelector{}
	case 1:
		return &metav1.LabelSelector{MatchLabels: map[string]string{"team": pick(r, "x", "y")}}
	case 2:
		return &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": pick(r, namespaces...)}}
	}
	return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "team", Operator: metav1.LabelSelectorOpDoesNotExist}}}
}

func randomBlock(r *rand.Rand) *networkingv1.IPBlock {
	return pick(r,
		&networkingv1.IPBlock{CIDR: "0.0.0.0/0"},
		&networkingv1.IPBlock{CIDR: "0.0.0.0/0", Except: []string{"10.42.1.0/30", "10.42.1.0/29", "192.0.2.0/24"}},
		&networkingv1.IPBlock{CIDR: "10.42.0.0/16", Except: []string{"10.42.2.0/24"}},
		&networkingv1.IPBlock{CIDR: "10.42.1.4/30"},
		&networkingv1.IPBlock{CIDR: "192.0.2.10/32"},
		&networkingv1.IPBlock{CIDR: "::/0"},
		&networkingv1.IPBlock{CIDR: "::/0", Except: []string{"fd42:0:0:1::/126", "2001:db8::/32"}},
		&networkingv1.IPBlock{CIDR: "fd42::/32", Except: []string{"fd42:0:0:2::/64"}},
		&networkingv1.IPBlock{CIDR: "2001:db8::a/128"})
}

func randomPeers(r *rand.Rand) (out []networkingv1.NetworkPolicyPeer) {
	for range r.IntN(4) {
		switch r.IntN(4) {
		case 0:
			out = append(out, networkingv1.NetworkPolicyPeer{PodSelector: randomSelector(r)})
		case 1:
			out = append(out, networkingv1.NetworkPolicyPeer{NamespaceSelector: randomNamespaceSelector(r)})
		case 2:
			out = append(out, networkingv1.NetworkPolicyPeer{PodSelector: randomSelector(r), NamespaceSelector: randomNamespaceSelector(r)})
		default:
			out = append(out, networkingv1.NetworkPolicyPeer{IPBlock: randomBlock(r)})
		}
	}
	return out
}

func randomPorts(r *rand.Rand) (out []networkingv1.NetworkPolicyPort) {
	for range r.IntN(4) {
		var p networkingv1.NetworkPolicyPort
		if r.IntN(4) > 0 {
			proto := pick(r, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
			p.Protocol = &proto
		}
		switch r.IntN(5) {
		case 0: // all
		case 1, 2:
			v := intstr.FromInt32(int32(pick(r, testPorts...)))
			p.Port = &v
		case 3:
			v := intstr.FromString(pick(r, portNames...))
			p.Port = &v
		case 4:
			first := r.Int32N(9000) + 1
			last := first + r.Int32N(9000)
			v := intstr.FromInt32(first)
			p.Port, p.EndPort = &v, &last
		}
		out = append(out, p)
	}
	return out
}

func randomPolicy(r *rand.Rand, n int) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: pick(r, namespaces...), Name: fmt.Sprintf("p%d", n)}}
	p.Spec.PodSelector = *randomSelector(r)
	for range r.IntN(3) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: randomPeers(r), Ports: randomPorts(r)})
	}
	for range r.IntN(3) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: randomPeers(r), Ports: randomPorts(r)})
	}
	switch r.IntN(4) {
	case 0:
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	case 1:
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	case 2:
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress, networkingv1.PolicyTypeIngress}
	}
	return p
}

// randomPods are eight pods: the first six on this node.
func randomPods(r *rand.Rand) (out []Pod) {
	for i := range 8 {
		net := 1
		if i >= 6 {
			net = 2
		}
		p := Pod{Namespace: pick(r, namespaces...), Name: fmt.Sprintf("pod-%d", i), Labels: randomLabels(r),
			Addrs: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.42.%d.%d", net, i+2)), netip.MustParseAddr(fmt.Sprintf("fd42:0:0:%d::%d", net, i+2))}}
		for _, name := range portNames {
			if r.IntN(3) > 0 {
				p.Ports = append(p.Ports, Port{Name: name, Protocol: pick(r, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP, ""), Port: pick(r, testPorts...)})
			}
		}
		out = append(out, p)
	}
	return out
}

func randomState(r *rand.Rand) State {
	s := State{Node: testNode, Pods: randomPods(r)}
	s.Namespaces = []Namespace{{Name: "red", Labels: map[string]string{"team": "x"}}, {Name: "green", Labels: map[string]string{"team": "y"}}}
	for n := range r.IntN(7) {
		s.Policies = append(s.Policies, randomPolicy(r, n))
	}
	return s
}
