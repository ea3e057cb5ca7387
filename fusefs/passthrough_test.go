package fusefs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"lamina/union"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func image() string { return content("\x7fELF") }

// needPassthrough says what the test counts on, so that a kernel without it fails loudly and not by accident.
func needPassthrough(t *testing.T, r *rig) {
	t.Helper()
	if st := r.Status(); st.Passthrough == "off" {
		t.Fatalf("passthrough is off: %s", st.PassthroughReason)
	}
}

// TestBackingIDNotReused: the trap of giving a writer the backing file that readers of the same inode have, which is the
// lower one. Reader, then writer, then another reader, all open at once.
func TestBackingIDNotReused(t *testing.T) {
	r := newRig(t, Options{}, func(lower string) { must(t, os.WriteFile(lower+"/lib.so", []byte(image()), 0o644)) })
	needPassthrough(t, r)
	a := startActor(t, 0)
	before := a.stat(r.path("lib.so"))
	old := a.open(r.path("lib.so"), unix.O_RDONLY)
	if got := r.Status().PassedOpens; got != 1 {
		t.Fatalf("%d opens were passed through, want 1", got)
	}
	w := a.open(r.path("lib.so"), unix.O_RDWR)
	a.pwrite(w, 0, "\x7fELFwritten")
	fresh := a.open(r.path("lib.so"), unix.O_RDONLY)
	same(t, "the old reader", a.pread(old, 0, 11), image()[:11])
	same(t, "the writer", a.pread(w, 0, 11), "\x7fELFwritten")
	same(t, "the new reader", a.pread(fresh, 0, 11), "\x7fELFwritten")
	b, err := os.ReadFile(r.lower + "/lib.so")
	must(t, err)
	same(t, "the lower file", string(b), image())
	after := a.stat(r.path("lib.so"))
	if before.Ino != after.Ino || before.Dev != after.Dev {
		t.Errorf("the file changed its number: %d:%d, then %d:%d", before.Dev, before.Ino, after.Dev, after.Ino)
	}
	if got := r.Status().Detached; got != 1 {
		t.Errorf("%d files were detached, want 1", got)
	}
}

// TestDetach: every way to change the bytes of a file that readers are passed through to.
func TestDetach(t *testing.T) {
	ways := []struct {
		name string
		do   func(a *actor, path string)
		want string // the file afterwards; empty: of no length
	}{
		{"open for writing", func(a *actor, p string) { a.pwrite(a.open(p, unix.O_WRONLY), 4, "x") }, image()[:4] + "x" + image()[5:]},
		{"append", func(a *actor, p string) {
			a.must(request{Op: "write", FD: a.open(p, unix.O_WRONLY|unix.O_APPEND), Data: []byte("end")})
		}, image() + "end"},
		{"O_TRUNC", func(a *actor, p string) { a.open(p, unix.O_WRONLY|unix.O_TRUNC) }, ""},
		{"O_RDONLY and O_TRUNC", func(a *actor, p string) { a.open(p, unix.O_RDONLY|unix.O_TRUNC) }, ""},
		{"O_CREAT", func(a *actor, p string) { a.pwrite(a.open(p, unix.O_RDWR|unix.O_CREAT), 0, "\x7f") }, image()},
		{"truncate by name", func(a *actor, p string) { a.must(request{Op: "truncate", Path: p, Off: 100}) }, image()[:100]},
		{"chmod, then write", func(a *actor, p string) {
			a.must(request{Op: "chmod", Path: p, Mode: 0o600})
			a.pwrite(a.open(p, unix.O_WRONLY), 4, "x")
		}, image()[:4] + "x" + image()[5:]},
	}
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			r := newRig(t, Options{}, func(lower string) { must(t, os.WriteFile(lower+"/lib.so", []byte(image()), 0o644)) })
			needPassthrough(t, r)
			reader, writer := startActor(t, 0), startActor(t, 0)
			fd := reader.open(r.path("lib.so"), unix.O_RDONLY)
			m := reader.mmap(fd, fileLen, unix.PROT_READ)
			w.do(writer, r.path("lib.so"))
			same(t, "the old reader", reader.pread(fd, 0, fileLen+16), image())
			same(t, "the old mapping", reader.load(m, 0, fileLen), image())
			if got := reader.must(request{Op: "fstat", FD: fd}).Stat; got.Size != fileLen || got.Ino != reader.stat(r.path("lib.so")).Ino {
				t.Errorf("the old reader's fstat: size %d, inode %d", got.Size, got.Ino)
			}
			same(t, "a new reader", writer.pread(writer.open(r.path("lib.so"), unix.O_RDONLY), 0, fileLen+16), w.want)
			if st := writer.stat(r.path("lib.so")); st.Size != int64(len(w.want)) {
				t.Errorf("size %d, want %d", st.Size, len(w.want))
			}
			b, err := os.ReadFile(r.lower + "/lib.so")
			must(t, err)
			same(t, "the lower file", string(b), image())
		})
	}
}

