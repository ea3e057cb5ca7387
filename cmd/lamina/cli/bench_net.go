package cli

import (
	"fmt"

	"lamina/bench"

	"github.com/spf13/cobra"
)

func benchNetCommand() *cobra.Command {
	f := benchFlags{measure: bench.RunNet}
	cmd := &cobra.Command{
		Use:   "net [--quick|--full] [--scenarios NAME[,NAME...]] [--contenders NAME[,NAME...]] [--dir DIR] [--rounds N] [--json] [--html FILE] [--strict] [--list]",
		Short: "measure the pod network beside the hosts' own and VXLAN with a bridge",
		Long: `Makes pairs of hosts out of network namespaces, each pair with a cable of its own, and measures in turns what a program gets
over it: on the hosts themselves, in pods on bridges with VXLAN between them, and in pods of Lamina's network with its fast
path and without. Agents and pods are made by the real programs, so lamina-cni must be beside lamina or where packages put
it. What is printed are medians with their spread, ratios, the part of the packets that took the fast path, and the
project's targets.

It needs root, and the programs ip, bridge and nft; a scenario whose program (ethtool, nginx, wrk, memcached) is missing is
named, and the rest goes on. Nothing of the machine's own network is touched, an agent or CNI that runs on it included; the
namespaces have no names, and go with the run however it ends. Other programs on the machine make the figures worthless:
let it be idle.

What --json has printed is shown in other forms by lamina bench --from.`,
		Example: `  lamina bench net --quick
  lamina bench net --scenarios net-tcp-rr,net-udp-rr --rounds 10
  lamina bench net --full --json >net.json && lamina bench --from net.json --html net.html`,
		Args: optional(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.list {
				out := cmd.OutOrStdout()
				for _, s := range bench.NetScenarios() {
					fmt.Fprintf(out, "%-18s %s\n", s.Name, s.Title)
				}
				fmt.Fprintln(out, "\nContenders:")
				for _, c := range bench.NetContenders() {
					fmt.Fprintf(out, "  %-16s %s\n", c.Name, c.Describes)
				}
				return nil
			}
			return withCode(exitFailure, runBench(cmd.OutOrStdout(), cmd.ErrOrStderr(), &f))
		},
	}
	flags := cmd.Flags()
	f.register(cmd)
	flags.Lookup("dir").Usage = "write below this directory instead of the one for temporary files"
	flags.BoolVar(&f.quick, "quick", false, "short measurements, 3 rounds; meant for 2 minutes, where the default is for 6")
	flags.BoolVar(&f.full, "full", false, "more rounds; meant for 12 minutes")
	flags.StringSliceVar(&f.config.Contenders, "contenders", nil, "only these contenders")
	flags.IntVar(&f.config.Rounds, "rounds", 0, "turns of each contender (default: 5; 3 in a quick run, 9 in a full one)")
	flags.BoolVar(&f.list, "list", false, "list the scenarios and contenders, and measure nothing")
	cmd.MarkFlagsMutuallyExclusive("quick", "full")
	return cmd
}
