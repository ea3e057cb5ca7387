package steer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"lamina/net/control"
	"lamina/net/fastpath"
	"lamina/net/overlay"
	"lamina/net/peers"
	"lamina/net/whole"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// PartOptions are an agent's for its steering.
type PartOptions struct {
	Pins     string // directory on a bpffs, which is mounted above it if nobody has; empty: in fastpath.Pins
	StateDir string // where it is kept what RPS masks were
	Mode     Mode
	Logf     func(format string, args ...any)

	change func(*options)         // of tests
	sample func() (sample, error) // nil: readSample
}

// Mode says how packets are spread.
type Mode int

const (
	Auto   Mode = iota // On, on hosts of [autoCPUs] or more; on others not at all, and Status says why
	On                 // by load where the kernel can; elsewhere not at all, and Status says why
	Static             // the first half of the CPUs for the VXLAN stage, the second for pods, by the kernel's hash
	Off                // what an earlier agent left is put back
)

// autoCPUs is from how many CPUs on there are some to choose from: with two, the other one is where the programs run that the
// packets are for, and single flows lost with every second kind of traffic that was measured.
const autoCPUs = 4

// ParseMode reads auto, on, static or off.
func ParseMode(s string) (Mode, error) {
	for m, name := range modeNames {
		if s == name {
			return Mode(m), nil
		}
	}
	return Off, fmt.Errorf("%q: use auto, on, static or off", s)
}

var modeNames = []string{Auto: "auto", On: "on", Static: "static", Off: "off"}

func (m Mode) String() string { return modeNames[m] }

// lookAtPods is how often pods' masks are looked at without a reason.
const lookAtPods = 10 * time.Second

// Part is the steering of an agent: it implements agent.Part.
type Part struct {
	opts    PartOptions
	overlay *overlay.Overlay
	host    sysfs
	stop    func()

	mu            sync.Mutex
	s             *steerer // nil: static or off
	why           error    // why it is off though it should not be
	online        cpuSet
	nic, device   int    // that are attached
	cpusOfDevice  cpuSet // that its RPS has
	cpusOfPods    cpuSet
	pods          map[string]control.Pod
	podProblems   map[string]error
	lookedAtPods  time.Time
	was           map[string]saved // masks, by the name of the VXLAN device and by pods' IDs
	sampleProblem error
}

// NewPart makes the steering of an agent.
func NewPart(o PartOptions) *Part {
	if o.Pins == "" {
		o.Pins = filepath.Join(fastpath.Pins, "steer")
	}
	if o.sample == nil {
		o.sample = readSample
	}
	return &Part{opts: o, pods: map[string]control.Pod{}, podProblems: map[string]error{}, was: map[string]saved{}}
}

// PartName is steering's in a status.
const PartName = "steering"

// Name is PartName.
func (p *Part) Name() string { return PartName }

// Start attaches to the underlay and the VXLAN device; pods follow by PodAdded.
func (p *Part) Start(o *overlay.Overlay) error {
	p.overlay = o
	if err := p.readMasks(); err != nil {
		return err
	}
	err := p.start()
	if err == nil || p.opts.Mode == Off {
		return err
	}
	undo := p.putBackAll()
	if !errors.Is(err, ErrNotSupported) {
		return errors.Join(err, undo)
	}
	p.why = err
	p.opts.Logf("%v: packets stay on the CPU that the kernel gives them", err)
	return undo
}

func (p *Part) start() (err error) {
	c := p.overlay.Config()
	if p.host, err = openSysfs(c.NS); err != nil {
		return err
	}
	if p.opts.Mode == Off {
		return p.putBackAll()
	}
	if err := p.lookAtCPUs(); err != nil {
		return err
	}
	if len(p.online) < 2 {
		return fmt.Errorf("%w: this host has one CPU", ErrNotSupported)
	}
	if p.opts.Mode == Auto && len(p.online) < autoCPUs {
		return fmt.Errorf("%w: this host has %d CPUs and handing packets over pays from %d on; --steering=on does it all the same", ErrNotSupported, len(p.online), autoCPUs)
	}
	if p.opts.Mode == Static {
		if err := removePins(p.opts.Pins); err != nil {
			return err
		}
		return p.refresh()
	}
	if err := fastpath.Mount(mountPoint(p.opts.Pins)); err != nil {
		return err
	}
	o := options{ns: c.NS, pins: p.opts.Pins, vni: uint32(c.VNI), port: uint16(c.Port)}
	if p.opts.change != nil {
		p.opts.change(&o)
	}
	if p.s, err = open(o); err != nil {
		return err
	}
	if err := p.refresh(); err != nil {
		return err
	}
	if err := p.look(); err != nil {
		return err
	}
	p.watch()
	return nil
}

