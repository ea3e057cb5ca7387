package bench

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
)

// firstWrite is what the whole project is about: open, write one byte in the middle, close.
func firstWrite(path string, off int64) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = unix.Pwrite(fd, []byte{'x'}, off)
	return errors.Join(err, unix.Close(fd))
}

// settleIn writes to a few other files first: what is measured is a mount in use, not the first request of a server that
// has just started, which the single 1 GiB file would otherwise be.
func settleIn(m *rival.Mount) error {
	for i := range firstFiles {
		if err := firstWrite(filepath.Join(m.Dir, firstFile(i)), 1); err != nil {
			return err
		}
	}
	return nil
}

// firstWrites measures the first write to lower files of three sizes. Names and attributes are warm, and so are the
// lower files' bytes, to the advantage of whoever copies them.
func firstWrites(r *run) error {
	sizes := []struct {
		name  string
		size  int64
		files []string
		reps  int // fresh mounts
	}{
		{"1 KiB", kib, names(smallFiles, smallFile), r.Reps},
		{"4 MiB", 4 * mib, names(largeFiles, largeFile), r.Reps},
		{"1 GiB", gib, []string{"huge"}, r.Reps},
	}
	of := map[string]map[string]float64{}
	for _, s := range sizes {
		samples := map[string][]float64{}
		for _, f := range s.files {
			if err := warm(filepath.Join(r.lower, f)); err != nil {
				return err
			}
		}
		for range s.reps {
			for _, c := range r.contenders(lamina, laminaBCoW, overlay, volatile, fuse) {
				// One file of 1 GiB is one sample a mount: mounts are cheap where writing is.
				mounts := 1
				if c.system == rival.Lamina && len(s.files) == 1 {
					mounts = 7
				}
				for range mounts {
					err := r.on(c, func(m *rival.Mount) error {
						if err := settleIn(m); err != nil {
							return err
						}
						var got []float64
						for _, f := range s.files {
							p := filepath.Join(m.Dir, f)
							var st unix.Stat_t
							if err := unix.Stat(p, &st); err != nil {
								return err
							}
							if err := timed(&got, func() error { return firstWrite(p, s.size/2+1) }); err != nil {
								return err
							}
						}
						samples[c.name] = append(samples[c.name], got...)
						return nil
					})
					if err != nil {
						return err
					}
				}
			}
		}
		if err := r.plainFirstWrites(s.files, s.size, samples); err != nil {
			return err
		}
		of[s.name] = medians(samples)
	}

	least, most := of["1 KiB"]["lamina"], of["1 KiB"]["lamina"]
	for _, s := range sizes {
		least, most = min(least, of[s.name]["lamina"]), max(most, of[s.name]["lamina"])
	}
	for i, s := range sizes {
		target := []float64{1.2, 25, 5000}[i]
		r.report.add(Row{
			Name: "first write, " + s.name, Unit: "us", Systems: of[s.name],
			Figure: of[s.name]["overlayfs"] / of[s.name]["lamina"], Target: target, AtLeast: true,
			Says: "x faster than overlayfs",
		})
	}
	r.report.add(Row{
		Name: "first write, sizes compared", Unit: "us",
		Systems: map[string]float64{"fastest size": least, "slowest size": most},
		Figure:  most / least, Target: 1.5, Says: "x from the fastest size to the slowest",
	})
	return nil
}

// plainFirstWrites writes to ordinary copies, for the scale.
func (r *run) plainFirstWrites(files []string, size int64, samples map[string][]float64) error {
	dir := filepath.Join(r.Dir, "plain")
	defer os.RemoveAll(dir)
	for i, f := range files {
		p := filepath.Join(dir, strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if _, err := rival.Run(r.ctx, "cp", filepath.Join(r.lower, f), p); err != nil {
			return err
		}
		got := samples[plain.name]
		if err := timed(&got, func() error { return firstWrite(p, size/2+1) }); err != nil {
			return err
		}
		samples[plain.name] = got
	}
	return nil
}

func names(n int, name func(int) string) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = name(i)
	}
	return all
}

func medians(samples map[string][]float64) map[string]float64 {
	m := map[string]float64{}
	for name, s := range samples {
		m[name] = median(s)
	}
	return m
}

