package fastpath

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"lamina/net/ns"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrNotSupported says that the kernel lacks something; the error names it.
var ErrNotSupported = errors.New("the kernel does not support the fast path")

// Options say what a Path is. NS, Pins, Node and MAC are required.
type Options struct {
	NS   netns.NsHandle   // the host's network namespace
	Pins string           // directory on a bpffs, of this host's alone; made if missing
	Node netip.Addr       // this host's address in the underlay
	MAC  net.HardwareAddr // of the VXLAN device
	VNI  uint32           // 0: 1
	Port uint16           // of VXLAN; 0: 4789
	MTU  int              // of pods, in bytes; 0: what AttachNIC's interface has room for

	Flows int // at most that many are cached; 0: 32768
	Pods  int // at most that many on this node; 0: 1024
	Nodes int // at most that many others; 0: 4096

	Heartbeat time.Duration // the fast path rests when it is older; 0: 3 s
	UDPLease  time.Duration // how long a verdict on a UDP flow holds; below conntrack's shortest timeout; 0: 5 s
	TCPLease  time.Duration // the same for TCP; 0: 15 s
}

func (o Options) check() (Options, error) {
	or := func(v *int, def int) {
		if *v == 0 {
			*v = def
		}
	}
	after := func(v *time.Duration, def time.Duration) {
		if *v == 0 {
			*v = def
		}
	}
	or(&o.Flows, 32768)
	or(&o.Pods, 1024)
	or(&o.Nodes, 4096)
	after(&o.Heartbeat, 3*time.Second)
	after(&o.UDPLease, 5*time.Second)
	after(&o.TCPLease, 15*time.Second)
	if o.VNI == 0 {
		o.VNI = 1
	}
	if o.Port == 0 {
		o.Port = 4789
	}
	switch {
	case !o.Node.Is4():
		return o, fmt.Errorf("fast path: node address %s is not IPv4", o.Node)
	case len(o.MAC) != 6:
		return o, fmt.Errorf("fast path: %q is not the MAC of a VXLAN device", o.MAC)
	case o.VNI >= 1<<24:
		return o, fmt.Errorf("fast path: VNI %d does not fit into 24 bits", o.VNI)
	case o.Nodes > 1<<16 || o.Pods > 1<<16:
		return o, fmt.Errorf("fast path: %d nodes or %d pods are more than %d", o.Nodes, o.Pods, 1<<16)
	case o.Pins == "":
		return o, errors.New("fast path: no directory for pins")
	}
	return o, nil
}

// Path is a host's fast path. Methods may be called by several goroutines. What is in the kernel outlives it.
type Path struct {
	o       Options
	obj     bpfObjects
	control *bpfControl
	memory  []byte
	drains  *ebpf.Map // a map of maps: its update waits for programs that run
	inner   *ebpf.Map
	nl      *netlink.Handle // routing and conntrack, in the namespace

	mu          sync.Mutex
	nodes       map[netip.Addr]*node
	slots       slots // of nodes
	locals      slots // of pods
	interrupted bool
}

type node struct {
	slot     int
	prefixes []netip.Prefix
}

// slots are places in an array map.
type slots struct {
	who  []netip.Addr // by slot; the zero address: free
	used []bool       // once had somebody
}

func newSlots(n int) slots { return slots{make([]netip.Addr, n), make([]bool, n)} }

func (s *slots) put(slot int, a netip.Addr) { s.who[slot], s.used[slot] = a, true }

func (s *slots) free(slot int) { s.who[slot] = netip.Addr{} }

// take finds a slot that is free. One that another had may be in the hands of a program that still runs: drain waits.
func (s *slots) take(a netip.Addr, drain func() error) (int, error) {
	best := -1
	for i, who := range s.who {
		if !who.IsValid() && (best < 0 || !s.used[i]) {
			best = i
			if !s.used[i] {
				break
			}
		}
	}
	if best < 0 {
		return 0, fmt.Errorf("no room for %s: more than %d", a, len(s.who))
	}
	if s.used[best] {
		if err := drain(); err != nil {
			return 0, err
		}
	}
	s.put(best, a)
	return best, nil
}

