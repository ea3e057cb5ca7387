package policy

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netns"
	"sigs.k8s.io/knftables"

	"lamina/net/ns"
)

const (
	// maxCut is how many cut flows the kernel remembers.
	maxCut = 1 << 20
	// How long they are remembered. TCP: since the last answer; retransmissions are two minutes apart at most. Others: since the
	// cut, for as long as conntrack would have taken what comes for an answer; after that either end may begin anew.
	cutTCP   = 5 * time.Minute
	cutOther = 2 * time.Minute
	// sweeps bounds the passes over conntrack after a change. The first finds all but flows that were on their way through
	// the chains during the change; the second, a moment later, finds those.
	sweeps     = 8
	sweepPause = 5 * time.Millisecond
)

// EnforcerOptions say where and how rules are enforced.
type EnforcerOptions struct {
	// NetNS is the network namespace of the node. The zero value and netns.None() mean the one of this process.
	NetNS netns.NsHandle
	// Around surrounds a change after which flows of pods may be judged differently; it calls apply once and returns its error. The fast path stops learning and
	// forgets the flows of the plan's pods first, and learns again when apply has returned: the rules are changed then, and
	// conntrack has forgotten what they forbid. It may not call the enforcer. Nil: nobody needs to know.
	Around func(p *Plan, apply func() error) error
}

// Enforcer keeps rulesets in the kernel. It may be used from several goroutines.
type Enforcer struct {
	opts EnforcerOptions
	mu   sync.Mutex
	nft  knftables.Interface
	now  *Ruleset // what the kernel holds; nil when that is not known
	last *Ruleset // what it held last, as far as we know; for marks and nothing else
}

