package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/knftables"
)

const (
	// Table is the nft table (family inet) of the network.
	Table = "lamina"
	// Chain is the chain that the forward chain jumps to. It returns what is allowed and drops the rest. ("policy" itself
	// is a keyword of nft.)
	Chain = "policies"
	// prefix begins the name of everything else this package has in the table.
	prefix = "policy-"
)

// objects is what the kernel holds, as text.
type objects struct {
	sets   map[string]*set
	chains map[string]*chain
}

// set is an nft set, or a map to verdicts.
type set struct {
	typ     string
	comment string
	isMap   bool
	// elements maps the key (parts joined by " . ") to the verdict; to "" in a set.
	elements map[string]string
}

type chain struct {
	comment string
	rules   []nftRule
}

type nftRule struct{ text, comment string }

func (f family) ip() string         { return [...]string{4: "ip", 6: "ip6"}[f] }
func (f family) addr() string       { return "ipv" + strconv.Itoa(int(f)) + "_addr" }
func (f family) nfproto() string    { return "ipv" + strconv.Itoa(int(f)) }
func (f family) of(n string) string { return n + "-" + strconv.Itoa(int(f)) }

// peerMap is the name of the map from local pods to their chains.
func peerMap(dir direction, f family) string { return f.of(prefix + dir.short()) }

// selfSet is the name of the set of pods that are isolated, each paired with itself.
func selfSet(f family) string { return f.of(prefix + "self") }

// cutSet is the name of the set of flows of a protocol that were cut.
func cutSet(proto uint8, f family) string {
	if proto == protoTCP {
		return f.of(prefix + "cut-tcp")
	}
	return f.of(prefix + "cut")
}

// dropCounter is the name of a counter of dropped packets; why is "in", "out" or "cut". Its value outlives changes of rules.
func dropCounter(why string) string { return prefix + "dropped-" + why }

var drops = map[string]string{"in": "ingress", "out": "egress", "cut": "cut"}

func cutSets() (out []string) {
	for _, f := range families {
		out = append(out, cutSet(protoTCP, f), cutSet(protoUDP, f))
	}
	return out
}

// cutType is the order of a cut flow's parts: see cutKey.
func cutType(f family) string {
	return f.addr() + " . " + f.addr() + " . inet_proto . inet_service . inet_service"
}

// gate is the rules of [Chain]. They never change.
func gate() []nftRule {
	rules := []nftRule{{"ct state established,related return", "allowed when it began"}}
	for _, f := range families {
		ip := f.ip()
		tuple := fmt.Sprintf("%s saddr . %s daddr . meta l4proto . th sport . th dport", ip, ip)
		tcp, rest := cutSet(protoTCP, f), cutSet(protoUDP, f)
		rules = append(rules,
			nftRule{fmt.Sprintf("meta l4proto { udp, sctp } %s @%s counter name %s drop", tuple, rest, dropCounter("cut")), "answers to flows that were cut"},
			nftRule{fmt.Sprintf("meta l4proto tcp tcp flags & (fin|syn|rst|ack) != syn %s @%s update @%s { %s } counter name %s drop", tuple, tcp, tcp, tuple, dropCounter("cut")), "answers to flows that were cut"})
	}
	for _, f := range families {
		ip := f.ip()
		rules = append(rules,
			nftRule{fmt.Sprintf("%s saddr . %s daddr @%s return", ip, ip, selfSet(f)), "a pod to itself"},
			nftRule{fmt.Sprintf("%s saddr vmap @%s", ip, peerMap(egress, f)), ""},
			nftRule{fmt.Sprintf("%s daddr vmap @%s", ip, peerMap(ingress, f)), ""})
	}
	return rules
}

// render writes the compiled profiles down as nft objects.
func (c *compiler) render(pods map[netip.Addr]*localPod) objects {
	o := objects{sets: map[string]*set{}, chains: map[string]*chain{}}
	for _, f := range families {
		o.sets[peerMap(ingress, f)] = newSet(f.addr()+" : verdict", "what local pods receive")
		o.sets[peerMap(egress, f)] = newSet(f.addr()+" : verdict", "what local pods send")
		o.sets[peerMap(ingress, f)].isMap = true
		o.sets[peerMap(egress, f)].isMap = true
		o.sets[selfSet(f)] = newSet(f.addr()+" . "+f.addr(), "local pods that policies select")
	}
	for a, p := range pods {
		f := familyOf(a)
		for dir, pr := range p.profiles {
			if pr != nil {
				o.sets[peerMap(direction(dir), f)].elements[a.String()] = "jump " + pr.chain
				o.sets[selfSet(f)].elements[a.String()+" . "+a.String()] = ""
			}
		}
	}
	for _, pr := range c.profiles {
		o.chains[pr.chain] = pr.render(&o)
	}
	o.chains[o.digestName()] = &chain{comment: "what an agent that starts knows these rules by"}
	return o
}

