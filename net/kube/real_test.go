//go:build kubernetes

package kube

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"lamina/net/lab"
	"lamina/net/lab/etcdserver"
	"lamina/net/peers"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"
)

var program = flag.String("kube-apiserver", "kube-apiserver", "Kubernetes' own API server to test with (`make kubernetes` builds one)")

// realServer is Kubernetes' API server, on an etcd of the test's.
type realServer struct {
	t       *testing.T
	args    []string
	address string
	cert    string
	dir     string
	cmd     *exec.Cmd
	admin   dynamic.Interface
}

func newReal(t *testing.T) *realServer {
	t.Helper()
	etcd := etcdserver.New(t, "http://127.0.0.1:0", transport.TLSInfo{}, nil)
	cert, key := lab.Certificate(t, netip.MustParseAddr("127.0.0.1"))
	dir := t.TempDir()
	tokens := filepath.Join(dir, "tokens")
	must(t, os.WriteFile(tokens, []byte("admin,admin,1,system:masters\nsecret,system:serviceaccount:kube-system:lamina-net,2\n"), 0o600))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(address)
	s := &realServer{t: t, address: address, cert: cert, dir: dir, args: []string{
		"--etcd-servers=" + etcd.URL, "--bind-address=127.0.0.1", "--secure-port=" + port, "--cert-dir=" + dir,
		"--tls-cert-file=" + cert, "--tls-private-key-file=" + key, "--token-auth-file=" + tokens, "--authorization-mode=RBAC",
		"--service-account-issuer=https://test", "--service-account-key-file=" + cert, "--service-account-signing-key-file=" + key,
		"--service-cluster-ip-range=10.0.0.0/24", "--disable-admission-plugins=ServiceAccount", "--allow-privileged=true",
	}}
	c, err := Config(s.kubeconfig("admin"))
	must(t, err)
	s.admin, err = dynamic.NewForConfig(c)
	must(t, err)
	t.Cleanup(s.stop)
	s.start()
	return s
}

func (s *realServer) kubeconfig(token string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, token)
	must(s.t, lab.Kubeconfig(path, s.address, s.cert, token))
	return path
}