// NewEnforcer makes an enforcer; the kernel is not touched yet. The error says what is missing.
func NewEnforcer(opts EnforcerOptions) (*Enforcer, error) {
	e := &Enforcer{opts: opts}
	err := e.inside(func() (err error) {
		e.nft, err = knftables.New(knftables.InetFamily, Table)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("nftables: %w: install the package nftables (1.0.1 or newer) and run as root on a kernel with CONFIG_NF_TABLES_INET", err)
	}
	return e, nil
}

// Plan is a change that has been worked out and not been made.
type Plan struct {
	// Pods are the addresses of local pods whose rules change, with those that go and those that come, sorted. What a rule
	// says of its peers is part of it: when a peer's labels change so that another rule applies, the pod is listed.
	Pods []netip.Addr

	rules  *Ruleset
	before *Ruleset // what the plan was compared with
}

// Empty says that nothing changes for any pod.
func (p *Plan) Empty() bool { return len(p.Pods) == 0 }

// Affects says whether flows between two addresses, in either direction, may be judged differently after the change.
func (p *Plan) Affects(a, b netip.Addr) bool { return p.has(a) || p.has(b) }

func (p *Plan) has(a netip.Addr) bool {
	_, ok := slices.BinarySearchFunc(p.Pods, a.Unmap(), netip.Addr.Compare)
	return ok
}

// Allows says whether a flow may begin after the change, as far as this node has a say in it.
func (p *Plan) Allows(f Flow) bool { return p.rules.Allows(f) }

// Plan works out what a state changes. Its error names the policy that is not valid.
func (e *Enforcer) Plan(s State) (*Plan, error) {
	r, err := Compile(s)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return &Plan{Pods: changed(e.last, r), rules: r, before: e.last}, nil
}

// changed lists the addresses whose marks differ.
func changed(before, after *Ruleset) []netip.Addr {
	var out []netip.Addr
	if before == nil {
		return slices.SortedFunc(maps.Keys(after.pods), netip.Addr.Compare)
	}
	for a, p := range after.pods {
		if q := before.pods[a]; q == nil || q.mark() != p.mark() {
			out = append(out, a)
		}
	}
	for a := range before.pods {
		if after.pods[a] == nil {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// Result is what a change did beside changing rules.
type Result struct {
	// Cut are the established flows that the new rules forbid, sorted. Their conntrack entries are gone.
	Cut []Flow
}

// Apply makes a change: one nft transaction, after which the new rules hold for every flow that begins. Then the
// conntrack entries of the changed pods' flows that are now forbidden are deleted, and no others.
//
// Conntrack picks up flows in their middle, and takes the first packet it sees for the one that began it. So that an
// answer does not bring a forbidden flow to life in the other direction, which may be allowed, answers of the flows that
// go are dropped when they would begin a flow: they are put into the sets policy-cut-* before the entries are
// deleted. They stay there when the flow is allowed again: it goes on when the end that began it speaks. A TCP connection
// that the other end opens is no answer.
//
// With an error of the transaction the rules that were in force still are; an error of what follows it says so.
func (e *Enforcer) Apply(ctx context.Context, p *Plan) (res Result, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	// Another plan may have been applied since.
	p.Pods, p.before = changed(e.last, p.rules), e.last
	apply := func() error {
		return e.inside(func() (err error) {
			res.Cut, err = e.change(ctx, p)
			return err
		})
	}
	if e.opts.Around == nil || !p.judges() {
		return res, apply()
	}
	err = e.opts.Around(p, apply)
	return res, err
}

// change installs a plan's rules and ends what they forbid.
func (e *Enforcer) change(ctx context.Context, p *Plan) ([]Flow, error) {
	if err := e.install(ctx, p.rules); err != nil {
		return nil, fmt.Errorf("policies unchanged: %w", err)
	}
	e.last = p.rules
	if len(p.Pods) == 0 {
		return nil, nil
	}
	cut, err := e.sweep(ctx, p)
	if err != nil {
		e.last = nil // whoever tries again shall find these pods changed
		return nil, fmt.Errorf("policies changed, but connections they forbid may live on: %w", err)
	}
	return cut, nil
}

// Repair puts everything this package has in the kernel there anew, after somebody has changed it. Nothing happens
// before the first Apply.
func (e *Enforcer) Repair(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := cmp.Or(e.last, e.now)
	if r == nil {
		return nil
	}
	e.now = nil
	return e.inside(func() error {
		found, err := e.found(ctx)
		if err != nil {
			return err
		}
		tx := e.nft.NewTransaction()
		r.rebuild(tx, found)
		return e.run(ctx, tx, r)
	})
}

// Render adds to a transaction what makes the kernel hold everything of this package's, for whoever makes the table anew.
func (e *Enforcer) Render(ctx context.Context, tx *knftables.Transaction) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.now = nil // that transaction may fail
	if e.last == nil {
		return nil
	}
	return e.inside(func() error {
		found, err := e.found(ctx)
		if err == nil {
			e.last.rebuild(tx, found)
		}
		return err
	})
}

// Missing names what of this package's objects is not in the kernel, empty when nothing is.
func (e *Enforcer) Missing(ctx context.Context) (missing []string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.now == nil {
		return nil, nil
	}
	err = e.inside(func() error {
		found, err := e.found(ctx)
		if err != nil {
			return err
		}
		missing = e.now.missing(found)
		if slices.Contains(found["chain"], Chain) {
			rules, err := e.nft.ListRules(ctx, Chain)
			if err != nil {
				return err
			}
			if len(rules) != len(gate()) {
				missing = append(missing, "rules of "+Chain)
			}
		}
		return nil
	})
	return missing, err
}

// Dropped reads the counters of Status.Dropped.
func (e *Enforcer) Dropped(ctx context.Context) (map[string]uint64, error) {
	var counters []*knftables.Counter
	err := e.inside(func() (err error) {
		counters, err = e.nft.ListCounters(ctx)
		return err
	})
	if err != nil && !knftables.IsNotFound(err) {
		return nil, fmt.Errorf("nft: counters of drops: %w", err)
	}
	n := map[string]uint64{}
	for _, c := range counters {
		for short, name := range drops {
			if c.Name == dropCounter(short) && c.Packets != nil {
				n[name] = *c.Packets
			}
		}
	}
	return n, nil
}

// found returns the names of what is in the table, by kind.
func (e *Enforcer) found(ctx context.Context) (map[string][]string, error) {
	all, err := e.nft.ListAll(ctx)
	if knftables.IsNotFound(err) {
		return nil, nil
	}
	return all, err
}

// install runs the one transaction of a change.
func (e *Enforcer) install(ctx context.Context, r *Ruleset) error {
	tx := e.nft.NewTransaction()
	if e.now != nil {
		r.write(tx, e.now.objects)
	} else {
		found, err := e.found(ctx)
		if err != nil {
			return err
		}
		if e.last == nil && r.held(found) {
			e.now = r // an agent before this one did it
			return nil
		}
		r.rebuild(tx, found)
	}
	if tx.NumOperations() == 0 {
		return nil
	}
	return e.run(ctx, tx, r)
}

// run runs a transaction after which the kernel holds a ruleset.
func (e *Enforcer) run(ctx context.Context, tx *knftables.Transaction, r *Ruleset) error {
	if err := e.nft.Run(ctx, tx); err != nil {
		e.now = nil
		return fmt.Errorf("nft: %w", err)
	}
	e.now = r
	return nil
}

func compareFlows(a, b Flow) int { return strings.Compare(a.String(), b.String()) }

// sweep forgets the flows of a plan's pods that its rules forbid.
func (e *Enforcer) sweep(ctx context.Context, p *Plan) ([]Flow, error) {
	gone := map[Flow]bool{}
	if len(p.isolated()) == 0 {
		return nil, nil
	}
	ct, err := openConntrack()
	if err != nil {
		return nil, err
	}
	defer ct.close()
	for pass := range sweeps {
		if pass > 0 {
			time.Sleep(sweepPause)
		}
		entries, err := ct.list(p.families())
		if err != nil {
			return nil, err
		}
		forbidden := map[Flow]bool{}
		for _, f := range entries {
			if p.Affects(f.Src, f.Dst) && !ct.host(f) && !p.Allows(f) {
				forbidden[f] = true
			}
		}
		if len(forbidden) == 0 {
			if pass > 0 || !p.running() {
				break
			}
			continue
		}
		if err := e.remember(ctx, forbidden); err != nil {
			return nil, err
		}
		if err := ct.forget(p.families(), forbidden); err != nil {
			return nil, err
		}
		maps.Copy(gone, forbidden)
	}
	return slices.SortedFunc(maps.Keys(gone), compareFlows), nil
}

// isolated are the plan's pods that can have forbidden flows afterwards.
func (p *Plan) isolated() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(p.Pods), func(a netip.Addr) bool { return !p.rules.isolates(a) })
}

// judges says whether any flow may be judged differently after the change: pods that no policy selects come and go without.
func (p *Plan) judges() bool {
	return slices.ContainsFunc(p.Pods, func(a netip.Addr) bool { return p.before == nil || p.before.isolates(a) || p.rules.isolates(a) })
}

// isolates says whether a policy selects the pod of this node with an address.
func (r *Ruleset) isolates(a netip.Addr) bool {
	lp := r.pods[a]
	return lp != nil && lp.profiles != [2]*profile{}
}

// running says whether any of them was there before, and may have had packets on their way during the change.
func (p *Plan) running() bool {
	return p.before == nil || slices.ContainsFunc(p.isolated(), func(a netip.Addr) bool { return p.before.pods[a] != nil })
}

// families are those of the pods that can have forbidden flows.
func (p *Plan) families() (out []family) {
	for _, f := range families {
		if slices.ContainsFunc(p.isolated(), func(a netip.Addr) bool { return familyOf(a) == f }) {
			out = append(out, f)
		}
	}
	return out
}

// remember puts flows into the sets of cut flows, before their conntrack entries go.
func (e *Enforcer) remember(ctx context.Context, flows map[Flow]bool) error {
	tx := e.nft.NewTransaction()
	for _, f := range slices.SortedFunc(maps.Keys(flows), compareFlows) {
		if f.Proto != protoTCP && f.Proto != protoUDP && f.Proto != protoSCTP {
			continue
		}
		// To add what is there renews no timeout, and to delete what is not there is an error.
		el := &knftables.Element{Set: cutSet(f.Proto, familyOf(f.Src)), Key: cutKey(f)}
		tx.Add(el)
		tx.Delete(el)
		tx.Add(el)
	}
	if tx.NumOperations() == 0 {
		return nil
	}
	if err := e.nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("nft: sets of cut flows: %w", err)
	}
	return nil
}

// inside runs f in the node's network namespace; programs that f starts run there too.
func (e *Enforcer) inside(f func() error) error {
	if !e.opts.NetNS.IsOpen() || e.opts.NetNS == 0 {
		return f()
	}
	return ns.Do(e.opts.NetNS, f)
}
