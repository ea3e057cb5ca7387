// Package kube has an agent's peers, pods and policies from Kubernetes: it is a [peers.Registry] and a [policy.Feed].
//
// A node's prefix is its Node's podCIDR. That an agent runs on it, and at which address it is to be reached, is an
// annotation that the agent writes ([Annotation]); a Node without it is no peer. Nodes, Pods, Namespaces and
// NetworkPolicies are listed once and watched from then on. While the API server is gone everything stays as it was, and
// what was known is on disk for an agent that starts meanwhile.
//
// Of client-go this uses the REST client and the informers; its typed clients would double what it adds to the program's
// start.
package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"lamina/net/peers"
	"lamina/net/policy"
)

// Annotation is what an agent writes on its Node: the node's address on the underlay and the MAC of its VXLAN device, with a
// space between them.
const Annotation = "lamina/node"

// Times.
const (
	requestTimeout = 10 * time.Second
	awaitPod       = 5 * time.Second       // how long a pod may be known to its kubelet and not here; the CNI plugin waits for 20 s
	settle         = 50 * time.Millisecond // changes come in bursts
	saveEvery      = 2 * time.Second       // pods come and go all the time; what is on disk may be as old as that
	again          = time.Second           // after an error
)

// Options say which cluster and which of its nodes.
type Options struct {
	Config *rest.Config
	// Node is the name of this node's Node.
	Node string
	// Saved is a file for what is known of pods and policies; empty: nothing outlives the agent.
	Saved string
}

// Config reads a kubeconfig file; without one it is that of the pod that this program runs in.
func Config(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
		}
		return c, nil
	}
	c, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("this is no pod of a cluster (KUBERNETES_SERVICE_HOST is not set): name a kubeconfig file with --kubeconfig")
	}
	return c, err
}

// Cluster is what an agent knows of its cluster.
type Cluster struct {
	opts       Options
	core       rest.Interface
	nodes      cache.SharedInformer
	pods       cache.SharedInformer
	namespaces cache.SharedInformer
	policies   cache.SharedInformer

	before []policy.Pod // on disk, when the API server is gone at the start

	nodesChanged, policiesChanged, stateChanged chan struct{} // of capacity one

	mu     sync.Mutex       // what follows
	wrong  map[string]error // by resource, why it cannot be listed or watched; and what else there is
	told   *policy.Controller
	onDisk []byte
}

var (
	_ peers.Registry = (*Cluster)(nil)
	_ policy.Feed    = (*Cluster)(nil)
)

// quiet keeps client-go from writing to standard error what Keep tells. It may not while a client works.
var quiet = sync.OnceFunc(func() { klog.SetLogger(logr.Discard()) })

// New makes a Cluster. It does not connect yet.
func New(opts Options) (*Cluster, error) {
	if opts.Node == "" {
		return nil, errors.New("this node's name is missing: give it with --node-name or NODE_NAME")
	}
	quiet()
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), networkingv1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	codecs := serializer.NewCodecFactory(scheme).WithoutConversion()
	client := func(path string, group schema.GroupVersion) (*rest.RESTClient, error) {
		c := rest.CopyConfig(opts.Config)
		c.APIPath, c.GroupVersion, c.NegotiatedSerializer = path, &group, codecs
		c.ContentType = runtime.ContentTypeProtobuf
		c.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
		c.UserAgent = "lamina-net-agent"
		return rest.RESTClientFor(c)
	}
	core, err := client("/api", corev1.SchemeGroupVersion)
	if err != nil {
		return nil, fmt.Errorf("client of Kubernetes: %w", err)
	}
	networking, err := client("/apis", networkingv1.SchemeGroupVersion)
	if err != nil {
		return nil, fmt.Errorf("client of Kubernetes: %w", err)
	}
	signal := func() chan struct{} { return make(chan struct{}, 1) }
	k := &Cluster{opts: opts, core: core, nodesChanged: signal(), policiesChanged: signal(), stateChanged: signal(), wrong: map[string]error{}}
	k.nodes = k.informer(core, "nodes", &corev1.Node{}, k.nodesChanged)
	k.pods = k.informer(core, "pods", &corev1.Pod{}, k.policiesChanged)
	k.namespaces = k.informer(core, "namespaces", &corev1.Namespace{}, k.policiesChanged)
	k.policies = k.informer(networking, "networkpolicies", &networkingv1.NetworkPolicy{}, k.policiesChanged)
	return k, nil
}

