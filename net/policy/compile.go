package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// direction is as a pod sees it.
type direction int

const (
	ingress direction = iota
	egress
)

func (d direction) String() string { return [...]string{"ingress", "egress"}[d] }

// short is the direction's name in names of chains and maps.
func (d direction) short() string { return [...]string{"in", "out"}[d] }

// family is an IP version: 4 or 6.
type family int

var families = []family{4, 6}

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return 4
	}
	return 6
}

// Ruleset is a compiled State: what the kernel holds, and the same in a form that can be asked.
type Ruleset struct {
	objects
	pods map[netip.Addr]*localPod
}

// localPod is one address of a pod on this node.
type localPod struct {
	name     string
	profiles [2]*profile // by direction; nil: not isolated
}

// mark changes whenever what may reach this address, or be reached from it, changes.
func (p *localPod) mark() string {
	s := p.name
	for _, pr := range p.profiles {
		s += "|"
		if pr != nil {
			s += pr.mark
		}
	}
	return s
}

// profile is one direction's rules of all pods that the same policies select.
type profile struct {
	dir      direction
	chain    string
	policies []string // namespace/name, sorted
	rules    []rule
	families map[family]bool // of the pods that have it
	mark     string          // digest of rules and of the sets they name
}

// rule allows what matches all of its parts.
type rule struct {
	origin string   // "shop/web ingress[0].from[1]"
	pods   *podSet  // nil: not by pod
	block  *block   // nil: not by address. Neither: any peer
	proto  string   // "tcp", "udp", "sctp"; empty: any, of these and others
	ports  []span   // nil: any
	named  *portSet // nil: not by name
}

// span is a range of ports, both ends in it.
type span struct{ first, last uint16 }

// podSet is the addresses of the pods that a peer's selectors select.
type podSet struct {
	name    string // of the nft sets, without family
	comment string
	addrs   map[netip.Addr]bool
}

// portSet is the pods that name a port so, with its number there.
type portSet struct {
	name    string
	comment string
	at      map[netip.AddrPort]bool
}

// block is an ipBlock; except holds no prefix within another.
type block struct {
	cidr   netip.Prefix
	except []netip.Prefix
}

func (b *block) contains(a netip.Addr) bool {
	return b.cidr.Contains(a) && !slices.ContainsFunc(b.except, func(p netip.Prefix) bool { return p.Contains(a) })
}

// compiler holds what is shared between the rules of one state.
type compiler struct {
	state    State
	pods     []Pod // those with an address of their own, sorted
	spaces   map[string]labels.Set
	podSets  map[string]*podSet  // by selectors
	portSets map[string]*portSet // by protocol and name
	profiles map[string]*profile // by direction and policies
	policies []*networkingv1.NetworkPolicy
	selects  []labels.Selector // of policies, by the same index
	names    map[string]string // every digest's origin, to see two that are alike
}

// Compile makes the ruleset of a state. Its error names the policy that is not valid.
func Compile(s State) (*Ruleset, error) {
	c := &compiler{state: s, podSets: map[string]*podSet{}, portSets: map[string]*portSet{}, profiles: map[string]*profile{},
		spaces: map[string]labels.Set{}, names: map[string]string{}}
	c.takePods()
	if err := c.takePolicies(); err != nil {
		return nil, err
	}
	r := &Ruleset{pods: map[netip.Addr]*localPod{}}
	for _, p := range c.pods {
		for _, a := range p.Addrs {
			if !c.local(a) {
				continue
			}
			lp := &localPod{name: p.key()}
			for _, dir := range []direction{ingress, egress} {
				pr, err := c.profile(p, dir)
				if err != nil {
					return nil, err
				}
				if pr != nil {
					pr.families[familyOf(a)] = true
				}
				lp.profiles[dir] = pr
			}
			r.pods[a] = lp
		}
	}
	for _, pr := range c.profiles {
		pr.mark = pr.digest()
	}
	r.objects = c.render(r.pods)
	return r, nil
}

