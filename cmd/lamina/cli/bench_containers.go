package cli

import (
	"fmt"

	"lamina/bench"

	"github.com/spf13/cobra"
)

func containersCommand() *cobra.Command {
	f := benchFlags{measure: bench.RunContainers}
	cmd := &cobra.Command{
		Use:   "containers [--quick|--full] [--scenarios NAME[,NAME...]] [--contenders NAME[,NAME...]] [--dir DIR] [--filesystem TYPE] [--rounds N] [--json] [--html FILE] [--strict] [--list]",
		Short: "measure containers on this program beside containerd's overlayfs snapshotter",
		Long: `Starts a containerd of its own, with its own root, state and socket, and measures in turns what a user of containers waits
for: with containerd's overlayfs snapshotter, and with Lamina's. Images are made on the spot. What is printed are medians
with their spread, ratios, and the project's targets.

It needs root, and containerd and runc in PATH. A containerd that runs already is left alone. Everything happens in a
directory of its own below DIR; a container, mount or process that is left behind is removed and reported as a failure.`,
		Example: `  lamina bench containers --quick
  lamina bench containers --scenarios container-small,container-many --html containers.html`,
		Args: optional(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.list {
				for _, s := range bench.ContainerScenarios() {
					fmt.Fprintf(cmd.OutOrStdout(), "%-18s %s\n", s.Name, s.Title)
				}
				return nil
			}
			return withCode(exitFailure, runBench(cmd.OutOrStdout(), cmd.ErrOrStderr(), &f))
		},
	}
	flags := cmd.Flags()
	f.register(cmd)
	f.registerFilesystem(cmd)
	flags.BoolVar(&f.quick, "quick", false, "small files, few repetitions")
	flags.BoolVar(&f.full, "full", false, "more repetitions than the default")
	flags.StringSliceVar(&f.config.Contenders, "contenders", nil, "only this snapshotter: overlayfs or lamina")
	flags.IntVar(&f.config.Rounds, "rounds", 0, "turns of each snapshotter (default: 3; 2 in a quick run, 5 in a full one)")
	flags.BoolVar(&f.list, "list", false, "list the scenarios, and measure nothing")
	cmd.MarkFlagsMutuallyExclusive("quick", "full")
	return cmd
}
