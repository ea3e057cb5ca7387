package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"lamina/bench/engine"
	"lamina/bench/report"
)

var containerWeb = Scenario{
	Name:  "container-nginx",
	Title: "nginx, whose log came with the image",
	Describes: "The image's topmost layer holds nginx's access log of 1 GiB (64 MiB in a quick run). With nothing in memory a container is asked for; " +
		"counted is the time until nginx has answered its first request, which it logs.",
	Contenders: containerNames, Tools: slices.Concat(containerTools, []Tool{{"nginx", "nginx-light"}}),
	Space:  func(m Mode) int64 { return commitSize(m)*6 + gib },
	Weight: 3,
	Run:    func(l *Lab) error { return l.withContainers((*containers).web) },
}

// inside is where a container finds the directory of its sockets.
const inside = "/run/sockets"

func (b *containers) web() error {
	size := commitSize(b.Mode())
	m := b.Metric(report.Metric{Name: "start to first response", Unit: report.Seconds, LessIsBetter: true, Log: true})
	const conf = `daemon off; user root; worker_processes 1; error_log /var/log/nginx/error.log; pid /run/nginx.pid;
events {}
http { access_log /var/log/nginx/access.log; server { listen unix:` + inside + `/web; location / { return 200 "hello\n"; } } }
`
	image, err := b.image("nginx", nil, skeleton("nginx"), func(ctx context.Context, root string) error {
		for _, d := range []string{"etc/nginx", "var/lib/nginx", "var/log/nginx"} {
			if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
				return err
			}
		}
		return errors.Join(os.WriteFile(filepath.Join(root, "etc/nginx/nginx.conf"), []byte(conf), 0o644),
			writeRandom(filepath.Join(root, "var/log/nginx/access.log"), size))
	})
	if err != nil {
		return err
	}
	return errors.Join(b.Rounds(func(c *Contender) error {
		if err := b.cold(); err != nil {
			return err
		}
		return b.serve(c, image, "web", []string{lookTool("nginx"), "-c", "/etc/nginx/nginx.conf"}, nil, func(began time.Time, socket string) error {
			if err := firstResponse(b.ctx, socket); err != nil {
				return err
			}
			m.Add(c, "", seconds(time.Since(began)))
			return nil
		})
	}), b.figure(func() {
		m.lessThanOverlay("x faster than overlayfs: nginx with a big log, start to first response", "", 5)
	}))
}

// serve starts a container with a directory for sockets, waits until its program listens on the socket name there and
// hands f the socket's path, and the time at which the container was asked for. The container is removed after that.
func (b *containers) serve(c *Contender, image client.Image, name string, args []string, opts []oci.SpecOpts, f func(began time.Time, socket string) error) (err error) {
	dir, err := os.MkdirTemp(b.dir, "s.")
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		return err
	}
	opts = append(opts, oci.WithMounts([]specs.Mount{{Type: "bind", Source: dir, Destination: inside, Options: []string{"rbind", "rw"}}}))
	began := time.Now()
	box, err := b.Run(b.ctx, engine.Spec{ID: b.id(), Image: image, Snapshotter: c.Name, Args: args, Options: opts})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			out, _ := box.Output()
			err = fmt.Errorf("%w: the container said: %s", err, complaint(out))
		}
		err = errors.Join(err, box.Remove(context.WithoutCancel(b.ctx)))
	}()
	socket := filepath.Join(dir, name)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
			return f(began, socket)
		}
		select {
		case <-b.ctx.Done():
			return b.ctx.Err()
		case <-time.After(time.Millisecond):
		}
		if time.Since(began) > patience {
			return fmt.Errorf("nobody listens on %s after %v", socket, patience)
		}
	}
}

// firstResponse asks for a page.
func firstResponse(ctx context.Context, socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprint(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	r, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return fmt.Errorf("nginx answers %s", r.Status)
	}
	return ctx.Err()
}

var containerDatabase = Scenario{
	Name:  "container-mariadb",
	Title: "MariaDB, whose data came with the image",
	Describes: "The image's topmost layer is a MariaDB data directory with one table that is most of it: 2 GiB (64 MiB in a quick run). With nothing in " +
		"memory a container is asked for; counted is the time until the server has answered a query that updates a row. Then come sysbench's " +
		"oltp_read_write with 4 threads: the transactions of the first 10 s after the container was asked for, in which its start is included, and the " +
		"median rate over the second half of the time after them. MariaDB's settings are its own defaults.",
	Contenders: containerNames, Tools: slices.Concat(containerTools, database.Tools),
	Space:  func(m Mode) int64 { return imageDatabase(m)*7 + 2*gib },
	Weight: 10,
	Run:    func(l *Lab) error { return l.withContainers((*containers).mariadb) },
}

