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

// bridge makes what flannel makes: a VXLAN device, a bridge for the pods, masquerade.
func (h *host) bridge(o *host) {
	run(h.t, h.h, fmt.Sprintf(`set -e
ip addr add %[1]s/24 dev phys
ip link set phys up
ip link add flannel.1 address %[2]s type vxlan id 1 local %[1]s dev phys dstport 8472 nolearning
ip link set flannel.1 mtu 1450 up
ip addr add %[3]s/32 dev flannel.1
ip neigh replace %[4]s lladdr %[5]s dev flannel.1 nud permanent
bridge fdb append %[5]s dev flannel.1 dst %[6]s self permanent
ip route add %[7]s via %[4]s dev flannel.1 onlink
ip link add cni0 type bridge
ip link set cni0 mtu 1450 up
ip addr add %[8]s/24 dev cni0
echo 1 >/proc/sys/net/ipv4/ip_forward
nft -f - <<EOF2
table inet flannel {
	chain forward {
		type filter hook forward priority filter
		ct state established accept
	}
	chain postrouting {
		type nat hook postrouting priority srcnat
		ip saddr 10.0.0.0/8 ip daddr != 10.0.0.0/8 masquerade
	}
}
EOF2`, h.node(), h.lease().MAC, h.podAddr(0), o.podAddr(0), o.lease().MAC, o.node(), o.prefix(), h.podAddr(1)))
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
	ha, hb := wire(b, nil, ordinaryPath)
	v := []variant{{name: "host", client: ha.h, server: hb.h, to: hb.node()}}

	ba, bb := wire(b, nil, nothing)
	ba.bridge(bb)
	bb.bridge(ba)
	v = append(v, variant{name: "vxlan+bridge", client: ba.addBridgedPod(2).h, server: bb.addBridgedPod(2).h, to: bb.podAddr(2)})

	ra, rb := wire(b, nil, ordinaryPath)
	v = append(v, variant{name: "routed", client: ra.addPod(2, false).h, server: rb.addPod(2, false).h, to: rb.podAddr(2)})

	fa, fb := wire(b, nil, bothPaths)
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
		rates, cpu, quick, ratio := make([][]float64, len(all)), make([][]float64, len(all)), make([][]float64, len(all)), make([]Counters, len(all))
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
				quick[i] = append(quick[i], float64(r.Quick.Nanoseconds())/1000)
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
			line := fmt.Sprintf("%-10s %-12s %12.0f /s  %.3f of host  %.3f of bridge  %.2f us CPU  %.2f us quick", kind, v.name, m, m/median(rates[0]), m/median(rates[1]), c, median(quick[i]))
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
