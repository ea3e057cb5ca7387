package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"lamina/snapshotter"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

func snapshotterCommand() *cobra.Command {
	c := snapshotter.Config{}
	var address string
	cmd := &cobra.Command{
		Use:   "snapshotter --root DIR --address SOCKET [-o OPTION[,OPTION...]]",
		Short: "keep the layers of containers for containerd",
		Long: `Serves containerd (1.6 and later) as a proxy plugin for snapshots: containers run on Lamina, images are unpacked as they
are. containerd finds it by an entry in /etc/containerd/config.toml:

  [proxy_plugins.lamina]
    type = "snapshot"
    address = "/run/lamina/snapshotter.sock"

The mounts of running containers are in servers of their own (lamina serve), one for each pool, which is a containerd
namespace unless the label containerd.io/snapshot/lamina.pool names another one. They go on when the snapshotter is
stopped, killed or replaced, and the next one finds them. SIGTERM and SIGINT end the snapshotter.`,
		Example: `  lamina snapshotter --root /var/lib/lamina --address /run/lamina/snapshotter.sock
  ctr run --snapshotter lamina docker.io/library/busybox:latest test true`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			lg := newStderrLog()
			c.Logf = lg.printf
			return withCode(exitFailure, serveSnapshotter(c, address))
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&c.Root, "root", "/var/lib/lamina", "where the layers are kept: a directory on ext4, XFS or btrfs")
	fs.StringVar(&address, "address", "/run/lamina/snapshotter.sock", "the unix socket that containerd connects to")
	fs.StringArrayVarP(&c.Options, "options", "o", nil, "mount options of every container, comma-separated; may be given several times (see lamina-mount(8))")
	fs.BoolVar(&c.Direct, "direct", false, "let containerd mount containers by mount.fuse3, with a server for each, instead of in pools")
	fs.BoolVar(&c.RemapIDs, "remap-ids", false, "show owners as a container's user namespace has them; containerd 2's configuration must say so too (capabilities = [\"remap-ids\"])")
	fs.BoolVar(&c.Survive, "survive", false, "containers outlive the server of their pool: when it is killed another takes over their mounts (see lamina serve)")
	fs.StringVar(&c.Cgroup, "pool-cgroup", "", "the directory of the cgroup that pool servers start in; empty: this command's own")
	return cmd
}

func serveSnapshotter(c snapshotter.Config, address string) error {
	l, release, err := snapshotterSocket(address)
	if err != nil {
		return err
	}
	defer release()
	s, err := snapshotter.New(c)
	if err != nil {
		l.Close()
		return err
	}
	rpc := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(rpc, snapshotservice.FromSnapshotter(s))
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	_, _ = daemon.SdNotify(true, daemon.SdNotifyReady) // systemd, if it waits for that
	context.AfterFunc(ctx, func() {
		time.AfterFunc(stopPatience, rpc.Stop)
		rpc.GracefulStop()
	})
	err = rpc.Serve(l)
	return errors.Join(err, s.Close())
}

// stopPatience is how long requests that were begun may go on.
const stopPatience = 10 * time.Second

// snapshotterSocket is the socket that systemd has handed over, with whoever has connected to it meanwhile, or a new one.
func snapshotterSocket(address string) (net.Listener, func(), error) {
	given, err := activation.Listeners()
	if err != nil || len(given) == 0 {
		return listenAt(address)
	}
	if len(given) > 1 || given[0] == nil || given[0].Addr().String() != address {
		return nil, nil, fmt.Errorf("address %s: systemd has handed over another socket: name the same one in the socket unit and in --address", address)
	}
	return given[0], func() {}, nil
}

// listenAt listens on a unix socket. One that a living process listens on is refused; a stale one is taken over.
func listenAt(address string) (net.Listener, func(), error) {
	fail := func(err error) (net.Listener, func(), error) {
		return nil, nil, fmt.Errorf("address %s: %w", address, err)
	}
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return fail(err)
	}
	lock, err := os.OpenFile(address+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fail(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("another lamina listens on it: end that first, or use another address")
		}
		return fail(err)
	}
	if conn, err := net.Dial("unix", address); err == nil {
		conn.Close()
		lock.Close()
		return fail(errors.New("a process listens on it: end that first, or use another address"))
	}
	var st unix.Stat_t
	if err := unix.Lstat(address, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		lock.Close()
		return fail(errors.New("is there, and no socket: use another address"))
	}
	_ = os.Remove(address)
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", address)
	unix.Umask(old)
	if err != nil {
		lock.Close()
		return fail(err)
	}
	return l, func() { lock.Close() }, nil
}
