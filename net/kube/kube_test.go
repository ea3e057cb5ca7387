package kube

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"lamina/net/lab"
	"lamina/net/lab/apiserver"
	"lamina/net/peers"
	"lamina/net/policy"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// keeper is somebody whom Keep tells what is wrong: hear is for Keep, and tells waits until it was told something, or that
// nothing is wrong.
func keeper(t *testing.T) (tells func(want string), hear func(error)) {
	var mu sync.Mutex
	var told error
	tells = func(want string) {
		t.Helper()
		eventually(t, "tells "+want, func() error {
			mu.Lock()
			defer mu.Unlock()
			if (want == "") != (told == nil) || told != nil && !strings.Contains(told.Error(), want) {
				return fmt.Errorf("told %v", told)
			}
			return nil
		})
	}
	return tells, func(err error) {
		mu.Lock()
		defer mu.Unlock()
		told = err
	}
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

var rules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"nodes", "pods", "namespaces"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{""}, Resources: []string{"nodes/status"}, Verbs: []string{"patch"}},
	{APIGroups: []string{"networking.k8s.io"}, Resources: []string{"networkpolicies"}, Verbs: []string{"list", "watch"}},
}

func newServer(t *testing.T) *apiserver.Server {
	t.Helper()
	cert, key := lab.Certificate(t, netip.MustParseAddr("127.0.0.1"))
	return apiserver.New(t, apiserver.Options{Address: "127.0.0.1:0", Cert: cert, Key: key, Token: "secret", Rules: rules})
}

func cluster(t *testing.T, srv *apiserver.Server, token string) *Cluster {
	t.Helper()
	c, err := Config(srv.Kubeconfig(token))
	must(t, err)
	k, err := New(Options{Config: c, Node: "one", Saved: filepath.Join(t.TempDir(), "saved")})
	must(t, err)
	return k
}

func node(name, prefix, addr, annotation string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDR: prefix}}
	if addr != "" {
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "fd00::1"}, {Type: corev1.NodeInternalIP, Address: addr}}
	}
	if annotation != "" {
		n.Annotations = map[string]string{Annotation: annotation}
	}
	return n
}

func TestJoin(t *testing.T) {
	srv := newServer(t)
	k := cluster(t, srv, "secret")
	join := func(own peers.Lease, want string, reachable bool) peers.Lease {
		t.Helper()
		l, err := k.Join(t.Context(), own)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("error is %v, not %q", err, want)
		}
		if errors.Is(err, peers.ErrUnreachable) == reachable {
			t.Errorf("reachable is not %v by %v", reachable, err)
		}
		return l
	}
	join(peers.Lease{}, "reading Node one: there is none", true)
	srv.Put(node("one", "", "192.0.2.1", ""))
	join(peers.Lease{}, "no IPv4 podCIDR", false) // it may get one
	srv.Put(node("one", "fd00::/64", "192.0.2.1", ""))
	join(peers.Lease{}, "no IPv4 podCIDR", false)
	srv.Put(node("one", "nonsense", "192.0.2.1", ""))
	join(peers.Lease{}, `podCIDR "nonsense" of Node one is not a prefix`, true)
	srv.Put(node("one", "10.0.1.0/24", "", ""))
	join(peers.Lease{}, "no IPv4 InternalIP", true)
	srv.Put(node("one", "10.0.1.0/24", "192.0.2.1", ""))
	if l := join(peers.Lease{}, "", true); l.String() != "10.0.1.0/24 on 192.0.2.1" || l.MAC != peers.NodeMAC(l.Node) {
		t.Errorf("%s, %s", l, l.MAC)
	}
	join(peers.Lease{Node: netip.MustParseAddr("192.0.2.99")}, "", true)
	got := node("one", "", "", "")
	srv.Get(got)
	if a := got.Annotations[Annotation]; a != "192.0.2.99 0e:6c:c0:00:02:63" || got.Spec.PodCIDR != "10.0.1.0/24" {
		t.Errorf("annotation %q of %+v", a, got.Spec)
	}
	srv.Allow(rules[:1])
	join(peers.Lease{}, "apply the ClusterRole", true)
	srv.Stop()
	join(peers.Lease{}, "is the API server running and reachable?", false)
	srv.Start()
	k = cluster(t, srv, "wrong")
	join(peers.Lease{}, "the token or certificate is not accepted", true)
}

