package overlay

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"time"

	"lamina/net/ns"
	"lamina/net/peers"

	"sigs.k8s.io/knftables"
)

// Marks that packets carry on this host (skb->mark).
const (
	MarkGeneration  = 0x0ff // these bits of the fast path's generation go with MarkMiss
	MarkMiss        = 0x100 // a program of the fast path has let the packet go the ordinary way
	MarkEstablished = 0x200 // and its connection is allowed, and established or UDP's
	MarkHairpin     = 0x400 // it goes back to the pod it comes from
)

// Names in the table.
const (
	Table            = "lamina"   // of family inet
	PolicyChain      = "policies" // ("policy" is a word of nft's) package policy fills it; what it does not drop is allowed
	forwardChain     = "forward"
	postroutingChain = "postrouting"
	podsSet          = "pods" // the pod prefixes of all nodes
)

// Policy fills the chain PolicyChain.
type Policy interface {
	// Render adds what policies need to a transaction in which the table and an empty PolicyChain exist. It is called when the
	// table has to be made anew, so that there never is a table without its policies.
	Render(tx *knftables.Transaction) error
}

// table is the host's nftables table.
type table struct {
	cfg Config
	nft knftables.Interface
}

func newTable(cfg Config) (*table, error) {
	t := &table{cfg: cfg}
	err := ns.Do(cfg.NS, func() (err error) {
		t.nft, err = knftables.New(knftables.InetFamily, Table)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("nftables: %w: install the package nftables, and use a kernel with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET", err)
	}
	return t, nil
}

// chain is a base chain and its rules.
type chain struct {
	knftables.Chain
	rules []rule
}

type rule struct{ text, why string }

// comment identifies a rule, so that rules can be compared without reading nft's way of writing them.
func (r rule) comment() string {
	sum := sha256.Sum256([]byte(r.text))
	return fmt.Sprintf("%s [%x]", r.why, sum[:4])
}

// chains are those that are the overlay's own. `nft list table inet lamina` shows them with their comments.
func (t *table) chains() []chain {
	dev, own := t.cfg.Device, t.cfg.Self.Prefix
	return []chain{
		{
			knftables.Chain{Name: forwardChain, Type: knftables.PtrTo(knftables.FilterType), Hook: knftables.PtrTo(knftables.ForwardHook), Priority: knftables.PtrTo(knftables.FilterPriority)},
			[]rule{
				{others(dev), "others' traffic"},
				{fmt.Sprintf(`ct state new ct status dnat fib daddr . iif oif exists meta mark set meta mark or %#x`, MarkHairpin),
					"a pod that reaches itself by a port of the host"},
				{`jump ` + PolicyChain, "policies"},
				{fmt.Sprintf(`ct state established meta mark and %#x == %#x meta mark set meta mark or %#x`, uint32(0xffffffff)&^MarkGeneration, MarkMiss, MarkEstablished),
					"what the fast path may learn"},
				{fmt.Sprintf(`meta l4proto udp ct state new ct status confirmed meta mark and %#x == %#x meta mark set meta mark or %#x`, uint32(0xffffffff)&^MarkGeneration, MarkMiss, MarkEstablished),
					"and from the second packet of what nobody has answered yet"},
			},
		},
		{
			knftables.Chain{Name: postroutingChain, Type: knftables.PtrTo(knftables.NATType), Hook: knftables.PtrTo(knftables.PostroutingHook), Priority: knftables.PtrTo(knftables.SNATPriority)},
			[]rule{
				{fmt.Sprintf(`meta mark and %#x == %#[1]x masquerade fully-random`, MarkHairpin), "a pod must not see its own address as the sender's"},
				{fmt.Sprintf(`ip saddr %s ip daddr != @%s ip daddr != 224.0.0.0/4 masquerade fully-random`, own, podsSet), "out of the pod network"},
				{fmt.Sprintf(`oifname %q ip saddr != @%s masquerade fully-random`, dev, podsSet), "into it by this host: answers come back this way"},
			},
		},
	}
}

// others matches packets that neither come from a device of the overlay's nor go to one. Each comparison is an instruction, where
// a set with "lam*" is a tree that is searched for every packet.
func others(device string) string {
	rule := `iifname != "lam*" oifname != "lam*" `
	if !strings.HasPrefix(device, "lam") {
		rule += fmt.Sprintf(`iifname != %q oifname != %[1]q `, device)
	}
	return rule + "accept"
}

func (t *table) prefixes(others []peers.Lease) []string {
	all := []string{t.cfg.Self.Prefix.String()}
	for _, l := range others {
		all = append(all, l.Prefix.String())
	}
	slices.Sort(all)
	return all
}

// patience bounds a run of nft.
const patience = 20 * time.Second

// do runs f in the host's namespace.
func (t *table) do(f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := ns.Do(t.cfg.NS, func() error { return f(ctx) }); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	return nil
}

// reconcile makes the overlay's part of the table anew, in one transaction, if anything about it is not as it should be.
func (t *table) reconcile(others []peers.Lease) (changes []string, err error) {
	err = t.do(func(ctx context.Context) error {
		wrong, whole := t.compare(ctx, others)
		if wrong == "" {
			return nil
		}
		tx, err := t.transaction(others, whole)
		if err != nil {
			return err
		}
		changes = []string{wrong}
		return t.nft.Run(ctx, tx)
	})
	if err != nil {
		return nil, err
	}
	return changes, nil
}

// compare says what is wrong first, and whether the policies are lost too.
func (t *table) compare(ctx context.Context, others []peers.Lease) (wrong string, whole bool) {
	objects, err := t.nft.ListAll(ctx)
	if err != nil {
		return "nftables table inet " + Table, true
	}
	if !slices.Contains(objects["chain"], PolicyChain) {
		return "nftables chain " + PolicyChain, true
	}
	for _, c := range t.chains() {
		if !slices.Contains(objects["chain"], c.Name) {
			return "nftables chain " + c.Name, false
		}
		rules, err := t.nft.ListRules(ctx, c.Name)
		if err != nil || !slices.EqualFunc(rules, c.rules, func(have *knftables.Rule, want rule) bool {
			return have.Comment != nil && *have.Comment == want.comment()
		}) {
			return "nftables rules of chain " + c.Name, false
		}
	}
	elements, err := t.nft.ListElements(ctx, "set", podsSet)
	have := []string{}
	for _, e := range elements {
		have = append(have, strings.Join(e.Key, " "))
	}
	slices.Sort(have)
	if err != nil || !slices.Equal(have, t.prefixes(others)) {
		return "nftables set " + podsSet, false
	}
	return "", false
}

// transaction makes everything of the overlay's, and with whole the policies.
func (t *table) transaction(others []peers.Lease, whole bool) (*knftables.Transaction, error) {
	tx := t.nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Add(&knftables.Set{Name: podsSet, Type: "ipv4_addr", Flags: []knftables.SetFlag{knftables.IntervalFlag}})
	tx.Flush(&knftables.Set{Name: podsSet})
	for _, p := range t.prefixes(others) {
		tx.Add(&knftables.Element{Set: podsSet, Key: []string{p}})
	}
	tx.Add(&knftables.Chain{Name: PolicyChain})
	if whole && t.cfg.Policy != nil {
		if err := t.cfg.Policy.Render(tx); err != nil {
			return nil, fmt.Errorf("policies: %w", err)
		}
	}
	for _, c := range t.chains() {
		tx.Add(&c.Chain)
		tx.Flush(&knftables.Chain{Name: c.Name})
		for _, r := range c.rules {
			tx.Add(&knftables.Rule{Chain: c.Name, Rule: r.text, Comment: knftables.PtrTo(r.comment())})
		}
	}
	return tx, nil
}

func (t *table) remove() error {
	return t.do(func(ctx context.Context) error {
		tx := t.nft.NewTransaction()
		tx.Add(&knftables.Table{}) // or deleting it could fail
		tx.Delete(&knftables.Table{})
		return t.nft.Run(ctx, tx)
	})
}

// Run applies a transaction that build fills, to the table in the host's namespace: what package policy changes.
func (o *Overlay) Run(build func(tx *knftables.Transaction) error) error {
	return o.nft.do(func(ctx context.Context) error {
		tx := o.nft.nft.NewTransaction()
		if err := build(tx); err != nil {
			return err
		}
		if tx.NumOperations() == 0 {
			return nil
		}
		return o.nft.nft.Run(ctx, tx)
	})
}
