package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"lamina/net/control"

	"github.com/containernetworking/cni/libcni"
)

// netConfig is what lamina-net.service starts the agent with.
const netConfig = "/etc/lamina/net.toml"

// Wings of Lamina.
const (
	Files = "files"
	Net   = "net"
)

const (
	cniPlugin = "lamina-cni"
	cniConfs  = "/etc/cni/net.d" // unless containerd's configuration says otherwise
)

// cniBins are where runtimes look for CNI plugins. Containerd has the first, CRI-O and Podman know all.
var cniBins = []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"}

// tcxSince has TCX, which the fast path is attached by.
var tcxSince = kernel{6, 6}

const ordinary = "all packets between nodes take the ordinary path, which is slower"

// network is what the checks of the container network know.
type network struct {
	*machine
	confs  []cniConf
	socket string
	agent  *control.Status // nil: none answers
	failed error           // why not
}

// cniConf is one of the runtime's CNI configurations, in the order in which it takes them: the first counts.
type cniConf struct {
	path  string
	types []string // of its plugins
	err   error
}

func (c *cniConf) ours() bool { return slices.Contains(c.types, cniPlugin) }

// networkChecks are made where something of the container network is set up, or always.
func networkChecks(m *machine, opt Options, always bool) []Finding {
	cd, _ := loadContainerd(m, first(opt.ContainerdConfig, "/etc/containerd/config.toml")) // what is wrong with it is told elsewhere
	n := &network{machine: m, confs: readCNI(m, first(cd.cniConf, cniConfs)), socket: control.Socket}
	var all []Finding
	if b, err := m.read(netConfig); err == nil {
		t, err := parseTOML(b)
		if err != nil {
			all = append(all, Finding{"net-config", Broken, fmt.Sprintf("%s: %v", netConfig, err), "lamina-net.service does not start", "correct the file"})
		} else if s, _ := t.text("socket"); s != "" {
			n.socket = s
		}
	} else if !always && !m.exists(n.socket) && !slices.ContainsFunc(n.confs, func(c cniConf) bool { return c.ours() }) {
		return nil
	}
	n.ask()
	all = append(all, n.checkAgent()...)
	all = append(all, n.checkKernel()...)
	all = append(all, n.checkForwarding()...)
	all = append(all, n.checkConntrack()...)
	all = append(all, n.checkFirewall())
	all = append(all, n.checkCNI(cd.cniBins, first(cd.cniConf, cniConfs))...)
	return append(all, n.checkLeftovers())
}

func (n *network) ask() {
	c := control.NewClient(n.path(n.socket))
	defer c.Close()
	s, err := c.Status()
	if err != nil {
		n.failed = err
		return
	}
	n.agent = &s
}

func (n *network) checkAgent() []Finding {
	f := Finding{Check: "net-agent"}
	if n.agent == nil && !errors.Is(n.failed, control.ErrDown) {
		return []Finding{{"net-agent", Note, n.failed.Error(), "what the agent knows is not known", "run lamina doctor as root"}}
	}
	if n.agent == nil {
		f.Level, f.Found, f.Cost = Broken, n.failed.Error(), "pods cannot be started, and nothing repairs the network of those there are; their connections go on"
		f.Fix = "systemctl enable --now lamina-net; journalctl -u lamina-net says why it does not start"
		if !n.exists(netConfig) {
			f.Fix = "write /etc/lamina/peers and " + netConfig + ": see /usr/share/doc/lamina/examples/net; then systemctl enable --now lamina-net"
		}
		return []Finding{f}
	}
	s := n.agent
	f.Found = fmt.Sprintf("the agent answers: node %s, %d pods, %d peers", s.Node.Lease.Node, s.Pods, len(s.Peers))
	all := []Finding{f}
	for _, p := range s.Problems {
		all = append(all, Finding{"net-problem", Broken, strings.Join(strings.Fields(p), " "), "part of the network does not work, or is not what it should be", "lamina net status; docs/network.md has a table of messages"})
	}
	return append(all, n.checkMTU())
}

