package fusefs

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"lamina/uring"
)

// When INIT has promised io_uring and nothing comes of it, auto goes on over /dev/fuse and says so once, and uring takes
// the mount away again, with all that belongs to it.
func TestPromisedRingsAreRefused(t *testing.T) {
	for _, transport := range []Transport{TransportAuto, TransportUring} {
		t.Run(map[Transport]string{TransportAuto: "auto", TransportUring: "uring"}[transport], func(t *testing.T) {
			before := descriptors()
			var log logLines
			opt := Options{Transport: transport, Logf: log.add}
			must(t, opt.setDefaults())
			srv := newServer(nil, opt)
			srv.answers = fuse.NewDefaultRawFileSystem()
			dir := t.TempDir()
			rings, reason, err := openRings(&srv.opt)
			must(t, errors.Join(err, reason))
			dev, fd, err := mountDev(srv, dir, &srv.opt, rings)
			must(t, err)
			dev.options.SingleThreaded = true // which cannot be had
			carrier, err := dev.overRings(rings, fd, &srv.opt)
			rings.Close()
			if transport == TransportUring {
				if !errors.Is(err, uring.ErrNotSupported) || !strings.Contains(err.Error(), "transport=uring: ") {
					t.Errorf("overRings: %v", err)
				}
				if isMounted(t, dir) {
					t.Error("something is left mounted")
				}
			} else {
				must(t, err)
				if n := log.count("requests come over /dev/fuse"); n != 1 || carrier.name() != "dev" || carrier.fallback() == nil {
					t.Errorf("said %d times, transport %s because of %v", n, carrier.name(), carrier.fallback())
				}
				ended := make(chan struct{})
				go func() { defer close(ended); carrier.serve() }()
				if err := unix.Access(dir+"/x", 0); !errors.Is(err, unix.ENOSYS) {
					t.Errorf("a file system that has no LOOKUP answers %v", err)
				}
				must(t, carrier.unmount())
				select {
				case <-ended:
				case <-time.After(20 * time.Second):
					t.Fatal("the server does not end")
				}
			}
			eventually(t, "all descriptors are closed", func() bool {
				for fd := range descriptors() {
					if !before[fd] {
						return false
					}
				}
				return true
			})
		})
	}
}

func isMounted(t *testing.T, dir string) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	return strings.Contains(string(b), " "+dir+" ")
}

// Whoever has mounted on the directory since keeps what he has mounted there.
func TestUnmountSparesOthers(t *testing.T) {
	r := newRig(t, Options{}, func(lower string) { must(t, os.WriteFile(lower+"/f", []byte("data"), 0o644)) })
	precious := r.path("precious")
	cover := func() {
		t.Helper()
		must(t, unix.Mount("other", r.mnt, "tmpfs", 0, ""))
		must(t, os.WriteFile(precious, nil, 0o600))
	}
	uncover := func() {
		t.Helper()
		if _, err := os.Stat(precious); err != nil {
			t.Fatalf("somebody else's mount is gone: %v", err)
		}
		must(t, unix.Unmount(r.mnt, 0))
	}
	cover()
	if err := r.Unmount(); !errors.Is(err, ErrCovered) {
		t.Errorf("unmounting a covered mount: %v", err)
	}
	uncover()

	fd, err := unix.Open(r.path("f"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	must(t, unix.Unmount(r.mnt, unix.MNT_DETACH))
	cover()
	if err := r.Unmount(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("unmounting a detached mount: %v", err)
	}
	if n, err := unix.Pread(fd, make([]byte, 4), 0); n != 4 || err != nil {
		t.Errorf("reading from the detached mount: %d, %v", n, err)
	}
	unix.Close(fd)
	r.Wait()
	must(t, r.Unmount())
	uncover()
}
