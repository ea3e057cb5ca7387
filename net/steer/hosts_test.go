package steer

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lamina/net/control"
	"lamina/net/fastpath"
	"lamina/net/ipam"
	"lamina/net/lab"
	"lamina/net/overlay"
	"lamina/net/peers"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// host is a namespace with an overlay, and steering if it has a part.
type host struct {
	*lab.Host
	t       testing.TB
	overlay *overlay.Overlay
	opts    PartOptions
	part    *Part
	loads   atomic.Pointer[map[int]float64] // that the part is told; nil: those there are
	total   map[int]uint64
	busy    map[int]float64
}

type pod struct {
	*lab.Node
	control.Pod
}

// newHosts makes two hosts. The second has steering.
func newHosts(t testing.TB, o PartOptions) (a, b *host) {
	t.Helper()
	hasTCX.Need(t)
	if runtime.NumCPU() < 2 {
		t.Fatal("one CPU: there is nothing to steer to")
	}
	l := lab.New(t, 2)
	hosts := []*host{}
	lease := func(h *lab.Host) peers.Lease {
		return peers.Lease{Node: h.Addr, Prefix: h.Prefix, MAC: peers.NodeMAC(h.Addr)}
	}
	for i, h := range l.Hosts {
		ov, err := overlay.New(overlay.Config{NS: h.NS, Self: lease(h)})
		must(t, err)
		t.Cleanup(ov.Close)
		ov.SetPeers([]peers.Lease{lease(l.Hosts[1-i])})
		_, err = ov.Reconcile()
		must(t, err)
		hosts = append(hosts, &host{Host: h, t: t, overlay: ov, total: map[int]uint64{}, busy: map[int]float64{}})
	}
	a, b = hosts[0], hosts[1]
	b.prepare(o)
	b.start(o.Mode)
	return a, b
}

func (h *host) prepare(o PartOptions) {
	h.opts = o
	h.opts.Pins, h.opts.StateDir, h.opts.Logf, h.opts.sample = newPins(h.t), h.t.TempDir(), h.t.Logf, h.sample
	h.t.Cleanup(func() { // what is left is taken away as an operator would
		h.start(Off)
		h.stop()
	})
}

// start starts an agent's part.
func (h *host) start(m Mode) {
	h.t.Helper()
	h.stop()
	o := h.opts
	o.Mode = m
	h.part = NewPart(o)
	must(h.t, h.part.Start(h.overlay))
	for _, p := range h.overlay.Pods() {
		must(h.t, h.part.PodAdded(p))
	}
}

// stop ends it as the death of its process would.
func (h *host) stop() {
	if h.part != nil {
		must(h.t, h.part.Close())
		h.part = nil
	}
}

// sample is the machine's, with other loads.
func (h *host) sample() (sample, error) {
	s, err := readSample()
	if loads := h.loads.Load(); loads != nil {
		for i, c := range s {
			h.total[c.number] += 1000
			h.busy[c.number] += 1000 * (*loads)[c.number]
			s[i].total, s[i].busy, s[i].receiving = h.total[c.number], uint64(h.busy[c.number]), uint64(h.busy[c.number])
			s[i].squeezes = h.total[c.number] // all the time
		}
	}
	return s, err
}

// load sets the load of a CPU and of all others, and waits until the programs know.
func (h *host) load(cpu int, busy, others float64) {
	h.t.Helper()
	loads := map[int]float64{}
	now, err := readSample()
	must(h.t, err)
	for _, c := range now {
		loads[c.number] = others
	}
	loads[cpu] = busy
	h.loads.Store(&loads)
	eventually(h.t, "loads", func() bool {
		cpus, _ := h.part.s.status()
		return !slices.ContainsFunc(cpus, func(c CPUStatus) bool { d := c.Busy - loads[c.Number]; return d > 0.02 || d < -0.02 })
	})
}

