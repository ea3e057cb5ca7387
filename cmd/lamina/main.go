// Command lamina mounts block-accessible overlay filesystems and looks after them.
package main

import (
	"os"

	"lamina/cmd/lamina/cli"
)

func main() { os.Exit(cli.Main(os.Args)) }
