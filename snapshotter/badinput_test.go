package snapshotter_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lamina/snapshotter"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// lamina runs this program as lamina.
func lamina(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "lamina"
	return cmd
}

// daemon starts lamina snapshotter and waits until it answers.
func daemon(t *testing.T, root, address string) (snapshots.Snapshotter, *exec.Cmd) {
	t.Helper()
	cmd := lamina("snapshotter", "--root", root, "--address", address)
	var said bytes.Buffer
	cmd.Stderr = &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		must(t, endPools(root))
	})
	conn, err := grpc.NewClient("unix:"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	s := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "lamina")
	if err := eventually(func() error {
		return s.Walk(context.Background(), func(context.Context, snapshots.Info) error { return nil })
	}); err != nil {
		t.Fatalf("%v: %s", err, said.String())
	}
	return s, cmd
}

// refused runs lamina snapshotter, which must end with one line that has what is wanted in it.
func refused(t *testing.T, args []string, wanted ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"snapshotter"}, args...)...)
	cmd.Args[0] = "lamina"
	var said bytes.Buffer
	cmd.Stderr = &said
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || ctx.Err() != nil || strings.Count(said.String(), "\n") != 1 {
		t.Errorf("%q: %v, said %q", args, err, said.String())
	}
	for _, w := range wanted {
		if !strings.Contains(said.String(), w) {
			t.Errorf("%q: %q does not say %q", args, said.String(), w)
		}
	}
}

// The daemon refuses what others have and what cannot work, takes over what the dead have left, and ends cleanly; mounts of
// containers outlive it.
func TestDaemon(t *testing.T) {
	dir := t.TempDir()
	root, address := dir+"/root", dir+"/sock"
	stale, err := net.Listen("unix", address)
	must(t, err)
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	must(t, stale.Close())
	s, cmd := daemon(t, root, address)

	ctx := context.Background()
	refused(t, []string{"--root", dir + "/other", "--address", address}, address, "listens on it")
	refused(t, []string{"--root", root, "--address", dir + "/other.sock"}, root, "another snapshotter has it")
	living, err := net.Listen("unix", dir+"/living")
	must(t, err)
	defer living.Close()
	refused(t, []string{"--root", dir + "/other", "--address", dir + "/living"}, dir+"/living", "listens on it")
	write(t, dir+"/file", "not a socket")
	refused(t, []string{"--root", dir + "/other", "--address", dir + "/file"}, dir+"/file", "no socket")
	want(t, dir+"/file", "not a socket")
	refused(t, []string{"--root", dir + "/other", "--address", dir + "/o.sock", "-o", "colour=red"}, "colour")
	refused(t, []string{"--root", dir + "/other", "--address", dir + "/o.sock", "-o", "upperdir=/x"}, "upperdir", "leave it out")
	refused(t, []string{"--root", dir + "/other", "--address", dir + "/o.sock", "--pool-cgroup", "/nonexistent"}, "cgroup", "/nonexistent")
	refused(t, []string{"--root", dir + "/file", "--address", dir + "/o.sock"}, dir+"/file")

	_, err = s.Prepare(ctx, "extract-1 layer", "")
	must(t, err)
	must(t, s.Commit(ctx, "layer", "extract-1 layer"))
	mounts, err := s.Prepare(ctx, "c", "layer")
	must(t, err)
	must(t, cmd.Process.Signal(unix.SIGTERM))
	if err := cmd.Wait(); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	if _, err := os.Lstat(address); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its socket after its end: %v", err)
	}
	write(t, mounts[0].Source+"/alone", "written while no snapshotter runs")
	s, cmd = daemon(t, root, address)
	again, err := s.Mounts(ctx, "c")
	must(t, err)
	want(t, again[0].Source+"/alone", "written while no snapshotter runs")
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	write(t, mounts[0].Source+"/alone", "and when it was killed")
	s, _ = daemon(t, root, address)
	must(t, s.Remove(ctx, "c"))
	if left := mountsBelow(t, dir); len(left) > 0 {
		t.Errorf("left mounted: %v", left)
	}
}

// ramfs keeps no attributes.
func TestRootWithoutAttributes(t *testing.T) {
	dir := t.TempDir()
	must(t, unix.Mount("none", dir, "ramfs", 0, ""))
	defer unix.Unmount(dir, unix.MNT_DETACH)
	_, err := snapshotter.New(snapshotter.Config{Root: dir + "/root"})
	if err == nil || !strings.Contains(err.Error(), "trusted.*") || !strings.Contains(err.Error(), "ext4") {
		t.Errorf("a root on ramfs: %v", err)
	}
}

