package snapshotter_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"lamina/cmd/lamina/cli"
	"lamina/pool"
)

// TestMain is also the program under test: run under its name it is lamina, and a pool server is this program again.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "lamina" {
		os.Exit(cli.Main(os.Args))
	}
	if v, ok := os.LookupEnv(victimEnv); ok {
		os.Exit(victim(v))
	}
	flag.Parse()
	dir, err := os.MkdirTemp("", "lamina-snapshotter")
	if err != nil {
		panic(err)
	}
	run := dir + "/run"
	if err := os.Setenv(pool.RuntimeDirVariable, run); err != nil {
		panic(err)
	}
	code := m.Run()
	left, err := os.ReadDir(run)
	if err != nil && !errors.Is(err, os.ErrNotExist) || len(left) > 0 {
		fmt.Fprintf(os.Stderr, "left in the runtime directory: %v %v\n", left, err)
		code = 1
	}
	if err := os.RemoveAll(dir); err != nil {
		panic(err)
	}
	os.Exit(code)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
