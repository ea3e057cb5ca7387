package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
	"lamina/bench/rival"
)

var database = Scenario{
	Name:  "database",
	Title: "A database that comes with the image",
	Describes: "A lower layer holds a database: a file of SQLite, or the data directory of MariaDB with one table that is most " +
		"of it (1 GiB each in a full run). With nothing in memory a container starts: the time to its first answered query, which " +
		"updates a row, the server's own start included; then transactions for some seconds, each on the disk before it is " +
		"acknowledged: SQLite with its rollback journal and with its write-ahead log, MariaDB under sysbench's oltp_read_write with 4 threads. Steady state is the " +
		"median over the second half. MariaDB's settings are its own defaults, a buffer pool of 128 MiB among them.",
	Contenders: []string{"plain", "overlayfs", "overlayfs-volatile", "fuse-overlayfs", "lamina", "lamina-dev"},
	Quick:      []string{"plain", "overlayfs", "fuse-overlayfs", "lamina"},
	Tools:      []Tool{{"sqlite3", "sqlite3"}, {"mariadbd", "mariadb-server-core"}, {"mariadb-install-db", "mariadb-server-core"}, {"mariadb", "mariadb-client-core"}, {"sysbench", "sysbench"}, {"setpriv", "util-linux"}},
	// Of each database: the layer, the plain copy, a whole copy-up, journals.
	Space:  func(m Mode) int64 { return databaseSize(m)*4 + 2*gib },
	Weight: 26,
	Run:    runDatabase,
}

// databaseSize is about how large the one big file of each database is, in bytes.
func databaseSize(m Mode) int64 { return Pick[int64](m, 48*mib, 256*mib, gib) }

// Cases of the report.
const (
	caseSQLite    = "SQLite"
	caseSQLiteWAL = "SQLite, WAL"
	caseMariaDB   = "MariaDB"
)

// databases measures two of them, of a size, for a time.
type databases struct {
	*Lab
	size                           int64         // of each, in bytes
	load                           time.Duration // of MariaDB's transactions, and of SQLite's in its two modes together
	first, steady, overTime, upper *Metric
	sockets                        string // directory of MariaDB's
}

func runDatabase(l *Lab) error {
	return runDatabases(l, databaseSize(l.Mode()), Pick(l.Mode(), 4*time.Second, 12*time.Second, 30*time.Second))
}

func runDatabases(l *Lab, size int64, load time.Duration) error {
	d := &databases{
		Lab: l, size: size, load: load,
		first:  l.Metric(report.Metric{Name: "time to the first query", Unit: report.Seconds, LessIsBetter: true, Log: true}),
		steady: l.Metric(report.Metric{Name: "transactions a second, steady", Unit: report.PerSecond}),
		overTime: l.Metric(report.Metric{Name: "MariaDB's transactions a second since its first query", Unit: report.PerSecond,
			Chart: report.Lines, XName: "seconds", Aside: true}),
		upper: l.Metric(report.Metric{Name: "upper layer afterwards", Unit: report.Bytes, LessIsBetter: true, Log: true}),
	}
	turns := []func(c *Contender) error{d.sqliteTurn}
	leave, err := d.prepareMariaDB()
	if err == nil {
		turns = append(turns, d.mariaTurn)
	}
	err = errors.Join(err, l.Rounds(func(c *Contender) error {
		for _, turn := range turns {
			if err := turn(c); err != nil {
				return err
			}
		}
		return nil
	}))
	d.figures()
	return errors.Join(err, leave(), l.Drop(d.sqliteLayer()), l.Drop(d.mariaLayer()))
}

