package fastpath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"lamina/net/ns"
	"lamina/net/overlay"
	"lamina/net/tcx"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
)

// Pod is a pod of this node.
type Pod struct {
	Addrs   []netip.Addr
	Index   int              // of the host's end of its veth pair
	MAC     net.HardwareAddr // of the pod's end
	Gateway net.HardwareAddr // of the host's end
}

// pinName is a link's file: programs are told apart by name, interfaces by their index, which is not used again for long.
func (p *Path) pinName(prog Program, index int) string {
	return filepath.Join(p.o.Pins, "links", fmt.Sprintf("%s-%d", prog, index))
}

func parsePinName(name string) (Program, int, error) {
	kind, number, _ := strings.Cut(name, "-")
	for i, n := range programNames {
		if n == kind {
			var index int
			_, err := fmt.Sscanf(number, "%d", &index)
			return Program(i), index, err
		}
	}
	return 0, 0, fmt.Errorf("pin %q is none of the fast path's", name)
}

func (p *Path) program(prog Program) (*ebpf.Program, ebpf.AttachType) {
	switch prog {
	case Egress:
		return p.obj.Egress, ebpf.AttachTCXIngress
	case Ingress:
		return p.obj.Ingress, ebpf.AttachTCXIngress
	case EgressLearn:
		return p.obj.EgressLearn, ebpf.AttachTCXEgress
	default:
		return p.obj.IngressLearn, ebpf.AttachTCXEgress
	}
}

