package fusefs

import (
	"errors"
	"fmt"
	"log"
	"os"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"lamina/uring"
)

// transport carries requests to a server and notices to the kernel. What knows how is in this file, for /dev/fuse, and in
// transport_uring.go.
type transport interface {
	name() string
	// fallback is the reason why a better transport is not used, nil if there is none.
	fallback() error
	// rings tells about the threads and buffers; nil where there are none.
	rings() *uring.Stats
	// serve returns when the mount is gone and the last request is answered.
	serve()
	// ready returns once requests are answered. It must not send one itself.
	ready() error
	// unmount takes the mount away; serve then returns.
	unmount() error

	registerBacking(fd int) (int32, error)
	unregisterBacking(id int32)
	// invalAttr makes the kernel ask for a node's attributes again. It may be called while answering a request.
	invalAttr(id uint64)
	// prune makes the kernel look the unused names of a node up again. It must not be called while answering a request:
	// the kernel may hold a lock on the directory that it needs.
	prune(id uint64)
	// forgetEntry makes the kernel look a name up again. It must not be called while answering a request either.
	forgetEntry(dir uint64, name string)
}

// capabilities beyond those that go-fuse asks for by itself.
const capabilities = fuse.CAP_ATOMIC_O_TRUNC | // truncation comes with the OPEN, before anything is copied up
	fuse.CAP_DONT_MASK | // a default ACL decides instead of the umask
	fuse.CAP_HANDLE_KILLPRIV_V2 | // no GETXATTR before every write
	fuse.CAP_SETXATTR_EXT | // tells when an ACL must clear the set-group-id bit
	fuse.CAP_READDIRPLUS_AUTO | // attributes with names only where somebody asks for them
	fuse.CAP_ASYNC_DIO |
	fuse.CAP_DIRECT_IO_ALLOW_MMAP

// maxInflight bounds the memory, in bytes, of requests being worked on: a storm of BATCH_FORGET must not exhaust it.
const maxInflight = 64 << 20

// maxBackground is how many requests the kernel sends ahead of anybody waiting: read-ahead, write-back, asynchronous I/O.
const maxBackground = 64

// devTransport serves over /dev/fuse.
type devTransport struct {
	*fuse.Server
	srv     *server
	mnt     string
	root    bool // mounted with mount(2), not by fusermount3
	options *fuse.MountOptions
	reason  error // why it is this transport, if another was to be preferred
}

var _ transport = (*devTransport)(nil)

// connect mounts on mnt, an absolute path, exchanges INIT with the kernel and chooses the transport. On an error nothing
// is mounted.
func connect(srv *server, mnt string, opt *Options) (transport, error) {
	if opt.Survive != nil {
		return connectKept(srv, mnt, opt)
	}
	rings, reason, err := openRings(opt)
	if err != nil {
		return nil, err
	}
	t, fd, err := mountDev(srv, mnt, opt, rings)
	if err != nil {
		if rings != nil {
			rings.Close()
		}
		return nil, err
	}
	if rings == nil {
		t.reason = reason
		return t, nil
	}
	defer rings.Close()
	return t.overRings(rings, fd, opt)
}

// mountDev mounts and answers INIT, promising io_uring if there are rings. fd is the connection's descriptor; it is the
// transport's to close.
func mountDev(srv *server, mnt string, opt *Options, rings *uring.Pool) (t *devTransport, fd int, err error) {
	t = &devTransport{srv: srv, mnt: mnt, root: os.Geteuid() == 0}
	srv.dev = t
	o := mountOptions(opt)
	if rings != nil {
		o.ExtraCapabilities |= fuse.CAP_OVER_IO_URING
	}
	if t.root {
		fd, err = mountDirect(mnt, opt, o)
	} else if len(opt.Contexts) > 0 {
		err = fmt.Errorf("option %s: needs a privileged mount", opt.Contexts[0])
	} else {
		fd, err = mountByHelper(mnt, opt, o)
	}
	if err != nil {
		return nil, -1, err
	}
	// go-fuse's notation for a mount that is made already.
	if t.Server, err = fuse.NewServer(srv.answers, fmt.Sprintf("/dev/fd/%d", fd), o); err != nil {
		return nil, -1, errors.Join(fmt.Errorf("mount point %s: %w", mnt, err), t.detach())
	}
	t.options = o
	t.checkPassthrough()
	return t, fd, nil
}