func (n *network) checkMTU() Finding {
	pods, under := n.agent.Node.MTU, n.agent.Underlay
	const overhead, least = 50, 1280
	f := Finding{Check: "net-mtu", Found: fmt.Sprintf("pods have an MTU of %d, %s has %d", pods, under.Interface, under.MTU)}
	switch {
	case pods > under.MTU-overhead:
		f.Level, f.Cost = Broken, "large packets between nodes are lost"
		f.Fix = fmt.Sprintf("ip link set %s mtu %d on all nodes, or lamina net agent --mtu %d", under.Interface, pods+overhead, under.MTU-overhead)
	case pods < least:
		f.Level, f.Cost = Costs, fmt.Sprintf("less than the %d bytes that much of the world takes for granted: more packets, and fragments", least)
		f.Fix = fmt.Sprintf("ip link set %s mtu 1500 on all nodes, if what is between them carries it, and no --mtu", under.Interface)
	}
	return f
}

// module tells whether the kernel has a module: loaded, built in, or to be loaded when it is asked for.
func (m *machine) module(name, option string) (has, known bool) {
	release := m.word("/proc/sys/kernel/osrelease")
	if m.exists("/sys/module/" + name) {
		return true, true
	}
	lists := 0
	for _, list := range []string{"modules.builtin", "modules.dep"} {
		b, err := m.read("/lib/modules/" + release + "/" + list)
		if err != nil {
			continue
		}
		lists++
		if strings.Contains(string(b), "/"+name+".ko") {
			return true, true
		}
	}
	switch kconfig(m, option) {
	case "y", "m":
		return true, true
	case "n":
		return false, true
	}
	return false, lists == 2
}

func (n *network) checkKernel() []Finding {
	all := []Finding{{Check: "net-vxlan", Found: "this kernel has VXLAN"}, {Check: "net-nftables", Found: "nftables are there"}, n.checkFastPath()}
	if has, known := n.module("vxlan", "CONFIG_VXLAN"); known && !has {
		all[0] = Finding{"net-vxlan", Broken, "this kernel has no VXLAN", "the agent does not start", "use a kernel with CONFIG_VXLAN, or install its package of further modules"}
	}
	if n.program("nft") == "" {
		all[1] = Finding{"net-nftables", Broken, "the program nft is missing", "the agent does not start", "apt-get install nftables"}
	} else if has, known := n.module("nf_tables", "CONFIG_NF_TABLES"); known && !has {
		all[1] = Finding{"net-nftables", Broken, "this kernel has no nftables", "the agent does not start", "use a kernel with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET"}
	}
	return all
}

// checkFastPath believes an agent, which has tried, before the kernel's version.
func (n *network) checkFastPath() Finding {
	f := Finding{Check: "net-fastpath", Found: "established connections can bypass the ordinary path (TCX)"}
	if n.agent != nil {
		var p struct{ State string }
		if n.agent.Part("fastpath", &p); p.State != "on" {
			f.Level, f.Found, f.Cost, f.Fix = Costs, "the fast path is "+p.State, ordinary, "use Linux "+tcxSince.String()+" or later, and --fastpath=auto"
		}
		return f
	}
	release := n.word("/proc/sys/kernel/osrelease")
	var k kernel
	_, _ = fmt.Sscanf(release, "%d.%d", &k.major, &k.minor)
	b, err := n.read("/proc/filesystems")
	switch {
	case k.before(tcxSince):
		f.Level, f.Found, f.Cost, f.Fix = Costs, "Linux "+release+" has no TCX", ordinary, "use Linux "+tcxSince.String()+" or later"
	case kconfig(n.machine, "CONFIG_NET_XGRESS") == "n":
		f.Level, f.Found, f.Cost, f.Fix = Costs, "this kernel was built without CONFIG_NET_XGRESS, so without TCX", ordinary, "use a kernel that has it"
	case err == nil && !strings.Contains(string(b), "\tbpf\n"):
		f.Level, f.Found, f.Cost, f.Fix = Costs, "this kernel has no bpffs", ordinary, "use a kernel with CONFIG_BPF_SYSCALL"
	}
	return f
}

