package containerd

import (
	"fmt"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/engine"
	"lamina/pool"
)

// records is how many records writer and holder go round in.
const records = 8000

// holder does what writer does through one descriptor that it never closes.
const holder = `use IO::Handle; $| = 1;
open(my $f, "+<", "/srv/big.log") or die "FAILED open: $!\n";
sub get { my ($n, $s) = @_; sysseek($f, $n * 4088, 0); my $r = sysread($f, $s, 8); defined $r && $r == 8 ? $s : "error: $!" }
for (my $n = 0;; $n = ($n + 1) % 8000) {
	sysseek($f, $n * 4088, 0) or print "FAILED seek $n: $!\n";
	my $r = syswrite($f, sprintf("%08d", $n));
	defined $r && $r == 8 or print "FAILED write $n: $!\n";
	$f->sync or print "FAILED fsync $n: $!\n";
	if ($n >= 10) { my $o = $n - 10; my $s = get($o); $s == $o or print "FAILED $o is $s\n" }
	print "$n\n";
}`

// lost prints which of the first records are not what was written.
const lost = `open(my $f, "<", "/srv/big.log") or die "open: $!\n";
for (my $n = 0; $n < $ARGV[0]; $n++) {
	my $s = ""; sysseek($f, $n * 4088, 0); my $r = sysread($f, $s, 8);
	print "$n is $s ($!)\n" unless defined $r && $s eq sprintf("%08d", $n);
}`

// server is the process that serves the engine's pool.
func (r *rig) server() int {
	r.t.Helper()
	sockets, err := filepath.Glob(filepath.Join(r.Dir, "lamina", "run", "*.sock"))
	r.must(err)
	if len(sockets) != 1 {
		r.t.Fatalf("pools' sockets: %q, not one", sockets)
	}
	c := pool.Client{Socket: sockets[0]}
	defer c.Close()
	reply, err := c.Do(r.ctx, pool.Request{Op: pool.OpList})
	r.must(err)
	return reply.PID
}

// With --survive, a pool's server is killed again and again while containers write and sync, one that opens its file each
// time and one that keeps it open. They see no error; what they have written is there, in the container and in its commit.
func TestServerIsKilled(t *testing.T) {
	r := start(t, engine.Config{Args: []string{"--survive"}})
	image := r.image(engine.Lamina)
	var writers []*engine.Container
	for name, args := range map[string][]string{"opens": {"sh", "-c", writer}, "holds": {"perl", "-e", holder}} {
		c, err := r.Run(r.ctx, engine.Spec{ID: name, Image: image, Snapshotter: engine.Lamina, Args: args})
		r.must(err)
		r.must(c.Check())
		writers = append(writers, c)
	}
	all := func() {
		t.Helper()
		for _, c := range writers {
			r.goesOn(c)
		}
	}
	check := func(c *engine.Container, n int) {
		t.Helper()
		r.says(c, fmt.Sprintf("perl -e '%s' %d", lost, min(n, records)), "")
	}
	all()
	for i := range 4 {
		server := r.server()
		r.must(unix.Kill(server, unix.SIGKILL))
		if i%2 == 1 { // whoever restarts the snapshotter at that moment finds the successor
			r.must(r.KillSnapshotter())
			r.must(r.StartSnapshotter(r.ctx))
		}
		all()
		r.eventually("a successor serves", func() bool { return r.server() != server })
		fresh := r.sleeper(image, engine.Lamina, "fresh")
		r.says(fresh, "cat /srv/tree/a", "a")
		r.must(fresh.Remove(r.ctx))
		for _, c := range writers {
			check(c, r.written(c))
		}
	}
	for _, c := range writers {
		r.must(c.Stop(r.ctx))
		n := r.written(c)
		committed, err := r.Commit(r.ctx, c, "debian.test/"+c.ID()+":1")
		r.must(err)
		r.must(c.Delete(r.ctx))
		check(r.sleeper(committed, engine.Lamina, c.ID()+"-committed"), n)
	}
}
