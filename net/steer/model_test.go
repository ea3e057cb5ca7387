package steer

import "encoding/binary"

// model is the choice that the programs make, written again.
type model struct{ worth, margin int } // 1/1000

func mix(v uint64) uint64 {
	v ^= v >> 32
	v *= 0x9216d5d98979fb1b
	v ^= v >> 29
	v *= 0xd1310ba698dfb5ad
	return v ^ v>>32
}

// flowHash is that of a frame with UDP or TCP without IP options.
func flowHash(secret uint64, frame []byte) uint64 {
	native := func(at int) uint64 { return uint64(binary.NativeEndian.Uint32(frame[at:])) }
	return mix(mix(secret^(native(26)<<32|native(30)))+(native(34)<<8|uint64(frame[23]))) | 1
}

// candidates are the two CPUs that a flow may be handed to in a period of time.
func candidates(flow uint64, stage Stage, period uint64, n, here int) (a, b int) {
	h := mix(flow + uint64(stage) + period)
	others := []int{}
	for i := range n {
		if i != here {
			others = append(others, i)
		}
	}
	m := uint64(len(others))
	a = int(h & 0xffffffff * m >> 32)
	if m > 1 {
		b = (a + 1 + int(h>>32*(m-1)>>32)) % int(m)
	}
	return others[a], others[b]
}

// choose is the place that a flow goes to which nothing keeps where it is; old is where it was, or -1.
func (m model) choose(flow uint64, stage Stage, period uint64, receiving int, loads []int, here, old int) int {
	away := old >= 0 && old != here
	worth := m.worth
	if away {
		worth /= 2
	}
	if receiving < worth {
		return here
	}
	best, b := candidates(flow, stage, period, len(loads), here)
	if loads[b] < loads[best] {
		best = b
	}
	if away && loads[old] <= loads[best]+m.margin {
		best = old
	}
	if loads[best]+m.margin > loads[here] {
		return here
	}
	return best
}
