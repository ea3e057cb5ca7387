package traps

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

const secret = "this must never be seen through a mount"

// hostileWorld has a directory outside of every layer with a secret in it.
func hostileWorld(t *testing.T) (outside string) {
	t.Helper()
	outside = mnt.Dirs(t, "outside")[0]
	fill(t, outside, map[string][]byte{"secret": []byte(secret), "dir/secret": []byte(secret)})
	return outside
}

// survives mounts lowers, touches everything, writes to everything, and checks that the server lives, that no secret was
// seen and none was changed.
func survives(t *testing.T, outside string, lowers []string) {
	t.Helper()
	c := rival.Config{Lowers: lowers}
	var m *mnt.T
	var err error
	within(t, time.Minute, "mounting", func() { m, err = mnt.Try(t, c) })
	if err != nil {
		// Refusing a hostile layer is fine, if it is done in order.
		t.Logf("refused: %v", err)
		return
	}
	m.SkipFsck = true // hostile uppers are made by copying up hostile objects; what matters is that fsck survives too
	within(t, time.Minute, "walking", func() { walk(m.Dir) })
	within(t, time.Minute, "looking for the secret", func() { noSecret(t, m.Dir) })
	within(t, time.Minute, "writing", func() { writeToEverything(m.Dir) })
	within(t, time.Minute, "walking again", func() { walk(m.Dir) })
	within(t, time.Minute, "looking again", func() { noSecret(t, m.Dir) })
	wantFile(t, filepath.Join(outside, "secret"), []byte(secret))
	wantFile(t, filepath.Join(outside, "dir/secret"), []byte(secret))
	check(t, os.WriteFile(m.Path("still alive"), []byte("yes"), 0o644))
	wantFile(t, m.Path("still alive"), []byte("yes"))
	m.Unmount()
	if m.System == rival.Lamina {
		if out, code := mnt.FsckOutput(t, m.Config); code < 0 || code > 1 {
			t.Errorf("fsck: exit status %d\n%s", code, out)
		}
	}
}

// noSecret reads all regular files without following links: the server is under test, not the kernel's link walking.
func noSecret(t *testing.T, root string) {
	_ = filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(secret)) {
				t.Errorf("%s shows what lies outside of the layers", p)
			}
		}
		return nil
	})
}

// writeToEverything changes every object in several ways, whatever comes of it.
func writeToEverything(root string) {
	var all []string
	_ = filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		all = append(all, p)
		return nil
	})
	for i, p := range all {
		_ = unix.Lchown(p, 1, 1)
		if fd, err := unix.Open(p, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
			_, _ = unix.Pwrite(fd, []byte("hostile"), 4000)
			_ = unix.Ftruncate(fd, 10_000)
			_ = unix.Fsync(fd)
			_ = unix.Close(fd)
		}
		if p != root && i%3 == 0 {
			_ = unix.Rename(p, filepath.Join(root, fmt.Sprintf("moved%d", i)))
		}
		if p != root && i%5 == 0 {
			_ = os.RemoveAll(p)
		}
	}
}

func TestHostileSymlinksForDirectories(t *testing.T) {
	outside := hostileWorld(t)
	for _, target := range []string{outside, "../../../../../../../../.." + outside, "/proc/self/root" + outside, outside + "/dir"} {
		top := lowerWith(t, map[string][]byte{"d/top": nil, "e/dir/top": nil})
		bottom := lowerWith(t, map[string][]byte{"e/": nil, "f": []byte("f")})
		check(t, os.Symlink(target, filepath.Join(bottom, "d")))
		check(t, os.Symlink(target, filepath.Join(bottom, "e/dir")))
		check(t, os.Symlink(target, filepath.Join(bottom, "link")))
		survives(t, outside, []string{top, bottom})
		survives(t, outside, []string{bottom, top})
	}
}

