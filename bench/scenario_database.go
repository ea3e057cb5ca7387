package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

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
	Contenders: []string{"plain", "overlayfs", "overlayfs-volatile", "fuse-overlayfs", "lamina", "floor"},
	Quick:      []string{"plain", "overlayfs", "lamina", "floor"},
	Tools:      []Tool{{"sqlite3", "sqlite3"}, {"mariadbd", "mariadb-server-core"}, {"mariadb-install-db", "mariadb-server-core"}, {"mariadb", "mariadb-client-core"}, {"sysbench", "sysbench"}, {"setpriv", "util-linux"}},
	// Of each database: the layer, the plain copy, a whole copy-up, journals.
	Space:  func(m Mode) int64 { return databaseSize(m)*7 + gib },
	Weight: 300,
	Run:    runDatabase,
}

// databaseSize is about how large the one big file of each database is, in bytes.
func databaseSize(m Mode) int64 { return Pick[int64](m, 32*mib, 128*mib, gib) }

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
	return runDatabases(l, databaseSize(l.Mode()), Pick(l.Mode(), 2*time.Second, 6*time.Second, 14*time.Second))
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
	if c.kind == floorFS {
		return nil // SQLite tells enough
	}
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
	steady, err := d.mariaLoad(u, db)
	if err != nil {
		return err
	}
	d.steady.Add(u.Contender, caseMariaDB, steady)
	if err := db.stop(); err != nil {
		return err
	}
	return d.addUpper(u, caseMariaDB)
}

// mariaLoad runs sysbench, and sums its second half up. CPU times are those of a transaction, over all of them.
func (d *databases) mariaLoad(u *Union, db *mariaDB) (Sample, error) {
	before, err := processCPU(db.cmd.Process.Pid)
	if err != nil {
		return Sample{}, err
	}
	var did sysbenchResult
	whole, err := u.Time(func() (err error) {
		did, err = db.sysbench(d.ctx, d.mariaRows(), d.load)
		return err
	})
	if err != nil {
		return whole, err
	}
	after, err := processCPU(db.cmd.Process.Pid)
	if err != nil {
		return whole, err
	}
	var rates []Sample
	for i, tps := range did.rates {
		d.overTime.AddX(u.Contender, float64(i+1), Sample{Value: tps})
		rates = append(rates, Sample{Value: tps})
	}
	steady := secondHalf(rates)
	steady.PeakMemory = whole.PeakMemory
	steady.ServerCPU = whole.ServerCPU / did.transactions
	steady.ClientCPU = (whole.ClientCPU + (after - before).Seconds()) / did.transactions
	return steady, nil
}