// TestDetachAfterWholeCopyUp: a change of metadata, or another name, brought the whole file into the upper layer, as it does
// where files are cloned or copied, while readers were passed through to the lower one.
func TestDetachAfterWholeCopyUp(t *testing.T) {
	whole := func(c *union.Config) { c.CopyUp = union.CopyUpFull }
	for name, before := range map[string]request{"chmod": {Op: "chmod", Mode: 0o600}, "link": {Op: "link"}} {
		for _, write := range []string{"open", "truncate"} {
			t.Run(name+", "+write, func(t *testing.T) {
				r := newRig(t, Options{}, func(lower string) { must(t, os.WriteFile(lower+"/lib.so", []byte(image()), 0o644)) }, whole)
				needPassthrough(t, r)
				reader, writer := startActor(t, 0), startActor(t, 0)
				path := r.path("lib.so")
				fd := reader.open(path, unix.O_RDONLY)
				m := reader.mmap(fd, fileLen, unix.PROT_READ)
				before.Path, before.Path2 = path, r.path("other")
				writer.must(before)
				want := image()[:100]
				if write == "open" {
					writer.pwrite(writer.open(path, unix.O_RDWR), 4, "x")
					want = image()[:4] + "x" + image()[5:]
				} else {
					writer.must(request{Op: "truncate", Path: path, Off: 100})
				}
				same(t, "the old reader", reader.pread(fd, 0, fileLen+16), image())
				same(t, "the old mapping", reader.load(m, 0, fileLen), image())
				if out := reader.do(request{Op: "fgetxattr", FD: fd, Args: []string{"user.x"}}); out.Errno != unix.ENODATA {
					t.Errorf("an attribute that nobody has set: %v", out.Errno)
				}
				old := reader.must(request{Op: "fstat", FD: fd}).Stat
				if st := reader.stat(path); old.Size != fileLen || old.Ino != st.Ino || st.Size != int64(len(want)) {
					t.Errorf("the old reader's fstat: size %d, inode %d; by name: size %d, inode %d", old.Size, old.Ino, st.Size, st.Ino)
				}
				same(t, "a new reader", writer.pread(writer.open(path, unix.O_RDONLY), 0, fileLen+16), want)
				if name == "link" {
					eventually(t, "the other name shows it too", func() bool { return writer.stat(r.path("other")).Size == int64(len(want)) })
				}
				reader.close(fd)
				b, err := os.ReadFile(r.lower + "/lib.so")
				must(t, err)
				same(t, "the lower file", string(b), image())
			})
		}
	}
}

