package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
)

var fio = Scenario{
	Name:   "fio",
	Title:  "fio on a large lower file",
	Source: "",
	Describes: "The benchmark program fio reads and writes a large file of the lower layer: sequentially and at random, through the page " +
		"cache and past it (direct), from one and from four processes. Before buffered reads the file has been read once through the " +
		"mount. A server in user space reads the layer through the page cache even if the program asked for direct reads. A write writes an eighth of the file's size to a fresh mount and then syncs; its time includes the copy-up " +
		"that others do at the first open.",
	Contenders: []string{"plain", "overlayfs", "overlayfs-volatile", "overlayfs-xfs", "fuse-overlayfs", "lamina", "lamina-passthrough", "lamina-dev", "floor", "floor-passthrough"},
	Quick:      []string{"plain", "overlayfs", "lamina", "lamina-passthrough", "floor", "floor-passthrough"},
	Tools:      []Tool{{"fio", "fio"}},
	Space:      func(m Mode) int64 { return hugeSpace(fioSize(m)) },
	Weight:     260,
	Run:        runFio,
}

// fioSize is the lower file's size: large enough that fio's clock of milliseconds will do.
func fioSize(m Mode) int64 { return Pick[int64](m, 128*mib, 256*mib, 512*mib) }

// readers and writers are those whose reads, and writes, are not another's.
var (
	fioReaders = []string{"plain", "overlayfs", "fuse-overlayfs", "lamina", "lamina-passthrough", "lamina-dev", "floor", "floor-passthrough"}
	fioWriters = []string{"plain", "overlayfs", "overlayfs-volatile", "overlayfs-xfs", "fuse-overlayfs", "lamina", "lamina-dev", "floor"}
)

// fioJob is one run of fio.
type fioJob struct {
	rw     string // fio's own word
	block  int64
	direct bool
	jobs   int
	skip   int64 // bytes left out after each block
}

func (j fioJob) writes() bool { return j.rw == "write" || j.rw == "randwrite" }

func (j fioJob) String() string {
	name := map[string]string{"read": "sequential", "write": "sequential", "randread": "random", "randwrite": "random"}[j.rw]
	name += " " + sizeName(j.block)
	if j.skip > 0 {
		name = sizeName(j.block) + " of every " + sizeName(j.block+j.skip)
	}
	if j.direct {
		name += ", direct"
	}
	if j.jobs > 1 {
		name += fmt.Sprintf(", %d processes", j.jobs)
	}
	return name
}

func sizeName(n int64) string {
	if n >= mib {
		return fmt.Sprintf("%d MiB", n/mib)
	}
	return fmt.Sprintf("%d KiB", n/kib)
}

// fioReads and fioWrites are the runs of a mode.
func fioReads(m Mode) []fioJob {
	jobs := []fioJob{
		{rw: "read", block: 4 * kib, jobs: 1},
		{rw: "read", block: mib, jobs: 1},
		{rw: "randread", block: 4 * kib, jobs: 1},
	}
	if m == Quick {
		return jobs
	}
	jobs = append(jobs,
		fioJob{rw: "read", block: mib, jobs: 1, direct: true},
		fioJob{rw: "randread", block: 4 * kib, jobs: 1, direct: true},
		fioJob{rw: "randread", block: 4 * kib, jobs: 4})
	if m == Full {
		jobs = append(jobs,
			fioJob{rw: "read", block: 64 * kib, jobs: 1},
			fioJob{rw: "read", block: 4 * kib, jobs: 1, direct: true},
			fioJob{rw: "randread", block: mib, jobs: 1},
			fioJob{rw: "randread", block: mib, jobs: 1, direct: true},
			fioJob{rw: "randread", block: 4 * kib, jobs: 4, direct: true})
	}
	return jobs
}

