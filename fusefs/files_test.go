package fusefs

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lamina/union"

	"golang.org/x/sys/unix"
)

var bothModes = []Passthrough{PassthroughAuto, PassthroughOff}

// eachMode runs a test with and without passthrough, on a lower file f (which becomes a sketch) and on a new one.
func eachMode(t *testing.T, test func(t *testing.T, r *rig, file string)) {
	for _, mode := range bothModes {
		for _, name := range []string{"f", "new"} {
			t.Run(mode.String()+"/"+name, func(t *testing.T) {
				r := newRig(t, Options{Passthrough: mode}, func(lower string) {
					must(t, os.WriteFile(lower+"/f", []byte(content("")), 0o644))
				})
				if name == "new" {
					must(t, os.WriteFile(r.path(name), []byte(content("")), 0o644))
				}
				test(t, r, r.path(name))
			})
		}
	}
}

func TestAppendByTwo(t *testing.T) {
	eachMode(t, func(t *testing.T, r *rig, file string) {
		a, b := startActor(t, 0), startActor(t, 0)
		afd, bfd := a.open(file, unix.O_WRONLY|unix.O_APPEND), b.open(file, unix.O_WRONLY|unix.O_APPEND)
		want := content("")
		for i := range 20 {
			line := fmt.Sprintf("line %d\n", i)
			who, fd := a, afd
			if i%2 == 1 {
				who, fd = b, bfd
			}
			who.must(request{Op: "write", FD: fd, Data: []byte(line)})
			want += line
		}
		same(t, "the file", a.pread(a.open(file, unix.O_RDONLY), 0, len(want)+10), want)
		if st := a.stat(file); st.Size != int64(len(want)) {
			t.Errorf("size %d, want %d", st.Size, len(want))
		}
		// What the server does itself must know of bytes that it was not asked to write.
		rw := b.open(file, unix.O_RDWR)
		if out := b.must(request{Op: "copy", FD: rw, Off: fileLen, FD2: rw, Off2: 0, Len: 6}); out.N != 6 {
			t.Errorf("copied %d of 6 bytes", out.N)
		}
		same(t, "the appended bytes copied to the front", b.pread(rw, 0, 8), "line 0"+want[6:8])
	})
}

// TestStatAgainstClose: attributes are asked for by name while the last descriptor is being released.
func TestStatAgainstClose(t *testing.T) {
	eachMode(t, func(t *testing.T, r *rig, file string) {
		a, b := startActor(t, 0), startActor(t, 0)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 300 {
				if out := b.do(request{Op: "stat", Path: file}); out.Errno != 0 || out.Stat.Size < fileLen {
					t.Errorf("stat: %v, size %d", out.Errno, out.Stat.Size)
					return
				}
			}
		}()
		for range 300 {
			fd := a.open(file, unix.O_RDWR)
			a.pwrite(fd, 0, "x") // so that the attributes are not cached
			a.close(fd)
		}
		<-done
	})
}

func TestDirectIO(t *testing.T) {
	eachMode(t, func(t *testing.T, r *rig, file string) {
		a := startActor(t, 0)
		cached := a.open(file, unix.O_RDWR)
		same(t, "cached", a.pread(cached, 0, 8192), content("")[:8192])
		direct := a.open(file, unix.O_RDWR|unix.O_DIRECT)
		block := strings.Repeat("d", 4096)
		a.must(request{Op: "direct", FD: direct, Off: 4096, Len: 4096, Data: []byte(block)})
		same(t, "cached after a direct write", a.pread(cached, 4096, 4096), block)
		a.pwrite(cached, 5000, "cached")
		got := a.must(request{Op: "direct", FD: direct, Off: 4096, Len: 4096})
		same(t, "direct after a cached write", string(got.Data), block[:904]+"cached"+block[910:])
	})
}

// TestMappedByTwo: stores through the mapping of one process are seen by another's mapping and reads.
func TestMappedByTwo(t *testing.T) {
	eachMode(t, func(t *testing.T, r *rig, file string) {
		a, b := startActor(t, 0), startActor(t, 0)
		afd, bfd := a.open(file, unix.O_RDWR), b.open(file, unix.O_RDWR)
		am, bm := a.mmap(afd, fileLen, unix.PROT_READ|unix.PROT_WRITE), b.mmap(bfd, fileLen, unix.PROT_READ|unix.PROT_WRITE)
		a.store(am, 10, "from a")
		same(t, "b's mapping", b.load(bm, 10, 6), "from a")
		same(t, "b's read", b.pread(bfd, 10, 6), "from a")
		b.pwrite(bfd, 30, "from b")
		same(t, "a's mapping", a.load(am, 30, 6), "from b")
		a.munmap(am)
		a.must(request{Op: "fsync", FD: afd})
		a.close(afd)
		b.stop()
		waitIdle(t, r)
		fd := a.open(file, unix.O_RDONLY)
		same(t, "reopened", a.pread(fd, 10, 6)+a.pread(fd, 30, 6), "from afrom b")
	})
}

