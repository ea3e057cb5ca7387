// Package agent is `lamina net agent`: it holds a node's part of the pod network. It learns from a source of peers which
// nodes there are, from the leases on disk and from the CNI plugin which pods there are, and from the kernel when something
// has been changed or deleted; it makes the overlay as it should be and says so on a socket.
//
// All that carries packets is the kernel's: an agent that is killed leaves everything working, and the next one finds it as
// it should be and changes nothing.
package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"lamina/net/control"
	"lamina/net/ipam"
	"lamina/net/overlay"
	"lamina/net/peers"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Config is what an agent is made of. Overlay.NS, Source, Listener and StateDir are required.
type Config struct {
	Overlay    overlay.Config // what Self lacks comes from Source if that is a peers.Registry, else from the peer with an address of this host
	Source     peers.Source
	SourceName string        // for people, such as "file /etc/lamina/peers"
	Listener   net.Listener  // of the control socket
	StateDir   string        // where leases are
	HoldDown   time.Duration // how long a released address rests; 0: ipam.HoldDown; negative: not at all
	Version    string
	Logf       func(format string, args ...any)
	Parts      []Part
}

// Part is something that works on top of the ordinary path. The agent calls one method at a time.
type Part interface {
	// Name is its key in a status.
	Name() string
	// Start is called when the overlay is in order for the first time.
	Start(*overlay.Overlay) error
	// PodAdded is called before a pod's interface is up, and on start for each pod there is, after Start. A part that fails
	// here fails the pod.
	PodAdded(control.Pod) error
	// PodRemoved is called when a pod's interface is gone and before its address can be given to another; of the last part
	// first. A part whose method Forgets() bool says so has removed the pod's connections from conntrack then.
	PodRemoved(control.Pod) error
	// PeersChanging surrounds a change of peers; the part calls apply once.
	PeersChanging(added, changed, removed []peers.Lease, apply func() error) error
	// Status is its value in a status. A part with a method Problems() []string has these among the status's problems.
	Status() any
	// Refresh is called after something was put right: the underlay may be another, or have another MTU.
	Refresh() error
	// Close is called last. What it left in the kernel keeps working.
	Close() error
}

// Times.
const (
	startPatience = 30 * time.Second       // how long a source may take to say something
	lookAgain     = 30 * time.Second       // everything is looked at without a reason, in case one was missed
	repairDelay   = 5 * time.Millisecond   // notifications come in bursts
	longestDelay  = 2 * time.Second        // between repairs when somebody else keeps undoing them
	calm          = 200 * time.Millisecond // without a reason to look after a repair: nobody undoes it
	maxRepaired   = 20                     // repairs that a status lists
)

// Agent is a running agent.
type Agent struct {
	cfg      Config
	registry peers.Registry // nil: the source is none
	overlay  *overlay.Overlay
	pool     ipam.Pool
	started  time.Time

	mu       sync.Mutex // one change at a time
	pods     map[string]control.Pod
	problems map[string]error // by what they are about
	repairs  uint64
	repaired []control.Repair
	noted    *known // as it is on disk
}

// Run is an agent from its start until ctx is done. An error before ready is called means that nothing was changed.
func Run(ctx context.Context, cfg Config, ready func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var first []peers.Lease
	var gone error // why the registry says nothing, if it does not
	registry, _ := cfg.Source.(peers.Registry)
	if registry != nil {
		var err error
		if first, gone, err = cfg.join(ctx, registry); ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
	}
	updates, err := cfg.Source.Watch(ctx)
	if err == nil && gone == nil {
		first, err = firstUpdate(updates)
	}
	if err != nil {
		return err
	}
	a, err := start(cfg, first)
	if err != nil {
		return err
	}
	defer a.close()
	if a.registry = registry; gone != nil {
		a.problem("registry", fmt.Errorf("%w; the peers known before stay", gone))
	} else {
		a.remember(first)
	}
	return a.run(ctx, updates, ready)
}

