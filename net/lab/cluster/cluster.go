// Package cluster is a lab whose hosts run `lamina net agent` and whose pods are made by lamina-cni through cnitool, all as
// the real programs.
package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lamina/net/control"
	"lamina/net/ipam"
	"lamina/net/lab"

	"golang.org/x/sys/unix"

	current "github.com/containernetworking/cni/pkg/types/100"
)

// Programs that tests run, as packages of this module or of its tools.
const (
	Lamina  = "lamina/cmd/lamina"
	Plugin  = "lamina/cmd/lamina-cni"
	Cnitool = "github.com/containernetworking/cni/cnitool"
	Portmap = "github.com/containernetworking/plugins/plugins/meta/portmap"
)

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "lamina-bin")
	if err != nil {
		return "", err
	}
	packages := []string{Plugin, Cnitool, Portmap}
	if lamina == nil {
		packages = append(packages, Lamina)
	}
	cmd := exec.Command("go", append([]string{"build", "-o", dir}, packages...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return dir, fmt.Errorf("building programs: %w\n%s", err, out)
	}
	exe, err := os.Executable()
	if err != nil || lamina == nil {
		return dir, err
	}
	return dir, os.Symlink(exe, filepath.Join(dir, "lamina"))
})

// lamina is the program if the test program is also lamina.
var lamina func(argv []string) int

// MainAs is Main for a test program that is also lamina, whose main function it gets: linking lamina takes longer than all
// the rest.
func MainAs(m *testing.M, main func(argv []string) int) int {
	if filepath.Base(os.Args[0]) == "lamina" {
		return main(os.Args)
	}
	lamina = main
	return Main(m)
}

// Main is lab.Main; it also removes the programs that were built.
func Main(m *testing.M) int {
	code := lab.Main(m)
	if dir, _ := build(); dir != "" {
		_ = os.RemoveAll(dir)
	}
	return code
}

// Bin is the directory with the programs, built once for a test program.
func Bin(t testing.TB) string {
	t.Helper()
	dir, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Cluster is hosts with agents.
type Cluster struct {
	*lab.Lab
	Nodes []*Node
	Peers string // the peers file of all agents
	dir   string
	t     testing.TB
}

// Node is a host with an agent.
type Node struct {
	*lab.Host
	Dir    string   // of this host: state, sockets, configuration
	Source []string // arguments that say where its peers come from
	Args   []string
	c      *Cluster
	agent  *exec.Cmd
	exited chan struct{} // closed when agent has ended
	log    *bytes.Buffer
	pods   int
}

// New makes n hosts and starts their agents, which read Peers, with further arguments.
func New(t testing.TB, n int, args ...string) *Cluster {
	t.Helper()
	return From(t, n, func(c *Cluster, _ *lab.Host) []string { return []string{"--peers", c.Peers} }, args...)
}

// From is New with agents that have their peers from elsewhere: source gives the arguments for each, when the lab is there
// and no agent yet.
func From(t testing.TB, n int, source func(*Cluster, *lab.Host) []string, args ...string) *Cluster {
	t.Helper()
	Bin(t)
	dir, err := os.MkdirTemp("", "lamnet") // a socket's path must be short
	must(t, err)
	c := &Cluster{Lab: lab.New(t, n), Peers: filepath.Join(dir, "peers"), dir: dir, t: t}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c.WritePeers(c.PeerLines()...)
	for _, h := range c.Hosts {
		node := &Node{Host: h, Dir: filepath.Join(dir, h.Addr.String()), Source: source(c, h), Args: args, c: c}
		must(t, os.MkdirAll(filepath.Join(node.Dir, "net.d"), 0o755))
		c.Nodes = append(c.Nodes, node)
		node.Configure("1.1.0")
		node.Start()
		t.Cleanup(func() { // last come, first served
			node.stop(t.Failed())
			_ = unix.Unmount(filepath.Join(node.Dir, "bpf"), unix.MNT_DETACH)
			results, _ := filepath.Glob("/var/lib/cni/results/" + node.Network() + "-*") // cnitool's
			for _, r := range results {
				_ = os.Remove(r)
			}
		})
	}
	return c
}

// PeerLines are the lines of the peers file for all hosts.
func (c *Cluster) PeerLines() (lines []string) {
	for _, h := range c.Hosts {
		lines = append(lines, fmt.Sprintf("%s %s", h.Prefix, h.Addr))
	}
	return lines
}

// WritePeers replaces the peers file.
func (c *Cluster) WritePeers(lines ...string) {
	c.t.Helper()
	must(c.t, os.WriteFile(c.Peers+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o644))
	must(c.t, os.Rename(c.Peers+".new", c.Peers))
}

// Network is the name of the network in the CNI configuration: unique, because cnitool keeps results by it.
func (n *Node) Network() string { return "net-" + n.Name }

// Socket is the agent's.
func (n *Node) Socket() string { return filepath.Join(n.Dir, "agent.sock") }

// State is the agent's state directory.
func (n *Node) State() string { return filepath.Join(n.Dir, "state") }

// Pool is the node's leases.
func (n *Node) Pool() ipam.Pool {
	return ipam.Pool{Dir: control.LeaseDir(n.State()), Prefix: n.Prefix}
}

// Configure writes the CNI configuration. Each of more is a plugin that is chained, as JSON.
func (n *Node) Configure(cniVersion string, more ...string) {
	n.c.t.Helper()
	own := fmt.Sprintf(`{"type": "lamina-cni", "socket": %q, "stateDir": %q}`, n.Socket(), n.State())
	conf := fmt.Sprintf(`{"cniVersion": %q, "name": %q, "plugins": [%s]}`, cniVersion, n.Network(), strings.Join(append([]string{own}, more...), ", "))
	must(n.c.t, os.WriteFile(filepath.Join(n.Dir, "net.d", "10-lamina.conflist"), []byte(conf), 0o644))
}

// Start starts the agent, and returns when it is ready.
func (n *Node) Start() {
	n.c.t.Helper()
	if err := n.Launch(); err != nil {
		n.c.t.Fatal(err)
	}
}

// Launch starts the agent; the error has what it said if it ends instead of getting ready.
func (n *Node) Launch() error {
	args := append([]string{"net", "agent", "--socket", n.Socket(), "--state", n.State(), "--pins", filepath.Join(n.Dir, "bpf", "lamina")}, slices.Concat(n.Source, n.Args)...)
	n.agent = n.Command(filepath.Join(Bin(n.c.t), "lamina"), args...)
	n.log = &bytes.Buffer{}
	n.agent.Stderr = n.log
	if err := n.agent.Start(); err != nil {
		return err
	}
	var ended error
	exited := make(chan struct{})
	go func(cmd *exec.Cmd) {
		ended = cmd.Wait()
		close(exited)
	}(n.agent)
	n.exited = exited
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		select {
		case <-exited:
			n.agent = nil
			return fmt.Errorf("%s: agent: %w: %s", n.Name, ended, n.log)
		default:
		}
		if s, err := n.Status(); err == nil && s.PID == n.agent.Process.Pid {
			return nil
		}
	}
	return errors.New("the agent does not get ready")
}

