package policy

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const head = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: ns1}\nspec:\n  podSelector: {}\n"

// Every error names the file, the object, the field and what to do.
func TestParseErrors(t *testing.T) {
	for name, c := range map[string]struct{ text, field, remedy string }{
		"no YAML":             {"a: [", "", "correct the YAML"},
		"another kind":        {"apiVersion: v1\nkind: Pod\n", "kind", "only kind NetworkPolicy"},
		"an older API":        {strings.Replace(head, "networking.k8s.io/v1", "extensions/v1beta1", 1), "kind", "apiVersion networking.k8s.io/v1"},
		"unknown field":       {head + "  ingres: []\n", "spec.ingres", "kubectl explain"},
		"twice one field":     {head + "  podSelector: {}\n", "", "kubectl explain"},
		"wrong type":          {head + "  ingress: 7\n", "", "fields and types"},
		"no name":             {strings.Replace(head, "name: p, ", "", 1), "metadata.name", "give the policy a name"},
		"bad name":            {strings.Replace(head, "name: p", "name: P_p", 1), "metadata.name", "lowercase"},
		"bad namespace":       {strings.Replace(head, "namespace: ns1", "namespace: n.n", 1), "metadata.namespace", "dots"},
		"policy type":         {head + "  policyTypes: [Sideways]\n", "spec.policyTypes[0]", `"Ingress"`},
		"operator":            {head + "  ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: Is}]}}]}]\n", "spec.ingress[0].from[0].podSelector.matchExpressions[0].operator", "not a valid"},
		"empty peer":          {head + "  ingress: [{from: [{}]}]\n", "spec.ingress[0].from[0]", "podSelector"},
		"block and selector":  {head + "  egress: [{to: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]\n", "spec.egress[0].to[0].ipBlock", "list entry of its own"},
		"cidr":                {head + "  egress: [{to: [{ipBlock: {cidr: 10.0.0.0}}]}]\n", "spec.egress[0].to[0].ipBlock.cidr", "10.1.0.0/16"},
		"except outside":      {head + "  egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]\n", "spec.egress[0].to[0].ipBlock.except[0]", "part of 10.0.0.0/8"},
		"except is all":       {head + "  egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]\n", "spec.egress[0].to[0].ipBlock.except[0]", "smaller"},
		"except of family":    {head + "  egress: [{to: [{ipBlock: {cidr: \"::/0\", except: [10.0.0.0/8]}}]}]\n", "spec.egress[0].to[0].ipBlock.except[0]", "part of ::/0"},
		"protocol":            {head + "  ingress: [{ports: [{protocol: ICMP}]}]\n", "spec.ingress[0].ports[0].protocol", `"SCTP"`},
		"port zero":           {head + "  ingress: [{ports: [{port: 0}]}]\n", "spec.ingress[0].ports[0].port", "from 1 to 65535"},
		"port name":           {head + "  ingress: [{ports: [{port: UPPER}]}]\n", "spec.ingress[0].ports[0].port", "alpha-numeric"},
		"end before port":     {head + "  ingress: [{ports: [{port: 80, endPort: 79}]}]\n", "spec.ingress[0].ports[0].endPort", "from port to 65535"},
		"end of a name":       {head + "  ingress: [{ports: [{port: http, endPort: 90}]}]\n", "spec.ingress[0].ports[0].endPort", "remove it"},
		"end without a port":  {head + "  ingress: [{ports: [{endPort: 90}]}]\n", "spec.ingress[0].ports[0].port", "first of the range"},
		"twice in a file":     {head + "---\n" + head, "metadata.name", "rename or remove"},
		"good one, bad one":   {head + "---\n" + strings.Replace(head, "{}", "[]", 1), "", "fields and types"},
		"label of a selector": {head + "  egress: [{to: [{namespaceSelector: {matchLabels: {\"-\": x}}}]}]\n", "spec.egress[0].to[0].namespaceSelector.matchLabels", "alphanumeric"},
	} {
		ps, err := Parse("/etc/p/x.yaml", []byte(c.text))
		var fe *FileError
		if !errors.As(err, &fe) {
			t.Errorf("%s: error is %v", name, err)
			continue
		}
		if ps != nil {
			t.Errorf("%s: policies beside an error", name)
		}
		if fe.Field != c.field || !strings.Contains(fe.Remedy, c.remedy) || fe.File != "/etc/p/x.yaml" || fe.Object == "" || fe.Problem == "" {
			t.Errorf("%s: %q\nfield %q, want %q; remedy %q, want %q in it", name, fe, fe.Field, c.field, fe.Remedy, c.remedy)
		}
	}
}