// change changes loads at random.
func (h *host) change(done chan struct{}) {
	for {
		loads := map[int]float64{}
		for cpu := range runtime.NumCPU() {
			loads[cpu] = rand.Float64()
		}
		h.loads.Store(&loads)
		select {
		case <-done:
			return
		case <-time.After(30 * time.Millisecond):
		}
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func (h *host) pod(i byte) *pod {
	h.t.Helper()
	addr := h.Prefix.Addr().As4()
	addr[3] = i
	p := &pod{Node: lab.NewNode(h.t, fmt.Sprintf("pod%d", i))}
	p.Pod = control.Pod{Lease: ipam.Lease{Address: netip.AddrFrom4(addr), ID: fmt.Sprintf("%011d", i), Pod: ipam.Pod{Interface: "eth0", Netns: p.Path}}}
	p.HostInterface, p.MAC = control.HostInterface(p.ID), control.PodMAC(p.Address)
	gateway := h.Prefix.Addr().Next()
	p.Run("sh", "-ec", fmt.Sprintf(`ip link add eth0 address %s mtu 1450 type veth peer name wire
ip link set eth0 up
ip addr add %s/32 dev eth0
ip route add %s dev eth0
ip route add default via %[3]s
ip neigh add %[3]s lladdr %s dev eth0 nud permanent`, p.MAC, p.Address, gateway, control.GatewayMAC))
	must(h.t, p.Do(func() error {
		l, err := netlink.LinkByName("wire")
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(h.NS))
	}))
	h.Run("ip", "link", "set", "wire", "name", p.HostInterface, "address", control.GatewayMAC.String())
	p.Index = h.overlay.Index(p.HostInterface)
	h.overlay.SetPod(p.Pod)
	if h.part != nil {
		must(h.t, h.part.PodAdded(p.Pod))
	}
	_, err := h.overlay.Reconcile()
	must(h.t, err)
	return p
}

func (h *host) status() PartStatus {
	h.t.Helper()
	return h.part.Status().(PartStatus)
}

// spy counts IPv4 packets by CPU at an interface's ingress, behind steering's program.
type spy struct {
	t testing.TB
	m *ebpf.Map
}

func newSpy(t testing.TB, n *lab.Node, device string) *spy {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	must(t, err)
	t.Cleanup(func() { m.Close() })
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R0, -1),
		asm.LoadMem(asm.R2, asm.R1, 16, asm.Word), // protocol
		asm.JNE.Imm(asm.R2, int32(binary.NativeEndian.Uint16([]byte{0x08, 0x00})), "end"),
		asm.StoreImm(asm.R10, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, -1).WithSymbol("out"),
		asm.Return().WithSymbol("end"),
	}})
	must(t, err)
	defer prog.Close()
	attach(t, n, device, prog)
	return &spy{t, m}
}

// slow makes every packet at an interface's ingress take long, but on CPU 0.
func slow(t testing.TB, n *lab.Node, device string) {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.FnGetSmpProcessorId.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 20000),
		asm.Sub.Imm(asm.R1, 1).WithSymbol("again"),
		asm.JNE.Imm(asm.R1, 0, "again"),
		asm.Mov.Imm(asm.R0, -1).WithSymbol("out"),
		asm.Return(),
	}})
	must(t, err)
	defer prog.Close()
	attach(t, n, device, prog)
}

// attach holds a program at an interface's ingress until the test ends.
func attach(t testing.TB, n *lab.Node, device string, prog *ebpf.Program) {
	t.Helper()
	must(t, n.Do(func() error {
		i, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		l, err := link.AttachTCX(link.TCXOptions{Interface: i.Index, Program: prog, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}))
}

func (s *spy) counts() map[int]uint64 {
	s.t.Helper()
	var all []uint64
	must(s.t, s.m.Lookup(uint32(0), &all))
	n := map[int]uint64{}
	for cpu, v := range all {
		if v != 0 {
			n[cpu] = v
		}
	}
	return n
}

// onCPU runs f on a CPU.
func onCPU(t testing.TB, cpu int, f func()) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // and ends with the goroutine
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			t.Error(err)
			return
		}
		f()
	})
	wg.Wait()
}

