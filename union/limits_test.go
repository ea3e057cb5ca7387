package union

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"lamina/block"
	"lamina/layer"

	"golang.org/x/sys/unix"
)

// A mount ends also when a file cannot be saved: with the error, and with nothing left running.
func TestCloseWhenAFileCannotSettle(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), strings.Repeat("a", wholeMax+20000)) })
	s.umount()
	routines := runtime.NumGoroutine()
	s.change = func(c *Config) {
		c.Engine.Close()
		c.Engine = block.NewEngine(block.Options{CaW: block.CaWLazy, SettleDelay: time.Hour, Logf: t.Logf})
	}
	s.mount()
	s.write("f", "X", 5000)                                    // the rest of the block is still below,
	must(t, os.Truncate(filepath.Join(s.lowers[0], "f"), 100)) // and then it is not
	err := s.fs.Close()
	s.fs = nil
	wantErr(t, err, unix.EIO)
	for i := 0; runtime.NumGoroutine() > routines; i++ {
		if i == 3000 {
			t.Fatalf("%d goroutines after Close, %d before the mount", runtime.NumGoroutine(), routines)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A filesystem that cannot hold an upper layer is refused at once, by what it lacks. Kernel overlayfs is one: it cannot
// rename with a whiteout.
func TestUpperWithoutWhiteoutRenamesIsRefused(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"lower", "u", "w", "mnt"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	mnt := filepath.Join(dir, "mnt")
	must(t, unix.Mount("overlay", mnt, "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/u,workdir=%[1]s/w", dir)))
	t.Cleanup(func() { must(t, unix.Unmount(mnt, 0)) })
	for _, d := range []string{"upper", "work"} {
		must(t, os.Mkdir(filepath.Join(mnt, d), 0o755))
	}
	cfg := Config{Engine: newTestEngine(t.Logf),
		Lowers: []layer.Layer{openDir(t, filepath.Join(dir, "lower"), layer.Options{ReadOnly: true})},
		Upper:  openDir(t, filepath.Join(mnt, "upper"), layer.Options{}),
		Work:   openDir(t, filepath.Join(mnt, "work"), layer.Options{})}
	defer closeAll(cfg)
	_, err := New(cfg)
	if err == nil || !strings.Contains(err.Error(), "ext4, XFS, btrfs or tmpfs") {
		t.Fatalf("New on an upper of kernel overlayfs says %v", err)
	}
	t.Log(err)
}

// Without O_TMPFILE new objects are made under a temporary name.
func TestUpperWithoutTmpfile(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "f"), strings.Repeat("f", 9000))
		put(t, p(0, "l1"), "link")
		must(t, os.Link(p(0, "l1"), p(0, "l2")))
	})
	s.fs.noTmpfile = true
	s.write("f", "X", 0)
	s.write("l2", "X", 0)
	s.wantRead("l1", "Xink")
	list, err := os.ReadDir(filepath.Join(s.work(), tmpDir))
	must(t, err)
	if len(list) > 0 {
		t.Errorf("left in %s: %v", tmpDir, list)
	}
	s.remount()
	s.wantRead("f", "X"+strings.Repeat("f", 8999))
	s.wantRead("l1", "Xink")
}

// What a workdir's default ACL says is not for the files that pass through it.
func TestWorkdirACLIsNotInherited(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { put(t, p(0, "f"), "f") })
	s.umount()
	// user::rwx, user:99:rwx, group::rwx, mask::rwx, other::rwx
	acl := "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x07\x00\x63\x00\x00\x00" +
		"\x04\x00\x07\x00\xff\xff\xff\xff" + "\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x07\x00\xff\xff\xff\xff"
	must(t, os.RemoveAll(filepath.Join(s.work(), workRoot)))
	setx(t, s.work(), aclDefault, acl)
	s.mount()
	s.write("f", "F", 0)
	if _, err := s.fs.Getxattr(s.node("f"), aclAccess); !errors.Is(err, unix.ENODATA) {
		t.Errorf("the copied-up file has an ACL (%v)", err)
	}
	if st := s.stat("f"); st.Mode&0o7777 != 0o644 {
		t.Errorf("mode %o", st.Mode&0o7777)
	}
}

