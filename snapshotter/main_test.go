package snapshotter_test

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"lamina/cmd/lamina/cli"
	"lamina/tests/mnt"
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
	os.Exit(mnt.InRuntimeDir(m.Run))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