func TestOpenUnlinked(t *testing.T) {
	eachMode(t, func(t *testing.T, r *rig, file string) {
		a := startActor(t, 0)
		fd := a.open(file, unix.O_RDWR)
		a.must(request{Op: "unlink", Path: file})
		if out := a.do(request{Op: "stat", Path: file}); out.Errno != unix.ENOENT {
			t.Errorf("stat of the removed name: %v", out.Errno)
		}
		a.pwrite(fd, 100, "gone but here")
		same(t, "the open file", a.pread(fd, 100, 13), "gone but here")
		a.must(request{Op: "ftruncate", FD: fd, Off: 104})
		st := a.must(request{Op: "fstat", FD: fd}).Stat
		if st.Size != 104 || st.Nlink != 0 {
			t.Errorf("size %d with %d links, want 104 with none", st.Size, st.Nlink)
		}
		a.must(request{Op: "fsync", FD: fd})
	})
}

func TestRangeOperations(t *testing.T) {
	eachMode(t, func(t *testing.T, r *rig, file string) {
		a := startActor(t, 0)
		fd := a.open(file, unix.O_RDWR)
		want := []byte(content(""))
		a.pread(fd, 0, fileLen) // fills the page cache, where one is in use
		if out := a.must(request{Op: "copy", FD: fd, Off: 100, FD2: fd, Off2: 40000, Len: 9000}); out.N != 9000 {
			t.Fatalf("copied %d of 9000 bytes", out.N)
		}
		copy(want[40000:], want[100:9100])
		same(t, "after copy_file_range", a.pread(fd, 0, fileLen), string(want))
		a.must(request{Op: "fallocate", FD: fd, Mode: unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, Off: 8192, Len: 8292})
		clear(want[8192 : 8192+8292])
		same(t, "after punching a hole", a.pread(fd, 0, fileLen), string(want))
		if out := a.must(request{Op: "seek", FD: fd, Off: 0, Flags: unix.SEEK_HOLE}); out.N != 8192 {
			t.Errorf("the first hole is at %d, want 8192", out.N)
		}
		a.must(request{Op: "fallocate", FD: fd, Off: fileLen, Len: 1000})
		want = append(want, make([]byte, 1000)...)
		same(t, "after fallocate", a.pread(fd, 0, 2*fileLen), string(want))
		a.must(request{Op: "ftruncate", FD: fd, Off: 50})
		a.must(request{Op: "ftruncate", FD: fd, Off: 9000})
		want = append(want[:50:50], make([]byte, 8950)...)
		same(t, "after truncating both ways", a.pread(fd, 0, fileLen), string(want))
	})
}

func TestTmpfileGetsAName(t *testing.T) {
	for _, mode := range bothModes {
		r := newRig(t, Options{Passthrough: mode}, nil)
		a := startActor(t, 0)
		fd := int(a.must(request{Op: "open", Path: r.mnt, Flags: unix.O_TMPFILE | unix.O_RDWR, Mode: 0o600}).N)
		a.pwrite(fd, 0, "nameless")
		a.must(request{Op: "linkfd", FD: fd, Path: r.path("named")})
		same(t, "by its name", a.pread(a.open(r.path("named"), unix.O_RDONLY), 0, 20), "nameless")
		if st := a.stat(r.path("named")); st.Nlink != 1 || st.Size != 8 {
			t.Errorf("%d links, size %d", st.Nlink, st.Size)
		}
	}
}