func (k *Cluster) informer(c cache.Getter, resource string, object runtime.Object, changed chan struct{}) cache.SharedInformer {
	from := cache.NewListWatchFromClient(c, resource, metav1.NamespaceAll, fields.Everything())
	i := cache.NewSharedInformer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := from.ListWithContextFunc(ctx, o)
			k.health(ctx, resource, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := from.WatchFuncWithContext(ctx, o)
			if !apierrors.IsInvalid(err) && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) { // then it is listed
				k.health(ctx, resource, err)
			}
			return w, err
		},
	}, object, 0)
	poke := func() { k.poke(changed) }
	_, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { poke() }, UpdateFunc: func(_, _ any) { poke() }, DeleteFunc: func(any) { poke() },
	})
	err = errors.Join(err, i.SetTransform(strip), i.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) {}))
	if err != nil {
		panic(err) // it has not started
	}
	return i
}

func (k *Cluster) poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// strip drops what nobody here reads: a large cluster's pods are most of the agent's memory.
func strip(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		o.ManagedFields, o.OwnerReferences = nil, nil
		maps.DeleteFunc(o.Annotations, func(key, _ string) bool { return key != corev1.MirrorPodAnnotationKey })
		for _, all := range [][]corev1.Container{o.Spec.Containers, o.Spec.InitContainers} {
			for i, c := range all {
				all[i] = corev1.Container{Name: c.Name, Ports: c.Ports, RestartPolicy: c.RestartPolicy}
			}
		}
		o.Spec = corev1.PodSpec{Containers: o.Spec.Containers, InitContainers: o.Spec.InitContainers, HostNetwork: o.Spec.HostNetwork}
		o.Status = corev1.PodStatus{Phase: o.Status.Phase, PodIP: o.Status.PodIP, PodIPs: o.Status.PodIPs}
	case *corev1.Node:
		o.ManagedFields = nil
		o.Status = corev1.NodeStatus{Addresses: o.Status.Addresses}
	case *corev1.Namespace:
		o.ManagedFields, o.Annotations = nil, nil
	case *networkingv1.NetworkPolicy:
		o.ManagedFields, o.Annotations = nil, nil
	}
	return o, nil
}

// health notes whether a resource could be listed or watched.
func (k *Cluster) health(ctx context.Context, resource string, err error) {
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		err = k.failed(resource, err)
	}
	k.note(resource, err)
}

// note notes what is wrong about something.
func (k *Cluster) note(about string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.wrong[about] = err; err == nil {
		delete(k.wrong, about)
	}
	k.poke(k.stateChanged)
}

// failed names the API server in an error. Unless it refused, it is peers.ErrUnreachable.
func (k *Cluster) failed(doing string, err error) error {
	name := k.Name()
	var u *url.Error
	switch {
	case errors.As(err, &u): // no answer; what was asked is a long URL, and another each time
		return peers.Unreachable(fmt.Errorf("%s: %w: is the API server running and reachable?", name, u.Err))
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s: %s: %w: the token or certificate is not accepted: renew that of the kubeconfig file or of the service account", name, doing, err)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s: %s: %w: apply the ClusterRole of deploy/kubernetes/lamina-net.yaml", name, doing, err)
	}
	return peers.Unreachable(fmt.Errorf("%s: %s: %w: is the API server running and reachable?", name, doing, err))
}

// Name is the cluster for people.
func (k *Cluster) Name() string { return "Kubernetes at " + k.opts.Config.Host }

