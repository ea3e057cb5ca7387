package pool

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Upper directories and workdirs belong to one process at a time. The claim is a flock(2) on the directory itself, which
// leaves nothing behind when the process ends however it ends.

const (
	// claimPatience bounds how long a claim waits for a server whose mount is gone. umount(8) does not wait for the
	// server to flush, and whoever restarts a container mounts again at once.
	claimPatience = time.Minute
	claimPoll     = 20 * time.Millisecond
	claimNote     = 2 * time.Second // between two words about it
)

// Claim locks a directory for this process; how is LOCK_EX or LOCK_SH. It waits, and tells so, while the directory is
// in the hands of a server whose mount is gone; anybody else's is refused at once, with a BusyError.
func Claim(fd int, what string, how int, note func(string)) error {
	since, told := time.Now(), time.Duration(0)
	for {
		locked, err := tryLock(fd, what, how)
		if locked || err != nil {
			return err
		}
		by, err := lockOwner(fd)
		if err != nil {
			return fmt.Errorf("%s: looking for the process that has it locked: %w", what, err)
		}
		waited := time.Since(since)
		if by.server == nil || !by.server.gone() || waited > claimPatience {
			// It may have ended while we looked.
			if locked, err := tryLock(fd, what, how); locked || err != nil {
				return err
			}
			return &BusyError{what, by}
		}
		if waited > told+claimNote {
			told = waited
			note(fmt.Sprintf("%s: waiting for %s (%s)", what, by.doing(), waited.Round(time.Second)))
		}
		time.Sleep(claimPoll)
	}
}

func tryLock(fd int, what string, how int) (locked bool, err error) {
	err = unix.Flock(fd, how|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("%s: cannot be locked: %w", what, err)
	}
	return true, nil
}

// owner is who has locked a directory.
type owner struct {
	pid    int     // 0: not to be seen from here
	server *Status // nil: fsck, flatten, or a server that does not answer
}

// doing says what keeps a server whose mount is gone.
func (o *owner) doing() string {
	if o.server.Flushing {
		return fmt.Sprintf("process %d, which is flushing the last mount on %s", o.server.PID, o.server.Mountpoint)
	}
	return fmt.Sprintf("the last user of the mount on %s, which was detached (process %d serves it)", o.server.Mountpoint, o.server.PID)
}

// BusyError says that somebody else has the lock.
type BusyError struct {
	what string
	by   owner
}

func (e *BusyError) Error() string {
	switch by := &e.by; {
	case by.server != nil && by.server.Flushing:
		return fmt.Sprintf("%s: in use by %s: wait for its end; its log is %s", e.what, by.doing(), by.server.Log)
	case by.server != nil && by.server.gone() && by.server.Shared:
		return fmt.Sprintf("%s: in use by %s: end that user", e.what, by.doing())
	case by.server != nil && by.server.gone():
		return fmt.Sprintf("%s: in use by %s: end that user, or cut it off with kill -INT %d, twice", e.what, by.doing(), by.server.PID)
	case by.server != nil:
		return fmt.Sprintf("%s: in use by the mount on %s (process %d): unmount that first", e.what, by.server.Mountpoint, by.server.PID)
	case by.pid != 0:
		return fmt.Sprintf("%s: in use by another mount, fsck or flatten (process %d): end that first", e.what, by.pid)
	}
	return e.what + ": in use by another mount, fsck or flatten, whose process cannot be seen from here: end that first"
}

// lockOwner finds out who has locked the directory open as fd.
func lockOwner(fd int) (owner, error) {
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return owner{}, err
	}
	id, err := lockID(fd)
	if err != nil {
		return owner{}, err
	}
	o := owner{pid: lockPID(string(locks), id)}
	if o.pid == 0 {
		return o, nil
	}
	paths, err := Sockets("")
	if err != nil {
		return o, err
	}
	for _, path := range paths {
		if !strings.HasSuffix(path, fmt.Sprintf(".%d.sock", o.pid)) {
			continue
		}
		if st, pidfd, err := Ask(path); err == nil {
			unix.Close(pidfd)
			if !st.Shared || st.has(fd) { // one of a pool's mounts, not just any
				o.server = &st
			}
		} else if pidfd >= 0 {
			unix.Close(pidfd)
		}
	}
	return o, nil
}

// has says whether a directory is the upper one or the workdir of a server's mount.
func (s *Status) has(fd int) bool {
	var own, st unix.Stat_t
	if unix.Fstat(fd, &own) != nil {
		return false
	}
	for _, dir := range []string{s.Upper, s.Work} {
		if dir != "" && unix.Stat(dir, &st) == nil && st.Dev == own.Dev && st.Ino == own.Ino {
			return true
		}
	}
	return false
}

// lockID names a directory as /proc/locks does: by its filesystem's number, which on btrfs is not its st_dev.
func lockID(fd int) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	sb, err := filesystemOf(fd, "")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%02x:%02x:%d", sb.major, sb.minor, st.Ino), nil
}

// deviceNumber is a filesystem's.
type deviceNumber struct{ major, minor uint32 }

// filesystemOf tells which filesystem path, relative to fd, or fd itself, is on. All subvolumes of a btrfs are one.
func filesystemOf(fd int, path string) (deviceNumber, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, path, unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return deviceNumber{}, err
	}
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return deviceNumber{}, err
	}
	for line := range strings.Lines(string(info)) {
		var id, parent uint64
		var d deviceNumber
		if n, _ := fmt.Sscanf(line, "%d %d %d:%d", &id, &parent, &d.major, &d.minor); n == 4 && id == st.Mnt_id {
			return d, nil
		}
	}
	return deviceNumber{st.Dev_major, st.Dev_minor}, nil // not mounted here, but open
}

// lockPID looks a flock up in the text of /proc/locks: "1: FLOCK  ADVISORY  WRITE 1234 08:02:131 0 EOF". It may be this
// process's: a pool's server has other mounts, and with survive=on the number is the first server's, long dead perhaps.
func lockPID(locks, id string) int {
	for line := range strings.Lines(locks) {
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" || f[5] != id {
			continue
		}
		if pid, err := strconv.Atoi(f[4]); err == nil && pid > 0 {
			return pid
		}
	}
	return 0
}

// gone tells whether nobody can reach a server's mount by its name any more: the server says so, or neither its mount
// namespace nor this one has it.
func (s *Status) gone() bool {
	if s.Flushing {
		return true
	}
	for _, pid := range []string{"self", strconv.Itoa(s.PID)} {
		info, err := os.ReadFile("/proc/" + pid + "/mountinfo")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has just ended
		}
		if err != nil || hasDevice(string(info), s.Device) {
			return false
		}
	}
	return true
}

// hasDevice looks a Lamina mount up in the text of mountinfo.
func hasDevice(info, device string) bool {
	for line := range strings.Lines(info) {
		before, after, _ := strings.Cut(line, " - ")
		if f := strings.Fields(before); len(f) > 2 && f[2] == device && strings.HasPrefix(after, "fuse.lamina ") {
			return true
		}
	}
	return false
}
