package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"sync"
	"time"

	"lamina/fusefs"

	"golang.org/x/sys/unix"
)

// Every server listens on a unix socket in the runtime directory, HASH.PID.sock, where HASH names the mount point. It
// answers each connection with its Status in JSON. A socket that nobody answers is a leftover, and whoever finds it
// removes it.

// Status is what a server tells of its mount: the output of lamina status --json.
type Status struct {
	Mountpoint string    `json:"mountpoint"`
	PID        int       `json:"pid"`
	Version    string    `json:"version"`
	Started    time.Time `json:"started"`
	Log        string    `json:"log,omitempty"`
	Device     string    `json:"device"`   // of the mounted filesystem, MAJOR:MINOR as in /proc/self/mountinfo
	Flushing   bool      `json:"flushing"` // the mount is gone, and the server still writes what is left

	Lower     []string `json:"lower"`
	Upper     string   `json:"upper,omitempty"`
	Work      string   `json:"work,omitempty"`
	Format    string   `json:"format"`
	CaW       string   `json:"caw"`
	CopyUp    string   `json:"copyup"`
	Fill      string   `json:"fill"`
	Volatile  bool     `json:"volatile"`
	Namespace string   `json:"namespace"`

	Transport         string `json:"transport"`
	TransportReason   string `json:"transport_reason,omitempty"`
	Passthrough       string `json:"passthrough"`
	PassthroughReason string `json:"passthrough_reason,omitempty"`
	OpenFiles         int    `json:"open_files"`

	Sketches         int64  `json:"sketches"`          // open ones
	Blocks           Blocks `json:"blocks"`            // of the open sketches
	Queue            int64  `json:"queue"`             // files that wait for the copier
	Settling         int64  `json:"settling"`          // closed files whose tables are not on disk yet
	BytesNotCopied   int64  `json:"bytes_not_copied"`  // of lower files, by not copying them up whole
	BytesCopied      int64  `json:"bytes_copied"`      // by the copier
	SketchesCreated  int64  `json:"sketches_created"`  // since the mount began
	SketchesComplete int64  `json:"sketches_complete"` // that became ordinary files
	Errors           uint64 `json:"errors"`            // failed requests, copies and syncs; damage found

	FUSE fusefs.Status `json:"fuse"`

	Goroutines  int `json:"goroutines"`
	Descriptors int `json:"descriptors"`
}

// Blocks counts blocks by state.
type Blocks struct {
	Lower     int64 `json:"lower"`
	InTransit int64 `json:"in_transit"`
	Upper     int64 `json:"upper"`
}

func (in *instance) status() Status {
	f, e := in.server.Status(), in.engine.Stats()
	major, minor := in.server.Device()
	return Status{
		Mountpoint: in.mnt, PID: os.Getpid(), Version: Version(), Started: in.started, Log: in.log.path,
		Device: fmt.Sprintf("%d:%d", major, minor), Flushing: in.flushing.Load(),
		Lower: in.o.Lower, Upper: in.o.Upper, Work: in.o.Work,
		Format: string(in.o.Format), CaW: string(in.o.CaW), CopyUp: string(in.o.CopyUp), Fill: string(in.o.Fill),
		Volatile: in.o.Volatile, Namespace: strings.TrimSuffix(namespace(in.o).Prefix(), "."),
		Transport: f.Transport, TransportReason: f.TransportReason, Passthrough: f.Passthrough, PassthroughReason: f.PassthroughReason, OpenFiles: f.OpenFiles,
		Sketches: e.Sketches, Blocks: Blocks{Lower: e.Lower, InTransit: e.InTransit, Upper: e.Upper},
		Queue: e.Queue, Settling: e.Settling, BytesNotCopied: e.BytesNotCopied, BytesCopied: e.BytesCopied,
		SketchesCreated: e.SketchesCreated, SketchesComplete: e.SketchesComplete, Errors: f.Errors + uint64(e.Errors),
		FUSE: f, Goroutines: runtime.NumGoroutine(), Descriptors: countDescriptors(),
	}
}

// countDescriptors counts this process's open descriptors, but for the one it counts with.
func countDescriptors() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(entries) - 1
}

// control is a server's socket.
type control struct {
	l    *net.UnixListener
	path string
	wg   sync.WaitGroup
}

