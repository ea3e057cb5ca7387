// Package fusefs speaks the union tree to the kernel in FUSE and decides which opens pass through.
//
// # What is cached where
//
// Lamina alone changes its tree, so the kernel may keep everything it was told: names (also absent ones), attributes,
// link targets, directories and file pages have no time limit. What makes them invalid is always an operation that came
// through this mount, and the kernel invalidates its caches itself when it sends one. The exceptions are listed where
// they are dealt with: iomode.go.
//
// # Messages that are never sent
//
// OPENDIR, FLUSH, ACCESS, POLL and STATX are answered with ENOSYS once; the kernel then goes without for the life of the
// mount. OPEN cannot be: its answer carries the backing file.
//
// # Errors
//
// An ENOSYS that came up from a layer's filesystem would switch an operation off for the whole mount, and an EINTR would
// surface in applications that do not expect it from a local file, so neither ever leaves this package unless it was
// meant (status in errno.go). Interrupts are ignored: all work is local and short.
package fusefs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"lamina/union"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Passthrough says which files the kernel may read and write without asking the server (Linux 6.9).
type Passthrough uint8

const (
	// PassthroughAuto passes through what loses nothing by it: complete files of the upper layer; lower files that are
	// executable images (ELF); and every file when there is no upper layer.
	PassthroughAuto Passthrough = iota
	// PassthroughOn passes through every read-only open of a lower file as well. A descriptor opened before the file's
	// first write keeps showing the old bytes, as it does on kernel overlayfs.
	PassthroughOn
	// PassthroughOff sends every read and write to the server.
	PassthroughOff
)

func (p Passthrough) String() string {
	switch p {
	case PassthroughAuto:
		return "auto"
	case PassthroughOn:
		return "on"
	case PassthroughOff:
		return "off"
	}
	return fmt.Sprintf("Passthrough(%d)", uint8(p))
}

// Transport says how requests reach the server.
type Transport uint8

const (
	// TransportAuto uses io_uring where the kernel has it for FUSE (Linux 6.14), switching it on if that is allowed, and
	// otherwise /dev/fuse.
	TransportAuto Transport = iota
	// TransportUring insists on io_uring.
	TransportUring
	// TransportDev uses /dev/fuse.
	TransportDev
)

// Options of a mount. The zero value mounts for the mounting user only, with everything on that the kernel offers.
type Options struct {
	// FSName is the source in the mount table. Empty: "lamina".
	FSName string
	// AllowOther lets other users than the mounting one in. A container's root filesystem needs it.
	AllowOther bool
	// ReadOnly makes the mount read-only. A union without an upper layer always is.
	ReadOnly bool
	// MountFlags are MS_* flags of mount(2), such as MS_NOSUID, MS_NODEV, MS_NOATIME. An unprivileged mount always gets
	// MS_NOSUID and MS_NODEV.
	MountFlags uintptr
	// Contexts are the LSM's mount options, passed on as they are: context=, fscontext=, defcontext=, rootcontext=.
	// They need a privileged mount.
	Contexts []string
	// Passthrough, see there.
	Passthrough Passthrough
	// NoPassthrough is why there can be none, if that is known beforehand; it is logged and told in the status. Empty: the
	// kernel will say.
	NoPassthrough string
	// Transport, see there.
	Transport Transport
	// MaxStackDepth is 1 (the zero value) or 2. 2 lets backing files lie on overlayfs, but no overlayfs can be stacked
	// on the mount then.
	MaxStackDepth int
	// IDs translates owners between the layers and the mount. Zero: as they are.
	IDs IDMap
	// ACL makes the kernel check POSIX ACLs.
	ACL bool
	// MaxWrite is the largest request in bytes. Zero: 1 MiB; the kernel's limit caps it.
	MaxWrite int
	// Survive makes the mount outlive this process. Nil: it ends with it.
	Survive *Survival
	// Logf receives one line per event that an operator must know of. Nil: nothing is logged.
	Logf func(format string, args ...any)
	// Debug logs every request and answer through Logf.
	Debug bool
}

func (o *Options) setDefaults() error {
	if o.FSName == "" {
		o.FSName = "lamina"
	}
	if o.MaxStackDepth == 0 {
		o.MaxStackDepth = 1
	}
	if o.MaxStackDepth < 1 || o.MaxStackDepth > 2 {
		return fmt.Errorf("max_stack_depth=%d: the kernel stacks filesystems 1 or 2 deep", o.MaxStackDepth)
	}
	if o.Passthrough > PassthroughOff {
		return fmt.Errorf("passthrough=%d: use auto, on or off", o.Passthrough)
	}
	if o.MaxWrite == 0 {
		o.MaxWrite = 1 << 20
	}
	if o.MaxWrite < 4096 {
		return fmt.Errorf("max_write=%d: use at least 4096 bytes", o.MaxWrite)
	}
	if o.Logf == nil {
		o.Logf = func(string, ...any) {}
	}
	return o.IDs.check()
}

