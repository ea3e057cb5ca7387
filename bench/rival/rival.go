// Package rival mounts union filesystems from the outside, through their command lines: Lamina and those that it is
// compared with. Tests and benchmarks see every one of them as the same thing, a [Mount].
package rival

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// System is a union filesystem's implementation.
type System string

const (
	Lamina      System = "lamina"
	Overlay     System = "overlay"        // kernel overlayfs
	FuseOverlay System = "fuse-overlayfs" // containers/fuse-overlayfs
)

// Standard are the options under which kernel overlayfs behaves most like an ordinary filesystem, and writes layers
// that hold every byte themselves.
var Standard = []string{"redirect_dir=on", "index=on", "xino=on", "metacopy=off"}

// Config says what to mount.
type Config struct {
	System      System
	Lowers      []string // topmost first
	Upper, Work string   // empty: read-only
	Options     []string // further -o options, as the system names them
	Binary      string   // Lamina's; empty: bin/lamina of this repository, or $LAMINA
	Prefix      []string // Lamina only: a command that runs it, such as setpriv with its arguments
	Cwd         string   // Lamina only: where to run it
	Hasty       bool     // with Foreground: do not wait for the server to be ready, only for the mount to be there
	Foreground  bool     // Lamina only: keep the server as this process's child, so that its pid is known (Mount.Server)
}

// Mount is a mounted union.
type Mount struct {
	Config
	Dir string // where

	mark   string       // in the environment of the server's process: whose server it is
	server *exec.Cmd    // foreground server
	stderr bytes.Buffer // of the foreground server; complete once it has exited
	exited chan struct{}
}

// Escape quotes what separates options and lowers.
func Escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(path)
}

// OptionString is the argument of -o.
func (c Config) OptionString() string {
	lowers := make([]string, len(c.Lowers))
	for i, l := range c.Lowers {
		lowers[i] = Escape(l)
	}
	opts := []string{"lowerdir=" + strings.Join(lowers, ":")}
	if c.Upper != "" {
		opts = append(opts, "upperdir="+Escape(c.Upper), "workdir="+Escape(c.Work))
	}
	return strings.Join(append(opts, c.Options...), ",")
}

// BinaryPath is the lamina that tests and benchmarks drive.
func BinaryPath() (string, error) {
	if p := os.Getenv("LAMINA"); p != "" {
		return filepath.Abs(p)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == "/" {
			return "", errors.New("no go.mod above the working directory: set LAMINA to the binary's path")
		}
	}
	p := filepath.Join(dir, "bin", "lamina")
	if _, err := os.Stat(p); err != nil {
		return "", fmt.Errorf("%w: run `make build` first", err)
	}
	return p, nil
}

// Run runs a program and returns its standard output; the error carries its standard error.
func Run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), &ExitError{Args: append([]string{name}, args...), Err: err, Stdout: out.String(), Stderr: errOut.String()}
	}
	return out.String(), nil
}

// ExitError is a program that failed.
type ExitError struct {
	Args           []string
	Err            error
	Stdout, Stderr string
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("%s: %v: %s%s", strings.Join(e.Args, " "), e.Err, e.Stdout, e.Stderr)
}

func (e *ExitError) Unwrap() error { return e.Err }

// Code is the exit status, -1 when there is none.
func (e *ExitError) Code() int {
	var ee *exec.ExitError
	if errors.As(e.Err, &ee) {
		return ee.ExitCode()
	}
	return -1
}

// Up mounts c at dir. On error nothing is mounted.
func Up(ctx context.Context, c Config, dir string) (*Mount, error) {
	m := &Mount{Config: c, Dir: dir}
	return m, m.up(ctx)
}

