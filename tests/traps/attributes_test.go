package traps

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/tests/mnt"
)

// asUser runs f without root's powers over files. f must not start goroutines that act on files.
func asUser(uid int, f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Setfsgid(uid)
	_ = unix.Setfsuid(uid)
	defer func() {
		_ = unix.Setfsuid(0)
		_ = unix.Setfsgid(0)
	}()
	f()
}

// Set-id bits go when an ordinary user writes or truncates, capabilities when anybody does: on a lower file, on a
// sketch, and on a complete file that is passed through.
func TestTrapSetIDDroppedOnWrite(t *testing.T) {
	eachPassthrough(t, func(t *testing.T, passthrough string) {
		for _, how := range []struct {
			name   string
			change func(path string) error
		}{
			{"pwrite", func(p string) error { return patch(p, "x", 100) }},
			{"truncate", func(p string) error { return unix.Truncate(p, 5000) }},
			{"open with O_TRUNC", func(p string) error {
				f, err := os.OpenFile(p, os.O_WRONLY|os.O_TRUNC, 0)
				if err == nil {
					err = f.Close()
				}
				return err
			}},
			{"write to a complete file", func(p string) error {
				if err := os.Chmod(p, 0o6777|os.ModeSetuid|os.ModeSetgid); err != nil {
					return err
				}
				return patch(p, "x", 100)
			}},
		} {
			t.Run(how.name, func(t *testing.T) {
				dir := lowerWith(t, map[string][]byte{"su": data(1, 3*block), "cap": data(1, 3*block)})
				for _, name := range []string{"su", "cap"} {
					check(t, unix.Chown(filepath.Join(dir, name), 1000, 1000))
					check(t, unix.Chmod(filepath.Join(dir, name), 0o6777))
				}
				check(t, unix.Setxattr(filepath.Join(dir, "cap"), "security.capability", capability(), 0))
				m := mnt.New(t, []string{dir}, "passthrough="+passthrough)
				if strings.HasPrefix(how.name, "write to a complete") {
					check(t, os.WriteFile(m.Path("su"), data(2, 3*block), 0o6777))
				}
				asUser(1000, func() { check(t, how.change(m.Path("su"))) })
				var st unix.Stat_t
				check(t, unix.Stat(m.Path("su"), &st))
				if st.Mode&0o6000 != 0 {
					t.Errorf("mode %#o after a user's change", st.Mode)
				}
				check(t, how.change(m.Path("cap"))) // as root
				_, err := unix.Getxattr(m.Path("cap"), "security.capability", make([]byte, 100))
				wantErrno(t, "security.capability after a change", err, unix.ENODATA)
				check(t, unix.Stat(m.Path("cap"), &st))
			})
		}
	})
}

// capability encodes cap_net_raw+ep.
func capability() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0x02000001)
	b = binary.LittleEndian.AppendUint32(b, 1<<13)
	return append(b, make([]byte, 12)...)
}

// The overlay's own attributes are escaped: what a container sets under these names is stored, listed and harmless.
func TestTrapOverlayXattrsAreEscaped(t *testing.T) {
	dir := lowerWith(t, map[string][]byte{"d/below": []byte("1"), "f": data(1, 2*block)})
	m := mnt.New(t, []string{dir})
	set := map[string][]string{
		"d": {"trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.opaque"},
		"f": {"trusted.overlay.metacopy", "trusted.overlay.whiteout", "trusted.overlay.lamina.origin", "trusted.overlay.overlay.x"},
	}
	for p, names := range set {
		for _, n := range names {
			if err := unix.Lsetxattr(m.Path(p), n, []byte("y"), 0); err != nil {
				t.Errorf("setting %s: %v", n, err)
			}
		}
	}
	for range 2 {
		wantFile(t, m.Path("d/below"), []byte("1"))
		wantFile(t, m.Path("f"), data(1, 2*block))
		for p, names := range set {
			listed := xattrNames(t, m.Path(p))
			slices.Sort(names)
			if !slices.Equal(listed, names) {
				t.Errorf("%s lists %q, want %q", p, listed, names)
			}
			for _, n := range names {
				b := make([]byte, 10)
				if k, err := unix.Lgetxattr(m.Path(p), n, b); err != nil || string(b[:k]) != "y" {
					t.Errorf("%s of %s: %q, %v", n, p, b[:max(k, 0)], err)
				}
			}
		}
		m.Remount()
	}
	for p, names := range set {
		for _, n := range names {
			check(t, unix.Lremovexattr(m.Path(p), n))
		}
		if left := xattrNames(t, m.Path(p)); len(left) > 0 {
			t.Errorf("%s still lists %q", p, left)
		}
	}
	wantFile(t, m.Path("d/below"), []byte("1"))
}