// TestStaleNameIsLookedUpAgain: the kernel learns only after a while that the names of a detached file lead elsewhere. What
// is done by such a name meanwhile is done to the file that has it, and not to one that nobody will see again.
func TestStaleNameIsLookedUpAgain(t *testing.T) {
	ways := map[string]func(t *testing.T, a *actor, path string){
		"write":    func(_ *testing.T, a *actor, path string) { a.pwrite(a.open(path, unix.O_RDWR), 4, "x") },
		"truncate": func(_ *testing.T, a *actor, path string) { a.must(request{Op: "truncate", Path: path, Off: 100}) },
		"chmod":    func(_ *testing.T, a *actor, path string) { a.must(request{Op: "chmod", Path: path, Mode: 0o751}) },
		"link": func(_ *testing.T, a *actor, path string) {
			a.must(request{Op: "link", Path: path, Path2: path + ".other"})
		},
		"read": func(t *testing.T, a *actor, path string) {
			same(t, "read", a.pread(a.open(path, unix.O_RDONLY), 0, 9), "\x7fELFNEWER")
		},
	}
	for name, do := range ways {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Options{}, func(lower string) { must(t, os.WriteFile(lower+"/lib.so", []byte(image()), 0o644)) })
			a := startActor(t, 0)
			path := r.path("lib.so")
			a.stat(path) // the kernel knows the name
			n, err := r.fs.Lookup(r.fs.Root(), "lib.so")
			must(t, err)
			_, err = r.fs.Detach(n) // and is not told
			must(t, err)
			r.fs.Forget(n.ID(), 1)
			if name == "read" { // somebody who has looked it up again has written to it
				n, err := r.fs.Lookup(r.fs.Root(), "lib.so")
				must(t, err)
				h, err := r.fs.Open(n, unix.O_RDWR)
				must(t, err)
				_, err = h.WriteAt([]byte("NEWER"), 4, false)
				must(t, err)
				h.Release()
				r.fs.Forget(n.ID(), 1)
			}
			do(t, a, path)
			n, err = r.fs.Lookup(r.fs.Root(), "lib.so")
			must(t, err)
			defer r.fs.Forget(n.ID(), 1)
			st, err := r.fs.Attr(n)
			must(t, err)
			h, err := r.fs.Open(n, unix.O_RDONLY)
			must(t, err)
			defer h.Release()
			var head [5]byte
			_, err = h.ReadAt(head[:], 0)
			must(t, err)
			switch {
			case name == "write" && head[4] != 'x', name == "truncate" && st.Size != 100, name == "chmod" && st.Mode&0o777 != 0o751,
				name == "link" && st.Nlink != 2:
				t.Errorf("what was done is lost: %q, size %d, mode %o, %d links", head, st.Size, st.Mode, st.Nlink)
			}
		})
	}
}

// TestDetachHardLinks: the other names of a detached file lead to the new node too, for stat as well.
func TestDetachHardLinks(t *testing.T) {
	r := newRig(t, Options{}, func(lower string) {
		must(t, os.WriteFile(lower+"/a", []byte(image()), 0o644))
		must(t, os.Link(lower+"/a", lower+"/b"))
	})
	needPassthrough(t, r)
	reader, writer := startActor(t, 0), startActor(t, 0)
	reader.stat(r.path("b")) // the kernel now knows both names
	fd := reader.open(r.path("a"), unix.O_RDONLY)
	w := writer.open(r.path("a"), unix.O_RDWR)
	writer.pwrite(w, fileLen, "more")
	eventually(t, "the other name shows the new size", func() bool { return writer.stat(r.path("b")).Size == fileLen+4 })
	other := writer.open(r.path("b"), unix.O_RDONLY)
	same(t, "the other name", writer.pread(other, fileLen, 8), "more")
	a, b := writer.stat(r.path("a")), writer.stat(r.path("b"))
	if a.Ino != b.Ino || b.Size != fileLen+4 || b.Nlink != 2 {
		t.Errorf("a: inode %d; b: inode %d, size %d, %d links", a.Ino, b.Ino, b.Size, b.Nlink)
	}
	same(t, "the old reader", reader.pread(fd, fileLen, 8), "")
}

