package uring

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"
)

// operation is something a program does below a mount point, and what it then knows.
type operation struct {
	name string
	run  func(dir string) string
}

var long = strings.Repeat("n", 255)

// operations come in an order: later ones find what earlier ones left.
func operations() []operation {
	ops := []operation{
		{"stat root", func(d string) string { return stat(d) }},
		{"statfs", func(d string) string {
			var st unix.Statfs_t
			err := unix.Statfs(d, &st)
			return fmt.Sprint(err, st.Blocks, st.Bfree, st.Bavail, st.Files, st.Ffree, st.Bsize, st.Namelen, st.Frsize)
		}},
		{"stat nothing", func(d string) string { return stat(d + "/nothing") }},
		{"name of 255", func(d string) string { return create(d+"/"+long) + stat(d+"/"+long) }},
		{"name of 256", func(d string) string { return create(d + "/" + long + "x") }},
		{"rename 255 to 255", func(d string) string {
			return errno(unix.Rename(d+"/"+long, d+"/"+long[1:]+"z")) + stat(d+"/"+long[1:]+"z")
		}},
		{"create", func(d string) string { return create(d+"/a") + stat(d+"/a") }},
		{"create exclusively again", func(d string) string {
			fd, err := unix.Open(d+"/a", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
			shut(fd)
			return errno(err)
		}},
		{"mknod fifo", func(d string) string { return errno(unix.Mknod(d+"/fifo", unix.S_IFIFO|0o600, 0)) + stat(d+"/fifo") }},
		{"mknod device", func(d string) string {
			return errno(unix.Mknod(d+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3)))) + stat(d+"/null")
		}},
		{"mkdir", func(d string) string { return errno(unix.Mkdir(d+"/dir", 0o750)) + stat(d+"/dir") }},
		{"symlink", func(d string) string { return errno(unix.Symlink("target of it", d+"/sym")) + stat(d+"/sym") }},
		{"symlink of 4095", func(d string) string { return errno(unix.Symlink(strings.Repeat("t", 4095), d+"/symlong")) }},
		{"readlink", func(d string) string {
			a, err := os.Readlink(d + "/sym")
			b, err2 := os.Readlink(d + "/symlong")
			return fmt.Sprint(a, err, sum([]byte(b)), err2)
		}},
		{"link", func(d string) string { return errno(unix.Link(d+"/a", d+"/b")) + stat(d+"/b") }},
		{"rename exchange", func(d string) string {
			return errno(unix.Renameat2(unix.AT_FDCWD, d+"/a", unix.AT_FDCWD, d+"/sym", unix.RENAME_EXCHANGE)) + stat(d+"/a")
		}},
		{"rename back", func(d string) string {
			return errno(unix.Renameat2(unix.AT_FDCWD, d+"/a", unix.AT_FDCWD, d+"/sym", unix.RENAME_EXCHANGE)) + stat(d+"/a")
		}},
		{"chmod", func(d string) string { return errno(unix.Chmod(d+"/a", 0o4711)) + stat(d+"/a") }},
		{"chown", func(d string) string { return errno(unix.Lchown(d+"/a", 12, 34)) + stat(d+"/a") }},
		{"utimes", func(d string) string {
			ts := []unix.Timespec{{Sec: 5}, {Sec: 123456789}}
			return errno(unix.UtimesNanoAt(unix.AT_FDCWD, d+"/a", ts, 0)) + stat(d+"/a")
		}},
		{"truncate up", func(d string) string { return errno(unix.Truncate(d+"/a", 70_000)) + stat(d+"/a") }},
		{"truncate down", func(d string) string { return errno(unix.Truncate(d+"/a", 3)) + stat(d+"/a") }},
		{"fsync", func(d string) string { return withFile(d+"/a", unix.O_RDWR, unix.Fsync) }},
		{"fdatasync", func(d string) string { return withFile(d+"/a", unix.O_RDWR, unix.Fdatasync) }},
		{"fsync directory", func(d string) string { return withFile(d+"/dir", unix.O_RDONLY|unix.O_DIRECTORY, unix.Fsync) }},
		{"syncfs", func(d string) string { return withFile(d, unix.O_RDONLY|unix.O_DIRECTORY, unix.Syncfs) }},
		{"fallocate", func(d string) string {
			return withFile(d+"/a", unix.O_RDWR, func(fd int) error { return unix.Fallocate(fd, 0, 0, 123_456) }) + stat(d+"/a")
		}},
		{"seek data, hole, past the end", func(d string) string {
			return withFile(d+"/a", unix.O_RDWR, func(fd int) error {
				data, err := unix.Seek(fd, 100, unix.SEEK_DATA)
				hole, err2 := unix.Seek(fd, 100, unix.SEEK_HOLE)
				_, err3 := unix.Seek(fd, 1<<30, unix.SEEK_DATA)
				return fmt.Errorf("%d %v %d %v %v", data, err, hole, err2, err3)
			})
		}},
		{"copy_file_range", func(d string) string {
			return withFile(d+"/a", unix.O_RDWR, func(fd int) error {
				in, out := int64(10), int64(200_000)
				n, err := unix.CopyFileRange(fd, &in, fd, &out, 100_000, 0)
				return fmt.Errorf("%d %w", n, err)
			}) + stat(d+"/a")
		}},
		{"access", func(d string) string { return errno(unix.Access(d+"/a", unix.W_OK)) }},
		{"tmpfile", func(d string) string {
			fd, err := unix.Open(d, unix.O_TMPFILE|unix.O_RDWR, 0o600)
			shut(fd)
			return errno(err)
		}},
		{"O_TRUNC", func(d string) string {
			return withFile(d+"/a", unix.O_RDWR|unix.O_TRUNC, func(int) error { return nil }) + stat(d+"/a")
		}},
		{"locks", func(d string) string {
			return withFile(d+"/a", unix.O_RDWR, func(fd int) error {
				return errors.Join(unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB), unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
			})
		}},
		{"list", list},
		{"unlink", func(d string) string { return errno(unix.Unlink(d+"/b")) + stat(d+"/a") }},
		{"unlink nothing", func(d string) string { return errno(unix.Unlink(d + "/b")) }},
		{"rmdir", func(d string) string { return errno(unix.Rmdir(d + "/dir")) }},
		{"open a directory that is gone", func(d string) string { return withFile(d+"/dir", unix.O_RDONLY, unix.Fsync) }},
		{"list again", list},
		{"many files", func(d string) string {
			var out strings.Builder
			for i := range 3000 {
				if s := create(fmt.Sprintf("%s/%04d%s", d, i, long[:i%200])); s != "ok" {
					fmt.Fprint(&out, i, s)
				}
			}
			return out.String()
		}},
		{"list many", list},
		{"ask with statx", func(d string) string {
			var st unix.Statx_t
			err := unix.Statx(unix.AT_FDCWD, d+"/a", unix.AT_STATX_FORCE_SYNC, unix.STATX_ALL, &st)
			return fmt.Sprint(err, st.Size, st.Mode, st.Ino, st.Mask&unix.STATX_BASIC_STATS)
		}},
		{"poll", func(d string) string {
			return withFile(d+"/a", unix.O_RDWR, func(fd int) error {
				p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				n, err := unix.Poll(p, 0)
				return fmt.Errorf("%d %v %v", n, p[0].Revents, err)
			})
		}},
		{"go-fuse's own file", func(d string) string {
			return withFile(d+"/"+pollHackName, unix.O_RDONLY, func(fd int) error {
				p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				_, err := unix.Poll(p, 0)
				_, err2 := unix.Fgetxattr(fd, "user.a", make([]byte, 10))
				return fmt.Errorf("%v %v %s", err, err2, stat(d+"/"+pollHackName))
			})
		}},
	}
	return append(append(ops, xattrOperations()...), dataOperations()...)
}