// mountPoint is where a bpffs is expected for a directory in the fast path's.
func mountPoint(pins string) string { return filepath.Dir(filepath.Dir(pins)) }

// watch looks at the CPUs until Close.
func (p *Part) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(period)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				err := p.look()
				p.mu.Lock()
				p.sampleProblem = err
				p.mu.Unlock()
			}
		}
	})
	p.stop = func() { cancel(); wg.Wait() }
}

// look tells the programs how busy CPUs are.
func (p *Part) look() error {
	at := monotonic()
	now, err := p.opts.sample()
	if err != nil {
		return err
	}
	return p.s.look(now, at)
}

// lookAtCPUs finds out which CPUs are online, and what masks should be.
func (p *Part) lookAtCPUs() error {
	now, err := p.opts.sample()
	if err != nil {
		return err
	}
	if slices.Equal(now.set(), p.online) {
		return nil
	}
	p.online = now.set()
	p.cpusOfDevice, p.cpusOfPods = p.online, p.online
	if p.opts.Mode == Static {
		p.cpusOfDevice, p.cpusOfPods = halves(p.online)
	}
	p.lookedAtPods = time.Time{}
	return nil
}

func halves(s cpuSet) (first, second cpuSet) { return s[:(len(s)+1)/2], s[(len(s)+1)/2:] }

// Refresh follows the underlay, the VXLAN device and the CPUs, and puts masks right.
func (p *Part) Refresh() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.opts.Mode == Off || p.why != nil {
		return nil
	}
	return p.refresh()
}

func (p *Part) refresh() error {
	if err := p.lookAtCPUs(); err != nil {
		return err
	}
	name := p.overlay.Config().Device
	nic, device := p.overlay.Underlay().Index, p.overlay.Index(name)
	if device == 0 {
		return nil // whoever removes it calls for the next
	}
	if err := p.attach(nic, device); err != nil {
		return err
	}
	is, was, changed, err := p.host.hold(name, device, p.cpusOfDevice, p.was[name])
	if err != nil {
		return err
	}
	if changed {
		p.was[name] = was
		if err := p.writeMasks(); err != nil {
			return err
		}
	}
	if err := p.follow(is); err != nil {
		return err
	}
	if time.Since(p.lookedAtPods) < lookAtPods {
		return nil
	}
	p.lookedAtPods = time.Now()
	for _, pod := range p.pods {
		p.hold(pod)
	}
	return p.writeMasks()
}

// attach follows the interfaces.
func (p *Part) attach(nic, device int) error {
	if p.s == nil {
		return nil
	}
	if p.nic != 0 && p.nic != nic {
		if err := p.s.detach("nic", p.nic); err != nil {
			return err
		}
	}
	if p.device != 0 && p.device != device {
		if err := p.s.detach("device", p.device); err != nil {
			return err
		}
	}
	if err := errors.Join(p.s.attach("device", device), p.s.attach("nic", nic), p.s.setDevice(device)); err != nil {
		return fmt.Errorf("steering: %w", err)
	}
	p.nic, p.device = nic, device
	return nil
}

// follow takes the CPUs that the kernel has made of a mask: without those that are isolated.
func (p *Part) follow(is cpuSet) error {
	if p.opts.Mode == Static {
		return nil
	}
	if len(is) < 2 {
		return fmt.Errorf("%w: of the CPUs %v receive packet steering may use %v", ErrNotSupported, p.online, is)
	}
	if slices.Equal(is, p.s.cpus) {
		return nil
	}
	p.cpusOfDevice, p.cpusOfPods = is, is
	return p.s.setCPUs(is)
}

// PodAdded steers packets to a pod. A pod that cannot be steered has its network all the same.
func (p *Part) PodAdded(pod control.Pod) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.opts.Mode == Off || p.why != nil {
		return nil
	}
	p.pods[pod.ID] = pod
	p.hold(pod)
	return p.writeMasks()
}