// allocated measures what writes to a 1 GiB file cost on the disk, after everything is flushed and unmounted.
func allocated(r *run) error {
	for _, row := range []struct {
		name   string
		target float64 // KiB
		write  func(path string) error
	}{
		{"upper bytes, 1-byte write to 1 GiB", 64, func(p string) error { return firstWrite(p, gib/2+1) }},
		{"upper bytes, 1 000 random 4 KiB writes to 1 GiB", 4_500_000.0 / kib, randomWrites},
	} {
		sizes := map[string]float64{}
		for _, c := range []contender{lamina, laminaBCoW, {"lamina bcow-single", rival.Lamina, []string{"format=bcow-single"}}, overlay} {
			if err := r.on(c, func(m *rival.Mount) error {
				if err := row.write(filepath.Join(m.Dir, "huge")); err != nil {
					return err
				}
				if err := m.Down(); err != nil {
					return err
				}
				n, err := allocatedBelow(m.Upper)
				sizes[c.name] = float64(n) / kib
				return err
			}); err != nil {
				return err
			}
		}
		r.report.add(Row{
			Name: row.name, Unit: "KiB", Systems: sizes,
			Figure: max(sizes[lamina.name], sizes[laminaBCoW.name]), Target: row.target, Says: "KiB, the larger of sparse and bcow",
		})
	}
	return nil
}

// randomWrites makes 1 000 aligned writes of 4 KiB to different blocks, always the same ones.
func randomWrites(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	rng := rand.New(rand.NewPCG(1, 2))
	b := []byte(strings.Repeat("random write... ", 256))
	for _, i := range rng.Perm(gib / len(b))[:1000] {
		if _, err := f.WriteAt(b, int64(i*len(b))); err != nil {
			return err
		}
	}
	return f.Sync()
}

// partialWrites is BAOverlay's own case: a tenth of every block is written, one after the other.
func partialWrites(r *run) error {
	const n = 64 * mib / 4096
	samples := map[string][]float64{}
	for range r.Reps {
		for _, c := range r.contenders(lamina, laminaBCoW, overlay, volatile) {
			if err := r.on(c, func(m *rival.Mount) error {
				got := samples[c.name]
				err := timed(&got, func() error { return tenths(filepath.Join(m.Dir, "huge"), n) })
				samples[c.name] = got
				return err
			}); err != nil {
				return err
			}
		}
	}
	r.report.add(Row{Name: "410 of each 4 096 bytes, 64 MiB of 1 GiB", Unit: "us", Systems: medians(samples)})
	return nil
}

func tenths(path string, blocks int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 410)
	for i := range blocks {
		if _, err := f.WriteAt(b, i*4096+100); err != nil {
			return err
		}
	}
	return nil
}

// reads compares reading a lower file through the union with reading it where it lies.
func reads(r *run) error {
	const span = 256 * mib
	kinds := []struct {
		name string
		read func(path string) error
		cold bool
	}{
		{"sequential read, cached", func(p string) error { return sequential(p, span) }, false},
		{"random 4 KiB reads, cached", func(p string) error { return random(p, span) }, false},
		{"sequential read, cold", func(p string) error { return sequential(p, span) }, true},
	}
	samples := make([]map[string][]float64, len(kinds))
	for i := range samples {
		samples[i] = map[string][]float64{}
	}
	lower := filepath.Join(r.lower, "huge")
	sample := func(name, path string) error {
		// Whoever reads a file first decides how large the pieces are in which it is cached, and that how fast it is read
		// later: it is always the plain file's own read-ahead.
		if err := errors.Join(dropCaches(), sequential(lower, span)); err != nil {
			return err
		}
		for i, k := range kinds {
			if k.cold {
				if err := dropCaches(); err != nil {
					return err
				}
			} else if err := k.read(path); err != nil { // warm
				return err
			}
			got := samples[i][name]
			if err := timed(&got, func() error { return k.read(path) }); err != nil {
				return err
			}
			samples[i][name] = got
		}
		return nil
	}
	for range r.Reps + 2 {
		for _, c := range r.contenders(laminaPass, lamina, overlay, fuse) {
			if err := r.on(c, func(m *rival.Mount) error {
				// The plain file beside each contender: the machine's moods last longer than a sample.
				return errors.Join(sample(plain.name, lower), sample(c.name, filepath.Join(m.Dir, "huge")))
			}); err != nil {
				return err
			}
		}
	}
	for i, k := range kinds {
		row := Row{Name: k.name, Unit: "us", Systems: medians(samples[i])}
		if !k.cold { // the disk's moods are in the cold figure
			row.Figure = row.Systems[plain.name] / row.Systems[laminaPass.name]
			row.Target, row.AtLeast, row.Says = 0.95, true, "x of the plain file's speed, passed through"
		}
		r.report.add(row)
	}
	return nil
}

func sequential(path string, span int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 128*kib)
	for off := int64(0); off < span; off += int64(len(b)) {
		if _, err := f.ReadAt(b, off); err != nil {
			return err
		}
	}
	return nil
}