// Each of them costs a copy-up a contender.
func fioWrites(m Mode) []fioJob {
	jobs := []fioJob{
		{rw: "write", block: 4 * kib, jobs: 1},
		{rw: "randwrite", block: 4 * kib, jobs: 1},
	}
	if m == Quick {
		return jobs
	}
	jobs = append(jobs,
		fioJob{rw: "write", block: mib, jobs: 1},
		fioJob{rw: "write", block: kib, jobs: 1, skip: 3 * kib})
	if m == Full {
		jobs = append(jobs,
			fioJob{rw: "write", block: mib, jobs: 1, direct: true},
			fioJob{rw: "randwrite", block: 4 * kib, jobs: 1, direct: true},
			fioJob{rw: "randwrite", block: 64 * kib, jobs: 1},
			fioJob{rw: "randwrite", block: 4 * kib, jobs: 4})
	}
	return jobs
}

func runFio(l *Lab) error {
	layer := l.fileLayer(fioSize(l.Mode()))
	reads, writes := fioReads(l.Mode()), fioWrites(l.Mode())
	if err := directIO(l.scratch); err != nil {
		l.fail("", fmt.Errorf("direct I/O is left out: %w", err))
		isDirect := func(j fioJob) bool { return j.direct }
		reads, writes = slices.DeleteFunc(reads, isDirect), slices.DeleteFunc(writes, isDirect)
	}
	read := l.Metric(report.Metric{Name: "reading", Unit: report.BytesPerSec})
	write := l.Metric(report.Metric{Name: "writing, copy-up and sync included", Unit: report.Seconds, LessIsBetter: true, Log: true})
	err := l.within(0.5, func() error {
		return l.Turns(l.among(fioReaders), names(reads), func(c *Contender, i int) error { return fioRead(l, c, layer, reads[i], read) })
	})
	if err == nil {
		err = l.Turns(l.among(fioWriters), names(writes), func(c *Contender, i int) error { return fioWrite(l, c, layer, writes[i], write) })
	}
	if err == nil {
		fioFigures(l, read, write, reads)
	}
	return err
}

// among are the contenders with these names, and variants that the user made up.
func (l *Lab) among(some []string) []*Contender {
	return slices.DeleteFunc(l.Contenders(), func(c *Contender) bool {
		return slices.Contains(l.scenario.Contenders, c.Name) && !slices.Contains(some, c.Name)
	})
}

func names(jobs []fioJob) []string {
	var all []string
	for _, j := range jobs {
		all = append(all, j.String())
	}
	return all
}

func fioFigures(l *Lab, read, write *Metric, reads []fioJob) {
	d, plain := l.Default(), l.reference(report.Native)
	if d == nil {
		return
	}
	for _, name := range []string{d.Name, "lamina-passthrough"} {
		if plain == nil {
			break
		}
		worst, least := "", 0.0
		for _, j := range reads {
			own, ok1 := read.Median(name, j.String())
			bound, ok2 := read.Median(plain.Name, j.String())
			if ok1 && ok2 && (worst == "" || own/bound < least) {
				worst, least = j.String(), own/bound
			}
		}
		if worst != "" {
			read.RatioAtLeast(name+": x the plain file's speed, at worst ("+worst+")", Of{name, worst}, Of{plain.Name, worst}, 0.95)
		}
	}
	for _, rw := range []string{"write", "randwrite"} {
		j := fioJob{rw: rw, block: 4 * kib, jobs: 1}.String()
		write.RatioAtLeast("x faster than overlayfs, "+j, Of{"overlayfs", j}, Of{d.Name, j}, 1.5)
	}
}

func fioRead(l *Lab, c *Contender, layer *Layer, j fioJob, m *Metric) error {
	l.Progress("reading, %s", j)
	if err := layer.Warm(c, huge); err != nil {
		return err
	}
	return l.On(c, Setup{Layer: layer, ReadOnly: true}, func(u *Union) error {
		if !j.direct {
			if err := Warm(u.Path(huge)); err != nil {
				return err
			}
		}
		s, err := u.fio(j)
		if err == nil {
			m.Add(c, j.String(), s)
		}
		return err
	})
}

