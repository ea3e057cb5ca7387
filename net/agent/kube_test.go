package agent_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"lamina/net/kube"
	"lamina/net/lab"
	"lamina/net/lab/apiserver"
	"lamina/net/lab/cluster"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// rules are those of the ClusterRole that Lamina's manifest gives the agent.
func rules(t *testing.T) []rbacv1.PolicyRule {
	t.Helper()
	all, err := os.ReadFile("../../deploy/kubernetes/lamina-net.yaml")
	must(t, err)
	for document := range bytes.SplitSeq(all, []byte("\n---\n")) {
		var role rbacv1.ClusterRole
		must(t, yaml.Unmarshal(document, &role))
		if role.Kind == "ClusterRole" {
			return role.Rules
		}
	}
	t.Fatal("the manifest has no ClusterRole")
	return nil
}

func node(name string, prefix netip.Prefix, addr netip.Addr, annotation string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDR: prefix.String(), PodCIDRs: []string{"fd00::/64", prefix.String()}}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: addr.String()}}
	if annotation != "" {
		n.Annotations = map[string]string{kube.Annotation: annotation}
	}
	return n
}

func kubePod(name string, labels map[string]string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-of-" + name), Labels: labels}}
	p.Spec.Containers = []corev1.Container{{Name: "main", Ports: []corev1.ContainerPort{{Name: "echo", ContainerPort: 7000, Protocol: corev1.ProtocolTCP}}}}
	return p
}

// env is what a runtime tells the CNI plugin of a pod of Kubernetes.
func env(p *corev1.Pod) string {
	return fmt.Sprintf("CNI_ARGS=K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_UID=%s", p.Namespace, p.Name, p.UID)
}

