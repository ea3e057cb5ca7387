package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"lamina/net/control"
	"lamina/net/overlay"
	"lamina/net/peers"
)

// Pins is where an agent keeps its maps and links, on a bpffs that is mounted above it if nobody has.
const Pins = "/sys/fs/bpf/lamina"

// PartOptions are an agent's for its fast path.
type PartOptions struct {
	Pins string // empty: Pins
	Mode Mode
	Logf func(format string, args ...any)
}

// Mode says when the fast path is used.
type Mode int

const (
	Auto Mode = iota // where the kernel can; elsewhere everything takes the ordinary path, and Status says why
	On               // a kernel that cannot is an error
	Off              // what an earlier agent left is removed
)

// Part is the fast path of an agent: it implements agent.Part.
type Part struct {
	opts PartOptions
	path *Path // nil: the kernel cannot
	why  error // why it cannot

	overlay *overlay.Overlay
	mu      sync.Mutex
	nic     overlay.Underlay // that is attached
	stop    func()
}

// NewPart makes the fast path of an agent.
func NewPart(o PartOptions) *Part {
	if o.Pins == "" {
		o.Pins = Pins
	}
	return &Part{opts: o}
}

// Pins is where the maps and links are.
func (p *Part) Pins() string { return p.opts.Pins }

// PartName is the fast path's in a status.
const PartName = "fastpath"

// Name is PartName.
func (p *Part) Name() string { return PartName }

// Start attaches to the underlay and serves the nodes there are; pods follow by PodAdded.
func (p *Part) Start(o *overlay.Overlay) error {
	p.overlay = o
	if p.opts.Mode == Off {
		return removePins(p.opts.Pins)
	}
	err := p.start()
	if errors.Is(err, ErrNotSupported) && p.opts.Mode == Auto {
		p.why = err
		p.opts.Logf("%v: everything takes the ordinary path", err)
		return nil
	}
	return err
}

func (p *Part) start() (err error) {
	if err := Mount(filepath.Dir(p.opts.Pins)); err != nil {
		return err
	}
	c := p.overlay.Config()
	p.path, err = Open(Options{
		NS: c.NS, Pins: p.opts.Pins, Node: c.Self.Node, MAC: c.Self.MAC.Hardware(), VNI: uint32(c.VNI), Port: uint16(c.Port), MTU: p.overlay.MTU(),
	})
	if err != nil {
		return err
	}
	if p.path.Interrupted() {
		// The policies, which start next, look at every connection of this node's pods in any case and end what they forbid.
		p.opts.Logf("fast path: an earlier agent ended in the middle of a change: the caches begin empty")
	}
	if err := p.Refresh(); err != nil {
		return err
	}
	if err := p.setNodes(p.overlay.Peers()); err != nil {
		return err
	}
	p.path.Heartbeat()
	p.path.Enable(true)
	p.beat()
	return nil
}

// beat tells the programs that somebody looks after them until Close.
func (p *Part) beat() {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(p.path.o.Heartbeat / 6)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				p.path.Heartbeat()
			}
		}
	})
	p.stop = func() { close(done); wg.Wait() }
}

// Refresh follows the underlay: its interface and its MTU.
func (p *Part) Refresh() error {
	if p.path == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.overlay.Underlay()
	if now == p.nic {
		return nil
	}
	var err error
	if p.nic.Index != 0 && p.nic.Index != now.Index {
		err = p.path.DetachNIC(p.nic.Index)
	}
	p.path.SetMTU(p.overlay.MTU())
	if aerr := p.path.AttachNIC(now.Name); aerr != nil {
		return errors.Join(err, aerr)
	}
	p.nic = now
	return err
}

// setNodes makes the nodes known those of the leases.
func (p *Part) setNodes(want []peers.Lease) error {
	var errs []error
	for node, prefixes := range p.path.Nodes() {
		if !slices.ContainsFunc(want, func(l peers.Lease) bool { return l.Node == node && slices.Equal(prefixes, []netip.Prefix{l.Prefix}) }) {
			errs = append(errs, p.path.RemoveNode(node))
		}
	}
	for _, l := range want {
		errs = append(errs, p.path.SetNode(l.Node, l.Prefix))
	}
	return errors.Join(errs...)
}

// PodAdded serves a pod.
func (p *Part) PodAdded(l control.Pod) error {
	if p.path == nil {
		return nil
	}
	return p.path.AttachPod(Pod{Addrs: []netip.Addr{l.Address}, Index: l.Index, MAC: l.MAC.Hardware(), Gateway: control.GatewayMAC.Hardware()})
}

// PodRemoved forgets a pod, its connections included.
func (p *Part) PodRemoved(l control.Pod) error {
	if p.path == nil {
		return nil
	}
	return p.path.DetachPod(l.Address)
}

// Forgets says that PodRemoved has removed the pod's connections from conntrack.
func (p *Part) Forgets() bool { return p.path != nil }

// PeersChanging takes nodes that go or change off the fast path before the ordinary path changes, and puts them on it
// afterwards: what is on its way meanwhile teaches nothing.
func (p *Part) PeersChanging(_, changed, removed []peers.Lease, apply func() error) error {
	if p.path == nil {
		return apply()
	}
	var errs []error
	for _, l := range append(slices.Clone(changed), removed...) {
		for node, prefixes := range p.path.Nodes() {
			if slices.Contains(prefixes, l.Prefix) {
				errs = append(errs, p.path.RemoveNode(node))
			}
		}
	}
	errs = append(errs, apply(), p.setNodes(p.overlay.Peers()))
	return errors.Join(errs...)
}

// Guard stops learning and voids what was learned of pods until after is called: what surrounds a change of policies. Whoever
// changes them forgets the connections that they forbid.
func (p *Part) Guard(pods []netip.Addr) (after func(), err error) {
	if p.path == nil {
		return func() {}, nil
	}
	begun, done, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- p.path.Change(Change{Pods: pods, Keep: func(Flow) bool { return true }, Apply: func() error {
			close(begun)
			<-done
			return nil
		}})
	}()
	<-begun // Change calls Apply in any case
	return func() {
		close(done)
		if err := <-ended; err != nil {
			p.opts.Logf("fast path: %v", err)
		}
	}, nil
}

// PartStatus is what a Part tells of itself.
type PartStatus struct {
	State    string                       `json:"state"`         // "on", or why not
	Egress   float64                      `json:"egress_ratio"`  // part of the packets to other nodes' pods that were hits
	Ingress  float64                      `json:"ingress_ratio"` // the same of packets from them
	Counters map[string]map[string]uint64 `json:"counters"`      // packets by program and reason
}

// Status is a PartStatus.
func (p *Part) Status() any {
	s := PartStatus{State: "on", Counters: map[string]map[string]uint64{}}
	if p.path == nil {
		s.State = "off"
		if p.why != nil {
			s.State = "off: " + p.why.Error()
		}
		return s
	}
	c, err := p.path.Counters()
	if err != nil {
		s.State = fmt.Sprint("on, but: ", err)
		return s
	}
	s.Egress, s.Ingress = c.Ratio(Egress), c.Ratio(Ingress)
	c.Each(func(prog Program, r Reason, n uint64) {
		if s.Counters[prog.String()] == nil {
			s.Counters[prog.String()] = map[string]uint64{}
		}
		s.Counters[prog.String()][r.String()] = n
	})
	return s
}

// Close leaves programs and caches in the kernel. They rest when the heartbeat is stale, until the next agent.
func (p *Part) Close() error {
	if p.path == nil {
		return nil
	}
	if p.stop != nil {
		p.stop()
	}
	return p.path.Close()
}
