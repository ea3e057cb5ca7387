package steer

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"lamina/net/lab"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// programs is steering's programs for single packets, on the CPU that the test is pinned to: the first that it may use.
type programs struct {
	*steerer
	t    *testing.T
	prog testObjects
	cpu  int
}

func newPrograms(t *testing.T) *programs {
	t.Helper()
	hasTCX.Need(t)
	p := &programs{t: t}
	var err error
	p.steerer, err = open(options{ns: lab.NewNode(t, "steer").NS, pins: newPins(t), vni: 1, port: 4789, heartbeat: time.Hour, worth: -1, margin: -1})
	must(t, err)
	t.Cleanup(func() {
		p.close()
		must(t, removePins(p.o.pins))
	})
	must(t, loadTestObjects(&p.prog, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		"control": p.obj.Control, "flowlets": p.obj.Flowlets, "locals": p.obj.Locals, "reasons": p.obj.Reasons, "chosen": p.obj.Chosen,
	}}))
	t.Cleanup(func() { p.prog.Close() })
	runtime.LockOSThread()
	var old, one unix.CPUSet
	must(t, unix.SchedGetaffinity(0, &old))
	for !old.IsSet(p.cpu) {
		p.cpu++
	}
	one.Set(p.cpu)
	must(t, unix.SchedSetaffinity(0, &one))
	t.Cleanup(func() {
		must(t, unix.SchedSetaffinity(0, &old))
		runtime.UnlockOSThread()
	})
	p.control.Secret = 7 // so that the test is the same each time
	p.control.Heartbeat = uint64(monotonic())
	return p
}

// set is a host of n CPUs that starts with this one; all others have the same load.
func (p *programs) set(n int, here, others float64) {
	p.t.Helper()
	p.loads = map[int]load{p.cpu: {busy: here, receiving: here}}
	cpus := cpuSet{}
	for i := range n {
		cpus = append(cpus, p.cpu+i)
		if i > 0 {
			p.loads[p.cpu+i] = load{busy: others, receiving: others}
		}
	}
	p.control.Load[0].Squeezed = 1
	must(p.t, p.setCPUs(cpus))
}

type packet struct {
	hash, tcIndex uint32
	gso           uint32
	iif           uint32
	segments      uint32
	data          []byte
}

func (p *programs) run(prog *ebpf.Program, k packet) (hash uint32) {
	p.t.Helper()
	ctx, ctxOut := make([]byte, 192), make([]byte, 192)
	binary.NativeEndian.PutUint32(ctx[36:], k.iif)
	binary.NativeEndian.PutUint32(ctx[48:], k.hash) // cb[0]
	binary.NativeEndian.PutUint32(ctx[52:], k.tcIndex)
	binary.NativeEndian.PutUint32(ctx[164:], k.segments)
	binary.NativeEndian.PutUint32(ctx[176:], k.gso)
	opts := ebpf.RunOptions{Data: k.data, DataOut: make([]byte, len(k.data)+256), Context: ctx, ContextOut: ctxOut}
	if _, err := prog.Run(&opts); err != nil {
		p.t.Fatalf("%x: %v", k.data, err)
	}
	if !bytes.Equal(opts.DataOut, k.data) {
		p.t.Fatalf("%x became %x", k.data, opts.DataOut)
	}
	return binary.NativeEndian.Uint32(ctxOut[56:])
}

// nic sends a packet of a flow through the NIC's program; out is the place in RPS' table that the hash leads to, -1 if none.
func (p *programs) nic(flow uint16) int {
	p.t.Helper()
	return p.rps(p.run(p.prog.TestNic, packet{hash: 5, data: tunnelled(inner(flow))}))
}

func (p *programs) device(flow uint16, hash uint32) int {
	p.t.Helper()
	return p.rps(p.run(p.prog.TestDevice, packet{hash: hash, data: inner(flow)}))
}

// rps is what the kernel's get_rps_cpu does.
func (p *programs) rps(hash uint32) int {
	if hash == 0 {
		return -1
	}
	return int(uint64(hash) * uint64(p.control.Cpus) >> 32)
}

func (p *programs) reason(s Stage, r Reason) uint64 {
	p.t.Helper()
	c, err := p.counters()
	must(p.t, err)
	return c.reasons[s][r]
}