// start makes everything as it should be for the first time.
func start(cfg Config, first []peers.Lease) (_ *Agent, err error) {
	if !cfg.Overlay.Self.Node.IsValid() || !cfg.Overlay.Self.Prefix.IsValid() {
		if cfg.Overlay.Self, err = self(cfg.Overlay.NS, cfg.Overlay.Self, first); err != nil {
			return nil, err
		}
	}
	if cfg.Overlay.Self.MAC == (peers.MAC{}) {
		cfg.Overlay.Self.MAC = ownMAC(cfg.Overlay.Self, first)
	}
	o, err := overlay.New(cfg.Overlay)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, overlay: o, started: time.Now(), pods: map[string]control.Pod{}, problems: map[string]error{},
		pool: ipam.Pool{Dir: control.LeaseDir(cfg.StateDir), Prefix: cfg.Overlay.Self.Prefix, HoldDown: cfg.HoldDown},
	}
	if err := a.bringUp(first); err != nil {
		o.Close()
		return nil, err
	}
	return a, nil
}

func firstUpdate(updates <-chan peers.Update) ([]peers.Lease, error) {
	select {
	case u := <-updates:
		return u.Leases, u.Err
	case <-time.After(startPatience):
		return nil, errors.New("the source of peers says nothing")
	}
}

// self completes the own lease from the peers: it is the one whose node is an address of this host.
func self(h netns.NsHandle, known peers.Lease, all []peers.Lease) (peers.Lease, error) {
	nl, err := netlink.NewHandleAt(h, unix.NETLINK_ROUTE)
	if err != nil {
		return known, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	addrs, err := nl.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return known, fmt.Errorf("addresses: %w", err)
	}
	var local []string
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		if ip.IsLoopback() {
			continue
		}
		local = append(local, ip.String())
		for _, l := range all {
			if l.Node == ip && (!known.Node.IsValid() || known.Node == ip) {
				if known.Prefix.IsValid() {
					l.Prefix = known.Prefix
				}
				return l, nil
			}
		}
	}
	return known, fmt.Errorf("no peer has an address of this host (%s): add this node to the peers, or name its address and prefix with --node-ip and --pod-cidr",
		strings.Join(local, ", "))
}

// ownMAC is what the peers are told that this node's MAC is.
func ownMAC(own peers.Lease, all []peers.Lease) peers.MAC {
	for _, l := range all {
		if l.Node == own.Node {
			return l.MAC
		}
	}
	return peers.MAC{}
}

// bringUp changes nothing unless the peers can be used, and undoes a first start that fails.
func (a *Agent) bringUp(first []peers.Lease) error {
	others, err := a.overlay.CheckPeers(first)
	if err != nil {
		return fmt.Errorf("peers (%s): %w", a.cfg.SourceName, err)
	}
	leases, err := a.pool.List()
	if err != nil {
		return err
	}
	for _, l := range leases {
		p := podOf(l)
		a.pods[l.ID] = p
		a.overlay.SetPod(p)
	}
	a.overlay.SetPeers(others)
	before := a.overlay.Exists()
	if _, err := a.overlay.Reconcile(); err != nil {
		if !before {
			err = errors.Join(err, a.overlay.Remove())
		}
		return err
	}
	return a.startParts()
}

func (a *Agent) startParts() error {
	for _, p := range a.cfg.Parts {
		if err := p.Start(a.overlay); err != nil {
			return fmt.Errorf("%s: %w", p.Name(), err)
		}
		for _, pod := range a.pods {
			pod.Index = a.overlay.Index(pod.HostInterface)
			if pod.Index == 0 {
				continue // it is about to be added or deleted
			}
			if err := p.PodAdded(pod); err != nil {
				return fmt.Errorf("%s: pod %s: %w", p.Name(), pod.Address, err)
			}
		}
	}
	return nil
}

func podOf(l ipam.Lease) control.Pod {
	return control.Pod{Lease: l, HostInterface: control.HostInterface(l.ID), MAC: control.PodMAC(l.Address)}
}

// close leaves in the kernel what carries packets.
func (a *Agent) close() {
	for _, p := range slices.Backward(a.cfg.Parts) {
		if err := p.Close(); err != nil {
			a.cfg.Logf("%s: %v", p.Name(), err)
		}
	}
	a.overlay.Close()
}

