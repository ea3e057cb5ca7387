// Command genman writes the manual pages, which are made from the commands and from the table of mount options, into a
// directory: go run ./cmd/lamina/genman man
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"lamina/cmd/lamina/cli"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: genman DIRECTORY")
		os.Exit(2)
	}
	for name, text := range cli.ManPages() {
		if err := os.WriteFile(filepath.Join(os.Args[1], name), []byte(text), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "genman:", err)
			os.Exit(1)
		}
	}
}
