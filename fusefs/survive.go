package fusefs

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"lamina/devfuse"
	"lamina/state"
	"lamina/union"
	"lamina/uring"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Survival is what a mount needs to outlive its server: whoever has the descriptor and the memory can serve it. It needs a
// privileged mount, and Linux 6.9.
type Survival struct {
	// Device is a descriptor of /dev/fuse, from OpenDevice. It stays the caller's.
	Device *os.File
	// State is what the server knows. The union and its engine must have the same.
	State *state.Arena
	// Resume: the mount exists, and its server was killed. Otherwise Mount makes it.
	Resume bool
}

// OpenDevice opens /dev/fuse for a mount that is to outlive its server.
func OpenDevice() (*os.File, error) {
	fd, err := openDevice()
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// rootRec is what Arena.Root holds.
type rootRec struct {
	init      [devfuse.MaxInit]byte
	initSize  atomic.Uint32 // 0: INIT has not come yet
	mountSize uint32
	mnt       [1024]byte
	device    atomic.Uint64 // major, minor
	takeOvers atomic.Uint64
}

var _ = [state.RootSize - unsafe.Sizeof(rootRec{})]byte{} // it fits

func (s *Survival) root() *rootRec { return (*rootRec)(s.State.Root()) }

// keptTransport is /dev/fuse over a descriptor that is not this process's alone.
type keptTransport struct {
	*devfuse.Conn
	srv  *server
	mnt  string
	init []byte
}

var _ transport = (*keptTransport)(nil)

func newKept(srv *server, mnt string, opt *Options) *keptTransport {
	t := &keptTransport{srv: srv, mnt: mnt}
	opt.MaxWrite = min(opt.MaxWrite, devfuse.MaxWrite)
	o := devfuse.Options{Mount: mountOptions(opt), Answered: srv.answers.(*journal).answered}
	t.Conn = devfuse.New(int(opt.Survive.Device.Fd()), srv.answers, o)
	srv.dev = t
	return t
}

// connectKept mounts.
func connectKept(srv *server, mnt string, opt *Options) (transport, error) {
	root := opt.Survive.root()
	if len(mnt) > len(root.mnt) {
		return nil, fmt.Errorf("mount point %s: its name is too long for a mount that survives", mnt)
	}
	t := newKept(srv, mnt, opt)
	if err := mountOn(int(opt.Survive.Device.Fd()), mnt, opt, mountOptions(opt)); err != nil {
		return nil, err
	}
	err := t.Negotiate(func(init []byte) {
		t.init = append(t.init, init...)
		root.mountSize = uint32(copy(root.mnt[:], mnt))
		root.initSize.Store(uint32(copy(root.init[:], init)))
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount point %s: %w", mnt, err), unix.Unmount(mnt, unix.MNT_DETACH))
	}
	t.checkPassthrough()
	return t, nil
}

// takeOver serves a mount whose server was killed.
func takeOver(srv *server, mnt string) (*Server, error) {
	root := srv.opt.Survive.root()
	if root.initSize.Load() == 0 || root.device.Load() == 0 {
		return nil, fmt.Errorf("mount point %s: its server was killed before it was ready", mnt)
	}
	abs := string(root.mnt[:root.mountSize]) // which must not be looked at: nobody would answer
	t := newKept(srv, abs, &srv.opt)
	t.init = append(t.init, root.init[:root.initSize.Load()]...)
	t.checkPassthrough()
	srv.answers.(*journal).resume()
	root.takeOvers.Add(1)
	if err := t.Resume(t.init); err != nil {
		return nil, fmt.Errorf("mount point %s: %w", mnt, err)
	}
	s := serve(srv, abs, t)
	s.takeOvers = root.takeOvers.Load()
	s.major, s.minor = uint32(root.device.Load()>>32), uint32(root.device.Load())
	return s, nil
}

func (t *keptTransport) checkPassthrough() {
	if t.srv.pass.enabled() && devfuse.Flags(t.init)&fuse.CAP_PASSTHROUGH == 0 {
		t.srv.pass.disable("the kernel does not offer it: Linux 6.9 with CONFIG_FUSE_PASSTHROUGH does")
	}
}

func (t *keptTransport) name() string        { return "dev" }
func (t *keptTransport) fallback() error     { return nil }
func (t *keptTransport) rings() *uring.Stats { return nil }
func (t *keptTransport) serve()              { t.Serve(); t.Conn.Close() }
func (t *keptTransport) unmount() error      { return unix.Unmount(t.mnt, 0) }
func (t *keptTransport) ready() error        { return setReadAhead(t.mnt, &t.srv.opt) }

func (t *keptTransport) registerBacking(fd int) (int32, error) { return t.RegisterBacking(fd) }

func (t *keptTransport) unregisterBacking(id int32) {
	if err := t.UnregisterBacking(id); err != nil && err != unix.EBADF && err != unix.ENOENT {
		t.srv.opt.Logf("passthrough: unregistering backing file %d: %v", id, err)
	}
}

// Notices are advice: where the node or the name is not cached the kernel says ENOENT.

func (t *keptTransport) invalAttr(id uint64)                 { _ = t.InvalAttr(id) }
func (t *keptTransport) forgetEntry(dir uint64, name string) { _ = t.InvalEntry(dir, name) }
func (t *keptTransport) prune(id uint64)                     { _ = t.Prune(id) }

// Moved lists the places to which something may have been renamed in the moment of the death, for union.Config.
func Moved(a *state.Arena) []union.Place {
	var places []union.Place
	for _, r := range a.All(state.Request) {
		if rec := state.As[requestRec](r); rec.op == opRename {
			from, to := rec.names(r)
			places = append(places, union.Place{Dir: rec.dir2, Name: to}, union.Place{Dir: rec.dir, Name: from})
		}
	}
	return places
}