// drain says that what was handed over until now has left the queues of CPUs.
func (p *programs) drain() {
	p.t.Helper()
	time.Sleep(5 * time.Microsecond) // the table's times have a resolution of one
	for i := range p.control.Load {
		p.control.Load[i].Drained = uint64(monotonic())
	}
	must(p.t, p.write())
}

// packets

var mac = make([]byte, 12) // of the loopback interface, which test runs are received on

func frame(proto uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16(bytes.Clone(mac), proto), payload...)
}

func ipv4(proto byte, payload []byte) []byte {
	h := make([]byte, 20)
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	copy(h[12:], []byte{10, 1, 0, 2, 10, 2, 0, 3})
	return append(h, payload...)
}

func udp(from, to uint16, payload []byte) []byte {
	h := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from), to)
	h = binary.BigEndian.AppendUint16(h, uint16(8+len(payload)))
	return append(append(h, 0, 0), payload...)
}

func inner(flow uint16) []byte { return frame(0x0800, ipv4(17, udp(flow, 7000, []byte("hello")))) }

func tunnelled(in []byte) []byte {
	return frame(0x0800, ipv4(17, udp(50000, 4789, append([]byte{8, 0, 0, 0, 0, 0, 1, 0}, in...))))
}

// forget empties the table of choices.
func (p *programs) forget() {
	p.t.Helper()
	keys := make([]uint32, p.obj.Flowlets.MaxEntries())
	for i := range keys {
		keys[i] = uint32(i)
	}
	_, err := p.obj.Flowlets.BatchUpdate(keys, make([]uint64, len(keys)), nil)
	must(p.t, err)
}

// choice is the CPU in the table of choices.
func (p *programs) choice(flow uint16) int {
	p.t.Helper()
	var word uint64
	must(p.t, p.obj.Flowlets.Lookup(uint32(flowHash(p.control.Secret, inner(flow))>>16%flowlets), &word))
	return int(word & 0x3fff)
}

// On hosts of 1 to 64 CPUs, and the most there may be, RPS' arithmetic takes every flow to the CPU that was chosen, and all
// but this one, which is busy, are chosen.
func TestHash(t *testing.T) {
	p := newPrograms(t)
	sizes := []int{maxCPUs - p.cpu}
	for n := 1; n <= 64; n++ {
		sizes = append(sizes, n)
	}
	for _, n := range sizes {
		p.set(n, 1, 0)
		seen := map[int]int{}
		p.forget()
		for flow := range uint16(16 * min(n, 64)) {
			place, want := p.nic(flow), p.choice(flow)-p.cpu
			if n == 1 { // goes on here
				want = -1
				p.device(flow, 0)
			}
			if place != want {
				t.Fatalf("%d CPUs, flow %d: RPS goes to %d, chosen was %d", n, flow, place, want)
			}
			seen[place]++
		}
		if n > 1 && n <= 64 && len(seen) != n-1 || seen[0] != 0 {
			t.Errorf("%d CPUs: places and packets %v", n, seen)
		}
	}
}

// The choice is that of the model, which shares no code with the programs: with all kinds of loads.
func TestChoiceIsTheModels(t *testing.T) {
	p := newPrograms(t)
	p.o.worth, p.control.Worth = 0.3, 300
	p.o.margin, p.control.Margin = 0.1, 100
	r := rand.New(rand.NewPCG(1, 2))
	steered, stayed, words := 0, 0, map[uint64]bool{}
	for flow := range uint16(2000) {
		hash := flowHash(7, inner(flow))
		if word := hash >> 16 % flowlets; words[word] {
			continue // shares the choice of another
		} else {
			words[word] = true
		}
		n := 2 + r.IntN(64)
		p.set(n, 0, 0)
		loads := make([]int, n)
		for i := range loads {
			loads[i] = r.IntN(1001)
			p.control.Load[i].Busy = uint32(loads[i])
		}
		receiving := r.IntN(loads[0] + 1)
		p.control.Load[0].Receiving = uint32(receiving)
		p.drain()
		when := monotonic() >> 26
		place := p.nic(flow)
		if monotonic()>>26 != when {
			if place < 0 {
				p.device(flow, 0)
			}
			continue // nobody knows when it chose
		}
		want := model{worth: 300, margin: 100}.choose(hash, VXLAN, uint64(when), receiving, loads, 0, -1)
		if want == 0 {
			want = -1 // goes on here
			stayed++
			p.device(flow, 0)
		} else {
			steered++
		}
		if place != want {
			t.Fatalf("flow %d, loads %v: place %d, not %d", flow, loads, place, want)
		}
	}
	if steered == 0 || stayed == 0 {
		t.Errorf("%d were steered, %d stayed", steered, stayed)
	}
}