func (a *Agent) run(ctx context.Context, updates <-chan peers.Update, ready func()) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	server := a.server()
	wg.Go(func() {
		if err := server.Serve(a.cfg.Listener); ctx.Err() == nil {
			cancel(fmt.Errorf("control socket: %w", err))
		}
	})
	defer server.Close()
	events := make(chan overlay.Event, 1)
	wg.Go(func() {
		if err := a.overlay.Watch(ctx, func(e overlay.Event) { merge(events, e) }); err != nil && ctx.Err() == nil {
			cancel(err)
		}
	})
	if a.registry != nil {
		wg.Go(func() { a.keep(ctx) })
	}
	ready()
	a.loop(ctx, updates, events)
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// merge puts an event into a channel of capacity one that has one sender.
func merge(events chan overlay.Event, e overlay.Event) {
	select {
	case was := <-events:
		e.Links, e.Rules = e.Links || was.Links, e.Rules || was.Rules
	default:
	}
	events <- e
}

func (a *Agent) loop(ctx context.Context, updates <-chan peers.Update, events <-chan overlay.Event) {
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	delay, last := repairDelay, time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case u, ok := <-updates:
			if !ok {
				updates = nil
				continue
			}
			a.peersUpdate(u)
		case <-again.C:
			a.repair(overlay.Event{Links: true, Rules: true})
		case e := <-events:
			if time.Since(last) > calm {
				delay = repairDelay
			}
			// Not with the lock held: an interface that is being removed is mostly a pod's, whose DEL comes next and goes first.
			a.overlay.Settle()
			if !sleep(ctx, delay) {
				return
			}
			select {
			case more := <-events:
				e.Links, e.Rules = e.Links || more.Links, e.Rules || more.Rules
			default:
			}
			if a.repair(e) {
				last = time.Now()
				delay = min(2*delay, longestDelay)
			}
		}
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

// repair looks at what an event is about, and says whether anything was put right.
func (a *Agent) repair(e overlay.Event) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	look := a.overlay.ReconcileLinks
	if e.Rules {
		look = a.overlay.Reconcile
	}
	done, err := look()
	a.problem("overlay", err)
	for _, p := range a.cfg.Parts {
		a.problem(p.Name(), p.Refresh())
	}
	now := time.Now()
	for _, what := range done {
		a.cfg.Logf("repaired: %s", what)
		a.repairs++
		a.repaired = append(a.repaired, control.Repair{Time: now, What: what})
	}
	a.repaired = a.repaired[max(0, len(a.repaired)-maxRepaired):]
	return len(done) > 0
}

// problem notes what is wrong about something, and logs when that changes.
func (a *Agent) problem(about string, err error) {
	was := a.problems[about]
	switch {
	case err == nil && was != nil:
		a.cfg.Logf("%s: in order again", about)
		delete(a.problems, about)
	case err != nil:
		if was == nil || was.Error() != err.Error() {
			a.cfg.Logf("%s: %v", about, err)
		}
		a.problems[about] = err
	}
}

// peersUpdate takes over what the source says. What cannot be used changes nothing: the peers known before stay.
func (a *Agent) peersUpdate(u peers.Update) {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := u.Err
	var others []peers.Lease
	if err == nil {
		if others, err = a.overlay.CheckPeers(u.Leases); err != nil {
			err = fmt.Errorf("%s: %w", a.cfg.SourceName, err)
		}
	}
	if err != nil {
		a.problem("peers", fmt.Errorf("%w; the peers known before stay", err))
		return
	}
	a.problem("peers", nil)
	a.remember(u.Leases)
	added, changed, removed := peers.Diff(a.overlay.Peers(), others)
	if len(added)+len(changed)+len(removed) == 0 {
		return
	}
	a.cfg.Logf("peers: %d added, %d changed, %d removed; %d now", len(added), len(changed), len(removed), len(others))
	apply := func() error {
		a.overlay.SetPeers(others)
		_, err := a.overlay.Reconcile()
		return err
	}
	for _, p := range a.cfg.Parts {
		inner := apply
		apply = func() error { return p.PeersChanging(added, changed, removed, inner) }
	}
	a.problem("overlay", apply())
}

