package bench

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/bench/rival"
)

// netConfig is a short run in a directory of its own. What it leaves behind fails the test.
func netConfig(t *testing.T, scenarios ...string) Config {
	t.Helper()
	lamina, err := rival.BinaryPath()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Cleanup(func() {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
		if out, err := exec.Command("pgrep", "-af", dir).Output(); err == nil {
			t.Errorf("still running: %s", out)
		}
	})
	return Config{Lamina: lamina, Dir: dir, Mode: Quick, Rounds: 1, Scenarios: scenarios}
}

// Every contender carries every kind of traffic, and most packets of Lamina's take the fast path where there is one.
func TestNet(t *testing.T) {
	cfg := netConfig(t, "net-udp-silent", "net-tcp-crr", "net-memcached", "net-cni")
	var installed []string
	for _, s := range NetScenarios() {
		for _, name := range cfg.Scenarios {
			if s.Name == name && findTools(s.Tools...) == nil {
				installed = append(installed, name)
			}
		}
	}
	if len(installed) < 3 {
		t.Fatalf("only %v can be measured: install iproute2 and nftables", installed)
	}
	cfg.Scenarios = installed
	run, err := RunNet(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if len(run.Failed)+len(run.Absent) > 0 || len(run.Scenarios) != len(installed) || len(run.Contenders) != len(netContenders) {
		t.Fatalf("%d scenarios of %v; failed: %+v; absent: %+v", len(run.Scenarios), installed, run.Failed, run.Absent)
	}
	for _, s := range run.Scenarios {
		if len(s.Metrics) == 0 {
			t.Errorf("%s has no metrics", s.Name)
		}
		for _, m := range s.Metrics {
			for _, c := range m.Cells {
				least := 0.0
				if m.Unit == "%" && s.Name != "net-tcp-crr" {
					least = 90
				}
				if c.Median <= least {
					t.Errorf("%s, %s: %+v", s.Name, m.Name, c)
				}
			}
		}
		if s.Name == "net-udp-silent" && (len(s.Metrics) != 3 || len(s.Metrics[0].Cells) != len(netContenders) || len(s.Metrics[2].Cells) != 4) {
			t.Errorf("metrics of %s: %+v", s.Name, s.Metrics)
		}
	}
}

// A run that is interrupted leaves nothing, and says so; what cannot be measured is named.
func TestNetInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cfg := netConfig(t, "net-tcp-rr")
	cfg.Rounds = 1000
	time.AfterFunc(2*time.Second, cancel)
	if _, err := RunNet(ctx, cfg); !errors.Is(err, context.Canceled) {
		t.Errorf("an interrupted run: %v", err)
	}
}

func TestNetRefusals(t *testing.T) {
	cfg := netConfig(t, "metadata")
	if _, err := RunNet(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "metadata") {
		t.Errorf("a scenario of others: %v", err)
	}
	cfg.Scenarios, cfg.Contenders = []string{"net-tcp-rr"}, []string{"plain"}
	if _, err := RunNet(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "plain") {
		t.Errorf("a contender of others: %v", err)
	}
	// A lamina whose agents do not start.
	broken := filepath.Join(t.TempDir(), "lamina")
	if err := os.WriteFile(broken, []byte("#!/bin/sh\necho it is broken\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(broken), "lamina-cni"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	cfg.Lamina, cfg.Contenders = broken, []string{"host", "lamina"}
	run, err := RunNet(t.Context(), cfg)
	if err != nil || len(run.Absent) != 1 || !strings.Contains(run.Absent[0].Why, "it is broken") || len(run.Failed) > 0 {
		t.Errorf("without agents: %+v %v", run, err)
	}
}
