package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func wantErr(t *testing.T, what string, err error, want unix.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func names(entries []Entry) []string {
	var s []string
	for _, e := range entries {
		s = append(s, e.Name)
	}
	slices.Sort(s)
	return s
}

func TestReadSide(t *testing.T) {
	for _, ro := range []bool{true, false} {
		t.Run(fmt.Sprintf("ReadOnly=%v", ro), func(t *testing.T) {
			root := t.TempDir()
			must(t, os.MkdirAll(root+"/a/b", 0o755))
			writeFile(t, root+"/a/b/file", "hello")
			must(t, os.Symlink("../nowhere", root+"/a/link"))
			d := open(t, root, Options{ReadOnly: ro})

			st, err := d.Stat("a/b/file")
			must(t, err)
			var want unix.Stat_t
			must(t, unix.Lstat(root+"/a/b/file", &want))
			if st.Ino != want.Ino || st.Size != 5 || st.Mode != want.Mode {
				t.Errorf("Stat: got %+v, want %+v", st, want)
			}
			st, err = d.Stat("")
			must(t, err)
			if st.Mode&unix.S_IFMT != unix.S_IFDIR {
				t.Errorf("the root is not a directory: %o", st.Mode)
			}
			entries, err := d.ReadDir("a")
			must(t, err)
			if got := names(entries); !slices.Equal(got, []string{"b", "link"}) {
				t.Errorf("ReadDir: %q", got)
			}
			for _, e := range entries {
				if e.Name == "link" && e.Type != unix.DT_LNK || e.Name == "b" && e.Type != unix.DT_DIR {
					t.Errorf("type of %s: %d", e.Name, e.Type)
				}
			}
			target, err := d.Readlink("a/link")
			must(t, err)
			if target != "../nowhere" {
				t.Errorf("Readlink: %q", target)
			}
			f, err := d.Open("a/b/file")
			must(t, err)
			defer f.Close()
			buf := make([]byte, 10)
			if n, err := f.ReadAt(buf, 1); n != 4 || err != io.EOF || string(buf[:n]) != "ello" {
				t.Errorf("ReadAt: %d %q %v", n, buf[:n], err)
			}
			if start, end, err := f.SeekData(2); start != 2 || end != 5 || err != nil {
				t.Errorf("SeekData: %d %d %v", start, end, err)
			}
			if _, _, err := f.SeekData(5); !errors.Is(err, unix.ENXIO) {
				t.Errorf("SeekData at the end: %v", err)
			}
			_, err = d.Stat("a/none")
			wantErr(t, "Stat of nothing", err, unix.ENOENT)
			_, err = d.Stat("a/b/file/x")
			wantErr(t, "Stat below a file", err, unix.ENOTDIR)
			_, err = d.Getxattr("a/b/file", "user.none")
			wantErr(t, "Getxattr of nothing", err, unix.ENODATA)
		})
	}
}

// A large directory takes several getdents64 calls.
func TestReadDirLarge(t *testing.T) {
	root := t.TempDir()
	var want []string
	for i := range 3000 {
		name := fmt.Sprintf("%04d-%s", i, strings.Repeat("n", i%240))
		want = append(want, name)
		writeFile(t, root+"/"+name, "")
	}
	entries, err := open(t, root, Options{}).ReadDir("")
	must(t, err)
	if got := names(entries); !slices.Equal(got, want) {
		t.Errorf("got %d names, want %d", len(got), len(want))
	}
}

// Nothing in a tree leads outside, whatever its author put there.
func TestHostileTree(t *testing.T) {
	outside := t.TempDir()
	writeFile(t, outside+"/secret", "secret")
	must(t, os.Mkdir(outside+"/dir", 0o755))
	root := t.TempDir()
	rel, err := filepath.Rel(root, outside)
	must(t, err)
	must(t, os.Symlink(rel, root+"/rel"))
	must(t, os.Symlink(outside, root+"/abs"))
	must(t, os.Symlink(".", root+"/self"))
	must(t, os.Symlink("loop", root+"/loop"))
	must(t, os.Symlink(outside+"/secret", root+"/file"))
	must(t, os.Symlink("/proc/self/cwd", root+"/magic"))
	must(t, os.Mkdir(root+"/dir", 0o755))
	must(t, os.Symlink(outside, root+"/dir/abs"))
	for _, ro := range []bool{true, false} {
		d := open(t, root, Options{ReadOnly: ro})
		for _, parent := range []string{"rel", "abs", "self", "loop", "magic", "dir/abs", "self/dir"} {
			for _, name := range []string{"secret", "dir", "dir/x"} {
				path := parent + "/" + name
				if _, err := d.Stat(path); !errors.Is(err, unix.ELOOP) && !errors.Is(err, unix.ENOTDIR) {
					t.Errorf("Stat(%q): %v", path, err)
				}
				if f, err := d.Open(path); err == nil {
					f.Close()
					t.Errorf("Open(%q) succeeded", path)
				}
			}
			if _, err := d.ReadDir(parent); err == nil {
				t.Errorf("ReadDir(%q) succeeded", parent)
			}
		}
		_, err := d.Open("file")
		wantErr(t, "Open of a symlink", err, unix.ELOOP)
		for _, path := range []string{"..", ".", "../x", "dir/..", "dir/../..", "dir/../../x", "/", "/etc", "dir/", "dir//x", "./dir", "dir/./x"} {
			if _, err := d.Stat(path); !errors.Is(err, unix.EINVAL) {
				t.Errorf("Stat(%q): %v, want EINVAL", path, err)
			}
		}
		_, err = d.Stat("dir\x00x")
		wantErr(t, "NUL in a name", err, unix.EINVAL)
		_, err = d.Stat("dir\x00/x")
		wantErr(t, "NUL in a parent's name", err, unix.EINVAL)
	}

	// The writing side neither.
	d := open(t, root, Options{})
	for what, err := range map[string]error{
		"Mkdir":      d.Mkdir("abs/new", 0o755),
		"Symlink":    d.Symlink("x", "rel/new"),
		"Unlink":     d.Unlink("abs/secret"),
		"Chmod":      d.Chmod("abs/secret", 0),
		"Setxattr":   d.Setxattr("abs/secret", "user.x", nil, 0),
		"Rename out": Rename(d, "dir", d, "abs/stolen", 0),
		"Rename ..":  Rename(d, "dir", d, "..", 0),
		"Link":       d.Link("file", "abs/linked"),
		"Mkdir ..":   d.Mkdir("dir/..", 0o755),
	} {
		if err == nil {
			t.Errorf("%s succeeded", what)
		}
	}
	// What names a symlink itself changes the symlink.
	must(t, d.Chown("file", 12, 34))
	must(t, d.Utimes("file", [2]unix.Timespec{{Sec: 1}, {Sec: 2}}))
	wantErr(t, "Chmod of a symlink", d.Chmod("file", 0), unix.EOPNOTSUPP)
	must(t, d.Setxattr("file", "trusted.x", []byte("v"), 0))
	var st unix.Stat_t
	must(t, unix.Stat(outside+"/secret", &st))
	if st.Uid == 12 || st.Mtim.Sec == 2 || st.Mode&0o777 != 0o644 {
		t.Errorf("the file outside was changed: %+v", st)
	}
	if _, err := unix.Getxattr(outside+"/secret", "trusted.x", nil); err != unix.ENODATA {
		t.Errorf("the file outside has the attribute: %v", err)
	}
	entries, err := os.ReadDir(outside)
	must(t, err)
	if len(entries) != 2 {
		t.Errorf("the directory outside was changed: %v", entries)
	}
}

// A directory that was seen as one and replaced by a symlink is not followed once the layer is told.
func TestSymlinkSwappedIn(t *testing.T) {
	outside := t.TempDir()
	writeFile(t, outside+"/x", "secret")
	root := t.TempDir()
	must(t, os.Mkdir(root+"/dir", 0o755))
	writeFile(t, root+"/dir/x", "mine")
	d := open(t, root, Options{})
	_, err := d.Stat("dir/x")
	must(t, err)
	must(t, os.Rename(root+"/dir", root+"/old"))
	must(t, os.Symlink(outside, root+"/dir"))

	// Behind the layer's back: the directory kept open is still the one inside.
	f, err := d.Open("dir/x")
	must(t, err)
	buf := make([]byte, 6)
	n, _ := f.ReadAt(buf, 0)
	f.Close()
	if string(buf[:n]) != "mine" {
		t.Errorf("read %q through a swapped directory", buf[:n])
	}
	d.Invalidate("dir")
	_, err = d.Stat("dir/x")
	wantErr(t, "Stat through the symlink", err, unix.ELOOP)
}

// Opening never blocks on a fifo and never reaches a device.
func TestOpenOnlyRegular(t *testing.T) {
	root := t.TempDir()
	must(t, unix.Mkfifo(root+"/fifo", 0o666))
	must(t, unix.Mknod(root+"/zero", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
	must(t, unix.Mknod(root+"/block", unix.S_IFBLK|0o666, int(unix.Mkdev(7, 250))))
	must(t, unix.Mknod(root+"/socket", unix.S_IFSOCK|0o666, 0))
	must(t, os.Mkdir(root+"/dir", 0o755))
	for _, ro := range []bool{true, false} {
		d := open(t, root, Options{ReadOnly: ro})
		for _, name := range []string{"fifo", "zero", "block", "socket"} {
			_, err := d.Open(name)
			wantErr(t, "Open of "+name, err, unix.EINVAL)
		}
		_, err := d.Open("dir")
		wantErr(t, "Open of a directory", err, unix.EISDIR)
		_, err = d.Open("")
		wantErr(t, "Open of the root", err, unix.EISDIR)
	}
	d := open(t, root, Options{})
	for _, name := range []string{"fifo", "zero", "block", "socket"} {
		_, err := d.OpenFile(name, unix.O_RDWR|unix.O_CREAT, 0o644)
		wantErr(t, "OpenFile(O_RDWR|O_CREAT) of "+name, err, unix.EINVAL)
	}
}

// The kernel itself refuses to write through a read-only layer, also when it reopens a file with other flags, as FUSE
// passthrough does.
func TestReadOnlyClone(t *testing.T) {
	root := t.TempDir()
	writeFile(t, root+"/file", "lower")
	must(t, unix.Mknod(root+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	d, err := OpenDir(root, Options{ReadOnly: true})
	must(t, err)
	if !d.Cloned() {
		t.Fatalf("no clone: %v", d.CloneErr())
	}
	f, err := d.Open("file")
	must(t, err)
	defer f.Close()
	fd := f.(FDer).FD()
	for _, flags := range []int{unix.O_RDWR, unix.O_WRONLY, unix.O_RDWR | unix.O_TRUNC} {
		if _, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), flags, 0); err != unix.EROFS {
			t.Errorf("reopening with flags %#x: %v, want EROFS", flags, err)
		}
		if _, err := unix.Openat(d.RootFD(), "file", flags, 0); err != unix.EROFS {
			t.Errorf("opening through the root with flags %#x: %v, want EROFS", flags, err)
		}
		_, err := d.OpenFile("file", flags, 0)
		wantErr(t, "OpenFile for writing", err, unix.EROFS)
	}
	if _, err := unix.Openat(d.RootFD(), "null", unix.O_RDONLY, 0); err != unix.EACCES {
		t.Errorf("opening a device through the root: %v, want EACCES", err)
	}
	if err := unix.Fchmodat(d.RootFD(), "file", 0, 0); err != unix.EROFS {
		t.Errorf("chmod through the root: %v, want EROFS", err)
	}
	_, err = d.OpenFile("new", unix.O_CREAT|unix.O_RDONLY, 0o644)
	wantErr(t, "creating", err, unix.EROFS)
	_, err = d.Tmpfile("", 0o644)
	wantErr(t, "Tmpfile", err, unix.EROFS)
	up := open(t, t.TempDir(), Options{})
	must(t, up.Mkdir("dir", 0o755))
	for what, err := range map[string]error{
		"Mkdir": d.Mkdir("x", 0), "Mknod": d.Mknod("x", unix.S_IFIFO, 0), "Symlink": d.Symlink("x", "y"),
		"Link": d.Link("file", "x"), "Unlink": d.Unlink("file"), "Rmdir": d.Rmdir("x"), "Chown": d.Chown("file", 1, 1),
		"Chmod": d.Chmod("file", 0), "Utimes": d.Utimes("file", [2]unix.Timespec{}),
		"Setxattr": d.Setxattr("file", "user.x", nil, 0), "Removexattr": d.Removexattr("file", "user.x"),
		"Rename from": Rename(d, "file", up, "file", 0), "Rename to": Rename(up, "dir", d, "x", 0),
		"LinkFD": d.LinkFD(fd, "x"), "FChmod": d.FChmod(fd, 0), "FChown": d.FChown(fd, 1, 1),
	} {
		wantErr(t, what, err, unix.EROFS)
	}

	// The clone ends with the last descriptor, which is the file's here.
	must(t, d.Close())
	wantErr(t, "closing twice", d.Close(), unix.EBADF)
	buf := make([]byte, 5)
	if _, err := f.ReadAt(buf, 0); err != nil || string(buf) != "lower" {
		t.Errorf("reading after Close: %q %v", buf, err)
	}
	if _, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR, 0); err != unix.EROFS {
		t.Errorf("reopening after Close: %v, want EROFS", err)
	}
}

// A layer is one mount, as for kernel overlayfs: what is mounted below its root is not part of it.
func TestSubmountNotShown(t *testing.T) {
	root := t.TempDir()
	must(t, os.Mkdir(root+"/sub", 0o755))
	writeFile(t, root+"/sub/under", "")
	mount(t, "tmpfs", root+"/sub", "tmpfs", "")
	writeFile(t, root+"/sub/over", "")
	d := open(t, root, Options{ReadOnly: true})
	entries, err := d.ReadDir("sub")
	must(t, err)
	if got := names(entries); !slices.Equal(got, []string{"under"}) {
		t.Errorf("below the mount point: %q", got)
	}
	_, err = open(t, root, Options{}).Stat("sub/over")
	wantErr(t, "crossing a mount point without a clone", err, unix.EXDEV)
}

func TestOpenDirErrors(t *testing.T) {
	root := t.TempDir()
	writeFile(t, root+"/file", "")
	must(t, os.Mkdir(root+"/dir", 0o755))
	must(t, os.Symlink("dir", root+"/link"))
	for _, ro := range []bool{true, false} {
		_, err := OpenDir(root+"/none", Options{ReadOnly: ro})
		wantErr(t, "missing", err, unix.ENOENT)
		_, err = OpenDir(root+"/file", Options{ReadOnly: ro})
		wantErr(t, "a file", err, unix.ENOTDIR)
		if err != nil && !strings.Contains(err.Error(), root+"/file") {
			t.Errorf("the error does not name the layer: %v", err)
		}
		open(t, root+"/link", Options{ReadOnly: ro}) // Podman names lowers by symlinks
	}
}

// Paths far beyond PATH_MAX are walked in steps.
func TestDeepTree(t *testing.T) {
	root := t.TempDir()
	d := open(t, root, Options{})
	path := strings.Repeat("0", 255)
	must(t, d.Mkdir(path, 0o755))
	for len(path) < 20_000 {
		path += "/" + strings.Repeat(string(rune('a'+len(path)%26)), 255)
		must(t, d.Mkdir(path, 0o755))
	}
	fd, err := d.OpenFile(path+"/file", unix.O_CREAT|unix.O_RDWR, 0o644)
	must(t, err)
	unix.Write(fd, []byte("deep"))
	unix.Close(fd)

	lower := open(t, root, Options{ReadOnly: true})
	for _, l := range []*Dir{d, lower} {
		st, err := l.Stat(path + "/file")
		must(t, err)
		if st.Size != 4 {
			t.Errorf("size %d", st.Size)
		}
		f, err := l.Open(path + "/file")
		must(t, err)
		must(t, f.Close())
		entries, err := l.ReadDir(path)
		must(t, err)
		if len(entries) != 1 {
			t.Errorf("entries: %v", entries)
		}
		_, err = l.Stat(path + "/" + strings.Repeat("x", 256))
		wantErr(t, "a name of 256 bytes", err, unix.ENAMETOOLONG)
		_, err = l.Stat(strings.Repeat("x", 9000) + "/y")
		wantErr(t, "a name of 9000 bytes", err, unix.ENAMETOOLONG)
		_, err = l.Stat(path + "/none/none/none")
		wantErr(t, "below nothing", err, unix.ENOENT)
	}
	must(t, d.Setxattr(path+"/file", "user.deep", []byte("v"), 0))
	if v, err := lower.Getxattr(path+"/file", "user.deep"); err != nil || string(v) != "v" {
		t.Errorf("Getxattr: %q %v", v, err)
	}
	must(t, Rename(d, path+"/file", d, "file", 0))
	must(t, d.Unlink("file"))
	for path != "" {
		must(t, d.Rmdir(path))
		path = path[:max(strings.LastIndexByte(path, '/'), 0)]
	}
}

// Where a path is cut, at and around the limit.
func TestSplitStep(t *testing.T) {
	for n := maxResolve - 300; n < maxResolve+300; n++ {
		path := strings.Repeat("d/", n/2) + strings.Repeat("e", 1+n%2)
		step, rest := splitStep(path)
		joined := step
		if rest != "" {
			joined += "/" + rest
		}
		if joined != path || len(step) > maxResolve || strings.HasSuffix(step, "/") {
			t.Fatalf("splitStep of %d bytes: %d + %d", len(path), len(step), len(rest))
		}
	}
}

func bothXattrWays(t *testing.T, f func(t *testing.T)) {
	saved := hasXattrAt
	if !saved() && kernelAtLeast(t, 6, 13) {
		t.Error("this kernel should have getxattrat")
	}
	t.Run("native", f)
	t.Run("through proc", func(t *testing.T) {
		hasXattrAt = func() bool { return false }
		defer func() { hasXattrAt = saved }()
		f(t)
	})
}

func kernelAtLeast(t *testing.T, major, minor int) bool {
	var u unix.Utsname
	must(t, unix.Uname(&u))
	var a, b int
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b)
	must(t, err)
	return a > major || a == major && b >= minor
}

func TestXattrs(t *testing.T) {
	bothXattrWays(t, func(t *testing.T) {
		root := t.TempDir()
		mount(t, "tmpfs", root, "tmpfs", "") // ext4 keeps no values of 64 KiB
		must(t, os.Mkdir(root+"/dir", 0o755))
		writeFile(t, root+"/dir/file", "")
		must(t, os.Symlink("file", root+"/dir/link"))
		d := open(t, root, Options{})
		big := bytes.Repeat([]byte("x"), maxXattr)
		values := map[string][]byte{"trusted.empty": {}, "trusted.small": []byte("a\x00b"), "trusted.256": big[:256],
			"trusted.257": big[:257], "trusted.big": big}
		for _, path := range []string{"dir/file", "dir", "dir/link", ""} {
			for attr, v := range values {
				must(t, d.Setxattr(path, attr, v, unix.XATTR_CREATE))
				got, err := d.Getxattr(path, attr)
				must(t, err)
				if got == nil || !bytes.Equal(got, v) {
					t.Errorf("%q %s: %d bytes, want %d", path, attr, len(got), len(v))
				}
			}
			attrs, err := d.Listxattr(path)
			must(t, err)
			for attr := range values {
				if !slices.Contains(attrs, attr) {
					t.Errorf("%q: %s is not in %q", path, attr, attrs)
				}
				must(t, d.Removexattr(path, attr))
			}
			wantErr(t, "removing twice", d.Removexattr(path, "trusted.big"), unix.ENODATA)
		}
		var many []string
		for i := range 230 {
			attr := fmt.Sprintf("trusted.%s%03d", strings.Repeat("n", 200), i)
			many = append(many, attr)
			must(t, d.Setxattr("dir/file", attr, nil, 0))
		}
		attrs, err := d.Listxattr("dir/file")
		must(t, err)
		for _, attr := range many {
			if !slices.Contains(attrs, attr) {
				t.Errorf("%s is missing", attr)
			}
		}
		_, err = d.Marks("dir/file", unix.S_IFREG)
		must(t, err)
	})
}

func TestUpperOperations(t *testing.T) {
	base := t.TempDir()
	must(t, os.Mkdir(base+"/upper", 0o755))
	must(t, os.Mkdir(base+"/work", 0o755))
	up, work := open(t, base+"/upper", Options{}), open(t, base+"/work", Options{})

	must(t, up.Mkdir("d", 0o1770)) // mkdir(2) takes the sticky bit, but not the set-id bits
	must(t, up.Mknod("d/fifo", unix.S_IFIFO|0o606, 0))
	must(t, up.Mknod("d/dev", unix.S_IFCHR|0o600, unix.Mkdev(259, 70000)))
	must(t, up.Symlink("t", "d/link"))
	for path, want := range map[string]uint32{"d": unix.S_IFDIR | 0o1770, "d/fifo": unix.S_IFIFO | 0o606, "d/dev": unix.S_IFCHR | 0o600} {
		st, err := up.Stat(path)
		must(t, err)
		if st.Mode != want {
			t.Errorf("%s: mode %o, want %o", path, st.Mode, want)
		}
		if path == "d/dev" && st.Rdev != unix.Mkdev(259, 70000) {
			t.Errorf("rdev %x", st.Rdev)
		}
	}

	fd, err := up.Tmpfile("d", 0o640)
	must(t, err)
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte("tmp"))
	must(t, err)
	must(t, up.LinkFD(fd, "d/tmp"))
	wantErr(t, "LinkFD on a taken name", up.LinkFD(fd, "d/tmp"), unix.EEXIST)
	must(t, up.FChmod(fd, 0o600))
	must(t, up.FChown(fd, 5, 6))
	must(t, up.Chmod("d/fifo", 0o600))
	must(t, up.Chown("d/fifo", -1, 9))
	must(t, up.Utimes("d/tmp", [2]unix.Timespec{{Sec: 10, Nsec: 1}, {Sec: 20, Nsec: 2}}))
	st, err := up.Stat("d/tmp")
	must(t, err)
	if st.Mode != unix.S_IFREG|0o600 || st.Uid != 5 || st.Gid != 6 || st.Atim.Nsec != 1 || st.Mtim.Sec != 20 {
		t.Errorf("after changes: %+v", st)
	}
	must(t, up.Link("d/link", "d/link2"))
	if target, err := up.Readlink("d/link2"); err != nil || target != "t" {
		t.Errorf("a linked symlink: %q %v", target, err)
	}
	must(t, LinkBetween(up, "d/tmp", work, "tmp"))
	wantErr(t, "RENAME_NOREPLACE", Rename(work, "tmp", up, "d/fifo", unix.RENAME_NOREPLACE), unix.EEXIST)
	must(t, Rename(work, "tmp", up, "d/fifo", unix.RENAME_EXCHANGE))
	st, err = work.Stat("tmp")
	must(t, err)
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		t.Errorf("not exchanged: %o", st.Mode)
	}
	must(t, work.Unlink("tmp"))
	must(t, up.SyncDir("d"))
	must(t, up.SyncDir(""))
	wantErr(t, "Rmdir", up.Rmdir("d"), unix.ENOTEMPTY)
	_, err = up.OpenFile("d/tmp", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
	wantErr(t, "O_EXCL", err, unix.EEXIST)
	fd2, err := up.OpenFile("d/tmp", unix.O_CREAT|unix.O_TRUNC|unix.O_RDWR, 0o600)
	must(t, err)
	unix.Close(fd2)
	if st, err = up.FStat(fd); err != nil || st.Size != 0 {
		t.Errorf("after O_TRUNC: %d bytes, %v", st.Size, err)
	}
	path, err := up.OpenPath("d/link")
	must(t, err)
	defer unix.Close(path)
	if st, err = up.FStat(path); err != nil || st.Mode&unix.S_IFMT != unix.S_IFLNK {
		t.Errorf("OpenPath followed: %o %v", st.Mode, err)
	}
}

