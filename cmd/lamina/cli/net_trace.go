package cli

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"lamina/net/control"

	"github.com/spf13/cobra"
)

func netTraceCommand() *cobra.Command {
	var asJSON bool
	var socket string
	cmd := &cobra.Command{
		Use:   "trace [--json] [--socket SOCKET] [FLOW]",
		Short: "say why a flow takes the fast path or does not",
		Long: `FLOW is two ends and a protocol, such as 10.42.1.5:4711-10.42.2.7:80/tcp, or in words of their own: 10.42.1.5 4711 10.42.2.7
80 tcp. It does not matter which end comes first; one has to be a pod of this node. Addresses are those between pods, after
translation: a service's pod, not the service.

Of a flow that is named in full it shows what a packet meets, step by step: route, conntrack, policies with the rule that
allows, and the maps of the fast path with what they hold, up to the condition that fails, and what helps. It describes an
ordinary packet: SYN, FIN, RST, fragments and what is too large always take the ordinary path.

What is left out, or *, fits everything: the flows that fit and that conntrack or the caches know are listed with what
becomes of their packets.

The exit status is 0 if packets of both directions take the fast path or flows were listed, and 1 if not.`,
		Example: `  lamina net trace 10.42.1.5:4711-10.42.2.7:80/tcp
  lamina net trace 10.42.1.5
  lamina net trace '*:*-10.42.2.7:80/tcp' --json | jq -r '.flows[] | select(.out != "hit") | .out'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := control.ParseFlow(strings.Join(args, " "))
			if err != nil {
				return withCode(exitTrouble, err)
			}
			c := control.NewClient(socket)
			defer c.Close()
			t, err := c.Trace(f)
			if err != nil {
				return withCode(exitTrouble, err)
			}
			show := printTrace
			if asJSON {
				show = func(w io.Writer, t *control.Trace) error { return printJSON(w, t) }
			}
			if err := show(cmd.OutOrStdout(), &t); err != nil {
				return err
			}
			if t.Out != nil && t.In != nil && !(t.Out.Hit && t.In.Hit) {
				return &exitError{exitFindings, nil}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&socket, "socket", control.Socket, "the agent's socket")
	return cmd
}

func printTrace(w io.Writer, t *control.Trace) error {
	if !t.Flow.Whole() {
		return printFlows(w, t)
	}
	fmt.Fprintf(w, "%s\n\n", t.Flow)
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "STEP\t\tFOUND")
	for _, s := range t.Steps {
		fmt.Fprintf(tab, "%s\t%s\t%s\n", s.Name, s.Result, s.Found)
		if s.Fix != "" {
			fmt.Fprintf(tab, "\t\thelps: %s\n", s.Fix)
		}
	}
	for _, side := range []struct {
		name string
		v    *control.Verdict
	}{{"packets out", t.Out}, {"packets in", t.In}} {
		if v := side.v; v != nil && v.Hit {
			fmt.Fprintf(tab, "%s\thit\t%s\n", side.name, v.Text)
		} else if v != nil {
			fmt.Fprintf(tab, "%s\tmiss\t%s: %s\n", side.name, v.Reason, v.Text)
		}
	}
	return tab.Flush()
}

func printFlows(w io.Writer, t *control.Trace) error {
	for _, s := range t.Steps {
		fmt.Fprintf(w, "%s: %s\n", s.Name, s.Found)
	}
	if len(t.Flows) == 0 {
		_, err := fmt.Fprintln(w, "no flow that fits is known")
		return err
	}
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "FLOW\tCACHED\tOUT\tIN\tCONNTRACK")
	for i := range t.Flows {
		f := &t.Flows[i]
		cached, conn := "no", "-"
		if f.Cached {
			cached = "yes"
		}
		if f.Connection != nil {
			conn = f.Connection.String()
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\t%s\t%s\n", f.Flow, cached, f.Out, f.In, conn)
	}
	if t.More > 0 {
		fmt.Fprintf(tab, "and %d more: narrow it down\n", t.More)
	}
	return tab.Flush()
}
