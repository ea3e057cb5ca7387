package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"

	"lamina/bench/engine"
	"lamina/bench/report"
)

// ContainerScenarios measure what a container's user waits for, under a containerd of their own: each with containerd's
// overlayfs snapshotter and with Lamina's, in turns.
func ContainerScenarios() []Scenario {
	return []Scenario{containerDatabase, containerWeb, containerSmall, containerMany, containerUnpack, containerCommit}
}

// containerContenders are the snapshotters, named as containerd names them.
func containerContenders() []*Contender {
	return []*Contender{
		{Contender: report.Contender{Name: engine.Overlay, Kind: report.Overlay, Describes: "containerd's overlayfs snapshotter: kernel overlayfs"}, ground: mainGround},
		{Contender: report.Contender{Name: engine.Lamina, Kind: report.Lamina, Describes: "lamina snapshotter as it starts by default"}, ground: mainGround},
	}
}

var (
	containerNames = []string{engine.Overlay, engine.Lamina}
	containerTools = []Tool{{"containerd", "containerd"}, {"containerd-shim-runc-v2", "containerd"}, {"runc", "runc"}, {"busybox", "busybox-static"}, {"tar", "tar"}}
)

// RunContainers is [Run] for [ContainerScenarios].
func RunContainers(ctx context.Context, cfg Config) (*report.Run, error) {
	all := ContainerScenarios()
	for _, name := range cfg.Scenarios {
		if !slices.ContainsFunc(all, func(s Scenario) bool { return s.Name == name }) {
			return nil, fmt.Errorf("scenario %s: unknown: bench containers --list names them all", name)
		}
	}
	if len(cfg.Scenarios) > 0 {
		all = slices.DeleteFunc(all, func(s Scenario) bool { return !slices.Contains(cfg.Scenarios, s.Name) })
	}
	for _, name := range cfg.Contenders {
		if !slices.Contains(containerNames, name) {
			return nil, fmt.Errorf("contender %s: unknown: use %s", name, strings.Join(containerNames, " or "))
		}
	}
	if err := checkRights(); err != nil {
		return nil, err
	}
	if cfg.Mode == "" {
		cfg.Mode = Normal
	}
	if cfg.Rounds == 0 {
		cfg.Rounds = Pick(cfg.Mode, 2, 3, 5)
	}
	cfg.find = (*run).findSnapshotters
	return measure(ctx, cfg, all)
}

// findSnapshotters takes those that are wanted, and notes the engine's versions.
func (r *run) findSnapshotters([]Scenario) ([]*Contender, error) {
	if err := findTools(containerTools...); err != nil {
		return nil, err
	}
	for _, name := range []string{"containerd", "runc"} {
		r.result.Machine.Versions = append(r.result.Machine.Versions, report.Version{Name: name, Version: firstLine(r.ctx, name, "--version")})
	}
	present := slices.DeleteFunc(containerContenders(), func(c *Contender) bool {
		return len(r.cfg.Contenders) > 0 && !slices.Contains(r.cfg.Contenders, c.Name)
	})
	for _, c := range present {
		r.result.Contenders = append(r.result.Contenders, c.Contender)
	}
	return present, nil
}

// containers is a lab with an engine.
type containers struct {
	*Lab
	*engine.Engine
	ctx    context.Context // of the engine
	dir    string          // for whatever the scenario needs beside the engine
	serial int
}

// withContainers starts an engine, calls f and takes everything away again. What is left behind is an error.
func (l *Lab) withContainers(f func(b *containers) error) (err error) {
	dir, err := l.place(mainGround, "c")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	other, err := l.place(mainGround, "d")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(other)) }()
	cfg := engine.Config{Dir: dir}
	if l.Contender(engine.Lamina) != nil {
		cfg.Lamina = l.cfg.Lamina
	}
	l.Progress("starting containerd")
	e, err := engine.Start(l.run.ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	return f(&containers{Lab: l, Engine: e, ctx: e.Context(l.run.ctx), dir: other})
}

// id is a new container's.
func (b *containers) id() string {
	b.serial++
	return fmt.Sprintf("c%d", b.serial)
}

// image makes an image of layers, each filled by a function, and unpacks it for everybody.
func (b *containers) image(name string, args []string, fills ...func(ctx context.Context, root string) error) (client.Image, error) {
	layers, err := b.layers(fills...)
	if err != nil {
		return nil, err
	}
	b.Progress("importing the image")
	image, err := b.Import(b.ctx, "lamina.bench/"+name+":1", args, layers...)
	if err != nil {
		return nil, err
	}
	for _, l := range layers { // containerd has them
		if err := os.Remove(l.Path); err != nil {
			return nil, err
		}
	}
	for _, c := range b.Contenders() {
		b.Progress("unpacking the image for %s", c.Name)
		if err := image.Unpack(b.ctx, c.Name); err != nil {
			return nil, err
		}
		if err := b.stands(c, image); err != nil {
			return nil, err
		}
	}
	return image, syncfs(b.dir)
}

// stands runs a container that is not measured, and sees that it stands on what is.
func (b *containers) stands(c *Contender, image client.Image) error {
	box, err := b.Run(b.ctx, engine.Spec{ID: b.id(), Image: image, Snapshotter: c.Name, Args: []string{"sleep", "1000000"}})
	if err != nil {
		return err
	}
	return errors.Join(box.Check(), box.Remove(context.WithoutCancel(b.ctx)))
}

func (b *containers) layers(fills ...func(ctx context.Context, root string) error) ([]engine.Layer, error) {
	var layers []engine.Layer
	for i, fill := range fills {
		b.Progress("making layer %d of the image", i+1)
		root, err := os.MkdirTemp(b.dir, "root.")
		if err != nil {
			return nil, err
		}
		if err := os.Chmod(root, 0o755); err != nil {
			return nil, err
		}
		if err := fill(b.run.ctx, root); err != nil {
			return nil, err
		}
		l, err := engine.Pack(b.run.ctx, root, root+".tar")
		if err := errors.Join(err, os.RemoveAll(root)); err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// cold writes everything out and empties the page cache.
func (b *containers) cold() error { return b.DropCaches() }

// seconds is a sample of time.
func seconds(d time.Duration) Sample { return Sample{Value: d.Seconds(), Took: d} }

// skeleton is a layer that everything runs on.
func skeleton(programs ...string) func(ctx context.Context, root string) error {
	return func(ctx context.Context, root string) error {
		if err := engine.Skeleton(ctx, root); err != nil {
			return err
		}
		return engine.Programs(ctx, root, programs...)
	}
}

// lessThanOverlay adds the figure of Lamina's and overlayfs's medians in a case: at least so many times less.
func (m *Metric) lessThanOverlay(says, caseName string, times float64) {
	m.RatioAtLeast(says, Of{engine.Overlay, caseName}, Of{engine.Lamina, caseName}, times)
}

// noMoreThanOverlay adds the figure of Lamina's median over overlayfs's: at most so much.
func (m *Metric) noMoreThanOverlay(says, caseName string, most float64) {
	m.RatioAtMost(says, Of{engine.Lamina, caseName}, Of{engine.Overlay, caseName}, most)
}

// lookTool is the path of a program that checkNeeds has found.
func lookTool(name string) string {
	path, _ := exec.LookPath(name)
	return path
}
