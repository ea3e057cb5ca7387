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
		"updates a row, the server's own start included; then transactions for some seconds, each of them on the disk before it is " +
		"acknowledged: SQLite with its rollback journal and with its write-ahead log, MariaDB under sysbench's oltp_read_write with 4 threads. Steady state is the " +
		"median over the second half. MariaDB's settings are its own defaults, a buffer pool of 128 MiB among them.",
	Contenders: []string{"plain", "overlayfs", "overlayfs-volatile", "fuse-overlayfs", "lamina", "lamina-dev"},
	Quick:      []string{"plain", "overlayfs", "fuse-overlayfs", "lamina"},
	Tools:      []Tool{{"sqlite3", "sqlite3"}, {"mariadbd", "mariadb-server"}, {"mariadb-install-db", "mariadb-server"}, {"mariadb", "mariadb-client"}, {"sysbench", "sysbench"}},
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

// databaseMetrics are the questions of the scenario.
type databaseMetrics struct {
	first, steady, overTime, upper *Metric
}

func runDatabase(l *Lab) error {
	m := databaseMetrics{
		first:  l.Metric(report.Metric{Name: "time to the first query", Unit: report.Seconds, LessIsBetter: true, Log: true}),
		steady: l.Metric(report.Metric{Name: "transactions a second, steady", Unit: report.PerSecond}),
		overTime: l.Metric(report.Metric{Name: "MariaDB's transactions a second since its first query", Unit: report.PerSecond,
			Chart: report.Lines, XName: "seconds", Aside: true}),
		upper: l.Metric(report.Metric{Name: "upper layer afterwards", Unit: report.Bytes, LessIsBetter: true, Log: true}),
	}
	err := runSQLite(l, &m)
	if l.ctx.Err() == nil {
		err = errors.Join(err, runMariaDB(l, &m))
	}
	if d := l.Default(); d != nil {
		size := fmt.Sprintf("%d MiB of data", databaseSize(l.Mode())/mib)
		for _, k := range []string{caseSQLite, caseMariaDB} {
			m.first.RatioAtLeast(k+", "+size+": x faster to the first query than overlayfs", Of{"overlayfs", k}, Of{d.Name, k}, 5)
		}
		for _, k := range []string{caseSQLite, caseSQLiteWAL, caseMariaDB} {
			m.steady.RatioAtLeast(k+": x overlayfs's transactions a second after its copy-up", Of{d.Name, k}, Of{"overlayfs", k}, 0.9)
		}
	}
	return err
}

// load is how long transactions of one kind are measured.
func load(m Mode) time.Duration { return Pick(m, 3*time.Second, 10*time.Second, 30*time.Second) }

// SQLite.

const (
	sqliteFile  = "app.db"
	sqliteRow   = 900 // bytes of a row's value
	sqliteBatch = 100 // transactions that one run of the program does
)

func sqliteRows(m Mode) int64 { return databaseSize(m) / 1000 } // a row with its overhead takes about a kilobyte

func runSQLite(l *Lab, m *databaseMetrics) error {
	rows := sqliteRows(l.Mode())
	layer := l.Layer("sqlite", func(ctx context.Context, dir string) error {
		_, err := rival.Run(ctx, "sqlite3", "-bail", filepath.Join(dir, sqliteFile), fmt.Sprintf(
			`CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB);
			WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i+1 FROM n WHERE i < %d) INSERT INTO t SELECT i, randomblob(%d) FROM n;`, rows, sqliteRow))
		return err
	})
	update := fmt.Sprintf("UPDATE t SET v = randomblob(%d) WHERE id = abs(random() %% %d) + 1;\n", sqliteRow, rows)
	err := l.Rounds(func(c *Contender) error {
		return l.On(c, Setup{Layer: layer}, func(u *Union) error { return sqliteOn(u, update, m) })
	})
	return errors.Join(err, l.Drop(layer))
}

