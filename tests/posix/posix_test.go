// Package posix runs go-fuse's conformance tests on every combination of Lamina's format, copy-after-write mode and
// passthrough.
package posix

import (
	"os"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

// exceptions are tests that no filesystem passes.
var exceptions = map[string]string{
	"FcntlFlockLocksFile": "expects POSIX locks of one process to exclude each other; go-fuse's own runner leaves it out",
}

func TestMain(m *testing.M) { mnt.Main(m) }

func TestPosix(t *testing.T) {
	lowers := layers.Generate(t)
	for _, c := range mnt.Combinations(t) {
		t.Run(c.String(), func(t *testing.T) {
			m := mnt.Start(t, rival.Config{Lowers: lowers, Options: c.Options()})
			for name, test := range posixtest.All {
				if exceptions[name] != "" {
					continue
				}
				// In an empty directory each, half of them on a path that copy-up made.
				dir := m.Path("d0", name)
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				t.Run(name, func(t *testing.T) { test(t, dir) })
			}
		})
	}
}
