// Package pair makes two hosts joined by a cable, each a network namespace, with a client at one and a server at the other: on
// the hosts themselves, in pods on a bridge with VXLAN between the bridges, or in pods of Lamina's network, whose agents and
// CNI plugin are the real programs.
//
// The namespaces have no names and the agents have a mount namespace of their own, so that nothing of the machine's is touched,
// an agent or CNI that it runs included, and nothing can stay: when the process ends, however it does, the kernel kills the
// agents and takes everything down.
package pair

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"lamina/net/ns"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Pair is two hosts with a client and a server.
type Pair struct {
	Client, Server netns.NsHandle
	At             netip.Addr // the server's address
	hosts          [2]*host
	pods           []*Pod
	dir            string
}

// host is one end of the cable.
type host struct {
	ns     netns.NsHandle
	n      int // 1 or 2
	agent  *program
	dir    string
	plugin string
}

const (
	nic     = "phys0" // of a host
	inPod   = "eth0"
	podMTU  = 1450
	network = "bench"
)

func (h *host) addr() netip.Addr     { return netip.AddrFrom4([4]byte{192, 168, 77, byte(h.n)}) }
func (h *host) prefix() netip.Prefix { return netip.PrefixFrom(h.pod(0), 16) }
func (h *host) pod(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99 + byte(h.n), 0, byte(i)}) }

// newNS makes a namespace.
func newNS() (h netns.NsHandle, err error) {
	here, err := netns.Get()
	if err != nil {
		return netns.None(), err
	}
	defer here.Close()
	err = ns.Do(here, func() (err error) { // which comes back: making one enters it
		h, err = netns.New()
		return err
	})
	if err != nil {
		return netns.None(), fmt.Errorf("network namespace: %w", err)
	}
	return h, sh(h, "ip link set lo up")
}

// sh runs a script in a namespace.
func sh(h netns.NsHandle, format string, args ...any) error {
	cmd := exec.Command("sh", "-ec", fmt.Sprintf(format, args...))
	var out []byte
	err := ns.Do(h, func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.TrimSpace(fmt.Sprintf(format, args...)), err, bytes.TrimSpace(out))
	}
	return nil
}

// Hosts is a pair whose client and server are on the hosts themselves.
func Hosts() (p *Pair, err error) {
	p = &Pair{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
			p = nil
		}
	}()
	for i := range p.hosts {
		h := &host{n: i + 1}
		if h.ns, err = newNS(); err != nil {
			return p, err
		}
		p.hosts[i] = h
	}
	err = ns.Do(p.hosts[0].ns, func() error {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: nic}, PeerName: nic, PeerNamespace: netlink.NsFd(int(p.hosts[1].ns))}
		return netlink.LinkAdd(v)
	})
	if err != nil {
		return p, fmt.Errorf("a veth pair as the cable: %w", err)
	}
	for _, h := range p.hosts {
		if err = sh(h.ns, "ip addr add %s/24 dev %s; ip link set %[2]s up", h.addr(), nic); err != nil {
			return p, err
		}
	}
	p.Client, p.Server, p.At = p.hosts[0].ns, p.hosts[1].ns, p.hosts[1].addr()
	return p, nil
}

// Bridge is a pair whose client and server are in pods on bridges, as flannel's VXLAN backend and the CNI plugin bridge make
// them: a VXLAN device that learns nothing, routes and entries to the other host, masquerade, conntrack.
func Bridge() (*Pair, error) {
	p, err := Hosts()
	if err != nil {
		return nil, err
	}
	for i, h := range p.hosts {
		if err = h.bridge(p.hosts[1-i]); err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	for i, h := range p.hosts {
		pod, err := h.bridgedPod(2)
		if err != nil {
			return nil, errors.Join(err, p.Close())
		}
		p.pods = append(p.pods, pod)
		p.use(i, pod)
	}
	return p, nil
}

// use makes a pod the client of the first host, or the server of the second.
func (p *Pair) use(i int, pod *Pod) {
	if i == 0 {
		p.Client = pod.NS
	} else {
		p.Server, p.At = pod.NS, pod.Addr
	}
}

func (h *host) bridge(o *host) error {
	mac := func(h *host) string { return fmt.Sprintf("0e:00:00:00:00:%02x", h.n) }
	return sh(h.ns, `
ip link add flannel.1 address %[1]s type vxlan id 1 local %[2]s dev %[3]s dstport 8472 nolearning
ip link set flannel.1 mtu %[4]d up
ip addr add %[5]s/32 dev flannel.1
ip neigh replace %[6]s lladdr %[7]s dev flannel.1 nud permanent
bridge fdb append %[7]s dev flannel.1 dst %[8]s self permanent
ip route add %[9]s via %[6]s dev flannel.1 onlink
ip link add cni0 type bridge
ip link set cni0 mtu %[4]d up
ip addr add %[10]s/16 dev cni0
echo 1 >/proc/sys/net/ipv4/ip_forward
nft -f - <<EOF
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
EOF`, mac(h), h.addr(), nic, podMTU, h.pod(0), o.pod(0), mac(o), o.addr(), o.prefix(), h.pod(1))
}

func (h *host) bridgedPod(i int) (*Pod, error) {
	pod := &Pod{Addr: h.pod(i), host: h}
	var err error
	if pod.NS, err = newNS(); err != nil {
		return nil, err
	}
	err = ns.Do(h.ns, func() error {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("veth%d", i), MTU: podMTU}, PeerName: inPod, PeerMTU: podMTU, PeerNamespace: netlink.NsFd(int(pod.NS))}
		return netlink.LinkAdd(v)
	})
	if err == nil {
		err = sh(h.ns, "ip link set veth%d master cni0 up", i)
	}
	if err == nil {
		err = sh(pod.NS, "ip addr add %s/16 dev %s; ip link set %[2]s up; ip route add default via %s", pod.Addr, inPod, h.pod(1))
	}
	if err != nil {
		pod.NS.Close()
		return nil, err
	}
	return pod, nil
}