func sqliteOn(u *Union, update string, m *databaseMetrics) error {
	if err := u.lab.DropCaches(); err != nil {
		return err
	}
	sql := func(text string) error { return u.Command("sqlite3", "-bail", u.Path(sqliteFile), text) }
	u.lab.Progress("SQLite's first query")
	first, err := u.Time(func() error { return sql(update + "SELECT count(*) FROM t WHERE id < 10;") })
	if err != nil {
		return err
	}
	m.first.Add(u.Contender, caseSQLite, first.InSeconds())

	for _, journal := range []struct{ mode, name string }{{"delete", caseSQLite}, {"wal", caseSQLiteWAL}} {
		u.lab.Progress("%s: transactions", journal.name)
		if err := sql("PRAGMA journal_mode = " + journal.mode); err != nil {
			return err
		}
		steady, err := sqliteLoad(u, func() error { return sql(strings.Repeat(update, sqliteBatch)) })
		if err != nil {
			return err
		}
		m.steady.Add(u.Contender, journal.name, steady)
	}
	return u.addUpper(m.upper, caseSQLite)
}

// sqliteLoad runs batches of transactions for the load's time.
func sqliteLoad(u *Union, batch func() error) (Sample, error) {
	var rates []Sample
	for began := time.Now(); time.Since(began) < load(u.lab.Mode()) || len(rates) < 2; {
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
func (u *Union) addUpper(m *Metric, name string) error {
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
	m.Add(u.Contender, name, Sample{Value: float64(n), Allocated: n})
	return nil
}

// MariaDB.

const (
	mariaData    = "data"  // the data directory, below the layer
	mariaUser    = "mysql" // who it belongs to; mariadbd refuses to run as root unless told to
	mariaThreads = 4
)

// A row of sysbench's table takes 240 bytes, its index included.
func mariaRows(m Mode) int64 { return databaseSize(m) / 240 }

func runMariaDB(l *Lab, m *databaseMetrics) error {
	owner, err := mariaOwner()
	if err != nil {
		return err
	}
	unlock, err := letIn(l.scratch, owner)
	if err != nil {
		return err
	}
	defer unlock()
	sockets, err := os.MkdirTemp(l.scratch, "db.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(sockets)
	if err := os.Chown(sockets, owner.uid, owner.gid); err != nil {
		return err
	}
	rows := mariaRows(l.Mode())
	layer := l.Layer("mariadb", func(ctx context.Context, dir string) error { return fillMariaDB(ctx, dir, sockets, owner, rows) })
	for _, c := range l.Contenders() { // what fails here fails for all, and is said once
		if _, err := layer.At(c); err != nil {
			return err
		}
	}
	err = l.Rounds(func(c *Contender) error {
		return l.On(c, Setup{Layer: layer}, func(u *Union) error { return mariaOn(u, sockets, rows, m) })
	})
	return errors.Join(err, l.Drop(layer))
}

func mariaOn(u *Union, sockets string, rows int64, m *databaseMetrics) (err error) {
	if err := u.lab.DropCaches(); err != nil {
		return err
	}
	ctx := u.lab.ctx
	var db *mariaDB
	defer func() {
		if db != nil {
			err = errors.Join(err, db.stop())
		}
	}()
	u.lab.Progress("MariaDB's first query")
	first, err := u.Time(func() error {
		if db, err = startMariaDB(ctx, u.Path(mariaData), sockets); err != nil {
			return err
		}
		return db.query(ctx, "UPDATE sbtest.sbtest1 SET k = k + 1 WHERE id = 1; SELECT k FROM sbtest.sbtest1 WHERE id = 1;")
	})
	if err != nil {
		return err
	}
	spent, err := processCPU(db.cmd.Process.Pid)
	if err != nil {
		return err
	}
	first.ClientCPU += spent.Seconds()
	m.first.Add(u.Contender, caseMariaDB, first.InSeconds())

	u.lab.Progress("MariaDB's transactions")
	seconds, err := db.sysbench(ctx, rows, load(u.lab.Mode()))
	if err != nil {
		return err
	}
	var rates []Sample
	for i, tps := range seconds {
		m.overTime.AddX(u.Contender, float64(i+1), Sample{Value: tps})
		rates = append(rates, Sample{Value: tps})
	}
	m.steady.Add(u.Contender, caseMariaDB, secondHalf(rates))
	stopping := db
	db = nil
	if err := stopping.stop(); err != nil {
		return err
	}
	return u.addUpper(m.upper, caseMariaDB)
}

type owner struct{ uid, gid int }

// mariaOwner is the user that Debian's package makes.
func mariaOwner() (owner, error) {
	u, err := user.Lookup(mariaUser)
	if err != nil {
		return owner{}, fmt.Errorf("MariaDB runs as the user %s: %w: package mariadb-server makes it", mariaUser, err)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	return owner{uid, gid}, errors.Join(err1, err2)
}

// letIn lets others pass through dir, without seeing what is in it, until unlock is called. That they come as far as dir is
// up to the user.
func letIn(dir string, who owner) (unlock func(), err error) {
	for parent := filepath.Dir(dir); parent != "/"; parent = filepath.Dir(parent) {
		var st unix.Stat_t
		if err := unix.Stat(parent, &st); err != nil {
			return nil, err
		}
		may := st.Mode&0o001 != 0 || int(st.Gid) == who.gid && st.Mode&0o010 != 0 || int(st.Uid) == who.uid && st.Mode&0o100 != 0
		if !may {
			return nil, fmt.Errorf("%s cannot be entered by the user %s, as whom MariaDB runs: choose another --dir", parent, mariaUser)
		}
	}
	st, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	return func() { _ = os.Chmod(dir, st.Mode().Perm()) }, os.Chmod(dir, st.Mode().Perm()|0o011)
}

// fillMariaDB makes a data directory with sysbench's table of so many rows in it.
func fillMariaDB(ctx context.Context, dir, sockets string, who owner, rows int64) (err error) {
	data := filepath.Join(dir, mariaData)
	if err := errors.Join(os.Mkdir(data, 0o755), os.Chown(data, who.uid, who.gid)); err != nil {
		return err
	}
	out, err := rival.Run(ctx, "env", "TMPDIR="+sockets, "mariadb-install-db", "--no-defaults", "--user="+mariaUser, "--datadir="+data,
		"--auth-root-authentication-method=normal", "--skip-test-db")
	if err != nil {
		return fmt.Errorf("mariadb-install-db: %s", complaint(out+err.Error()))
	}
	// Loading need not survive a crash. Identities without gaps, as sysbench asks for all of them.
	db, err := startMariaDB(ctx, data, sockets, "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0",
		"--innodb-buffer-pool-size=512M", "--innodb-autoinc-lock-mode=0")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.stop()) }()
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
	return nil
}

// mariaDB is a running server. It is ended by its own id, whatever else runs on the machine.
type mariaDB struct {
	cmd    *exec.Cmd
	socket string
	log    bytes.Buffer // not to be read before gone
	gone   chan struct{}
	err    error // of its exit; not to be read before gone
}

// startMariaDB returns when the server takes connections: on a socket in the directory sockets, nowhere else.
func startMariaDB(ctx context.Context, data, sockets string, options ...string) (*mariaDB, error) {
	db := &mariaDB{socket: filepath.Join(sockets, "db.sock"), gone: make(chan struct{})}
	args := append([]string{"--no-defaults", "--user=" + mariaUser, "--datadir=" + data, "--socket=" + db.socket,
		"--pid-file=" + filepath.Join(sockets, "pid"), "--tmpdir=" + sockets, "--skip-networking", "--skip-log-bin"}, options...)
	db.cmd = exec.Command("mariadbd", args...)
	db.cmd.Stdout, db.cmd.Stderr = &db.log, &db.log
	// In a process group of its own a Ctrl-C reaches us alone, and we stop it in order.
	db.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
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
			return nil, errors.Join(ctx.Err(), db.stop())
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
	}
	err := db.cmd.Process.Kill()
	<-db.gone
	return errors.Join(fmt.Errorf("mariadbd did not shut down in %v, and was killed: %s", patience, complaint(db.log.String())), err)
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
	args := append(db.sysbenchArgs(rows), "--threads="+strconv.Itoa(mariaThreads), "--time="+strconv.Itoa(int(d.Seconds())), "--report-interval=1", "run")
	out, err := rival.Run(ctx, "sysbench", args...)
	if err != nil {
		return nil, err
	}
	rates, err := sysbenchRates(out)
	if err == nil && len(rates) == 0 {
		err = fmt.Errorf("sysbench reported no second: %s", out)
	}
	return rates, err
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