// sockets are UDP's, of a pod.
func (p *pod) sockets(t testing.TB, n int, to netip.AddrPort) []*net.UDPConn {
	t.Helper()
	var all []*net.UDPConn
	must(t, p.Do(func() error {
		for range n {
			c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
			if err != nil {
				return err
			}
			all = append(all, c)
		}
		return nil
	}))
	t.Cleanup(func() {
		for _, c := range all {
			c.Close()
		}
	})
	return all
}

// listener counts what comes, and whether it comes in order of the numbers that each sender puts in front.
type listener struct {
	got, late atomic.Uint64
	wg        sync.WaitGroup
}

func (p *pod) listen(t testing.TB, port int) *listener {
	t.Helper()
	l := &listener{}
	var c *net.UDPConn
	must(t, p.Do(func() (err error) {
		c, err = net.ListenUDP("udp4", &net.UDPAddr{Port: port})
		return err
	}))
	must(t, c.SetReadBuffer(8<<20))
	l.wg.Go(func() {
		b, last := make([]byte, 2048), map[netip.AddrPort]uint64{}
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if n < 8 {
				continue
			}
			number := binary.BigEndian.Uint64(b)
			if number != 0 && number <= last[from] {
				l.late.Add(1)
			}
			last[from] = max(number, last[from])
			l.got.Add(1)
		}
	})
	t.Cleanup(func() { c.Close(); l.wg.Wait() })
	return l
}