func xattrOperations() []operation {
	var ops []operation
	for _, n := range []int{0, 1, 255, 4096, 65535, 65536} {
		ops = append(ops, operation{fmt.Sprintf("xattr of %d", n), func(d string) string {
			p, name := d+"/a", fmt.Sprintf("user.%d", n)
			set := unix.Setxattr(p, name, pattern(n, n), 0)
			size, err := unix.Getxattr(p, name, nil)
			buf := make([]byte, 70_000)
			got, err2 := unix.Getxattr(p, name, buf)
			_, err3 := unix.Getxattr(p, name, make([]byte, max(1, n-1)))
			return fmt.Sprint(set, size, err, got, err2, err3, sum(buf[:max(got, 0)]))
		}})
	}
	return append(ops,
		operation{"xattr too long", func(d string) string { return errno(unix.Setxattr(d+"/a", "user.big", make([]byte, 65537), 0)) }},
		operation{"xattr's name of 255", func(d string) string {
			name := "user." + long[:250]
			err := unix.Setxattr(d+"/a", name, []byte("v"), unix.XATTR_CREATE)
			b := make([]byte, 3)
			n, err2 := unix.Getxattr(d+"/a", name, b)
			return fmt.Sprint(err, n, err2, b)
		}},
		operation{"no such xattr", func(d string) string {
			_, err := unix.Getxattr(d+"/a", "user.nothing", make([]byte, 100))
			return fmt.Sprint(err, unix.Removexattr(d+"/a", "user.nothing"))
		}},
		operation{"list xattrs", func(d string) string {
			n, err := unix.Listxattr(d+"/a", nil)
			buf := make([]byte, 4096)
			got, err2 := unix.Listxattr(d+"/a", buf)
			_, err3 := unix.Listxattr(d+"/a", buf[:5])
			return fmt.Sprint(n, err, got, err2, err3, sum(buf[:max(0, got)]))
		}},
		operation{"remove xattr", func(d string) string { return errno(unix.Removexattr(d+"/a", "user.255")) }},
		operation{"ACL", func(d string) string {
			_, err := unix.Getxattr(d+"/a", "system.posix_acl_access", make([]byte, 100))
			return fmt.Sprint(err)
		}},
		operation{"ioctl", func(d string) string {
			return withFile(d+"/a", unix.O_RDWR, func(fd int) error {
				var out string
				for _, dir := range []uintptr{1, 2, 3} { // _IOC_WRITE, _IOC_READ, both
					for _, n := range []int{1, 8, 1000, 16000} {
						arg := pattern(n, n)
						cmd := dir<<30 | uintptr(n)<<16 | 0x7101
						r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), cmd, uintptr(unsafe.Pointer(&arg[0])))
						out += fmt.Sprintln(dir, n, r, e, sum(arg))
					}
				}
				r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), 0x7102, 77) // no data
				return fmt.Errorf("%s%d %v", out, r, e)
			})
		}},
	)
}