// What cannot be listed is told before everything is known as an update, and afterwards to the one who keeps the Node.
func TestWatch(t *testing.T) {
	srv := newServer(t)
	srv.Put(node("one", "10.0.1.0/24", "192.0.2.1", ""))
	srv.Put(node("two", "10.0.2.0/24", "192.0.2.2", "192.0.2.2 0e:6c:c0:00:02:02"))
	srv.Put(node("three", "10.0.3.0/24", "192.0.2.3", "")) // no agent
	srv.Allow(rules[:2])
	k := cluster(t, srv, "secret")
	own, err := k.Join(t.Context(), peers.Lease{})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	updates, err := k.Watch(ctx)
	must(t, err)
	expect := func(what string, want func(peers.Update) bool) {
		t.Helper()
		deadline := time.After(30 * time.Second)
		for {
			select {
			case u := <-updates:
				if want(u) {
					return
				}
			case <-deadline:
				t.Fatal(what)
			}
		}
	}
	expect("policies cannot be listed", func(u peers.Update) bool {
		return u.Err != nil && strings.Contains(u.Err.Error(), "networkpolicies") && strings.Contains(u.Err.Error(), "apply the ClusterRole")
	})
	tells, hear := keeper(t)
	wg.Go(func() { k.Keep(ctx, own, hear) })
	tells("apply the ClusterRole")
	srv.Allow(rules)
	two := peers.Lease{Prefix: netip.MustParsePrefix("10.0.2.0/24"), Node: netip.MustParseAddr("192.0.2.2")}
	two.MAC = peers.NodeMAC(two.Node)
	expect("the other node", func(u peers.Update) bool { return u.Err == nil && reflect.DeepEqual(u.Leases, []peers.Lease{two}) })
	tells("")
	srv.Put(node("one", "10.0.1.0/24", "192.0.2.1", "")) // somebody took the annotation away
	eventually(t, "it is back", func() error {
		n := node("one", "", "", "")
		if srv.Get(n); n.Annotations[Annotation] != annotation(own) {
			return fmt.Errorf("%v", n.Annotations)
		}
		return nil
	})
	srv.Stop()
	tells("is the API server running")
	srv.Start()
	tells("")
	two.MAC[5]++
	srv.Put(node("two", "10.0.2.0/24", "192.0.2.2", annotation(two)))
	expect("another MAC", func(u peers.Update) bool { return u.Err == nil && reflect.DeepEqual(u.Leases, []peers.Lease{two}) })
}

func TestPodOf(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	port := func(name string, n int32) []corev1.ContainerPort {
		return []corev1.ContainerPort{{Name: name, ContainerPort: n}, {ContainerPort: 1}}
	}
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", Labels: map[string]string{"a": "b"}}}
	p.Spec.Containers = []corev1.Container{{Image: "x", Ports: port("http", 80)}}
	p.Spec.InitContainers = []corev1.Container{{Ports: port("once", 81)}, {Ports: port("sidecar", 82), RestartPolicy: &always}}
	p.Spec.HostNetwork = true
	p.Status.PodIPs = []corev1.PodIP{{IP: "10.0.1.2"}, {IP: "fd00::2"}}
	stripped, err := strip(p)
	must(t, err)
	want := policy.Pod{Namespace: "shop", Name: "web", Labels: map[string]string{"a": "b"}, HostNetwork: true,
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.1.2"), netip.MustParseAddr("fd00::2")},
		Ports: []policy.Port{{Name: "http", Port: 80}, {Name: "sidecar", Port: 82}}}
	if got := podOf(stripped.(*corev1.Pod)); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

// What is on disk is what is known, without pods that have ended.
func TestSaved(t *testing.T) {
	srv := newServer(t)
	pod := func(name string, phase corev1.PodPhase) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Status: corev1.PodStatus{Phase: phase, PodIP: "10.0.1.2"}}
	}
	srv.Put(pod("now", corev1.PodRunning))
	srv.Put(pod("before", corev1.PodSucceeded))
	srv.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"tier": "gold"}}})
	srv.Put(&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}})
	k := cluster(t, srv, "secret")
	if _, err := k.saved(); err == nil {
		t.Error("something is known that nobody wrote")
	}
	_, err := k.Watch(t.Context())
	must(t, err)
	eventually(t, "all is known", func() error {
		if !k.synced() {
			return fmt.Errorf("%v", k.unhealthy())
		}
		return nil
	})
	must(t, k.save())
	old, err := k.saved()
	must(t, err)
	if len(old.Inventory.Pods) != 1 || old.Inventory.Pods[0].Addrs[0].String() != "10.0.1.2" || old.Inventory.Namespaces[0].Labels["tier"] != "gold" ||
		len(old.Policies) != 1 || old.Policies[0].Name != "p" {
		t.Errorf("%+v", old)
	}
}

// A rule that cannot be enforced allows nothing; the rest of its policy holds.
func TestUsable(t *testing.T) {
	from := func(cidr string) networkingv1.NetworkPolicyIngressRule {
		return networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: cidr}}}}
	}
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}}
	p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{from("::ffff:10.0.0.0/104"), from("10.1.0.0/16")}
	got, err := usable(p)
	if err == nil || !strings.Contains(err.Error(), "shop/p") || !strings.Contains(err.Error(), "allows nothing") {
		t.Errorf("error: %v", err)
	}
	if got == nil || !reflect.DeepEqual(got.Spec.Ingress, p.Spec.Ingress[1:]) || len(got.Spec.PolicyTypes) != 1 || len(p.Spec.Ingress) != 2 {
		t.Errorf("%+v of %+v", got, p)
	}
	p.Spec.PodSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Near"}}
	if got, err := usable(p); got != nil || err == nil || !strings.Contains(err.Error(), "not in force") {
		t.Errorf("%+v, %v", got, err)
	}
	p.Spec = networkingv1.NetworkPolicySpec{PolicyTypes: p.Spec.PolicyTypes, Ingress: p.Spec.Ingress[1:]}
	if got, err := usable(p); got != p || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
}