// Three nodes of a cluster, whose API server is a stand-in that lets the agents do what their ClusterRole says.
func TestKubernetes(t *testing.T) {
	var api *apiserver.Server
	var config string
	c := cluster.From(t, 3, func(c *cluster.Cluster, h *lab.Host) []string {
		if api == nil {
			cert, key := lab.Certificate(t, c.Outside.Addr)
			api = apiserver.New(t, apiserver.Options{Address: c.Outside.Addr.String() + ":6443", Cert: cert, Key: key, Token: "secret", Rules: rules(t), In: c.Outside.Do})
			config = api.Kubeconfig("secret")
			for i, h := range c.Hosts {
				api.Put(node(fmt.Sprint("node", i+1), h.Prefix, h.Addr, ""))
			}
			api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"tier": "gold"}}})
		}
		for i := range c.Hosts {
			if c.Hosts[i] == h {
				return []string{"--kubernetes", "--kubeconfig", config, "--node-name", fmt.Sprint("node", i+1)}
			}
		}
		return nil
	})
	n1, n2, n3 := c.Nodes[0], c.Nodes[1], c.Nodes[2]
	for _, n := range c.Nodes {
		status(t, "all know all", n, 2)
	}
	pod := func(n *cluster.Node, p *corev1.Pod) *cluster.Pod {
		t.Helper()
		api.Put(p)
		made := n.Pod(env(p))
		p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: made.Addr.String(), PodIPs: []corev1.PodIP{{IP: made.Addr.String()}}}
		api.Put(p)
		return made
	}
	serverObject, clientObject := kubePod("server", map[string]string{"app": "server"}), kubePod("client", map[string]string{"app": "client"})
	server, client := pod(n1, serverObject), pod(n2, clientObject)
	echo := server.Echo(7000)
	talks(t, client.Node, server.Addr, echo, client.Addr)
	conn, err := client.Dial("tcp", netip.AddrPortFrom(server.Addr, 7000))
	must(t, err)
	defer conn.Close()

	// Nodes that appear, change and go. The agents' own are annotated.
	annotated := node("node1", netip.Prefix{}, netip.Addr{}, "")
	api.Get(annotated)
	if got := annotated.Annotations[kube.Annotation]; got != "192.168.77.1 0e:6c:c0:a8:4d:01" {
		t.Errorf("annotation %q", got)
	}
	entries := func(what, want string, there bool) {
		t.Helper()
		eventually(t, what, func() error {
			got := n1.Run("ip", "route", "show", "10.99.9.0/24") + n1.Run("ip", "neigh", "show", "10.99.9.1") + n1.Run("bridge", "fdb", "show", "dev", "lamina0")
			if strings.Contains(got, want) != there {
				return fmt.Errorf("want %q: %v, in %s", want, there, got)
			}
			return nil
		})
	}
	fourth, there := netip.MustParsePrefix("10.99.9.0/24"), netip.MustParseAddr("192.168.77.9")
	api.Put(node("node9", fourth, there, "")) // has no agent yet
	api.Put(node("node9", fourth, there, "192.168.77.9 0e:6c:c0:a8:4d:09"))
	entries("a node appears", "10.99.9.1 dev lamina0", true)
	api.Put(node("node9", fourth, there, "192.168.77.9 0e:00:00:00:00:09"))
	entries("its MAC changes", "lladdr 0e:00:00:00:00:09", true)
	api.Put(node("node9", fourth, there, "192.168.77.19 0e:00:00:00:00:09"))
	entries("its address changes", "dst 192.168.77.19", true)
	api.Put(node("node9", fourth, there, "somewhere"))
	status(t, "an annotation that is none", n1, 3, "annotation lamina/node of Node node9", "the peers known before stay")
	api.Delete(node("node9", fourth, there, ""))
	entries("it disappears", "10.99.9.", false)
	status(t, "and all is well", n1, 2)

	// Policies on real traffic, and labels that change.
	reaches := func(what string, from *cluster.Pod, want bool) {
		t.Helper()
		eventually(t, what, func() error {
			out, err := from.Command("ping", "-c", "1", "-W", "0.3", server.Addr.String()).CombinedOutput()
			if (err == nil) != want {
				return fmt.Errorf("%v, want reached %v: %s", err, want, out)
			}
			return nil
		})
	}
	allow := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "server"}}
	allow.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	allow.Spec.PodSelector.MatchLabels = map[string]string{"app": "server"}
	allow.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"tier": "gold"}},
		PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"app": "client"}},
	}}}}
	api.Put(allow)
	other := pod(n1, kubePod("other", nil))
	reaches("another pod is shut out", other, false)
	reaches("the client is let in", client, true)
	must(t, conn.Exchange(10_000))
	clientObject.Labels = map[string]string{"app": "former"}
	api.Put(clientObject)
	reaches("the client has another label", client, false)
	if err := conn.Exchange(1000); err == nil {
		t.Error("a connection goes on that the policy forbids")
	}
	conn.Close()
	clientObject.Labels = map[string]string{"app": "client"}
	api.Put(clientObject)
	reaches("the label is back", client, true)
	api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"tier": "tin"}}})
	reaches("the namespace has another label", client, false)
	api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"tier": "gold"}}})
	reaches("the namespace's label is back", client, true)
	if conn, err = client.Dial("tcp", netip.AddrPortFrom(server.Addr, 7000)); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	// A pod whose kubelet knows it before its agent: it has its policy from the first packet. The pod of the same name that
	// was there before is another.
	early := kubePod("early", nil)
	early.UID = "former"
	api.Put(early)
	early = kubePod("early", map[string]string{"app": "server"})
	go func() {
		time.Sleep(300 * time.Millisecond)
		api.Put(early)
	}()
	late := n1.Pod(env(early))
	if out, err := other.Command("ping", "-c", "1", "-W", "0.3", late.Addr.String()).CombinedOutput(); err == nil {
		t.Errorf("a new pod has no policy at first: %s", out)
	}
	if out, err := client.Command("ping", "-c", "1", "-W", "10", late.Addr.String()).CombinedOutput(); err != nil {
		t.Errorf("nobody reaches a new pod: %v: %s", err, out)
	}

	// The API server goes: everything stays, also over a restart of the agent.
	eventually(t, "what is known is on disk", func() error {
		b, err := os.ReadFile(filepath.Join(n1.State(), "kubernetes.json"))
		if err == nil && !bytes.Contains(b, []byte(`"early"`)) {
			err = fmt.Errorf("%s", b)
		}
		return err
	})
	api.Stop()
	gone := func(n *cluster.Node) {
		t.Helper()
		status(t, "without the API server", n, 2, "Kubernetes at https://192.168.77.200:6443", "is the API server running and reachable?")
	}
	gone(n1)
	lasting := func() string { return regexp.MustCompile(` expires \S+`).ReplaceAllString(state(n1), "") }
	before := lasting()
	n1.Kill()
	n1.Start()
	gone(n1)
	if now := lasting(); now != before {
		t.Errorf("an agent that starts without the API server: before:\n%s\nnow:\n%s", before, now)
	}
	must(t, conn.Exchange(10_000))
	reaches("another pod is still shut out", other, false)
	n1.Pod(env(kubePod("other", nil))) // one that is known, in a new sandbox
	unknown := n1.Namespace()
	unknown.Env = []string{env(kubePod("unknown", nil))}
	if _, err := unknown.Add(); err == nil || !strings.Contains(err.Error(), "pod shop/unknown is not known from Kubernetes yet") || !strings.Contains(err.Error(), "is the API server running") {
		t.Errorf("a pod whose labels are not known: %v", err)
	}
	api.Delete(allow)
	api.Start()
	for _, n := range c.Nodes {
		status(t, "the API server is back", n, 2)
	}
	reaches("what changed meanwhile", other, true)
	must(t, conn.Exchange(10_000))

	// The own Node: gone, made anew, with another prefix.
	api.Delete(node("node3", n3.Prefix, n3.Addr, ""))
	status(t, "a node is gone", n1, 1)
	status(t, "it knows", n3, 2, "this Node node3 is gone")
	api.Put(node("node3", n3.Prefix, n3.Addr, ""))
	status(t, "it is back, annotated anew", n1, 2)
	status(t, "it knows", n3, 2)
	api.Put(node("node3", netip.MustParsePrefix("10.99.33.0/24"), n3.Addr, ""))
	status(t, "its prefix is another", n3, 2, "Node node3 now has podCIDR \"10.99.33.0/24\"", "drain the node")

	// What cannot work says why.
	n3.Kill()
	for _, bad := range []struct{ args, want string }{
		{"--node-name elsewhere", "reading Node elsewhere: there is none: give the name that `kubectl get nodes` shows"},
		{"--kubeconfig " + api.Kubeconfig("wrong"), "the token or certificate is not accepted"},
		{"--pod-cidr 10.99.3.0/24", "--pod-cidr"},
	} {
		source := n3.Source
		n3.Source = append(source[:len(source):len(source)], strings.Fields(bad.args)...)
		if err := n3.Launch(); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s: %v", bad.args, err)
		}
		n3.Source = source
	}
}