// Directories kept open follow what happens to their names.
func TestMovedDirectories(t *testing.T) {
	base := t.TempDir()
	must(t, os.MkdirAll(base+"/upper/a/b/c", 0o755))
	must(t, os.MkdirAll(base+"/work/new/b/c", 0o755))
	writeFile(t, base+"/upper/a/b/c/old", "")
	writeFile(t, base+"/work/new/b/c/new", "")
	up, work := open(t, base+"/upper", Options{}), open(t, base+"/work", Options{})
	exists := func(d *Dir, path string, want bool) {
		t.Helper()
		if _, err := d.Stat(path); (err == nil) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
	exists(up, "a/b/c/old", true)
	exists(work, "new/b/c/new", true)
	must(t, Rename(work, "new", up, "a", unix.RENAME_EXCHANGE))
	exists(up, "a/b/c/old", false)
	exists(up, "a/b/c/new", true)
	exists(work, "new/b/c/old", true)
	exists(work, "new/b/c/new", false)
	must(t, Rename(up, "a/b", up, "b", 0))
	exists(up, "a/b/c/new", false)
	exists(up, "b/c/new", true)
	must(t, up.Unlink("b/c/new"))
	must(t, up.Rmdir("b/c"))
	must(t, up.Mkdir("b/c", 0o755))
	exists(up, "b/c/new", false)
	must(t, up.Symlink("x", "b/c/again")) // into the new directory, not the removed one
	exists(up, "b/c/again", true)
}

func TestDirCacheBound(t *testing.T) {
	root := t.TempDir()
	d := open(t, root, Options{})
	c := newDirCache(4)
	var held []*dirRef
	for i := range 20 {
		path := fmt.Sprintf("d%d", i)
		must(t, d.Mkdir(path, 0o755))
		fd, err := d.openDirPath(path)
		must(t, err)
		held = append(held, c.put(d, path, fd, d.gen.Load()))
		if len(c.refs) > 4 {
			t.Fatalf("%d directories cached", len(c.refs))
		}
	}
	// Evicted directories stay usable for those who hold them.
	for i, r := range held {
		var st unix.Stat_t
		if err := unix.Fstat(r.fd, &st); err != nil {
			t.Errorf("d%d: %v", i, err)
		}
		r.release()
	}
	if c.get(d, "d0") != nil {
		t.Error("the oldest is still cached")
	}
	r := c.get(d, "d16")
	if r == nil {
		t.Fatal("a recent one is not cached")
	}
	r.release()
	// What was opened before a move must not be remembered after it.
	gen := d.gen.Load()
	fd, err := d.openDirPath("d1")
	must(t, err)
	c.forgetTree(d, "d1")
	c.put(d, "d1", fd, gen).release()
	if c.get(d, "d1") != nil {
		t.Error("a directory opened before the move was remembered")
	}
	c.forgetTree(d, "")
	if len(c.refs) != 0 {
		t.Errorf("%d directories left", len(c.refs))
	}
}

// Readers walk while directories move: every answer is about one of the directories that had the name.
func TestConcurrentMoves(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"/a/x", "/b/x"} {
		must(t, os.MkdirAll(root+dir, 0o755))
		writeFile(t, root+dir+"/file", dir)
	}
	d := open(t, root, Options{})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if st, err := d.Stat("a/x/file"); err != nil || st.Size != 4 {
					t.Errorf("%v, %d bytes", err, st.Size)
					return
				}
				runtime.Gosched()
			}
		})
	}
	for range 500 {
		must(t, Rename(d, "a", d, "b", unix.RENAME_EXCHANGE))
	}
	close(stop)
	wg.Wait()
}

