// Package cni is the CNI plugin lamina-cni: it gives a pod an interface and an address. The agent of the node must be
// running for ADD, because it knows the node's prefix and puts policies into force; everything else works without it.
//
// A pod's interface is one end of a veth pair; the other is on the host, without a bridge, with a route to the pod. The pod
// has an address of 32 bits and a default route by the host's address in the pod network, which is on no network of the
// pod's: permanent ARP entries on both ends replace asking.
//
// The order of steps is what makes a crash harmless. ADD: lease, interface (down on the host), agent, interface up. DEL:
// interface, agent, lease. So an interface never is without a lease, a pod never has a network without its policies, and what
// a crash leaves is found by the hash of the attachment and removed by DEL or GC.
package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"lamina/net/control"
	"lamina/net/ipam"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Versions of the specification that the plugin speaks.
var Versions = version.PluginSupports("0.4.0", "1.0.0", "1.1.0")

// Funcs are the plugin's verbs.
func Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: add, Del: del, Check: check, GC: gc, Status: status}
}

// conf is the plugin's part of a network configuration.
type conf struct {
	types.PluginConf
	Socket   string `json:"socket"`   // of the agent
	StateDir string `json:"stateDir"` // of the agent: where leases are
	MTU      int    `json:"mtu"`      // of pods, in bytes; 0: what the agent says
	Args     struct {
		CNI struct {
			Labels []struct{ Key, Value string } `json:"labels"`
		} `json:"cni"`
	} `json:"args"`
}

func parse(stdin []byte) (*conf, error) {
	c := &conf{Socket: control.Socket, StateDir: control.StateDir}
	if err := json.Unmarshal(stdin, c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "the network configuration is not JSON as it should be", err.Error())
	}
	if c.MTU != 0 && c.MTU < 576 {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("mtu %d: use 576 or more, or leave it out", c.MTU), "")
	}
	return c, nil
}

func (c *conf) pool(prefix netip.Prefix, holdDown time.Duration) ipam.Pool {
	return ipam.Pool{Dir: control.LeaseDir(c.StateDir), Prefix: prefix, HoldDown: holdDown}
}

// pod is what the runtime tells of the pod.
func (c *conf) pod(args *skel.CmdArgs) ipam.Pod {
	p := ipam.Pod{Container: args.ContainerID, Interface: args.IfName, Network: c.Name, Netns: args.Netns, Labels: map[string]string{}}
	for _, l := range c.Args.CNI.Labels {
		p.Labels[l.Key] = l.Value
	}
	for pair := range strings.SplitSeq(args.Args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			p.Namespace = value
		case "K8S_POD_NAME":
			p.Name = value
		case "K8S_POD_UID":
			p.UID = value
		case "LAMINA_LABELS": // key:value,key:value: neither may hold what separates arguments
			for label := range strings.SplitSeq(value, ",") {
				k, v, _ := strings.Cut(label, ":")
				p.Labels[k] = v
			}
		}
	}
	return p
}

// agentPatience is how long ADD waits for an agent that is being restarted.
const agentPatience = 5 * time.Second

// node asks the agent.
func node(cl *control.Client) (n control.Node, err error) {
	for deadline := time.Now().Add(agentPatience); ; time.Sleep(50 * time.Millisecond) {
		n, err = cl.Node()
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, control.ErrDown) || time.Now().After(deadline) {
			return n, tryLater(err)
		}
	}
}

// tryLater is an error that will pass.
func tryLater(err error) error { return types.NewError(types.ErrTryAgainLater, err.Error(), "") }

func add(args *skel.CmdArgs) (err error) {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	cl := control.NewClient(c.Socket)
	defer cl.Close()
	n, err := node(cl)
	if err != nil {
		return err
	}
	if n.StateDir != c.StateDir {
		return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("the agent keeps its leases in %s: add \"stateDir\": %[1]q to the network configuration", n.StateDir), "")
	}
	if c.MTU == 0 {
		c.MTU = n.MTU
	}
	pool := c.pool(n.Lease.Prefix, n.HoldDown)
	l, err := pool.Allocate(c.pod(args))
	switch {
	case errors.Is(err, ipam.ErrFull), errors.Is(err, ipam.ErrResting):
		return tryLater(err)
	case err != nil:
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.takeDown(cl, l.ID))
		}
	}()
	w, err := openWire(args.Netns, args.IfName, l, n, c.MTU)
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.create(); err != nil {
		return err
	}
	if err := cl.PodAdded(control.Pod{Lease: l, HostInterface: w.host, Index: w.index, MAC: w.mac}); err != nil {
		return err
	}
	if err := w.connect(); err != nil {
		return err
	}
	return types.PrintResult(c.result(args, w), c.CNIVersion)
}