// hold makes a pod's program and masks as they should be, and notes what cannot be.
func (p *Part) hold(pod control.Pod) {
	err := p.holdPod(pod)
	if err == nil || errors.Is(err, unix.ENODEV) { // its interface has just been removed, and it is about to be
		delete(p.podProblems, pod.ID)
		return
	}
	if was := p.podProblems[pod.ID]; was == nil || was.Error() != err.Error() {
		p.opts.Logf("steering: pod %s: %v", pod.Address, err)
	}
	p.podProblems[pod.ID] = err
}

func (p *Part) holdPod(pod control.Pod) error {
	if p.s != nil { // before the masks: without it the kernel spreads what comes from this host
		if err := p.s.attach("pod", pod.Index); err != nil {
			return err
		}
	}
	return inPod(pod, func(s sysfs, index int) error {
		_, was, changed, err := s.hold(pod.Interface, index, p.cpusOfPods, p.was[pod.ID])
		if changed {
			p.was[pod.ID] = was
		}
		return err
	})
}

// inPod calls f with a pod's interfaces and the index of its own.
func inPod(pod control.Pod, f func(s sysfs, index int) error) error {
	h, err := netns.GetFromPath(pod.Netns)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w: the agent needs to see it to spread the pod's packets", pod.Netns, err)
	}
	defer h.Close()
	nl, err := netlink.NewHandleAt(h, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	l, err := nl.LinkByName(pod.Interface)
	if err != nil || l.Attrs().HardwareAddr.String() != pod.MAC.String() {
		return fmt.Errorf("network namespace %s: the pod's interface %s is not in it: %w", pod.Netns, pod.Interface, os.ErrNotExist)
	}
	s, err := openSysfs(h)
	if err != nil {
		return err
	}
	defer s.close()
	return f(s, l.Attrs().Index)
}

// PodRemoved forgets a pod. Its interfaces have gone, and with them what they had.
func (p *Part) PodRemoved(pod control.Pod) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	known, there := p.pods[pod.ID]
	if !there {
		return nil
	}
	delete(p.pods, pod.ID)
	delete(p.podProblems, pod.ID)
	delete(p.was, pod.ID)
	var err error
	if p.s != nil {
		err = p.s.detach("pod", known.Index)
	}
	return errors.Join(err, p.writeMasks())
}

// PeersChanging has nothing to do with steering.
func (p *Part) PeersChanging(_, _, _ []peers.Lease, apply func() error) error { return apply() }

// putBackAll takes everything off the host that an agent put there for steering.
func (p *Part) putBackAll() error {
	if p.s != nil {
		p.s.close()
		p.s = nil
	}
	errs := []error{removePins(p.opts.Pins)}
	c := p.overlay.Config()
	byID := map[string]control.Pod{}
	for _, pod := range p.overlay.Pods() {
		byID[pod.ID] = pod
	}
	for name, was := range p.was {
		if name == c.Device {
			errs = append(errs, p.host.putBack(name, p.overlay.Index(name), was))
		} else if pod, there := byID[name]; there {
			err := inPod(pod, func(s sysfs, index int) error { return s.putBack(pod.Interface, index, was) })
			if !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("steering: putting back: %w", err)
	}
	p.was = map[string]saved{}
	return p.writeMasks()
}

func (p *Part) masksFile() string { return filepath.Join(p.opts.StateDir, "steering.json") }

func (p *Part) readMasks() error {
	b, err := os.ReadFile(p.masksFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, &p.was)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: it holds what RPS masks were; remove it to give that up", p.masksFile(), err)
	}
	return nil
}