// A lease holder delays an open instead of failing it.
func TestOpenLeasedFile(t *testing.T) {
	root := t.TempDir()
	writeFile(t, root+"/file", "x")
	holder, err := unix.Open(root+"/file", unix.O_RDONLY, 0)
	must(t, err)
	defer unix.Close(holder)
	d := open(t, root, Options{})
	_, err = unix.FcntlInt(uintptr(holder), unix.F_SETLEASE, unix.F_RDLCK)
	must(t, err)
	released := make(chan struct{})
	go func() {
		defer close(released)
		for {
			state, err := unix.FcntlInt(uintptr(holder), unix.F_GETLEASE, 0)
			if err != nil || state == unix.F_UNLCK { // being broken
				unix.FcntlInt(uintptr(holder), unix.F_SETLEASE, unix.F_UNLCK)
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	fd, err := d.OpenFile("file", unix.O_RDWR, 0)
	<-released
	must(t, err)
	unix.Close(fd)
}

func BenchmarkStat(b *testing.B) {
	root := b.TempDir()
	must(b, os.MkdirAll(root+"/usr/lib/x86_64-linux-gnu", 0o755))
	writeFile(b, root+"/usr/lib/x86_64-linux-gnu/libc.so.6", "")
	d := open(b, root, Options{ReadOnly: true})
	b.Run("Stat", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.Stat("usr/lib/x86_64-linux-gnu/libc.so.6"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Negative", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.Stat("usr/lib/x86_64-linux-gnu/none"); err != unix.ENOENT {
				b.Fatal(err)
			}
		}
	})
	b.Run("Marks", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.Marks("usr/lib/x86_64-linux-gnu/libc.so.6", unix.S_IFREG); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Open", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			f, err := d.Open("usr/lib/x86_64-linux-gnu/libc.so.6")
			if err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	})
}