func (d *databases) figures() {
	lamina := d.Default()
	if lamina == nil {
		return
	}
	for _, k := range []string{caseSQLite, caseMariaDB} {
		d.first.RatioAtLeast(fmt.Sprintf("x faster than overlayfs to the first query: %s, %d MiB of data", k, d.size/mib),
			Of{"overlayfs", k}, Of{lamina.Name, k}, 5)
	}
	for _, k := range []string{caseSQLite, caseSQLiteWAL, caseMariaDB} {
		d.steady.RatioAtLeast("x overlayfs's transactions a second, its copy-up done: "+k, Of{lamina.Name, k}, Of{"overlayfs", k}, 0.9)
	}
}

// SQLite.

const (
	sqliteFile  = "app.db"
	sqliteRow   = 900 // bytes of a row's value
	sqliteBatch = 100 // transactions that one run of the program does
)

// sqliteRows is how many rows make the size: each takes about a kilobyte with its overhead.
func (d *databases) sqliteRows() int64 { return d.size / 1000 }

func (d *databases) sqliteLayer() *Layer {
	return d.Layer("sqlite", func(ctx context.Context, dir string) error {
		_, err := rival.Run(ctx, "sqlite3", "-bail", filepath.Join(dir, sqliteFile), fmt.Sprintf(
			`CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB);
			WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i+1 FROM n WHERE i < %d) INSERT INTO t SELECT i, randomblob(%d) FROM n;`,
			d.sqliteRows(), sqliteRow))
		return err
	})
}

func (d *databases) sqliteTurn(c *Contender) error {
	return d.On(c, Setup{Layer: d.sqliteLayer()}, d.sqliteOn)
}

func (d *databases) sqliteOn(u *Union) error {
	if err := d.DropCaches(); err != nil {
		return err
	}
	sql := func(text string) error { return u.Command("sqlite3", "-bail", u.Path(sqliteFile), text) }
	update := fmt.Sprintf("UPDATE t SET v = randomblob(%d) WHERE id = abs(random() %% %d) + 1;\n", sqliteRow, d.sqliteRows())
	d.Progress("SQLite's first query")
	first, err := u.Time(func() error { return sql(update + "SELECT count(*) FROM t WHERE id < 10;") })
	if err != nil {
		return err
	}
	d.first.Add(u.Contender, caseSQLite, first.InSeconds())
	for _, journal := range []struct{ mode, name string }{{"delete", caseSQLite}, {"wal", caseSQLiteWAL}} {
		d.Progress("%s: transactions", journal.name)
		if err := sql("PRAGMA journal_mode = " + journal.mode); err != nil {
			return err
		}
		steady, err := batches(u, d.load/2, func() error { return sql(strings.Repeat(update, sqliteBatch)) })
		if err != nil {
			return err
		}
		d.steady.Add(u.Contender, journal.name, steady)
	}
	return d.addUpper(u, caseSQLite)
}

// batches runs a batch of transactions again and again for a time, and twice at least.
func batches(u *Union, load time.Duration, batch func() error) (Sample, error) {
	var rates []Sample
	for began := time.Now(); time.Since(began) < load || len(rates) < 2; {
		s, err := u.Time(batch)
		if err != nil {
			return s, err
		}
		s = s.Rate(sqliteBatch)
		s.ClientCPU, s.ServerCPU = s.ClientCPU/sqliteBatch, s.ServerCPU/sqliteBatch
		rates = append(rates, s)
	}
	return secondHalf(rates), nil
}

// secondHalf sums up the second half of samples that were taken one after the other.
func secondHalf(s []Sample) Sample {
	s = s[len(s)/2:]
	return Sample{
		Value:      medianOf(s, func(s Sample) float64 { return s.Value }),
		Took:       s[0].Took,
		ClientCPU:  medianOf(s, func(s Sample) float64 { return s.ClientCPU }),
		ServerCPU:  medianOf(s, func(s Sample) float64 { return s.ServerCPU }),
		PeakMemory: s[len(s)-1].PeakMemory,
	}
}

