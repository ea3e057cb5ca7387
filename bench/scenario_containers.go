package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"lamina/bench/engine"
	"lamina/bench/report"
)

var containerSmall = Scenario{
	Name:  "container-small",
	Title: "A small container",
	Describes: "busybox true in an image of one small layer and a second one: from asking containerd for the container, its " +
		"snapshot included, until the program's exit is known. Everything is in memory. Its removal is counted by itself: the one unmounts its " +
		"filesystem with the task, the other with the snapshot.",
	Contenders: containerNames, Tools: containerTools,
	Space:  func(Mode) int64 { return gib },
	Weight: 1,
	Run:    func(l *Lab) error { return l.withContainers((*containers).small) },
}

// smallImage fills the two layers of images whose size does not matter.
var smallImage = []func(ctx context.Context, root string) error{skeleton(), func(ctx context.Context, root string) error {
	return engine.Files(ctx, root, "/etc/os-release")
}}

func (b *containers) small() error {
	m := b.Metric(report.Metric{Name: "Prepare to exit", Unit: report.Seconds, LessIsBetter: true})
	removed := b.Metric(report.Metric{Name: "removal, the unmounting included", Unit: report.Seconds, LessIsBetter: true})
	image, err := b.image("small", []string{"true"}, smallImage...)
	if err != nil {
		return err
	}
	round := 0
	return errors.Join(b.Turns(b.Contenders(), starts(Pick(b.Mode(), 5, 15, 30)), func(c *Contender, _ int) error {
		id := b.id()
		began := time.Now()
		box, err := b.Run(b.ctx, engine.Spec{ID: id, Image: image, Snapshotter: c.Name, Args: []string{"/bin/busybox", "true"}})
		if err != nil {
			return err
		}
		if err := box.Exited(b.ctx); err != nil {
			return errors.Join(err, box.Remove(b.ctx))
		}
		took := time.Since(began)
		began = time.Now()
		if err := box.Remove(b.ctx); err != nil {
			return err
		}
		if round++; round > 2*len(b.Contenders()) { // the first ones warm everything up
			m.Add(c, "", seconds(took))
			removed.Add(c, "", seconds(time.Since(began)))
		}
		return nil
	}), b.figure(func() { m.noMoreThanOverlay("x overlayfs's time: busybox true, Prepare to exit", "", 1.1) }))
}

// starts names n starts in a round.
func starts(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("start %d", i+1)
	}
	return names
}

func (b *containers) figure(f func()) error { f(); return nil }

var containerMany = Scenario{
	Name:  "container-many",
	Title: "Many containers of one image at once",
	Describes: "50 containers (10 in a quick run) of the image of two small layers are asked for at the same moment; counted is the time until " +
		"containerd has told of the last one that its program runs. Everything is in memory.",
	Contenders: containerNames, Tools: containerTools,
	Space:  func(Mode) int64 { return gib },
	Weight: 2,
	Run:    func(l *Lab) error { return l.withContainers((*containers).many) },
}

func (b *containers) many() error {
	n := Pick(b.Mode(), 10, 50, 50)
	m := b.Metric(report.Metric{Name: "all up", Unit: report.Seconds, LessIsBetter: true})
	image, err := b.image("many", []string{"true"}, smallImage...)
	if err != nil {
		return err
	}
	return errors.Join(b.Rounds(func(c *Contender) error {
		boxes, errs := make([]*engine.Container, n), make([]error, n)
		all := func(f func(i int) error) error {
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() { errs[i] = f(i) })
			}
			wg.Wait()
			return errors.Join(errs...)
		}
		ids := make([]string, n)
		for i := range ids {
			ids[i] = b.id()
		}
		began := time.Now()
		err := all(func(i int) (err error) {
			boxes[i], err = b.Run(b.ctx, engine.Spec{ID: ids[i], Image: image, Snapshotter: c.Name, Args: []string{"sleep", "1000000"}})
			return err
		})
		if err == nil {
			m.Add(c, "", seconds(time.Since(began)))
		}
		return errors.Join(err, all(func(i int) error {
			if boxes[i] == nil {
				return nil
			}
			return boxes[i].Remove(b.ctx)
		}))
	}), b.figure(func() { m.noMoreThanOverlay(fmt.Sprintf("x overlayfs's time: %d containers at once", n), "", 1.1) }))
}

var containerUnpack = Scenario{
	Name:  "container-unpack",
	Title: "An image is unpacked",
	Describes: "An image of a small root and of Debian packages (git, Perl, MariaDB's server and what they need: thousands of files), not compressed, " +
		"is in containerd's content store and is unpacked into snapshots. Nothing else is on its way to the disk at the start; what is after the end " +
		"is not waited for.",
	Contenders: containerNames, Tools: slices.Concat(containerTools, []Tool{{"git", "git"}, {"mariadbd", "mariadb-server-core"}, {"dpkg-query", "dpkg"}}),
	Space:  func(Mode) int64 { return 3 * gib },
	Weight: 2,
	Run:    func(l *Lab) error { return l.withContainers((*containers).unpack) },
}

func (b *containers) unpack() error {
	m := b.Metric(report.Metric{Name: "unpack", Unit: report.Seconds, LessIsBetter: true})
	all := []string{"git", "perl-base", "coreutils", "libc6", "perl-modules-5.36", "libperl5.36", "mariadb-server-core"}
	packages := Pick(b.Mode(), all[:3], all, all)
	layers, err := b.layers(skeleton(), func(ctx context.Context, root string) error {
		for _, p := range packages {
			if err := engine.Package(ctx, root, p); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return errors.Join(b.Rounds(func(c *Contender) error {
		for range Pick(b.Mode(), 1, 3, 3) {
			image, err := b.Import(b.ctx, "lamina.bench/unpack:1", []string{"true"}, layers...)
			if err != nil {
				return err
			}
			if err := syncfs(b.dir); err != nil {
				return err
			}
			began := time.Now()
			if err := image.Unpack(b.ctx, c.Name); err != nil {
				return err
			}
			m.Add(c, "", seconds(time.Since(began)))
			if err := b.RemoveImage(b.ctx, image.Name()); err != nil {
				return err
			}
		}
		return nil
	}), b.figure(func() { m.noMoreThanOverlay("x overlayfs's time: unpacking an image", "", 1.05) }))
}