func (n *network) checkForwarding() []Finding {
	f := Finding{Check: "net-forwarding", Found: "net.ipv4.ip_forward is 1"}
	if v := n.word("/proc/sys/net/ipv4/ip_forward"); v != "1" {
		f.Level, f.Found, f.Cost, f.Fix = Note, "net.ipv4.ip_forward is "+v, "", "the agent sets it; what else sets it, such as /etc/sysctl.d, must not take it back"
		if n.agent != nil {
			f.Level, f.Cost = Broken, "pods reach nothing but their host"
		}
	}
	return []Finding{f}
}

// Limits of conntrack.
const (
	fullPercent   = 80 // of its table
	udpLease      = 5  // s: how long the fast path goes by what it has seen of UDP
	conntrackDir  = "/proc/sys/net/netfilter/nf_conntrack_"
	conntrackKeep = " (and in /etc/sysctl.d, to keep it)"
)

func (n *network) checkConntrack() []Finding {
	f := Finding{Check: "net-conntrack", Found: "connection tracking has room"}
	number := func(name string) (int, bool) {
		v, err := strconv.Atoi(n.word(conntrackDir + name))
		return v, err == nil
	}
	most, ok := number("max")
	if !ok {
		f.Level, f.Found = Note, "connection tracking is not loaded yet"
		if has, known := n.module("nf_conntrack", "CONFIG_NF_CONNTRACK"); known && !has {
			f = Finding{"net-conntrack", Broken, "this kernel has no connection tracking", "the agent does not start", "use a kernel with CONFIG_NF_CONNTRACK"}
		}
		return []Finding{f}
	}
	all := []Finding{f}
	if count, ok := number("count"); ok && count*100 > most*fullPercent {
		all[0] = Finding{"net-conntrack", Costs, fmt.Sprintf("%d of %d connections are tracked", count, most), "when the table is full new connections are dropped",
			fmt.Sprintf("sysctl net.netfilter.nf_conntrack_max=%d%s", 4*most, conntrackKeep)}
	}
	if v, ok := number("udp_timeout"); ok && v <= udpLease {
		all = append(all, Finding{"net-udp-timeout", Costs, fmt.Sprintf("net.netfilter.nf_conntrack_udp_timeout is %d s", v), "conntrack forgets UDP that the fast path still carries, and a late answer may be dropped",
			"sysctl net.netfilter.nf_conntrack_udp_timeout=30" + conntrackKeep})
	}
	if v, ok := number("tcp_be_liberal"); ok && v == 0 && n.agent != nil && n.checkFastPath().Level == OK {
		all = append(all, Finding{"net-liberal", Costs, "net.netfilter.nf_conntrack_tcp_be_liberal is 0", "connections that come back from the fast path are out of conntrack's window: they are not learned again, and policies may drop them",
			"sysctl net.netfilter.nf_conntrack_tcp_be_liberal=1; the agent sets it when it starts, so something takes it back"})
	}
	return all
}

