package control

import (
	"net/netip"
	"strings"
	"testing"
)

func TestParseFlow(t *testing.T) {
	end := netip.MustParseAddrPort
	any := func(addr string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(addr), 0) }
	whole := Flow{"tcp", end("10.42.1.5:4711"), end("10.42.2.7:80")}
	for text, want := range map[string]Flow{
		"10.42.1.5:4711-10.42.2.7:80/tcp":        whole,
		"10.42.1.5 4711 10.42.2.7 80 tcp":        whole,
		"tcp 10.42.1.5:4711 -> 10.42.2.7:80":     whole,
		"10.42.1.5:4711>10.42.2.7:80/TCP":        whole,
		"::ffff:10.42.1.5 4711 10.42.2.7:80 tcp": whole,
		"[fd00::1]:4711-[fd00::2]:80/udp":        {"udp", end("[fd00::1]:4711"), end("[fd00::2]:80")},
		"fd00::1 4711 fd00::2 80 udp":            {"udp", end("[fd00::1]:4711"), end("[fd00::2]:80")},
		"10.42.1.5":                              {Src: any("10.42.1.5")},
		"10.42.1.5:*-10.42.2.7:80":               {Src: any("10.42.1.5"), Dst: end("10.42.2.7:80")},
		"10.42.1.5 * 10.42.2.7 80":               {Src: any("10.42.1.5"), Dst: end("10.42.2.7:80")},
		"*-10.42.2.7:80/tcp":                     {Protocol: "tcp", Dst: end("10.42.2.7:80")},
		"*:* *:80":                               {Dst: netip.AddrPortFrom(netip.Addr{}, 80)},
		"udp":                                    {Protocol: "udp"},
		"":                                       {},
		"10.42.1.5 10.42.2.7":                    {Src: any("10.42.1.5"), Dst: any("10.42.2.7")},
	} {
		got, err := ParseFlow(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v %v", text, got, err)
		}
		if again, err := ParseFlow(got.String()); err != nil || again != want {
			t.Errorf("%q became %q: %+v %v", text, got, again, err)
		}
	}
	for _, text := range []string{"web", "10.42.1.5:x", "10.42.1.5:", "10.42.1.5:70000", "10.42.1.5 70000", "10.42.1 80", "1.1.1.1 2.2.2.2 3.3.3.3", "80", "1.1.1.1:80 81 82", "1.1.1.1-2.2.2.2/icmp"} {
		if f, err := ParseFlow(text); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%q is %+v, %v", text, f, err)
		}
	}
	if !whole.Whole() || (Flow{Protocol: "tcp", Src: whole.Src, Dst: any("10.42.2.7")}).Whole() {
		t.Error("what is whole")
	}
	for text, fits := range map[string]bool{"10.42.1.5": true, "10.42.2.7:80": true, "10.42.2.7 10.42.1.5": true, "*:*-10.42.2.7:80/udp": false,
		"10.42.1.5:80": false, "": true, "10.42.9.9": false} {
		if f, err := ParseFlow(text); err != nil || f.Fits(whole) != fits {
			t.Errorf("%q fits: %v, not %v (%v)", text, !fits, fits, err)
		}
	}
}

func FuzzParseFlow(f *testing.F) {
	f.Add("10.42.1.5:4711-10.42.2.7:80/tcp")
	f.Add("[fd00::1%eth0]:1 -> * * udp")
	f.Fuzz(func(t *testing.T, s string) {
		if flow, err := ParseFlow(s); err == nil {
			if again, err := ParseFlow(flow.String()); err != nil || again != flow {
				t.Errorf("%q became %q: %+v, %v, not %+v", s, flow, again, err, flow)
			}
		}
	})
}