// unhealthy is everything that is wrong. Of several that fail alike one is told.
func (k *Cluster) unhealthy() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var refused []error
	for _, resource := range slices.Sorted(maps.Keys(k.wrong)) {
		if err := k.wrong[resource]; errors.Is(err, peers.ErrUnreachable) {
			return err
		} else {
			refused = append(refused, err)
		}
	}
	return errors.Join(refused...)
}

func (k *Cluster) informers() []cache.SharedInformer {
	return []cache.SharedInformer{k.nodes, k.pods, k.namespaces, k.policies}
}

func (k *Cluster) synced() bool {
	return !slices.ContainsFunc(k.informers(), func(i cache.SharedInformer) bool { return !i.HasSynced() })
}

// Join is the own node's lease by its Node, which gets the annotation.
func (k *Cluster) Join(ctx context.Context, own peers.Lease) (peers.Lease, error) {
	node := &corev1.Node{}
	reading := "reading Node " + k.opts.Node
	switch err := k.request(ctx, k.core.Get().Resource("nodes").Name(k.opts.Node), node); {
	case apierrors.IsNotFound(err):
		return own, fmt.Errorf("%s: %s: there is none: give the name that `kubectl get nodes` shows with --node-name or NODE_NAME", k.Name(), reading)
	case err != nil:
		return own, k.failed(reading, err)
	}
	prefix, err := podCIDR(node)
	if err == nil && !prefix.IsValid() {
		// A new Node gets one a moment after it was made.
		return own, peers.Unreachable(fmt.Errorf("%s: Node %s has no IPv4 podCIDR: does kube-controller-manager run with --allocate-node-cidrs and --cluster-cidr?", k.Name(), node.Name))
	}
	if err != nil {
		return own, err
	}
	own.Prefix = prefix
	if !own.Node.IsValid() {
		for _, a := range node.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); a.Type == corev1.NodeInternalIP && err == nil && ip.Is4() {
				own.Node = ip
				break
			}
		}
		if !own.Node.IsValid() {
			return own, fmt.Errorf("%s: Node %s has no IPv4 InternalIP: give the kubelet --node-ip, or the agent", k.Name(), node.Name)
		}
	}
	if own.MAC == (peers.MAC{}) {
		own.MAC = peers.NodeMAC(own.Node)
	}
	return own, k.annotate(ctx, node, own)
}

// podCIDR is a Node's IPv4 prefix, not valid when it has none.
func podCIDR(n *corev1.Node) (netip.Prefix, error) {
	all := n.Spec.PodCIDRs
	if len(all) == 0 && n.Spec.PodCIDR != "" {
		all = []string{n.Spec.PodCIDR}
	}
	for _, s := range all {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return p, fmt.Errorf("podCIDR %q of Node %s is not a prefix", s, n.Name)
		}
		if p.Addr().Is4() {
			return p, nil
		}
	}
	return netip.Prefix{}, nil
}

func annotation(l peers.Lease) string { return l.Node.String() + " " + l.MAC.String() }

// request does a request that has one answer.
func (k *Cluster) request(ctx context.Context, r *rest.Request, into runtime.Object) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return r.Do(ctx).Into(into)
}

// annotate writes the own annotation if it is not there. It goes by the Node's status: who may write that cannot write its spec.
func (k *Cluster) annotate(ctx context.Context, n *corev1.Node, own peers.Lease) error {
	if n.Annotations[Annotation] == annotation(own) {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{Annotation: annotation(own)}}})
	if err != nil {
		return err
	}
	err = k.request(ctx, k.core.Patch(types.MergePatchType).Resource("nodes").Name(k.opts.Node).SubResource("status").Body(patch), &corev1.Node{})
	if err != nil {
		return k.failed("annotating Node "+k.opts.Node, err)
	}
	return nil
}

// Watch sends the other nodes' leases once everything is known, also of pods and policies, and again whenever they change.
// Before that, what is wrong with the API server is an update; afterwards Keep tells it.
func (k *Cluster) Watch(ctx context.Context) (<-chan peers.Update, error) {
	out := make(chan peers.Update, 1)
	var wg sync.WaitGroup
	for _, i := range k.informers() {
		wg.Go(func() { i.RunWithContext(ctx) })
	}
	go func() {
		defer close(out)
		defer wg.Wait()
		k.watch(ctx, out)
	}()
	return out, nil
}