// TestImageInUse: a running program cannot be written, and a library that is mapped but no longer open can, which does
// not disturb who mapped it.
func TestImageInUse(t *testing.T) {
	sleep, err := os.ReadFile("/bin/sleep")
	must(t, err)
	r := newRig(t, Options{}, func(lower string) {
		must(t, os.WriteFile(lower+"/sleep", sleep, 0o755))
		must(t, os.WriteFile(lower+"/lib.so", []byte(image()), 0o644))
	})
	needPassthrough(t, r)
	a := startActor(t, 0)
	if out := a.must(request{Op: "run", Path: r.path("sleep"), Args: []string{"0"}}); len(out.Data) != 0 {
		t.Errorf("sleep said %q", out.Data)
	}
	if r.Status().PassedOpens == 0 {
		t.Error("the program was not passed through")
	}
	cmd := startProgram(t, r.path("sleep"), "1000")
	if out := a.do(request{Op: "open", Path: r.path("sleep"), Flags: unix.O_RDWR}); out.Errno != unix.ETXTBSY {
		t.Errorf("opening a running program for writing: %v, want ETXTBSY", out.Errno)
	}
	must(t, cmd.Kill())
	cmd.Wait()

	fd := a.open(r.path("lib.so"), unix.O_RDONLY)
	m := a.mmap(fd, fileLen, unix.PROT_READ)
	a.close(fd)
	w := a.open(r.path("lib.so"), unix.O_RDWR)
	a.pwrite(w, 4, "new")
	same(t, "the mapping", a.load(m, 0, 16), image()[:16])
	same(t, "the writer", a.pread(w, 0, 7), "\x7fELFnew")
}

func startProgram(t *testing.T, path string, args ...string) *os.Process {
	t.Helper()
	p, err := os.StartProcess(path, append([]string{path}, args...), &os.ProcAttr{})
	must(t, err)
	t.Cleanup(func() { p.Kill(); p.Wait() })
	return p
}

// TestReadOnlyMountPassesAll: without an upper layer no file can change, so all of them pass through.
func TestReadOnlyMountPassesAll(t *testing.T) {
	r := newRig(t, Options{ReadOnly: true}, func(lower string) { must(t, os.WriteFile(lower+"/data", []byte("plain"), 0o644)) })
	needPassthrough(t, r)
	a := startActor(t, 0)
	same(t, "the file", a.pread(a.open(r.path("data"), unix.O_RDONLY), 0, 16), "plain")
	if st := r.Status(); st.PassedOpens != 1 || st.CachedOpens != 0 {
		t.Errorf("%d opens passed through and %d cached, want 1 and 0", st.PassedOpens, st.CachedOpens)
	}
	if out := a.do(request{Op: "open", Path: r.path("data"), Flags: unix.O_WRONLY}); out.Errno != unix.EROFS {
		t.Errorf("open for writing: %v, want EROFS", out.Errno)
	}
}

// TestUnmountReleases: when the mount goes the kernel drops the RELEASE messages that it has not sent yet.
func TestUnmountReleases(t *testing.T) {
	r := newRig(t, Options{}, func(lower string) { must(t, os.WriteFile(lower+"/lib.so", []byte(image()), 0o644)) })
	n, err := r.fs.Lookup(r.fs.Root(), "lib.so")
	must(t, err)
	for range 3 {
		var out fuse.OpenOut
		must(t, r.srv.open(n, unix.O_RDONLY, false, &out)) // an OPEN whose RELEASE does not come
	}
	must(t, r.Unmount())
	if n := r.srv.handles.open(); n != 0 {
		t.Errorf("%d handles were not released", n)
	}
}

// TestSketchBecomesComplete: descriptors of a sketch stay cached when it becomes an ordinary file under them, and so
// does who opens it meanwhile; afterwards it passes through and nobody sees old pages.
func TestSketchBecomesComplete(t *testing.T) {
	r := newRig(t, Options{}, func(lower string) { must(t, os.WriteFile(lower+"/f", []byte(content("")), 0o644)) })
	needPassthrough(t, r)
	a := startActor(t, 0)
	w := a.open(r.path("f"), unix.O_RDWR)
	a.pread(w, 0, fileLen)
	all := strings.Repeat("y", fileLen)
	a.pwrite(w, 0, all) // every block
	fd := a.open(r.path("f"), unix.O_RDONLY)
	same(t, "a second descriptor", a.pread(fd, 0, fileLen), all)
	if got := r.Status().PassedOpens; got != 0 {
		t.Errorf("%d opens were passed through while the file was open cached", got)
	}
	a.close(fd)
	a.close(w)
	eventually(t, "the complete file is passed through", func() bool {
		waitIdle(t, r)
		w = a.open(r.path("f"), unix.O_RDWR)
		if r.Status().PassedOpens == 1 {
			return true
		}
		a.close(w)
		return false
	})
	a.pwrite(w, 0, "passed")
	same(t, "passed through", a.pread(w, 0, fileLen), "passed"+all[6:])
	a.close(w)
	waitIdle(t, r)
	b, err := os.ReadFile(r.upper + "/f")
	must(t, err)
	same(t, "the upper file", string(b), "passed"+all[6:])
}

