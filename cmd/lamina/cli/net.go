package cli

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"lamina/metrics/exporter"
	"lamina/net/agent"
	"lamina/net/control"
	"lamina/net/fastpath"
	"lamina/net/ipam"
	netmetrics "lamina/net/metrics"
	"lamina/net/overlay"
	"lamina/net/policy"
	"lamina/net/steer"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func netCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "net",
		Short: "the container network",
		Long: `Pods on many hosts in one network. Each host runs an agent (lamina net agent) and has the CNI plugin lamina-cni among its
container runtime's plugins. What it puts on a host and how to read that is in docs/network.md.`,
	}
	cmd.AddCommand(netAgentCommand(), netStatusCommand(), netTopCommand(), netTraceCommand())
	for _, c := range cmd.Commands() {
		c.DisableFlagsInUseLine = true
		c.ValidArgsFunction = cobra.NoFileCompletions
	}
	return cmd
}

// netAgent is the flags of the agent.
type netAgent struct {
	netSource
	config, nodeIP, podCIDR, socket, state string
	policies, pods                         string
	device                                 string
	vni, port, mtu                         int
	holdDown                               time.Duration
	fastpath, steering, pins               string
	metrics                                string
}

func netAgentCommand() *cobra.Command {
	var a netAgent
	cmd := &cobra.Command{
		Use:   "agent --peers FILE|--etcd ENDPOINTS|--kubernetes [--node-ip ADDRESS] [--pod-cidr PREFIX] [--config FILE]",
		Short: "hold this host's part of the pod network",
		Long: `Makes the VXLAN device, the routes, ARP and FDB entries to other nodes, and the nftables rules of the pod network, and puts
right at once what somebody deletes of them. Everything stays in the kernel and goes on when the agent is stopped or
killed; the next agent finds it.

The peers file has a line for each node: the prefix of its pods, its address and, if it is not the usual one, the MAC of
its VXLAN device. It can be the same on all nodes, and is read again when it changes. Peers that cannot be used, because
prefixes overlap for example, are reported and those known before stay.

With --etcd the nodes have leases in etcd instead: each takes a prefix of --pod-network, or has that of --pod-cidr, and
renews its lease, which outlives it by a day. When etcd is gone everything goes on as it was last known, also over a restart
of the agent, and the status says so.

With --kubernetes the nodes are those of the cluster: prefixes are the Nodes' podCIDRs, and the agent writes into an annotation
where its node is to be reached. It enforces the cluster's NetworkPolicies. While the API server is gone everything goes on
as it was last known, and the status says so.

With --policies the agent enforces NetworkPolicies for the pods of this node: docs/network.md has the form of the files.
A file that is broken keeps the policy it had in force.

The configuration file is TOML whose keys are the names of the flags; what is on the command line wins.`,
		Example: `  printf '10.244.1.0/24 192.168.0.1\n10.244.2.0/24 192.168.0.2\n' > /etc/lamina/peers
  lamina net agent --peers /etc/lamina/peers
  lamina net agent --etcd https://192.168.0.9:2379 --etcd-ca ca.crt --etcd-cert node.crt --etcd-key node.key
  NODE_NAME=worker1 lamina net agent --kubernetes --kubeconfig /etc/kubernetes/kubelet.conf`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := flagsFromFile(cmd.Flags(), a.config); err != nil {
				return err
			}
			return withCode(exitFailure, a.run())
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&a.config, "config", "", "a TOML file with values of the flags below")
	a.netSource.flags(fs)
	fs.StringVar(&a.nodeIP, "node-ip", "", "this node's address on the underlay; empty: the peer that is an address of this host, with --etcd that of its default route, with --kubernetes its Node's InternalIP")
	fs.StringVar(&a.podCIDR, "pod-cidr", "", "the prefix of this node's pods; empty: what the peers file says, or etcd gives")
	fs.StringVar(&a.policies, "policies", "", "a directory of Kubernetes NetworkPolicies in YAML to enforce; empty: none")
	fs.StringVar(&a.pods, "pods", "", "a file that names the pods of all nodes, with their labels, for policies to select")
	fs.StringVar(&a.device, "device", overlay.Device, "the name of the VXLAN device")
	fs.IntVar(&a.vni, "vni", overlay.VNI, "the VXLAN network identifier, the same on all nodes")
	fs.IntVar(&a.port, "port", overlay.Port, "the UDP port of VXLAN, the same on all nodes")
	fs.IntVar(&a.mtu, "mtu", 0, "MTU of pods in bytes; 0: that of the underlay less 50")
	fs.DurationVar(&a.holdDown, "hold-down", ipam.HoldDown, "how long the address of a deleted pod is given to no other")
	fs.StringVar(&a.fastpath, "fastpath", "auto", "let established connections bypass the ordinary path: auto, where the kernel can; on, or do not start; off")
	fs.StringVar(&a.steering, "steering", "auto", "spread received packets that take the ordinary path over CPUs: auto, by load on hosts of four or more; on, on every host; static, a part of the CPUs for each stage; off")
	fs.StringVar(&a.pins, "pins", fastpath.Pins, "where the maps and links of the fast path and of steering are pinned: a directory in a bpffs, which is mounted above it if nobody has")
	fs.StringVar(&a.metrics, "metrics", "", "where to answer Prometheus at /metrics: HOST:PORT, or unix:PATH for a socket of root's alone; empty: nowhere")
	fs.StringVar(&a.socket, "socket", control.Socket, "the unix socket for lamina-cni and lamina net status")
	fs.StringVar(&a.state, "state", control.StateDir, "the directory for what must survive a reboot")
	_ = cmd.RegisterFlagCompletionFunc("fastpath", cobra.FixedCompletions([]string{"auto", "on", "off"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// flagsFromFile sets flags that are not on the command line.
func flagsFromFile(fs *pflag.FlagSet, path string) error {
	if path == "" {
		return nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	values := map[string]any{}
	if err := toml.Unmarshal(b, &values); err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	for key, value := range values {
		f := fs.Lookup(key)
		if f == nil || key == "config" {
			return fmt.Errorf("configuration %s: %q is not the name of a flag: see lamina net agent --help", path, key)
		}
		if f.Changed {
			continue
		}
		if err := f.Value.Set(fmt.Sprint(value)); err != nil {
			return fmt.Errorf("configuration %s: %s: %w", path, key, err)
		}
	}
	return nil
}

func (a *netAgent) run() error {
	c, err := a.agentConfig()
	if err != nil {
		return err
	}
	if c.Overlay.NS, err = netns.Get(); err != nil {
		return fmt.Errorf("own network namespace: %w", err)
	}
	defer c.Overlay.NS.Close()
	done, err := a.netSource.open(&c)
	if err != nil {
		return err
	}
	defer done()
	l, release, err := listenAt(a.socket)
	if err != nil {
		return err
	}
	defer release()
	defer l.Close()
	c.Listener = l
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	ended, err := a.serveMetrics(ctx, c.Logf)
	if err != nil {
		return err
	}
	defer func() { stop(); <-ended }()
	return agent.Run(ctx, c, func() {
		c.Logf("in order")
		_, _ = daemon.SdNotify(true, daemon.SdNotifyReady) // systemd, if it waits for that
	})
}

// serveMetrics answers Prometheus until ctx is done; then ended is closed.
func (a *netAgent) serveMetrics(ctx context.Context, logf func(string, ...any)) (ended chan struct{}, err error) {
	ended = make(chan struct{})
	if a.metrics == "" {
		close(ended)
		return ended, nil
	}
	l, err := exporter.Listen(a.metrics)
	if err != nil {
		return nil, fmt.Errorf("--metrics: %w", err)
	}
	failed := func(err error) { logf("metrics: %v", err) }
	client := control.NewClient(a.socket)
	handler := exporter.Handler(netmetrics.New(Version(), client.Status, failed), "this node's pod network", failed)
	go func() {
		defer close(ended)
		defer client.Close()
		if err := exporter.Serve(ctx, l, handler); err != nil {
			failed(err)
		}
	}()
	return ended, nil
}

func (a *netAgent) agentConfig() (c agent.Config, err error) {
	if a.state, err = filepath.Abs(a.state); err != nil {
		return c, err
	}
	c = agent.Config{
		Overlay:  overlay.Config{Device: a.device, VNI: a.vni, Port: a.port, MTU: a.mtu},
		StateDir: a.state, HoldDown: a.holdDown, Version: Version(), Logf: newStderrLog().infof,
	}
	if a.holdDown == 0 {
		c.HoldDown = -1
	}
	fast, err := a.fastPath(c.Logf)
	if err != nil {
		return c, err
	}
	feed, err := a.netSource.feed(a.state)
	if err != nil {
		return c, err
	}
	mode, err := steer.ParseMode(a.steering)
	if err != nil {
		return c, fmt.Errorf("--steering=%w", err)
	}
	spread := steer.NewPart(steer.PartOptions{Pins: filepath.Join(fast.Pins(), "steer"), StateDir: a.state, Mode: mode, Logf: c.Logf})
	part := policy.NewPart(policy.PartOptions{Dir: a.policies, PodsFile: a.pods, StateDir: a.state, Feed: feed, Logf: c.Logf, Around: around(fast)})
	// The caches first: they must be there to be told what policies change, from the first change on.
	c.Overlay.Policy, c.Parts = part, append(c.Parts, fast, part, spread)
	if a.nodeIP != "" {
		if c.Overlay.Self.Node, err = netip.ParseAddr(a.nodeIP); err != nil {
			return c, fmt.Errorf("--node-ip: %q is not an address", a.nodeIP)
		}
	}
	if a.podCIDR != "" {
		if c.Overlay.Self.Prefix, err = netip.ParsePrefix(a.podCIDR); err != nil {
			return c, fmt.Errorf("--pod-cidr: %q is not a prefix such as 10.244.1.0/24", a.podCIDR)
		}
	}
	return c, nil
}

func (a *netAgent) fastPath(logf func(string, ...any)) (*fastpath.Part, error) {
	mode, known := map[string]fastpath.Mode{"auto": fastpath.Auto, "on": fastpath.On, "off": fastpath.Off}[a.fastpath]
	if !known {
		return nil, fmt.Errorf("--fastpath=%s: use auto, on or off", a.fastpath)
	}
	pins, err := filepath.Abs(a.pins)
	return fastpath.NewPart(fastpath.PartOptions{Pins: pins, Mode: mode, Logf: logf}), err
}

// around keeps the fast path from going by, and from learning, what a change of policies makes doubtful.
func around(fast *fastpath.Part) func(*policy.Plan, func() error) error {
	return func(p *policy.Plan, apply func() error) error {
		after, err := fast.Guard(p.Pods)
		if err != nil {
			return err
		}
		defer after()
		return apply()
	}
}

func netStatusCommand() *cobra.Command {
	var asJSON bool
	var socket string
	cmd := &cobra.Command{
		Use:   "status [--json] [--socket SOCKET]",
		Short: "show this host's part of the pod network",
		Long: `Asks the agent of this host for its node, the other nodes and whether their routes and entries are there, how many
addresses are in use, what was repaired, and what is wrong. The exit status is 1 if something is wrong.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := control.NewClient(socket)
			defer c.Close()
			s, err := c.Status()
			if err != nil {
				return withCode(exitTrouble, err)
			}
			show := printNet
			if asJSON {
				show = func(w io.Writer, s *control.Status) error { return printJSON(w, s) }
			}
			if err := show(cmd.OutOrStdout(), &s); err != nil {
				return err
			}
			if len(s.Problems) > 0 {
				return &exitError{exitFindings, nil}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&socket, "socket", control.Socket, "the agent's socket")
	return cmd
}

func printNet(w io.Writer, s *control.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	row("agent", "pid %d, version %s, up %s", s.PID, s.Version, time.Since(s.Started).Round(time.Second))
	row("node", "%s on %s (MTU %d)", s.Node.Lease.Node, s.Underlay.Interface, s.Underlay.MTU)
	row("pods", "%d in %s, gateway %s, MTU %d", s.Pods, s.Node.Lease.Prefix, s.Node.Host, s.Node.MTU)
	row("addresses", "%d of %d leased, %d resting", s.Addresses.Leased, s.Addresses.Size, s.Addresses.Resting)
	row("device", "%s, VNI %d, port %d, MAC %s", s.Device, s.VNI, s.Port, s.Node.Lease.MAC)
	row("peers from", "%s", s.Source)
	row("repairs", "%d", s.Repairs)
	if n := len(s.Repaired); n > 0 {
		last := s.Repaired[n-1]
		row("last repair", "%s, %s ago", last.What, time.Since(last.Time).Round(time.Second))
	}
	if f, ok := s.Parts["fastpath"].(map[string]any); ok {
		row("fast path", "%v, hits: %.1f%% of packets to other nodes, %.1f%% of those from them", f["state"], percent(f["egress_ratio"]), percent(f["ingress_ratio"]))
	}
	var spread steer.PartStatus
	if s.Part(steer.PartName, &spread) {
		row("steering", "%s", spread)
	}
	if p, ok := s.Parts["policies"].(map[string]any); ok {
		row("policies", "%v in force, selecting %v of %v pods", p["policies"], p["isolated"], p["local"])
	}
	for _, p := range s.Problems {
		row("PROBLEM", "%s", strings.Join(strings.Fields(p), " "))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return printPeers(w, s.Peers)
}

func percent(ratio any) float64 {
	f, _ := ratio.(float64)
	return 100 * f
}

func printPeers(w io.Writer, all []control.Peer) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "no peers")
		return err
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PEER\tPODS\tMAC\tSTATE")
	slices.SortFunc(all, func(a, b control.Peer) int { return a.Node.Compare(b.Node) })
	for _, p := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", p.Node, p.Prefix, p.MAC, p.State)
	}
	return t.Flush()
}
