// Package control is how the CNI plugin and the command line talk to the agent of their node: HTTP with JSON over a unix
// socket that only root can open. It holds no more than the types and the client, so that the plugin, which runs anew for
// every pod, stays small.
package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"lamina/net/ipam"
	"lamina/net/peers"
)

// Where things are unless a flag or the CNI configuration says otherwise.
const (
	Socket   = "/run/lamina/net/agent.sock"
	StateDir = "/var/lib/lamina/net"
)

// LeaseDir is where the leases are, in the agent's state directory.
func LeaseDir(stateDir string) string { return filepath.Join(stateDir, "leases") }

// Paths of the socket.
const (
	NodePath   = "/v1/node"   // GET: Node
	PodsPath   = "/v1/pods"   // POST: Pod
	StatusPath = "/v1/status" // GET: Status
)

// ErrDown says that no agent answers.
var ErrDown = errors.New("no lamina net agent answers")

// Node is what a pod's interface needs to know of its node.
type Node struct {
	Lease    peers.Lease   `json:"lease"`
	Host     netip.Addr    `json:"host"` // the host's address in the pod network: the gateway of pods
	MTU      int           `json:"mtu"`  // of pods, in bytes
	StateDir string        `json:"state_dir"`
	HoldDown time.Duration `json:"hold_down"` // of released addresses, in nanoseconds; negative: none
}

// Pod is a pod's lease with its interface on the host.
type Pod struct {
	ipam.Lease
	HostInterface string    `json:"host_interface"`
	Index         int       `json:"index"` // of the interface on the host
	MAC           peers.MAC `json:"mac"`   // inside the pod
}

// HostInterface is the name of an attachment's interface on the host.
func HostInterface(id string) string { return "lam" + id }

// PodMAC is the address of a pod's interface: it follows from the pod's, so that nobody has to ask for it.
func PodMAC(a netip.Addr) peers.MAC {
	m := peers.NodeMAC(a)
	m[0] = 0x0a
	return m
}

// GatewayMAC is the address of the host's end of every pod's link.
var GatewayMAC = peers.MAC{0x0e, 0x6c, 0, 0, 0, 1}

// Peer is a remote node as the agent sees it.
type Peer struct {
	peers.Lease
	State string `json:"state"` // PeerOK, or what is missing
}

// PeerOK is the state of a peer to which everything leads that should.
const PeerOK = "ok"

// Status is what an agent tells of itself.
type Status struct {
	Version   string         `json:"version"`
	PID       int            `json:"pid"`
	Started   time.Time      `json:"started"`
	Node      Node           `json:"node"`
	Device    string         `json:"device"`
	VNI       int            `json:"vni"`
	Port      int            `json:"port"`
	Underlay  Underlay       `json:"underlay"`
	Peers     []Peer         `json:"peers"`
	Source    string         `json:"source"` // where peers come from
	Pods      int            `json:"pods"`
	Addresses Addresses      `json:"addresses"`
	Repairs   uint64         `json:"repairs"` // how often something was found missing or changed that had been in order
	Repaired  []Repair       `json:"repaired"`
	Problems  []string       `json:"problems"` // what is wrong now
	Parts     map[string]any `json:"parts"`    // what the fast path and the policies tell
}

// Part decodes what a part tells into v, and says whether there is such a part.
func (s *Status) Part(name string, v any) bool {
	b, err := json.Marshal(s.Parts[name])
	return err == nil && string(b) != "null" && json.Unmarshal(b, v) == nil
}

// Underlay is the interface that the node's address is on.
type Underlay struct {
	Interface string `json:"interface"`
	MTU       int    `json:"mtu"`
}

// Addresses counts those of the node's prefix.
type Addresses struct {
	Size    int `json:"size"`
	Leased  int `json:"leased"`
	Resting int `json:"resting"`
	Damaged int `json:"damaged"`
}

// Repair is something that was put right.
type Repair struct {
	Time time.Time `json:"time"`
	What string    `json:"what"`
}

// Client talks to the agent on a socket.
type Client struct {
	socket string
	http   http.Client
}

// requestTimeout bounds a request: policies of a pod are in force when its answer comes.
const requestTimeout = 20 * time.Second

// NewClient makes a client. It does not connect yet.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{socket, http.Client{Transport: &http.Transport{DialContext: dial}, Timeout: requestTimeout}}
}

// Close lets go of connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Node asks for the node's settings.
func (c *Client) Node() (n Node, err error) {
	err = c.do(http.MethodGet, NodePath, nil, &n)
	return n, err
}

// Status asks for everything.
func (c *Client) Status() (s Status, err error) {
	err = c.do(http.MethodGet, StatusPath, nil, &s)
	return s, err
}

// PodAdded tells of a pod whose interface exists and is not up yet. When it returns the pod's policies are in force.
func (c *Client) PodAdded(p Pod) error { return c.do(http.MethodPost, PodsPath, p, nil) }

// PodRemoved tells that a pod has lost its interface and is about to lose its address. When it returns no cache knows it any
// more.
func (c *Client) PodRemoved(id string) error {
	return c.do(http.MethodDelete, PodsPath+"/"+url.PathEscape(id), nil, nil)
}

// do makes a request. A connection that nobody accepts is ErrDown.
func (c *Client) do(method, path string, in, out any) error {
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	req, err := http.NewRequest(method, "http://agent"+path, &body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w on %s: start it (systemctl start lamina-net, or lamina net agent), or name its socket", ErrDown, c.socket)
	case err != nil:
		return fmt.Errorf("agent on %s: %w", c.socket, unwrapURL(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		return fmt.Errorf("agent: %s", bytes.TrimSpace(b))
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("agent's answer: %w", err)
	}
	return nil
}

// unwrapURL drops the made-up address that http puts before an error.
func unwrapURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