// A flow that was handed over stays with its CPU until that one's queue has been seen empty.
func TestMovesAcrossAGap(t *testing.T) {
	p := newPrograms(t)
	p.set(8, 1, 0)
	first := p.nic(1)
	if first < 1 {
		t.Fatal("not steered: ", first)
	}
	p.control.Load[first].Busy = 1000 // worse than all others
	must(t, p.write())
	for range 10 {
		if now := p.nic(1); now != first {
			t.Fatalf("moved from %d to %d without a gap", first, now)
		}
	}
	p.control.Load[first].Drained = uint64(monotonic()) - 1<<30 // before its packets
	must(t, p.write())
	if now := p.nic(1); now != first {
		t.Errorf("moved to %d though the queue was last seen empty before", now)
	}
	if moves := p.moves(); moves != 0 {
		t.Errorf("%d moves", moves)
	}
	p.drain()
	second := p.nic(1)
	if second == first || second < 1 {
		t.Errorf("not moved away from %d: %d", first, second)
	}
	if moves := p.moves(); moves != 1 {
		t.Errorf("%d moves", moves)
	}
	if kept := p.reason(VXLAN, Kept); kept != 11 {
		t.Errorf("%d kept", kept)
	}
}

func (p *programs) moves() uint64 {
	p.t.Helper()
	c, err := p.counters()
	must(p.t, err)
	return c.moves[VXLAN]
}

// A flow that was not handed over moves when its packets have passed the VXLAN device, all of them: without a pause.
func TestLeavesABusyCPU(t *testing.T) {
	p := newPrograms(t)
	p.o.worth, p.control.Worth = 0.7, 700
	p.set(4, 0, 0)
	if got := p.nic(1); got != -1 {
		t.Fatalf("an idle CPU hands over to %d", got)
	}
	if got := p.run(p.prog.TestNic, packet{hash: 5, segments: 3, data: tunnelled(inner(1))}); got != 0 {
		t.Fatal("the second: ", got)
	}
	p.control.Load[0].Busy, p.control.Load[0].Receiving = 1000, 1000
	must(t, p.write())
	arrived := 0
	for ; arrived < 3; arrived++ {
		if got := p.nic(1); got != -1 {
			t.Fatalf("moved to %d while packets are on their way here", got)
		}
		p.device(1, 0)
	}
	p.run(p.prog.TestDevice, packet{segments: 3, data: inner(1)}) // three in one
	p.device(1, 9)                                                // handed over by another CPU: is none of them
	if got := p.nic(1); got != -1 {
		t.Fatalf("moved to %d while a packet is on its way here", got)
	}
	p.device(1, 0)
	p.device(1, 0)
	if got := p.nic(1); got < 1 {
		t.Errorf("does not leave: %d", got)
	}
}

// Nothing is handed over while the host has no time to spare, without the agent, or when this CPU has time.
func TestStays(t *testing.T) {
	p := newPrograms(t)
	p.o.worth, p.control.Worth = 0.7, 700
	for _, c := range []struct {
		why    Reason
		change func()
		undo   func()
	}{
		{Saturated, func() { p.control.Saturated = 1 }, func() { p.control.Saturated = 0 }},
		{Stale, func() { p.control.Heartbeat -= uint64(2 * time.Hour) }, func() { p.control.Heartbeat = uint64(monotonic()) }},
		{Idle, func() { p.control.Load[0].Receiving = 349 }, func() {}},
		{NoBetter, func() { p.fill(950); p.control.Margin = 100 }, func() { p.fill(0) }},
	} {
		p.set(4, 1, 0)
		p.drain()
		if got := p.nic(7); got < 1 {
			t.Fatalf("before %s: %d", c.why, got)
		}
		c.change()
		must(t, p.write())
		if got := p.nic(7); got < 1 {
			t.Errorf("%s: a flow under way comes back", c.why)
		}
		before := p.reason(VXLAN, c.why)
		p.drain()
		if got := p.nic(7); got != -1 {
			t.Errorf("%s: handed to %d", c.why, got)
		}
		if n := p.reason(VXLAN, c.why) - before; n != 1 {
			t.Errorf("%s: counted %d", c.why, n)
		}
		p.device(7, 0)
		c.undo()
	}
}

