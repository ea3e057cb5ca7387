package steer

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"lamina/net/ns"
	"lamina/net/tcx"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrNotSupported says that the kernel or the machine lacks something; the error names it.
var ErrNotSupported = errors.New("steering is not possible")

// Times.
const (
	period = 50 * time.Millisecond // between looks at the CPUs
	// calm is how long no hit has been handed over before the fast path is left to itself again: its next hits may overtake
	// none.
	calm = 2 * time.Second
	// guard is how long a packet may take from the program that chose for it to the queue of the CPU that was chosen,
	// and 2 ms by which the table's times may be behind.
	guard = 12 * time.Millisecond
)

// options say what a steerer is. ns, pins, vni and port are required.
type options struct {
	ns   netns.NsHandle // the host's network namespace
	pins string         // directory on a bpffs, of this host's alone; made if missing
	vni  uint32
	port uint16 // of VXLAN

	heartbeat time.Duration // what is older is missing; 0: 3 s
	worth     float64       // a CPU that is less busy with packets, or leaves none for later, hands nothing over, 0 to 1; 0: 0.8; negative: each hands over
	margin    float64       // how much less busy another CPU has to be; 0: 0.3; negative: none
	threshold float64       // of the host: above it nothing is handed over; 0: 0.85
}

func (o *options) fill() {
	or := func(v *float64, def float64) {
		if *v == 0 {
			*v = def
		}
		*v = max(*v, 0)
	}
	or(&o.worth, 0.8)
	or(&o.margin, 0.3)
	or(&o.threshold, 0.85)
	if o.heartbeat == 0 {
		o.heartbeat = 3 * time.Second
	}
}

// load is how busy a CPU is, 0 to 1: with anything, and with packets.
type load struct {
	busy, receiving float64
	squeezed        float64 // part of the periods in which it left packets for later
}

// squeezes is the part of the periods in which a CPU has to leave packets for later to count as one that does not get round
// to them: now and then any CPU does.
const squeezes = 0.5

// steerer is the programs and maps of a host. What is in the kernel outlives it.
type steerer struct {
	o   options
	obj bpfObjects

	mu      sync.Mutex
	control bpfControl
	cpus    cpuSet
	last    sample

	hits    *ebpf.Map     // the fast path's; nil: it has none
	serving bool          // the hit program is in it
	handed  uint64        // hits that have been handed over, as last seen
	needed  time.Duration // when it was last of use, monotonic
	loads   map[int]load  // by CPU
}

// open loads the programs, and takes over what an earlier process left pinned: attached programs are replaced by these
// without a gap. Maps of another version are given up first, with everything attached.
func open(o options) (*steerer, error) {
	o.fill()
	s := &steerer{o: o, loads: map[int]load{}}
	if err := os.MkdirAll(filepath.Join(o.pins, "links"), 0o700); err != nil {
		return nil, fmt.Errorf("steering: %w", err)
	}
	err := s.loadMaps()
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		if err := removePins(o.pins); err != nil {
			return nil, err
		}
		err = s.loadMaps()
	}
	if err != nil {
		return nil, fmt.Errorf("steering: %w", err)
	}
	if err := ns.Do(o.ns, func() error { return errors.Join(s.probeTCX(), s.takeOver()) }); err != nil {
		s.close()
		return nil, fmt.Errorf("steering: %w", err)
	}
	_ = s.obj.Control.Lookup(uint32(0), &s.control) // an earlier process'
	if err := s.openHits(); err != nil {
		s.close()
		return nil, fmt.Errorf("steering: %w", err)
	}
	if s.control.Secret == 0 {
		var b [8]byte
		rand.Read(b[:])
		s.control.Secret = binary.NativeEndian.Uint64(b[:])
	}
	s.control.Timeout, s.control.Vni = uint64(o.heartbeat), o.vni
	s.control.Port = o.port>>8 | o.port<<8
	s.control.Worth, s.control.Margin = thousandths(o.worth), thousandths(o.margin)
	return s, nil
}

func thousandths(v float64) uint32 { return uint32(v*1000 + 0.5) }

func (s *steerer) loadMaps() error {
	return loadBpfObjects(&s.obj, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: s.o.pins}})
}

// probeTCX attaches a program to the loopback interface for a moment.
func (s *steerer) probeTCX() error {
	l, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: s.obj.Pod, Attach: ebpf.AttachTCXEgress})
	if errors.Is(err, ebpf.ErrNotSupported) {
		return fmt.Errorf("%w: TCX is missing (Linux 6.6 has it)", ErrNotSupported)
	}
	if err != nil {
		return fmt.Errorf("probing TCX: %w", err)
	}
	return l.Close()
}

