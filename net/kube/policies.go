package kube

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/client-go/tools/cache"

	"lamina/net/policy"
	"lamina/net/whole"
)

// known is what policies are made of, as it is on disk.
type known struct {
	Inventory policy.Inventory              `json:"inventory"`
	Policies  []*networkingv1.NetworkPolicy `json:"policies"`
}

// Start tells the controller what there is. While the API server is gone that is what was on disk.
func (k *Cluster) Start(c *policy.Controller) error {
	if !k.synced() {
		old, err := k.saved()
		if err != nil {
			return fmt.Errorf("policies: %w; and what they were is not known: %w", k.unhealthy(), err)
		}
		c.SetPolicies(old.Policies)
		c.SetInventory("kubernetes", old.Inventory)
		k.before = old.Inventory.Pods
	}
	k.mu.Lock()
	k.told = c
	k.mu.Unlock()
	if k.synced() {
		k.tell()
	}
	return nil
}

// Follow tells the controller what changes, until ctx is done.
func (k *Cluster) Follow(ctx context.Context) {
	var save <-chan time.Time // pending
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.policiesChanged:
			if !k.synced() {
				continue // Watch says when
			}
			k.tell()
			if save == nil {
				save = time.After(saveEvery)
			}
			if !sleep(ctx, settle) {
				return
			}
		case <-save:
			save = nil
			err := k.save()
			if err != nil {
				err = fmt.Errorf("what is known of policies: %w: an agent that starts while the API server is gone will not know them", err)
				save = time.After(saveEvery)
			}
			k.note("saving", err)
		}
	}
}

// tell sets what is known now.
func (k *Cluster) tell() {
	k.mu.Lock()
	now, err := k.gather()
	k.told.SetPolicies(now.Policies)
	k.told.SetInventory("kubernetes", now.Inventory)
	k.mu.Unlock()
	k.note("policies", err)
}

// gather is what is known. The error tells of policies that are not as they should be.
func (k *Cluster) gather() (now known, err error) {
	var errs []error
	for _, o := range k.pods.GetStore().List() {
		if p := o.(*corev1.Pod); p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed { // another may have its address
			now.Inventory.Pods = append(now.Inventory.Pods, podOf(p))
		}
	}
	for _, o := range k.namespaces.GetStore().List() {
		n := o.(*corev1.Namespace)
		now.Inventory.Namespaces = append(now.Inventory.Namespaces, policy.Namespace{Name: n.Name, Labels: n.Labels})
	}
	for _, o := range k.policies.GetStore().List() {
		p, err := usable(o.(*networkingv1.NetworkPolicy))
		if err != nil {
			errs = append(errs, err)
		}
		if p != nil {
			now.Policies = append(now.Policies, p)
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return now, errors.Join(errs...)
}

// usable is a policy without the rules that cannot be enforced: an API server may have stored, or let in, what others refuse.
// Such a rule allows nothing, and must not keep the other policies, and new pods, from being.
func usable(p *networkingv1.NetworkPolicy) (*networkingv1.NetworkPolicy, error) {
	wrong := policy.Validate(p)
	if wrong == nil {
		return p, nil
	}
	only := func(spec networkingv1.NetworkPolicySpec) bool {
		spec.PodSelector, spec.PolicyTypes = p.Spec.PodSelector, p.Spec.PolicyTypes
		return policy.Validate(&networkingv1.NetworkPolicy{ObjectMeta: p.ObjectMeta, Spec: spec}) == nil
	}
	out := p.DeepCopy()
	out.Spec.Ingress = slices.DeleteFunc(out.Spec.Ingress, func(r networkingv1.NetworkPolicyIngressRule) bool {
		return !only(networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{r}})
	})
	out.Spec.Egress = slices.DeleteFunc(out.Spec.Egress, func(r networkingv1.NetworkPolicyEgressRule) bool {
		return !only(networkingv1.NetworkPolicySpec{Egress: []networkingv1.NetworkPolicyEgressRule{r}})
	})
	effect := "a rule with that allows nothing"
	if policy.Validate(out) != nil {
		out, effect = nil, "it is not in force"
	}
	return out, fmt.Errorf("policy %s/%s: %w: %s; put it right in Kubernetes", p.Namespace, p.Name, wrong, effect)
}

// podOf is what policies need to know of a pod.
func podOf(p *corev1.Pod) policy.Pod {
	out := policy.Pod{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, HostNetwork: p.Spec.HostNetwork}
	ips := p.Status.PodIPs
	if len(ips) == 0 && p.Status.PodIP != "" {
		ips = []corev1.PodIP{{IP: p.Status.PodIP}}
	}
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out.Addrs = append(out.Addrs, a)
		}
	}
	sidecars := slices.DeleteFunc(slices.Clone(p.Spec.InitContainers), func(c corev1.Container) bool {
		return c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways
	})
	for _, c := range slices.Concat(p.Spec.Containers, sidecars) {
		for _, port := range c.Ports {
			if port.Name != "" {
				out.Ports = append(out.Ports, policy.Port{Name: port.Name, Protocol: port.Protocol, Port: uint16(port.ContainerPort)})
			}
		}
	}
	return out
}

// Await returns when the controller knows a pod: its kubelet may know it a moment earlier. The uid tells it from one that had
// the same name; empty: any.
func (k *Cluster) Await(ctx context.Context, namespace, name, uid string) error {
	ctx, cancel := context.WithTimeout(ctx, awaitPod)
	defer cancel()
	for {
		o, there, err := k.pods.GetStore().GetByKey(cache.NewObjectName(namespace, name).String())
		if err != nil {
			return err
		}
		if there && isPod(o.(*corev1.Pod), uid) {
			k.tell()
			return nil
		}
		if !k.synced() && slices.ContainsFunc(k.before, func(p policy.Pod) bool { return p.Namespace == namespace && p.Name == name }) {
			return nil // its sandbox is made anew: kubelets get no new pods now
		}
		if !sleep(ctx, 10*time.Millisecond) {
			err := fmt.Errorf("pod %s/%s is not known from Kubernetes yet, and so neither are its labels: the runtime tries again", namespace, name)
			return errors.Join(err, k.unhealthy())
		}
	}
}

// isPod says whether the kubelet means this pod. A pod from a file on its node has another uid there than in Kubernetes.
func isPod(p *corev1.Pod, uid string) bool {
	return uid == "" || string(p.UID) == uid || p.Annotations[corev1.MirrorPodAnnotationKey] == uid
}

// sort makes what has not changed the same bytes.
func (k *known) sort() {
	slices.SortFunc(k.Inventory.Pods, func(a, b policy.Pod) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	slices.SortFunc(k.Inventory.Namespaces, func(a, b policy.Namespace) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(k.Policies, func(a, b *networkingv1.NetworkPolicy) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
}

// save writes what is known to the disk, if it has changed.
func (k *Cluster) save() error {
	if k.opts.Saved == "" {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	now, _ := k.gather() // tell has told
	now.sort()
	b, err := json.Marshal(now)
	if err != nil || bytes.Equal(b, k.onDisk) {
		return err
	}
	if err := whole.Write(k.opts.Saved, b); err != nil {
		return err
	}
	k.onDisk = b
	return nil
}

func (k *Cluster) saved() (old known, err error) {
	if k.opts.Saved == "" {
		return old, os.ErrNotExist
	}
	b, err := os.ReadFile(k.opts.Saved)
	if err == nil {
		err = json.Unmarshal(b, &old)
	}
	return old, err
}