// A layer that is gone is named, makes no snapshot, and hurts no other image.
func TestParentMissing(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	s.layer("other", "", func(dir string) { write(t, dir+"/other", "fine") })
	dirs, err := filepath.Glob(s.path("snapshots", "*", "fs", "links"))
	must(t, err)
	if len(dirs) != 1 {
		t.Fatalf("layers with links: %v", dirs)
	}
	layer := filepath.Dir(dirs[0])
	must(t, os.Rename(layer, s.path("aside")))
	for what, try := range map[string]func() error{
		"prepare": func() error { _, err := s.Prepare(s.ctx, "c", "top"); return err },
		"unpack":  func() error { _, err := s.Prepare(s.ctx, "extract-1 c", "top"); return err },
		"view":    func() error { _, err := s.View(s.ctx, "c", "base"); return err },
	} {
		if err := try(); err == nil || !strings.Contains(err.Error(), layer) {
			t.Errorf("%s: %v", what, err)
		}
		if s.exists("c") || s.exists("extract-1 c") {
			t.Errorf("%s: there is a snapshot", what)
		}
	}
	s.container("fine", "other", func(dir string) { want(t, dir+"/other", "fine") })
	must(t, os.Rename(s.path("aside"), layer))
	s.clean()
	s.container("c", "top", func(dir string) { want(t, dir+"/big", big) })
}

// A sketch in a parent that is damaged is an error for whoever reads that file, and for nobody else; nothing can be exported
// that would hold a guess.
func TestParentSketchDamaged(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	s.container("c", "top", func(dir string) { overwrite(t, dir+"/big", "XYZ", 500_000); write(t, dir+"/new", "new") })
	must(t, s.Commit(s.ctx, "committed", "c", gcRoot))
	sketches, err := filepath.Glob(s.path("snapshots", "*", "fs", "new"))
	must(t, err)
	sketch := filepath.Dir(sketches[0]) + "/big"
	const attr = "trusted.overlay.metacopy"
	header := make([]byte, 256)
	n, err := unix.Lgetxattr(sketch, attr, header)
	must(t, err)
	broken := bytes.Clone(header[:n])
	broken[n/2] ^= 0x10
	must(t, unix.Lsetxattr(sketch, attr, broken, 0))
	s.container("hurt", "committed", func(dir string) {
		if _, err := os.ReadFile(dir + "/big"); !errors.Is(err, unix.EIO) {
			t.Errorf("reading it: %v", err)
		}
		want(t, dir+"/new", "new")
		write(t, dir+"/new", "newer")
	})
	must(t, s.Commit(s.ctx, "on damage", "hurt", gcRoot))
	must(t, unix.Lsetxattr(sketch, attr, header[:n], 0))
	s.view("on damage", func(dir string) {
		want(t, dir+"/new", "newer")
		want(t, dir+"/big", big[:500_000]+"XYZ"+big[500_003:])
	})
}

// smallDisk is an ext4 of its own.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/mnt", 0o755))
	f, err := os.Create(dir + "/disk")
	must(t, err)
	must(t, f.Truncate(48<<20))
	must(t, f.Close())
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
	}
	run("mkfs.ext4", "-q", "-m", "0", "-N", "2000", dir+"/disk")
	run("mount", "-o", "loop", dir+"/disk", dir+"/mnt")
	// A server whose socket is gone may still be about to end.
	t.Cleanup(func() { must(t, eventually(func() error { return unix.Unmount(dir+"/mnt", 0) })) })
	return dir + "/mnt"
}

// fillDisk takes all that is free, and returns what gives it back.
func fillDisk(t *testing.T, dir string) (free func()) {
	t.Helper()
	f, err := os.Create(dir + "/ballast")
	must(t, err)
	defer f.Close()
	for _, piece := range []int{1 << 20, 4096} {
		block := make([]byte, piece)
		for err = nil; err == nil; {
			_, err = f.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	must(t, f.Sync())
	return func() { must(t, os.Remove(dir+"/ballast")) }
}

// On a full disk requests fail and say why, nothing is half made, nothing that was written is lost, and with space they work.
func TestFullDisk(t *testing.T) {
	disk := smallDisk(t)
	s := newStore(t, snapshotter.Config{Root: disk, Options: []string{"caw=lazy"}})
	s.image()
	full := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, unix.ENOSPC) || !errdefs.IsResourceExhausted(err) {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	s.container("c", "top", func(dir string) {
		overwrite(t, dir+"/big", "XYZ", 500_000)
		write(t, dir+"/new", "new")
	})
	free := fillDisk(t, disk)
	var made []string
	var err error
	for i := 0; i < 1000 && err == nil; i++ { // a directory's block may have been free
		key := fmt.Sprint("p", i)
		if _, err = s.Prepare(s.ctx, key, "top", gcRoot); err == nil {
			made = append(made, key)
		}
	}
	full("prepare", err)
	_, err = s.Prepare(s.ctx, "extract-1 x", "top", gcRoot)
	full("unpack", err)
	s.clean()
	// The sketch in transit lacks the rest of its block.
	s.again("c", func(dir string) {
		f, err := os.OpenFile(dir+"/big", os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		for off := int64(7); err == nil && off < int64(len(big)); off += 4096 {
			_, err = f.WriteAt([]byte("0"), off)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("a container's write on a full disk: %v", err)
		}
	})
	free()
	for _, key := range made {
		must(t, s.Remove(s.ctx, key))
	}
	must(t, s.Commit(s.ctx, "committed", "c", gcRoot))
	s.view("committed", func(dir string) {
		want(t, dir+"/new", "new")
		b, err := os.ReadFile(dir + "/big")
		must(t, err)
		if len(b) != len(big) || string(b[500_000:500_003]) != "XYZ" {
			t.Errorf("big: %d bytes, %q", len(b), b[500_000:500_003])
		}
	})
	s.clean()
}