// addUpper samples what the upper layer takes on the disk.
func (d *databases) addUpper(u *Union, name string) error {
	if u.Upper == "" {
		return nil
	}
	if err := u.Quiet(); err != nil {
		return err
	}
	n, err := u.Allocated()
	if err != nil {
		return err
	}
	d.upper.Add(u.Contender, name, Sample{Value: float64(n), Allocated: n})
	return nil
}

// MariaDB.

const (
	mariaData    = "data" // the data directory, below the layer
	mariaRow     = 240    // bytes that a row of sysbench's table takes, its index included
	mariaThreads = 4
)

func (d *databases) mariaRows() int64 { return d.size / mariaRow }

func (d *databases) mariaLayer() *Layer {
	return d.Layer("mariadb", func(ctx context.Context, dir string) error { return fillMariaDB(ctx, dir, d.sockets, d.mariaRows()) })
}

// prepareMariaDB makes the data directory and a place for sockets. What fails here fails for every contender, and is said
// once. leave is called when all is over, also after an error.
func (d *databases) prepareMariaDB() (leave func() error, err error) {
	leave = func() error { return nil }
	who, err := unprivileged()
	if err != nil {
		return leave, err
	}
	lock, err := letIn(d.scratch, who)
	if err != nil {
		return leave, err
	}
	leave = func() error { return errors.Join(os.RemoveAll(d.sockets), lock()) }
	if d.sockets, err = os.MkdirTemp(d.scratch, "db."); err != nil {
		return leave, err
	}
	if err := os.Chown(d.sockets, int(who.Uid), int(who.Gid)); err != nil {
		return leave, err
	}
	for _, c := range d.Contenders() {
		if _, err := d.mariaLayer().At(c); err != nil {
			return leave, err
		}
	}
	return leave, nil
}

func (d *databases) mariaTurn(c *Contender) error {
	return d.On(c, Setup{Layer: d.mariaLayer()}, d.mariaOn)
}

func (d *databases) mariaOn(u *Union) error {
	if err := d.DropCaches(); err != nil {
		return err
	}
	var db *mariaDB
	defer func() {
		if db != nil {
			db.kill()
		}
	}()
	d.Progress("MariaDB's first query")
	first, err := u.Time(func() (err error) {
		if db, err = startMariaDB(d.ctx, u.Path(mariaData), d.sockets); err != nil {
			return err
		}
		return db.query(d.ctx, "UPDATE sbtest.sbtest1 SET k = k + 1 WHERE id = 1; SELECT k FROM sbtest.sbtest1 WHERE id = 1;")
	})
	if err != nil {
		return err
	}
	spent, err := processCPU(db.cmd.Process.Pid)
	if err != nil {
		return err
	}
	first.ClientCPU += spent.Seconds()
	d.first.Add(u.Contender, caseMariaDB, first.InSeconds())

	d.Progress("MariaDB's transactions")
	seconds, err := db.sysbench(d.ctx, d.mariaRows(), d.load)
	if err != nil {
		return err
	}
	var rates []Sample
	for i, tps := range seconds {
		d.overTime.AddX(u.Contender, float64(i+1), Sample{Value: tps})
		rates = append(rates, Sample{Value: tps})
	}
	d.steady.Add(u.Contender, caseMariaDB, secondHalf(rates))
	if err := db.stop(); err != nil {
		return err
	}
	return d.addUpper(u, caseMariaDB)
}

// unprivileged is the user that MariaDB runs as: the one of Debian's package or, where only the program is installed,
// nobody.
func unprivileged() (*syscall.Credential, error) {
	u, err := user.Lookup("mysql")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, fmt.Errorf("MariaDB does not run as root: %w", err)
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(err1, err2)
}