func fioWrite(l *Lab, c *Contender, layer *Layer, j fioJob, m *Metric) error {
	l.Progress("writing, %s", j)
	if err := layer.Warm(c, huge); err != nil {
		return err
	}
	return l.On(c, Setup{Layer: layer}, func(u *Union) error {
		s, err := u.fio(j)
		if err == nil {
			m.Add(c, j.String(), s)
		}
		return err
	})
}

// fioTime is how long reads go on, in milliseconds.
func fioTime(m Mode) int { return Pick(m, 300, 500, 700) }

// fio runs a job. The value of a reading one is its rate in bytes a second, of a writing one its time in seconds.
func (u *Union) fio(j fioJob) (Sample, error) {
	path := u.Path(huge)
	size, err := fileSize(path)
	if err != nil {
		return Sample{}, err
	}
	out := filepath.Join(u.lab.scratch, "fio.json")
	defer os.Remove(out)
	share := size / int64(j.jobs) // each process has a part of the file to itself
	args := []string{
		"--name=bench", "--output-format=json", "--output=" + out, "--filename=" + fioEscape(path),
		"--ioengine=psync", "--allow_file_create=0", "--invalidate=0", "--randrepeat=1", "--thread",
		fmt.Sprintf("--bs=%d", j.block), fmt.Sprintf("--size=%d", share), fmt.Sprintf("--numjobs=%d", j.jobs),
		fmt.Sprintf("--offset_increment=%d", share),
	}
	rw := j.rw
	if j.skip > 0 {
		rw += fmt.Sprintf(":%d", j.skip)
	}
	args = append(args, "--rw="+rw)
	if j.direct {
		args = append(args, "--direct=1")
	}
	if j.writes() {
		part := share / 8 / (j.block + j.skip) * j.block
		args = append(args, fmt.Sprintf("--io_size=%d", part), "--overwrite=1", "--end_fsync=1")
	} else {
		args = append(args, "--time_based", fmt.Sprintf("--runtime=%dms", fioTime(u.lab.Mode())))
	}
	s, err := u.Time(func() error { return u.Command("fio", args...) })
	if err != nil {
		return s, err
	}
	rate, took, err := fioResult(out)
	s.Took, s.Value = took, rate
	if j.writes() {
		s.Value = took.Seconds()
	}
	return s, err
}

// fioEscape: fio takes a colon for the separator of several files.
func fioEscape(path string) string {
	var b []byte
	for i := range len(path) {
		if path[i] == ':' {
			b = append(b, '\\')
		}
		b = append(b, path[i])
	}
	return string(b)
}

// fioResult reads what fio measured: the sum of its jobs' rates in bytes a second, and the time of the slowest, which
// includes opening the file.
func fioResult(path string) (rate float64, took time.Duration, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, err
	}
	type direction struct {
		BW float64 `json:"bw_bytes"`
	}
	var r struct {
		Jobs []struct {
			Error       int       `json:"error"`
			Runtime     int64     `json:"job_runtime"` // ms
			Read, Write direction // one of them is 0
		}
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return 0, 0, fmt.Errorf("fio's result: %w", err)
	}
	if len(r.Jobs) == 0 {
		return 0, 0, errors.New("fio's result has no jobs")
	}
	for _, j := range r.Jobs {
		if j.Error != 0 {
			return 0, 0, fmt.Errorf("fio: %w", unix.Errno(j.Error))
		}
		rate += j.Read.BW + j.Write.BW
		took = max(took, time.Duration(j.Runtime)*time.Millisecond)
	}
	return rate, took, nil
}

// directIO tells why a file in dir cannot be read past the page cache.
func directIO(dir string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("%s: O_DIRECT: %w", dir, err)
	}
	return unix.Close(fd)
}