// writeMasks notes what masks were.
func (p *Part) writeMasks() error {
	if len(p.was) == 0 {
		if err := os.Remove(p.masksFile()); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.Marshal(p.was)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(p.masksFile()); err == nil && string(old) == string(b) {
		return nil
	}
	if err := os.MkdirAll(p.opts.StateDir, 0o700); err != nil {
		return err
	}
	return whole.Write(p.masksFile(), b)
}

// PartStatus is what a Part tells of itself.
type PartStatus struct {
	State     string                 `json:"state"` // "on", "static", "off", or why not
	CPUs      []CPUStatus            `json:"cpus"`
	Saturated bool                   `json:"saturated"`  // the host has no CPU time to spare: nothing is handed over
	Pods      int                    `json:"pods"`       // whose packets are spread
	NotSpread map[string]string      `json:"not_spread"` // addresses of pods whose packets stay on the VXLAN stage's CPU, and why
	Stages    map[string]StageStatus `json:"stages"`
}

// CPUStatus is a CPU that packets may be handed to.
type CPUStatus struct {
	Number    int     `json:"number"`
	Busy      float64 `json:"busy"`      // 0 to 1, of the last quarter second or so
	Receiving float64 `json:"receiving"` // the part of it that was in interrupts: packets, mostly
}

// StageStatus is what was chosen for a stage since the maps were made.
type StageStatus struct {
	Packets map[int]map[int]uint64 `json:"packets"` // by the CPU that chose and the CPU that was chosen
	Moves   uint64                 `json:"moves"`   // of flows from CPU to CPU
	Reasons map[string]uint64      `json:"reasons"` // packets by why they went where they went
}

// Counts are the packets that went to another CPU, and all.
func (s StageStatus) Counts() (over, all uint64) {
	for from, row := range s.Packets {
		for to, n := range row {
			all += n
			if to != from {
				over += n
			}
		}
	}
	return over, all
}

// HandedOver is the part of the packets that went to another CPU; 0 if there were none.
func (s StageStatus) HandedOver() float64 {
	over, all := s.Counts()
	if all == 0 {
		return 0
	}
	return float64(over) / float64(all)
}

// String is a line for people.
func (s PartStatus) String() string {
	if s.State != "on" {
		return s.State
	}
	line := fmt.Sprintf("on, %d CPUs", len(s.CPUs))
	if s.Saturated {
		line += " without time to spare"
	}
	if n := len(s.NotSpread); n > 0 {
		line += fmt.Sprintf(", %d pods not spread", n)
	}
	return line + fmt.Sprintf("; handed over: %.1f%% of packets to the VXLAN stage, %.1f%% to pods; flows moved %d times",
		100*s.Stages[VXLAN.String()].HandedOver(), 100*s.Stages[Pod.String()].HandedOver(), s.Stages[VXLAN.String()].Moves+s.Stages[Pod.String()].Moves)
}

// Status is a PartStatus.
func (p *Part) Status() any {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := PartStatus{State: "on", CPUs: []CPUStatus{}, Pods: len(p.pods) - len(p.podProblems), NotSpread: map[string]string{}, Stages: map[string]StageStatus{}}
	for id, err := range p.podProblems {
		s.NotSpread[p.pods[id].Address.String()] = err.Error()
	}
	switch {
	case p.why != nil:
		s.State = "off: " + p.why.Error()
	case p.opts.Mode == Static || p.opts.Mode == Off:
		s.State = p.opts.Mode.String()
	}
	if p.s == nil {
		return s
	}
	c, err := p.s.counters()
	if err != nil {
		s.State = fmt.Sprint("on, but: ", err)
		return s
	}
	for stage := range stages {
		one := StageStatus{Packets: c.chosen[stage], Moves: c.moves[stage], Reasons: map[string]uint64{}}
		for r, n := range c.reasons[stage] {
			if n != 0 {
				one.Reasons[Reason(r).String()] = n
			}
		}
		s.Stages[stage.String()] = one
	}
	s.CPUs, s.Saturated = p.s.status()
	return s
}

func (s *steerer) status() (cpus []CPUStatus, saturated bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.cpus {
		cpus = append(cpus, CPUStatus{n, s.loads[n].busy, s.loads[n].receiving})
	}
	return cpus, s.control.Saturated != 0
}

// Problems are what is wrong now. A pod that is not spread is none: it has its network.
func (p *Part) Problems() (all []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sampleProblem != nil {
		all = append(all, p.sampleProblem.Error())
	}
	return all
}

// Close leaves programs and masks in the kernel. The programs hand nothing over when the heartbeat is missing.
func (p *Part) Close() error {
	if p.stop != nil {
		p.stop()
	}
	if p.s != nil {
		p.s.close()
	}
	if p.host.dir != 0 {
		p.host.close()
	}
	return nil
}