func listen(mnt string) (*control, error) {
	if err := makeRuntimeDir(); err != nil {
		return nil, err
	}
	path := filepath.Join(runtimeDir(), fmt.Sprintf("%s.%d.sock", mountHash(mnt), os.Getpid()))
	// It gets its name when it listens: whoever finds a socket that refuses may take it for a leftover.
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	addr, done, err := socketAddr(fresh)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	defer done()
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Rename(fresh, path); err != nil {
		l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return &control{l: l, path: path}, nil
}

// socketAddr is the address of a socket. One whose path does not fit into sockaddr_un is reached through a descriptor of
// its directory, which done closes.
func socketAddr(path string) (addr *net.UnixAddr, done func(), err error) {
	if len(path) < len(unix.RawSockaddrUnix{}.Path) {
		return &net.UnixAddr{Name: path, Net: "unix"}, func() {}, nil
	}
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	short := fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path))
	return &net.UnixAddr{Name: short, Net: "unix"}, func() { unix.Close(dir) }, nil
}

// answerTimeout bounds how long one side of a control connection waits for the other.
const answerTimeout = 10 * time.Second

func (c *control) serve(status func() Status) {
	c.wg.Go(func() {
		for {
			conn, err := c.l.AcceptUnix()
			if err != nil {
				return // closed
			}
			c.wg.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(answerTimeout))
				_ = json.NewEncoder(conn).Encode(status()) // the asker may have gone
			})
		}
	})
}

func (c *control) close() {
	_ = os.Remove(c.path) // somebody may have tidied up the directory
	c.l.Close()
	c.wg.Wait()
}

// errGone: the socket's server is no more.
var errGone = errors.New("the server is gone")

// ask connects to one server. The pidfd becomes readable when the server has exited; it is -1 if there is none, and may
// be valid with an error: the server lives, but does not answer.
func ask(socket string) (st Status, pidfd int, err error) {
	addr, done, err := socketAddr(socket)
	if err != nil {
		return st, -1, err
	}
	defer done()
	conn, err := net.DialUnix("unix", nil, addr)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return st, -1, errGone
	}
	if err != nil {
		return st, -1, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(answerTimeout))
	if pidfd, err = peerPidfd(conn); err != nil {
		return st, -1, err
	}
	if err = json.NewDecoder(conn).Decode(&st); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			unix.Close(pidfd)
			return st, -1, errGone // it was closing just then
		}
		return st, pidfd, err
	}
	return st, pidfd, nil
}

func peerPidfd(conn *net.UnixConn) (pidfd int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return -1, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return -1, err
	}
	if credErr != nil {
		return -1, credErr
	}
	pidfd, err = unix.PidfdOpen(int(cred.Pid), 0)
	if errors.Is(err, unix.ESRCH) {
		err = errGone
	}
	return pidfd, err
}

// sockets lists the control sockets of the mounts on mnt, or of all mounts if mnt is empty.
func sockets(mnt string) ([]string, error) {
	prefix := ""
	if mnt != "" {
		prefix = mountHash(mnt) + "."
	}
	entries, err := os.ReadDir(runtimeDir())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) && strings.HasSuffix(e.Name(), ".sock") {
			paths = append(paths, filepath.Join(runtimeDir(), e.Name()))
		}
	}
	return paths, nil
}

// mountsOn asks the servers of the mounts on mnt, or all servers, and removes the sockets of those that are gone. What
// a living server fails to answer is joined into the error.
func mountsOn(mnt string) ([]Status, error) {
	paths, err := sockets(mnt)
	if err != nil {
		return nil, err
	}
	var all []Status
	var failed error
	for _, path := range paths {
		st, pidfd, err := ask(path)
		switch {
		case errors.Is(err, errGone):
			_ = os.Remove(path)
		case err != nil:
			if pidfd >= 0 {
				unix.Close(pidfd)
			}
			failed = errors.Join(failed, fmt.Errorf("control socket %s: %w", path, err))
		default:
			unix.Close(pidfd)
			all = append(all, st)
		}
	}
	sort.Slice(all, func(i, j int) bool {
		return all[i].Mountpoint < all[j].Mountpoint || all[i].Mountpoint == all[j].Mountpoint && all[i].PID < all[j].PID
	})
	return all, failed
}
