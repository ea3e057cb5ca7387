package doctor

import (
	"os"
	"strings"
	"testing"

	"lamina/net/control"
)

const goodConf = `{"cniVersion": "1.1.0", "name": "lamina", "plugins": [{"type": "lamina-cni"}, {"type": "portmap", "capabilities": {"portMappings": true}}]}`

// networked is a sound machine with the container network set up, and no agent: that takes a real one (net/agent).
func networked(t *testing.T, changed map[string]string) string {
	t.Helper()
	files := map[string]string{
		"/etc/lamina/net.toml":                                "peers = \"/etc/lamina/peers\"\n",
		"/etc/cni/net.d/10-lamina.conflist":                   goodConf,
		"/etc/cni/net.d/README":                               "no configuration",
		"/proc/sys/net/ipv4/ip_forward":                       "1\n",
		"/proc/sys/net/netfilter/nf_conntrack_max":            "1000\n",
		"/proc/sys/net/netfilter/nf_conntrack_count":          "10\n",
		"/proc/sys/net/netfilter/nf_conntrack_udp_timeout":    "30\n",
		"/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal": "0\n",
		"/proc/filesystems":                                   "nodev\tproc\nnodev\tbpf\n\text4\nnodev\toverlay\n",
		"/lib/modules/6.18.1/modules.dep":                     "kernel/drivers/net/vxlan/vxlan.ko: kernel/net/ipv4/udp_tunnel.ko\nkernel/net/netfilter/nf_tables.ko:\n",
		"/lib/modules/6.18.1/modules.builtin":                 "kernel/fs/ext4/ext4.ko\n",
		"/sys/class/net/eth0/mtu":                             "1500\n",
		"/opt/cni/bin/lamina-cni":                             "#!",
		"/opt/cni/bin/portmap":                                "#!",
		"/usr/sbin/nft":                                       "#!/bin/sh\necho '{\"nftables\": []}'\n",
	}
	for path, text := range changed {
		files[path] = text
	}
	root := fake(t, files)
	for _, program := range []string{"/opt/cni/bin/lamina-cni", "/opt/cni/bin/portmap", "/usr/lib/cni/lamina-cni", "/usr/sbin/nft", "/usr/bin/containerd", "/usr/sbin/iptables-legacy"} {
		if err := os.Chmod(root+program, 0o755); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	return root
}

// Whoever uses only the files hears nothing of the network, and the other way round.
func TestWings(t *testing.T) {
	about := func(all []Finding) (files, net int) {
		for _, f := range all {
			if strings.HasPrefix(f.Check, "net-") {
				net++
			} else {
				files++
			}
		}
		return files, net
	}
	if files, net := about(Run(Options{Root: fake(t, nil)})); files == 0 || net != 0 {
		t.Errorf("files alone: %d and %d", files, net)
	}
	if files, net := about(Run(Options{Root: networked(t, nil)})); files == 0 || net == 0 {
		t.Errorf("both: %d and %d", files, net)
	}
	if files, net := about(Run(Options{Root: networked(t, nil), Only: Files})); files == 0 || net != 0 {
		t.Errorf("only files: %d and %d", files, net)
	}
	if files, net := about(Run(Options{Root: fake(t, nil), Only: Net})); files != 0 || net == 0 {
		t.Errorf("only the network: %d and %d", files, net)
	}
	for _, f := range Run(Options{Root: networked(t, nil), Only: Net}) {
		if f.Level != OK && f.Check != "net-agent" {
			t.Errorf("%+v", f)
		}
	}
}

func TestNetworkMachines(t *testing.T) {
	const sys, conf = "/proc/sys/net/netfilter/nf_conntrack_", "/etc/cni/net.d/10-lamina.conflist"
	dropping := func(table string) string {
		return `#!/bin/sh
[ "$1" != list ] || { echo '` + table + `'; exit; }
echo '{"nftables": [{"metainfo": {}}, {"chain": {"family": "inet", "table": "lamina", "name": "forward", "hook": "forward", "policy": "drop"}},
 {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}}]}'
`
	}
	for name, c := range map[string]struct {
		changed map[string]string
		check   string
		level   Level
		says    string
	}{
		"no agent":             {nil, "net-agent", Broken, "systemctl enable --now lamina-net"},
		"not set up":           {map[string]string{"/etc/lamina/net.toml": ""}, "net-agent", Broken, "examples/net"},
		"broken toml":          {map[string]string{"/etc/lamina/net.toml": "= 1"}, "net-config", Broken, "does not start"},
		"old kernel":           {map[string]string{"/proc/sys/kernel/osrelease": "6.1.0-18-amd64"}, "net-fastpath", Costs, "6.6"},
		"no TCX":               {map[string]string{"/boot/config-6.18.1": "CONFIG_VXLAN=m\nCONFIG_NF_TABLES=m\n"}, "net-fastpath", Costs, "CONFIG_NET_XGRESS"},
		"no bpffs":             {map[string]string{"/proc/filesystems": "\text4\n"}, "net-fastpath", Costs, "bpffs"},
		"no vxlan":             {map[string]string{"/lib/modules/6.18.1/modules.dep": "kernel/net/netfilter/nf_tables.ko:\n"}, "net-vxlan", Broken, "CONFIG_VXLAN"},
		"vxlan built in":       {map[string]string{"/lib/modules/6.18.1/modules.dep": "", "/boot/config-6.18.1": "CONFIG_VXLAN=y\n"}, "net-vxlan", OK, "VXLAN"},
		"modules are unknown":  {map[string]string{"/lib/modules/6.18.1/modules.dep": ""}, "net-vxlan", OK, "VXLAN"},
		"no nf_tables":         {map[string]string{"/lib/modules/6.18.1/modules.dep": "kernel/drivers/net/vxlan/vxlan.ko:\n"}, "net-nftables", Broken, "CONFIG_NF_TABLES"},
		"no nft":               {map[string]string{"/usr/sbin/nft": ""}, "net-nftables", Broken, "apt-get install nftables"},
		"not forwarding":       {map[string]string{"/proc/sys/net/ipv4/ip_forward": "0"}, "net-forwarding", Note, "sysctl.d"},
		"conntrack is full":    {map[string]string{sys + "count": "900"}, "net-conntrack", Costs, "nf_conntrack_max=4000"},
		"conntrack not loaded": {map[string]string{sys + "max": "", "/sys/module/nf_conntrack/refcnt": "0"}, "net-conntrack", Note, "not loaded"},
		"no conntrack":         {map[string]string{sys + "max": ""}, "net-conntrack", Broken, "CONFIG_NF_CONNTRACK"},
		"UDP is forgotten":     {map[string]string{sys + "udp_timeout": "5"}, "net-udp-timeout", Costs, "udp_timeout=30"},
		"Docker":               {map[string]string{"/usr/sbin/nft": dropping("table ip filter { chain DOCKER-USER { } }")}, "net-firewall", Broken, "iptables -I DOCKER-USER -i lam+"},
		"a firewall":           {map[string]string{"/usr/sbin/nft": dropping("")}, "net-firewall", Broken, "iptables -I FORWARD -i lam+"},
		"an old firewall": {map[string]string{"/proc/net/ip_tables_names": "nat\nfilter\n", "/usr/sbin/iptables-legacy": "#!/bin/sh\necho -P FORWARD DROP\n"},
			"net-firewall", Broken, "iptables-legacy -I FORWARD -o lam+"},
		"it allows, too": {map[string]string{"/proc/net/ip_tables_names": "filter\n",
			"/usr/sbin/iptables-legacy": "#!/bin/sh\nprintf '%s\\n' '-P FORWARD DROP' '-A FORWARD -o lam+ -j ACCEPT' '-A FORWARD -i lam+ -j ACCEPT'\n"}, "net-firewall", OK, "no other"},
		"it allows":         {map[string]string{"/usr/sbin/nft": dropping(`iifname "lam*" accept oifname "lam*" accept`)}, "net-firewall", OK, "no other"},
		"nft fails":         {map[string]string{"/usr/sbin/nft": "#!/bin/sh\nexit 1\n"}, "net-firewall", Note, "as root"},
		"no configuration":  {map[string]string{conf: ""}, "net-cni", Costs, "10-lamina.conflist"},
		"a broken one":      {map[string]string{conf: goodConf[:len(goodConf)-1]}, "net-cni", Broken, "correct it"},
		"half of one":       {map[string]string{conf: `{"name": "lamina", "cniVersion": "1.1.0", "plugins": [{"type": "lamina-cni"}, {}]}`}, "net-cni", Broken, conf},
		"another is first":  {map[string]string{"/etc/cni/net.d/05-cilium.conf": `{"name": "c", "type": "cilium-cni", "cniVersion": "1.0.0"}`}, "net-cni", Costs, "05-cilium.conf"},
		"plugin elsewhere":  {map[string]string{"/opt/cni/bin/lamina-cni": "", "/usr/lib/cni/lamina-cni": "#!", "/usr/bin/containerd": "x"}, "net-plugins", Broken, "ln -s /usr/lib/cni/lamina-cni /opt/cni/bin/"},
		"plugin of a chain": {map[string]string{"/opt/cni/bin/portmap": ""}, "net-plugins", Broken, "containernetworking-plugins"},
		"containerd's places": {map[string]string{"/etc/containerd/config.toml": "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\n"},
			"net-plugins", Broken, "mkdir -p /usr/lib/cni && ln -s /opt/cni/bin/lamina-cni /usr/lib/cni/"},
		"left behind": {map[string]string{"/sys/class/net/flannel.1/mtu": "1450", "/etc/cni/net.d/99-x.conf": "{}"}, "net-leftovers", Note, "interface flannel.1 (flannel)"},
	} {
		t.Run(name, func(t *testing.T) {
			all := Run(Options{Root: networked(t, c.changed), Only: Net})
			wellFormed(t, all)
			f := find(t, all, c.check)
			if f.Level != c.level || !strings.Contains(f.Found+f.Cost+f.Fix, c.says) {
				t.Errorf("%+v, want %v and %q", f, c.level, c.says)
			}
		})
	}
}

func TestMTU(t *testing.T) {
	for pods, want := range map[int]Level{1450: OK, 1451: Broken, 1200: Costs} {
		n := &network{machine: &machine{}, agent: &control.Status{Node: control.Node{MTU: pods}, Underlay: control.Underlay{Interface: "eth0", MTU: 1500}}}
		if f := n.checkMTU(); f.Level != want {
			t.Errorf("%d: %+v", pods, f)
		}
	}
}
