package fastpath

import (
	"bufio"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"lamina/net/lab"
	"lamina/net/ns"
	"lamina/tests/probe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

var hasTCX = probe.Feature{Name: "TCX", Version: [2]int{6, 6}, Probe: func(string) error {
	return supported()
}}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newNS makes a network namespace that ends with the test.
func newNS(t testing.TB) netns.NsHandle {
	t.Helper()
	return lab.NewNode(t, "fp").NS
}

// newBPFFS mounts a bpffs of the test's own.
func newBPFFS(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for range 2 { // once is enough
		if err := Mount(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if _, err := os.Stat(filepath.Join(dir, "lamina")); err == nil {
			t.Error("pins were left behind")
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "lamina")
}

// in runs f in a namespace.
func in(t testing.TB, h netns.NsHandle, f func() error) {
	t.Helper()
	if err := ns.Do(h, f); err != nil {
		t.Fatal(err)
	}
}

// run runs a command in a namespace; $name words are not expanded.
func run(t testing.TB, h netns.NsHandle, command string) string {
	t.Helper()
	var out []byte
	err := ns.Do(h, func() (err error) {
		out, err = exec.Command("sh", "-c", command).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return string(out)
}

func mustLink(t testing.TB, h netns.NsHandle, name string) netlink.Link {
	t.Helper()
	var l netlink.Link
	in(t, h, func() (err error) { l, err = netlink.LinkByName(name); return err })
	return l
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// The constants of fastpath.h and those of this package are the same.
func TestReasonsMatchHeader(t *testing.T) {
	f, err := os.Open("bpf/fastpath.h")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	norm := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "_", "") }
	entry := regexp.MustCompile(`^\t([A-Z_0-9]+),`)
	inside, n := false, 0
	for s := bufio.NewScanner(f); s.Scan(); {
		switch m := entry.FindStringSubmatch(s.Text()); {
		case s.Text() == "enum reason {":
			inside = true
		case inside && m != nil && m[1] == "REASONS":
			if n != int(reasons) {
				t.Errorf("%d reasons in fastpath.h, %d here", n, reasons)
			}
			return
		case inside && m != nil:
			if norm(m[1]) != norm(Reason(n).String()) {
				t.Errorf("reason %d is %s in fastpath.h and %s here", n, m[1], Reason(n))
			}
			n++
		}
	}
	t.Error("no end of the reasons in fastpath.h")
}

// The committed objects were made from the committed sources.
func TestGenerated(t *testing.T) {
	out, err := exec.Command("sh", "-c", "cat bpf/fastpath.h bpf/fastpath.c | sha256sum | cut -d' ' -f1").Output()
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("bpf/source.sha256")
	if err != nil {
		t.Fatal(err)
	}
	if string(out) != string(want) {
		t.Error("bpf/*.[ch] have changed: run go generate ./net/fastpath")
	}
}