// Open loads the programs, and takes over what an earlier process left pinned: attached programs are replaced by these, one
// by one and without a gap, and caches are kept. Maps of another version or size are given up first, with everything
// attached: packets take the ordinary path until AttachNIC and AttachPod have been called again.
//
// The fast path is off until Enable.
func Open(o Options) (*Path, error) {
	o, err := o.check()
	if err != nil {
		return nil, err
	}
	if err := supported(); err != nil {
		return nil, err
	}
	if !onBPFFS(filepath.Dir(o.Pins)) && !onBPFFS(o.Pins) {
		return nil, fmt.Errorf("fast path: %s is not on a bpffs: mount one (mount -t bpf bpf %s)", o.Pins, filepath.Dir(o.Pins))
	}
	if err := os.MkdirAll(filepath.Join(o.Pins, "links"), 0o700); err != nil {
		return nil, fmt.Errorf("fast path: %w", err)
	}
	p := &Path{o: o, nodes: map[netip.Addr]*node{}, slots: newSlots(o.Nodes), locals: newSlots(o.Pods)}
	if p.nl, err = netlink.NewHandleAt(o.NS, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		return nil, fmt.Errorf("fast path: netlink: %w", err)
	}
	if err := ns.Do(o.NS, p.open); err != nil {
		p.Close()
		return nil, fmt.Errorf("fast path: %w", err)
	}
	return p, nil
}

func (p *Path) open() error {
	err := p.load()
	if err == nil && p.control.Abi != 0 && p.control.Abi != abi {
		err = ebpf.ErrMapIncompatible
	}
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		p.unload()
		if err := removePins(p.o.Pins); err != nil {
			return err
		}
		err = p.load()
	}
	if err != nil {
		return err
	}
	if err := p.probeTCX(); err != nil {
		return err
	}
	if err := p.makeDrain(); err != nil {
		return err
	}
	if err := errors.Join(p.readNodes(), p.readPods()); err != nil {
		return err
	}
	if err := setConntrack(); err != nil {
		return err
	}
	if err := p.configure(); err != nil {
		return err
	}
	if err := p.dropDeadPods(); err != nil {
		return err
	}
	return p.takeOverLinks()
}

// Mount mounts a bpffs at dir unless there is one.
func Mount(dir string) error {
	if onBPFFS(dir) {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("fast path: %w", err)
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("fast path: mounting a bpffs at %s: %w", dir, err)
	}
	return nil
}

func onBPFFS(dir string) bool {
	var s unix.Statfs_t
	return unix.Statfs(dir, &s) == nil && uint32(s.Type) == unix.BPF_FS_MAGIC
}

// supported asks for the helpers that the programs call.
func supported() error {
	for _, need := range []struct {
		helper asm.BuiltinFunc
		linux  string
	}{{asm.FnSkbAdjustRoom, "4.13"}, {asm.FnRedirectPeer, "5.10"}, {asm.FnKtimeGetCoarseNs, "5.11"}} {
		err := features.HaveProgramHelper(ebpf.SchedCLS, need.helper)
		if errors.Is(err, ebpf.ErrNotSupported) {
			return fmt.Errorf("%w: the eBPF helper %s is missing (Linux %s has it)", ErrNotSupported, need.helper, need.linux)
		}
		if err != nil {
			return fmt.Errorf("fast path: probing the eBPF helper %s: %w", need.helper, err)
		}
	}
	return nil
}

// probeTCX attaches a program to the loopback interface for a moment.
func (p *Path) probeTCX() error {
	l, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: p.obj.EgressLearn, Attach: ebpf.AttachTCXEgress})
	if errors.Is(err, ebpf.ErrNotSupported) {
		return fmt.Errorf("%w: TCX is missing (Linux 6.6 has it)", ErrNotSupported)
	}
	if err != nil {
		return fmt.Errorf("probing TCX: %w", err)
	}
	return l.Close()
}

func (p *Path) load() error {
	spec, err := loadBpf()
	if err != nil {
		return err
	}
	for name, n := range map[string]int{bpfMapFilters: p.o.Flows, bpfMapPods: p.o.Pods, bpfMapLocals: p.o.Pods, bpfMapPrefixes: p.o.Nodes * 2, bpfMapNodes: p.o.Nodes} {
		spec.Maps[name].MaxEntries = uint32(n)
	}
	if err := spec.LoadAndAssign(&p.obj, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: p.o.Pins}}); err != nil {
		return err
	}
	p.memory, err = unix.Mmap(p.obj.Control.FD(), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping control: %w", err)
	}
	p.control = (*bpfControl)(unsafe.Pointer(&p.memory[0]))
	return nil
}

func (p *Path) unload() {
	if p.memory != nil {
		unix.Munmap(p.memory)
		p.memory, p.control = nil, nil
	}
	p.obj.Close()
	p.obj = bpfObjects{}
}

// Close lets go of what the process holds. The programs go on until the heartbeat is stale.
func (p *Path) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drains != nil {
		p.drains.Close()
		p.inner.Close()
	}
	p.nl.Close()
	p.unload()
	return nil
}

// Remove detaches everything and removes the pins, then closes.
func (p *Path) Remove() error {
	err := removePins(p.o.Pins)
	p.Close()
	os.Remove(filepath.Join(p.o.Pins, "links"))
	os.Remove(p.o.Pins) // may be a mount point, or hold something else
	return err
}