// waitIdle waits for the kernel's RELEASE messages, which nobody waits for otherwise.
func waitIdle(t *testing.T, r *rig) {
	t.Helper()
	eventually(t, "all handles released", func() bool { return r.srv.handles.open() == 0 })
}

// TestOverlayBacking: a layer on overlayfs can be passed through to with max_stack_depth=2 only; without it the mount
// works all the same, and says what to do.
func TestOverlayBacking(t *testing.T) {
	base := t.TempDir()
	for _, d := range []string{"low", "up", "work", "merged"} {
		must(t, os.Mkdir(filepath.Join(base, d), 0o755))
	}
	must(t, os.WriteFile(base+"/low/lib.so", []byte(image()), 0o644))
	merged := base + "/merged"
	must(t, unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+base+"/low,upperdir="+base+"/up,workdir="+base+"/work"))
	t.Cleanup(func() { must(t, unix.Unmount(merged, 0)) })
	for _, depth := range []int{1, 2} {
		t.Run(map[int]string{1: "depth 1", 2: "depth 2"}[depth], func(t *testing.T) {
			var lines logLines
			dirs := t.TempDir()
			r := &rig{t: t, mnt: dirs}
			r.fs = openUnion(t, merged, "", "", true)
			r.mount(Options{ReadOnly: true, MaxStackDepth: depth, Logf: lines.add})
			a := startActor(t, 0)
			for range 2 {
				same(t, "the file", a.pread(a.open(r.path("lib.so"), unix.O_RDONLY), 0, fileLen), image())
			}
			st := r.Status()
			if passes := st.PassedOpens > 0; passes != (depth == 2) {
				t.Errorf("%d opens passed through: %s", st.PassedOpens, st.PassthroughReason)
			}
			if said := lines.count("max_stack_depth=2"); depth == 1 && (said != 1 || !strings.Contains(st.PassthroughReason, "max_stack_depth=2")) {
				t.Errorf("the remedy was logged %d times, want once; status says %q", said, st.PassthroughReason)
			}
		})
	}
}

// TestPassedBytesKeepNoPrivilege: a write by an unprivileged process drops the set-id bits, any write the capabilities,
// whoever does the writing.
func TestPassedBytesKeepNoPrivilege(t *testing.T) {
	// cap_net_bind_service=ep: revision 2, effective; see linux/capability.h.
	capability := []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	ways := map[string]func(a *actor, fd int, path string){
		"write":     func(a *actor, fd int, _ string) { a.pwrite(fd, 0, "x") },
		"ftruncate": func(a *actor, fd int, _ string) { a.must(request{Op: "ftruncate", FD: fd, Off: 10}) },
		"fallocate": func(a *actor, fd int, _ string) { a.must(request{Op: "fallocate", FD: fd, Len: 100}) },
		"O_TRUNC":   func(a *actor, _ int, path string) { a.open(path, unix.O_WRONLY|unix.O_TRUNC) },
	}
	for _, mode := range []Passthrough{PassthroughAuto, PassthroughOff} {
		for name, write := range ways {
			t.Run(mode.String()+"/"+name, func(t *testing.T) {
				r := newRig(t, Options{Passthrough: mode}, nil)
				must(t, os.Chmod(r.mnt, 0o777))
				root, user := startActor(t, 0), startActor(t, 1000)
				file := r.path("tool")
				root.close(root.open(file, unix.O_RDWR|unix.O_CREAT))
				root.must(request{Op: "chmod", Path: file, Mode: 0o6777})
				root.must(request{Op: "setxattr", Path: file, Args: []string{"security.capability"}, Data: capability})
				fd := user.open(file, unix.O_RDWR)
				if st := root.stat(file); st.Mode&0o7777 != 0o6777 {
					t.Fatalf("mode %o before the write", st.Mode)
				}
				write(user, fd, file)
				for _, path := range []string{file, r.upper + "/tool"} {
					if st := root.stat(path); st.Mode&0o7777 != 0o777 {
						t.Errorf("%s: mode %o, want 777", path, st.Mode&0o7777)
					}
					if out := root.do(request{Op: "getxattr", Path: path, Args: []string{"security.capability"}}); out.Errno != unix.ENODATA {
						t.Errorf("%s: capability is still there (%v)", path, out.Errno)
					}
				}
			})
		}
	}
}

