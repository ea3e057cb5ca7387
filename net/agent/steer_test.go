package agent_test

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"lamina/net/lab"
	"lamina/net/lab/cluster"
)

// Steering with the real agent and plugin: pods are steered from their ADD on, with and without the fast path; the agent's
// death interrupts nothing; and off leaves what was there before.
func TestSteering(t *testing.T) {
	c := cluster.New(t, 2, "--fastpath=off", "--steering=on")
	a, b := c.Nodes[0], c.Nodes[1]
	from, to := a.Pod(), b.Pod()
	masks := func() string {
		read := func(n *lab.Node, device string) string {
			return strings.TrimSpace(n.Run("unshare", "-m", "sh", "-ec", "mount -t sysfs sysfs /sys; cat /sys/class/net/"+device+"/queues/rx-0/rps_cpus"))
		}
		return read(b.Node, "lamina0") + " " + read(to.Node, "eth0")
	}
	steering := func() map[string]any {
		s, err := b.Status()
		must(t, err)
		return s.Parts["steering"].(map[string]any)
	}
	restart := func(args ...string) {
		t.Helper()
		b.Kill()
		b.Args = args
		b.Start()
	}
	echo := to.Echo(7000)
	defer echo.Close()
	talks(t, from.Node, to.Addr, echo, from.Addr)
	s := steering()
	if s["state"] != "on" || s["pods"] != 1.0 {
		t.Errorf("%v", s)
	}
	packets := func() float64 {
		sum := 0.0
		for _, n := range steering()["stages"].(map[string]any)["vxlan"].(map[string]any)["reasons"].(map[string]any) {
			sum += n.(float64)
		}
		return sum
	}
	before := packets()
	if before == 0 {
		t.Errorf("nothing was counted: %v", s)
	}
	on := masks()
	if strings.Trim(strings.ReplaceAll(on, ",", ""), "0 ") == "" {
		t.Errorf("masks %s", on)
	}

	conn, err := from.Dial("tcp", netip.AddrPortFrom(to.Addr, 7000))
	must(t, err)
	defer conn.Close()
	must(t, conn.Exchange(1<<16))
	b.Kill()
	must(t, conn.Exchange(1<<16))
	for _, args := range [][]string{{"--fastpath=off", "--steering=on"}, {"--fastpath=on", "--steering=on"}, {"--fastpath=off", "--steering=static"}} {
		b.Args = args
		b.Start()
		must(t, conn.Exchange(1<<16))
		talks(t, from.Node, to.Addr, echo, from.Addr)
		if s := steering(); args[1] == "--steering=on" && (s["state"] != "on" || packets() < before) {
			t.Errorf("%v: %v, %v packets after %v", args, s, packets(), before)
		}
		b.Kill()
	}
	restart("--steering=off")
	if off := masks(); strings.Trim(strings.ReplaceAll(off, ",", ""), "0 ") != "" {
		t.Errorf("off leaves masks %s", off)
	}
	must(t, conn.Exchange(1<<16))
	restart("--steering=auto")
	if state := steering()["state"].(string); (runtime.NumCPU() < 4) != strings.HasPrefix(state, "off: ") {
		t.Errorf("auto on %d CPUs: %s", runtime.NumCPU(), state)
	}
	restart("--steering=on")
	eventually(t, "steering again", func() error {
		if now := masks(); now != on {
			return fmt.Errorf("masks %s, not %s", now, on)
		}
		return nil
	})
	out, err := b.Command("sh", "-c", cluster.Bin(t)+"/lamina net status --socket "+b.Socket()).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "steering") || !strings.Contains(string(out), "handed over") {
		t.Errorf("%v: %s", err, out)
	}
	b.Kill()
	b.Args = []string{"--steering=maybe"}
	if err := b.Launch(); err == nil || !strings.Contains(err.Error(), "auto, on, static or off") {
		t.Error(errors.Join(errors.New("--steering=maybe"), err))
	}
}
