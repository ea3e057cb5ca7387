package steer

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// A calculation, not a measurement: what the rules of this package make of hosts that nobody had at hand. CPUs work on the
// stages of flows, each in proportion to what is asked of it; what is too much is lost before it costs the next stage
// anything. Flows, their NIC's CPU (by RSS) and their candidates are random, loads are known as late and as smoothed as the
// agent knows them.

// Costs are CPU time a packet, as parts of that of all stages; handing over is paid by both sides.
const (
	costNIC, costVXLAN, costPod = 0.25, 0.45, 0.30
	costHandOver                = 0.05
)

type way int

const (
	oneCPU way = iota // all stages on the NIC's CPU: a host without steering
	halved            // static
	byLoad            // auto
)

// simFlow is a flow that asks for CPUs: 1.5 of them, if it is 1.5 times as fast as one can be.
type simFlow struct {
	asks   float64
	pauses float64 // how probable a pause is in a period that is long enough to move across
	hash   uint64
	at     [3]int  // the CPU of the NIC's stage, the VXLAN device's and the pod's
	got    float64 // part that arrives
}

// simulate returns the part of what is asked for that arrives.
func simulate(how way, cpus, flows int, asks, pauses float64, r *rand.Rand) (arrives float64) {
	all := make([]simFlow, flows)
	for i := range all {
		f := simFlow{asks: asks, pauses: pauses, hash: r.Uint64() | 1}
		nic := r.IntN(cpus)
		f.at = [3]int{nic, nic, nic}
		if how == halved {
			half := (cpus + 1) / 2
			f.at[1], f.at[2] = r.IntN(half), half+r.IntN(cpus-half)
		}
		all[i] = f
	}
	busy, smooth := make([]float64, cpus), make([]float64, cpus)
	saturated := false
	m := model{worth: 800, margin: 300}
	const periods, warm = 80, 40
	for period := range periods {
		work(all, busy)
		for i := range smooth {
			smooth[i] += (busy[i] - smooth[i]) / 4
		}
		if period >= warm {
			for _, f := range all {
				arrives += f.got / float64(flows*(periods-warm))
			}
		}
		if how != byLoad {
			continue
		}
		loads, sum := make([]int, cpus), 0.0
		for i, v := range smooth {
			loads[i], sum = int(v*1000), sum+v
		}
		limit := 0.85
		if saturated {
			limit -= 0.05
		}
		saturated = sum > limit*float64(cpus)
		for i := range all {
			all[i].choose(m, loads, saturated, uint64(period), r)
		}
	}
	return arrives
}

// choose moves the stages of a flow that may be moved.
func (f *simFlow) choose(m model, loads []int, saturated bool, period uint64, r *rand.Rand) {
	paused := r.Float64() < f.pauses
	for stage := range Hits {
		here, at := f.at[stage], f.at[stage+1]
		ranHere := stage == VXLAN && at == here
		switch {
		case !paused && !ranHere:
		case saturated:
			f.at[stage+1] = here
		default:
			f.at[stage+1] = m.choose(f.hash, stage, period, loads[here], loads, here, at)
		}
	}
}

// work shares the CPUs among the stages: it looks for what arrives where CPUs that are asked for too much serve everybody's
// same part, and writes how busy they are.
func work(all []simFlow, busy []float64) {
	serves := make([]float64, len(busy)) // the part of what a CPU is asked for
	for i := range serves {
		serves[i] = 1
	}
	for range 40 {
		asked := make([]float64, len(busy))
		for i := range all {
			f := &all[i]
			left := f.asks
			for stage, cost := range []float64{costNIC, costVXLAN, costPod} {
				cpu := f.at[stage]
				if stage > 0 && cpu != f.at[stage-1] {
					cost += costHandOver
				}
				if stage < 2 && f.at[stage+1] != cpu {
					cost += costHandOver
				}
				asked[cpu] += left * cost
				left *= serves[cpu]
			}
			f.got = left / f.asks
		}
		for i, a := range asked {
			want := 1.0
			if a > 1 {
				want = 1 / a
			}
			serves[i] += (want - serves[i]) / 2
			busy[i] = min(a, 1)
		}
	}
}

type simCase struct {
	cpus, flows  int
	asks, pauses float64
}

func simCases() (all []simCase) {
	for _, cpus := range []int{2, 8, 64} {
		for _, c := range []simCase{
			{flows: 1, asks: 1.5},
			{flows: max(1, cpus/4), asks: 1.2},
			{flows: cpus, asks: 0.5},
			{flows: cpus, asks: 0.5, pauses: 0.2},
			{flows: cpus * 8, asks: 0.5 / 8, pauses: 0.2},
			{flows: cpus * 2, asks: 1, pauses: 0.2}, // more than there is
		} {
			c.cpus = cpus
			all = append(all, c)
		}
	}
	return all
}

// run is the mean of many hosts.
func (c simCase) run(how way, hosts uint64) float64 {
	sum := 0.0
	for seed := range hosts {
		sum += simulate(how, c.cpus, c.flows, c.asks, c.pauses, rand.New(rand.NewPCG(seed, 9)))
	}
	return sum / float64(hosts)
}

// In the calculation steering never loses more than the cost of handing over, and it gains where few flows keep few CPUs
// busy.
func TestSimulation(t *testing.T) {
	for _, c := range simCases() {
		if c.cpus > 8 {
			continue // takes long
		}
		one, auto := c.run(oneCPU, 10), c.run(byLoad, 10)
		if auto < 0.97*one {
			t.Errorf("%+v: %.3f arrives with steering, %.3f without", c, auto, one)
		}
		if c.flows == 1 && auto < 1.2*one {
			t.Errorf("%+v: %.3f with steering, %.3f without", c, auto, one)
		}
	}
}

// BenchmarkSimulation prints the table in docs/network.md:
//
//	go test ./net/steer -run - -bench Simulation -benchtime 1x
func BenchmarkSimulation(b *testing.B) {
	for _, c := range simCases() {
		fmt.Printf("%2d CPUs %4d flows of %.2f CPUs, pauses %.1f: arrives without %3.0f%%  static %3.0f%%  auto %3.0f%%\n",
			c.cpus, c.flows, c.asks, c.pauses, 100*c.run(oneCPU, 100), 100*c.run(halved, 100), 100*c.run(byLoad, 100))
	}
}