// letIn lets a user pass through dir, without seeing what is in it, until lock is called. That they come as far as dir is
// up to whoever chose it.
func letIn(dir string, who *syscall.Credential) (lock func() error, err error) {
	for parent := filepath.Dir(dir); parent != "/"; parent = filepath.Dir(parent) {
		var st unix.Stat_t
		if err := unix.Stat(parent, &st); err != nil {
			return nil, err
		}
		may := st.Mode & 0o001
		switch {
		case st.Uid == who.Uid:
			may = st.Mode & 0o100
		case st.Gid == who.Gid:
			may = st.Mode & 0o010
		}
		if may == 0 {
			return nil, fmt.Errorf("%s cannot be entered by the user %d, as whom MariaDB runs: choose another --dir", parent, who.Uid)
		}
	}
	st, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	return func() error { return os.Chmod(dir, st.Mode().Perm()) }, os.Chmod(dir, st.Mode().Perm()|0o011)
}

// fillMariaDB makes a data directory with sysbench's table of so many rows in it. sockets belongs to the user that the
// server runs as.
func fillMariaDB(ctx context.Context, dir, sockets string, rows int64) error {
	who, err := ownerOf(sockets)
	if err != nil {
		return err
	}
	data := filepath.Join(dir, mariaData)
	if err := os.Mkdir(data, 0o755); err != nil {
		return err
	}
	if err := os.Chown(data, int(who.Uid), int(who.Gid)); err != nil {
		return err
	}
	// Run as root, it would change the owners of files of the installation too.
	out, err := rival.Run(ctx, "setpriv", fmt.Sprintf("--reuid=%d", who.Uid), fmt.Sprintf("--regid=%d", who.Gid), "--clear-groups",
		"env", "TMPDIR="+sockets, "HOME="+sockets, "mariadb-install-db", "--no-defaults", "--datadir="+data,
		"--auth-root-authentication-method=normal", "--skip-test-db")
	if err != nil {
		return fmt.Errorf("mariadb-install-db: %s: %w", complaint(out), err)
	}
	// Loading need not survive a crash. Identities without gaps, as sysbench asks for all of them.
	db, err := startMariaDB(ctx, data, sockets, "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0",
		"--innodb-buffer-pool-size=512M", "--innodb-autoinc-lock-mode=0")
	if err != nil {
		return err
	}
	defer db.kill()
	if err := db.query(ctx, "CREATE DATABASE sbtest"); err != nil {
		return err
	}
	// The first rows come from sysbench, which is slow; the table then doubles itself up to its size.
	have := rows
	for have > 100_000 {
		have = (have + 1) / 2
	}
	if _, err := rival.Run(ctx, "sysbench", append(db.sysbenchArgs(have), "prepare")...); err != nil {
		return err
	}
	for have < rows {
		more := min(have, rows-have)
		if err := db.query(ctx, fmt.Sprintf("INSERT INTO sbtest.sbtest1 (k, c, pad) SELECT k, c, pad FROM sbtest.sbtest1 ORDER BY id LIMIT %d", more)); err != nil {
			return err
		}
		have += more
	}
	return db.stop()
}

func ownerOf(path string) (*syscall.Credential, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &syscall.Credential{Uid: st.Uid, Gid: st.Gid}, nil
}

// mariaDB is a running server. It is ended by its own id, whatever else runs on the machine.
type mariaDB struct {
	cmd    *exec.Cmd
	socket string
	log    bytes.Buffer  // not to be read before gone
	gone   chan struct{} // closed when it has exited
	err    error         // of its exit; not to be read before gone
}

