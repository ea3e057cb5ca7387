package cli

import (
	"lamina/net/control"
	nettop "lamina/net/top"

	"github.com/spf13/cobra"
)

func netTopCommand() *cobra.Command {
	var f liveFlags
	var socket string
	cmd := &cobra.Command{
		Use:   "top [--once] [--json] [--interval DURATION] [--socket SOCKET]",
		Short: "show live what the pod network does",
		Long: `Shows how many packets go between the pods of this node and those of other nodes, how many of them take the fast path, why
the others do not, what the caches learn, how received packets are spread over CPUs, what policies drop, and what the agent
repaired. Rates are those of the last interval.

In a terminal q quits and ? lists the keys. Where standard output is no terminal a table is printed every interval, and with
--json an object a line. With --once one interval is measured and printed.`,
		Example: `  lamina net top
  lamina net top --once --json --interval 10s | jq .out.hit_ratio`,
		Args: optional(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client := control.NewClient(socket)
			defer client.Close()
			return withCode(exitFailure, showLive(cmd, f, &nettop.View{Status: client.Status}))
		},
	}
	f.add(cmd.Flags())
	cmd.Flags().StringVar(&socket, "socket", control.Socket, "the agent's socket")
	return cmd
}
