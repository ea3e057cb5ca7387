package fastpath

import (
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"lamina/net/lab/traffic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

var (
	benchRounds = flag.Int("paths.rounds", 5, "rounds of BenchmarkPaths")
	benchKinds  = flag.String("paths.kinds", "TCP_RR,UDP_RR", "kinds of BenchmarkPaths")
	benchTime   = flag.Duration("paths.time", time.Second, "of one measurement of BenchmarkPaths")
	benchFlows  = flag.Int("paths.flows", 1, "flows at once of BenchmarkPaths")
	benchNoGSO  = flag.Bool("paths.nogso", false, "without segmentation offload")
)

// variant is a way from a client to a server.
type variant struct {
	name           string
	client, server netns.NsHandle
	to             netip.Addr
	a, b           *host // whose counters tell of hits; nil: none
}

// bridge puts the pods of a host behind a bridge, as flannel does.
func (h *host) bridge() {
	run(h.t, h.h, fmt.Sprintf("ip link add cni0 type bridge && ip link set cni0 mtu 1450 up && ip addr add %s/24 dev cni0", h.podAddr(1)))
}

func (h *host) addBridgedPod(i int) *podNS {
	h.t.Helper()
	p := &podNS{h: newNS(h.t)}
	in(h.t, h.h, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "br" + fmt.Sprint(i), MTU: 1450}, PeerName: "eth0"}); err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(p.h))
	})
	run(h.t, h.h, fmt.Sprintf("ip link set br%d master cni0 up", i))
	run(h.t, p.h, fmt.Sprintf("ip link set lo up && ip link set eth0 mtu 1450 up && ip addr add %s/24 dev eth0 && ip route add default via %s", h.podAddr(i), h.podAddr(1)))
	return p
}

func variants(b testing.TB) []variant {
	ha, hb := wire(b, nil, true)
	v := []variant{{name: "host", client: ha.h, server: hb.h, to: hb.node()}}

	ba, bb := wire(b, nil, true)
	ba.bridge()
	bb.bridge()
	v = append(v, variant{name: "vxlan+bridge", client: ba.addBridgedPod(2).h, server: bb.addBridgedPod(2).h, to: bb.podAddr(2)})

	ra, rb := wire(b, nil, true)
	v = append(v, variant{name: "routed", client: ra.addPod(2, false).h, server: rb.addPod(2, false).h, to: rb.podAddr(2)})

	fa, fb := wire(b, nil, false)
	v = append(v, variant{name: "fast", client: fa.addPod(2, true).h, server: fb.addPod(2, true).h, to: fb.podAddr(2), a: fa, b: fb})
	if *benchNoGSO {
		for _, h := range []*host{ha, ba, ra, fa, hb, bb, rb, fb} {
			run(b, h.h, "ethtool -K phys tso off gso off gro off")
		}
		for _, x := range v[1:] {
			for _, h := range []netns.NsHandle{x.client, x.server} {
				run(b, h, "ethtool -K eth0 tso off gso off gro off")
			}
		}
	}
	return v
}

// BenchmarkPaths compares the ways from pod to pod with the hosts' own network, in turn:
//
//	go test ./net/fastpath -run - -bench Paths -paths.rounds 10
func BenchmarkPaths(b *testing.B) {
	all := variants(b)
	for kind := range strings.SplitSeq(*benchKinds, ",") {
		rates, cpu, ratio := make([][]float64, len(all)), make([][]float64, len(all)), make([]Counters, len(all))
		for round := range *benchRounds + 1 {
			for i, v := range all {
				var before Counters
				if v.a != nil {
					before = v.a.counters()
				}
				m := traffic.Run{Kind: traffic.Kind(kind), Client: v.client, Server: v.server, At: netip.AddrPortFrom(v.to, 5201), Duration: *benchTime, Flows: *benchFlows}
				if m.Kind == traffic.UDPRate {
					m.Size = 64
				}
				r, err := m.Do(b.Context())
				if err != nil {
					b.Fatalf("%s %s: %v", kind, v.name, err)
				}
				if round == 0 {
					continue // warms up
				}
				rates[i] = append(rates[i], r.Rate())
				cpu[i] = append(cpu[i], float64(r.CPU.Microseconds())/float64(r.Count))
				if v.a != nil {
					n := v.a.counters().Sub(before)
					for p := range n {
						for reason := range n[p] {
							ratio[i][p][reason] += n[p][reason]
						}
					}
				}
			}
		}
		for i, v := range all {
			m, c := median(rates[i]), median(cpu[i])
			line := fmt.Sprintf("%-10s %-12s %12.0f /s  %.3f of host  %.3f of bridge  %.2f us CPU", kind, v.name, m, m/median(rates[0]), m/median(rates[1]), c)
			if v.a != nil {
				line += fmt.Sprintf("  hits %.2f%% out %.2f%% in", 100*ratio[i].Ratio(Egress), 100*ratio[i].Ratio(Ingress))
			}
			fmt.Println(line)
		}
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