// What the overlay stores about a sketch or an opaque directory is not shown.
func TestPrivateXattrsAreHidden(t *testing.T) {
	dir := lowerWith(t, map[string][]byte{"f": data(1, 20*block), "d/x": nil, "e/x": nil})
	m := mnt.New(t, []string{dir})
	check(t, patch(m.Path("f"), "x", 0))
	check(t, os.RemoveAll(m.Path("d")))
	check(t, os.Mkdir(m.Path("d"), 0o755))
	check(t, os.Rename(m.Path("e"), m.Path("moved")))
	for range 2 {
		for _, p := range []string{"f", "d", "moved", ""} {
			if got := xattrNames(t, m.Path(p)); len(got) > 0 {
				t.Errorf("%q lists %q", p, got)
			}
		}
		m.Remount()
	}
}

func xattrNames(t *testing.T, path string) []string {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	check(t, err)
	var names []string
	for n := range bytes.SplitSeq(bytes.TrimRight(buf[:n], "\x00"), []byte{0}) {
		if len(n) > 0 {
			names = append(names, string(n))
		}
	}
	slices.Sort(names)
	return names
}

// The copier and the table's writes must not touch what a program sets.
func TestTrapTimesAreThePrograms(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": data(1, 100*block)})}, format)
		fd, err := unix.Open(m.Path("f"), unix.O_RDWR, 0)
		check(t, err)
		for i := range 50 {
			pwrite(t, fd, []byte("partial"), int64(i)*2*block+1000)
		}
		when := unix.Timespec{Sec: 1_234_567_890, Nsec: 987_654_321}
		check(t, unix.UtimesNanoAt(unix.AT_FDCWD, m.Path("f"), []unix.Timespec{when, when}, 0))
		mtime := func(what string) {
			t.Helper()
			var st unix.Stat_t
			check(t, unix.Stat(m.Path("f"), &st))
			if st.Mtim != when {
				t.Errorf("mtime is %v %s, and was set to %v", st.Mtim, what, when)
			}
		}
		mtime("at once")
		pread(t, fd, 100*block, 0) // completes every in-transit block
		mtime("after the copies")
		check(t, unix.Fsync(fd))
		mtime("after fsync")
		unix.Close(fd)
		m.Remount()
		mtime("after remount")
	})
}

// statfs is the upper's.
func TestStatfsIsTheUppers(t *testing.T) {
	small := mnt.Loop(t, 64, []string{"mkfs.ext4", "-q"}, "")
	upper, work := filepath.Join(small, "u"), filepath.Join(small, "w")
	check(t, os.Mkdir(upper, 0o755))
	check(t, os.Mkdir(work, 0o755))
	m := mnt.Start(t, configOn(t, lowerWith(t, map[string][]byte{"f": nil}), upper, work))
	var of, up unix.Statfs_t
	check(t, unix.Statfs(m.Dir, &of))
	check(t, unix.Statfs(upper, &up))
	if of.Blocks != up.Blocks || of.Namelen != up.Namelen || of.Files != up.Files {
		t.Errorf("statfs: %+v, the upper's: %+v", of, up)
	}
}

// 255 bytes of name work, 256 do not.
func TestLongNames(t *testing.T) {
	long := strings.Repeat("l", 255)
	m := mnt.New(t, []string{lowerWith(t, map[string][]byte{long: []byte("lower")})})
	wantFile(t, m.Path(long), []byte("lower"))
	check(t, patch(m.Path(long), "L", 0))
	wantFile(t, m.Path(long), []byte("Lower"))
	other := strings.Repeat("é", 127) + "x"
	check(t, os.Rename(m.Path(long), m.Path(other)))
	check(t, os.Mkdir(m.Path(long), 0o755)) // over its whiteout
	wantErrno(t, "256 bytes of name", os.Mkdir(m.Path(long+"l"), 0o755), unix.ENAMETOOLONG)
	var st unix.Stat_t
	wantErrno(t, "stat with 256 bytes of name", unix.Lstat(m.Path(long+"l"), &st), unix.ENAMETOOLONG)
	m.Remount()
	wantFile(t, m.Path(other), []byte("Lower"))
}
