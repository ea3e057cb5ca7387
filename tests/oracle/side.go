package oracle

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"lamina/tests/layers"
)

// side is one of the two mounts, with the descriptors held open in it.
type side struct {
	root  string
	fd    int // of root, O_PATH
	since int64
	held  [slots]held
}

type held struct {
	fd    int // -1: none
	path  string
	flags int
}

// openSide starts using the mount at root. Times at or after since (seconds) count as "now".
func openSide(root string, since int64) (*side, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", root, err)
	}
	s := &side{root: root, fd: fd, since: since}
	for i := range s.held {
		s.held[i].fd = -1
	}
	return s, nil
}

func (s *side) close() {
	for i := range s.held {
		s.drop(i)
	}
	unix.Close(s.fd)
}

func (s *side) drop(slot int) {
	if s.held[slot].fd >= 0 {
		unix.Close(s.held[slot].fd)
	}
	s.held[slot] = held{fd: -1}
}

// name keeps an empty path meaning the root.
func name(p string) string {
	if p == "" {
		return "."
	}
	return p
}

// full is for calls that have no *at form. They must not follow a last symbolic link.
func (s *side) full(p string) string { return s.root + "/" + name(p) }

// do performs one operation and returns everything that a program could tell from it.
func (s *side) do(o op) (result string) {
	var out string
	var err error
	asUser(o.uid, func() { out, err = s.act(o) })
	if err == nil {
		return "ok " + out
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

func (s *side) act(o op) (string, error) {
	h := s.held[o.slot]
	switch o.kind {
	case "open":
		return s.open(o)
	case "tmpfile":
		fd, err := unix.Openat(s.fd, name(o.path), o.flags|unix.O_CLOEXEC, o.mode)
		return s.hold(o, fd, err)
	case "linktmp":
		return "", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", h.fd), s.fd, name(o.to), unix.AT_SYMLINK_FOLLOW)
	case "fclose":
		s.drop(o.slot)
		return "", nil
	case "mkdir":
		return "", unix.Mkdirat(s.fd, name(o.path), o.mode)
	case "rmdir":
		return "", unix.Unlinkat(s.fd, name(o.path), unix.AT_REMOVEDIR)
	case "unlink":
		return "", unix.Unlinkat(s.fd, name(o.path), 0)
	case "rename":
		return "", unix.Renameat2(s.fd, name(o.path), s.fd, name(o.to), uint(o.flags))
	case "link":
		return "", unix.Linkat(s.fd, name(o.path), s.fd, name(o.to), o.flags)
	case "symlink":
		return "", unix.Symlinkat(o.to, s.fd, name(o.path))
	case "mknod":
		return "", unix.Mknodat(s.fd, name(o.path), o.mode, int(unix.Mkdev(1, 3)))
	case "readlink":
		buf := make([]byte, 4096)
		n, err := unix.Readlinkat(s.fd, name(o.path), buf)
		return string(buf[:max(n, 0)]), err
	case "readdir":
		return s.readdir(o.path)
	case "stat":
		var st unix.Stat_t
		if err := unix.Fstatat(s.fd, name(o.path), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return "", err
		}
		return s.attributes(&st), nil
	case "statx":
		return s.statx(o.path)
	case "access":
		return "", unix.Faccessat(s.fd, name(o.path), o.mode&7, unix.AT_EACCESS)
	case "chmod":
		return "", unix.Fchmodat(s.fd, name(o.path), o.mode, 0)
	case "chown":
		return "", unix.Fchownat(s.fd, name(o.path), int(o.n), int(o.off), unix.AT_SYMLINK_NOFOLLOW)
	case "utimes":
		return "", unix.UtimesNanoAt(s.fd, name(o.path), times(o), unix.AT_SYMLINK_NOFOLLOW)
	case "truncate":
		return "", s.truncate(o)
	case "setxattr":
		return "", unix.Lsetxattr(s.full(o.path), o.name, value(o), o.flags)
	case "getxattr":
		return getxattr(func(b []byte) (int, error) { return unix.Lgetxattr(s.full(o.path), o.name, b) })
	case "listxattr":
		return listxattr(s.full(o.path))
	case "removexattr":
		return "", unix.Lremovexattr(s.full(o.path), o.name)
	}
	return s.actOnDescriptor(o, h)
}

func (s *side) actOnDescriptor(o op, h held) (string, error) {
	if h.fd < 0 {
		return "no descriptor", nil
	}
	switch o.kind {
	case "pread":
		buf := make([]byte, o.n)
		n, err := unix.Pread(h.fd, buf, o.off)
		return digest(buf[:max(n, 0)]), err
	case "read":
		buf := make([]byte, o.n)
		n, err := unix.Read(h.fd, buf)
		return digest(buf[:max(n, 0)]), err
	case "pwrite":
		n, err := unix.Pwrite(h.fd, layers.Bytes(o.seed, o.n), o.off)
		return fmt.Sprint(n), err
	case "pappend": // at the descriptor's own offset, at the end with O_APPEND
		n, err := unix.Write(h.fd, layers.Bytes(o.seed, o.n))
		return fmt.Sprint(n), err
	case "fsync":
		return "", unix.Fsync(h.fd)
	case "fstat":
		var st unix.Stat_t
		err := unix.Fstat(h.fd, &st)
		return s.attributes(&st), err
	case "ftruncate":
		return "", unix.Ftruncate(h.fd, o.off)
	case "fallocate":
		return "", unix.Fallocate(h.fd, uint32(o.flags), o.off, o.n)
	case "copyrange":
		from, to := o.off, o.off/3
		n, err := unix.CopyFileRange(h.fd, &from, s.held[o.sl].fd, &to, int(o.n), 0)
		return fmt.Sprint(n), err
	case "fseek":
		return s.seekIsTrue(h, o)
	case "mread":
		return mapped(h.fd, o, unix.PROT_READ, func(b []byte) string { return digest(b) })
	case "mwrite":
		return mapped(h.fd, o, unix.PROT_READ|unix.PROT_WRITE, func(b []byte) string {
			return fmt.Sprint(copy(b, layers.Bytes(o.seed, int64(len(b)))))
		})
	case "fchmod":
		return "", unix.Fchmod(h.fd, o.mode)
	case "fchown":
		return "", unix.Fchown(h.fd, int(o.n), int(o.off))
	case "futimes":
		return "", unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", h.fd), times(o), 0)
	case "fsetxattr":
		return "", unix.Fsetxattr(h.fd, o.name, value(o), o.flags)
	}
	return "", fmt.Errorf("no operation %q", o.kind)
}

func (s *side) open(o op) (string, error) {
	// In the root, so that no symbolic link leads to the host; without blocking on a fifo.
	how := unix.OpenHow{Flags: uint64(o.flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_XDEV}
	if o.flags&unix.O_PATH == 0 {
		how.Flags |= unix.O_NONBLOCK
	} else {
		how.Flags &= unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	}
	if how.Flags&unix.O_CREAT != 0 {
		how.Mode = uint64(o.mode)
	}
	fd, err := unix.Openat2(s.fd, name(o.path), &how)
	return s.hold(o, fd, err)
}

// hold keeps a descriptor in the operation's slot.
func (s *side) hold(o op, fd int, err error) (string, error) {
	if err != nil {
		return "", err
	}
	s.drop(o.slot)
	s.held[o.slot] = held{fd: fd, path: o.path, flags: o.flags}
	return "", nil
}

// truncate is truncate(2) on what the path leads to within the root.
func (s *side) truncate(o op) error {
	fd, err := unix.Openat2(s.fd, name(o.path), &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Truncate(fmt.Sprintf("/proc/self/fd/%d", fd), o.off)
}

// seekIsTrue checks an answer of SEEK_DATA or SEEK_HOLE against the contents. Where exactly holes lie is the
// filesystem's affair; that they read as zeros, and that the end of the file is respected, is not.
func (s *side) seekIsTrue(h held, o op) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(h.fd, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || h.flags&unix.O_ACCMODE == unix.O_WRONLY || h.flags&unix.O_PATH != 0 {
		return "not asked", nil
	}
	got, err := unix.Seek(h.fd, o.off, o.flags)
	defer unix.Seek(h.fd, 0, unix.SEEK_SET)
	switch {
	case o.off >= st.Size:
		if !errors.Is(err, unix.ENXIO) {
			return "", fmt.Errorf("seek at %d of %d bytes: %v, not ENXIO", o.off, st.Size, err)
		}
		return "past the end", nil
	case errors.Is(err, unix.ENXIO) && o.flags == unix.SEEK_DATA:
		got = st.Size // no data from here on
	case err != nil:
		return "", err
	}
	if got < o.off || got > st.Size {
		return "", fmt.Errorf("seek at %d of %d bytes gave %d", o.off, st.Size, got)
	}
	if o.flags == unix.SEEK_DATA {
		skipped := make([]byte, got-o.off)
		if n, err := unix.Pread(h.fd, skipped, o.off); err != nil || n != len(skipped) || len(bytes.TrimLeft(skipped, "\x00")) > 0 {
			return "", fmt.Errorf("SEEK_DATA from %d skipped to %d over bytes that are not zero (%d, %v)", o.off, got, n, err)
		}
	}
	return "true", nil
}

// mapped runs f over a shared mapping of the operation's range, cut at the end of the file.
func mapped(fd int, o op, prot int, f func([]byte) string) (out string, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	start := o.off &^ int64(os.Getpagesize()-1)
	end := min(o.off+o.n, st.Size)
	if st.Mode&unix.S_IFMT != unix.S_IFREG || end <= o.off {
		return "nothing to map", nil
	}
	m, err := unix.Mmap(fd, start, int(end-start), prot, unix.MAP_SHARED)
	if err != nil {
		return "", err
	}
	defer func() {
		if e := unix.Munmap(m); err == nil {
			err = e
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if recover() != nil {
			err = errors.New("SIGBUS")
		}
	}()
	out = f(m[o.off-start:])
	if prot&unix.PROT_WRITE != 0 {
		err = unix.Msync(m, unix.MS_SYNC)
	}
	return out, err
}

func (s *side) readdir(p string) (string, error) {
	fd, err := unix.Openat(s.fd, name(p), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), p)
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return "", err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name()+":"+typeLetter(e.Type()))
	}
	slices.Sort(names)
	return strings.Join(names, " "), nil
}

func typeLetter(m fs.FileMode) string { return m.Type().String()[:1] }

// attributes are those that two implementations must agree on. The size of a directory, its link count, numbers of
// inodes and devices, and blocks are each one's own.
func (s *side) attributes(st *unix.Stat_t) string {
	a := fmt.Sprintf("mode=%#o uid=%d gid=%d mtime=%s", st.Mode, st.Uid, st.Gid, s.time(st.Mtim))
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return a
	case unix.S_IFCHR, unix.S_IFBLK:
		a += fmt.Sprintf(" rdev=%#x", st.Rdev)
	}
	return a + fmt.Sprintf(" size=%d nlink=%d", st.Size, st.Nlink)
}

// time tells times that somebody set from times of this run, which differ between the sides.
func (s *side) time(ts unix.Timespec) string {
	if ts.Sec >= s.since {
		return "now"
	}
	return fmt.Sprintf("%d.%09d", ts.Sec, ts.Nsec)
}

func (s *side) statx(p string) (string, error) {
	var st unix.Statx_t
	if err := unix.Statx(s.fd, name(p), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		return "", err
	}
	if st.Mask&unix.STATX_BASIC_STATS != unix.STATX_BASIC_STATS {
		return "", fmt.Errorf("statx mask %#x lacks basic attributes", st.Mask)
	}
	return fmt.Sprintf("mode=%#o uid=%d gid=%d blksize>0=%t", st.Mode, st.Uid, st.Gid, st.Blksize > 0), nil
}

// snapshot describes every object of the tree and every held descriptor, one line each, keyed by path.
func (s *side) snapshot() (map[string]string, error) {
	all := map[string]string{}
	if err := s.walk("", all); err != nil {
		return nil, err
	}
	for i, h := range s.held {
		if h.fd < 0 || h.flags&unix.O_PATH != 0 {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstat(h.fd, &st); err != nil {
			return nil, fmt.Errorf("slot %d (%s): %w", i, h.path, err)
		}
		line := s.attributes(&st)
		if st.Mode&unix.S_IFMT == unix.S_IFREG && h.flags&unix.O_ACCMODE != unix.O_WRONLY {
			line += " data=" + contents(h.fd)
		}
		all[fmt.Sprintf("slot %d", i)] = line
	}
	return all, nil
}

func (s *side) walk(p string, all map[string]string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(s.fd, name(p), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("stat %q: %w", p, err)
	}
	line := s.attributes(&st)
	x, err := xattrLine(s.full(p))
	if err != nil {
		return fmt.Errorf("xattrs of %q: %w", p, err)
	}
	line += x
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		target, err := os.Readlink(s.full(p))
		if err != nil {
			return err
		}
		line += " -> " + target
	case unix.S_IFREG:
		fd, err := unix.Openat(s.fd, p, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %q: %w", p, err)
		}
		line += " data=" + contents(fd)
		unix.Close(fd)
	}
	all["/"+p] = line
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	entries, err := os.ReadDir(s.full(p))
	if err != nil {
		return fmt.Errorf("readdir %q: %w", p, err)
	}
	for _, e := range entries {
		if err := s.walk(strings.TrimPrefix(p+"/"+e.Name(), "/"), all); err != nil {
			return err
		}
	}
	return nil
}

// contents digests a whole file.
func contents(fd int) string {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		n, err := unix.Pread(fd, buf, off)
		if err != nil {
			return "read at " + fmt.Sprint(off) + ": " + err.Error()
		}
		if n == 0 {
			return fmt.Sprintf("%d:%x", off, h.Sum(nil)[:8])
		}
		h.Write(buf[:n])
		off += int64(n)
	}
}

