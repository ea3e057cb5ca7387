package fusefs

import (
	"bufio"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// An actor is another process that uses the mount. It must be one: a page fault in a mapping stops a Go program's
// thread without its scheduler noticing, so a server in the same process could wait for itself.
type actor struct {
	t    testing.TB
	cmd  *exec.Cmd
	in   io.WriteCloser
	enc  *gob.Encoder
	dec  *gob.Decoder
	once sync.Once
}

type request struct {
	Op            string
	Path, Path2   string
	FD, FD2       int
	Flags         int
	Mode          uint32
	Off, Off2     int64
	Len           int
	Data          []byte
	Args          []string
	UID, GID, Dir int
}

type reply struct {
	N     int64
	Errno unix.Errno
	Data  []byte
	Stat  unix.Stat_t
}

const actorEnv = "LAMINA_FUSEFS_ACTOR"

// startActor runs another process under uid and gid.
func startActor(t testing.TB, uid int) *actor {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	// The race detector sleeps a second at every exit otherwise.
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", actorEnv, uid), "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	a := &actor{t: t, cmd: cmd, in: in, enc: gob.NewEncoder(in), dec: gob.NewDecoder(bufio.NewReader(out))}
	t.Cleanup(a.stop)
	return a
}

// stop ends the process and with it everything it has open.
func (a *actor) stop() {
	a.once.Do(func() {
		a.in.Close()
		if err := a.cmd.Wait(); err != nil {
			a.t.Errorf("actor: %v", err)
		}
	})
}

func (a *actor) do(r request) reply {
	a.t.Helper()
	var out reply
	if err := a.enc.Encode(r); err != nil {
		a.t.Fatalf("actor, %s: %v", r.Op, err)
	}
	if err := a.dec.Decode(&out); err != nil {
		a.t.Fatalf("actor, %s: %v", r.Op, err)
	}
	return out
}

// must is do for what has to succeed.
func (a *actor) must(r request) reply {
	a.t.Helper()
	out := a.do(r)
	if out.Errno != 0 {
		a.t.Fatalf("%s %s: %v", r.Op, r.Path, out.Errno)
	}
	return out
}

func (a *actor) open(path string, flags int) int {
	a.t.Helper()
	return int(a.must(request{Op: "open", Path: path, Flags: flags, Mode: 0o644}).N)
}

func (a *actor) close(fd int) { a.t.Helper(); a.must(request{Op: "close", FD: fd}) }

func (a *actor) pread(fd int, off int64, n int) string {
	a.t.Helper()
	return string(a.must(request{Op: "pread", FD: fd, Off: off, Len: n}).Data)
}

func (a *actor) pwrite(fd int, off int64, s string) {
	a.t.Helper()
	if out := a.must(request{Op: "pwrite", FD: fd, Off: off, Data: []byte(s)}); out.N != int64(len(s)) {
		a.t.Fatalf("wrote %d of %d bytes", out.N, len(s))
	}
}

// mmap maps n bytes from the file's start and returns a number for it; load and store use it.
func (a *actor) mmap(fd, n, prot int) int {
	a.t.Helper()
	return int(a.must(request{Op: "mmap", FD: fd, Len: n, Flags: prot}).N)
}

func (a *actor) load(m int, off int64, n int) string {
	a.t.Helper()
	return string(a.must(request{Op: "load", FD: m, Off: off, Len: n}).Data)
}

func (a *actor) store(m int, off int64, s string) {
	a.t.Helper()
	a.must(request{Op: "store", FD: m, Off: off, Data: []byte(s)})
}

func (a *actor) munmap(m int) { a.t.Helper(); a.must(request{Op: "munmap", FD: m}) }

func (a *actor) stat(path string) unix.Stat_t {
	a.t.Helper()
	return a.must(request{Op: "stat", Path: path}).Stat
}

// runActor is main of the other process.
func runActor(uid string) {
	runtime.LockOSThread()
	var id int
	fmt.Sscan(uid, &id)
	unix.Umask(0)
	if id != 0 {
		check(unix.Setgroups(nil))
		check(unix.Setresgid(id, id, id))
		check(unix.Setresuid(id, id, id))
	}
	in, out := gob.NewDecoder(bufio.NewReader(os.Stdin)), gob.NewEncoder(os.Stdout)
	var maps [][]byte
	for {
		var r request
		if err := in.Decode(&r); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			check(err)
		}
		rep, err := act(&r, &maps)
		if err != nil && !errors.As(err, &rep.Errno) {
			check(err)
		}
		check(out.Encode(rep))
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "actor:", err)
		os.Exit(1)
	}
}