func TestHostileRedirects(t *testing.T) {
	outside := hostileWorld(t)
	for _, redirect := range []string{
		outside, "/../../../../.." + outside, "..", "../..", "/..", "//", "/", "", "a/b", "/d/../../x", "/nonexistent/x",
		"/d\x00/x", strings.Repeat("/x", 1800), "/" + strings.Repeat("y", 300), ".", "/link/dir",
	} {
		top := lowerWith(t, map[string][]byte{"d/": nil, "f": nil})
		bottom := lowerWith(t, map[string][]byte{"d/x": []byte("x"), "real/y": []byte("y")})
		check(t, os.Symlink(outside, filepath.Join(bottom, "link")))
		check(t, unix.Setxattr(filepath.Join(top, "d"), "trusted.overlay.redirect", []byte(redirect), 0))
		// A metacopy with a redirect is how a file's data is looked for elsewhere.
		check(t, unix.Setxattr(filepath.Join(top, "f"), "trusted.overlay.metacopy", nil, 0))
		check(t, unix.Setxattr(filepath.Join(top, "f"), "trusted.overlay.redirect", []byte(redirect), 0))
		check(t, os.Truncate(filepath.Join(top, "f"), 100))
		survives(t, outside, []string{top, bottom})
	}
}

func TestHostileRedirectCycles(t *testing.T) {
	outside := hostileWorld(t)
	layer := func() string {
		l := lowerWith(t, map[string][]byte{"a/1": nil, "b/2": nil, "c/c/c/3": nil})
		for dir, to := range map[string]string{"a": "/b", "b": "/a", "c": "/c/c", "c/c": "/c", "c/c/c": "/c/c/c"} {
			check(t, unix.Setxattr(filepath.Join(l, dir), "trusted.overlay.redirect", []byte(to), 0))
		}
		return l
	}
	survives(t, outside, []string{layer(), layer(), layer()})
}

func TestHostileWhiteouts(t *testing.T) {
	outside := hostileWorld(t)
	bottom := lowerWith(t, map[string][]byte{"a/b/c": nil, "f": nil, "g": nil})
	var layers []string
	for range 3 {
		l := mnt.Dirs(t, "lower")[0]
		for _, name := range []string{"a", "f", "g", "nothing", strings.Repeat("w", 255)} {
			check(t, unix.Mknod(filepath.Join(l, name), unix.S_IFCHR, 0))
		}
		check(t, unix.Setxattr(l, "trusted.overlay.opaque", []byte("y"), 0))
		layers = append(layers, l)
	}
	m := mnt.New(t, append(layers, bottom))
	if n, _ := walk(m.Dir); n != 1 {
		t.Errorf("%d objects where everything is whited out", n-1)
	}
	check(t, os.MkdirAll(m.Path("a/b"), 0o755))
	if n, _ := walk(m.Path("a")); n != 2 {
		t.Errorf("what was whited out shines through a new directory: %d objects", n)
	}
	survives(t, outside, append(layers, bottom))
	survives(t, outside, append([]string{bottom}, layers...))

	// Whiteouts by xattr (overlay.whiteout in a directory with opaque=x).
	x := lowerWith(t, map[string][]byte{"d/gone": nil, "d/stays": []byte("1")})
	check(t, unix.Setxattr(filepath.Join(x, "d"), "trusted.overlay.opaque", []byte("x"), 0))
	check(t, unix.Setxattr(filepath.Join(x, "d/gone"), "trusted.overlay.whiteout", []byte("y"), 0))
	below := lowerWith(t, map[string][]byte{"d/gone": []byte("2"), "d/below": []byte("2")})
	m = mnt.New(t, []string{x, below})
	if _, err := os.Lstat(m.Path("d/gone")); !os.IsNotExist(err) {
		t.Errorf("an xattr whiteout does not hide: %v", err)
	}
	wantFile(t, m.Path("d/below"), []byte("2"))
	wantFile(t, m.Path("d/stays"), []byte("1"))
}