// TestOpenWhileReplaced: a file that others keep replacing can be opened at any moment, and what was opened is one of
// the files that had the name.
func TestOpenWhileReplaced(t *testing.T) {
	for _, mode := range bothModes {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, Options{Passthrough: mode}, func(lower string) { must(t, os.WriteFile(lower+"/f", []byte("lower"), 0o644)) })
			var wg sync.WaitGroup
			writer := startActor(t, 0)
			wg.Go(func() {
				out := writer.do(request{Op: "replace", Path: r.path("f"), Path2: r.path("new"), Data: []byte("replaced"), Len: 600})
				if out.Errno != 0 {
					t.Errorf("replacing: %v", out.Errno)
				}
			})
			for range 2 {
				reader := startActor(t, 0)
				wg.Go(func() {
					out := reader.do(request{Op: "reopen", Path: r.path("f"), Args: []string{"lower", "replaced"}, Len: 600})
					if s := string(out.Data); out.Errno != 0 || s != "lower" && s != "replaced" {
						t.Errorf("read %q, %v", s, out.Errno)
					}
				})
			}
			wg.Wait()
			eventually(t, "nothing that lost its name is kept", func() bool {
				return r.fs.Live() <= 3 // the root, f, and what had the name last
			})
		})
	}
}

// TestReferences: every reference that the kernel was given is given back when it forgets, whether it came by LOOKUP,
// READDIRPLUS, creation or link.
func TestReferences(t *testing.T) {
	r := newRig(t, Options{}, func(lower string) {
		must(t, os.Mkdir(lower+"/dir", 0o755))
		for i := range 3000 { // several answers of READDIRPLUS
			must(t, os.WriteFile(fmt.Sprintf("%s/dir/file-with-a-long-name-%04d", lower, i), nil, 0o644))
		}
	})
	a := startActor(t, 0)
	if out := a.must(request{Op: "readdir", Path: r.path("dir")}); out.N != 3000 {
		t.Errorf("%d entries, want 3000", out.N)
	}
	for i := range 3000 {
		a.stat(r.path(fmt.Sprintf("dir/file-with-a-long-name-%04d", i)))
	}
	a.close(a.open(r.path("made"), unix.O_CREAT|unix.O_RDWR))
	a.must(request{Op: "link", Path: r.path("made"), Path2: r.path("linked")})
	waitIdle(t, r)
	if n := r.fs.Live(); n < 3000 {
		t.Errorf("%d nodes live, want 3000 at least", n)
	}
	var ids []uint64
	for id := range uint64(2 * 3010) {
		if id > 1 && r.fs.Node(id) != nil {
			ids = append(ids, id)
		}
	}
	for range 3 { // files first, then the directory that they were in
		for _, id := range ids {
			r.dev.prune(id)
		}
	}
	eventually(t, fmt.Sprintf("only the root lives, not %d nodes", r.fs.Live()), func() bool {
		for _, id := range ids {
			r.dev.prune(id)
		}
		return r.fs.Live() == 1
	})
}

// TestNothingLeftToAsk: what was looked at once costs no message any more.
func TestNothingLeftToAsk(t *testing.T) {
	r := newRig(t, Options{}, func(lower string) {
		must(t, os.WriteFile(lower+"/f", []byte("x"), 0o644))
		must(t, os.Symlink("f", lower+"/link"))
	})
	a := startActor(t, 0)
	look := func() {
		a.stat(r.path("f"))
		a.must(request{Op: "readdir", Path: r.mnt})
		if out := a.do(request{Op: "stat", Path: r.path("absent")}); out.Errno != unix.ENOENT {
			t.Errorf("stat of nothing: %v", out.Errno)
		}
		if target, err := os.Readlink(r.path("link")); err != nil || target != "f" {
			t.Errorf("link to %q, %v", target, err)
		}
	}
	look()
	look() // reading a directory or a link changes its access time, which is asked for once more
	before := r.Status().Requests
	look()
	after := r.Status().Requests
	for _, op := range []string{"lookup", "readdir", "readlink", "open"} {
		if after[op] != before[op] {
			t.Errorf("%d more requests: %s", after[op]-before[op], op)
		}
	}
	if after["getattr"] > before["getattr"]+2 {
		t.Errorf("%d more requests for attributes", after["getattr"]-before["getattr"])
	}
}

// TestSignalsInterruptNothing: a client that gets signals all the time (a Go program does) never sees EINTR.
func TestSignalsInterruptNothing(t *testing.T) {
	r := newRig(t, Options{Passthrough: PassthroughOff}, func(lower string) {
		must(t, os.WriteFile(lower+"/f", []byte(content("")), 0o644))
	})
	a := startActor(t, 0)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				a.cmd.Process.Signal(unix.SIGURG)
				time.Sleep(20 * time.Microsecond)
			}
		}
	}()
	fd := a.open(r.path("f"), unix.O_RDWR|unix.O_DIRECT)
	for i := range 300 {
		a.must(request{Op: "direct", FD: fd, Off: int64(i%16) * 4096, Len: 4096, Data: []byte("data")})
		a.must(request{Op: "direct", FD: fd, Off: int64(i%16) * 4096, Len: 4096})
		name := r.path(fmt.Sprintf("made%d", i))
		a.close(a.open(name, unix.O_CREAT|unix.O_RDWR))
		a.must(request{Op: "unlink", Path: name})
	}
	close(stop)
	<-done
}

