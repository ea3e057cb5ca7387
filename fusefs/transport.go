package fusefs

import (
	"errors"
	"fmt"
	"log"
	"os"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// transport carries requests to a server and notices to the kernel. Everything that knows what it is carried on is in
// this file; another transport feeds the same server through fuse.NewProtocolServer.
type transport interface {
	name() string
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
	srv  *server
	mnt  string
	root bool // mounted with mount(2), not by fusermount3
}

var _ transport = (*devTransport)(nil)

// mountDev mounts on mnt, an absolute path, and exchanges INIT with the kernel.
func mountDev(srv *server, mnt string, opt *Options) (transport, error) {
	t := &devTransport{srv: srv, mnt: mnt, root: os.Geteuid() == 0}
	srv.dev = t
	o := mountOptions(opt)
	target := mnt
	if t.root {
		fd, err := mountDirect(mnt, opt, o)
		if err != nil {
			return nil, err
		}
		target = fmt.Sprintf("/dev/fd/%d", fd) // go-fuse's notation for a mount that is made already
	} else if len(opt.Contexts) > 0 {
		return nil, fmt.Errorf("option %s: needs a privileged mount", opt.Contexts[0])
	}
	s, err := fuse.NewServer(srv, target, o)
	if err != nil {
		if t.root {
			err = errors.Join(err, unix.Unmount(mnt, unix.MNT_DETACH))
		} else {
			err = fmt.Errorf("fusermount3 (package fuse3) could not mount: %w", err)
		}
		return nil, fmt.Errorf("mount point %s: %w", mnt, err)
	}
	t.Server = s
	t.checkPassthrough()
	return t, nil
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
	if opt.Passthrough == PassthroughOff {
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

// mountDirect mounts with mount(2) and returns the connection's descriptor.
func mountDirect(mnt string, opt *Options, o *fuse.MountOptions) (fd int, err error) {
	fd, err = openDevice()
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	flags := opt.MountFlags
	if opt.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	data := []string{
		fmt.Sprintf("fd=%d", fd),
		"rootmode=40000",
		fmt.Sprintf("user_id=%d,group_id=%d", os.Geteuid(), os.Getegid()),
		"default_permissions",
		fmt.Sprintf("max_read=%d", o.MaxWrite),
	}
	if opt.AllowOther {
		data = append(data, "allow_other")
	}
	data = append(data, opt.Contexts...)
	if err := unix.Mount(opt.FSName, mnt, "fuse."+o.Name, flags, strings.Join(data, ",")); err != nil {
		if errors.Is(err, unix.EINVAL) && len(opt.Contexts) > 0 {
			return -1, fmt.Errorf("mount point %s: %w: does this kernel's security module know %s?", mnt, err, strings.Join(opt.Contexts, ","))
		}
		return -1, fmt.Errorf("mount point %s: %w", mnt, err)
	}
	return fd, nil
}

// fuseDevice is /dev/fuse's number, 10:229 in the kernel's list of devices.
var fuseDevice = unix.Mkdev(10, 229)

// openDevice opens /dev/fuse, and makes sure that it is: a container may have something else in its place, and mount(2)
// would only say EINVAL.
func openDevice() (int, error) {
	const path, remedy = "/dev/fuse", "load the kernel module fuse, or give the container the device"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("%s: %w: %s", path, err, remedy)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != fuseDevice) {
		err = fmt.Errorf("not the FUSE device: %s", remedy)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("%s: %w", path, err)
	}
	return fd, nil
}

func (t *devTransport) checkPassthrough() {
	if t.srv.pass.enabled() && t.KernelSettings().Flags64()&fuse.CAP_PASSTHROUGH == 0 {
		t.srv.pass.disable("the kernel does not offer it: Linux 6.9 with CONFIG_FUSE_PASSTHROUGH does")
	}
}

func (t *devTransport) name() string { return "dev" }

func (t *devTransport) serve() { t.Serve() }

// ready has little to wait for: INIT has been answered, and later requests wait in the kernel until serve reads them. It
// asks the mount for nothing. A process that waits for its own answer cannot be killed: its descriptor of /dev/fuse, whose
// closing would end the wait, is closed when its last thread has died.
func (t *devTransport) ready() error { return t.readAhead() }

// readAheadKB is how far the kernel reads ahead in cached files. Measured on a sequential read of a cached lower file:
// 128 KiB, the kernel's default, is 1.6 times slower, 1 MiB no faster.
const readAheadKB = "512"

// readAhead sets the mount's read-ahead. In a container sysfs may be out of reach; the default stays then.
func (t *devTransport) readAhead() error {
	major, minor, err := deviceOf(t.mnt)
	if err != nil {
		return err
	}
	knob := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", major, minor)
	if err := os.WriteFile(knob, []byte(readAheadKB), 0); err != nil && t.srv.opt.Debug {
		t.srv.opt.Logf("read-ahead stays at the kernel's default: %v", err)
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
	if !t.root {
		return t.Unmount()
	}
	return unix.Unmount(t.mnt, 0)
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