func TestHostileXattrs(t *testing.T) {
	outside := hostileWorld(t)
	names := []string{"opaque", "redirect", "metacopy", "whiteout", "nlink", "origin", "impure", "upper", "uuid", "protattr", "lamina.origin", "overlay.x"}
	values := [][]byte{nil, {0}, {0xff}, []byte("y"), []byte("x"), bytes.Repeat([]byte{0xff}, 3000), []byte("L-1"), []byte("U+99999999999"), data(1, 100)}
	for _, v := range values {
		l := lowerWith(t, map[string][]byte{"d/f": nil, "f": data(1, 5000)})
		check(t, os.Symlink("f", filepath.Join(l, "link")))
		check(t, unix.Mknod(filepath.Join(l, "fifo"), unix.S_IFIFO|0o644, 0))
		check(t, unix.Mknod(filepath.Join(l, "null"), unix.S_IFCHR|0o644, int(unix.Mkdev(1, 3))))
		for _, n := range names {
			for _, p := range []string{".", "d", "d/f", "f", "link", "fifo", "null"} {
				// Not every value fits everywhere on every disk; what fits is hostile enough.
				_ = unix.Lsetxattr(filepath.Join(l, p), "trusted.overlay."+n, v, 0)
			}
		}
		survives(t, outside, []string{l, lowerWith(t, map[string][]byte{"d/g": nil, "f": data(2, 6000)})})
	}
}

// Forged sketch headers: random bytes, and real headers moved to files that they do not belong to.
func TestHostileHeaders(t *testing.T) {
	outside := hostileWorld(t)
	bottom := lowerWith(t, map[string][]byte{"f": data(1, 20*block)})
	var headers [][]byte
	for _, format := range formats {
		m := mnt.New(t, []string{bottom}, format)
		check(t, patch(m.Path("f"), "x", 3*block))
		m.Unmount()
		b := make([]byte, 4096)
		n, err := unix.Lgetxattr(filepath.Join(m.Upper, "f"), "trusted.overlay.metacopy", b)
		check(t, err)
		real := b[:n]
		headers = append(headers, real, real[:n/2], append(bytes.Clone(real), real...))
		for i := range n {
			bad := bytes.Clone(real)
			bad[i]++
			headers = append(headers, bad)
		}
	}
	for i := range 20 {
		headers = append(headers, append([]byte{byte(i % 4)}, data(i, i*7)...))
	}
	l := mnt.Dirs(t, "lower")[0]
	for i, h := range headers {
		name := filepath.Join(l, fmt.Sprintf("f%d", i))
		check(t, os.WriteFile(name, data(i, (i%5)*3000), 0o644))
		check(t, unix.Lsetxattr(name, "trusted.overlay.metacopy", h, 0))
		d := filepath.Join(l, fmt.Sprintf("d%d", i))
		check(t, os.Mkdir(d, 0o755))
		check(t, unix.Lsetxattr(d, "trusted.overlay.metacopy", h, 0))
	}
	survives(t, outside, []string{l, bottom})
}

