package pool

import (
	"encoding/json"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A pool server is asked over a unix socket: one JSON object with a [Request] for each line, answered by one with a [Reply],
// in order. A connection may be used for many. The socket is its owner's alone (mode 0600), and who may connect may do
// everything: the server does what the snapshotter, or an operator, could do by himself.

// Op is what a Request asks for.
type Op string

const (
	// OpMount mounts Options on Mountpoint. Asked for once more it finds the mount in place; with other options it fails.
	OpMount Op = "mount"
	// OpSync puts everything that was written to the mount on disk, and leaves it mounted. What could not be written is
	// kept and tried again.
	OpSync Op = "sync"
	// OpUnmount takes the mount off its mount point, and answers when everything is flushed. While others use it, it
	// fails with EBUSY and leaves it in place; with Lazy it takes it off all the same, and does not wait.
	OpUnmount Op = "unmount"
	// OpSeal makes the upper directory of Options, which must not be mounted, a layer that needs no workdir.
	OpSeal Op = "seal"
	// OpList names the mount points.
	OpList Op = "list"
	// OpStatus describes all mounts.
	OpStatus Op = "status"
	// OpQuit ends the server when it has no mount, or with the last one. A later OpMount revokes it; not after a signal
	// though: then the answer is ESHUTDOWN, and another server can be started.
	OpQuit Op = "quit"
)

// Request is one line to the server.
type Request struct {
	Op Op `json:"op"`
	// Mountpoint is absolute and without symbolic links.
	Mountpoint string `json:"mountpoint,omitempty"`
	// Options are those of lamina mount -o, one or several to a string.
	Options []string `json:"options,omitempty"`
	// Container is whose root the mount is, for the status alone.
	Container string `json:"container,omitempty"`
	// Lazy: see OpUnmount.
	Lazy bool `json:"lazy,omitempty"`
	// Discard: nobody will read what was written: it need not be put on disk.
	Discard bool `json:"discard,omitempty"`
}

// Reply is one line from the server.
type Reply struct {
	Error string `json:"error,omitempty"` // empty: done
	// Errno is the error's number, where it has one.
	Errno  int      `json:"errno,omitempty"`
	Mounts []string `json:"mounts,omitempty"`
	Status []Status `json:"status,omitempty"`
	PID    int      `json:"pid"`
	// Version is the server's, which may be older than who asks.
	Version string `json:"version"`
}

// RemoteError is what a server said. It unwraps to its errno.
type RemoteError struct {
	Text  string
	Errno unix.Errno
}

func (e *RemoteError) Error() string { return e.Text }

func (e *RemoteError) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

func (r *Reply) setError(err error) {
	if err == nil {
		return
	}
	r.Error = err.Error()
	var errno unix.Errno
	if errors.As(err, &errno) {
		r.Errno = int(errno)
	}
}

func (r *Reply) err() error {
	if r.Error == "" {
		return nil
	}
	return &RemoteError{r.Error, unix.Errno(r.Errno)}
}

// maxLine bounds a request, in bytes: 500 lowers with long names and everything else.
const maxLine = 4 << 20

// ParseRequest reads one line.
func ParseRequest(line []byte) (Request, error) {
	var r Request
	if err := json.Unmarshal(line, &r); err != nil {
		return r, fmt.Errorf("request: %w", err)
	}
	switch r.Op {
	case OpMount, OpSync, OpUnmount:
		if len(r.Mountpoint) == 0 || r.Mountpoint[0] != '/' {
			return r, fmt.Errorf("request %s: the mount point %q is not an absolute path", r.Op, r.Mountpoint)
		}
	case OpSeal, OpList, OpStatus, OpQuit:
	default:
		return r, fmt.Errorf("request %q: not known to this server: is it older than who asks?", r.Op)
	}
	return r, nil
}
