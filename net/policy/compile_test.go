package policy

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/knftables"
)

// script is a ruleset as the transaction that makes it in an empty kernel.
func script(t *testing.T, s State) string {
	t.Helper()
	r, err := Compile(s)
	if err != nil {
		t.Fatal(err)
	}
	tx := knftables.NewFake(knftables.InetFamily, Table).NewTransaction()
	r.rebuild(tx, nil)
	return tx.String()
}

func TestCompileIsDeterministic(t *testing.T) {
	for seed := range uint64(50) {
		s := randomState(rand.New(rand.NewPCG(seed, 1)))
		want := script(t, s)
		r := rand.New(rand.NewPCG(seed, 2))
		r.Shuffle(len(s.Pods), func(i, j int) { s.Pods[i], s.Pods[j] = s.Pods[j], s.Pods[i] })
		r.Shuffle(len(s.Policies), func(i, j int) { s.Policies[i], s.Policies[j] = s.Policies[j], s.Policies[i] })
		if got := script(t, s); got != want {
			t.Fatalf("seed %d: another order of pods and policies gives another ruleset:\n%s\nand\n%s", seed, want, got)
		}
	}
}

// The compiler's own verdict against the reference, over many more states than the kernel can be asked about.
func TestVerdictsAgreeWithReference(t *testing.T) {
	outside := []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::a")}
	denied, asked := 0, 0
	for seed := range uint64(300) {
		s := randomState(rand.New(rand.NewPCG(seed, 3)))
		r, err := Compile(s)
		if err != nil {
			t.Fatal(err)
		}
		addrs := slices.Clone(outside)
		for _, p := range s.Pods {
			addrs = append(addrs, p.Addrs...)
		}
		for _, src := range addrs {
			for _, dst := range addrs {
				if src.Is4() != dst.Is4() {
					continue
				}
				for proto, number := range map[string]uint8{"TCP": protoTCP, "UDP": protoUDP, "SCTP": protoSCTP, "ICMP": 1} {
					for _, port := range testPorts {
						want := referenceAllows(s, nil, packet{src, dst, proto, port})
						asked++
						if !want {
							denied++
						}
						if got := r.Allows(Flow{src, dst, number, 40000, port}); got != want {
							t.Fatalf("seed %d: %s %s > %s port %d: compiled says %v, reference %v", seed, proto, src, dst, port, got, want)
						}
					}
				}
			}
		}
	}
	t.Logf("%d flows asked about, %d of them denied", asked, denied)
	if denied < asked/20 || denied > asked*19/20 {
		t.Errorf("the states are too dull: %d of %d flows denied", denied, asked)
	}
}

var update = flag.Bool("policy.update", false, "write the expected rulesets anew")