// blast sends n datagrams by each socket, from one CPU.
func blast(t testing.TB, cpu, n int, sockets []*net.UDPConn) {
	t.Helper()
	onCPU(t, cpu, func() {
		b := make([]byte, 64)
		for i := range n {
			binary.BigEndian.PutUint64(b, uint64(i+1))
			for _, c := range sockets {
				if _, err := c.Write(b); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
}

// chosenFor sums the packets for each CPU.
func chosenFor(s StageStatus) map[int]uint64 {
	n := map[int]uint64{}
	for _, row := range s.Packets {
		for cpu, packets := range row {
			n[cpu] += packets
		}
	}
	return n
}

func eager(o *options) { o.worth, o.margin = -1, -1 }

const device = overlay.Device

// Packets run on the CPUs that were chosen for them, in both stages.
func TestPlacement(t *testing.T) {
	a, b := newHosts(t, PartOptions{Mode: On, change: eager})
	from, to := a.pod(2), b.pod(2)
	vxlan, inPod := newSpy(t, b.Node, device), newSpy(t, to.Node, "eth0")
	got := to.listen(t, 7000)
	b.load(0, 1, 0) // the sender's CPU, on which the NIC's stage runs
	blast(t, 0, 50, from.sockets(t, 20, netip.AddrPortFrom(to.Address, 7000)))
	eventually(t, "all arrive", func() bool { return got.got.Load() == 1000 })
	s := b.status()
	for stage, spied := range map[Stage]map[int]uint64{VXLAN: vxlan.counts(), Pod: inPod.counts()} {
		want := chosenFor(s.Stages[stage.String()])
		if fmt.Sprint(want) != fmt.Sprint(spied) {
			t.Errorf("%s: chosen %v, seen %v", stage, want, spied)
		}
	}
	t.Logf("sent on CPU 0, which is busy: VXLAN stage ran on %v, pods' on %v", vxlan.counts(), inPod.counts())
	if n := vxlan.counts()[0]; n != 0 {
		t.Errorf("%d packets stayed on the busy CPU", n)
	}
	if s.Stages["vxlan"].HandedOver() != 1 {
		t.Errorf("%+v", s)
	}
}

// A CPU that has time to spare hands nothing over, and neither does a host without any, or one without its agent.
func TestNothingHandedOver(t *testing.T) {
	a, b := newHosts(t, PartOptions{Mode: On, change: func(o *options) { o.heartbeat = 400 * time.Millisecond }})
	from, to := a.pod(2), b.pod(2)
	vxlan, inPod := newSpy(t, b.Node, device), newSpy(t, to.Node, "eth0")
	got, sent := to.listen(t, 7000), uint64(0)
	for _, c := range []struct {
		why     Reason
		prepare func()
	}{
		{Idle, func() { b.load(0, 0.5, 0) }},
		{Saturated, func() { b.load(0, 1, 0.95) }},
		{Stale, func() {
			b.load(0, 1, 0)
			b.part.stop()
			b.part.stop = nil
			time.Sleep(500 * time.Millisecond)
		}},
	} {
		c.prepare()
		blast(t, 0, 10, from.sockets(t, 10, netip.AddrPortFrom(to.Address, 7000)))
		sent += 100
		eventually(t, "all arrive", func() bool { return got.got.Load() == sent })
		t.Logf("%s: VXLAN stage ran on %v, pods' on %v", c.why, vxlan.counts(), inPod.counts())
		if v, p := vxlan.counts(), inPod.counts(); v[0] != sent || p[0] != sent {
			t.Errorf("%s: stages ran on %v and %v", c.why, v, p)
		}
		if n := b.status().Stages["vxlan"].Reasons[c.why.String()]; n == 0 {
			t.Errorf("%s: not counted: %v", c.why, b.status())
		}
	}
}

// What comes from pods of the same host stays on its CPU, though RPS of the pod would spread it.
func TestLocalStays(t *testing.T) {
	_, b := newHosts(t, PartOptions{Mode: On, change: eager})
	from, to := b.pod(2), b.pod(3)
	inPod := newSpy(t, to.Node, "eth0")
	got := to.listen(t, 7000)
	blast(t, 1, 5, from.sockets(t, 40, netip.AddrPortFrom(to.Address, 7000)))
	eventually(t, "all arrive", func() bool { return got.got.Load() == 200 })
	if n := inPod.counts(); n[1] != 200 {
		t.Errorf("ran on %v", n)
	}
}

// Static: the first half of the CPUs for the VXLAN device, the second for pods.
func TestStatic(t *testing.T) {
	a, b := newHosts(t, PartOptions{Mode: Static})
	from, to := a.pod(2), b.pod(2)
	vxlan, inPod := newSpy(t, b.Node, device), newSpy(t, to.Node, "eth0")
	got := to.listen(t, 7000)
	for cpu := range 2 {
		blast(t, cpu, 10, from.sockets(t, 10, netip.AddrPortFrom(to.Address, 7000)))
	}
	eventually(t, "all arrive", func() bool { return got.got.Load() == 200 })
	t.Logf("sent on both CPUs: VXLAN stage ran on %v, pods' on %v", vxlan.counts(), inPod.counts())
	now, err := readSample()
	must(t, err)
	first, second := halves(now.set())
	for stage, c := range map[string]struct {
		seen map[int]uint64
		half cpuSet
	}{"vxlan": {vxlan.counts(), first}, "pod": {inPod.counts(), second}} {
		for cpu, n := range c.seen {
			if !slices.Contains(c.half, cpu) {
				t.Errorf("%s: %d packets on CPU %d, not on %v", stage, n, cpu, c.half)
			}
		}
	}
}

// Loads that change all the time move flows in both stages, and no packet overtakes another of its flow.
func TestOrder(t *testing.T) {
	a, b := newHosts(t, PartOptions{Mode: On, change: eager})
	from, to := a.pod(2), b.pod(2)
	slow(t, b.Node, device) // so that packets wait in a queue while others could overtake them by CPU 0
	slow(t, to.Node, "eth0")
	got := to.listen(t, 7000)
	done := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(done)
	wg.Go(func() { b.change(done) })
	wg.Go(func() { transfers(t, from, to, done) })
	sockets := from.sockets(t, 24, netip.AddrPortFrom(to.Address, 7000))
	numbers := make([]uint64, len(sockets))
	enough := func() bool {
		s := b.status()
		return s.Stages["vxlan"].Moves > 50 && s.Stages["pod"].Moves > 50 && got.got.Load() > 20000
	}
	for deadline := time.Now().Add(20 * time.Second); !enough(); {
		if time.Now().After(deadline) {
			t.Fatalf("%d packets, few moves: %+v", got.got.Load(), b.status())
		}
		onCPU(t, rand.IntN(2), func() {
			b := make([]byte, 200)
			for range 1 + rand.IntN(300) {
				for i, c := range sockets {
					for range rand.IntN(4) {
						numbers[i]++
						binary.BigEndian.PutUint64(b, numbers[i])
						_, _ = c.Write(b)
					}
				}
			}
		})
		time.Sleep(time.Duration(rand.IntN(80)) * time.Millisecond) // gaps
	}
	if late := got.late.Load(); late != 0 {
		t.Errorf("%d of %d packets were overtaken", late, got.got.Load())
	}
	if got.got.Load() == 0 {
		t.Error("nothing came")
	}
	t.Logf("%d packets, moves %d and %d", got.got.Load(), b.status().Stages["vxlan"].Moves, b.status().Stages["pod"].Moves)
}

// cached gives a host the fast path.
func (h *host) cached() {
	h.t.Helper()
	if h.opts.Pins == "" {
		h.prepare(PartOptions{Mode: On})
	}
	pins := filepath.Dir(h.opts.Pins)
	fast := fastpath.NewPart(fastpath.PartOptions{Pins: pins, Mode: fastpath.On, Logf: h.t.Logf})
	must(h.t, fast.Start(h.overlay))
	h.t.Cleanup(func() {
		h.stop()
		must(h.t, fast.Close())
		must(h.t, fastpath.NewPart(fastpath.PartOptions{Pins: pins, Mode: fastpath.Off}).Start(h.overlay))
		_ = unix.Rmdir(filepath.Join(pins, "links"))
		_ = unix.Rmdir(pins)
	})
	for _, p := range h.overlay.Pods() {
		must(h.t, fast.PodAdded(p))
	}
}

// hosts with the fast path, and a flow from a pod to a pod that takes it.
func cachedHosts(t *testing.T) (b *host, from, to *pod) {
	t.Helper()
	a, b := newHosts(t, PartOptions{Mode: Off, change: eager})
	from, to = a.pod(2), b.pod(2)
	a.cached()
	b.cached()
	b.start(On)
	return b, from, to
}

// learn has the caches know sockets' flows.
func learn(t *testing.T, l *listener, sockets []*net.UDPConn) {
	t.Helper()
	before, n := l.got.Load(), uint64(0)
	for range 5 {
		for _, c := range sockets {
			_, err := c.Write(make([]byte, 64)) // number 0
			must(t, err)
			n++
		}
		eventually(t, "all arrive", func() bool { return l.got.Load() == before+n })
	}
	l.late.Store(0)
}

// What the fast path serves is handed over too, while packets keep the CPU busy.
func TestHitsPlacement(t *testing.T) {
	b, from, to := cachedHosts(t)
	got := to.listen(t, 7000)
	sockets := from.sockets(t, 20, netip.AddrPortFrom(to.Address, 7000))
	b.load(0, 1, 0)
	onCPU(t, 0, func() { learn(t, got, sockets) })
	sent := got.got.Load()
	inPod := newSpy(t, to.Node, "eth0")
	before := b.status().Stages["hits"]
	const rounds = 20
	for range rounds { // with gaps, across which a hit can be handed over
		time.Sleep(3 * time.Millisecond)
		blast(t, 0, 1, sockets)
		sent += uint64(len(sockets))
		eventually(t, "all arrive", func() bool { return got.got.Load() == sent })
	}
	now, earlier := chosenFor(b.status().Stages["hits"]), chosenFor(before)
	for cpu := range now {
		now[cpu] -= earlier[cpu]
	}
	spied := inPod.counts()
	t.Logf("hits on CPU 0, which is busy: pods' stage ran on %v", spied)
	if spied[0] > 5*rounds || spied[0]+spied[1] != rounds*20 && runtime.NumCPU() == 2 {
		t.Errorf("pods' stage ran on %v", spied)
	}
	if now[1] > 0 && now[1] != spied[1] {
		t.Errorf("chosen %v, seen %v", now, spied)
	}
	b.load(0, 0, 0)
	b.part.s.mu.Lock()
	b.part.s.control.Worth = 600
	b.part.s.mu.Unlock()
	eventually(t, "the fast path is left to itself", func() bool {
		b.part.s.mu.Lock()
		defer b.part.s.mu.Unlock()
		return !b.part.s.serving
	})
}

// Hits are not overtaken by hits when loads change.
func TestHitsOrder(t *testing.T) {
	b, from, to := cachedHosts(t)
	slow(t, to.Node, "eth0")
	got := to.listen(t, 7000)
	sockets := from.sockets(t, 24, netip.AddrPortFrom(to.Address, 7000))
	learn(t, got, sockets)
	const lease = 5 * time.Second // then a packet takes the ordinary path, and hits may overtake it
	end := time.Now().Add(lease - 3*time.Second)
	numbers := make([]uint64, len(sockets))
	done := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(done)
	wg.Go(func() { b.change(done) })
	wg.Go(func() { transfers(t, from, to, done) })
	for time.Now().Before(end) {
		onCPU(t, 0, func() {
			b := make([]byte, 200)
			for range 1 + rand.IntN(400) {
				for i, c := range sockets {
					for range rand.IntN(4) {
						numbers[i]++
						binary.BigEndian.PutUint64(b, numbers[i])
						_, _ = c.Write(b)
					}
				}
			}
		})
		time.Sleep(time.Duration(rand.IntN(80)) * time.Millisecond)
	}
	s := b.status().Stages["hits"]
	t.Logf("%d packets, %d moves, %.0f%% handed over", got.got.Load(), s.Moves, 100*s.HandedOver())
	if late := got.late.Load(); late != 0 {
		t.Errorf("%d of %d packets were overtaken", late, got.got.Load())
	}
	if s.Moves == 0 || s.HandedOver() == 0 {
		t.Errorf("nothing was handed over: %+v", s)
	}
}

// transfers sends random content over TCP again and again.
func transfers(t *testing.T, from, to *pod, done chan struct{}) {
	content := make([]byte, 1<<20)
	for i := range content {
		content[i] = byte(rand.Uint32())
	}
	var l net.Listener
	if err := to.Do(func() (err error) { l, err = net.Listen("tcp4", ":7001"); return err }); err != nil {
		t.Error(err)
		return
	}
	defer l.Close()
	sum := sha256.Sum256(content)
	for {
		select {
		case <-done:
			return
		default:
		}
		var out net.Conn
		if err := from.Do(func() (err error) {
			out, err = net.Dial("tcp4", netip.AddrPortFrom(to.Address, 7001).String())
			return err
		}); err != nil {
			t.Error(err)
			return
		}
		go func() {
			_, _ = io.Copy(out, bytes.NewReader(content))
			out.Close()
		}()
		in, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		_ = in.SetDeadline(time.Now().Add(20 * time.Second))
		got, err := io.ReadAll(in)
		in.Close()
		if err != nil || sha256.Sum256(got) != sum {
			t.Errorf("TCP: %d bytes came, %v", len(got), err)
			return
		}
	}
}

// masks reads the RPS masks of the device and of a pod.
func (h *host) masks(p *pod) (ofDevice, ofPod string) {
	h.t.Helper()
	read := func(n *lab.Node, device string) string {
		s, err := openSysfs(n.NS)
		must(h.t, err)
		defer s.close()
		m, err := s.mask(device, "rx-0")
		must(h.t, err)
		return m.mask()
	}
	return read(h.Node, device), read(p.Node, "eth0")
}

func setMask(t testing.TB, n *lab.Node, device string, to cpuSet) {
	t.Helper()
	s, err := openSysfs(n.NS)
	must(t, err)
	defer s.close()
	_, err = s.setMask(device, "rx-0", to)
	must(t, err)
}

func programsAt(t testing.TB, n *lab.Node, device string, where ebpf.AttachType) int {
	t.Helper()
	count := 0
	must(t, n.Do(func() error {
		i, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		r, err := link.QueryPrograms(link.QueryOptions{Target: i.Index, Attach: where})
		if err == nil {
			count = len(r.Programs)
		}
		return err
	}))
	return count
}

// Masks and programs: put there, put right, kept over the agent's death, followed to a new device, and taken away.
func TestMasksAndPrograms(t *testing.T) {
	_, b := newHosts(t, PartOptions{Mode: Off})
	p := b.pod(2)
	setMask(t, b.Node, device, cpuSet{1}) // somebody's own
	now, err := readSample()
	must(t, err)
	all := now.set().mask()
	check := func(what, ofDevice, ofPod string, programs int) {
		t.Helper()
		if d, q := b.masks(p); d != ofDevice || q != ofPod {
			t.Errorf("%s: masks %s and %s, not %s and %s", what, d, q, ofDevice, ofPod)
		}
		for _, at := range []struct {
			device string
			where  ebpf.AttachType
		}{{lab.Nic, ebpf.AttachTCXIngress}, {device, ebpf.AttachTCXIngress}, {p.HostInterface, ebpf.AttachTCXEgress}} {
			if n := programsAt(t, b.Node, at.device, at.where); n != programs {
				t.Errorf("%s: %d programs at %s", what, n, at.device)
			}
		}
	}
	check("before", "2", "0", 0)
	b.start(On)
	check("auto", all, all, 1)
	b.stop()
	check("without the agent", all, all, 1)
	b.start(On)
	check("another agent", all, all, 1)
	setMask(t, b.Node, device, nil)
	setMask(t, p.Node, "eth0", cpuSet{0})
	b.part.lookedAtPods = time.Time{}
	must(t, b.part.Refresh())
	check("put right", all, all, 1)
	first, second := halves(now.set())
	b.start(Static)
	check("static", first.mask(), second.mask(), 0)
	b.start(Off)
	check("off", "2", "0", 0)
	b.start(On)
	check("auto again", all, all, 1)
	b.Run("ip", "link", "del", device)
	_, err = b.overlay.Reconcile()
	must(t, err)
	must(t, b.part.Refresh())
	check("a new device", all, all, 1)
	b.start(Off)
	check("off again", "0", "0", 0)
	b.start(On)
	b.Run("ip", "link", "del", p.HostInterface)
	b.overlay.RemovePod(p.ID)
	must(t, b.part.PodRemoved(p.Pod))
	if s := b.status(); s.Pods != 0 || len(b.part.Problems()) != 0 {
		t.Errorf("%+v %v", s, b.part.Problems())
	}
}

// Steering runs behind whoever is at the NIC already, also when they come later.
func TestBehindOthers(t *testing.T) {
	_, b := newHosts(t, PartOptions{Mode: On})
	newSpy(t, b.Node, lab.Nic)
	must(t, b.part.Refresh())
	id := func() uint32 {
		info, err := b.part.s.obj.Nic.Info()
		must(t, err)
		id, _ := info.ID()
		return uint32(id)
	}
	must(t, b.Do(func() error {
		r, err := link.QueryPrograms(link.QueryOptions{Target: b.overlay.Underlay().Index, Attach: ebpf.AttachTCXIngress})
		if err == nil && (len(r.Programs) != 2 || uint32(r.Programs[1].ID) != id()) {
			t.Errorf("%+v, steering is %d", r.Programs, id())
		}
		return err
	}))
}

// A pod whose namespace the agent does not see has its network, and is named.
func TestPodNotSeen(t *testing.T) {
	_, b := newHosts(t, PartOptions{Mode: On})
	p := b.pod(2)
	p.Pod.Netns = "/run/netns/nonesuch"
	must(t, b.part.PodAdded(p.Pod))
	if s := b.status(); s.Pods != 0 || !strings.Contains(s.NotSpread[p.Address.String()], "nonesuch") || len(b.part.Problems()) != 0 {
		t.Errorf("%+v %v", s, b.part.Problems())
	}
}
