package policy

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"sigs.k8s.io/knftables"

	"lamina/net/control"
	"lamina/net/overlay"
	"lamina/net/peers"
)

// PartOptions are an agent's for its policies.
type PartOptions struct {
	Dir      string // of policy files; empty: none
	PodsFile string // empty: none
	StateDir string // of the agent: copies of policies in force lie in "policies" below it
	Feed     Feed   // nil: none
	// Around is EnforcerOptions.Around.
	Around func(p *Plan, apply func() error) error
	Logf   func(format string, args ...any)
}

// Feed is where policies and pods come from besides files: Kubernetes.
type Feed interface {
	// Start tells a controller what is known, before its first pass.
	Start(*Controller) error
	// Follow tells it what changes, until ctx is done.
	Follow(ctx context.Context)
	// Await returns when the controller has been told of a pod of this name; uid, if it is not empty, says which.
	Await(ctx context.Context, namespace, name, uid string) error
}

// Part is the policies of an agent: it implements agent.Part and overlay.Policy.
type Part struct {
	opts PartOptions

	mu       sync.Mutex // what follows
	enforcer *Enforcer  // nil before Start
	control  *Controller
	pods     map[string]Pod // by ID, those of this node
	stop     func()
}

var _ overlay.Policy = (*Part)(nil)

// patience bounds a change.
const patience = 20 * time.Second

// NewPart makes the policies of an agent.
func NewPart(opts PartOptions) *Part { return &Part{opts: opts, pods: map[string]Pod{}} }

// PartName is the policies' in a status.
const PartName = "policies"

// Name is PartName.
func (p *Part) Name() string { return PartName }

// Controller is how Kubernetes' pods and policies come in; nil before Start.
func (p *Part) Controller() *Controller {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.control
}

// Render is for the overlay when it makes the table anew.
func (p *Part) Render(tx *knftables.Transaction) error {
	p.mu.Lock()
	e := p.enforcer
	p.mu.Unlock()
	if e == nil {
		return nil // Start does it
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return e.Render(ctx, tx)
}

// Start enforces what there is for the pods there are, all at once, and goes on watching.
func (p *Part) Start(o *overlay.Overlay) error {
	cfg := o.Config()
	e, err := NewEnforcer(EnforcerOptions{NetNS: cfg.NS, Around: p.opts.Around})
	if err != nil {
		return err
	}
	c, err := NewController(e, ControllerOptions{Dir: p.opts.Dir, PodsFile: p.opts.PodsFile, Keep: filepath.Join(p.opts.StateDir, "policies"),
		Node: []netip.Prefix{cfg.Self.Prefix}, Report: p.report})
	if err != nil {
		return err
	}
	for _, pod := range o.Pods() {
		// A label that is not valid failed ADD, so it is not there.
		p.pods[pod.ID], _ = fromLease(pod)
	}
	if p.opts.Feed != nil {
		if err := p.opts.Feed.Start(c); err != nil {
			return err
		}
	}
	p.mu.Lock()
	p.enforcer, p.control = e, c
	p.mu.Unlock()
	if err := p.sync(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Run(ctx); err != nil {
			p.opts.Logf("policies: %v: changes of files are not seen before the agent is started again", err)
		}
	})
	if p.opts.Feed != nil {
		wg.Go(func() { p.opts.Feed.Follow(ctx) })
	}
	p.stop = func() { cancel(); wg.Wait() }
	return nil
}

func (p *Part) report(err error) {
	if err == nil {
		p.opts.Logf("policies: all in order")
		return
	}
	for _, e := range flatten(err) {
		p.opts.Logf("policies: %v", e)
	}
}

// sync makes the kernel follow the node's pods.
func (p *Part) sync() error {
	var inv Inventory
	for _, id := range sorted(p.pods) {
		inv.Pods = append(inv.Pods, p.pods[id])
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	p.control.SetInventory("cni", inv)
	return p.control.Sync(ctx)
}

// fromLease makes a pod of what CNI said. Labels that Kubernetes would refuse are an error: the pod would escape the policies
// that are meant for it.
func fromLease(l control.Pod) (Pod, error) {
	pod := Pod{Namespace: l.Namespace, Name: l.Name, Labels: l.Labels, Addrs: []netip.Addr{l.Address}}
	if pod.Namespace == "" {
		pod.Namespace = "default"
	}
	if pod.Name == "" {
		pod.Name = l.Container
	}
	if err := validLabels(l.Labels); err != nil {
		return pod, fmt.Errorf("labels of pod %s: %w: use labels as Kubernetes allows them", pod.key(), err)
	}
	return pod, nil
}

// Prepare waits for a pod's labels, which the node's CNI plugin does not know when they come from Kubernetes.
func (p *Part) Prepare(l control.Pod) error {
	if p.opts.Feed == nil || l.Namespace == "" || l.Name == "" {
		return nil
	}
	return p.opts.Feed.Await(context.Background(), l.Namespace, l.Name, l.UID)
}

// PodAdded has the pod's policies in force when it returns.
func (p *Part) PodAdded(l control.Pod) error {
	pod, err := fromLease(l)
	if err != nil {
		return err
	}
	if have, ok := p.pods[l.ID]; ok && have.key() == pod.key() && have.Addrs[0] == pod.Addrs[0] {
		return nil // Start did it
	}
	p.pods[l.ID] = pod
	return p.sync()
}

// PodRemoved takes the pod out of all rules.
func (p *Part) PodRemoved(l control.Pod) error {
	delete(p.pods, l.ID)
	return p.sync()
}

// PeersChanging changes nothing here: policies know pods, not nodes.
func (p *Part) PeersChanging(_, _, _ []peers.Lease, apply func() error) error { return apply() }

// Refresh has nothing to follow: policies do not know the underlay.
func (p *Part) Refresh() error { return nil }

// Status is a Status.
func (p *Part) Status() any {
	p.mu.Lock()
	c, e := p.control, p.enforcer
	p.mu.Unlock()
	if c == nil {
		return Status{}
	}
	s := c.Status()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	if s.Dropped, err = e.Dropped(ctx); err != nil {
		s.Problems = append(s.Problems, err.Error())
	}
	return s
}

// Problems are what is wrong now.
func (p *Part) Problems() []string {
	if c := p.Controller(); c != nil {
		return c.Status().Problems
	}
	return nil
}

// Close stops watching. The rules stay.
func (p *Part) Close() error {
	if p.stop != nil {
		p.stop()
	}
	return nil
}