// What a sketch's data is looked for in is not a regular file.
func TestHostileDataBehindASketch(t *testing.T) {
	outside := hostileWorld(t)
	bottom := mnt.Dirs(t, "lower")[0]
	check(t, unix.Mknod(filepath.Join(bottom, "fifo"), unix.S_IFIFO|0o666, 0))
	check(t, unix.Mknod(filepath.Join(bottom, "zero"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
	check(t, unix.Mknod(filepath.Join(bottom, "tty"), unix.S_IFCHR|0o666, int(unix.Mkdev(5, 0))))
	check(t, os.Symlink(filepath.Join(outside, "secret"), filepath.Join(bottom, "link")))
	check(t, os.Mkdir(filepath.Join(bottom, "dir"), 0o755))
	top := mnt.Dirs(t, "lower")[0]
	for _, name := range []string{"fifo", "zero", "tty", "link", "dir", "nothing"} {
		p := filepath.Join(top, name)
		check(t, os.WriteFile(p, nil, 0o644))
		check(t, os.Truncate(p, 1<<20))
		check(t, unix.Lsetxattr(p, "trusted.overlay.metacopy", nil, 0))
	}
	m := mnt.New(t, []string{top, bottom})
	m.SkipFsck = true
	for _, name := range []string{"fifo", "zero", "tty", "link", "dir", "nothing"} {
		within(t, 20*time.Second, "reading "+name, func() {
			if b, err := os.ReadFile(m.Path(name)); err == nil {
				t.Errorf("%s: %d bytes were read from what is no regular file", name, len(b))
			}
		})
	}
	survives(t, outside, []string{top, bottom})
}

// Devices and fifos in a layer are shown, and never opened by the server.
func TestHostileDevicesAreNotOpened(t *testing.T) {
	l := mnt.Dirs(t, "lower")[0]
	check(t, unix.Mknod(filepath.Join(l, "fifo"), unix.S_IFIFO|0o666, 0))
	check(t, unix.Mknod(filepath.Join(l, "disk"), unix.S_IFBLK|0o666, int(unix.Mkdev(7, 251))))
	check(t, unix.Mknod(filepath.Join(l, "watchdog"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 130))))
	m := mnt.New(t, []string{l})
	within(t, 30*time.Second, "changing devices", func() {
		for _, n := range []string{"fifo", "disk", "watchdog"} {
			check(t, unix.Chmod(m.Path(n), 0o600))
			check(t, unix.Lchown(m.Path(n), 5, 5))
			check(t, unix.Rename(m.Path(n), m.Path(n+".moved")))
			check(t, unix.Link(m.Path(n+".moved"), m.Path(n)))
		}
	})
	var st unix.Stat_t
	check(t, unix.Lstat(m.Path("disk"), &st))
	if st.Rdev != unix.Mkdev(7, 251) || st.Mode != unix.S_IFBLK|0o600 || st.Nlink != 2 {
		t.Errorf("rdev %#x, mode %#o, nlink %d", st.Rdev, st.Mode, st.Nlink)
	}
}

// A tree deeper than a path can be long.
func TestHostileDepth(t *testing.T) {
	l := mnt.Dirs(t, "lower")[0]
	fd, err := unix.Open(l, unix.O_PATH|unix.O_DIRECTORY, 0)
	check(t, err)
	name := strings.Repeat("d", 200)
	for range 60 { // 12 000 bytes of path
		check(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		check(t, err)
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	m := mnt.New(t, []string{l})
	fd, err = unix.Open(m.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(t, err)
	depth := 0
	for {
		next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			wantErrno(t, fmt.Sprintf("at depth %d", depth), err, unix.ENOENT)
			break
		}
		unix.Close(fd)
		fd = next
		depth++
	}
	if depth != 60 {
		t.Errorf("only %d levels of 60 can be reached", depth)
	}
	// And work down there.
	err = unix.Mkdirat(fd, "bottom", 0o755)
	if err == nil {
		err = unix.Renameat2(fd, "bottom", fd, "renamed", 0)
	}
	if err == nil {
		err = unix.Unlinkat(fd, "renamed", unix.AT_REMOVEDIR)
	}
	unix.Close(fd)
	if err != nil {
		t.Errorf("working at the bottom: %v", err)
	}
	// Package os cannot remove what it cannot name.
	ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
	defer cancel()
	t.Cleanup(func() {
		for _, d := range []string{l, m.Upper} {
			if _, err := rival.Run(context.Background(), "find", d, "-mindepth", "1", "-delete"); err != nil {
				t.Error(err)
			}
		}
	})
	if _, err := rival.Run(ctx, "find", m.Dir, "-name", "nothing"); err != nil {
		t.Errorf("find through the mount: %v", err)
	}
}
