package power

import (
	"context"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

// unit is what a power cut leaves whole, bytes. Smaller tears are package block's crash test's.
const unit = 4096

// disk is a disk with a volatile cache: the file behind a loop device, served by this process, which so sees every write
// and every flush of the filesystem on it.
type disk struct {
	mu   sync.Mutex
	base map[int64][]byte // as it was before the log
	live map[int64][]byte // units, never changed once they are here
	log  []event
	size int64
	slow *rand.Rand // who is kept waiting; under mu
}

// event is a unit that was written, or a flush: data nil.
type event struct {
	at   int64
	data []byte
}

// position is how much has happened.
func (d *disk) position() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.log)
}

func (d *disk) flushes(from, to int) (n int) {
	for _, e := range d.log[from:to] {
		if e.data == nil {
			n++
		}
	}
	return n
}

// flushed is the position behind the last flush before position n.
func (d *disk) flushed(n int) int {
	for n > 0 && d.log[n-1].data != nil {
		n--
	}
	return n
}

// load takes over what an image holds.
func (d *disk) load(image string) error {
	f, err := os.Open(image)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	d.base, d.live, d.size = map[int64][]byte{}, map[int64][]byte{}, st.Size()
	for at := int64(0); ; {
		at, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		if err != nil {
			return err
		}
		at -= at % unit
		p := make([]byte, unit)
		if _, err := f.ReadAt(p, at); err != nil && err != io.EOF {
			return err
		}
		d.base[at/unit], d.live[at/unit] = p, p
		at += unit
	}
}

// cut returns a disk with what a power cut after the first n events can leave: everything before the last flush, and of
// what came behind it some units.
func (d *disk) cut(n int, r *rand.Rand) *disk {
	left := maps.Clone(d.base)
	flushed := d.flushed(n)
	keep := r.IntN(4) // 0: all, 1: none, otherwise a half
	for i, e := range d.log[:n] {
		if e.data != nil && (i < flushed || keep == 0 || keep > 1 && r.IntN(2) == 0) {
			left[e.at] = e.data
		}
	}
	return &disk{live: left, size: d.size}
}

// diskFile is the disk as a file.
type diskFile struct {
	fs.Inode
	*disk
}

var (
	_ fs.NodeOpener    = (*diskFile)(nil)
	_ fs.NodeGetattrer = (*diskFile)(nil)
	_ fs.NodeReader    = (*diskFile)(nil)
	_ fs.NodeWriter    = (*diskFile)(nil)
	_ fs.NodeFsyncer   = (*diskFile)(nil)
	_ fs.NodeFlusher   = (*diskFile)(nil)
)

// Open lets no page cache stand between the loop device and this process.
func (f *diskFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *diskFile) Flush(context.Context, fs.FileHandle) syscall.Errno { return 0 }

func (f *diskFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Blksize = unix.S_IFREG|0o600, uint64(f.size), unit
	return 0
}

func (f *diskFile) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p = p[:max(0, min(int64(len(p)), f.size-off))]
	for n := 0; n < len(p); {
		at := (off + int64(n)) % unit
		k := min(len(p)-n, int(unit-at))
		if u := f.live[(off+int64(n))/unit]; u != nil {
			copy(p[n:n+k], u[at:])
		} else {
			clear(p[n : n+k])
		}
		n += k
	}
	return fuse.ReadResultData(p), 0
}

// Write keeps some writers waiting, so that a filesystem which does not wait for a write before it flushes is seen to lose it.
func (f *diskFile) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	f.mu.Lock()
	wait := f.slow != nil && f.slow.IntN(16) == 0
	f.mu.Unlock()
	if wait {
		time.Sleep(2 * time.Millisecond)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for n := 0; n < len(p); {
		k, at := (off+int64(n))/unit, (off+int64(n))%unit
		u := make([]byte, unit)
		copy(u, f.live[k])
		n += copy(u[at:], p[n:])
		f.live[k] = u
		f.log = append(f.log, event{k, u})
	}
	return uint32(len(p)), 0
}

func (f *diskFile) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, event{})
	return 0
}

type diskDir struct {
	fs.Inode
	*disk
}

func (d *diskDir) OnAdd(ctx context.Context) {
	d.AddChild("disk", d.NewPersistentInode(ctx, &diskFile{disk: d.disk}, fs.StableAttr{Mode: unix.S_IFREG}), false)
}

// run runs a command, which must succeed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
	defer cancel()
	out, err := rival.Run(ctx, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// attach mounts the filesystem on a disk for the time of the test, and returns where.
func (d *disk) attach(t *testing.T, fstype, options string) string {
	t.Helper()
	dirs := mnt.Dirs(t, "disk", "fs")
	server, err := fs.Mount(dirs[0], &diskDir{disk: d}, &fs.Options{MountOptions: fuse.MountOptions{
		Name: "power", MaxWrite: 1 << 20, ExtraCapabilities: fuse.CAP_ASYNC_DIO, DirectMount: true, DisableSplice: true,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The loop device lets go of it when whoever else looks at new devices has closed it, too.
		err := server.Unmount()
		for end := time.Now().Add(mnt.Timeout); err != nil && time.Now().Before(end); err = server.Unmount() {
			time.Sleep(20 * time.Millisecond)
		}
		if err != nil {
			t.Errorf("unmounting the disk: %v", err)
			_ = unix.Unmount(dirs[0], unix.MNT_DETACH)
		}
	})
	loop := run(t, "losetup", "--find", "--show", "--direct-io=on", filepath.Join(dirs[0], "disk"))
	t.Cleanup(func() { run(t, "losetup", "-d", loop) })
	// A page that is changed while the device takes it would tear even a sector.
	stable := filepath.Join("/sys/block", filepath.Base(loop), "queue/stable_writes")
	if err := os.WriteFile(stable, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	mount(t, fstype, options, loop, dirs[1])
	return dirs[1]
}

// mount mounts a filesystem for the time of the test. That it fails is the filesystem's fault, or the disk's.
func mount(t *testing.T, fstype, options, what, at string) {
	t.Helper()
	run(t, "mount", "-t", fstype, "-o", strings.Trim("rw,"+options, ","), what, at)
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmounting %s: %v", at, err)
			_ = unix.Unmount(at, unix.MNT_DETACH)
		}
	})
}