// TestRandomOpens: descriptors of one file come and go in several processes, each reading, writing, mapping and
// truncating. All must agree with a model at every step, whatever mode the inode is in.
func TestRandomOpens(t *testing.T) {
	const seeds, steps = 2, 400
	for _, mode := range bothModes {
		for seed := range uint64(seeds) {
			for _, kind := range []string{"data", "new", "whole"} { // whole: copied when it is first opened for writing
				t.Run(fmt.Sprintf("%v/%s/%d", mode, kind, seed), func(t *testing.T) {
					r := newRig(t, Options{Passthrough: mode}, func(lower string) {
						must(t, os.WriteFile(lower+"/data", []byte(content("")), 0o644))
						must(t, os.WriteFile(lower+"/whole", []byte(content("")), 0o644))
					}, func(c *union.Config) {
						if kind == "whole" {
							c.CopyUp = union.CopyUpAuto
						}
					})
					if kind == "new" {
						must(t, os.WriteFile(r.path(kind), []byte(content("")), 0o644))
					}
					randomOpens(t, r.path(kind), rand.New(rand.NewPCG(seed, 1)), steps)
				})
			}
		}
	}
}

func randomOpens(t *testing.T, file string, rnd *rand.Rand, steps int) {
	type descriptor struct {
		a           *actor
		fd          int
		read, write bool
	}
	actors := []*actor{startActor(t, 0), startActor(t, 0)}
	var open []descriptor
	model := []byte(content(""))
	for step := range steps {
		if len(open) == 0 || len(open) < 6 && rnd.IntN(4) == 0 {
			d := descriptor{a: actors[rnd.IntN(2)], write: rnd.IntN(2) == 0, read: true}
			flags := unix.O_RDONLY
			if d.write {
				d.read = rnd.IntN(3) > 0
				flags = []int{unix.O_RDWR, unix.O_RDWR, unix.O_RDWR | unix.O_DSYNC}[rnd.IntN(3)]
				if !d.read {
					flags = flags&^unix.O_ACCMODE | unix.O_WRONLY
				}
				if rnd.IntN(20) == 0 {
					flags |= unix.O_TRUNC
					model = nil
				}
			}
			d.fd = d.a.open(file, flags)
			open = append(open, d)
			continue
		}
		i := rnd.IntN(len(open))
		d := open[i]
		switch off := rnd.IntN(fileLen); rnd.IntN(8) {
		case 0, 1:
			d.a.close(d.fd)
			open = slices.Delete(open, i, i+1)
		case 2, 3:
			if d.write {
				s := fmt.Sprintf("step %d %s", step, strings.Repeat("=", rnd.IntN(9000)))
				d.a.pwrite(d.fd, int64(off), s)
				model = put(model, off, s)
			}
		case 4:
			size := rnd.IntN(fileLen)
			if d.write && rnd.IntN(2) == 0 {
				d.a.must(request{Op: "ftruncate", FD: d.fd, Off: int64(size)})
				model = resize(model, size)
			} else if rnd.IntN(4) == 0 {
				d.a.must(request{Op: "truncate", Path: file, Off: int64(size)})
				model = resize(model, size)
			}
		case 5:
			if len(model) > 0 && d.read {
				m := d.a.mmap(d.fd, len(model), unix.PROT_READ)
				same(t, fmt.Sprintf("step %d: mapping", step), d.a.load(m, 0, len(model)), string(model))
				d.a.munmap(m)
			}
		case 6, 7:
			if !d.read {
				continue
			}
			same(t, fmt.Sprintf("step %d: read", step), d.a.pread(d.fd, 0, 2*fileLen), string(model))
		}
		if t.Failed() {
			return
		}
	}
}

func put(b []byte, off int, s string) []byte {
	if len(b) < off+len(s) {
		b = resize(b, off+len(s))
	}
	copy(b[off:], s)
	return b
}

func resize(b []byte, size int) []byte {
	if size <= len(b) {
		return b[:size:size]
	}
	return append(b, make([]byte, size-len(b))...)
}