// What is changed on the way up is what would have been changed afterwards.
func TestChangesAtCopyUp(t *testing.T) {
	caps := string([]byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	names := []string{"early", "late"}
	s := newStack(t, 1, func(p func(int, string) string) {
		for _, f := range names {
			put(t, p(0, f), "program")
			must(t, os.Chown(p(0, f), 5, 6))
			setx(t, p(0, f), "security.capability", caps)
			must(t, unix.Chmod(p(0, f), 0o6755))
		}
	})
	uid, mode := uint32(9), uint32(0o2711)
	for _, c := range []SetAttr{{UID: &uid}, {Mode: &mode}, {GID: &uid, Mode: &mode}, {Mtime: &unix.Timespec{Sec: 1000}}} {
		must(t, s.fs.copyUp(s.node("late")))
		var got [2]string
		for i, f := range names {
			st, err := s.fs.SetAttr(s.node(f), c)
			must(t, err)
			v, err := s.fs.Getxattr(s.node(f), "security.capability")
			got[i] = fmt.Sprintf("mode %o owner %d:%d size %d mtime %d caps %x %v", st.Mode, st.Uid, st.Gid, st.Size, st.Mtim.Sec, v, err != nil)
			if c.Mtime == nil {
				got[i] = strings.Replace(got[i], fmt.Sprint(st.Mtim.Sec), "", 1)
			}
		}
		if got[0] != got[1] {
			t.Errorf("%+v at copy-up: %s\nafter it: %s", c, got[0], got[1])
		}
		s.umount()
		for _, d := range []string{s.upper(""), s.work()} {
			must(t, os.RemoveAll(d))
			must(t, os.Mkdir(d, 0o755))
		}
		s.mount()
	}
}

// The kernel sends every chown of a file with the order to drop privileges.
func TestChownDropsPrivilegesOnTheWayUp(t *testing.T) {
	caps := string([]byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "f"), "program")
		setx(t, p(0, "f"), "security.capability", caps)
		must(t, unix.Chmod(p(0, "f"), 0o6755))
	})
	uid := uint32(1000)
	st, err := s.fs.SetAttr(s.node("f"), SetAttr{UID: &uid, KillPriv: true})
	must(t, err)
	if st.Uid != uid || st.Mode&0o7777 != 0o755 {
		t.Errorf("owner %d, mode %o", st.Uid, st.Mode&0o7777)
	}
	_, err = s.fs.Getxattr(s.node("f"), "security.capability")
	wantErr(t, err, unix.ENODATA)
	s.wantRead("f", "program")
}

// A file whose removal failed is an ordinary file again: nothing of it stays open.
func TestFailedUnlinkKeepsNothingOpen(t *testing.T) {
	s := newStack(t, 1, func(p func(int, string) string) { must(t, os.Mkdir(p(0, "d"), 0o755)) })
	s.create("d/f", "data")
	dir, err := os.Open(s.upper("d"))
	must(t, err)
	defer dir.Close()
	const immutable = 0x10 // FS_IMMUTABLE_FL
	must(t, unix.IoctlSetPointerInt(int(dir.Fd()), unix.FS_IOC_SETFLAGS, immutable))
	n := s.node("d/f")
	err = s.unlink("d/f")
	must(t, unix.IoctlSetPointerInt(int(dir.Fd()), unix.FS_IOC_SETFLAGS, 0))
	wantErr(t, err, unix.EPERM)
	if n.kept != nil || n.cur.Load() != nil {
		t.Error("the file stays open")
	}
	s.wantRead("d/f", "data")
	must(t, s.unlink("d/f"))
}
