// Command demo shows what Lamina is for: a root filesystem stacked from the host's own root, read-only, and a layer with a
// 1 GiB SQLite database; in a chroot on it sqlite3 updates rows. First on kernel overlayfs, then on Lamina, side by side.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
)

const (
	rows         = 262_144 // of a little over 4 000 bytes each: 1 GiB
	transactions = 200
	database     = "srv/images.db"
)

func main() {
	binary := flag.String("lamina", "bin/lamina", "the lamina binary")
	flag.Parse()
	// A second Ctrl-C must not cut the cleaning up short; the first one is enough.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := demo(ctx, *binary); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted; everything is cleaned up")
		}
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// outcome is what one system did.
type outcome struct {
	system             rival.System
	first, total, read time.Duration
	grew               int64 // bytes allocated in the upper layer
	sum                string
}

func demo(ctx context.Context, binary string) (err error) {
	if binary, err = filepath.Abs(binary); err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "lamina-demo.")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	// Overlayfs refuses an upper layer within a lower one, and the host's root is a lower: both systems get their uppers,
	// and the database its layer, on one and the same loop device.
	disk := filepath.Join(scratch, "disk")
	fmt.Println("Making a disk for the layers")
	if err := makeDisk(ctx, scratch, disk); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(disk, 0)) }()
	layer := filepath.Join(disk, "layer")
	fmt.Printf("Making a layer with a 1 GiB SQLite database (%d rows)\n", rows)
	if err := makeDatabase(ctx, filepath.Join(layer, database)); err != nil {
		return err
	}

	var outcomes []outcome
	for _, system := range []rival.System{rival.Overlay, rival.Lamina} {
		if system == rival.Overlay && !kernelHas("overlay") {
			fmt.Println("This kernel has no overlayfs: only Lamina is shown.")
			continue
		}
		o, err := onSystem(ctx, system, binary, disk, []string{layer, "/"})
		if err != nil {
			return err
		}
		outcomes = append(outcomes, o)
	}
	return table(outcomes)
}

func makeDisk(ctx context.Context, scratch, disk string) error {
	img := filepath.Join(scratch, "image")
	if err := os.Mkdir(disk, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(img, 4<<30); err != nil {
		return err
	}
	if _, err := rival.Run(ctx, "mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", img); err != nil {
		return err
	}
	_, err := rival.Run(ctx, "mount", "-o", "loop", img, disk)
	return err
}

func makeDatabase(ctx context.Context, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	_, err := rival.Run(ctx, "sqlite3", path, fmt.Sprintf(`PRAGMA journal_mode=off; PRAGMA synchronous=off;
		CREATE TABLE image(id INTEGER PRIMARY KEY, name TEXT, data BLOB);
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < %d)
		INSERT INTO image SELECT i, 'image '||i, randomblob(4000) FROM n;`, rows))
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.Size() < 1<<30 {
		return fmt.Errorf("%s has %d bytes: less than 1 GiB", path, st.Size())
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd) // the database must not be on its way to the disk while others are measured
}

// onSystem stacks the layers, runs sqlite3 in a chroot on them, and takes everything down again.
func onSystem(ctx context.Context, system rival.System, binary, disk string, lowers []string) (o outcome, err error) {
	o.system = system
	dir := func(name string) string { return filepath.Join(disk, string(system), name) }
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.MkdirAll(dir(d), 0o755); err != nil {
			return o, err
		}
	}
	fmt.Printf("Mounting %s over %s\n", system, strings.Join(lowers, " and "))
	m, err := rival.Up(ctx, rival.Config{System: system, Binary: binary, Lowers: lowers, Upper: dir("upper"), Work: dir("work")}, dir("merged"))
	if err != nil {
		return o, err
	}
	defer func() {
		m.Discard()
		err = errors.Join(err, os.RemoveAll(dir("")))
	}()

	// One row read first, from a descriptor that cannot write: it warms the program and the names, as much for the one as
	// for the other, and copies nothing up.
	if _, err := sqlite(ctx, m.Dir, "SELECT name FROM image WHERE id = 1;", "-readonly"); err != nil {
		return o, err
	}
	start := time.Now()
	if _, err := sqlite(ctx, m.Dir, fmt.Sprintf("UPDATE image SET name = 'first' WHERE id = %d;", rows/2)); err != nil {
		return o, err
	}
	o.first = time.Since(start)
	fmt.Printf("  first row updated after %v; %d transactions more\n", o.first.Round(time.Millisecond), transactions)
	if _, err := sqlite(ctx, m.Dir, updates()); err != nil {
		return o, err
	}
	o.total = time.Since(start)
	start = time.Now()
	if o.sum, err = sqlite(ctx, m.Dir, "SELECT count(*), sum(id), sum(length(data)), sum(length(name)), sum(name LIKE 'row %') FROM image; PRAGMA quick_check;"); err != nil {
		return o, err
	}
	o.read = time.Since(start)
	if err := m.Down(); err != nil {
		return o, err
	}
	o.grew, err = allocated(dir("upper"))
	return o, err
}

// updates are transactions of one row each, spread over the whole file.
func updates() string {
	var b strings.Builder
	for i := range transactions {
		fmt.Fprintf(&b, "UPDATE image SET name = 'row %d' WHERE id = %d;\n", i, 1+i*7919%rows)
	}
	return b.String()
}

// sqlite runs the image's own sqlite3 on the image's own database.
func sqlite(ctx context.Context, root, sql string, flags ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "/usr/bin/sqlite3", append(flags, "/"+database)...)
	cmd.Stdin = strings.NewReader(sql)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("sqlite3 in a chroot on %s: %w: %s", root, err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

func allocated(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && !e.IsDir() {
			if err = unix.Lstat(p, &st); err == nil {
				sum += st.Blocks * 512
			}
		}
		return err
	})
	return sum, err
}

func kernelHas(fs string) bool {
	b, err := os.ReadFile("/proc/filesystems")
	return err == nil && strings.Contains(string(b), "\t"+fs+"\n")
}

func table(outcomes []outcome) error {
	fmt.Printf("\n%-24s", "")
	for _, o := range outcomes {
		fmt.Printf("%18s", o.system)
	}
	fmt.Println()
	line := func(name string, value func(outcome) string) {
		fmt.Printf("%-24s", name)
		for _, o := range outcomes {
			fmt.Printf("%18s", value(o))
		}
		fmt.Println()
	}
	line("time to first write", func(o outcome) string { return o.first.Round(100 * time.Microsecond).String() })
	line(fmt.Sprintf("total, %d transactions", transactions+1), func(o outcome) string { return o.total.Round(time.Millisecond).String() })
	line("reading the whole table", func(o outcome) string { return o.read.Round(time.Millisecond).String() })
	line("upper layer grew by", func(o outcome) string { return fmt.Sprintf("%.1f MiB", float64(o.grew)/(1<<20)) })
	for _, o := range outcomes {
		if !strings.HasSuffix(o.sum, "ok") {
			return fmt.Errorf("the database on %s is not well: %s", o.system, o.sum)
		}
		if o.sum != outcomes[0].sum {
			return fmt.Errorf("the databases differ: %s on %s, %s on %s", outcomes[0].sum, outcomes[0].system, o.sum, o.system)
		}
	}
	fmt.Println("\nBoth databases hold the same rows and pass SQLite's own check.")
	if len(outcomes) == 2 {
		fmt.Printf("The first write came %.0f times sooner, and the upper layer grew %.0f times less.\n",
			float64(outcomes[0].first)/float64(outcomes[1].first), float64(outcomes[0].grew)/float64(max(1, outcomes[1].grew)))
	}
	return nil
}