// Kill ends the agent without letting it do anything.
func (n *Node) Kill() {
	if n.agent == nil {
		return
	}
	_ = n.agent.Process.Kill()
	<-n.exited // one that is dying may hold its socket still
	n.agent = nil
}

func (n *Node) stop(show bool) {
	n.Kill()
	if show && n.log != nil {
		n.c.t.Logf("%s: agent said:\n%s", n.Name, n.log)
	}
}

// Status asks the agent.
func (n *Node) Status() (control.Status, error) {
	cl := control.NewClient(n.Socket())
	defer cl.Close()
	return cl.Status()
}

// Pod is a pod that cnitool has made.
type Pod struct {
	*lab.Node
	Addr netip.Addr
	Host string // its interface on the host
	node *Node
	Env  []string
}

// Namespace is a pod without a network.
func (n *Node) Namespace() *Pod {
	n.c.t.Helper()
	n.pods++
	return &Pod{Node: lab.NewNode(n.c.t, fmt.Sprintf("p%d", n.pods)), node: n}
}

// Pod makes a pod.
func (n *Node) Pod(env ...string) *Pod {
	n.c.t.Helper()
	p := n.Namespace()
	p.Env = env
	if _, err := p.Add(); err != nil {
		n.c.t.Fatal(err)
	}
	n.c.t.Cleanup(func() {
		if err := p.Del(); err != nil {
			n.c.t.Errorf("%s: DEL: %v", p.Name, err)
		}
	})
	return p
}

// Add is CNI ADD.
func (p *Pod) Add() (*current.Result, error) {
	out, err := p.Cnitool("add")
	if err != nil {
		return nil, err
	}
	r := &current.Result{}
	if err := json.Unmarshal(out, r); err != nil {
		return nil, fmt.Errorf("result %q: %w", out, err)
	}
	a, _ := netip.AddrFromSlice(r.IPs[0].Address.IP)
	p.Addr, p.Host = a.Unmap(), r.Interfaces[0].Name
	return r, nil
}

// Del is CNI DEL.
func (p *Pod) Del() error {
	_, err := p.Cnitool("del")
	return err
}

// Cnitool runs cnitool with a verb on the pod, on its host.
func (p *Pod) Cnitool(verb string) ([]byte, error) {
	cmd := p.node.Command(filepath.Join(Bin(p.node.c.t), "cnitool"), verb, p.node.Network(), p.Path)
	cmd.Env = append(os.Environ(), "CNI_PATH="+Bin(p.node.c.t), "NETCONFPATH="+filepath.Join(p.node.Dir, "net.d"))
	cmd.Env = append(cmd.Env, p.Env...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("cnitool %s: %w: %s%s", verb, err, &errOut, &out)
	}
	return out.Bytes(), nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Plugin runs lamina-cni itself on the node, with variables such as CNI_COMMAND=GC and a configuration on its standard input.
func (n *Node) Plugin(stdin string, env ...string) (string, error) {
	cmd := n.Command(filepath.Join(Bin(n.c.t), "lamina-cni"))
	cmd.Env = append(append(os.Environ(), "CNI_PATH="+Bin(n.c.t)), env...)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

// PluginConf is a configuration for Plugin; more is further members as JSON, such as `"mtu": 1200`.
func (n *Node) PluginConf(cniVersion string, more ...string) string {
	members := append([]string{
		fmt.Sprintf(`"cniVersion": %q`, cniVersion), fmt.Sprintf(`"name": %q`, n.Network()), `"type": "lamina-cni"`,
		fmt.Sprintf(`"socket": %q`, n.Socket()), fmt.Sprintf(`"stateDir": %q`, n.State()),
	}, more...)
	return "{" + strings.Join(members, ", ") + "}"
}