// checkFirewall looks for tables that drop what is forwarded, as Docker's and some firewalls' do.
func (n *network) checkFirewall() Finding {
	f := Finding{Check: "net-firewall", Found: "no other table drops what is forwarded"}
	if legacy, ok := n.checkLegacy(); ok {
		return legacy
	}
	nft := n.program("nft")
	if nft == "" {
		return f
	}
	var list struct {
		Nftables []struct {
			Chain *struct{ Family, Table, Name, Hook, Policy string }
		}
	}
	out, err := n.output(nft, "--json", "list", "chains")
	if err == nil {
		err = json.Unmarshal(out, &list)
	}
	if err != nil {
		f.Level, f.Found, f.Cost, f.Fix = Note, fmt.Sprintf("nftables cannot be listed (%v): whether another table drops what is forwarded is not known", err), "", "run lamina doctor as root on the host"
		return f
	}
	for _, o := range list.Nftables {
		c := o.Chain
		if c == nil || c.Hook != "forward" || c.Policy != "drop" || c.Family == "inet" && c.Table == "lamina" {
			continue
		}
		table, err := n.output(nft, "list", "table", c.Family, c.Table)
		if err == nil && strings.Contains(string(table), `iifname "lam`) && strings.Contains(string(table), `oifname "lam`) {
			continue
		}
		chain := "FORWARD"
		if strings.Contains(string(table), "chain DOCKER-USER") {
			chain = "DOCKER-USER"
		}
		f.Level, f.Found, f.Cost = Broken, fmt.Sprintf("chain %s of table %s %s drops what is forwarded and not allowed there", c.Name, c.Family, c.Table), "pods reach their host and nothing else"
		f.Fix = fmt.Sprintf("iptables -I %s -i lam+ -j ACCEPT; iptables -I %[1]s -o lam+ -j ACCEPT", chain)
		if c.Name != "FORWARD" {
			f.Fix = fmt.Sprintf(`nft insert rule %s %s %s iifname "lam*" accept; nft insert rule %[1]s %[2]s %[3]s oifname "lam*" accept`, c.Family, c.Table, c.Name)
		}
		return f
	}
	return f
}

// checkLegacy looks at the tables of before nftables, which nft does not show. The kernel lists those that are in use.
func (n *network) checkLegacy() (f Finding, dropped bool) {
	const program = "iptables-legacy"
	b, err := n.read("/proc/net/ip_tables_names")
	if err != nil || !slices.Contains(strings.Fields(string(b)), "filter") || n.program(program) == "" {
		return f, false
	}
	out, err := n.output(n.program(program), "-S", "FORWARD")
	rules := string(out)
	if err != nil || !strings.Contains(rules, "-P FORWARD DROP") || strings.Contains(rules, "-i lam+ ") && strings.Contains(rules, "-o lam+ ") {
		return f, false
	}
	return Finding{"net-firewall", Broken, "chain FORWARD of " + program + " drops what is forwarded and not allowed there", "pods reach their host and nothing else",
		fmt.Sprintf("%s -I FORWARD -i lam+ -j ACCEPT; %[1]s -I FORWARD -o lam+ -j ACCEPT", program)}, true
}

// readCNI reads what is in a runtime's directory of CNI configurations.
func readCNI(m *machine, dir string) (all []cniConf) {
	entries, _ := os.ReadDir(m.path(dir)) // sorted; missing: none
	for _, e := range entries {
		c := cniConf{path: filepath.Join(dir, e.Name())}
		switch filepath.Ext(c.path) {
		case ".conflist", ".conf", ".json":
		default:
			continue
		}
		b, err := m.read(c.path)
		if err == nil {
			c.types, err = cniTypes(c.path, b)
			if err != nil && strings.Contains(string(b), cniPlugin) {
				c.types = []string{cniPlugin}
			}
		}
		c.err = err
		all = append(all, c)
	}
	return all
}

// cniTypes are a configuration's plugins, as the runtimes' own library reads it.
func cniTypes(path string, b []byte) (types []string, err error) {
	if filepath.Ext(path) != ".conflist" {
		p, err := libcni.NetworkPluginConfFromBytes(b)
		if err != nil {
			return nil, err
		}
		return []string{p.Network.Type}, nil
	}
	l, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		return nil, err
	}
	for _, p := range l.Plugins {
		types = append(types, p.Network.Type)
	}
	return types, nil
}

