package metrics

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/fusefs"
	"lamina/inventory"
	"lamina/metrics/exporter/exportertest"
	"lamina/pool"
)

func sample() []inventory.Mount {
	st := pool.Status{Mountpoint: "/c1/merged", Device: "0:52", PID: os.Getpid(), Version: "v1", Started: time.Unix(1_700_000_000, 5e8), Transport: "dev",
		TransportReason: "old kernel", Passthrough: "auto", Format: "sparse", Sketches: 3, Blocks: pool.Blocks{Lower: 7, InTransit: 2, Upper: 5},
		Queue: 1, BytesNotCopied: 1 << 30, BytesCopied: 4096, Errors: 2, Damaged: 1, OpenFiles: 9,
		FUSE: fusefs.Status{Requests: map[string]uint64{"read": 11, "write": 12}, BytesRead: 100, BytesWritten: 200}}
	other := st
	other.Device, other.Mountpoint = "0:53", "/bad\xff name\n\"quoted\""
	return []inventory.Mount{{Status: st, Container: &inventory.Container{Engine: "containerd", Namespace: "k8s.io", ID: "abc"}}, {Status: other}, {Status: other}}
}

func TestExporter(t *testing.T) {
	var failed error
	c := New("v2", func(err error) { failed = err })
	answer, trouble := sample(), error(nil)
	c.Mounts = func() ([]inventory.Mount, error) { return answer, trouble }
	socket := filepath.Join(t.TempDir(), "s")
	for _, address := range []string{"127.0.0.1:0", "unix:" + socket} {
		t.Run(address, func(t *testing.T) {
			answer, trouble = sample(), nil
			scrape := exportertest.Serve(t, address, c)
			families, text := scrape()
			exportertest.Shown(t, families, All)
			for _, want := range []string{
				`lamina_mount_info{container="abc",device="0:52",engine="containerd",format="sparse",mountpoint="/c1/merged",name="",namespace="k8s.io",passthrough="auto",pid="`,
				`lamina_requests_total{device="0:52",mountpoint="/c1/merged",op="read"} 11`,
				`lamina_blocks{device="0:52",mountpoint="/c1/merged",state="in_transit"} 2`,
				`lamina_mount_degraded{device="0:52",mountpoint="/c1/merged",what="transport"} 1`,
				`lamina_mount_degraded{device="0:52",mountpoint="/c1/merged",what="passthrough"} 0`,
				`lamina_not_copied_bytes{device="0:52",mountpoint="/c1/merged"} 1.073741824e+09`,
				`lamina_mount_start_time_seconds{device="0:52",mountpoint="/c1/merged"} 1.7000000005e+09`,
				"process_open_fds ", "go_goroutines ", "lamina_gather_failed 0",
			} {
				if !strings.Contains(text, want) {
					t.Errorf("missing: %s", want)
				}
			}
			// One mount is gone, and one server does not answer.
			answer, trouble = answer[:1], errors.New("a server does not answer")
			families, _ = scrape()
			if n := len(families["lamina_sketches"].Metric); n != 1 {
				t.Errorf("%d mounts are shown", n)
			}
			if families["lamina_gather_failed"].Metric[0].GetGauge().GetValue() != 1 || failed == nil {
				t.Errorf("the failure is not told: %v", failed)
			}
		})
	}
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestDocumentation(t *testing.T) {
	exportertest.Documentation(t, "../docs/operations.md", All)
}

// The dashboard's queries use metrics that the exporter shows, with labels that they have.
func TestDashboard(t *testing.T) {
	c := New("v", func(error) {})
	c.Mounts = func() ([]inventory.Mount, error) { return sample(), nil }
	shown, _ := exportertest.Serve(t, "127.0.0.1:0", c)()
	exportertest.Dashboard(t, "../deploy/grafana/lamina.json", shown, All, "lamina_build_info", "lamina_mount_start_time_seconds")
}