func (c *compiler) takePods() {
	for _, ns := range c.state.Namespaces {
		c.spaces[ns.Name] = joined(ns.Labels, map[string]string{"kubernetes.io/metadata.name": ns.Name})
	}
	for _, p := range c.state.Pods {
		if p.HostNetwork || len(p.Addrs) == 0 {
			continue
		}
		if c.spaces[p.Namespace] == nil {
			c.spaces[p.Namespace] = labels.Set{"kubernetes.io/metadata.name": p.Namespace}
		}
		addrs := make([]netip.Addr, 0, len(p.Addrs))
		for _, a := range p.Addrs {
			addrs = append(addrs, a.Unmap())
		}
		slices.SortFunc(addrs, netip.Addr.Compare)
		p.Addrs = slices.Compact(addrs)
		c.pods = append(c.pods, p)
	}
	slices.SortStableFunc(c.pods, func(a, b Pod) int { return strings.Compare(a.key(), b.key()) })
}

func (c *compiler) takePolicies() error {
	for _, p := range c.state.Policies {
		p = p.DeepCopy()
		if p.Namespace == "" {
			p.Namespace = metav1.NamespaceDefault
		}
		setDefaults(p)
		if err := Validate(p); err != nil {
			return fmt.Errorf("policy %s: %w", key(p), err)
		}
		c.policies = append(c.policies, p)
	}
	slices.SortStableFunc(c.policies, func(a, b *networkingv1.NetworkPolicy) int { return strings.Compare(key(a), key(b)) })
	for i, p := range c.policies {
		if i > 0 && key(p) == key(c.policies[i-1]) {
			return fmt.Errorf("policy %s: is there twice: remove one of the two", key(p))
		}
		sel, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
		if err != nil {
			return fmt.Errorf("policy %s: spec.podSelector: %w", key(p), err)
		}
		c.selects = append(c.selects, sel)
	}
	return nil
}

func (c *compiler) local(a netip.Addr) bool {
	return slices.ContainsFunc(c.state.Node, func(p netip.Prefix) bool { return p.Contains(a) })
}

// profile returns the pod's rules for one direction, nil when no policy isolates it.
func (c *compiler) profile(p Pod, dir direction) (*profile, error) {
	var by []*networkingv1.NetworkPolicy
	var names []string
	want := [...]networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}[dir]
	for i, np := range c.policies {
		if np.Namespace == p.Namespace && slices.Contains(np.Spec.PolicyTypes, want) && c.selects[i].Matches(labels.Set(p.Labels)) {
			by = append(by, np)
			names = append(names, key(np))
		}
	}
	if len(by) == 0 {
		return nil, nil
	}
	id := dir.String() + " of " + strings.Join(names, " ")
	if pr := c.profiles[id]; pr != nil {
		return pr, nil
	}
	hash, err := c.hash(id)
	if err != nil {
		return nil, err
	}
	pr := &profile{dir: dir, chain: prefix + dir.short() + "-" + hash, policies: names, families: map[family]bool{}}
	for _, np := range by {
		rs, err := c.rules(np, dir)
		if err != nil {
			return nil, err
		}
		pr.rules = append(pr.rules, rs...)
	}
	c.profiles[id] = pr
	return pr, nil
}