// podAdded takes a pod on. What a part needs to know of it first (its method Prepare) may take a while.
func (a *Agent) podAdded(p control.Pod) error {
	for _, part := range a.cfg.Parts {
		if first, ok := part.(interface{ Prepare(control.Pod) error }); ok {
			if err := first.Prepare(p); err != nil {
				return fmt.Errorf("%s: %w", part.Name(), err)
			}
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !p.Address.IsValid() || !a.cfg.Overlay.Self.Prefix.Contains(p.Address) {
		return fmt.Errorf("pod address %s is not of this node's prefix %s", p.Address, a.cfg.Overlay.Self.Prefix)
	}
	p.HostInterface, p.MAC = control.HostInterface(p.ID), control.PodMAC(p.Address)
	for i, part := range a.cfg.Parts {
		if err := part.PodAdded(p); err != nil {
			for _, done := range a.cfg.Parts[:i] {
				_ = done.PodRemoved(p)
			}
			return fmt.Errorf("%s: %w", part.Name(), err)
		}
	}
	a.pods[p.ID] = p
	a.overlay.SetPod(p)
	return nil
}

// podRemoved forgets a pod, with its connections: whoever gets the address next is somebody else.
func (a *Agent) podRemoved(id string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, there := a.pods[id]
	if !there {
		return nil
	}
	a.overlay.RemovePod(id)
	delete(a.pods, id)
	var errs []error
	for _, part := range slices.Backward(a.cfg.Parts) {
		if err := part.PodRemoved(p); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", part.Name(), err))
		}
	}
	// Looking through conntrack takes milliseconds however little is in it: once is enough.
	forgets := func(part Part) bool { f, ok := part.(interface{ Forgets() bool }); return ok && f.Forgets() }
	if !slices.ContainsFunc(a.cfg.Parts, forgets) {
		errs = append(errs, a.overlay.Forget(func(addr netip.Addr) bool { return addr == p.Address }))
	}
	return errors.Join(errs...)
}

func (a *Agent) node() control.Node {
	self := a.overlay.Config().Self
	return control.Node{Lease: self, Host: self.Host(), MTU: a.overlay.MTU(), StateDir: a.cfg.StateDir, HoldDown: a.cfg.HoldDown}
}

func (a *Agent) status() (control.Status, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.overlay.Config()
	under := a.overlay.Underlay()
	s := control.Status{
		Version: a.cfg.Version, PID: os.Getpid(), Started: a.started, Node: a.node(), Device: c.Device, VNI: c.VNI, Port: c.Port,
		Underlay: control.Underlay{Interface: under.Name, MTU: under.MTU}, Source: a.cfg.SourceName, Pods: len(a.pods),
		Peers: []control.Peer{}, Repairs: a.repairs, Repaired: slices.Clone(a.repaired), Problems: []string{}, Parts: map[string]any{},
	}
	states, err := a.overlay.PeerState()
	if err != nil {
		return s, err
	}
	for _, l := range a.overlay.Peers() {
		s.Peers = append(s.Peers, control.Peer{Lease: l, State: states[l]})
	}
	for about, err := range a.problems {
		s.Problems = append(s.Problems, about+": "+err.Error())
	}
	if err := a.countAddresses(&s); err != nil {
		return s, err
	}
	for _, p := range a.cfg.Parts {
		s.Parts[p.Name()] = p.Status()
		if w, ok := p.(interface{ Problems() []string }); ok {
			for _, problem := range w.Problems() {
				s.Problems = append(s.Problems, p.Name()+": "+problem)
			}
		}
	}
	slices.Sort(s.Problems)
	return s, nil
}

func (a *Agent) countAddresses(s *control.Status) error {
	leases, err := a.pool.List()
	if err != nil {
		return err
	}
	s.Addresses = control.Addresses{Size: a.pool.Size(), Leased: len(leases)}
	for _, l := range leases {
		if l.Err != nil {
			s.Addresses.Damaged++
			s.Problems = append(s.Problems, l.Err.Error())
		}
	}
	s.Addresses.Resting, err = a.pool.Resting()
	return err
}
