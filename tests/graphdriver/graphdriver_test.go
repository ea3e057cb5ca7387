// Package graphdriver runs the conformance tests of Podman's, Buildah's and CRI-O's storage library over its overlay driver
// with Lamina as the mount program. Build it with -tags exclude_graphdriver_btrfs, which needs a C library otherwise.
package graphdriver

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	graphdriver "go.podman.io/storage/drivers"
	"go.podman.io/storage/drivers/graphtest"
	_ "go.podman.io/storage/drivers/overlay"
	"go.podman.io/storage/pkg/archive"
	"go.podman.io/storage/pkg/reexec"
)

var (
	lamina = flag.String("lamina", "../../bin/lamina", "the mount program")
	// Each layer is mounted once, over all before it. The library's own limit is 500.
	deep = flag.Int("deep", 40, "layers of the deepest container")
)

func TestMain(m *testing.M) {
	if reexec.Init() {
		return
	}
	flag.Parse()
	// In the process itself, as the driver's own tests have it: a failure can be seen then.
	graphdriver.ApplyUncompressedLayer = archive.ApplyUncompressedLayer
	os.Exit(m.Run())
}

const driver = "overlay"

func TestMountProgram(t *testing.T) {
	program, err := filepath.Abs(*lamina)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: run `make build` first", err)
	}
	run := filepath.Join(t.TempDir(), "run")
	t.Setenv("LAMINA_RUNTIME_DIR", run)
	tests := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"CreateEmpty", func(t *testing.T) { graphtest.DriverTestCreateEmpty(t, driver) }},
		{"CreateBase", func(t *testing.T) { graphtest.DriverTestCreateBase(t, driver) }},
		{"CreateSnap", func(t *testing.T) { graphtest.DriverTestCreateSnap(t, driver) }},
		{"CreateFromTemplate", func(t *testing.T) { graphtest.DriverTestCreateFromTemplate(t, driver) }},
		{"DeepLayerRead", func(t *testing.T) { graphtest.DriverTestDeepLayerRead(t, *deep, driver) }},
		{"DiffApply", func(t *testing.T) { graphtest.DriverTestDiffApply(t, 10, driver) }},
		{"Changes", func(t *testing.T) { graphtest.DriverTestChanges(t, driver) }},
		{"Echo", func(t *testing.T) { graphtest.DriverTestEcho(t, driver) }},
		{"ListLayers", func(t *testing.T) { graphtest.DriverTestListLayers(t, driver) }},
	}
	ran := 0
	for _, test := range tests {
		// A driver and a store of its own for each; the library takes both away at the test's end.
		t.Run(test.name, func(t *testing.T) {
			graphtest.GetDriver(t, driver, "mount_program="+program)
			defer func() {
				if !t.Skipped() {
					ran++
				}
			}()
			test.run(t)
		})
	}
	if ran != len(tests) {
		t.Errorf("%d of %d tests ran", ran, len(tests))
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		left, err := filepath.Glob(run + "/*")
		if err == nil && len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("servers or their logs left: %q %v", left, err)
		}
	}
}