func (c *conf) result(args *skel.CmdArgs, w *wire) *current.Result {
	gateway := net.IP(w.node.Host.AsSlice())
	return &current.Result{
		CNIVersion: current.ImplementedSpecVersion,
		Interfaces: []*current.Interface{
			{Name: w.host, Mac: control.GatewayMAC.String(), Mtu: w.mtu},
			{Name: args.IfName, Mac: w.mac.String(), Mtu: w.mtu, Sandbox: args.Netns},
		},
		IPs:    []*current.IPConfig{{Interface: current.Int(1), Address: *hostNet(w.lease.Address), Gateway: gateway}},
		Routes: []*types.Route{{Dst: net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, GW: gateway}},
		DNS:    c.DNS,
	}
}

// takeDown undoes an ADD, whole or in part.
func (c *conf) takeDown(cl *control.Client, id string) error {
	if err := removeInterface(control.HostInterface(id)); err != nil {
		return err
	}
	if err := cl.PodRemoved(id); err != nil && !errors.Is(err, control.ErrDown) {
		return err
	}
	return c.pool(netip.Prefix{}, 0).Release(id)
}

// del succeeds if there is nothing left to do, whatever has gone before it.
func del(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	cl := control.NewClient(c.Socket)
	defer cl.Close()
	return c.takeDown(cl, ipam.Pod{Container: args.ContainerID, Interface: args.IfName}.ID())
}

// gc removes what is left of attachments that the runtime does not know.
func gc(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	cl := control.NewClient(c.Socket)
	defer cl.Close()
	valid := map[string]bool{}
	for _, a := range c.ValidAttachments {
		valid[ipam.Pod{Container: a.ContainerID, Interface: a.IfName}.ID()] = true
	}
	leases, err := c.pool(netip.Prefix{}, 0).List()
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range leases {
		if valid[l.ID] || l.Err == nil && l.Network != c.Name {
			continue
		}
		if l.Err != nil { // it may be another network's: its interface tells whether a pod uses it
			if used, err := interfaceExists(control.HostInterface(l.ID)); err != nil || used {
				errs = append(errs, err)
				continue
			}
		}
		errs = append(errs, c.takeDown(cl, l.ID))
	}
	return errors.Join(errs...)
}

// status says whether an ADD would work.
func status(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	cl := control.NewClient(c.Socket)
	defer cl.Close()
	s, err := cl.Status()
	switch {
	case err != nil:
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	case s.Addresses.Leased >= s.Addresses.Size:
		return types.NewError(types.ErrPluginNotAvailable, fmt.Sprintf("all %d addresses of %s are leased: delete pods, run CNI GC, or give the node a larger prefix",
			s.Addresses.Size, s.Node.Lease.Prefix), "")
	case len(s.Problems) > 0:
		return types.NewError(types.ErrLimitedConnectivity, strings.Join(s.Problems, "; "), "")
	}
	return nil
}

// check compares what there is with what ADD has made.
func check(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return types.NewError(types.ErrDecodingFailure, "prevResult", err.Error())
	}
	if c.PrevResult == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "CHECK needs the result of ADD in prevResult", "")
	}
	prev, err := current.NewResultFromResult(c.PrevResult)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, "prevResult", err.Error())
	}
	cl := control.NewClient(c.Socket)
	defer cl.Close()
	n, err := node(cl)
	if err != nil {
		return err
	}
	id := ipam.Pod{Container: args.ContainerID, Interface: args.IfName}.ID()
	l, err := c.pool(n.Lease.Prefix, 0).Find(id)
	if err != nil {
		return err
	}
	if !hasAddress(prev, l.Address) {
		return fmt.Errorf("the lease is %s, which is not in prevResult", l.Address)
	}
	if c.MTU == 0 {
		c.MTU = n.MTU
	}
	w, err := openWire(args.Netns, args.IfName, l, n, c.MTU)
	if err != nil {
		return err
	}
	defer w.close()
	return w.check()
}

func hasAddress(r *current.Result, a netip.Addr) bool {
	for _, ip := range r.IPs {
		if got, ok := netip.AddrFromSlice(ip.Address.IP); ok && got.Unmap() == a {
			return true
		}
	}
	return false
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}