func random(path string, span int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 4096)
	rng := rand.New(rand.NewPCG(3, 4))
	for range 50_000 {
		if _, err := f.ReadAt(b, rng.Int64N(span/4096)*4096); err != nil {
			return err
		}
	}
	return nil
}

func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0)
}

// metadata measures stat of 16 000 files and listing of their directories, when everything has been seen once.
func metadata(r *run) error {
	kinds := []struct {
		name string
		do   func(root string) error
	}{{"stat of 16 000 files, cached", statAll}, {"readdir of 400 directories, cached", listAll}}
	for _, k := range kinds {
		samples := map[string][]float64{}
		for range r.Reps {
			for _, c := range r.contenders(lamina, overlay, fuse) {
				if err := r.on(c, func(m *rival.Mount) error {
					root := filepath.Join(m.Dir, "tree")
					if err := errors.Join(listAll(root), statAll(root), k.do(root)); err != nil {
						return err
					}
					got := samples[c.name]
					for range 3 {
						if err := timed(&got, func() error { return k.do(root) }); err != nil {
							return err
						}
					}
					samples[c.name] = got
					return nil
				}); err != nil {
					return err
				}
			}
		}
		m := medians(samples)
		r.report.add(Row{Name: k.name, Unit: "us", Systems: m, Figure: m[lamina.name] / m[overlay.name], Target: 1.1,
			Says: "x of overlayfs's time"})
	}
	return nil
}

// statAll knows the tree's names, so that it measures stat alone.
func statAll(root string) error {
	var st unix.Stat_t
	for d := range treeDirs {
		for i := range treeFiles / treeDirs {
			if err := unix.Lstat(fmt.Sprintf("%s/d%03d/file%02d", root, d, i), &st); err != nil {
				return err
			}
		}
	}
	return nil
}

func listAll(root string) error {
	buf := make([]byte, 32*kib)
	for d := range treeDirs {
		fd, err := unix.Open(fmt.Sprintf("%s/d%03d", root, d), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		for {
			n, err := unix.Getdents(fd, buf)
			if err != nil {
				unix.Close(fd)
				return err
			}
			if n == 0 {
				break
			}
		}
		unix.Close(fd)
	}
	return nil
}

// chown gives a whole tree to another owner, as container managers do for every user namespace.
func chown(r *run) (err error) {
	samples := map[string][]float64{}
	var used []string
	// Not before the end: ext4 without a journal is slow to allocate inodes for minutes after many were freed.
	defer func() {
		for _, base := range used {
			err = errors.Join(err, os.RemoveAll(base))
		}
	}()
	for range r.Reps {
		for _, c := range r.contenders(lamina, laminaBCoW, overlay, volatile) {
			base, err := r.keep(c, func(m *rival.Mount) error {
				got := samples[c.name]
				err := timed(&got, func() error {
					_, err := rival.Run(r.ctx, "chown", "-R", "1000:1000", filepath.Join(m.Dir, "tree"))
					return err
				})
				samples[c.name] = got
				return err
			})
			used = append(used, base)
			if err != nil {
				return err
			}
		}
	}
	m := medians(samples)
	r.report.add(Row{Name: "chown -R of 16 000 lower files", Unit: "us", Systems: m,
		Figure: m[overlay.name] / m[lamina.name], Target: 3, AtLeast: true, Says: "x faster than overlayfs"})
	return nil
}

// memory is the server's resident set.
func memory(r *run) error {
	var idle, busy []float64
	for range r.Reps {
		if err := r.on(lamina, func(m *rival.Mount) error {
			time.Sleep(time.Second)
			rss, err := residentMB(m)
			if err != nil {
				return err
			}
			idle = append(idle, rss)
			root := filepath.Join(m.Dir, "tree")
			if err := errors.Join(listAll(root), statAll(root)); err != nil {
				return err
			}
			time.Sleep(time.Second)
			rss, err = residentMB(m)
			busy = append(busy, rss)
			return err
		}); err != nil {
			return err
		}
	}
	r.report.add(Row{Name: "server memory, idle mount", Unit: "MB", Systems: map[string]float64{"lamina": median(idle)},
		Figure: median(idle), Target: 20, Says: "MB"})
	r.report.add(Row{Name: "server memory, 16 000 files looked up", Unit: "MB", Systems: map[string]float64{"lamina": median(busy)},
		Figure: median(busy), Target: 60, Says: "MB"})
	return nil
}

func residentMB(m *rival.Mount) (float64, error) {
	pid, err := m.Server()
	if err != nil {
		return 0, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(status), "\n") {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.Fields(v)[0])
			return float64(kb) * 1024 / 1e6, err
		}
	}
	return 0, fmt.Errorf("no VmRSS in /proc/%d/status", pid)
}