// digestName is the name of an empty chain that stands for everything else here. It changes in the transaction that changes
// anything, so that an agent that starts sees whether the kernel holds what it would put there.
func (o *objects) digestName() string {
	h := sha256.New()
	fmt.Fprintln(h, gate(), cutSets())
	for _, name := range sorted(o.sets) {
		s := o.sets[name]
		fmt.Fprintln(h, name, s.typ, s.comment)
		for _, k := range sorted(s.elements) {
			fmt.Fprintln(h, k, s.elements[k])
		}
	}
	for _, name := range sorted(o.chains) {
		fmt.Fprintln(h, name, *o.chains[name])
	}
	return prefix + "digest-" + hex.EncodeToString(h.Sum(nil)[:8])
}

// held says whether what is found in the kernel, names by kind, is these objects.
func (o *objects) held(found map[string][]string) bool {
	return len(o.missing(found)) == 0
}

// missing names what is not among the names found.
func (o *objects) missing(found map[string][]string) []string {
	have := slices.Concat(found["chain"], found["set"], found["map"])
	want := slices.Concat(sorted(o.sets), sorted(o.chains), cutSets(), []string{Chain})
	return slices.DeleteFunc(want, func(n string) bool { return slices.Contains(have, n) })
}

func newSet(typ, comment string) *set {
	return &set{typ: typ, comment: bounded(comment), elements: map[string]string{}}
}

// render writes a profile's chain and adds the sets it names.
func (p *profile) render(o *objects) *chain {
	ch := &chain{comment: bounded(p.dir.String() + " of " + strings.Join(p.policies, " "))}
	for _, r := range p.rules {
		if r.pods == nil && r.block == nil && r.named == nil {
			ch.rules = append(ch.rules, nftRule{strings.TrimSpace(r.portText() + " return"), bounded(r.origin)})
			continue
		}
		for _, f := range families {
			if p.families[f] && (r.block == nil || familyOf(r.block.cidr.Addr()) == f) {
				ch.rules = append(ch.rules, nftRule{r.text(p.dir, f, o), bounded(r.origin)})
			}
		}
	}
	ch.rules = append(ch.rules, nftRule{"counter name " + dropCounter(p.dir.short()) + " counter drop", "nothing allows it"})
	return ch
}

// text is the rule for one family; the sets it names are added to o.
func (r *rule) text(dir direction, f family, o *objects) string {
	addr := f.ip() + " " + [...]string{"saddr", "daddr"}[dir]
	var parts []string
	if r.pods != nil {
		name := f.of(r.pods.name)
		parts = append(parts, addr+" @"+name)
		if o.sets[name] == nil {
			s := newSet(f.addr(), r.pods.comment)
			for a := range r.pods.addrs {
				if familyOf(a) == f {
					s.elements[a.String()] = ""
				}
			}
			o.sets[name] = s
		}
	}
	if r.block != nil {
		parts = append(parts, r.block.text(addr, f))
	}
	if r.named != nil {
		name := f.of(r.named.name)
		parts = append(parts, fmt.Sprintf("%s daddr . %s dport @%s", f.ip(), r.proto, name))
		if o.sets[name] == nil {
			s := newSet(f.addr()+" . inet_service", r.named.comment)
			for at := range r.named.at {
				if familyOf(at.Addr()) == f {
					s.elements[fmt.Sprintf("%s . %d", at.Addr(), at.Port())] = ""
				}
			}
			o.sets[name] = s
		}
	} else if t := r.portText(); t != "" {
		parts = append(parts, t)
	}
	return strings.Join(append(parts, "return"), " ")
}

func (b *block) text(addr string, f family) string {
	s := addr + " " + b.cidr.String()
	if b.cidr.Bits() == 0 {
		s = "meta nfproto " + f.nfproto()
	}
	switch len(b.except) {
	case 0:
		return s
	case 1:
		return s + " " + addr + " != " + b.except[0].String()
	}
	var list []string
	for _, e := range b.except {
		list = append(list, e.String())
	}
	return s + " " + addr + " != { " + strings.Join(list, ", ") + " }"
}

// portText matches protocol and ports; empty when any will do.
func (r *rule) portText() string {
	if r.proto == "" {
		return ""
	}
	if r.ports == nil {
		return "meta l4proto " + r.proto
	}
	var list []string
	for _, s := range r.ports {
		if s.first == s.last {
			list = append(list, strconv.Itoa(int(s.first)))
		} else {
			list = append(list, fmt.Sprintf("%d-%d", s.first, s.last))
		}
	}
	if len(list) == 1 {
		return r.proto + " dport " + list[0]
	}
	return r.proto + " dport { " + strings.Join(list, ", ") + " }"
}

// bounded makes a text fit for a comment: short enough, and without what nft would end it at.
func bounded(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == '"' || r == '\\' || r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
	if limit := knftables.CommentLengthMax - 1; len(s) > limit {
		s = s[:limit-3] + "..."
	}
	return s
}