// A CPU that packets keep busy, and that leaves none for later, hands over flows that send much at once and no others.
func TestOneByOneStays(t *testing.T) {
	p := newPrograms(t)
	p.o.worth, p.control.Worth = 0.7, 700
	p.set(4, 1, 0)
	p.control.Load[0].Squeezed = 0
	must(t, p.write())
	if got := p.nic(1); got != -1 {
		t.Errorf("one by one: handed to %d", got)
	}
	if n := p.reason(VXLAN, Idle); n != 1 {
		t.Errorf("counted %d", n)
	}
	p.device(1, 0)
	bulk := packet{hash: 5, gso: 10, segments: 2, data: tunnelled(inner(1))}
	if got := p.rps(p.run(p.prog.TestNic, bulk)); got < 1 {
		t.Errorf("much at once: %d", got)
	}
}

func (p *programs) fill(busy uint32) {
	for i := range p.control.Load[1:] {
		p.control.Load[i+1].Busy = busy
	}
}

// What the fast path is about to serve stays, unless packets of its flow are elsewhere already, and leaves no trace.
func TestKeepsOff(t *testing.T) {
	p := newPrograms(t)
	p.set(4, 1, 0)
	for range 2 {
		if got := p.run(p.prog.TestNic, packet{hash: 5, tcIndex: keepOff, data: tunnelled(inner(1))}); got != 0 {
			t.Errorf("handed over: %x", got)
		}
		if got := p.run(p.prog.TestDevice, packet{tcIndex: keepOff, data: inner(1)}); got == 0 || p.rps(got) != 0 {
			t.Errorf("handed over by the device: %x", got)
		}
	}
	if p.reason(VXLAN, ToBeFast) != 2 || p.reason(Pod, ToBeFast) != 2 {
		t.Error("not counted")
	}
	place := p.nic(1)
	if place < 1 {
		t.Fatal("not steered: ", place)
	}
	if got := p.rps(p.run(p.prog.TestNic, packet{hash: 5, tcIndex: keepOff, data: tunnelled(inner(1))})); got != place {
		t.Errorf("overtakes: to %d, not %d", got, place)
	}
}

// The two stages are chosen apart.
func TestStagesAreApart(t *testing.T) {
	p := newPrograms(t)
	p.set(16, 1, 0)
	same := 0
	for flow := range uint16(100) {
		a, b := p.nic(flow), p.device(flow, 1)
		if a < 1 || b < 1 {
			t.Fatal(a, b)
		}
		if a == b {
			same++
		}
	}
	if same > 30 {
		t.Errorf("%d of 100 flows have the same CPU in both stages", same)
	}
}