// Server serves one mount.
type Server struct {
	takeOvers uint64 // how often the mount was taken over by another process

	srv  *server
	mnt  string
	dev  transport
	done chan struct{}

	major, minor uint32 // the mount's device number

	mu        sync.Mutex
	unmounted bool
}

// Mount serves fs on the directory mnt and returns once the mount answers. The union stays the caller's, to be closed
// after Wait.
func Mount(fs *union.FS, mnt string, opt Options) (*Server, error) {
	if err := opt.setDefaults(); err != nil {
		return nil, err
	}
	opt.ReadOnly = opt.ReadOnly || fs.ReadOnly()
	srv := newServer(fs, opt)
	if opt.Survive != nil {
		srv.answers = newJournal(srv)
		if opt.Survive.Resume {
			return takeOver(srv, mnt)
		}
	}
	return mount(srv, mnt)
}

// MountRaw serves any filesystem the way Mount serves a union: over the same transport, with the same capabilities. What
// Options say of unions does not apply. It is for measuring what requests cost that nobody has work with.
func MountRaw(fs fuse.RawFileSystem, mnt string, opt Options) (*Server, error) {
	if err := opt.setDefaults(); err != nil {
		return nil, err
	}
	srv := newServer(nil, opt)
	srv.answers = fs
	return mount(srv, mnt)
}

func mount(srv *server, mnt string) (*Server, error) {
	abs, err := filepath.Abs(mnt)
	if err != nil {
		return nil, fmt.Errorf("mount point %s: %w", mnt, err)
	}
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return nil, fmt.Errorf("mount point %s: %w", mnt, errnoOf(err))
	}
	st, err := os.Stat(abs)
	if err != nil {
		return nil, fmt.Errorf("mount point %s: %w", mnt, errnoOf(err))
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("mount point %s: %w", mnt, unix.ENOTDIR)
	}
	dev, err := connect(srv, abs, &srv.opt)
	if err != nil {
		return nil, err
	}
	s := serve(srv, abs, dev)
	err = dev.ready()
	if err == nil {
		s.major, s.minor, err = deviceOf(abs)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount point %s: the mount does not answer: %w", mnt, err), s.Unmount())
	}
	if opt := srv.opt.Survive; opt != nil {
		opt.root().device.Store(uint64(s.major)<<32 | uint64(s.minor))
	}
	return s, nil
}

func serve(srv *server, mnt string, dev transport) *Server {
	s := &Server{srv: srv, mnt: mnt, dev: dev, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		dev.serve()
		srv.releaseAll()
	}()
	return s
}

// Mountpoint is the directory that the mount covers, absolute and without symbolic links.
func (s *Server) Mountpoint() string { return s.mnt }

// Device is the number of the mounted filesystem, as in st_dev.
func (s *Server) Device() (major, minor uint32) { return s.major, s.minor }

// Wait returns when the mount is gone and the last request is answered.
func (s *Server) Wait() { <-s.done }

// ErrCovered: somebody else has mounted on the same directory later. Who unmounts by name would take that mount away.
var ErrCovered = errors.New("another filesystem is mounted over it: unmount that first")

// Unmount takes the mount away and waits for the last request. EBUSY: somebody uses it; nothing has changed. EINVAL: it is
// detached from its directory already, and served until its last user is gone. It may be called again, also after somebody
// else unmounted.
func (s *Server) Unmount() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.done:
		return nil
	default:
	}
	if !s.unmounted {
		err := s.mustBeOurs()
		if err == nil {
			err = s.dev.unmount()
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", s.mnt, err)
		}
		s.unmounted = true
	}
	<-s.done
	return nil
}

// mustBeOurs says why what is mounted on the directory now is not this mount.
func (s *Server) mustBeOurs() error {
	major, minor, err := deviceOf(s.mnt)
	if err != nil || s.minor == 0 || major == s.major && minor == s.minor {
		return nil // or the attempt will tell
	}
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	device, mnt := fmt.Sprintf("%d:%d", s.major, s.minor), mountinfoEscapes.Replace(s.mnt)
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && f[2] == device && f[4] == mnt {
			return ErrCovered
		}
	}
	return unix.EINVAL
}

// mountinfoEscapes are those of proc_pid_mountinfo(5).
var mountinfoEscapes = strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`)