// write adds to a transaction what turns the old objects into the new ones.
func (o objects) write(tx *knftables.Transaction, old objects) {
	// What is named exists before what names it, and goes after it.
	for _, name := range sorted(o.sets) {
		if old.sets[name] == nil {
			o.sets[name].add(tx, name)
		}
	}
	for _, name := range sorted(o.chains) {
		if old.chains[name] == nil {
			tx.Add(&knftables.Chain{Name: name, Comment: &o.chains[name].comment})
		}
	}
	for _, name := range sorted(o.sets) {
		o.sets[name].change(tx, name, old.sets[name])
	}
	for _, name := range sorted(o.chains) {
		if ch, before := o.chains[name], old.chains[name]; before == nil {
			addRules(tx, name, ch.rules)
		} else if !slices.Equal(ch.rules, before.rules) {
			tx.Flush(&knftables.Chain{Name: name})
			addRules(tx, name, ch.rules)
		}
	}
	gone := slices.DeleteFunc(sorted(old.chains), func(n string) bool { return o.chains[n] != nil })
	for _, name := range gone {
		tx.Flush(&knftables.Chain{Name: name})
	}
	for _, name := range gone {
		tx.Delete(&knftables.Chain{Name: name})
	}
	for _, name := range sorted(old.sets) {
		if o.sets[name] == nil {
			tx.Delete(&knftables.Set{Name: name})
		}
	}
}

func addRules(tx *knftables.Transaction, name string, rules []nftRule) {
	for _, r := range rules {
		rule := &knftables.Rule{Chain: name, Rule: r.text}
		if r.comment != "" {
			rule.Comment = &r.comment
		}
		tx.Add(rule)
	}
}

func (s *set) add(tx *knftables.Transaction, name string) {
	if s.isMap {
		tx.Add(&knftables.Map{Name: name, Type: s.typ, Comment: &s.comment})
	} else {
		tx.Add(&knftables.Set{Name: name, Type: s.typ, Comment: &s.comment})
	}
}

// change adds and deletes elements; before is nil for a new set.
func (s *set) change(tx *knftables.Transaction, name string, before *set) {
	var had map[string]string
	if before != nil {
		had = before.elements
	}
	for _, k := range sorted(had) {
		if v, ok := s.elements[k]; !ok || v != had[k] {
			tx.Delete(s.element(name, k, had[k]))
		}
	}
	for _, k := range sorted(s.elements) {
		if v, ok := had[k]; !ok || v != s.elements[k] {
			tx.Add(s.element(name, k, s.elements[k]))
		}
	}
}

func (s *set) element(name, key, value string) *knftables.Element {
	e := &knftables.Element{Key: strings.Split(key, " . ")}
	if s.isMap {
		e.Map, e.Value = name, []string{value}
	} else {
		e.Set = name
	}
	return e
}

// rebuild adds to a transaction what makes the kernel hold the objects, whatever it holds of ours now: the names found
// there, by kind.
func (o objects) rebuild(tx *knftables.Transaction, found map[string][]string) {
	tx.Add(&knftables.Table{})
	tx.Add(&knftables.Chain{Name: Chain})
	tx.Flush(&knftables.Chain{Name: Chain})
	ours := func(kind string) []string {
		names := slices.DeleteFunc(slices.Clone(found[kind]), func(n string) bool {
			return !strings.HasPrefix(n, prefix) || slices.Contains(cutSets(), n) // flows that were cut stay so
		})
		slices.Sort(names)
		return names
	}
	for _, n := range ours("chain") {
		tx.Flush(&knftables.Chain{Name: n})
	}
	for _, n := range ours("map") {
		tx.Flush(&knftables.Map{Name: n})
		tx.Delete(&knftables.Map{Name: n})
	}
	for _, n := range ours("set") {
		tx.Delete(&knftables.Set{Name: n})
	}
	for _, n := range ours("chain") {
		tx.Delete(&knftables.Chain{Name: n})
	}
	for _, f := range families {
		for _, proto := range []uint8{protoTCP, protoUDP} {
			timeout := map[uint8]time.Duration{protoTCP: cutTCP, protoUDP: cutOther}[proto]
			comment := "answers to these flows are dropped: a policy has forbidden them"
			tx.Add(&knftables.Set{Name: cutSet(proto, f), Type: cutType(f), Timeout: &timeout, Comment: &comment, Size: knftables.PtrTo(uint64(maxCut)),
				Flags: []knftables.SetFlag{knftables.DynamicFlag, knftables.TimeoutFlag}})
		}
	}
	for _, why := range sorted(drops) {
		tx.Add(&knftables.Counter{Name: dropCounter(why)})
	}
	o.write(tx, objects{})
	addRules(tx, Chain, gate())
}

// cutKey is the element that stands for the answers of a flow.
func cutKey(f Flow) []string {
	return []string{f.Dst.String(), f.Src.String(), strconv.Itoa(int(f.Proto)), strconv.Itoa(int(f.DstPort)), strconv.Itoa(int(f.SrcPort))}
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
