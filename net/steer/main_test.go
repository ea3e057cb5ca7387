package steer

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"lamina/net/fastpath"
	"lamina/net/lab"
	"lamina/tests/probe"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }

var hasTCX = probe.Feature{Name: "TCX", Version: [2]int{6, 6}, Probe: func(string) error { return nil }}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newPins is a directory on a bpffs of the test's own.
func newPins(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	must(t, fastpath.Mount(dir))
	t.Cleanup(func() {
		if _, err := os.Stat(filepath.Join(dir, "lamina")); err == nil {
			t.Error("pins were left behind")
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "lamina", "steer")
}

// The constants of steer.c and those of this package are the same.
func TestConstantsMatchSource(t *testing.T) {
	source, err := os.ReadFile("bpf/steer.c")
	must(t, err)
	enum := func(name, end string, n int, text func(int) string) {
		_, body, _ := strings.Cut(string(source), "enum "+name+" {")
		body, _, found := strings.Cut(body, end)
		if !found {
			t.Fatalf("no enum %s", name)
		}
		entries := regexp.MustCompile(`[A-Z][A-Z_]+,`).FindAllString(body, -1)
		if len(entries) != n {
			t.Errorf("%s: %d in steer.c, %d here", name, len(entries), n)
			return
		}
		for i, e := range entries {
			if strings.ToLower(strings.TrimSuffix(e, ",")) != text(i) {
				t.Errorf("%s %d is %s in steer.c and %s here", name, i, e, text(i))
			}
		}
	}
	enum("reason", "REASONS", int(reasons), func(i int) string { return Reason(i).String() })
	enum("stage", "STAGES", int(stages), func(i int) string { return Stage(i).String() })
	defines := map[string]string{}
	for _, file := range []string{"bpf/steer.c", "../fastpath/bpf/fastpath.h"} {
		f, err := os.Open(file)
		must(t, err)
		for s := bufio.NewScanner(f); s.Scan(); {
			if w := strings.Fields(s.Text()); len(w) > 2 && w[0] == "#define" {
				defines[file+" "+w[1]] = w[2]
			}
		}
		f.Close()
	}
	for name, want := range map[string]string{
		"bpf/steer.c CPUS": "256", "bpf/steer.c FLOWLETS": "8192", "bpf/steer.c NOWHERE": "0xffff", "bpf/steer.c KEEP_OFF": "0x6c61",
		"../fastpath/bpf/fastpath.h KEEP_OFF": "0x6c61",
	} {
		if defines[name] != want {
			t.Errorf("%s is %q, not %s", name, defines[name], want)
		}
	}
}

// The committed objects were made from the committed sources.
func TestGenerated(t *testing.T) {
	out, err := exec.Command("sh", "-c", "cat bpf/steer.c bpf/steer_test.c | sha256sum | cut -d' ' -f1").Output()
	must(t, err)
	want, err := os.ReadFile("bpf/source.sha256")
	must(t, err)
	if string(out) != string(want) {
		t.Error("bpf/*.c have changed: run go generate ./net/steer")
	}
}

func TestMasks(t *testing.T) {
	for mask, cpus := range map[string]cpuSet{
		"0": nil, "1": {0}, "3": {0, 1}, "80000000": {31}, "1,00000000": {32}, "80000001,00000002": {1, 32, 63}, "1,00000000,00000000": {64},
	} {
		if got := cpus.mask(); got != mask {
			t.Errorf("%v: %s, not %s", cpus, got, mask)
		}
		got, err := parseMask(mask + "\n")
		must(t, err)
		if got.mask() != mask {
			t.Errorf("%s: %v, not %v", mask, got, cpus)
		}
	}
	if got, err := parseMask("00000000,00000003\n"); err != nil || got.mask() != "3" {
		t.Errorf("%v %v", got, err)
	}
	if _, err := parseMask("no"); err == nil {
		t.Error("no is a mask")
	}
}

func TestParseSample(t *testing.T) {
	const softnet = `0000ed08 00000000 00000003 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000
0000a26f 00000000 00000001 00000000 00000000 00000000 00000000 00000000 00000000 000001c0 00000000 00000005 00000002 00000004 00000001
`
	const stat = "cpu  30 2 30 400 50 6 7 8 0 0\ncpu0 10 1 10 200 20 3 3 4 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\ncpu2 20 1 20 200 30 3 4 4 0 0\nintr 1 2\n"
	got, err := parseSample([]byte(softnet), []byte(stat))
	must(t, err)
	want := sample{{0, 31, 251, 6, 3, true}, {2, 52, 282, 7, 1, false}}
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("%v, not %v", got, want)
	}
	if now, err := readSample(); err != nil || len(now) == 0 || now[0].total == 0 {
		t.Errorf("%v %v", now, err)
	}
	if _, err := parseSample([]byte("00 00 00\n"), []byte(stat)); err == nil {
		t.Error("three fields are taken for softnet_stat")
	}
}
