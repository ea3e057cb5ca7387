package pair

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"lamina/net/control"
	"lamina/net/fastpath"
	"lamina/net/ns"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netns"
)

// Plugin is the program of pods.
const Plugin = "lamina-cni"

// FindPlugin looks for the CNI plugin: beside the program, where packages put it, and where runtimes look for it.
func FindPlugin(lamina string) (string, error) {
	beside := filepath.Dir(lamina)
	for _, dir := range []string{beside, filepath.Join(beside, "../lib/cni"), "/usr/lib/cni", "/opt/cni/bin"} {
		path := filepath.Join(dir, Plugin)
		if st, err := os.Stat(path); err == nil && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is neither beside %s nor in /usr/lib/cni or /opt/cni/bin: make build makes both", Plugin, lamina)
}

// Lamina is a pair whose client and server are in pods of Lamina's network. The binary's agents run on the hosts with further
// arguments; dir is where the pair makes a directory for what they write.
func Lamina(lamina, plugin, dir string, args ...string) (p *Pair, err error) {
	if p, err = Hosts(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
			p = nil
		}
	}()
	if p.dir, err = os.MkdirTemp(dir, "pair."); err != nil {
		return p, err
	}
	peers := filepath.Join(p.dir, "peers")
	lines := fmt.Sprintf("%s %s\n%s %s\n", p.hosts[0].prefix(), p.hosts[0].addr(), p.hosts[1].prefix(), p.hosts[1].addr())
	if err = os.WriteFile(peers, []byte(lines), 0o600); err != nil {
		return p, err
	}
	for _, h := range p.hosts {
		h.plugin, h.dir = plugin, filepath.Join(p.dir, fmt.Sprint(h.n))
		if err = h.startAgent(lamina, append([]string{"--peers", peers}, args...)); err != nil {
			return p, err
		}
	}
	for i := range p.hosts {
		pod, err := p.Pod(i)
		if err != nil {
			return p, err
		}
		if err := pod.Add(); err != nil {
			return p, err
		}
		p.use(i, pod)
	}
	return p, nil
}

func (h *host) socket() string { return filepath.Join(h.dir, "sock") }
func (h *host) state() string  { return filepath.Join(h.dir, "state") }

// startAgent starts the agent. It mounts a bpffs for its maps, which nobody else sees and which goes with it.
func (h *host) startAgent(lamina string, args []string) error {
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		return err
	}
	all := append([]string{"net", "agent", "--socket", h.socket(), "--state", h.state(), "--pins", filepath.Join(h.dir, "bpf", "lamina")}, args...)
	var err error
	if h.agent, err = start(h.ns, true, lamina, all...); err != nil {
		return err
	}
	return h.agent.await("lamina net agent", func() bool {
		_, err := h.status()
		return err == nil
	})
}

func (h *host) status() (control.Status, error) {
	c := control.NewClient(h.socket())
	defer c.Close()
	return c.Status()
}

// Pod is a pod. It has no network before Add.
type Pod struct {
	NS   netns.NsHandle
	Addr netip.Addr
	Used time.Duration // CPU time of the plugin's latest run
	host *host
	id   string
}

// Pod makes a namespace for a pod on one of the hosts, 0 or 1.
func (p *Pair) Pod(on int) (*Pod, error) {
	h, err := newNS()
	if err != nil {
		return nil, err
	}
	pod := &Pod{NS: h, host: p.hosts[on], id: fmt.Sprintf("bench-%d", len(p.pods))}
	p.pods = append(p.pods, pod)
	return pod, nil
}

// Add runs the CNI plugin's ADD.
func (p *Pod) Add() error {
	out, err := p.run("ADD")
	if err != nil {
		return err
	}
	var r current.Result
	if err := json.Unmarshal(out, &r); err != nil || len(r.IPs) == 0 {
		return fmt.Errorf("%s: the result of ADD is %q", Plugin, out)
	}
	a, _ := netip.AddrFromSlice(r.IPs[0].Address.IP)
	p.Addr = a.Unmap()
	return nil
}

// Del runs the CNI plugin's DEL.
func (p *Pod) Del() error {
	_, err := p.run("DEL")
	return err
}

func (p *Pod) run(verb string) ([]byte, error) {
	cmd := exec.Command(p.host.plugin)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID="+p.id, "CNI_IFNAME="+inPod, "CNI_PATH="+filepath.Dir(p.host.plugin),
		fmt.Sprintf("CNI_NETNS=/proc/%d/fd/%d", os.Getpid(), int(p.NS)))
	cmd.Stdin = bytes.NewReader(fmt.Appendf(nil, `{"cniVersion": "1.1.0", "name": %q, "type": %q, "socket": %q, "stateDir": %q}`, network, Plugin, p.host.socket(), p.host.state()))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := ns.Do(p.host.ns, cmd.Run)
	if cmd.ProcessState != nil {
		p.Used = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", Plugin, verb, err, bytes.TrimSpace(out.Bytes()))
	}
	return out.Bytes(), nil
}

// Counters are the fast path's, of both hosts together; false without a fast path.
func (p *Pair) Counters() (all fastpath.Counters, ok bool, err error) {
	for _, h := range p.hosts {
		if h.agent == nil {
			return all, false, nil
		}
		s, err := h.status()
		if err != nil {
			return all, false, err
		}
		part, _ := s.Parts["fastpath"].(map[string]any)
		if part["state"] != "on" {
			return all, false, nil
		}
		counters, _ := part["counters"].(map[string]any)
		for prog := range all {
			reasons, _ := counters[fastpath.Program(prog).String()].(map[string]any)
			for r := range all[prog] {
				n, _ := reasons[fastpath.Reason(r).String()].(float64)
				all[prog][r] += uint64(n)
			}
		}
	}
	return all, true, nil
}