func (s *steerer) close() {
	s.obj.Close()
	if s.hits != nil {
		s.hits.Close()
	}
}

func hitsOf(pins string) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(filepath.Dir(pins), "hits"), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the fast path's map of hits: %w", err)
	}
	return m, nil
}

// openHits takes over what an earlier process put into the fast path.
func (s *steerer) openHits() (err error) {
	if s.hits, err = hitsOf(s.o.pins); err != nil || s.hits == nil {
		return err
	}
	var id uint32
	if s.hits.Lookup(uint32(0), &id) == nil {
		return s.serve(true)
	}
	return nil
}

// serve puts the hit program into the fast path, or takes it out.
func (s *steerer) serve(on bool) error {
	s.needed = monotonic()
	if on {
		if err := s.hits.Update(uint32(0), s.obj.Hit, ebpf.UpdateAny); err != nil {
			return fmt.Errorf("the fast path's map of hits: %w", err)
		}
	} else if err := s.hits.Delete(uint32(0)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("the fast path's map of hits: %w", err)
	}
	s.serving = on
	return nil
}

// watchHits has the fast path ask about its hits while packets keep a CPU busy, and as long as it has handed any over.
func (s *steerer) watchHits(at time.Duration) error {
	if s.hits == nil {
		return nil
	}
	for _, n := range s.cpus {
		l := s.control.Load[s.control.Place[n]]
		if s.control.Saturated == 0 && l.Receiving >= s.control.Worth && (l.Squeezed != 0 || s.control.Worth == 0) {
			s.needed = at
		}
	}
	if !s.serving {
		if s.needed == at {
			return s.serve(true)
		}
		return nil
	}
	c, err := s.counters()
	if err != nil {
		return err
	}
	over := uint64(0)
	for from, row := range c.chosen[Hits] {
		for to, n := range row {
			if from != to {
				over += n
			}
		}
	}
	if over != s.handed {
		s.handed, s.needed = over, at
	}
	if at-s.needed > calm {
		return s.serve(false)
	}
	return nil
}

// The programs by the names of their pins.
func (s *steerer) program(name string) (*ebpf.Program, ebpf.AttachType) {
	switch name {
	case "nic":
		return s.obj.Nic, ebpf.AttachTCXIngress
	case "device":
		return s.obj.Device, ebpf.AttachTCXIngress
	default:
		return s.obj.Pod, ebpf.AttachTCXEgress
	}
}

func pinName(pins, program string, index int) string {
	return filepath.Join(pins, "links", fmt.Sprintf("%s-%d", program, index))
}

// takeOver makes every pinned link run this process's program, and removes those whose interface is gone.
func (s *steerer) takeOver() error {
	entries, err := os.ReadDir(filepath.Join(s.o.pins, "links"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, number, _ := strings.Cut(e.Name(), "-")
		var index int
		if _, err := fmt.Sscanf(number, "%d", &index); err != nil {
			return fmt.Errorf("pin %s is none of steering's: remove it", filepath.Join(s.o.pins, "links", e.Name()))
		}
		program, where := s.program(name)
		if err := tcx.Attach(pinName(s.o.pins, name, index), index, program, where, false); err != nil {
			return err
		}
	}
	return nil
}

// attach makes a program run at an interface, behind all others.
func (s *steerer) attach(name string, index int) error {
	program, where := s.program(name)
	file := pinName(s.o.pins, name, index)
	return ns.Do(s.o.ns, func() error {
		if tcx.LinkedTo(file) == index {
			if last, err := isLast(index, where, program); last || err != nil {
				return err
			}
			// The fast path was switched on since: it comes first, for what it serves must not be steered.
			if err := tcx.Detach(file); err != nil {
				return err
			}
		}
		return tcx.Attach(file, index, program, where, true)
	})
}

func isLast(index int, where ebpf.AttachType, program *ebpf.Program) (bool, error) {
	info, err := program.Info()
	if err != nil {
		return false, err
	}
	id, _ := info.ID()
	there, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: where})
	if err != nil {
		return false, err
	}
	n := len(there.Programs)
	return n > 0 && there.Programs[n-1].ID == id, nil
}

func (s *steerer) detach(name string, index int) error {
	return tcx.Detach(pinName(s.o.pins, name, index))
}

