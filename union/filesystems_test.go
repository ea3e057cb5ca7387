package union

import (
	"bytes"
	"fmt"
	"lamina/hostfs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// filesystems that an upper layer may lie on. One that can clone shares a lower file's extents with its copy.
var filesystems = []struct {
	name   string
	mkfs   []string // the command, without the image; none: tmpfs
	clones bool
}{
	{name: "ext4", mkfs: []string{"mkfs.ext4", "-q", "-F"}},
	{name: "xfs", mkfs: []string{"mkfs.xfs", "-q", "-f", "-m", "reflink=1"}, clones: true},
	{name: "btrfs", mkfs: []string{"mkfs.btrfs", "-q", "-f"}, clones: true},
	{name: "tmpfs"},
}

// onFilesystem makes a filesystem of its own and has TMPDIR, and so the next stack, lie there.
func onFilesystem(t *testing.T, name string, mkfs []string) {
	t.Helper()
	dir := t.TempDir()
	mnt := filepath.Join(dir, "mnt")
	must(t, os.Mkdir(mnt, 0o755))
	cmd := exec.Command("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mnt)
	if mkfs != nil {
		image := filepath.Join(dir, "image")
		must(t, os.WriteFile(image, nil, 0o600))
		must(t, os.Truncate(image, 320<<20)) // the least that mkfs.xfs takes is 300 MiB
		mkfs = hostfs.Mkfs(append(mkfs, image)...)
		run(t, exec.Command(mkfs[0], mkfs[1:]...))
		cmd = exec.Command("mount", "-o", "loop", "-t", name, image, mnt)
	}
	run(t, cmd)
	t.Cleanup(func() { must(t, unix.Unmount(mnt, 0)) })
	t.Setenv("TMPDIR", mnt)
}

func run(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s (are e2fsprogs, xfsprogs and btrfs-progs installed?)", cmd.Args, err, out)
	}
}

// The core of what a union does, on every filesystem and with every way of copying up.
func TestOnEveryFilesystem(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 32<<10) // 512 KiB
	for _, f := range filesystems {
		t.Run(f.name, func(t *testing.T) {
			onFilesystem(t, f.name, f.mkfs)
			for _, mode := range []CopyUp{CopyUpAuto, CopyUpBlock, CopyUpClone, CopyUpFull} {
				t.Run(fmt.Sprint("copyup", mode), func(t *testing.T) {
					s := newStack(t, 1, func(p func(int, string) string) {
						for _, n := range []string{"d/f", "d/l1", "d/gone", "e/g"} {
							put(t, p(0, n), string(data))
						}
						must(t, os.Link(p(0, "d/l1"), p(0, "d/l2")))
					})
					s.umount()
					s.change = func(c *Config) { c.CopyUp = mode }
					s.mount()
					if mode == CopyUpClone && !f.clones {
						_, err := s.fs.Open(s.node("d/f"), unix.O_RDWR)
						wantErr(t, err, unix.EOPNOTSUPP)
						_, err = s.fs.Open(s.node("d/f"), unix.O_RDWR) // and says so every time
						if err == nil || !strings.Contains(err.Error(), "use copyup=auto") {
							t.Errorf("refused with %v", err)
						}
						s.wantRead("d/f", string(data))
						return
					}
					used := s.free()
					s.write("d/f", "FIRST", 5000)
					s.checkCopy("d/f", f.clones && mode <= CopyUpClone && mode != CopyUpBlock, mode == CopyUpFull, used)
					s.write("d/l2", "FIRST", 5000)
					must(t, s.unlink("d/gone"))
					must(t, s.rename("d", "e/d", 0))
					s.create("d", "new")
					s.remount()
					want := string(data[:5000]) + "FIRST" + string(data[5005:])
					s.wantRead("e/d/f", want)
					s.wantRead("e/d/l1", want)
					s.wantRead("e/g", string(data))
					s.wantRead("d", "new")
					s.wantLs("e/d", "f", "l1", "l2")
				})
			}
		})
	}
}

// free is the space left on the filesystem of the stack.
func (s *stack) free() int64 {
	d, err := os.Open(s.dir)
	must(s.t, err)
	defer d.Close()
	must(s.t, unix.Syncfs(int(d.Fd())))
	var st unix.Statfs_t
	must(s.t, unix.Statfs(s.dir, &st))
	return int64(st.Bfree) * st.Bsize
}

// checkCopy verifies how a file was copied up whose first lower bytes are still what they were.
func (s *stack) checkCopy(path string, cloned, whole bool, free int64) {
	s.t.Helper()
	_, err := unix.Lgetxattr(s.upper(path), "trusted.overlay.metacopy", nil)
	sketch := err == nil
	if sketch == (cloned || whole) {
		s.t.Errorf("%s is a sketch: %v, want %v (%v)", path, sketch, !(cloned || whole), err)
	}
	if cloned && firstExtent(s.t, s.upper(path)) != firstExtent(s.t, filepath.Join(s.lowers[0], path)) {
		s.t.Errorf("%s does not share its first extent with the lower file", path)
	}
	if used := free - s.free(); cloned && used > 256<<10 {
		s.t.Errorf("copying up by clone took %d bytes", used)
	}
}

// firstExtent is where a file's first byte lies on the disk (FIEMAP).
func firstExtent(t *testing.T, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	must(t, f.Sync())
	var m struct { // struct fiemap with one struct fiemap_extent (linux/fiemap.h)
		start, length           uint64
		flags, mapped, count, _ uint32
		logical, physical, size uint64
		_                       [2]uint64
		_                       [4]uint32
	}
	m.length, m.count = 4096, 1
	const fsIocFiemap = 0xc020660b
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m))); e != 0 || m.mapped != 1 {
		t.Fatalf("FIEMAP of %s: %v, %d extents", path, e, m.mapped)
	}
	return m.physical
}
