package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
)

var transportTable = Scenario{
	Name:  "transport",
	Title: "Every operation, over io_uring and over /dev/fuse",
	Describes: "The same server, its requests carried by io_uring and by /dev/fuse. The time of one operation, each done many " +
		"times on a fresh mount. What the kernel answers from its caches is not there: it costs the same on both. Processes " +
		"move between CPUs as the scheduler likes.",
	Contenders: []string{"lamina-uring", "lamina-dev"},
	Space: func(m Mode) int64 {
		return 2*(streamSize(m)+sketchSize) + (transportDirs*transportFiles)*8*kib + 256*mib
	},
	Weight: 40,
	Run:    runTransport,
}

const (
	transportDirs  = 40
	transportFiles = 50       // in each directory, 1 KiB each
	sketchSize     = 32 * mib // of the file that small writes go to
	pairs          = 4        // threads of the parallel operations
)

// streamSize is that of the file that is read and written from end to end.
func streamSize(m Mode) int64 { return Pick[int64](m, 64*mib, 128*mib, 256*mib) }

// transportOp is one row of the table. do does it n times; it leaves behind what later rows build on.
type transportOp struct {
	name string
	n    int
	do   func(u *Union, n int) error
}

// transportOps in the order in which they are done: what looks at names for the first time comes first.
func transportOps(m Mode) []transportOp {
	const all = transportDirs * transportFiles
	few := Pick(m, 1000, 2000, 4000)
	stream := int(streamSize(m) / mib)
	return []transportOp{
		{"stat, name not known yet", all / 2, statNew},
		{"readdir of 50 names, not known yet", transportDirs / 2, readdirNew},
		{"open + write + close of a sketch", few, openWriteClose},
		{"the same, 4 threads", few, inParallel(openWriteClose)},
		{"open + close, reading", few, openCloses},
		{"getxattr", few, getxattrs},
		{"statfs", few, statfses},
		{"read 4 KiB, direct", few, directReads},
		{"the same, 4 threads", few, inParallel(directReads)},
		{"write 4 KiB, open sketch", few, sketchWrites},
		{"chmod", all / 4, chmods},
		{"create + close", few, creates},
		{"rename", few, renames},
		{"unlink", few, unlinks},
		{"mkdir + rmdir", few / 2, mkdirs},
		{"truncate", few, truncates},
		{"fsync of 4 KiB", 30, fsyncs},
		{"read 1 MiB, sequential", stream, streamRead},
		{"read 1 MiB, direct", stream, streamDirect},
		{"write 1 MiB, sequential", stream, streamWrite},
	}
}

func runTransport(l *Lab) error {
	layer := l.Layer("transport", func(ctx context.Context, dir string) error { return transportLayer(ctx, dir, l.Mode()) })
	ops := transportOps(l.Mode())
	for i := range ops { // names of rows are unique
		if ops[i].name == "the same, 4 threads" {
			ops[i].name = ops[i-1].name + ", 4 threads"
		}
	}
	perOp := l.Metric(report.Metric{Name: "an operation", Unit: report.Microseconds, LessIsBetter: true, Log: true})
	err := l.Rounds(func(c *Contender) error {
		if err := layer.Warm(c); err != nil {
			return err
		}
		return l.On(c, Setup{Layer: layer}, func(u *Union) error {
			for _, op := range ops {
				l.Progress("%s", op.name)
				if err := syncfs(u.Upper); err != nil { // an fsync would have to write out what earlier rows left
					return err
				}
				s, err := u.Time(func() error { return op.do(u, op.n) })
				if err != nil {
					return fmt.Errorf("%s: %w", op.name, err)
				}
				perOp.Add(c, op.name, s.Per(op.n))
			}
			return nil
		})
	})
	if err == nil {
		transportFigures(perOp, ops)
	}
	return errors.Join(err, l.Drop(layer))
}

func transportFigures(perOp *Metric, ops []transportOp) {
	const uring, dev = "lamina-uring", "lamina-dev"
	speedup := func(op string) (float64, bool) {
		u, ok1 := perOp.Median(uring, op)
		d, ok2 := perOp.Median(dev, op)
		return d / u, ok1 && ok2 && u > 0
	}
	worst, at := 0.0, ""
	for _, op := range ops {
		if s, ok := speedup(op.name); ok && (at == "" || s < worst) {
			worst, at = s, op.name
		}
	}
	if at == "" {
		return
	}
	for _, f := range []struct {
		op     string
		target float64
	}{{"open + write + close of a sketch", 2}, {"stat, name not known yet", 1.8}} {
		if s, ok := speedup(f.op); ok {
			perOp.Figure(report.AtLeast("x faster than /dev/fuse: "+f.op, s, f.target))
		}
	}
	perOp.Figure(report.AtLeast("x /dev/fuse's speed at the worst operation ("+at+")", worst, 0.9))
}

func transportLayer(ctx context.Context, dir string, m Mode) error {
	for d := range transportDirs {
		if err := os.Mkdir(filepath.Join(dir, transportDir(d)), 0o755); err != nil {
			return err
		}
		for i := range transportFiles {
			if err := fillFile(ctx, filepath.Join(dir, transportFile(d*transportFiles+i)), kib); err != nil {
				return err
			}
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "scratch"), 0o755); err != nil {
		return err
	}
	return errors.Join(fillFile(ctx, filepath.Join(dir, "sketch"), sketchSize), fillFile(ctx, filepath.Join(dir, "stream"), streamSize(m)))
}

func transportDir(d int) string { return fmt.Sprintf("d%02d", d) }
func transportFile(i int) string {
	return fmt.Sprintf("d%02d/f%02d", i/transportFiles, i%transportFiles)
}

