package pool

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Spawn says how a pool server is started.
type Spawn struct {
	// Program and Args run "lamina serve" without its flags. Empty: this program.
	Program string
	// Socket and Log are the server's.
	Socket, Log string
	// Survive: the server's mounts outlive it, see "lamina serve --survive".
	Survive bool
	// Cgroup is the directory of the cgroup (version 2) that the server begins in. Empty: the caller's.
	Cgroup string
}

const serveReady = "ready"

// Start starts a server in a session of its own and returns when it listens. It is not the caller's child for long: it goes
// on when the caller ends.
func (s Spawn) Start() error {
	program := s.Program
	if program == "" {
		program = "/proc/self/exe"
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		w.Close()
		return err
	}
	defer null.Close()
	args := []string{"serve", "--socket", s.Socket, "--log", s.Log, "--ready-fd", "3"}
	if s.Survive {
		args = append(args, "--survive")
	}
	cmd := exec.Command(program, args...)
	cmd.Args[0], cmd.Dir = "lamina", "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.Cgroup != "" {
		cgroup, err := unix.Open(s.Cgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			w.Close()
			return fmt.Errorf("cgroup %s: %w", s.Cgroup, err)
		}
		defer unix.Close(cgroup)
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, cgroup
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("starting a pool server: %w", err)
	}
	line, err := bufio.NewReader(r).ReadString('\n')
	go func() { _ = cmd.Wait() }() // or it stays a zombie when it ends before us
	switch line = strings.TrimSuffix(line, "\n"); {
	case line == serveReady:
		return nil
	case line != "":
		return fmt.Errorf("starting a pool server: %s", line)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("starting a pool server: it ended before it listened: see %s", s.Log)
	}
	return fmt.Errorf("starting a pool server: %w", err)
}

// Ready tells whoever started the server how that went, on the descriptor given to it.
func Ready(fd int, failed error) {
	unix.CloseOnExec(fd)
	pipe := os.NewFile(uintptr(fd), "ready pipe")
	defer pipe.Close()
	text := serveReady
	if failed != nil {
		text = strings.ReplaceAll(failed.Error(), "\n", "; ")
	}
	_, _ = io.WriteString(pipe, text+"\n") // it may have gone: the socket is there for the next
}