// TestRootKeepsSetID: a privileged writer keeps the set-id bits.
func TestRootKeepsSetID(t *testing.T) {
	for _, mode := range []Passthrough{PassthroughAuto, PassthroughOff} {
		r := newRig(t, Options{Passthrough: mode}, nil)
		a := startActor(t, 0)
		fd := a.open(r.path("tool"), unix.O_RDWR|unix.O_CREAT)
		a.must(request{Op: "chmod", Path: r.path("tool"), Mode: 0o6755})
		a.pwrite(fd, 0, "x")
		if st := a.stat(r.path("tool")); st.Mode&0o7777 != 0o6755 {
			t.Errorf("passthrough=%v: mode %o, want 6755", mode, st.Mode&0o7777)
		}
	}
}

// TestMappedWriteMovesTime: a store through a shared mapping of a passed-through file shows in mtime once the file is
// closed, though the kernel was told to keep attributes for ever.
func TestMappedWriteMovesTime(t *testing.T) {
	for _, mode := range []Passthrough{PassthroughAuto, PassthroughOff} {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, Options{Passthrough: mode}, nil)
			a := startActor(t, 0)
			file := r.path("f")
			must(t, os.WriteFile(file, make([]byte, 4096), 0o644))
			long := unix.NsecToTimespec(1e18)
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{long, long}, 0))
			fd := a.open(file, unix.O_RDWR)
			m := a.mmap(fd, 4096, unix.PROT_READ|unix.PROT_WRITE)
			if st := a.stat(file); st.Mtim != long {
				t.Fatalf("mtime %v before the store", st.Mtim)
			}
			a.store(m, 0, "x")
			a.munmap(m)
			a.close(fd)
			eventually(t, "mtime moved", func() bool { return a.stat(file).Mtim.Sec > long.Sec })
		})
	}
}

// TestWriterMeetsReaders: programs keep opening images while somebody opens them for writing. The VFS tries again only
// once after ESTALE, so the new node must not be passed through before the writer has come.
func TestWriterMeetsReaders(t *testing.T) {
	const files = 60
	r := newRig(t, Options{}, func(lower string) {
		for i := range files {
			must(t, os.WriteFile(fmt.Sprintf("%s/lib%d.so", lower, i), []byte(image()), 0o644))
		}
	})
	needPassthrough(t, r)
	writer := startActor(t, 0)
	var current atomic.Int64
	var wg sync.WaitGroup
	for range 3 {
		reader := startActor(t, 0)
		wg.Go(func() {
			for current.Load() < files {
				path := r.path(fmt.Sprintf("lib%d.so", current.Load()%files))
				out := reader.do(request{Op: "open", Path: path})
				if out.Errno != 0 {
					t.Errorf("reader: %v", out.Errno)
					return
				}
				reader.do(request{Op: "close", FD: int(out.N)})
			}
		})
	}
	for i := range files {
		path := r.path(fmt.Sprintf("lib%d.so", i))
		eventually(t, "a reader is there", func() bool { return r.srv.handles.open() > 0 })
		if out := writer.do(request{Op: "open", Path: path, Flags: unix.O_RDWR}); out.Errno != 0 {
			t.Errorf("writer: %v", out.Errno)
		} else {
			writer.pwrite(int(out.N), 0, "\x7fELFwritten")
			writer.close(int(out.N))
		}
		current.Add(1)
	}
	wg.Wait()
	if r.Status().Detached == 0 {
		t.Error("no writer met a reader")
	}
}
