package pool

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// RuntimeDirVariable overrides RuntimeDir.
const RuntimeDirVariable = "LAMINA_RUNTIME_DIR"

// RuntimeDir holds control sockets and logs: /run/lamina for root, below XDG_RUNTIME_DIR for others and for the root of
// a user namespace, who may not write to /run.
func RuntimeDir() string {
	if dir := os.Getenv(RuntimeDirVariable); dir != "" {
		return dir
	}
	if os.Geteuid() == 0 && unix.Access("/run", unix.W_OK) == nil {
		return "/run/lamina"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "lamina")
	}
	uid := initialUID()
	if dir := fmt.Sprintf("/run/user/%d", uid); unix.Access(dir, unix.W_OK) == nil {
		return filepath.Join(dir, "lamina")
	}
	return filepath.Join(os.TempDir(), "lamina-"+strconv.Itoa(uid))
}

// initialUID is what this user is called outside of the user namespace: the root of one that a user made finds the
// sockets of that user's mounts, and the other way round.
func initialUID() int {
	uid := os.Geteuid()
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return uid
	}
	for line := range strings.Lines(string(ids)) {
		var inside, outside, n int
		if got, _ := fmt.Sscan(line, &inside, &outside, &n); got == 3 && uid >= inside && uid-inside < n {
			return outside + uid - inside
		}
	}
	return uid
}

// MakeRuntimeDir creates it, for its owner alone. One that somebody else prepared is refused.
func MakeRuntimeDir() error {
	dir := RuntimeDir()
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("runtime directory: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("runtime directory %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("runtime directory %s: not a directory of mode 0700 that belongs to uid %d: remove it", dir, os.Geteuid())
	}
	return nil
}

// MountHash names a mount point in few bytes: a unix socket's path has at most 107.
func MountHash(mnt string) string {
	sum := sha256.Sum256([]byte(mnt))
	return hex.EncodeToString(sum[:8])
}

// takenError: another process has it.
type takenError string

func (e takenError) Error() string { return string(e) }

// Lock makes sure that one process has what the file path stands for; taken is the error when it is another one. The lock
// goes with the process, however it ends.
func Lock(path, taken string) (*os.File, error) {
	lock, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = takenError(taken)
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	return lock, nil
}