// dataOperations read and write in sizes around every limit: a page, the request's largest size, more than that.
func dataOperations() []operation {
	var ops []operation
	sizes := []int{1, 2, 511, 4095, 4096, 4097, 65535, 65536, 131072, 131073, 1<<20 - 1, 1 << 20, 1<<20 + 1, 3<<20 + 5}
	for _, name := range []string{"cached", "direct", "own-buffer"} {
		for i, n := range sizes {
			for _, off := range []int64{0, 1, 4095, 123_457} {
				ops = append(ops, operation{fmt.Sprintf("%s: %d bytes at %d", name, n, off), func(d string) string {
					p := d + "/" + name
					return withFile(p, unix.O_RDWR|unix.O_CREAT, func(fd int) error {
						w, err := unix.Pwrite(fd, pattern(n+i, n), off)
						_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
						buf := make([]byte, n+10)
						r, err2 := unix.Pread(fd, buf, off)
						return fmt.Errorf("%d %v %d %v %s", w, err, r, err2, sum(buf[:max(0, r)]))
					})
				}})
			}
		}
	}
	for _, n := range []int{4096, 1 << 20, 5 << 20} {
		for _, off := range []int64{0, 512, 8192, 1<<20 - 512} {
			ops = append(ops, operation{fmt.Sprintf("O_DIRECT: %d bytes at %d", n, off), func(d string) string {
				return withFile(d+"/odirect", unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT, func(fd int) error {
					buf := aligned(n)
					copy(buf, pattern(n, n))
					w, err := unix.Pwrite(fd, buf, off)
					clear(buf)
					r, err2 := unix.Pread(fd, buf, off)
					// Pages of the caller that do not begin at a page's start.
					r2, err3 := unix.Pread(fd, buf[512:n-512], off)
					return fmt.Errorf("%d %v %d %v %d %v %s", w, err, r, err2, r2, err3, sum(buf))
				})
			}})
		}
	}
	return append(ops, operation{"vectored", func(d string) string {
		return withFile(d+"/cached", unix.O_RDWR, func(fd int) error {
			w, err := unix.Pwritev(fd, [][]byte{pattern(1, 10), {}, pattern(2, 5000), pattern(3, 100_000)}, 77)
			a, b := make([]byte, 11), make([]byte, 9000)
			r, err2 := unix.Preadv(fd, [][]byte{a, b}, 70)
			return fmt.Errorf("%d %v %d %v %s %s", w, err, r, err2, sum(a), sum(b))
		})
	}}, operation{"append", func(d string) string {
		return withFile(d+"/cached", unix.O_WRONLY|unix.O_APPEND, func(fd int) error {
			n, err := unix.Write(fd, pattern(1, 10_001))
			return fmt.Errorf("%d %w", n, err)
		}) + stat(d+"/cached")
	}}, operation{"mapped", func(d string) string {
		return withFile(d+"/cached", unix.O_RDWR, func(fd int) error {
			m, err := unix.Mmap(fd, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return err
			}
			s := sum(m)
			copy(m[5000:], "mapped")
			return fmt.Errorf("%s %v %v", s, unix.Msync(m, unix.MS_SYNC), unix.Munmap(m))
		})
	}}, operation{"read all of it", func(d string) string {
		b, err := os.ReadFile(d + "/cached")
		return fmt.Sprint(sum(b), err)
	}})
}