func (n *network) checkCNI(bins []string, dir string) []Finding {
	i := slices.IndexFunc(n.confs, func(c cniConf) bool { return c.ours() })
	if i < 0 {
		return []Finding{{"net-cni", Costs, "no configuration in " + dir + " names " + cniPlugin, "pods do not get Lamina's network",
			"cp /usr/share/doc/lamina/examples/net/10-lamina.conflist " + dir + "/"}}
	}
	c := n.confs[i]
	f := Finding{Check: "net-cni", Found: c.path + " names " + strings.Join(c.types, ", ")}
	if c.err != nil {
		return []Finding{{"net-cni", Broken, fmt.Sprintf("%s: %v", c.path, c.err), "pods cannot be started", "correct it: /usr/share/doc/lamina/examples/net has one that is right"}}
	}
	if i > 0 {
		f.Level, f.Found = Costs, fmt.Sprintf("runtimes take the first file of %s, which is %s and not %s", dir, filepath.Base(n.confs[0].path), filepath.Base(c.path))
		f.Cost, f.Fix = "pods do not get Lamina's network", "remove "+n.confs[0].path+", or give ours a name that sorts before"
	}
	return []Finding{f, n.checkPlugins(c.types, bins)}
}

// checkPlugins looks for the plugins of our configuration where runtimes do.
func (n *network) checkPlugins(types, bins []string) Finding {
	where := func(plugin string, dirs []string) string {
		for _, d := range dirs {
			if st, err := os.Stat(n.path(filepath.Join(d, plugin))); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
				return d
			}
		}
		return ""
	}
	if bins == nil {
		bins = cniBins
		if n.program("containerd") != "" {
			bins = cniBins[:1] // its default
		}
	}
	f := Finding{Check: "net-plugins", Found: fmt.Sprintf("%s are in %s", strings.Join(types, ", "), strings.Join(bins, ", "))}
	for _, plugin := range types {
		if where(plugin, bins) != "" {
			continue
		}
		f.Level, f.Found, f.Cost = Broken, fmt.Sprintf("%s is not in %s", plugin, strings.Join(bins, ", ")), "pods cannot be started"
		f.Fix = "apt-get install containernetworking-plugins, or take it out of the configuration"
		if plugin == cniPlugin {
			f.Fix = "install the package lamina"
		}
		if elsewhere := where(plugin, cniBins); elsewhere != "" {
			f.Fix = fmt.Sprintf("mkdir -p %s && ln -s %s %[1]s/", bins[0], filepath.Join(elsewhere, plugin))
		}
		break
	}
	return f
}

// foreignLinks are the beginnings of names of other networks' interfaces.
var foreignLinks = map[string]string{"cni0": "the bridge plugin or flannel", "flannel": "flannel", "cali": "Calico", "tunl0": "Calico", "cilium": "Cilium", "lxc": "Cilium", "weave": "Weave", "antrea": "Antrea", "kube-bridge": "kube-router"}

// checkLeftovers looks for what other networks have left.
func (n *network) checkLeftovers() Finding {
	f := Finding{Check: "net-leftovers", Found: "no other pod network has left anything"}
	var found []string
	for i := range n.confs {
		if c := &n.confs[i]; !c.ours() {
			found = append(found, c.path)
		}
	}
	links, _ := os.ReadDir(n.path("/sys/class/net"))
	for _, l := range links {
		for begin, whose := range foreignLinks {
			if strings.HasPrefix(l.Name(), begin) {
				found = append(found, fmt.Sprintf("interface %s (%s)", l.Name(), whose))
			}
		}
	}
	if len(found) > 0 {
		slices.Sort(found)
		if more := len(found) - 5; more > 0 {
			found = append(found[:5], fmt.Sprintf("and %d more", more))
		}
		f.Level, f.Found = Note, "of other pod networks: "+strings.Join(found, ", ")
		f.Cost, f.Fix = "none while their prefixes and ports are others than Lamina's", "when no pod uses them: remove the files, and ip link del the interfaces"
	}
	return f
}