// removePins detaches what is attached and removes the maps.
func removePins(pins string) error {
	entries, err := os.ReadDir(filepath.Join(pins, "links"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if hits, err := hitsOf(pins); err != nil {
		return err
	} else if hits != nil {
		defer hits.Close()
		if err := hits.Delete(uint32(0)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("the fast path's map of hits: %w", err)
		}
	}
	for _, e := range entries {
		if err := tcx.Detach(filepath.Join(pins, "links", e.Name())); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(pins); err != nil {
		return err
	}
	_ = os.Remove(filepath.Dir(pins)) // the fast path's, if that is off
	return nil
}

// setDevice says which interface the VXLAN device is.
func (s *steerer) setDevice(index int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.control.Device = uint32(index)
	return s.write()
}

// setCPUs says which CPUs RPS knows, in its order.
func (s *steerer) setCPUs(cpus cpuSet) error {
	if len(cpus) > maxCPUs || len(cpus) > 0 && cpus[len(cpus)-1] >= maxCPUs {
		return fmt.Errorf("CPU %d: more than %d are not known", cpus[len(cpus)-1], maxCPUs)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cpus = cpus
	c := &s.control
	c.Cpus = uint32(len(cpus))
	for i := range c.Place {
		c.Place[i] = nowhere
	}
	for place, n := range cpus {
		c.Number[place], c.Place[n] = uint16(n), uint16(place)
		c.Load[place].Busy, c.Load[place].Receiving = thousandths(s.loads[n].busy), thousandths(s.loads[n].receiving)
		c.Load[place].Drained = 0
	}
	return s.write()
}

// write is for one process only: the programs read words.
func (s *steerer) write() error { return s.obj.Control.Update(uint32(0), &s.control, ebpf.UpdateAny) }

// look takes a sample of the CPUs, which was begun at a time of the monotonic clock, and tells the programs.
func (s *steerer) look(now sample, at time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range now {
		for _, was := range s.last {
			if was.number == c.number && c.total > was.total {
				const weight = 4 // of the past, 1: how quickly a load that ends is forgotten
				l, total := s.loads[c.number], float64(c.total-was.total)
				l.busy += (float64(c.busy-was.busy)/total - l.busy) / weight
				l.receiving += (float64(c.receiving-was.receiving)/total - l.receiving) / weight
				left := 0.0
				if c.squeezes != was.squeezes {
					left = 1
				}
				l.squeezed += (left - l.squeezed) / weight
				s.loads[c.number] = l
			}
		}
		if c.number >= maxCPUs || s.control.Place[c.number] == nowhere {
			continue
		}
		l := &s.control.Load[s.control.Place[c.number]]
		l.Busy, l.Receiving = thousandths(s.loads[c.number].busy), thousandths(s.loads[c.number].receiving)
		l.Squeezed = 0
		if s.loads[c.number].squeezed >= squeezes {
			l.Squeezed = 1
		}
		if c.empty {
			l.Drained = uint64(at - guard)
		}
	}
	s.last = now
	s.control.Saturated = s.saturated()
	s.control.Heartbeat = uint64(at)
	return errors.Join(s.write(), s.watchHits(at))
}

func (s *steerer) saturated() uint32 {
	sum, limit := 0.0, s.o.threshold
	for _, n := range s.cpus {
		sum += s.loads[n].busy
	}
	if s.control.Saturated != 0 {
		limit -= 0.05 // so that it does not switch to and fro
	}
	if sum > limit*float64(len(s.cpus)) {
		return 1
	}
	return 0
}

// monotonic is the clock of the programs.
func monotonic() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return time.Duration(t.Nano())
}

// counters are packets since the maps were made.
type counters struct {
	reasons [stages][reasons]uint64
	chosen  [stages]map[int]map[int]uint64 // by the CPU that chose and the CPU that was chosen
	moves   [stages]uint64
}

func (s *steerer) counters() (c counters, err error) {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return c, err
	}
	read := func(m *ebpf.Map, f func(i, cpu int, n uint64)) error {
		n := int(m.MaxEntries())
		keys, values := make([]uint32, n), make([]uint64, n*cpus)
		var cursor ebpf.MapBatchCursor
		if _, err := m.BatchLookup(&cursor, keys, values, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("steering: counters: %w", err)
		}
		for i, k := range keys {
			for cpu, n := range values[i*cpus : (i+1)*cpus] {
				if n != 0 {
					f(int(k), cpu, n)
				}
			}
		}
		return nil
	}
	err = read(s.obj.Reasons, func(i, _ int, n uint64) { c.reasons[i/int(reasons)][i%int(reasons)] += n })
	if err != nil {
		return c, err
	}
	for stage := range c.chosen {
		c.chosen[stage] = map[int]map[int]uint64{}
	}
	return c, read(s.obj.Chosen, func(i, cpu int, n uint64) {
		moved, stage, to := i >= int(stages)*maxCPUs, i/maxCPUs%int(stages), i%maxCPUs
		if moved {
			c.moves[stage] += n
			return
		}
		if c.chosen[stage][cpu] == nil {
			c.chosen[stage][cpu] = map[int]uint64{}
		}
		c.chosen[stage][cpu][to] += n
	})
}
