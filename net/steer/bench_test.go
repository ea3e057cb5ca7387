package steer

import (
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"lamina/net/lab/traffic"
)

var (
	benchRounds = flag.Int("steer.rounds", 5, "rounds of BenchmarkModes")
	benchKinds  = flag.String("steer.kinds", "TCP_RR,UDP_RR,TCP_STREAM,UDP_RATE", "kinds of BenchmarkModes")
	benchTime   = flag.Duration("steer.time", time.Second, "of one measurement of BenchmarkModes")
	benchFlows  = flag.Int("steer.flows", 1, "flows at once of BenchmarkModes")
)

// BenchmarkModes compares the modes on the ordinary path and behind the fast path, in turn:
//
//	go test ./net/steer -run - -bench Modes -benchtime 1x -steer.rounds 10
func BenchmarkModes(b *testing.B) {
	type variant struct {
		path string
		mode Mode
	}
	var all []variant
	hosts := map[string][2]*host{}
	ends := map[string][2]*pod{}
	for _, path := range []string{"ordinary", "fast"} {
		x, y := newHosts(b, PartOptions{Mode: Off})
		x.prepare(PartOptions{})
		x.opts.sample, y.opts.sample = nil, nil
		ends[path], hosts[path] = [2]*pod{x.pod(2), y.pod(2)}, [2]*host{x, y}
		if path == "fast" {
			x.cached()
			y.cached()
		}
		for _, m := range []Mode{Off, Static, On} {
			all = append(all, variant{path, m})
		}
	}
	for kind := range strings.SplitSeq(*benchKinds, ",") {
		rates, cpu := make([][]float64, len(all)), make([][]float64, len(all))
		over := make([]float64, len(all))
		for round := range *benchRounds + 1 {
			for i, v := range all {
				for _, h := range hosts[v.path] {
					h.start(v.mode)
				}
				m := traffic.Run{Kind: traffic.Kind(kind), Client: ends[v.path][0].NS, Server: ends[v.path][1].NS, At: netip.AddrPortFrom(ends[v.path][1].Address, 5201), Duration: *benchTime, Flows: *benchFlows}
				if m.Kind == traffic.UDPRate {
					m.Size = 64
				}
				r, err := m.Do(b.Context())
				must(b, err)
				if round == 0 {
					continue // warms up
				}
				rates[i] = append(rates[i], r.Rate())
				cpu[i] = append(cpu[i], float64(r.CPU.Microseconds())/float64(r.Count))
				if v.mode == On {
					over[i] = hosts[v.path][1].status().Stages[VXLAN.String()].HandedOver()
				}
			}
		}
		for i, v := range all {
			off := i - i%3
			fmt.Printf("%-10s %-8s %-6s %12.0f /s  %.3f of off  %.3f us CPU  handed over %.1f%%\n",
				kind, v.path, v.mode, median(rates[i]), median(rates[i])/median(rates[off]), median(cpu[i]), 100*over[i])
		}
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