func act(r *request, maps *[][]byte) (out reply, err error) {
	var n int
	switch r.Op {
	case "open":
		n, err = unix.Open(r.Path, r.Flags|unix.O_CLOEXEC, r.Mode)
	case "close":
		err = unix.Close(r.FD)
	case "pread":
		out.Data = make([]byte, r.Len)
		n, err = unix.Pread(r.FD, out.Data, r.Off)
		out.Data = out.Data[:max(n, 0)]
	case "direct": // O_DIRECT wants aligned memory
		b, _ := unix.Mmap(-1, 0, r.Len, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if r.Data != nil {
			copy(b, r.Data)
			n, err = unix.Pwrite(r.FD, b, r.Off)
		} else {
			n, err = unix.Pread(r.FD, b, r.Off)
			out.Data = append(out.Data, b[:max(n, 0)]...)
		}
		unix.Munmap(b)
	case "pwrite":
		n, err = unix.Pwrite(r.FD, r.Data, r.Off)
	case "write":
		n, err = unix.Write(r.FD, r.Data)
	case "mmap":
		var b []byte
		b, err = unix.Mmap(r.FD, 0, r.Len, r.Flags, unix.MAP_SHARED)
		*maps = append(*maps, b)
		n = len(*maps) - 1
	case "load":
		out.Data = append(out.Data, (*maps)[r.FD][r.Off:r.Off+int64(r.Len)]...)
	case "store":
		copy((*maps)[r.FD][r.Off:], r.Data)
	case "munmap":
		err = unix.Munmap((*maps)[r.FD])
	case "fsync":
		err = unix.Fsync(r.FD)
	case "ftruncate":
		err = unix.Ftruncate(r.FD, r.Off)
	case "truncate":
		err = unix.Truncate(r.Path, r.Off)
	case "fallocate":
		err = unix.Fallocate(r.FD, r.Mode, r.Off, int64(r.Len))
	case "seek":
		out.N, err = unix.Seek(r.FD, r.Off, r.Flags)
		return out, err
	case "copy":
		n, err = unix.CopyFileRange(r.FD, &r.Off, r.FD2, &r.Off2, r.Len, 0)
	case "stat":
		err = unix.Lstat(r.Path, &out.Stat)
	case "fstat":
		err = unix.Fstat(r.FD, &out.Stat)
	case "mkdir":
		err = unix.Mkdir(r.Path, r.Mode)
	case "chmod":
		err = unix.Chmod(r.Path, r.Mode)
	case "chown":
		err = unix.Lchown(r.Path, r.UID, r.GID)
	case "link":
		err = unix.Link(r.Path, r.Path2)
	case "linkfd": // gives a name to a file made with O_TMPFILE
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", r.FD), unix.AT_FDCWD, r.Path, unix.AT_SYMLINK_FOLLOW)
	case "unlink":
		err = unix.Unlink(r.Path)
	case "rename":
		err = unix.Rename(r.Path, r.Path2)
	case "setxattr":
		err = unix.Lsetxattr(r.Path, r.Args[0], r.Data, 0)
	case "getxattr":
		out.Data = make([]byte, 256)
		n, err = unix.Lgetxattr(r.Path, r.Args[0], out.Data)
		out.Data = out.Data[:max(n, 0)]
	case "fgetxattr":
		n, err = unix.Fgetxattr(r.FD, r.Args[0], make([]byte, 256))
	case "readdir":
		var es []os.DirEntry
		es, err = os.ReadDir(r.Path)
		for _, e := range es {
			out.Data = append(append(out.Data, e.Name()...), 0)
		}
		n = len(es)
	case "reopen": // reads the file through Len descriptors, one after the other; Data: what was read last
		for i := 0; i < r.Len && err == nil; i++ {
			out.Data, err = os.ReadFile(r.Path)
			if s := string(out.Data); err == nil && !slices.Contains(r.Args, s) {
				return out, nil
			}
		}
	case "replace": // puts a new file over Path, Len times
		for i := 0; i < r.Len && err == nil; i++ {
			if err = os.WriteFile(r.Path2, r.Data, 0o644); err == nil {
				err = unix.Rename(r.Path2, r.Path)
			}
		}
	case "run":
		var b []byte
		b, err = exec.Command(r.Path, r.Args...).CombinedOutput()
		out.Data = b
	default:
		err = fmt.Errorf("no such operation: %s", r.Op)
	}
	out.N = int64(n)
	return out, err
}
