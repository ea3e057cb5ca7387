package mnt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"lamina/pool"
)

// InRuntimeDir runs a package's tests, which make mounts in their own process, with a runtime directory of their own: they
// see their mounts and no others. Something that is left in it fails the run.
func InRuntimeDir(run func() int) int {
	base, err := os.MkdirTemp("", "lamina-run")
	if err != nil {
		panic(err)
	}
	dir := filepath.Join(base, "run") // Lamina makes it
	if err := os.Setenv(pool.RuntimeDirVariable, dir); err != nil {
		panic(err)
	}
	code := run()
	left, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) || len(left) > 0 {
		fmt.Fprintf(os.Stderr, "left in the runtime directory: %v %v\n", left, err)
		code = 1
	}
	if err := os.RemoveAll(base); err != nil {
		panic(err)
	}
	return code
}