func digest(b []byte) string { return fmt.Sprintf("%d:%x", len(b), sha256.Sum256(b))[:min(30, 80)] }

func times(o op) []unix.Timespec {
	return []unix.Timespec{{Sec: 1_100_000_000}, {Sec: 1_200_000_000 + o.off, Nsec: int64(o.seed % 1e9)}}
}

// value is what an xattr operation sets.
func value(o op) []byte {
	if strings.HasPrefix(o.name, "system.posix_acl") && o.seed%4 != 0 {
		return []byte(layers.ACL())
	}
	return layers.Bytes(o.seed, o.n)
}

func getxattr(get func([]byte) (int, error)) (string, error) {
	buf := make([]byte, 1<<16)
	n, err := get(buf)
	return digest(buf[:max(n, 0)]), err
}

func listxattr(path string) (string, error) {
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return "", err
	}
	names := strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	return strings.Join(names, " "), nil
}

// xattrLine lists names and values.
func xattrLine(path string) (string, error) {
	names, err := listxattr(path)
	if err != nil || names == "" {
		return "", err
	}
	var line string
	for n := range strings.SplitSeq(names, " ") {
		v, err := getxattr(func(b []byte) (int, error) { return unix.Lgetxattr(path, n, b) })
		if err != nil {
			return "", fmt.Errorf("%s: %w", n, err)
		}
		line += " " + n + "=" + v
	}
	return line, nil
}
