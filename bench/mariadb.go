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

	"lamina/bench/rival"
)

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

// sysbenchResult is what sysbench did.
type sysbenchResult struct {
	rates        []float64 // transactions of each second
	transactions float64   // all of them
}

func (db *mariaDB) sysbench(ctx context.Context, rows int64, d time.Duration) (r sysbenchResult, err error) {
	seconds := int(d.Seconds())
	// It does not always report the last one.
	args := append(db.sysbenchArgs(rows), "--threads="+strconv.Itoa(mariaThreads), "--time="+strconv.Itoa(seconds+1), "--report-interval=1", "run")
	out, err := rival.Run(ctx, "sysbench", args...)
	if err != nil {
		return r, err
	}
	if r, err = parseSysbench(out); err != nil {
		return r, err
	}
	if len(r.rates) < seconds || r.transactions == 0 {
		return r, fmt.Errorf("sysbench reported %d seconds of %d, and %.0f transactions: %s", len(r.rates), seconds, r.transactions, out)
	}
	r.rates = r.rates[:seconds]
	return r, nil
}

// parseSysbench reads the lines "[ 1s ] thds: 4 tps: 627.04 qps: ..." and "transactions: 2813 (702.19 per sec.)".
func parseSysbench(out string) (r sysbenchResult, err error) {
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if _, rest, ok := strings.Cut(line, " tps: "); ok && strings.HasPrefix(line, "[") {
			var tps float64
			if tps, err = firstNumber(rest); err == nil {
				r.rates = append(r.rates, tps)
			}
		} else if rest, ok := strings.CutPrefix(line, "transactions:"); ok {
			r.transactions, err = firstNumber(rest)
		}
		if err != nil {
			return r, fmt.Errorf("sysbench said %q: %w", line, err)
		}
	}
	return r, nil
}

func firstNumber(s string) (float64, error) {
	number, _, _ := strings.Cut(strings.TrimSpace(s), " ")
	return strconv.ParseFloat(number, 64)
}