func (m *Mount) up(ctx context.Context) error {
	switch m.System {
	case Overlay:
		return overlayMount(m.Config, m.Dir)
	case FuseOverlay:
		m.Binary = "fuse-overlayfs"
		cmd := exec.CommandContext(ctx, m.Binary, "-o", m.OptionString(), m.Dir)
		cmd.Env = append(os.Environ(), m.newMark())
		cmd.WaitDelay = 10 * time.Second // its server keeps the standard error
		if out, err := cmd.CombinedOutput(); err != nil {
			return &ExitError{Args: cmd.Args, Err: err, Stderr: string(out)}
		}
		return nil
	case Lamina:
		return m.upLamina(ctx)
	}
	return fmt.Errorf("rival: no system %q", m.System)
}

func (m *Mount) upLamina(ctx context.Context) error {
	if m.Binary == "" {
		p, err := BinaryPath()
		if err != nil {
			return err
		}
		m.Binary = p
	}
	args := []string{"mount", "-o", m.OptionString(), m.Dir}
	if m.Foreground {
		args = append([]string{"mount", "-f"}, args[1:]...)
	}
	argv := append(append(slices.Clone(m.Prefix), m.Binary), args...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = m.Cwd
	cmd.Env = append(os.Environ(), m.newMark())
	if m.Foreground {
		return m.upForeground(ctx, cmd)
	}
	cmd.Stderr = &m.stderr
	cmd.WaitDelay = 10 * time.Second // the server must let go of its caller's streams
	if err := cmd.Run(); err != nil {
		return &ExitError{Args: cmd.Args, Err: err, Stderr: m.stderr.String()}
	}
	if ok, err := Mounted(m.Dir); err != nil || !ok {
		return fmt.Errorf("lamina mount returned 0 but %s is not mounted (%w)", m.Dir, err)
	}
	return nil
}

// newMark makes the variable by which the server will be found among all processes.
func (m *Mount) newMark() string {
	m.mark = fmt.Sprintf("LAMINA_RIVAL=%d.%d", os.Getpid(), time.Now().UnixNano())
	return m.mark
}

func (m *Mount) upForeground(ctx context.Context, cmd *exec.Cmd) error {
	m.stderr.Reset()
	cmd.Stderr = &m.stderr
	// In a process group of its own a Ctrl-C reaches us alone, and we unmount in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	m.server, m.exited = cmd, make(chan struct{})
	exited := m.exited
	go func() { _ = cmd.Wait(); close(exited) }()
	for {
		if up, err := m.isUp(ctx); err != nil {
			return err
		} else if up {
			return nil
		}
		select {
		case <-exited:
			m.server = nil
			return &ExitError{Args: cmd.Args, Err: errors.New("exited before it mounted"), Stderr: m.stderr.String()}
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// isUp says whether the foreground server is mounted and, unless only that matters, answers.
func (m *Mount) isUp(ctx context.Context) (bool, error) {
	up, err := Mounted(m.Dir)
	if err != nil || !up || m.Hasty {
		return up, err
	}
	_, err = Run(ctx, m.Binary, "status", m.Dir)
	return err == nil, nil
}

// Server is the pid of the process that serves the mount: 0 for kernel overlayfs.
func (m *Mount) Server() (int, error) {
	if m.server != nil {
		return m.server.Process.Pid, nil
	}
	if m.System == Overlay {
		return 0, nil
	}
	procs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return 0, err
	}
	for _, p := range procs {
		env, err := os.ReadFile(p)
		if err != nil || !bytes.Contains(env, []byte(m.mark)) {
			continue
		}
		exe, err := os.Readlink(filepath.Join(filepath.Dir(p), "exe"))
		if err != nil || filepath.Base(exe) != filepath.Base(m.Binary) {
			continue
		}
		return strconv.Atoi(filepath.Base(filepath.Dir(p)))
	}
	return 0, fmt.Errorf("no server process for %s", m.Dir)
}

// Down unmounts and returns when the server has flushed and exited.
func (m *Mount) Down() error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	switch m.System {
	case Lamina:
		pid, err := m.Server()
		if err != nil {
			return err
		}
		if _, err := Run(ctx, m.Binary, "umount", m.Dir); err != nil {
			return err
		}
		if m.server != nil {
			select {
			case <-m.exited:
				m.server = nil
			case <-ctx.Done():
				return fmt.Errorf("server %d of %s did not exit within three minutes of umount", pid, m.Dir)
			}
		} else if running(pid) {
			return fmt.Errorf("lamina umount %s returned while its server %d still runs", m.Dir, pid)
		}
		return nil
	default:
		return unix.Unmount(m.Dir, 0)
	}
}

// running says whether the process still lives; one that has exited and waits to be reaped does not.
func running(pid int) bool {
	_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil
}

// Kill ends the foreground server with SIGKILL and detaches the dead mount. The error tells of a server that cannot die:
// one that waits for an answer of its own.
func (m *Mount) Kill() error {
	if m.server == nil {
		return errors.New("rival: Kill needs Foreground")
	}
	pid := m.server.Process.Pid
	if err := m.server.Process.Kill(); err != nil {
		return err
	}
	var hung error
	select {
	case <-m.exited:
	case <-time.After(time.Minute):
		hung = fmt.Errorf("server %d does not die of SIGKILL: it waits for its own mount %s", pid, m.Dir)
	}
	// A forced unmount aborts the connection, and so ends every wait for it.
	err := unix.Unmount(m.Dir, unix.MNT_FORCE|unix.MNT_DETACH)
	<-m.exited
	m.server = nil
	return errors.Join(hung, err)
}

// Discard gets rid of the mount however it can, for cleaning up after a failure.
func (m *Mount) Discard() {
	if ok, _ := Mounted(m.Dir); !ok {
		return
	}
	pid, _ := m.Server()
	_ = unix.Unmount(m.Dir, unix.MNT_FORCE|unix.MNT_DETACH)
	if m.server != nil {
		_ = m.server.Process.Kill()
		<-m.exited
		m.server = nil
	} else if pid != 0 {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// Log is what the foreground server has written to its standard error, once it has exited.
func (m *Mount) Log() string {
	if m.server != nil {
		return ""
	}
	return m.stderr.String()
}

// Mounted says whether something is mounted at dir itself. It reads the mount table and never asks the filesystem.
func Mounted(dir string) (bool, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 4 && unescapeMount(f[4]) == dir {
			return true, nil
		}
	}
	return false, nil
}

// MountsBelow lists the mount points below dir, in the order in which they were mounted.
func MountsBelow(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var below []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(unescapeMount(f[4]), dir+"/") {
			below = append(below, unescapeMount(f[4]))
		}
	}
	return below, nil
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// overlayMount mounts kernel overlayfs: with mount(2), whose options must fit in a page, or else through fsopen (Linux
// 6.8), which takes any number of lowers.
func overlayMount(c Config, dir string) error {
	opts := c.OptionString()
	if len(opts) >= os.Getpagesize() {
		return overlayFsopen(c, dir)
	}
	if err := unix.Mount("overlay", dir, "overlay", 0, opts); err != nil {
		return fmt.Errorf("overlay on %s (%s): %w (see dmesg)", dir, opts, err)
	}
	return nil
}

func overlayFsopen(c Config, dir string) (err error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fs)
	defer func() {
		if err != nil {
			err = fmt.Errorf("overlay on %s (%s): %w%s", dir, c.OptionString(), err, fsMessages(fs))
		}
	}()
	for _, l := range c.Lowers {
		if err := unix.FsconfigSetString(fs, "lowerdir+", l); err != nil {
			return fmt.Errorf("lowerdir+=%s: %w", l, err)
		}
	}
	opts := c.Options
	if c.Upper != "" {
		opts = append([]string{"upperdir=" + c.Upper, "workdir=" + c.Work}, opts...)
	}
	for _, o := range opts {
		key, value, hasValue := strings.Cut(o, "=")
		if hasValue {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, key)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return err
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(m)
	return unix.MoveMount(m, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// fsMessages are the kernel's own words about a failed fsopen mount.
func fsMessages(fs int) string {
	var out strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fs, buf)
		if err != nil || n <= 0 {
			return out.String()
		}
		out.WriteString("; " + strings.TrimSpace(string(buf[:n])))
	}
}