// Every operation has the same outcome over both transports, and the file system is asked the same on the way.
func TestBothTransportsAnswerTheSame(t *testing.T) {
	dev, ring := newMemFS(), newMemFS()
	a, b := serve(t, onDev, dev), serve(t, onUring, ring)
	for _, o := range operations() {
		want := o.run(a.dir)
		if got := strings.ReplaceAll(o.run(b.dir), b.dir, a.dir); got != want {
			t.Errorf("%s:\n/dev/fuse: %s\nio_uring:  %s", o.name, want, got)
		}
		if want, got := settledTrace(dev), settledTrace(ring); want != got {
			t.Errorf("%s: the file system was asked\nover /dev/fuse: %s\nover io_uring:  %s", o.name, want, got)
		}
	}
	if b.conn.Stats().Requests == 0 {
		t.Error("nothing came over io_uring")
	}
	if log := regexp.MustCompile(`(?m)^.*Unimplemented opcode.*$`).ReplaceAllString(b.log.String(), ""); strings.TrimSpace(log) != "" {
		t.Errorf("logged: %s", log)
	}
}

// settledTrace gives what a file system was asked, without what the kernel decides in its own time: how far it reads
// ahead, in which order a written page is read and written back.
func settledTrace(m *memFS) string {
	var lines []string
	for _, l := range strings.Split(m.took(), "\n") {
		if !strings.HasPrefix(l, "read") {
			lines = append(lines, l)
		}
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

// go-fuse's conformance tests, on go-fuse's own file system, which answers from descriptors.
func TestPosixOverLoopback(t *testing.T) {
	for _, c := range []carrier{onDev, onUring} {
		t.Run(c.String(), func(t *testing.T) {
			backing := t.TempDir()
			root, err := fs.NewLoopbackRoot(backing)
			must(t, err)
			m := serve(t, c, fs.NewNodeFS(root, &fs.Options{}))
			for name, test := range posixtest.All {
				if name == "FcntlFlockLocksFile" {
					continue // expects POSIX locks of one process to exclude each other; go-fuse leaves it out too
				}
				dir := m.path(name)
				must(t, os.Mkdir(dir, 0o755))
				t.Run(name, func(t *testing.T) { test(t, dir) })
			}
		})
	}
}

// What a file system answers wrongly, or not at all, stays its own affair.
func TestOddAnswers(t *testing.T) {
	for _, c := range []carrier{onDev, onUring} {
		t.Run(c.String(), func(t *testing.T) {
			m := newMemFS()
			m.file("f", pattern(1, 10_000))
			m.nodes[2].xattrs["user.x"] = []byte("value")
			m.xattrLie = 3
			s := serve(t, c, m)
			buf := make([]byte, 100)
			if n, err := unix.Getxattr(s.path("f"), "user.x", buf); err != nil || n != 8 {
				t.Errorf("an xattr that is said to be 8 bytes long: %d, %v", n, err)
			}
			if n, err := unix.Getxattr(s.path("f"), "user.x", buf[:6]); !errors.Is(err, unix.EIO) {
				t.Errorf("an xattr longer than its buffer: %d, %v", n, err)
			}
			m.mu.Lock()
			m.hook = func(op, name string) {
				switch {
				case op == "lookup" && name == "panic", op == "mkdir", op == "fsync", op == "read":
					panic("on purpose: " + op)
				}
			}
			m.mu.Unlock()
			if _, err := unix.Open(s.path("panic"), unix.O_RDONLY, 0); !errors.Is(err, unix.EIO) {
				t.Errorf("a panic in LOOKUP: %v", err)
			}
			if err := unix.Mkdir(s.path("d"), 0o700); !errors.Is(err, unix.EIO) {
				t.Errorf("a panic in MKDIR: %v", err)
			}
			withFile(s.path("f"), unix.O_RDWR, func(fd int) error {
				if err := unix.Fsync(fd); !errors.Is(err, unix.EIO) {
					t.Errorf("a panic in FSYNC: %v", err)
				}
				if _, err := unix.Pread(fd, buf, 0); !errors.Is(err, unix.EIO) {
					t.Errorf("a panic in READ: %v", err)
				}
				return nil
			})
			for _, op := range []string{"lookup", "mkdir", "fsync", "read"} {
				if s.log.count("on purpose: "+op) == 0 {
					t.Errorf("the panic in %s is not in the log", op)
				}
			}
			if stat(s.path("f")) == "" {
				t.Error("nothing goes on after panics")
			}
		})
	}
}

// A handler for panics decides about the answer.
func TestPanicHandler(t *testing.T) {
	for _, c := range []carrier{onDev, onUring} {
		t.Run(c.String(), func(t *testing.T) {
			m := newMemFS()
			m.hook = func(op, name string) {
				if name == "panic" {
					panic(op)
				}
			}
			s := serve(t, c, m, func(o *fuse.MountOptions) {
				o.PanicHandler = func(r any) fuse.Status {
					return map[any]fuse.Status{"lookup": fuse.Status(unix.ENOMEM), "symlink x": fuse.OK}[r]
				}
			})
			if err := unix.Access(s.path("panic"), 0); !errors.Is(err, unix.ENOMEM) {
				t.Errorf("LOOKUP: %v", err)
			}
		})
	}
}

func errno(err error) string {
	if err == nil {
		return "ok"
	}
	return err.Error()
}

func stat(p string) string {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return " " + err.Error()
	}
	return fmt.Sprint(" ", st.Ino, st.Mode, st.Nlink, st.Uid, st.Gid, st.Rdev, st.Size, st.Blocks, st.Blksize, st.Mtim)
}

func create(p string) string {
	return withFile(p, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, func(int) error { return nil })
}

// withFile tells how f fared with an open file.
func withFile(p string, flags int, f func(fd int) error) string {
	fd, err := unix.Open(p, flags|unix.O_CLOEXEC, 0o640)
	if err != nil {
		return "open: " + err.Error()
	}
	err = f(fd)
	return errno(errors.Join(err, unix.Close(fd)))
}

func shut(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
}

// list tells what readdir says, with large and small buffers, and what stat says of everything.
func list(d string) string {
	var out strings.Builder
	for _, size := range []int{64 << 10, 512} {
		fd, err := unix.Open(d, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err.Error()
		}
		buf := make([]byte, size)
		for {
			n, err := unix.Getdents(fd, buf)
			if err != nil {
				fmt.Fprint(&out, err)
			}
			if n <= 0 {
				break
			}
			fmt.Fprintln(&out, sum(buf[:n]))
		}
		unix.Close(fd)
	}
	entries, err := os.ReadDir(d)
	fmt.Fprintln(&out, len(entries), err)
	for i, e := range entries {
		if i%37 == 0 {
			fmt.Fprintln(&out, e.Name(), stat(filepath.Join(d, e.Name())))
		}
	}
	return out.String()
}

// aligned gives n bytes that begin at a page's start.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip:][:n:n]
}