// startMariaDB returns when the server takes connections: on a socket in the directory sockets, nowhere else. It runs as
// the owner of that directory.
func startMariaDB(ctx context.Context, data, sockets string, options ...string) (*mariaDB, error) {
	who, err := ownerOf(sockets)
	if err != nil {
		return nil, err
	}
	db := &mariaDB{socket: filepath.Join(sockets, "db.sock"), gone: make(chan struct{})}
	args := append([]string{"--no-defaults", "--datadir=" + data, "--socket=" + db.socket,
		"--pid-file=" + filepath.Join(sockets, "pid"), "--tmpdir=" + sockets, "--skip-networking", "--skip-log-bin"}, options...)
	db.cmd = exec.Command("mariadbd", args...)
	db.cmd.Stdout, db.cmd.Stderr = &db.log, &db.log
	// In a process group of its own a Ctrl-C reaches us alone, and we stop it in order.
	db.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: who}
	if err := db.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { db.err = db.cmd.Wait(); close(db.gone) }()
	for {
		if conn, err := net.Dial("unix", db.socket); err == nil {
			return db, conn.Close()
		}
		select {
		case <-db.gone:
			return nil, fmt.Errorf("mariadbd ended before it took connections: %w: %s", db.err, complaint(db.log.String()))
		case <-ctx.Done():
			db.kill()
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// complaint is what the server said of errors or, without any, last.
func complaint(log string) string {
	var said, last []string
	for line := range strings.Lines(log) {
		if last = append(last, strings.TrimSpace(line)); strings.Contains(line, "[ERROR]") {
			said = append(said, strings.TrimSpace(line))
		}
	}
	if len(said) == 0 {
		said = last[max(0, len(last)-3):]
	}
	return strings.Join(said, "; ")
}

// patience is how long the server may take to write everything to the disk and go.
const patience = 2 * time.Minute

// stop shuts the server down.
func (db *mariaDB) stop() error {
	if err := db.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-db.gone:
		if db.err != nil {
			return fmt.Errorf("mariadbd: %w: %s", db.err, complaint(db.log.String()))
		}
		return nil
	case <-time.After(patience):
		db.kill()
		return fmt.Errorf("mariadbd did not shut down in %v, and was killed: %s", patience, complaint(db.log.String()))
	}
}

// kill ends the server, if it has not ended yet, without regard for its data, which nobody will read again. A server that
// is still starting may not listen to anything gentler.
func (db *mariaDB) kill() {
	_ = db.cmd.Process.Kill() // an error says that it is gone
	<-db.gone
}

// query runs SQL statements.
func (db *mariaDB) query(ctx context.Context, sql string) error {
	_, err := rival.Run(ctx, "mariadb", "--no-defaults", "--batch", "--user=root", "--socket="+db.socket, "--execute="+sql)
	return err
}

func (db *mariaDB) sysbenchArgs(rows int64) []string {
	return []string{"oltp_read_write", "--db-driver=mysql", "--mysql-user=root", "--mysql-socket=" + db.socket,
		"--tables=1", "--table-size=" + strconv.FormatInt(rows, 10)}
}

// sysbench returns the transactions of each second.
func (db *mariaDB) sysbench(ctx context.Context, rows int64, d time.Duration) ([]float64, error) {
	seconds := int(d.Seconds())
	// It does not always report the last one.
	args := append(db.sysbenchArgs(rows), "--threads="+strconv.Itoa(mariaThreads), "--time="+strconv.Itoa(seconds+1), "--report-interval=1", "run")
	out, err := rival.Run(ctx, "sysbench", args...)
	if err != nil {
		return nil, err
	}
	rates, err := sysbenchRates(out)
	if err == nil && len(rates) < seconds {
		err = fmt.Errorf("sysbench reported %d seconds of %d: %s", len(rates), seconds, out)
	}
	if err != nil {
		return nil, err
	}
	return rates[:seconds], nil
}

// sysbenchRates reads the lines "[ 1s ] thds: 4 tps: 627.04 qps: ...".
func sysbenchRates(out string) ([]float64, error) {
	var rates []float64
	for line := range strings.Lines(out) {
		_, rest, ok := strings.Cut(line, " tps: ")
		if !ok || !strings.HasPrefix(line, "[") {
			continue
		}
		number, _, _ := strings.Cut(rest, " ")
		v, err := strconv.ParseFloat(number, 64)
		if err != nil {
			return nil, fmt.Errorf("sysbench said %q: %w", line, err)
		}
		rates = append(rates, v)
	}
	return rates, nil
}
