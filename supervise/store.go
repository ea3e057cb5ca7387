// Package supervise keeps a server's descriptors while the server dies and another one takes its place.
//
// A supervisor ([Run]) starts the server as its child, with one end of a socket. Through it the server hands over
// descriptors under names ([Store.Keep]), and a successor gets them back ([Dial]). The supervisor does not know what they
// are: a FUSE connection lives as long as one descriptor of /dev/fuse is open, a memfd as long as anybody has it, a
// flock(2) as long as the file description.
//
// As long as something is kept, the end of the server, however it came, is a death, and a successor is started. A server
// that has come to its end drops what it has kept first.
package supervise

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Messages are a letter and a name, with descriptors for keep and kept. Every request is answered by one message, but
// for list, which is answered by one for each name and then by end.
const (
	opKeep  = 'K'
	opDrop  = 'D'
	opList  = 'L'
	opReady = 'R'
	kept    = 'k' // in the answer to list
	ok      = 'o'
	end     = 'e'
	failed  = 'f' // nothing was done
)

const (
	// MaxFiles is how many descriptors one name can stand for.
	MaxFiles = 16
	// MaxName is how long a name can be, in bytes.
	MaxName = 1024
)

// ErrNoSupervisor: the supervisor has ended. The server can go on, but nobody will come after it.
var ErrNoSupervisor = errors.New("the supervisor is gone: if this process is killed too, its mounts end")

var errTruncated = errors.New("supervisor: a message was cut off: are there descriptors left (ulimit -n)?")

// Store is a server's connection to its supervisor. All methods are safe for concurrent use.
type Store struct {
	mu   sync.Mutex
	sock *os.File
}

// Dial takes over the socket that Run gave this process, and returns what the processes before it have kept: nothing in
// the first one. The files are the caller's.
func Dial(fd int) (*Store, map[string][]*os.File, error) {
	unix.CloseOnExec(fd)
	s := &Store{sock: os.NewFile(uintptr(fd), "supervisor")}
	files, err := s.list()
	if err != nil {
		s.sock.Close()
		return nil, nil, err
	}
	return s, files, nil
}

func (s *Store) list() (map[string][]*os.File, error) {
	if err := send(s.fd(), opList, "", nil); err != nil {
		return nil, err
	}
	all := map[string][]*os.File{}
	for {
		op, name, files, err := receive(s.fd())
		switch {
		case err != nil:
			return nil, err
		case op == end:
			return all, nil
		case op != kept:
			return nil, fmt.Errorf("supervisor: unexpected message %q", op)
		}
		all[name] = files
	}
}

func (s *Store) fd() int { return int(s.sock.Fd()) }

// Keep hands descriptors over under a name, in place of what was kept under it. When it returns, they outlive this process.
func (s *Store) Keep(name string, files ...*os.File) error {
	if len(name) > MaxName || len(files) > MaxFiles {
		return fmt.Errorf("supervisor: keeping %d descriptors as %q: too many, or too long a name", len(files), name)
	}
	return s.ask(opKeep, name, files)
}

// Drop makes the supervisor close what it keeps under a name.
func (s *Store) Drop(name string) error { return s.ask(opDrop, name, nil) }

// Ready tells that this process serves: signals are passed on to it from now on, and its predecessors' deaths are forgiven.
func (s *Store) Ready() error { return s.ask(opReady, "", nil) }

func (s *Store) ask(op byte, name string, files []*os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := send(s.fd(), op, name, files); err != nil {
		return err
	}
	answer, _, _, err := receive(s.fd())
	if err == nil && answer == failed {
		err = errors.New("the supervisor has no descriptors left (ulimit -n)")
	} else if err == nil && answer != ok {
		err = fmt.Errorf("supervisor: unexpected message %q", answer)
	}
	return err
}

// Close lets go of the supervisor. What is kept stays kept.
func (s *Store) Close() error { return s.sock.Close() }

func send(fd int, op byte, name string, files []*os.File) error {
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			// Not Fd, which would make the file description blocking, also for whoever else has it: a listener for one.
			raw, err := f.SyscallConn()
			if err == nil {
				err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
			}
			if err != nil {
				return fmt.Errorf("supervisor: %s: %w", f.Name(), err)
			}
		}
		oob = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(fd, append([]byte{op}, name...), oob, nil, unix.MSG_NOSIGNAL)
		switch {
		case err == unix.EINTR:
		case err == unix.EPIPE || err == unix.ECONNRESET || err == unix.ENOTCONN:
			return ErrNoSupervisor
		default:
			return err
		}
	}
}

// receive reads one message. ErrNoSupervisor: the other side has closed.
func receive(fd int) (op byte, name string, files []*os.File, err error) {
	var buf [MaxName + 2]byte
	oob := make([]byte, unix.CmsgSpace(4*MaxFiles))
	var n, oobn, flags int
	for {
		n, oobn, flags, _, err = unix.Recvmsg(fd, buf[:], oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	switch {
	case err == unix.ECONNRESET || err == nil && n == 0:
		return 0, "", nil, ErrNoSupervisor
	case err != nil:
		return 0, "", nil, fmt.Errorf("supervisor: %w", err)
	}
	op, name = buf[0], string(bytes.Clone(buf[1:n]))
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return 0, "", nil, fmt.Errorf("supervisor: %w", err)
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return 0, "", nil, fmt.Errorf("supervisor: %w", err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), name))
		}
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		closeAll(files)
		return 0, "", nil, errTruncated
	}
	return op, name, files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
