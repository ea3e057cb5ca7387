package bench

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"lamina/bench/report"
	"lamina/bench/rival"
)

var build = Scenario{
	Name:  "build",
	Title: "Compiling a program in the container",
	Describes: "A lower layer holds a whole Go distribution, as the image golang does: compiler, linker, and the sources of a program " +
		"and of everything that it imports. The compiler runs from there, with its cache and temporary files in the same " +
		"mount; it asks no network. Once with an empty cache, and once more after a line was added to a file that it had compiled.",
	Contenders: []string{"plain", "overlayfs", "fuse-overlayfs", "lamina", "floor"},
	Quick:      []string{"plain", "overlayfs", "lamina"},
	Tools:      []Tool{{"go", "golang-go"}},
	Space:      func(Mode) int64 { return 2 * gib },
	Weight:     200,
	Run:        runBuild,
}

// What is compiled, and the file that is changed then.
type buildTarget struct{ pkg, changed string }

func runBuild(l *Lab) error {
	// The smallest imports nothing; for the small one the runtime is most of what is compiled: seconds, not a minute.
	smallest := buildTarget{"unicode", "src/unicode/letter.go"}
	small := buildTarget{"errors", "src/errors/wrap.go"}
	program := buildTarget{"cmd/gofmt", "src/go/printer/nodes.go"}
	target := Pick(l.Mode(), smallest, small, program)
	layer := l.Layer("goroot", wholeGo)
	took := l.Metric(report.Metric{Name: "time to compile " + target.pkg, Unit: report.Seconds, LessIsBetter: true})
	err := l.Rounds(func(c *Contender) error {
		if err := layer.Warm(c); err != nil {
			return err
		}
		return l.On(c, Setup{Layer: layer, Fresh: true}, func(u *Union) error { return compileTwice(u, target, took) })
	})
	return errors.Join(err, l.Drop(layer))
}

func compileTwice(u *Union, t buildTarget, took *Metric) error {
	compile := func() error { return compileIn(u.lab.ctx, u.Dir, t.pkg) }
	if err := u.steps(took, operation{"empty cache", compile}); err != nil {
		return err
	}
	if err := appendTo(u.Path(filepath.Join("go", t.changed)), "\nvar _ = 0 // another line\n"); err != nil {
		return err
	}
	return u.steps(took, operation{"one file changed", compile})
}

// wholeGo copies the Go distribution below dir. Debian's is one of links to elsewhere: they are followed.
func wholeGo(ctx context.Context, dir string) error {
	root, err := goRoot(ctx)
	if err != nil {
		return err
	}
	to := filepath.Join(dir, "go")
	for _, step := range [][]string{{"cp", "-rL", "--preserve=mode,timestamps", root, to}, {"chmod", "-R", "u+w", to}} {
		if _, err := rival.Run(ctx, step[0], step[1:]...); err != nil {
			return err
		}
	}
	return errors.Join(os.Mkdir(filepath.Join(dir, "cache"), 0o755), os.Mkdir(filepath.Join(dir, "tmp"), 0o755))
}

// compileIn runs the compiler below root, with nothing of the user's own configuration. It can reach no network.
func compileIn(ctx context.Context, root, pkg string) error {
	goroot := filepath.Join(root, "go")
	_, err := rival.Run(ctx, "env", "-i",
		"PATH=/usr/bin:/bin", "HOME="+root, "GOROOT="+goroot, "GOCACHE="+filepath.Join(root, "cache"), "GOTMPDIR="+filepath.Join(root, "tmp"),
		"GOPATH="+filepath.Join(root, "gopath"), "GOENV=off", "GOTOOLCHAIN=local", "GOTELEMETRY=off", "GOPROXY=off", "GOFLAGS=-buildvcs=false",
		"CGO_ENABLED=0", // a C compiler would be another, of the host
		filepath.Join(goroot, "bin", "go"), "build", "-C", filepath.Join(goroot, "src"), "-o", filepath.Join(root, "program"), pkg)
	return err
}