// WithoutOffload switches segmentation offload off, and its counterpart on receive, at hosts and pods: every packet is one of
// the wire's.
func (p *Pair) WithoutOffload() error {
	var errs []error
	for _, h := range p.hosts {
		errs = append(errs, sh(h.ns, "ethtool -K %s tso off gso off gro off", nic))
	}
	for _, pod := range p.pods {
		errs = append(errs, sh(pod.NS, "ethtool -K %s tso off gso off gro off", inPod))
	}
	return errors.Join(errs...)
}

// Close takes the pair down.
func (p *Pair) Close() error {
	var errs []error
	for _, h := range p.hosts {
		if h != nil && h.agent != nil {
			errs = append(errs, h.agent.stop())
		}
	}
	for _, pod := range p.pods {
		pod.NS.Close()
	}
	for _, h := range p.hosts {
		if h != nil {
			h.ns.Close()
		}
	}
	if p.dir != "" {
		errs = append(errs, os.RemoveAll(p.dir))
	}
	return errors.Join(errs...)
}

// program is one that runs in a namespace until it is stopped.
type program struct {
	cmd    *exec.Cmd
	out    bytes.Buffer
	exited chan struct{} // closed when it has
}

// start starts a program in a network namespace. It dies with this process. With ownMounts what it mounts is its own.
func start(h netns.NsHandle, ownMounts bool, name string, args ...string) (*program, error) {
	p := &program{cmd: exec.Command(name, args...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	// A group of its own: Ctrl-C is for us to act on.
	p.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	if ownMounts {
		p.cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNS
	}
	started := make(chan error)
	go func() {
		// The kernel kills a child when the thread that made it ends: this one does not before the child.
		runtime.LockOSThread()
		err := netns.Set(h)
		if err == nil {
			err = p.cmd.Start()
		}
		started <- err
		if err == nil {
			_ = p.cmd.Wait()
		}
		close(p.exited)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	return p, nil
}

// stop kills it.
func (p *program) stop() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.exited
	return nil
}

// await asks until ok says so, and tells what the program said if it ends before.
func (p *program) await(what string, ok func() bool) error {
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return nil
		}
		select {
		case <-p.exited:
			return fmt.Errorf("%s ended: %s", what, lastLine(p.out.Bytes()))
		default:
		}
	}
	return fmt.Errorf("%s does not get ready", what)
}

func lastLine(b []byte) string {
	b = bytes.TrimSpace(b)
	return string(b[bytes.LastIndexByte(b, '\n')+1:])
}

// Serve runs a server program at the pair's server until stop is called, and waits until something accepts connections at the
// port.
func (p *Pair) Serve(port uint16, name string, args ...string) (stop func() error, err error) {
	s, err := start(p.Server, false, name, args...)
	if err != nil {
		return nil, err
	}
	err = s.await(filepath.Base(name), func() bool {
		return ns.Do(p.Server, func() error {
			c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(p.At, port).String(), time.Second)
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	})
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s.stop, nil
}

// Ask runs a program at the pair's client.
func (p *Pair) Ask(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := ns.Do(p.Client, cmd.Run); err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, lastLine(out.Bytes()))
	}
	return out.String(), nil
}
