// Package metrics shows an agent to Prometheus: what `lamina net status` knows, asked anew at every collection.
package metrics

import (
	"runtime"
	"strconv"

	"lamina/metrics/exporter"
	"lamina/net/control"
	"lamina/net/fastpath"
	"lamina/net/policy"
	"lamina/net/steer"

	"github.com/prometheus/client_golang/prometheus"
)

// The metrics, in the order of the documentation.
var (
	buildInfo = exporter.NewGauge("lamina_net_build_info", "1; the agent's version.", "version", "goversion")
	failed    = exporter.NewGauge("lamina_net_gather_failed", "1 if the agent could not say how things are; its log has the reason.")
	started   = exporter.NewGauge("lamina_net_start_time_seconds", "When the agent was started, in seconds since 1970.")
	problems  = exporter.NewGauge("lamina_net_problems", "What is wrong now: lines of PROBLEM in lamina net status.")
	repairs   = exporter.NewCounter("lamina_net_repairs_total", "Devices, routes, entries and rules that somebody changed or deleted and the agent put right.")

	nodeInfo    = exporter.NewGauge("lamina_net_node_info", "1; the node.", "node", "prefix", "interface", "device", "vni", "port")
	podMTU      = exporter.NewGauge("lamina_net_pod_mtu_bytes", "MTU of new pods.")
	underMTU    = exporter.NewGauge("lamina_net_underlay_mtu_bytes", "MTU of the interface to other nodes.")
	pods        = exporter.NewGauge("lamina_net_pods", "Pods on this node.")
	addresses   = exporter.NewGauge("lamina_net_addresses", "Addresses of the node's prefix, by state: free, leased, or resting after a release.", "state")
	damaged     = exporter.NewGauge("lamina_net_damaged_leases", "Lease files that cannot be read.")
	peers       = exporter.NewGauge("lamina_net_peers", "Other nodes, by whether everything that leads to them is there: ok or broken.", "state")
	fastOn      = exporter.NewGauge("lamina_net_fastpath_on", "1 if established connections can bypass the ordinary path.")
	packets     = exporter.NewCounter("lamina_net_packets_total", "Packets that the fast path's programs have seen, by why they did with them what they did. They begin at zero when the maps are made anew.", "program", "reason")
	spread      = exporter.NewCounter("lamina_net_spread_packets_total", "Packets that steering's programs have seen, by stage (vxlan or pod) and why they went on where they did.", "stage", "reason")
	handedOver  = exporter.NewCounter("lamina_net_handed_over_packets_total", "Packets that steering took to another CPU, by stage.", "stage")
	flowMoves   = exporter.NewCounter("lamina_net_flow_moves_total", "Flows that steering moved from CPU to CPU, by stage.", "stage")
	policies    = exporter.NewGauge("lamina_net_policies", "Network policies in force.")
	policyPods  = exporter.NewGauge("lamina_net_policy_pods", "Addresses of this node's pods, by whether a policy selects them: isolated or open.", "state")
	policyCut   = exporter.NewCounter("lamina_net_policy_cut_flows_total", "Established flows that changes of policies ended.")
	policyDrops = exporter.NewCounter("lamina_net_policy_dropped_packets_total", "Packets that policies dropped: ingress or egress of a pod, or answers to a flow that was cut.", "why")
)

// All lists every metric of the agent's own. It shows those of its process and of the Go runtime as well.
var All = []exporter.Metric{
	buildInfo, failed, started, problems, repairs,
	nodeInfo, podMTU, underMTU, pods, addresses, damaged, peers,
	fastOn, packets, spread, handedOver, flowMoves, policies, policyPods, policyCut, policyDrops,
}

// Collector asks an agent at every collection.
type Collector struct {
	Status  func() (control.Status, error)
	Failed  func(error) // is told what Status failed at
	Version string

	descs exporter.Descs
}

// New makes a collector.
func New(version string, status func() (control.Status, error), failed func(error)) *Collector {
	return &Collector{Version: version, Status: status, Failed: failed, descs: exporter.NewDescs(All)}
}

var _ prometheus.Collector = (*Collector)(nil)

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) { c.descs.Describe(ch) }

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	put := c.descs.Putter(ch)
	put(buildInfo, 1, c.Version, runtime.Version())
	s, err := c.Status()
	put(failed, exporter.Number(err != nil))
	if err != nil {
		c.Failed(err)
		return
	}
	put(started, float64(s.Started.UnixNano())/1e9)
	put(problems, float64(len(s.Problems)))
	put(repairs, float64(s.Repairs))
	collectNode(&s, put)
	collectFastPath(&s, put)
	collectSteering(&s, put)
	collectPolicies(&s, put)
}

func collectNode(s *control.Status, put exporter.Putter) {
	put(nodeInfo, 1, s.Node.Lease.Node.String(), s.Node.Lease.Prefix.String(), s.Underlay.Interface, s.Device, strconv.Itoa(s.VNI), strconv.Itoa(s.Port))
	put(podMTU, float64(s.Node.MTU))
	put(underMTU, float64(s.Underlay.MTU))
	put(pods, float64(s.Pods))
	a := s.Addresses
	put(addresses, float64(max(0, a.Size-a.Leased-a.Resting)), "free")
	put(addresses, float64(a.Leased), "leased")
	put(addresses, float64(a.Resting), "resting")
	put(damaged, float64(a.Damaged))
	ok := 0
	for _, p := range s.Peers {
		if p.State == control.PeerOK {
			ok++
		}
	}
	put(peers, float64(ok), "ok")
	put(peers, float64(len(s.Peers)-ok), "broken")
}

func collectFastPath(s *control.Status, put exporter.Putter) {
	var f fastpath.PartStatus
	if !s.Part(fastpath.PartName, &f) {
		return
	}
	put(fastOn, exporter.Number(f.State == "on"))
	for program, reasons := range f.Counters {
		for reason, n := range reasons {
			put(packets, float64(n), program, reason)
		}
	}
}

func collectSteering(s *control.Status, put exporter.Putter) {
	var f steer.PartStatus
	if !s.Part(steer.PartName, &f) {
		return
	}
	for stage, of := range f.Stages {
		for reason, n := range of.Reasons {
			put(spread, float64(n), stage, reason)
		}
		over, _ := of.Counts()
		put(handedOver, float64(over), stage)
		put(flowMoves, float64(of.Moves), stage)
	}
}

func collectPolicies(s *control.Status, put exporter.Putter) {
	var p policy.Status
	if !s.Part(policy.PartName, &p) {
		return
	}
	put(policies, float64(p.Policies))
	put(policyPods, float64(p.Isolated), "isolated")
	put(policyPods, float64(p.Local-p.Isolated), "open")
	put(policyCut, float64(p.Cut))
	for why, n := range p.Dropped {
		put(policyDrops, float64(n), why)
	}
}
