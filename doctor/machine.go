package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read of one file, in bytes. Real configurations have a few thousand.
const maxFile = 1 << 20

// patience is how long a program or a socket may take to answer.
const patience = 10 * time.Second

// machine is where the checks look.
type machine struct{ root string }

func (m *machine) path(p string) string {
	if m.root == "" {
		return p
	}
	return filepath.Join(m.root, p)
}

// read returns a regular file's contents. A pipe or a device in its place must not hold the check up.
func (m *machine) read(path string) ([]byte, error) {
	fd, err := unix.Open(m.path(path), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s: more than %d bytes", path, maxFile)
	}
	return b, err
}

// word is a file's contents without surrounding white space; "" if it cannot be read.
func (m *machine) word(path string) string {
	b, err := m.read(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (m *machine) exists(path string) bool {
	_, err := os.Stat(m.path(path))
	return err == nil
}

// program finds an executable where packages put them, or in the search path.
func (m *machine) program(name string) string {
	dirs := []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}
	if m.root == "" {
		dirs = append(dirs, filepath.SplitList(os.Getenv("PATH"))...)
	}
	for _, dir := range dirs {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(m.path(p)); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p
		}
	}
	return ""
}

// output runs a program of this machine.
func (m *machine) output(program string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, m.path(program), args...)
	cmd.WaitDelay = time.Second
	return cmd.Output()
}

// version asks a program of this machine for its version and returns the answer's first line.
func (m *machine) version(program string) string {
	out, err := m.output(program, "--version")
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line)
}

// numbers finds the first MAJOR.MINOR in a line.
func numbers(line string) (major, minor int, ok bool) {
	for _, word := range strings.Fields(line) {
		word = strings.TrimLeft(word, "v")
		if n, _ := fmt.Sscanf(word, "%d.%d", &major, &minor); n == 2 {
			return major, minor, true
		}
	}
	return 0, 0, false
}

// dial tells whether somebody listens on a unix socket.
func (m *machine) dial(socket string) error {
	conn, err := net.DialTimeout("unix", m.path(socket), patience)
	if err == nil {
		return conn.Close()
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		err = errno
	}
	return fmt.Errorf("%s: %w", socket, err)
}