// repeat calls f with 0 to n-1.
func repeat(n int, f func(i int) error) error {
	for i := range n {
		if err := f(i); err != nil {
			return err
		}
	}
	return nil
}

// inParallel does an operation's n in several threads at once.
func inParallel(do func(*Union, int) error) func(*Union, int) error {
	return func(u *Union, n int) error {
		errs := make([]error, pairs)
		var wg sync.WaitGroup
		for i := range pairs {
			wg.Go(func() { errs[i] = do(u, n/pairs) })
		}
		wg.Wait()
		return errors.Join(errs...)
	}
}

// statNew looks at the first half of the files, in an order that no directory is read in.
func statNew(u *Union, n int) error {
	var st unix.Stat_t
	return repeat(n, func(i int) error {
		return unix.Lstat(u.Path(transportFile(i%(transportDirs/2)*transportFiles+i/(transportDirs/2))), &st)
	})
}

// readdirNew lists the second half of the directories.
func readdirNew(u *Union, n int) error {
	return repeat(n, func(i int) error {
		names, err := os.ReadDir(u.Path(transportDir(transportDirs/2 + i)))
		if err == nil && len(names) != transportFiles {
			return fmt.Errorf("%d names instead of %d", len(names), transportFiles)
		}
		return err
	})
}

func openWriteClose(u *Union, n int) error {
	f, err := newRawFile(u.Path("sketch"))
	if err != nil {
		return err
	}
	b := make([]byte, tenth)
	return repeat(n, func(i int) error { return f.writeAt(b, int64(i)*blockSize+tenthStart) })
}

func openCloses(u *Union, n int) error {
	f, err := newRawFile(u.Path(transportFile(0)))
	if err != nil {
		return err
	}
	return repeat(n, func(int) error {
		fd, err := f.open(unix.O_RDONLY)
		if err != nil {
			return err
		}
		return rawClose(fd)
	})
}

func getxattrs(u *Union, n int) error {
	path, b := u.Path(transportFile(0)), make([]byte, 64)
	return repeat(n, func(int) error {
		if _, err := unix.Lgetxattr(path, "user.none", b); !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("getxattr of an attribute that is not there: %w", err)
		}
		return nil
	})
}

func statfses(u *Union, n int) error {
	var st unix.Statfs_t
	return repeat(n, func(int) error { return unix.Statfs(u.Dir, &st) })
}

func directReads(u *Union, n int) error {
	return withDescriptor(u.Path("stream"), unix.O_RDONLY|unix.O_DIRECT, func(fd int) error {
		b := aligned(blockSize)
		return repeat(n, func(i int) error { return rawPread(fd, b, int64(i)*blockSize) })
	})
}

func sketchWrites(u *Union, n int) error {
	return withDescriptor(u.Path("sketch"), unix.O_WRONLY, func(fd int) error {
		b := make([]byte, blockSize)
		return repeat(n, func(int) error { return rawWrite(fd, b) })
	})
}

func chmods(u *Union, n int) error {
	return repeat(n, func(i int) error { return unix.Chmod(u.Path(transportFile(i)), 0o640) })
}

func scratchFile(u *Union, kind string, i int) string {
	return u.Path(fmt.Sprintf("scratch/%s%05d", kind, i))
}

func creates(u *Union, n int) error {
	return repeat(n, func(i int) error {
		fd, err := unix.Open(scratchFile(u, "new", i), unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	})
}

func renames(u *Union, n int) error {
	return repeat(n, func(i int) error { return unix.Rename(scratchFile(u, "new", i), scratchFile(u, "old", i)) })
}

func unlinks(u *Union, n int) error {
	return repeat(n, func(i int) error { return unix.Unlink(scratchFile(u, "old", i)) })
}

func mkdirs(u *Union, n int) error {
	return repeat(n, func(i int) error {
		dir := scratchFile(u, "dir", i)
		return errors.Join(unix.Mkdir(dir, 0o755), unix.Rmdir(dir))
	})
}

func truncates(u *Union, n int) error {
	path := u.Path("sketch")
	return repeat(n, func(i int) error { return unix.Truncate(path, sketchSize-int64(i%2)) })
}

func fsyncs(u *Union, n int) error {
	return withDescriptor(u.Path("sketch"), unix.O_WRONLY, func(fd int) error {
		b := make([]byte, blockSize)
		return repeat(n, func(int) error { return errors.Join(rawWrite(fd, b), unix.Fsync(fd)) })
	})
}

func streamRead(u *Union, n int) error {
	return withDescriptor(u.Path("stream"), unix.O_RDONLY, func(fd int) error { return readStream(fd, n) })
}

func streamDirect(u *Union, n int) error {
	return withDescriptor(u.Path("stream"), unix.O_RDONLY|unix.O_DIRECT, func(fd int) error { return readStream(fd, n) })
}

func readStream(fd, n int) error {
	b := aligned(mib)
	return repeat(n, func(i int) error { return rawPread(fd, b, int64(i)*mib) })
}

func streamWrite(u *Union, n int) error {
	return withDescriptor(u.Path("stream"), unix.O_WRONLY, func(fd int) error {
		b := aligned(mib)
		return repeat(n, func(int) error { return rawWrite(fd, b) })
	})
}

// aligned makes a buffer that O_DIRECT accepts.
func aligned(n int) []byte {
	b := make([]byte, n+blockSize)
	skip := blockSize - int(uintptr(unsafe.Pointer(&b[0]))%blockSize)
	return b[skip : skip+n : skip+n]
}

func withDescriptor(path string, flags int, f func(fd int) error) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	return errors.Join(f(fd), unix.Close(fd))
}
