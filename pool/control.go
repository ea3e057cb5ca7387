package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"strings"
	"sync"
	"time"

	"lamina/fusefs"

	"golang.org/x/sys/unix"
)

// Every server listens on a unix socket in the runtime directory, HASH.TIME.PID.sock, where HASH names the mount point, and
// TIME tells mounts apart that one process had there one after another, or processes of one number had. It answers each
// connection with its Status in JSON. A socket that nobody answers is a leftover, and whoever finds it removes it.

// Status is what a server tells of its mount: the output of lamina status --json.
type Status struct {
	Mountpoint string    `json:"mountpoint"`
	Container  string    `json:"container,omitempty"` // whose root it is, where that is known
	PID        int       `json:"pid"`
	Supervisor int       `json:"supervisor,omitempty"` // with survive=on: the process that starts a server when one is killed
	Version    string    `json:"version"`
	Started    time.Time `json:"started"`
	Log        string    `json:"log,omitempty"`
	Device     string    `json:"device"`   // of the mounted filesystem, MAJOR:MINOR as in /proc/self/mountinfo
	Shared     bool      `json:"shared"`   // the process serves other mounts too
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
	Damaged          int64  `json:"damaged"`           // files that could not be trusted when they were looked at

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

// Status may be asked for at any time.
func (in *Mount) Status() Status {
	f, e := in.server.Status(), in.engine.Stats()
	major, minor := in.server.Device()
	return Status{
		Mountpoint: in.Mountpoint, Container: in.Container, PID: os.Getpid(), Supervisor: in.supervisor(), Version: in.Version, Started: in.started, Log: in.Log,
		Device: fmt.Sprintf("%d:%d", major, minor), Shared: in.Shared, Flushing: in.flushing.Load(),
		Lower: in.o.Lower, Upper: in.o.Upper, Work: in.o.Work,
		Format: string(in.o.Format), CaW: string(in.o.CaW), CopyUp: string(in.o.CopyUp), Fill: string(in.o.Fill),
		Volatile: in.o.Volatile, Namespace: strings.TrimSuffix(namespace(in.o).Prefix(), "."),
		Transport: f.Transport, TransportReason: f.TransportReason, Passthrough: f.Passthrough, PassthroughReason: f.PassthroughReason, OpenFiles: f.OpenFiles,
		Sketches: e.Sketches, Blocks: Blocks{Lower: e.Lower, InTransit: e.InTransit, Upper: e.Upper},
		Queue: e.Queue, Settling: e.Settling, BytesNotCopied: e.BytesNotCopied, BytesCopied: e.BytesCopied,
		SketchesCreated: e.SketchesCreated, SketchesComplete: e.SketchesComplete, Errors: f.Errors + uint64(e.Errors), Damaged: in.fs.Damaged() + e.Damaged,
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

func listen(mnt string, started time.Time) (*control, error) {
	if err := MakeRuntimeDir(); err != nil {
		return nil, err
	}
	path := filepath.Join(RuntimeDir(), fmt.Sprintf("%s.%d.%d.sock", MountHash(mnt), started.UnixNano(), os.Getpid()))
	l, err := listenFresh(path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return &control{l: l, path: path}, nil
}

// listenFresh listens on path, in the place of whatever socket was there. It gets its name when it listens: whoever finds a
// socket that refuses may take it for a leftover.
func listenFresh(path string) (*net.UnixListener, error) {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	addr, done, err := socketAddr(fresh)
	if err != nil {
		return nil, err
	}
	defer done()
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(fresh, 0o600)
	if err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
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

// ErrGone: the socket's server is no more.
var ErrGone = errors.New("the server is gone")

// Ask connects to one server. The pidfd becomes readable when the server has exited, or with survive=on its supervisor; it
// is -1 if there is none, and may be valid with an error: the server lives, but does not answer.
func Ask(socket string) (st Status, pidfd int, err error) {
	for end := time.Now().Add(answerTimeout); ; time.Sleep(askAgain) {
		st, pidfd, err = askOnce(socket)
		if !errors.Is(err, errCutOff) {
			return st, pidfd, err
		}
		if time.Now().After(end) {
			return st, -1, ErrGone
		}
	}
}

// errCutOff: the server died, or came to its end, while it answered. Whether another one is there the next try will tell.
var errCutOff = errors.New("the server ended while it answered")

const askAgain = 20 * time.Millisecond

func askOnce(socket string) (st Status, pidfd int, err error) {
	addr, done, err := socketAddr(socket)
	if err != nil {
		return st, -1, err
	}
	defer done()
	conn, err := net.DialUnix("unix", nil, addr)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return st, -1, ErrGone
	}
	if err != nil {
		return st, -1, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(answerTimeout))
	if pidfd, err = peerPidfd(conn); err != nil && !errors.Is(err, ErrGone) { // it may be the successor's socket by now
		return st, -1, err
	}
	if err = json.NewDecoder(conn).Decode(&st); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
			closePidfd(pidfd)
			return st, -1, errCutOff
		}
		return st, pidfd, err
	}
	if st.Supervisor == 0 && pidfd < 0 {
		return st, -1, ErrGone
	}
	if st.Supervisor == 0 {
		return st, pidfd, nil
	}
	closePidfd(pidfd)
	if pidfd, err = unix.PidfdOpen(st.Supervisor, 0); errors.Is(err, unix.ESRCH) {
		return st, -1, errCutOff
	}
	return st, pidfd, err
}

func closePidfd(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
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
		err = ErrGone
	}
	return pidfd, err
}

// controlSocket is what a control socket is called. Others' sockets, such as the snapshotter's, lie beside them.
var controlSocket = regexp.MustCompile(`^[0-9a-f]{16}(\.[0-9]+){1,2}\.sock$`)

// Sockets lists the control sockets of the mounts on mnt, or of all mounts if mnt is empty.
func Sockets(mnt string) ([]string, error) {
	prefix := ""
	if mnt != "" {
		prefix = MountHash(mnt) + "."
	}
	entries, err := os.ReadDir(RuntimeDir())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) && controlSocket.MatchString(e.Name()) {
			paths = append(paths, filepath.Join(RuntimeDir(), e.Name()))
		}
	}
	return paths, nil
}

// askAtOnce bounds how many servers are asked at a time. One that does not answer holds the others up no longer than itself.
const askAtOnce = 32

// MountsOn asks the servers of the mounts on mnt, or all servers, and removes the sockets of those that are gone. What
// a living server fails to answer is joined into the error.
func MountsOn(mnt string) ([]Status, error) {
	paths, err := Sockets(mnt)
	if err != nil {
		return nil, err
	}
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex
		all    []Status
		failed error
	)
	turn := make(chan struct{}, askAtOnce)
	for _, path := range paths {
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			st, pidfd, err := Ask(path)
			if pidfd >= 0 {
				unix.Close(pidfd)
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case errors.Is(err, ErrGone):
				_ = os.Remove(path)
			case err != nil:
				failed = errors.Join(failed, fmt.Errorf("control socket %s: %w", path, err))
			default:
				all = append(all, st)
			}
		})
	}
	wg.Wait()
	sort.Slice(all, func(i, j int) bool {
		return all[i].Mountpoint < all[j].Mountpoint || all[i].Mountpoint == all[j].Mountpoint && all[i].PID < all[j].PID
	})
	return all, failed
}
