package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"lamina/block"
	"lamina/fusefs"
	"lamina/mountopt"
	"lamina/state"
	"lamina/supervise"
	"lamina/union"

	"golang.org/x/sys/unix"
)

// Survival is how a mount outlives the process that serves it.
type Survival struct {
	// Store keeps the mount's descriptors.
	Store *supervise.Store
	// Kept is what a process before this one has kept, under Name: then the mount exists, and this process takes it over.
	// Nil: it is to be made, and a name will be.
	Kept []*os.File
	Name string
}

// kept is what outlives the process: the connection, the memory, the control socket (whoever asks while nobody serves
// waits), a note, and the locks of the upper directory and of the workdir.
type kept struct {
	device *os.File
	state  *state.Arena
	locks  []*os.File
	name   string // under which the supervisor has something; empty: it has nothing
}

const (
	keptDevice = iota
	keptState
	keptSocket
	keptNote
	keptLocks
)

// Note is what a process has to know of a mount to take it over.
type Note struct {
	Mountpoint string
	Options    *mountopt.Options
	Started    time.Time
	Socket     string
	Container  string
	Requested  []string // of a pool server: the options as asked for
}

// ReadNote reads the note of what was kept of a mount.
func ReadNote(files []*os.File) (n Note, err error) {
	if len(files) < keptLocks {
		return n, fmt.Errorf("the supervisor has kept %d descriptors of a mount", len(files))
	}
	err = ReadMemory(files[keptNote], &n)
	return n, err
}

// MemoryFile makes a file in memory that holds v as JSON, for another process to read with [ReadMemory]. name is what
// /proc shows.
func MemoryFile(name string, v any) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := json.NewEncoder(f).Encode(v); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ReadMemory reads what [MemoryFile] has written, from its begin, without moving the offset that all processes share.
func ReadMemory(f *os.File, v any) error {
	return json.NewDecoder(io.NewSectionReader(f, 0, 1<<30)).Decode(v)
}

// resuming says that the mount exists and is taken over.
func (in *Mount) resuming() bool { return in.Survival != nil && in.Survival.Kept != nil }

// supervisor is the process that starts a successor of this one; 0: there is none.
func (in *Mount) supervisor() int {
	if in.Survival == nil {
		return 0
	}
	return os.Getppid()
}

// survive tells engine and union what outlives the process. In a new mount it is made here, before anything is mounted.
func (in *Mount) survive(engine *block.Options, cfg *union.Config) error {
	if in.Survival == nil {
		return nil
	}
	if !in.resuming() {
		if err := in.keep(cfg); err != nil {
			return err
		}
	}
	engine.Memory = in.kept.state
	cfg.State, cfg.Resume = in.kept.state, in.resuming()
	if cfg.Resume {
		cfg.Moved = fusefs.Moved(in.kept.state)
	}
	return nil
}

// takeKept takes over what the process before has left.
func (in *Mount) takeKept() error {
	files := in.Survival.Kept
	note, err := ReadNote(files)
	if err != nil {
		return err
	}
	in.started = note.Started
	in.kept.name = in.Survival.Name
	in.kept.device, in.kept.locks = files[keptDevice], files[keptLocks:]
	files[keptNote].Close()
	if in.kept.state, err = state.Open(files[keptState]); err != nil {
		return err
	}
	l, err := net.FileListener(files[keptSocket])
	files[keptSocket].Close()
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	in.control = &control{l: l.(*net.UnixListener), path: note.Socket}
	in.control.l.SetUnlinkOnClose(false)
	return nil
}

// keep makes what is to outlive the process and gives it to the supervisor.
func (in *Mount) keep(cfg *union.Config) (err error) {
	if !privileged() {
		return errors.New("needs root in the initial user namespace: mount as root, or with survive=off")
	}
	if in.kept.device, err = fusefs.OpenDevice(); err != nil {
		return err
	}
	if in.kept.state, err = state.Create("lamina"); err != nil {
		return err
	}
	note, err := MemoryFile("lamina note", Note{in.Mountpoint, in.o, in.started, in.control.path, in.Container, in.Requested})
	if err != nil {
		return err
	}
	defer note.Close()
	socket, err := in.control.l.File()
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	defer socket.Close()
	if cfg.Upper != nil {
		for _, fd := range []int{cfg.Upper.RootFD(), cfg.Work.RootFD()} {
			// The second descriptor has the lock of the first.
			if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
				return err
			}
			in.kept.locks = append(in.kept.locks, os.NewFile(uintptr(fd), "lock"))
		}
	}
	files := append([]*os.File{in.kept.device, in.kept.state.File(), socket, note}, in.kept.locks...)
	in.kept.name = fmt.Sprintf("%s (%d)", in.Mountpoint, in.started.UnixNano())
	return in.Survival.Store.Keep(in.kept.name, files...)
}

// Forsake makes this process the last one to serve the mount.
func (in *Mount) Forsake() error {
	// The mount point is no name: what was detached from it may still be served beside what is mounted there now.
	if in.Survival == nil || in.kept.name == "" {
		return nil
	}
	return in.Survival.Store.Drop(in.kept.name)
}

// giveUp leaves a mount that could not be taken over to whoever makes it anew. Its memory is left mapped: somebody may be at
// work on it.
func (in *Mount) giveUp() {
	if in.control != nil {
		in.control.close()
	}
	for _, l := range in.kept.locks {
		_ = unix.Flock(int(l.Fd()), unix.LOCK_UN)
		l.Close()
	}
	if in.kept.device != nil {
		in.kept.device.Close()
	}
}

// letGo ends the survival of a mount that has come to its end. With the supervisor's descriptors its locks would stay.
func (in *Mount) letGo() {
	if in.Survival == nil {
		return
	}
	// First: while the supervisor has something there can be a successor, which counts on the locks.
	if err := in.Forsake(); err != nil && !errors.Is(err, supervise.ErrNoSupervisor) {
		in.Logf("%s: %v", in.Mountpoint, err)
	}
	for _, l := range in.kept.locks {
		if err := unix.Flock(int(l.Fd()), unix.LOCK_UN); err != nil {
			in.Logf("%s: unlocking: %v", in.Mountpoint, err)
		}
		l.Close()
	}
	if in.kept.device != nil {
		in.kept.device.Close()
	}
	if in.kept.state != nil {
		in.kept.state.Close()
	}
}