func TestParse(t *testing.T) {
	ps, err := Parse("x", []byte("# comment\n---\n"+strings.Replace(head, ", namespace: ns1", "", 1)+"  egress: [{}]\n---\n\n---\n"+head))
	if err != nil || len(ps) != 2 {
		t.Fatalf("%d policies, %v", len(ps), err)
	}
	if ps[0].Namespace != "default" || len(ps[0].Spec.PolicyTypes) != 2 || len(ps[1].Spec.PolicyTypes) != 1 {
		t.Errorf("defaults: %s %v %v", ps[0].Namespace, ps[0].Spec.PolicyTypes, ps[1].Spec.PolicyTypes)
	}
}

func FuzzParse(f *testing.F) {
	shop, err := os.ReadFile("testdata/shop.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(shop)
	f.Add([]byte(head))
	f.Add([]byte(head + "  egress: [{to: [{ipBlock: {cidr: \"::ffff:1.2.3.4/128\", except: [\"::/0\"]}}], ports: [{port: 1, endPort: 65535}]}]\n"))
	f.Add([]byte("a: &a [*a]\n---\n\t\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ps, err := Parse("f", data)
		if err != nil {
			for _, e := range flatten(err) {
				var fe *FileError
				if !errors.As(e, &fe) || fe.Problem == "" || fe.Remedy == "" {
					t.Fatalf("an error that does not help: %v", e)
				}
			}
			return
		}
		// What parses compiles, and the compiled verdicts are the reference's.
		pod := func(name, app string, a string) Pod {
			return Pod{Namespace: "shop", Name: name, Labels: map[string]string{"app": app}, Addrs: []netip.Addr{netip.MustParseAddr(a)}, Ports: []Port{{Name: "http", Port: 80}}}
		}
		s := State{Node: testNode, Policies: ps, Pods: []Pod{pod("a", "web", "10.42.1.2"), pod("b", "db", "10.42.1.3")}}
		r, err := Compile(s)
		if err != nil {
			t.Fatalf("parses and does not compile: %v", err)
		}
		for _, src := range []string{"10.42.1.2", "10.42.1.3", "192.0.2.1"} {
			for _, dst := range []string{"10.42.1.2", "10.42.1.3", "192.0.2.1"} {
				p := packet{netip.MustParseAddr(src), netip.MustParseAddr(dst), "TCP", 80}
				if want, got := referenceAllows(s, nil, p), r.Allows(Flow{p.src, p.dst, protoTCP, 1, 80}); got != want {
					t.Fatalf("%s > %s: compiled %v, reference %v", src, dst, got, want)
				}
			}
		}
	})
}

func TestParsePods(t *testing.T) {
	inv, err := ParsePods("pods.yaml", []byte(`
namespaces:
- name: shop
  labels: {team: x}
pods:
- {name: web, namespace: shop, labels: {app: web}, addresses: [10.42.1.2], ports: [{name: http, port: 80}]}
- {name: cni-made, labels: {app: db}}
`))
	must(t, err)
	want := Inventory{Namespaces: []Namespace{{"shop", map[string]string{"team": "x"}}}, Pods: []Pod{
		{Namespace: "shop", Name: "web", Labels: map[string]string{"app": "web"}, Addrs: []netip.Addr{netip.MustParseAddr("10.42.1.2")}, Ports: []Port{{Name: "http", Port: 80}}},
		{Namespace: "default", Name: "cni-made", Labels: map[string]string{"app": "db"}}}}
	if !reflect.DeepEqual(inv, want) {
		t.Errorf("got  %+v\nwant %+v", inv, want)
	}
	for text, want := range map[string]string{
		"pods: [{nam: x}]":                                               "unknown field",
		"pods: [{name: X}]":                                              "pods[0]: name: ",
		"pods: [{name: x}, {name: x}]":                                   "pods[1]: name: default/x is there twice",
		"pods: [{name: x, addresses: [10.1.1]}]":                         "pods[0]: addresses[0]: ",
		"pods: [{name: x, labels: {\"a b\": c}}]":                        "pods[0]: labels: ",
		"pods: [{name: x, ports: [{name: http, port: 70000}]}]":          "pods[0]: ports[0].port: ",
		"pods: [{name: x, ports: [{name: h, port: 7, protocol: icmp}]}]": "pods[0]: ports[0].protocol: ",
		"namespaces: [{name: a.b}]":                                      "namespaces[0]: name: ",
	} {
		if _, err := ParsePods("/pods.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "/pods.yaml: ") {
			t.Errorf("%s: error is %v, want %q in it", text, err, want)
		}
	}
}

func FuzzParsePods(f *testing.F) {
	f.Add([]byte("pods: [{name: x, addresses: [10.1.1.1, \"::1%lo\"]}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if inv, err := ParsePods("f", data); err == nil {
			if _, err := Compile(State{Node: testNode, Pods: Merge(inv).Pods}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func write(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.WriteFile(path+".new", []byte(text), 0o644))
	must(t, os.Rename(path+".new", path))
}

func TestDir(t *testing.T) {
	base := t.TempDir()
	at, keep := filepath.Join(base, "policies"), filepath.Join(base, "keep")
	open := func() *Dir {
		d, err := NewDir(at, keep)
		must(t, err)
		return d
	}
	d := open()
	check := func(what string, d *Dir, problem string, want ...string) {
		t.Helper()
		ps, err := d.Load()
		var got []string
		for _, p := range ps {
			got = append(got, key(p))
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v in force, want %v", what, got, want)
		}
		if (err == nil) != (problem == "") || err != nil && !strings.Contains(err.Error(), problem) {
			t.Errorf("%s: error is %v, want %q", what, err, problem)
		}
	}
	check("no directory", d, "")
	must(t, os.Mkdir(at, 0o755))
	check("empty", d, "")
	named := func(n string) string { return strings.Replace(head, "name: p", "name: "+n, 1) }
	write(t, filepath.Join(at, "a.yaml"), named("a"))
	write(t, filepath.Join(at, "b.yml"), named("b"))
	write(t, filepath.Join(at, ".c.yaml"), named("c"))
	write(t, filepath.Join(at, "d.txt"), named("d"))
	check("two files", d, "", "ns1/a", "ns1/b")
	write(t, filepath.Join(at, "a.yaml"), "spec: [")
	check("one broken", d, "a.yaml: ", "ns1/a", "ns1/b")
	check("one broken at start", open(), "a.yaml: ", "ns1/a", "ns1/b")
	write(t, filepath.Join(at, "a.yaml"), named("b"))
	check("twice", d, "b.yml: ns1/b: metadata.name: is in "+filepath.Join(at, "a.yaml"), "ns1/b")
	must(t, os.Remove(filepath.Join(at, "a.yaml")))
	check("one removed", d, "", "ns1/b")
	must(t, os.Rename(at, at+".away"))
	check("directory gone", d, "stay in force", "ns1/b")
	check("directory gone at start", open(), "stay in force", "ns1/b")
	must(t, os.Mkdir(at, 0o755))
	check("emptied", d, "")
	check("emptied, at start", open(), "")
}