func imageDatabase(m Mode) int64 { return Pick[int64](m, 64*mib, 2*gib, 2*gib) }

func (b *containers) mariadb() (err error) {
	first := b.Metric(report.Metric{Name: "time to the first query", Unit: report.Seconds, LessIsBetter: true, Log: true})
	early := b.Metric(report.Metric{Name: "transactions in the first 10 s", Unit: "transactions"})
	steady := b.Metric(report.Metric{Name: "transactions a second, steady", Unit: report.PerSecond})
	overTime := b.Metric(report.Metric{Name: "transactions a second since the first query", Unit: report.PerSecond, Chart: report.Lines, XName: "seconds", Aside: true})
	upper := b.Metric(report.Metric{Name: "the container's own bytes afterwards", Unit: report.Bytes, LessIsBetter: true, Log: true})
	rows := imageDatabase(b.Mode()) / mariaRow
	who, err := unprivileged()
	if err != nil {
		return err
	}
	var locks []func() error
	defer func() {
		for _, lock := range locks {
			err = errors.Join(err, lock())
		}
	}()
	for _, dir := range []string{b.scratch, b.dir} {
		lock, err := letIn(dir, who)
		if err != nil {
			return err
		}
		locks = append(locks, lock)
	}
	image, err := b.image("mariadb", nil, func(ctx context.Context, root string) error {
		if err := skeleton("mariadbd")(ctx, root); err != nil {
			return err
		}
		return engine.Files(ctx, root, "/usr/share/mysql")
	}, func(ctx context.Context, root string) error {
		sockets, err := os.MkdirTemp(b.dir, "db.")
		if err != nil {
			return err
		}
		defer os.RemoveAll(sockets)
		if err := os.Chown(sockets, int(who.Uid), int(who.Gid)); err != nil {
			return err
		}
		return fillMariaDB(ctx, root, sockets, rows)
	})
	if err != nil {
		return err
	}
	args := []string{lookTool("mariadbd"), "--no-defaults", "--datadir=/" + mariaData, "--socket=" + inside + "/db.sock", "--pid-file=" + inside + "/pid",
		"--tmpdir=/tmp", "--skip-networking", "--skip-log-bin"}
	window, load := 10*time.Second, Pick(b.Mode(), 4*time.Second, 30*time.Second, 60*time.Second)
	return errors.Join(b.Rounds(func(c *Contender) error {
		if err := b.cold(); err != nil {
			return err
		}
		b.Progress("the first query")
		return b.serve(c, image, "db.sock", args, []oci.SpecOpts{oci.WithUIDGID(who.Uid, who.Gid)}, func(began time.Time, socket string) error {
			db := &mariaDB{socket: socket}
			if err := db.query(b.ctx, "UPDATE sbtest.sbtest1 SET k = k + 1 WHERE id = 1; SELECT k FROM sbtest.sbtest1 WHERE id = 1;"); err != nil {
				return err
			}
			took := time.Since(began)
			first.Add(c, "", seconds(took))
			b.Progress("transactions")
			did, err := db.sysbench(b.ctx, rows, max(window-took, 0).Truncate(time.Second)+time.Second+load)
			if err != nil {
				return err
			}
			var within float64
			var later []Sample
			for i, tps := range did.rates {
				overTime.AddX(c, float64(i+1), Sample{Value: tps})
				from := took + time.Duration(i)*time.Second
				within += tps * min(max((window-from).Seconds(), 0), 1)
				if from >= window {
					later = append(later, Sample{Value: tps})
				}
			}
			early.Add(c, "", Sample{Value: within})
			steady.Add(c, "", secondHalf(later))
			usage, err := b.Client.SnapshotService(c.Name).Usage(b.ctx, fmt.Sprintf("c%d", b.serial))
			if err != nil {
				return err
			}
			upper.Add(c, "", Sample{Value: float64(usage.Size), Allocated: usage.Size})
			return nil
		})
	}), b.figure(func() {
		first.lessThanOverlay(fmt.Sprintf("x faster than overlayfs to the first query: MariaDB image, %d MiB of data", imageDatabase(b.Mode())/mib), "", 5)
		early.RatioAtLeast("x overlayfs's transactions in the first 10 s", Of{engine.Lamina, ""}, Of{engine.Overlay, ""}, 1.2)
		steady.RatioAtLeast("x overlayfs's transactions a second, steady", Of{engine.Lamina, ""}, Of{engine.Overlay, ""}, 0.9)
	}))
}