func mountOptions(opt *Options) *fuse.MountOptions {
	o := &fuse.MountOptions{
		AllowOther:               opt.AllowOther,
		Options:                  []string{"default_permissions"},
		FsName:                   opt.FSName,
		Name:                     "lamina",
		MaxWrite:                 opt.MaxWrite,
		MaxBackground:            maxBackground,
		MaxInflightRequestBytes:  maxInflight,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		EnableAcl:                opt.ACL,
		IDMappedMount:            true,
		MaxStackDepth:            opt.MaxStackDepth,
		DisableSplice:            true, // measured: pread(2) into a warm buffer is as fast, and needs no pipes
		ExtraCapabilities:        capabilities,
		Debug:                    opt.Debug,
		Logger:                   log.New(logWriter(opt.Logf), "", 0),
	}
	if opt.Passthrough == PassthroughOff || opt.NoPassthrough != "" {
		o.DisabledCapabilities = fuse.CAP_PASSTHROUGH
	}
	if opt.ReadOnly {
		o.Options = append(o.Options, "ro")
	}
	return o
}

// logWriter hands go-fuse's lines to Logf.
type logWriter func(format string, args ...any)

func (w logWriter) Write(p []byte) (int, error) {
	w("fuse: %s", strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

func (t *devTransport) checkPassthrough() {
	if t.srv.pass.enabled() && t.KernelSettings().Flags64()&fuse.CAP_PASSTHROUGH == 0 {
		t.srv.pass.disable("the kernel does not offer it: Linux 6.9 with CONFIG_FUSE_PASSTHROUGH does")
	}
}

func (t *devTransport) name() string { return "dev" }

func (t *devTransport) fallback() error { return t.reason }

func (t *devTransport) rings() *uring.Stats { return nil }

func (t *devTransport) serve() { t.Serve() }

// ready has little to wait for: INIT has been answered, and later requests wait in the kernel until serve reads them. It
// asks the mount for nothing. A process that waits for its own answer cannot be killed: its descriptor of /dev/fuse, whose
// closing would end the wait, is closed when its last thread has died.
func (t *devTransport) ready() error { return setReadAhead(t.mnt, &t.srv.opt) }

// readAheadKB is how far the kernel reads ahead in cached files. Measured on a sequential read of a cached lower file:
// 128 KiB, the kernel's default, is 1.6 times slower, 1 MiB no faster.
const readAheadKB = "512"

// setReadAhead sets a mount's read-ahead. In a container sysfs may be out of reach; the default stays then.
func setReadAhead(mnt string, opt *Options) error {
	major, minor, err := deviceOf(mnt)
	if err != nil {
		return err
	}
	knob := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", major, minor)
	if err := os.WriteFile(knob, []byte(readAheadKB), 0); err != nil && opt.Debug {
		opt.Logf("read-ahead stays at the kernel's default: %v", err)
	}
	return nil
}

// deviceOf tells the number of the filesystem at path from what the kernel has cached, without asking its server.
func deviceOf(path string) (major, minor uint32, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return 0, 0, err
	}
	return st.Dev_major, st.Dev_minor, nil
}

func (t *devTransport) unmount() error {
	if t.root {
		return unix.Unmount(t.mnt, 0)
	}
	return helper(t.mnt, "-u")
}

// detach takes away a mount that does not work.
func (t *devTransport) detach() error {
	if t.root {
		return unix.Unmount(t.mnt, unix.MNT_DETACH)
	}
	return helper(t.mnt, "-u", "-z")
}

func (t *devTransport) registerBacking(fd int) (int32, error) {
	id, errno := t.RegisterBackingFd(&fuse.BackingMap{Fd: int32(fd)})
	if errno != 0 {
		return 0, unix.Errno(errno)
	}
	return id, nil
}

func (t *devTransport) unregisterBacking(id int32) {
	if errno := t.UnregisterBackingFd(id); errno != 0 && errno != unix.EBADF {
		t.srv.opt.Logf("passthrough: unregistering backing file %d: %v", id, errno)
	}
}

// invalAttr: a negative offset leaves the pages alone.
func (t *devTransport) invalAttr(id uint64) { t.InodeNotify(id, -1, 0) }

func (t *devTransport) forgetEntry(dir uint64, name string) { t.EntryNotify(dir, name) }

func (t *devTransport) prune(id uint64) { t.PruneNotify([]uint64{id}) }
