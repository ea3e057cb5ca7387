package policy

import (
	"fmt"
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// large is a network of a thousand pods, a hundred of them here, under a hundred policies.
func large() State {
	s := State{Node: testNode}
	for i := range 1000 {
		s.Pods = append(s.Pods, Pod{Namespace: "shop", Name: fmt.Sprintf("pod-%d", i), Labels: map[string]string{"app": fmt.Sprint("app", i%50)},
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 42, byte(1 + i/100), byte(2 + i%100)})}})
	}
	for i := range 100 {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprintf("p%d", i)}}
		p.Spec.PodSelector.MatchLabels = map[string]string{"app": fmt.Sprint("app", i%50)}
		for j := range 3 {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app", (i+j)%50)}}}}})
		}
		s.Policies = append(s.Policies, p)
	}
	return s
}

func BenchmarkCompile(b *testing.B) {
	s := large()
	for b.Loop() {
		if _, err := Compile(s); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkApplyPod is what a pod that comes or goes costs: plan, transaction, and the look at conntrack.
func BenchmarkApplyPod(b *testing.B) {
	s := large()
	less := s
	less.Pods = s.Pods[1:] // a local one
	w := &world{node: newNS(b)}
	e, err := NewEnforcer(EnforcerOptions{NetNS: w.node})
	if err != nil {
		b.Fatal(err)
	}
	states := []State{s, less}
	for i := 0; b.Loop(); i++ {
		p, err := e.Plan(states[i%2])
		if err == nil {
			_, err = e.Apply(b.Context(), p)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