// The ruleset of a small shop, whole: read testdata/shop.nft to see what policies become.
func TestCompiledText(t *testing.T) {
	data, err := os.ReadFile("testdata/shop.yaml")
	must(t, err)
	ps, err := Parse("shop.yaml", data)
	must(t, err)
	addr := func(s ...string) (out []netip.Addr) {
		for _, a := range s {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	got := script(t, State{Node: testNode, Policies: ps,
		Namespaces: []Namespace{{Name: "ops", Labels: map[string]string{"team": "ops"}}},
		Pods: []Pod{
			{Namespace: "shop", Name: "web-0", Labels: map[string]string{"app": "web"}, Addrs: addr("10.42.1.2"), Ports: []Port{{Name: "http", Port: 80}}},
			{Namespace: "shop", Name: "web-1", Labels: map[string]string{"app": "web"}, Addrs: addr("10.42.1.3"), Ports: []Port{{Name: "http", Port: 8080}}},
			{Namespace: "shop", Name: "db-0", Labels: map[string]string{"app": "db"}, Addrs: addr("10.42.2.2"), Ports: []Port{{Name: "sql", Port: 5432}}},
			{Namespace: "shop", Name: "cache-0", Labels: map[string]string{"app": "cache"}, Addrs: addr("10.42.1.4")},
			{Namespace: "shop", Name: "agent", Addrs: addr("10.42.1.1"), HostNetwork: true},
			{Namespace: "ops", Name: "probe", Addrs: addr("10.42.3.9")},
		}})
	if *update {
		must(t, os.WriteFile("testdata/shop.nft", []byte(got), 0o644))
	}
	want, err := os.ReadFile("testdata/shop.nft")
	must(t, err)
	if got != string(want) {
		t.Errorf("got:\n%s\nwant (testdata/shop.nft; -policy.update writes it):\n%s", got, want)
	}
}

// A change touches what changes, and nothing else.
func TestChangeIsSmall(t *testing.T) {
	before, err := Compile(trafficState(onlyFrom("other")))
	must(t, err)
	for name, c := range map[string]struct {
		to   State
		want []string // of each line of the transaction, its beginning
	}{
		"nothing": {trafficState(onlyFrom("other")), nil},
		"a pod that no rule knows": {State{Node: testNode, Policies: trafficState(onlyFrom("other")).Policies,
			Pods: append(trafficState().Pods, Pod{Namespace: "x", Name: "y", Addrs: []netip.Addr{netip.MustParseAddr("10.42.1.77")}})}, nil},
		"a peer more": {State{Node: testNode, Policies: trafficState(onlyFrom("other")).Policies,
			Pods: append(trafficState().Pods, Pod{Namespace: "shop", Name: "more", Labels: map[string]string{"app": "other"}, Addrs: []netip.Addr{netip.MustParseAddr("10.42.2.77")}})},
			[]string{"add chain inet lamina policy-digest-", "add element inet lamina policy-pods-", "flush chain inet lamina policy-digest-", "delete chain inet lamina policy-digest-"}},
		"no policy": {trafficState(), []string{"add chain inet lamina policy-digest-",
			"delete element inet lamina policy-in-4 { 10.42.1.3",
			"delete element inet lamina policy-self-4 { 10.42.1.3",
			"flush chain inet lamina policy-digest-", "flush chain inet lamina policy-in-",
			"delete chain inet lamina policy-digest-", "delete chain inet lamina policy-in-", "delete set inet lamina policy-pods-"}},
	} {
		after, err := Compile(c.to)
		must(t, err)
		tx := knftables.NewFake(knftables.InetFamily, Table).NewTransaction()
		after.write(tx, before.objects)
		lines := slices.Collect(strings.Lines(tx.String()))
		ok := len(lines) == len(c.want)
		for i := range min(len(lines), len(c.want)) {
			ok = ok && strings.HasPrefix(lines[i], c.want[i])
		}
		if !ok {
			t.Errorf("%s: the transaction is\n%s\nwant lines like\n%s", name, tx, strings.Join(c.want, "\n"))
		}
	}
}

// Names and comments stay within what nft takes, however long those of policies are.
func TestNamesAreBounded(t *testing.T) {
	long := strings.Repeat("a", 60) + "." + strings.Repeat("b", 60) + "." + strings.Repeat("c", 60)
	s := trafficState()
	for i := range 40 {
		p := onlyFrom("other")
		p.Name = fmt.Sprintf("%s.%d", long, i)
		s.Policies = append(s.Policies, p)
	}
	r, err := Compile(s)
	must(t, err)
	for _, name := range append(sorted(r.sets), sorted(r.chains)...) {
		if len(name) > 40 || !strings.HasPrefix(name, "policy-") {
			t.Errorf("name %q", name)
		}
	}
	for _, c := range r.chains {
		if len(c.comment) >= knftables.CommentLengthMax {
			t.Errorf("comment of %d bytes", len(c.comment))
		}
		for _, rule := range c.rules {
			if len(rule.comment) >= knftables.CommentLengthMax {
				t.Errorf("comment of %d bytes", len(rule.comment))
			}
		}
	}
}

func TestMerge(t *testing.T) {
	a, b := netip.MustParseAddr("10.42.1.2"), netip.MustParseAddr("10.42.1.3")
	got := Merge(
		Inventory{Namespaces: []Namespace{{Name: "shop", Labels: map[string]string{"team": "x"}}},
			Pods: []Pod{
				{Namespace: "shop", Name: "web", Labels: map[string]string{"app": "web", "tier": "1"}, Addrs: []netip.Addr{a}, Ports: []Port{{Name: "http", Port: 80}}},
				{Namespace: "shop", Name: "old", Addrs: []netip.Addr{b}}}},
		Inventory{Namespaces: []Namespace{{Name: "shop", Labels: map[string]string{"env": "y"}}},
			Pods: []Pod{{Namespace: "shop", Name: "web", Labels: map[string]string{"tier": "2"}, Addrs: []netip.Addr{a, b}, Ports: []Port{{Name: "http", Port: 8080}}}}})
	want := Inventory{Namespaces: []Namespace{{Name: "shop", Labels: map[string]string{"team": "x", "env": "y"}}},
		Pods: []Pod{
			{Namespace: "shop", Name: "old", Labels: map[string]string{}, Addrs: []netip.Addr{}},
			{Namespace: "shop", Name: "web", Labels: map[string]string{"app": "web", "tier": "2"}, Addrs: []netip.Addr{a, b}, Ports: []Port{{Name: "http", Port: 8080}}}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}