func (s *realServer) start() {
	s.t.Helper()
	s.cmd = exec.Command(*program, s.args...)
	var log bytes.Buffer
	s.cmd.Stderr = &log
	must(s.t, s.cmd.Start())
	deadline := time.Now().Add(2 * time.Minute)
	for {
		_, err := s.resource("v1", "namespaces", "").Get(s.t.Context(), "kube-system", metav1.GetOptions{})
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the API server does not start: %v\n%s", err, &log)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (s *realServer) stop() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

func (s *realServer) resource(version, resource, namespace string) dynamic.ResourceInterface {
	gv, err := schema.ParseGroupVersion(version)
	must(s.t, err)
	r := s.admin.Resource(gv.WithResource(resource))
	if namespace != "" {
		return r.Namespace(namespace)
	}
	return r
}

// apply makes objects of YAML documents, or changes them.
func (s *realServer) apply(text string) {
	s.t.Helper()
	for document := range strings.SplitSeq(text, "\n---\n") {
		u := &unstructured.Unstructured{}
		must(s.t, yaml.Unmarshal([]byte(document), &u.Object))
		resource := map[string]string{"NetworkPolicy": "networkpolicies"}[u.GetKind()]
		if resource == "" {
			resource = strings.ToLower(u.GetKind()) + "s"
		}
		r := s.resource(u.GetAPIVersion(), resource, u.GetNamespace())
		b, err := u.MarshalJSON()
		must(s.t, err)
		made, err := r.Patch(s.t.Context(), u.GetName(), types.MergePatchType, b, metav1.PatchOptions{})
		if apierrors.IsNotFound(err) {
			made, err = r.Create(s.t.Context(), u, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict})
		}
		if err != nil {
			s.t.Fatalf("%s %s: %v", u.GetKind(), u.GetName(), err)
		}
		if status, there := u.Object["status"]; there {
			made.Object["status"] = status
			if _, err := r.UpdateStatus(s.t.Context(), made, metav1.UpdateOptions{}); err != nil {
				s.t.Fatalf("status of %s %s: %v", u.GetKind(), u.GetName(), err)
			}
		}
	}
}

// With Kubernetes' own API server: it takes the manifest, the account that the manifest makes is enough, and what it sends is
// understood.
func TestRealAPIServer(t *testing.T) {
	srv := newReal(t)
	manifest, err := os.ReadFile("../../deploy/kubernetes/lamina-net.yaml")
	must(t, err)
	srv.apply(string(manifest))
	srv.apply(`
apiVersion: v1
kind: Node
metadata: {name: one}
spec: {podCIDR: 10.0.1.0/24, podCIDRs: [10.0.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: two, annotations: {lamina/node: 192.0.2.2 0e:6c:c0:00:02:02}}
spec: {podCIDR: 10.0.2.0/24, podCIDRs: [10.0.2.0/24]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {tier: gold}}
---
apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: web, labels: {app: web}}
spec: {nodeName: one, containers: [{name: web, image: x, ports: [{name: http, containerPort: 80}]}]}
status: {phase: Running, podIP: 10.0.1.2, podIPs: [{ip: 10.0.1.2}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: web}
spec: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: http}]}]}`)
	c, err := Config(srv.kubeconfig("secret"))
	must(t, err)
	k, err := New(Options{Config: c, Node: "one"})
	must(t, err)
	own, err := k.Join(t.Context(), peers.Lease{})
	must(t, err)
	if own.String() != "10.0.1.0/24 on 192.0.2.1" {
		t.Errorf("own lease: %s", own)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	updates, err := k.Watch(ctx)
	must(t, err)
	tells, hear := keeper(t)
	wg.Go(func() { k.Keep(ctx, own, hear) })
	expect := func(what string, want string) {
		t.Helper()
		deadline := time.After(time.Minute)
		for {
			select {
			case u := <-updates:
				if got := fmt.Sprint(u.Leases, u.Err); got == want {
					return
				}
				t.Logf("%s: %v %v", what, u.Leases, u.Err)
			case <-deadline:
				t.Fatal(what)
			}
		}
	}
	expect("the other node", "[10.0.2.0/24 on 192.0.2.2] <nil>")
	now, err := k.gather()
	must(t, err)
	if len(now.Policies) != 1 || len(now.Policies[0].Spec.PolicyTypes) != 1 {
		t.Errorf("policies: %v", now.Policies)
	}
	if len(now.Inventory.Pods) != 1 || !reflect.DeepEqual(now.Inventory.Pods[0].Addrs, []netip.Addr{netip.MustParseAddr("10.0.1.2")}) || len(now.Inventory.Pods[0].Ports) != 1 {
		t.Errorf("pods: %+v", now.Inventory.Pods)
	}
	annotated := func() error {
		n, err := srv.resource("v1", "nodes", "").Get(t.Context(), "one", metav1.GetOptions{})
		if err == nil && n.GetAnnotations()[Annotation] != annotation(own) {
			err = fmt.Errorf("annotations %v", n.GetAnnotations())
		}
		return err
	}
	must(t, annotated())
	cordon := []byte(`{"spec": {"unschedulable": true}}`)
	patch := k.core.Patch(types.MergePatchType).Resource("nodes").Name("two")
	if err := k.request(t.Context(), patch.Body(cordon), &corev1.Node{}); !apierrors.IsForbidden(err) {
		t.Errorf("the account may change a Node's spec: %v", err)
	}
	patch = k.core.Patch(types.MergePatchType).Resource("nodes").Name("two").SubResource("status")
	if n := (&corev1.Node{}); k.request(t.Context(), patch.Body(cordon), n) == nil && n.Spec.Unschedulable {
		t.Error("the account may change a Node's spec by its status")
	}
	srv.apply(`{apiVersion: v1, kind: Node, metadata: {name: one, annotations: {lamina/node: null}}}`)
	eventually(t, "the annotation is back", annotated)
	srv.apply(`{apiVersion: v1, kind: Pod, metadata: {namespace: shop, name: web, labels: {app: other}}}`)
	eventually(t, "another label", func() error {
		if now, _ := k.gather(); now.Inventory.Pods[0].Labels["app"] != "other" {
			return fmt.Errorf("%v", now.Inventory.Pods)
		}
		return nil
	})
	tells("")
	srv.stop()
	tells("is the API server running and reachable?")
	srv.start()
	srv.apply(`{apiVersion: v1, kind: Node, metadata: {name: two, annotations: {lamina/node: 192.0.2.22 0e:6c:c0:00:02:02}}}`)
	expect("the other node's address", "[10.0.2.0/24 on 192.0.2.22] <nil>")
	tells("")
	must(t, srv.resource("v1", "nodes", "").Delete(t.Context(), "two", metav1.DeleteOptions{}))
	expect("no other node", "[] <nil>")
}
