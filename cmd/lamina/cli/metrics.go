package cli

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"

	"lamina/metrics"
	"lamina/metrics/exporter"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// defaultMetricsAddress is not to be reached from other machines.
const defaultMetricsAddress = "127.0.0.1:9809"

func metricsCommand() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "metrics [--listen ADDRESS]",
		Short: "show all mounts to Prometheus",
		Long: `Answers Prometheus at /metrics on ADDRESS, which is HOST:PORT, or unix:PATH for a socket that only its owner may use. Every
request asks the servers of all mounts of this user through their control sockets, so one target a machine is enough, and
the process needs no privileges but the right to use those sockets.

With ADDRESS - it prints the metrics once, for a textfile collector.`,
		Example: `  lamina metrics --listen 127.0.0.1:9809
  lamina metrics --listen unix:/run/lamina/metrics
  lamina metrics --listen - > /var/lib/prometheus/node-exporter/lamina.prom`,
		Args: optional(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return withCode(exitFailure, showMetrics(cmd, listen)) },
	}
	cmd.Flags().StringVar(&listen, "listen", defaultMetricsAddress, "where to answer")
	return cmd
}

func showMetrics(cmd *cobra.Command, address string) error {
	if address == "-" {
		var failed error
		c := metrics.New(Version(), func(err error) { failed = err })
		reg := prometheus.NewPedanticRegistry()
		if err := reg.Register(c); err != nil {
			return err
		}
		families, err := reg.Gather()
		if err != nil {
			return err
		}
		for _, f := range families {
			if _, err := expfmt.MetricFamilyToText(cmd.OutOrStdout(), f); err != nil {
				return err
			}
		}
		return failed
	}
	l, err := exporter.Listen(address)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	complaints := newComplaints()
	return exporter.Serve(ctx, l, exporter.Handler(metrics.New(Version(), complaints.say), "all mounts", complaints.say))
}

// complaints writes what goes wrong, once until something else does: the same server may fail at every scrape.
type complaints struct {
	mu   sync.Mutex
	last string
}

func newComplaints() *complaints { return &complaints{} }

func (c *complaints) say(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if msg := oneLine(err); msg != c.last {
		c.last = msg
		fmt.Fprintln(os.Stderr, "lamina: "+strings.TrimSpace(msg))
	}
}