func (k *Cluster) watch(ctx context.Context, out chan peers.Update) {
	said := ""
	for !k.synced() {
		if err := k.unhealthy(); err != nil && err.Error() != said {
			said = err.Error()
			peers.Send(out, peers.Update{Err: err})
		}
		if !sleep(ctx, settle) {
			return
		}
	}
	k.poke(k.nodesChanged)
	k.poke(k.policiesChanged)
	var last *peers.Update
	for wait(ctx, k.nodesChanged) {
		u := k.leases()
		if last == nil || !last.Same(u) { // a Node changes every few minutes and with each image
			peers.Send(out, u)
			last = &u
		}
		if !sleep(ctx, settle) {
			return
		}
	}
}

// wait waits for a signal, false when ctx is done.
func wait(ctx context.Context, c <-chan struct{}) bool {
	select {
	case <-ctx.Done():
		return false
	case <-c:
		return true
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// leases are those of all other Nodes that have an agent. One whose annotation cannot be read is an error.
func (k *Cluster) leases() peers.Update {
	all := []peers.Lease{}
	var errs []error
	for _, o := range k.nodes.GetStore().List() {
		n := o.(*corev1.Node)
		a, there := n.Annotations[Annotation]
		if !there || n.Name == k.opts.Node {
			continue
		}
		l, err := lease(n, a)
		if err != nil {
			errs = append(errs, err)
		} else if l.Prefix.IsValid() {
			all = append(all, l)
		}
	}
	slices.SortFunc(all, func(a, b peers.Lease) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), a.Node.Compare(b.Node))
	})
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return peers.Update{Leases: all, Err: errors.Join(errs...)}
}

func lease(n *corev1.Node, annotation string) (l peers.Lease, err error) {
	node, mac, _ := strings.Cut(annotation, " ")
	if l.Node, err = netip.ParseAddr(node); err == nil {
		l.MAC, err = peers.ParseMAC(mac)
	}
	if err != nil {
		return l, fmt.Errorf("annotation %s of Node %s: %w: remove it, its agent writes it anew", Annotation, n.Name, err)
	}
	l.Prefix, err = podCIDR(n)
	return l, err
}

// Keep keeps the annotation on the own Node, and tells report what is wrong with the API server or the Node. Watch must have
// been called.
func (k *Cluster) Keep(ctx context.Context, own peers.Lease, report func(error)) {
	told := "nothing"
	tick := time.NewTicker(again)
	defer tick.Stop()
	for ctx.Err() == nil {
		err := k.unhealthy()
		if err == nil && k.nodes.HasSynced() {
			err = k.checkOwn(ctx, own)
		}
		if ready := err != nil || k.synced(); ready && fmt.Sprint(err) != told {
			told = fmt.Sprint(err)
			report(err)
		}
		select {
		case <-ctx.Done():
		case <-k.stateChanged:
		case <-tick.C:
		}
	}
}

// checkOwn compares the own Node with what this agent is.
func (k *Cluster) checkOwn(ctx context.Context, own peers.Lease) error {
	o, there, err := k.nodes.GetStore().GetByKey(k.opts.Node)
	if err != nil || !there {
		return errors.Join(err, fmt.Errorf("%s: this Node %s is gone: other nodes do not reach its pods; the kubelet makes it when it starts", k.Name(), k.opts.Node))
	}
	node := o.(*corev1.Node)
	if prefix, err := podCIDR(node); err != nil || prefix != own.Prefix {
		return errors.Join(err, fmt.Errorf("%s: Node %s now has podCIDR %q, its pods have addresses of %s: drain the node and start the agent again",
			k.Name(), k.opts.Node, prefix, own.Prefix))
	}
	return k.annotate(ctx, node, own)
}