// rules are what one policy allows in one direction.
func (c *compiler) rules(np *networkingv1.NetworkPolicy, dir direction) (out []rule, err error) {
	add := func(i int, side string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) error {
		at := fmt.Sprintf("%s %s[%d]", key(np), dir, i)
		matches, err := c.portMatches(ports)
		if err != nil {
			return err
		}
		if len(peers) == 0 {
			for _, m := range matches {
				m.origin = at
				out = append(out, m)
			}
			return nil
		}
		for j, peer := range peers {
			pods, blk, err := c.peer(np.Namespace, peer)
			if err != nil {
				return err
			}
			for _, m := range matches {
				m.origin, m.pods, m.block = fmt.Sprintf("%s.%s[%d]", at, side, j), pods, blk
				out = append(out, m)
			}
		}
		return nil
	}
	if dir == ingress {
		for i, r := range np.Spec.Ingress {
			if err := add(i, "from", r.From, r.Ports); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	for i, r := range np.Spec.Egress {
		if err := add(i, "to", r.To, r.Ports); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// portMatches makes a rule's list of ports into matches, numbers of one protocol together. An empty list is one match
// of everything.
func (c *compiler) portMatches(ports []networkingv1.NetworkPolicyPort) ([]rule, error) {
	if len(ports) == 0 {
		return []rule{{}}, nil
	}
	var out []rule
	for _, proto := range []string{"tcp", "udp", "sctp"} {
		var spans []span
		var named []string
		all := false
		for _, p := range ports {
			if strings.ToLower(string(*p.Protocol)) != proto {
				continue
			}
			switch {
			case p.Port == nil:
				all = true
			case p.Port.Type == intstr.String:
				named = append(named, p.Port.StrVal)
			default:
				first := uint16(p.Port.IntVal)
				last := first
				if p.EndPort != nil {
					last = uint16(*p.EndPort)
				}
				spans = append(spans, span{first, last})
			}
		}
		if all {
			out = append(out, rule{proto: proto})
			continue
		}
		if len(spans) > 0 {
			out = append(out, rule{proto: proto, ports: union(spans)})
		}
		slices.Sort(named)
		for _, name := range slices.Compact(named) {
			out = append(out, rule{proto: proto, named: c.portSet(proto, name)})
		}
	}
	return out, nil
}

// union sorts ranges and makes one of those that touch.
func union(in []span) []span {
	slices.SortFunc(in, func(a, b span) int { return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.last, b.last)) })
	out := in[:1]
	for _, s := range in[1:] {
		if last := &out[len(out)-1]; uint32(s.first) <= uint32(last.last)+1 {
			last.last = max(last.last, s.last)
		} else {
			out = append(out, s)
		}
	}
	return out
}

// peer returns the pods or the addresses that a peer means, as seen from a policy's namespace.
func (c *compiler) peer(namespace string, p networkingv1.NetworkPolicyPeer) (*podSet, *block, error) {
	if p.IPBlock != nil {
		b := &block{cidr: netip.MustParsePrefix(p.IPBlock.CIDR).Masked()} // validated
		for _, e := range p.IPBlock.Except {
			b.except = append(b.except, netip.MustParsePrefix(e).Masked())
		}
		b.except = outermost(b.except)
		return nil, b, nil
	}
	where, spaces := "namespace "+namespace, labels.Nothing()
	if p.NamespaceSelector != nil {
		sel, err := metav1.LabelSelectorAsSelector(p.NamespaceSelector)
		if err != nil {
			return nil, nil, err
		}
		where, spaces = "namespaces "+cmp.Or(sel.String(), "all"), sel
	}
	pods := labels.Everything()
	if p.PodSelector != nil {
		sel, err := metav1.LabelSelectorAsSelector(p.PodSelector)
		if err != nil {
			return nil, nil, err
		}
		pods = sel
	}
	id := "pods " + cmp.Or(pods.String(), "all") + " of " + where
	if s := c.podSets[id]; s != nil {
		return s, nil, nil
	}
	hash, err := c.hash(id)
	if err != nil {
		return nil, nil, err
	}
	s := &podSet{name: prefix + "pods-" + hash, comment: id, addrs: map[netip.Addr]bool{}}
	for _, pod := range c.pods {
		here := pod.Namespace == namespace
		if p.NamespaceSelector != nil {
			here = spaces.Matches(c.spaces[pod.Namespace])
		}
		if here && pods.Matches(labels.Set(pod.Labels)) {
			for _, a := range pod.Addrs {
				s.addrs[a] = true
			}
		}
	}
	c.podSets[id] = s
	return s, nil, nil
}

// outermost sorts prefixes and leaves out those within another.
func outermost(in []netip.Prefix) []netip.Prefix {
	slices.SortFunc(in, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var out []netip.Prefix
	for _, p := range in {
		if len(out) == 0 || !out[len(out)-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

func (c *compiler) portSet(proto, name string) *portSet {
	id := proto + "-" + name
	if s := c.portSets[id]; s != nil {
		return s
	}
	s := &portSet{name: prefix + "port-" + id, comment: "where the " + proto + " port " + name + " is", at: map[netip.AddrPort]bool{}}
	for _, pod := range c.pods {
		for _, p := range pod.Ports {
			if p.Name != name || !strings.EqualFold(string(p.protocol()), proto) {
				continue
			}
			for _, a := range pod.Addrs {
				s.at[netip.AddrPortFrom(a, p.Port)] = true
			}
		}
	}
	c.portSets[id] = s
	return s
}

// hash makes a short name of a long one.
func (c *compiler) hash(id string) (string, error) {
	sum := sha256.Sum256([]byte(id))
	h := hex.EncodeToString(sum[:6])
	if other, ok := c.names[h]; ok && other != id {
		return "", fmt.Errorf("two names have one digest, rename a policy: %q, %q", id, other)
	}
	c.names[h] = id
	return h, nil
}

// digest covers everything that decides whether the profile lets a packet pass.
func (p *profile) digest() string {
	h := sha256.New()
	for _, r := range p.rules {
		fmt.Fprintf(h, "rule %s %v", r.proto, r.ports)
		if r.block != nil {
			fmt.Fprintf(h, " block %v %v", r.block.cidr, r.block.except)
		}
		if r.pods != nil {
			fmt.Fprintf(h, " pods %v", slices.SortedFunc(maps.Keys(r.pods.addrs), netip.Addr.Compare))
		}
		if r.named != nil {
			fmt.Fprintf(h, " named %v", slices.SortedFunc(maps.Keys(r.named.at), netip.AddrPort.Compare))
		}
		fmt.Fprintln(h)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Flow is a connection, or what conntrack takes for one, as its first packet says it in the forward chain.
type Flow struct {
	Src, Dst         netip.Addr
	Proto            uint8  // IP protocol number
	SrcPort, DstPort uint16 // zero for protocols without ports
}

func (f Flow) String() string {
	return protoName(f.Proto) + " " + netip.AddrPortFrom(f.Src, f.SrcPort).String() + " > " + netip.AddrPortFrom(f.Dst, f.DstPort).String()
}

const (
	protoTCP  = 6
	protoUDP  = 17
	protoSCTP = 132
)

func protoName(n uint8) string {
	switch n {
	case protoTCP:
		return "tcp"
	case protoUDP:
		return "udp"
	case protoSCTP:
		return "sctp"
	}
	return strconv.Itoa(int(n))
}

// Allows says whether the ruleset lets a flow begin, as far as this node has a say in it.
func (r *Ruleset) Allows(f Flow) bool {
	if f.Src == f.Dst {
		return true
	}
	if p := r.pods[f.Src]; p != nil && p.profiles[egress] != nil && !p.profiles[egress].allows(f) {
		return false
	}
	p := r.pods[f.Dst]
	return p == nil || p.profiles[ingress] == nil || p.profiles[ingress].allows(f)
}

func (p *profile) allows(f Flow) bool { return p.allowing(f) >= 0 }

// allowing is the index of the first rule that allows a flow; -1: none does.
func (p *profile) allowing(f Flow) int {
	peer := f.Src
	if p.dir == egress {
		peer = f.Dst
	}
	return slices.IndexFunc(p.rules, func(r rule) bool { return r.matches(f, peer) })
}

func (r *rule) matches(f Flow, peer netip.Addr) bool {
	switch {
	case r.pods != nil && !r.pods.addrs[peer]:
		return false
	case r.block != nil && !r.block.contains(peer):
		return false
	case r.proto != "" && r.proto != protoName(f.Proto):
		return false
	case r.named != nil:
		return r.named.at[netip.AddrPortFrom(f.Dst, f.DstPort)]
	}
	return r.ports == nil || slices.ContainsFunc(r.ports, func(s span) bool { return s.first <= f.DstPort && f.DstPort <= s.last })
}
