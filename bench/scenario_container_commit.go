package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/engine"
	"lamina/bench/report"
)

var containerCommit = Scenario{
	Name:  "container-commit",
	Title: "A container that changed a little of a big file is committed",
	Describes: "A file of 1 GiB (64 MiB in a quick run) is in the image. A container overwrites 1 % of it, in blocks of 4 KiB at random places, " +
		"syncs it, stops, and its snapshot is committed: Lamina unmounts in the commit, overlayfs before it. Counted are the whole, from the first write until the commit is done; the commit alone; " +
		"the bytes that the committed snapshot takes; and the commit as a complete layer for other hosts, which everybody must read and write in full.",
	Contenders: containerNames, Tools: containerTools,
	Space:  func(m Mode) int64 { return commitSize(m)*8 + gib },
	Weight: 3,
	Run:    func(l *Lab) error { return l.withContainers((*containers).commit) },
}

func commitSize(m Mode) int64 { return Pick[int64](m, 64*mib, gib, gib) }

func (b *containers) commit() error {
	size := commitSize(b.Mode())
	whole := b.Metric(report.Metric{Name: "change and commit", Unit: report.Seconds, LessIsBetter: true, Log: true})
	alone := b.Metric(report.Metric{Name: "the commit alone, the change being on the disk", Unit: report.Seconds, LessIsBetter: true, Log: true})
	change := b.Metric(report.Metric{Name: "of it: blocks overwritten and synced", Unit: report.Seconds, LessIsBetter: true, Aside: true})
	stop := b.Metric(report.Metric{Name: "of it: the container stopped", Unit: report.Seconds, LessIsBetter: true, Aside: true})
	stored := b.Metric(report.Metric{Name: "bytes stored", Unit: report.Bytes, LessIsBetter: true, Log: true})
	export := b.Metric(report.Metric{Name: "a complete layer exported", Unit: report.Seconds, LessIsBetter: true, Aside: true})
	image, err := b.image("commit", []string{"true"}, skeleton(), func(ctx context.Context, root string) error {
		return writeRandom(filepath.Join(root, "big"), size)
	})
	if err != nil {
		return err
	}
	return errors.Join(b.Rounds(func(c *Contender) (err error) {
		ctx, done, err := b.Client.WithLease(b.ctx) // nothing refers to a snapshot of a commit: without it, it is garbage
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done(b.ctx), b.Collect(b.ctx)) }()
		box, err := b.Run(b.ctx, engine.Spec{ID: b.id(), Image: image, Snapshotter: c.Name, Args: []string{"sleep", "1000000"}})
		if err != nil {
			return err
		}
		if err := b.cold(); err != nil {
			return err
		}
		began := time.Now()
		if err := changeHundredth(fmt.Sprintf("/proc/%d/root/big", box.Pid()), size); err != nil {
			return errors.Join(err, box.Remove(b.ctx))
		}
		written := time.Now()
		if err := box.Stop(b.ctx); err != nil {
			return err
		}
		stopped := time.Now()
		sn := b.Client.SnapshotService(c.Name)
		name := box.ID() + "-committed"
		if err := sn.Commit(ctx, name, box.ID()); err != nil {
			return err
		}
		whole.Add(c, "", seconds(time.Since(began)))
		alone.Add(c, "", seconds(time.Since(stopped)))
		change.Add(c, "", seconds(written.Sub(began)))
		stop.Add(c, "", seconds(stopped.Sub(written)))
		usage, err := sn.Usage(b.ctx, name)
		if err != nil {
			return err
		}
		stored.Add(c, "", Sample{Value: float64(usage.Size), Allocated: usage.Size})
		began = time.Now()
		if _, err := b.DiffOf(ctx, c.Name, name); err != nil {
			return err
		}
		export.Add(c, "", seconds(time.Since(began)))
		return errors.Join(box.Delete(b.ctx), sn.Remove(b.ctx, name))
	}), b.figure(func() {
		whole.lessThanOverlay("x less time than overlayfs: 1 % of a file changed and committed", "", 10)
		alone.lessThanOverlay("x less time than overlayfs: the commit alone", "", 10)
		stored.lessThanOverlay("x fewer bytes than overlayfs: stored by the commit", "", 10)
	}))
}

func writeRandom(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	r := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, mib)
	for range size / mib {
		r.Read(buf)
		if _, err := f.Write(buf); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return f.Close()
}

// changeHundredth overwrites 1 % of a file, block by block, and syncs it.
func changeHundredth(path string, size int64) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	const block = 4096
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, block)
	for i, at := range r.Perm(int(size / block))[:size/block/100] {
		buf[0] = byte(i)
		if _, err := unix.Pwrite(fd, buf, int64(at)*block); err != nil {
			return errors.Join(fmt.Errorf("%s: %w", path, err), unix.Close(fd))
		}
	}
	return errors.Join(unix.Fsync(fd), unix.Close(fd))
}