// configure writes what the options say. Whatever was learned under another configuration, or while a change was cut short,
// is void.
func (p *Path) configure() error {
	c, was := p.control, *p.control
	want := was
	want.Abi, want.Vni, want.Port = abi, p.o.VNI, big(p.o.Port)
	want.Node = toAddr(p.o.Node)
	copy(want.Mac[:], p.o.MAC)
	want.HeartbeatTimeout = uint64(p.o.Heartbeat)
	want.UdpLease, want.TcpLease = uint64(p.o.UDPLease), uint64(p.o.TCPLease)
	want.Clean = 0 // no kernel has been seen with it yet
	if p.o.MTU != 0 {
		want.Mtu = uint32(p.o.MTU)
	}
	if want.Secret == 0 {
		var b [8]byte
		rand.Read(b[:])
		want.Secret = binary.NativeEndian.Uint64(b[:])
	}
	p.interrupted = was.Generation%2 == 1
	if want == was && was.Generation != 0 && !p.interrupted {
		return nil
	}
	end := p.begin()
	defer end()
	p.flush()
	want.Generation, want.Since = c.Generation, c.Since
	*c = want
	if !p.interrupted {
		return nil
	}
	// Nobody knows how far the change had come. It was about the pods whose records it had voided.
	return p.forget(touches(p.podsSince(p.next())))
}

// podsSince are the addresses of the pods of which verdicts count since a generation.
func (p *Path) podsSince(generation uint32) (addrs []netip.Addr) {
	for a := range p.podIndexes() {
		if rec, ok := p.getPod(a); ok && rec.Since == generation {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// Interrupted says whether an earlier process ended in the middle of a change. The caches have been emptied and the connections
// of the pods that the change was about forgotten; what it was to do to policies has to be done again, with connections that
// they forbid.
func (p *Path) Interrupted() bool { return p.interrupted }

// begin stops learning. The function that it returns starts it again; what was marked or learned before is older than then.
func (p *Path) begin() (end func()) {
	g := atomic.LoadUint32(&p.control.Generation) | 1
	atomic.StoreUint32(&p.control.Generation, g)
	return func() { atomic.StoreUint32(&p.control.Generation, p.next()) }
}

// next is the generation after the change that is being applied.
func (p *Path) next() uint32 {
	g := (atomic.LoadUint32(&p.control.Generation) | 1) + 1
	if g == 0 { // means: never
		g = 2
	}
	return g
}

// flush voids everything that was learned.
func (p *Path) flush() { atomic.StoreUint32(&p.control.Since, p.next()) }

func (p *Path) makeDrain() error {
	spec := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	var err error
	if p.inner, err = ebpf.NewMap(spec); err != nil {
		return err
	}
	p.drains, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1, InnerMap: spec})
	return err
}

// drain waits until no program runs that started before. The kernel promises it for updates of maps of maps.
func (p *Path) drain() error { return p.drains.Update(uint32(0), p.inner, ebpf.UpdateAny) }

// Enable switches the fast path on or off. It begins with empty caches.
func (p *Path) Enable(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var want uint32
	if on {
		want = 1
	}
	if atomic.LoadUint32(&p.control.Enabled) == want {
		return
	}
	defer p.begin()()
	p.flush()
	atomic.StoreUint32(&p.control.Enabled, want)
}

// Heartbeat tells the programs that somebody looks after them. After a pause that was too long the caches begin empty.
func (p *Path) Heartbeat() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stale() {
		defer p.begin()()
		p.flush()
	}
	atomic.StoreUint64(&p.control.Heartbeat, monotonic())
}

func (p *Path) stale() bool {
	return int64(monotonic()-atomic.LoadUint64(&p.control.Heartbeat)) > int64(p.control.HeartbeatTimeout)
}

// monotonic is the clock of the programs, in nanoseconds.
func monotonic() uint64 {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &t)
	return uint64(t.Nano())
}

// SetMTU says how large pods' IP packets may be, in bytes; larger ones take the ordinary path.
func (p *Path) SetMTU(mtu int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	atomic.StoreUint32(&p.control.Mtu, uint32(mtu))
}

// setConntrack makes conntrack tolerate what it does not see. A host that has not used conntrack yet has nothing to set.
func setConntrack() error {
	const dir = "/proc/sys/net/netfilter/nf_conntrack_tcp_"
	established, err := os.ReadFile(dir + "timeout_established")
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: connection tracking is missing (nf_conntrack)", ErrNotSupported)
	}
	if err != nil {
		return err
	}
	if err := os.WriteFile(dir+"be_liberal", []byte("1\n"), 0); err != nil {
		return err
	}
	return os.WriteFile(dir+"timeout_unacknowledged", established, 0)
}