// takeOverLinks makes every pinned link run this process's program, and removes those whose interface is gone.
func (p *Path) takeOverLinks() error {
	entries, err := os.ReadDir(filepath.Join(p.o.Pins, "links"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		prog, index, err := parsePinName(e.Name())
		if err != nil {
			return err
		}
		if err := p.attach(prog, index, false); err != nil {
			return err
		}
	}
	return nil
}

// attach makes the program run at the interface, pinned. With create unset only a link that is there already is updated.
func (p *Path) attach(prog Program, index int, create bool) error {
	file := p.pinName(prog, index)
	program, where := p.program(prog)
	if err := tcx.Attach(file, index, program, where, create); err != nil {
		return fmt.Errorf("program %s: %w", prog, err)
	}
	return nil
}

// removePins detaches what is attached, then removes maps.
func removePins(pins string) error {
	links := filepath.Join(pins, "links")
	entries, err := os.ReadDir(links)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if err := tcx.Detach(filepath.Join(links, e.Name())); err != nil {
			return err
		}
	}
	for _, name := range []string{bpfMapControl, bpfMapCounters, bpfMapFilters, bpfMapHits, bpfMapLocals, bpfMapNodes, bpfMapPods, bpfMapPrefixes} {
		if err := os.Remove(filepath.Join(pins, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// AttachNIC attaches to an interface by which other nodes are reached. It must be an Ethernet interface with room for the
// outer header.
func (p *Path) AttachNIC(name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return ns.Do(p.o.NS, func() error {
		l, err := p.nl.LinkByName(name)
		if err != nil {
			return fmt.Errorf("fast path: interface %s: %w", name, err)
		}
		a := l.Attrs()
		if a.EncapType != "ether" {
			return fmt.Errorf("fast path: %s has no Ethernet header (%s): packets to other nodes have to leave by an Ethernet interface", name, a.EncapType)
		}
		most := a.MTU - overlay.Overhead
		if mtu := int(p.control.Mtu); mtu == 0 || mtu > most {
			if most < 576 {
				return fmt.Errorf("fast path: %s has an MTU of %d, too little for pods", name, a.MTU)
			}
			atomic.StoreUint32(&p.control.Mtu, uint32(most))
		}
		for _, prog := range []Program{EgressLearn, Ingress} {
			if err := p.attach(prog, a.Index, true); err != nil {
				return fmt.Errorf("fast path: %w", err)
			}
		}
		return nil
	})
}

// DetachNIC takes the programs off an interface, by its index. Headers that lead there are void.
func (p *Path) DetachNIC(index int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.begin()()
	p.flush()
	return errors.Join(tcx.Detach(p.pinName(EgressLearn, index)), tcx.Detach(p.pinName(Ingress, index)))
}

// AttachPod serves a pod, and forgets whatever was known of its addresses.
func (p *Path) AttachPod(pod Pod) error {
	if len(pod.MAC) != 6 || len(pod.Gateway) != 6 {
		return fmt.Errorf("fast path: pod %v: %q and %q are not two MACs", pod.Addrs, pod.MAC, pod.Gateway)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.attached(pod) {
		return nil
	}
	defer p.begin()()
	for _, a := range pod.Addrs {
		if err := p.putPod(a, pod, p.next()); err != nil {
			return errors.Join(fmt.Errorf("fast path: pod %s: %w", a, err), p.detachPod(pod.Addrs))
		}
	}
	// Attaching waits for the kernel, twice; looking through conntrack takes milliseconds too.
	forgot := make(chan error, 1)
	go func() { forgot <- p.forget(touches(pod.Addrs)) }()
	err := ns.Do(p.o.NS, func() error {
		return errors.Join(p.attach(IngressLearn, pod.Index, true), p.attach(Egress, pod.Index, true))
	})
	if err = errors.Join(err, <-forgot); err != nil {
		return errors.Join(fmt.Errorf("fast path: pod %v: %w", pod.Addrs, err), p.detachPod(pod.Addrs))
	}
	return nil
}

// attached says whether a pod is served already, so that an agent that starts again may attach what it finds.
func (p *Path) attached(pod Pod) bool {
	for _, a := range pod.Addrs {
		have, ok := p.getPod(a)
		if !ok || int(have.Ifindex) != pod.Index || string(have.Mac[:]) != string(pod.MAC) || string(have.Gateway[:]) != string(pod.Gateway) {
			return false
		}
	}
	for _, prog := range []Program{Egress, IngressLearn} {
		if tcx.LinkedTo(p.pinName(prog, pod.Index)) != pod.Index {
			return false
		}
	}
	return true
}

func (p *Path) getPod(a netip.Addr) (rec bpfPod, ok bool) {
	var slot uint32
	if p.obj.Pods.Lookup(toAddr(a), &slot) != nil {
		return rec, false
	}
	return rec, p.obj.Locals.Lookup(slot, &rec) == nil
}

func (p *Path) putPod(a netip.Addr, pod Pod, since uint32) error {
	rec := bpfPod{Addr: toAddr(a), Ifindex: uint32(pod.Index), Since: since}
	copy(rec.Mac[:], pod.MAC)
	copy(rec.Gateway[:], pod.Gateway)
	if slices.Contains(p.locals.who, a) {
		return p.storePod(rec)
	}
	slot, err := p.locals.take(a, p.drain)
	if err != nil {
		return err
	}
	if err := errors.Join(p.storePod(rec), p.obj.Pods.Update(rec.Addr, uint32(slot), ebpf.UpdateAny)); err != nil {
		p.locals.free(slot)
		return err
	}
	return nil
}

// storePod writes the record of a pod that has a slot.
func (p *Path) storePod(rec bpfPod) error {
	rec.Tag = podTag(&rec, p.control.Secret)
	return p.obj.Locals.Update(uint32(slices.Index(p.locals.who, fromAddr(rec.Addr))), rec, ebpf.UpdateAny)
}

// readPods finds the pods that are in the maps.
func (p *Path) readPods() error {
	var key bpfAddr
	var slot uint32
	it := p.obj.Pods.Iterate()
	for it.Next(&key, &slot) {
		p.locals.put(int(slot), fromAddr(key))
	}
	return it.Err()
}

// DetachPod stops serving a pod. Its interface may be gone already. Addresses that are unknown are no error.
//
// It does not wait for programs that are running: one that holds what it knew of the pod sends a packet to its interface, whose
// index has no other yet, or learns what is void, and AttachPod waits for them before it gives the slot to another pod.
func (p *Path) DetachPod(addrs ...netip.Addr) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.begin()()
	return errors.Join(p.detachPod(addrs), p.forget(touches(addrs)))
}

func (p *Path) detachPod(addrs []netip.Addr) error {
	var errs []error
	for _, a := range addrs {
		rec, ok := p.getPod(a)
		if !ok {
			continue
		}
		slot := slices.Index(p.locals.who, a)
		errs = append(errs, p.obj.Pods.Delete(toAddr(a)), p.obj.Locals.Update(uint32(slot), bpfPod{}, ebpf.UpdateAny))
		p.locals.free(slot)
		for _, prog := range []Program{Egress, IngressLearn} {
			errs = append(errs, tcx.Detach(p.pinName(prog, int(rec.Ifindex))))
		}
	}
	return errors.Join(errs...)
}

// Pods lists the addresses that are served and the index of their interfaces.
func (p *Path) Pods() map[netip.Addr]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.podIndexes()
}

func (p *Path) podIndexes() map[netip.Addr]int {
	pods := map[netip.Addr]int{}
	for _, a := range p.locals.who {
		if rec, ok := p.getPod(a); a.IsValid() && ok {
			pods[a] = int(rec.Ifindex)
		}
	}
	return pods
}

// dropDeadPods removes pods whose interface has gone while nobody looked.
func (p *Path) dropDeadPods() error {
	for a, index := range p.podIndexes() {
		_, err := p.nl.LinkByIndex(index)
		if !errors.As(err, &netlink.LinkNotFoundError{}) {
			continue
		}
		end := p.begin()
		err = p.detachPod([]netip.Addr{a})
		end()
		if err != nil {
			return err
		}
	}
	return nil
}
