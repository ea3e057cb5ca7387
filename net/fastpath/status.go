package fastpath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// Counters are packets by program and reason since the maps were made.
type Counters [programs][reasons]uint64

// Counters reads them.
func (p *Path) Counters() (Counters, error) {
	var c Counters
	const n = int(programs) * int(reasons)
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return c, fmt.Errorf("fast path: counters: %w", err)
	}
	keys, values := make([]uint32, n), make([]uint64, n*cpus)
	var cursor ebpf.MapBatchCursor
	if _, err := p.obj.Counters.BatchLookup(&cursor, keys, values, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return c, fmt.Errorf("fast path: counters: %w", err)
	}
	for i, k := range keys {
		for _, v := range values[i*cpus : (i+1)*cpus] {
			c[k/uint32(reasons)][k%uint32(reasons)] += v
		}
	}
	return c, nil
}

// Sub is the difference to an earlier reading.
func (c Counters) Sub(before Counters) Counters {
	for i := range c {
		for j := range c[i] {
			c[i][j] -= before[i][j]
		}
	}
	return c
}

// Ratio is the part of the packets between pods of different nodes that took the fast path at a program, Egress or Ingress.
// It is 0 if there were none.
func (c Counters) Ratio(prog Program) float64 {
	var all uint64
	for r, n := range c[prog] {
		if !Reason(r).Others() {
			all += n
		}
	}
	if all == 0 {
		return 0
	}
	return float64(c[prog][Hit]) / float64(all)
}

// Each calls f for every counter that is not zero.
func (c Counters) Each(f func(Program, Reason, uint64)) {
	for prog := range c {
		for r, n := range c[prog] {
			if n != 0 {
				f(Program(prog), Reason(r), n)
			}
		}
	}
}