// Packets that are none of the tunnel's keep hash and content; what is in the tunnel and not IPv4 stays here.
func TestOthersUntouched(t *testing.T) {
	p := newPrograms(t)
	p.set(4, 1, 0)
	edit := func(b []byte, at int, v byte) []byte { b[at] = v; return b }
	whole := tunnelled(inner(1))
	for name, data := range map[string][]byte{
		"another port":       edit(tunnelled(inner(1)), 37, 0xb6),
		"another VNI":        edit(tunnelled(inner(1)), 48, 2),
		"VXLAN flags":        edit(tunnelled(inner(1)), 42, 9),
		"TCP":                edit(tunnelled(inner(1)), 23, 6),
		"fragment":           edit(tunnelled(inner(1)), 21, 1),
		"first fragment":     edit(tunnelled(inner(1)), 20, 0x20),
		"options":            edit(tunnelled(inner(1)), 14, 0x46),
		"ARP":                frame(0x0806, make([]byte, 28)),
		"IPv6":               frame(0x86dd, make([]byte, 60)),
		"to somebody else":   edit(tunnelled(inner(1)), 0, 2),
		"no VXLAN header":    whole[:45],
		"plain UDP":          frame(0x0800, ipv4(17, udp(1, 2, nil))),
		"UDP without header": frame(0x0800, ipv4(17, nil)),
	} {
		if got := p.run(p.prog.TestNic, packet{hash: 0x1234567, data: data}); got != 0x1234567 {
			t.Errorf("%s: hash %x", name, got)
		}
	}
	for name, in := range map[string][]byte{
		"ARP": frame(0x0806, make([]byte, 28)), "IPv6": frame(0x86dd, make([]byte, 60)), "short": inner(1)[:30], "not IPv4": edit(inner(1), 14, 0x65),
	} {
		if got := p.run(p.prog.TestNic, packet{hash: 0x1234567, data: tunnelled(in)}); got != 0 {
			t.Errorf("inner %s: hash %x", name, got)
		}
	}
	for name, in := range map[string][]byte{"ARP": frame(0x0806, make([]byte, 28)), "IPv6": frame(0x86dd, make([]byte, 60))} {
		if got := p.run(p.prog.TestDevice, packet{hash: 0xffffffff, data: in}); got == 0 || p.rps(got) != 0 {
			t.Errorf("%s out of the tunnel: hash %x", name, got)
		}
	}
	if n := p.reason(VXLAN, NoFlow); n != 4 {
		t.Errorf("%d counted", n)
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 3000 {
		b := tunnelled(inner(uint16(r.Uint32())))
		for range r.IntN(6) {
			b[12+r.IntN(len(b)-12)] = byte(r.Uint32())
		}
		b = b[:34+r.IntN(len(b)-33)]
		p.run(p.prog.TestNic, packet{hash: 5, data: b})
		if len(b) > 50+34 {
			p.run(p.prog.TestDevice, packet{hash: 5, data: b[50:]})
		}
	}
}

// Fragments of a datagram take one way.
func TestFragments(t *testing.T) {
	p := newPrograms(t)
	p.set(64, 1, 0)
	places := map[int]bool{}
	for i := range byte(10) {
		in := inner(uint16(i)) // what is in the place of ports is content
		in[14+6], in[14+7] = 0x20, i
		places[p.nic0(in)] = true
	}
	if len(places) != 1 {
		t.Errorf("places %v", places)
	}
}

func (p *programs) nic0(in []byte) int {
	return p.rps(p.run(p.prog.TestNic, packet{hash: 5, data: tunnelled(in)}))
}

// Only what comes out of the tunnel may be handed over on its way into a pod.
func TestPodProgram(t *testing.T) {
	p := newPrograms(t)
	p.set(4, 1, 0)
	must(t, p.setDevice(1))
	if got := p.run(p.prog.TestPod, packet{hash: 77, iif: 1, data: inner(1)}); got != 77 {
		t.Errorf("out of the tunnel: %d", got)
	}
	must(t, p.setDevice(4))
	for _, hash := range []uint32{1, 77, 1 << 31, 1<<32 - 1} {
		if got := p.run(p.prog.TestPod, packet{hash: hash, iif: 1, data: inner(1)}); got == 0 || p.rps(got) != 0 {
			t.Errorf("from elsewhere: %x", got)
		}
	}
}

// Hits of the fast path go into the pod at once, or to another CPU after a moment without packets; what has waited in a queue
// is not overtaken.
func TestHits(t *testing.T) {
	p := newPrograms(t)
	p.set(4, 1, 0)
	hit := func() int { return p.rps(p.run(p.prog.TestHit, packet{data: inner(1)})) }
	const moment = 3 * time.Millisecond
	if got := hit(); got != -1 {
		t.Fatalf("the first that is seen goes to %d", got)
	}
	time.Sleep(moment)
	first := hit()
	if first < 1 {
		t.Fatalf("a busy CPU keeps it: %d", first)
	}
	time.Sleep(moment)
	if got := hit(); got != first {
		t.Errorf("moved from %d to %d though packets may be in its queue", first, got)
	}
	if got := p.device(1, 1); got != first {
		t.Errorf("the ordinary path takes it to %d, not %d", got, first)
	}
	p.drain()
	if got := hit(); got != -1 {
		t.Errorf("does not begin anew: %d", got)
	}
	if got := p.device(1, 1); got != 0 {
		t.Errorf("the ordinary path overtakes hits by %d", got)
	}
	if got := hit(); got != 0 {
		t.Errorf("a hit overtakes a packet in this CPU's queue: %d", got)
	}
	c, err := p.counters()
	must(t, err)
	if c.moves[Hits] != 2 || c.chosen[Hits][p.cpu][p.cpu+first] != 2 {
		t.Errorf("%+v", c)
	}
}
