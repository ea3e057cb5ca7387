package podman

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/pool"
	"lamina/tests/mnt"
)

// newRoot is Podman as root.
func newRoot(t *testing.T) *engine {
	t.Helper()
	lamina, err := rival.BinaryPath()
	must(t, err)
	e := &engine{t: t, dir: filepath.Dir(mnt.Dirs(t, "home")[0]), lamina: lamina}
	parent := fmt.Sprintf("/lamina-test-%d", os.Getpid())
	e.cgroup = []string{"--cgroup-parent", parent}
	e.configure()
	e.env = append(e.env, pool.RuntimeDirVariable+"="+e.state+"/lamina")
	t.Cleanup(func() {
		e.destroy()
		unmountStore(t, e.dir)
		unmountStore(t, e.state)
		removeCgroups(t, parent)
	})
	return e
}

// removeCgroups removes the control groups that Podman made and never removes.
func removeCgroups(t *testing.T, parent string) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		left = nil
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			tops, err := filepath.Glob(root + parent)
			must(t, err)
			for _, top := range tops {
				_ = filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
					if err == nil && d.IsDir() {
						left = append(left, path)
					}
					return nil // one that has just gone is what we want
				})
			}
		}
		if len(left) == 0 {
			return
		}
		for _, dir := range slices.Backward(left) {
			_ = unix.Rmdir(dir) // busy until the last process has gone
		}
	}
	t.Errorf("control groups left: %q", left)
}

// changed is the file big of the image with edits.
func changed(edits map[int]byte) string {
	b := big()
	for at, c := range edits {
		b[at] = c
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// allocated is what a directory tree occupies on disk, in bytes.
func allocated(t *testing.T, dir string) (n int64) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		err = unix.Lstat(path, &st)
		n += st.Blocks * 512
		return err
	}))
	return n
}

func TestPodman(t *testing.T) {
	e := newRoot(t)
	e.build("base")
	// The subtests use what the ones before them made.
	for _, s := range []struct {
		name string
		run  func(e *engine)
	}{
		{"Image", testImage}, {"Sketch", testSketch}, {"Commit", testCommit}, {"ReadOnly", testReadOnly}, {"Volumes", testVolumes},
		{"UserNamespace", testMapped}, {"Squash", testSquash}, {"Together", testTogether}, {"SaveLoad", testSaveLoad},
		{"Buildah", testBuildah}, {"ServerKilled", testServerKilled},
	} {
		t.Run(s.name, func(t *testing.T) {
			sub := *e
			sub.t = t
			s.run(&sub)
			e.killed = sub.killed
		})
	}
}

// What a step of the build deleted or changed is so in the image.
func testImage(e *engine) {
	out := e.run(e.container("base", `
sha256sum </data/big
stat -c '%u:%g' /data/big
ls /opaque/sub
ls /bin/renamed
! ls /etc/passwd /bin/vi /opaque/sub/old 2>/dev/null
grep ' / ' /proc/mounts`, "--rm")...)
	want := changed(map[int]byte{5000: 'X'}) + "  -\n5:6\nnew\n/bin/renamed\nlamina / fuse.lamina"
	if !strings.HasPrefix(out, want) {
		e.t.Errorf("the container found %q, want %q...", out, want)
	}
}

// One byte written to a file of the image takes blocks, not the file.
func testSketch(e *engine) {
	e.run(e.container("base", `printf Y | dd of=/data/big bs=1 seek=10000000 conv=notrunc 2>/dev/null; sync /data/big; sleep 1000`, "-d", "--name", "writer")...)
	poll(e.t, "the write", func() bool { return e.status("writer").SketchesCreated == 1 })
	st := e.status("writer")
	if st.Errors != 0 || st.Status.Namespace != "trusted.overlay" {
		e.t.Errorf("status: %+v", st)
	}
	if st.Container == nil || st.Container.Name != "writer" {
		e.t.Errorf("status names the container %v, want writer", st.Container)
	}
	if n := allocated(e.t, e.upper("writer")); n > 1<<20 {
		e.t.Errorf("the upper layer takes %d bytes for one that was written", n)
	}
	e.want("Y", "podman", "exec", "writer", "dd", "if=/data/big", "bs=1", "skip=10000000", "count=1", "status=none")
	e.run("podman", "exec", "writer", "sh", "-ec", "echo new >/newfile; rm /bin/renamed; mkdir /etc/dir; mv /opaque /moved")
	e.run("podman", "stop", "-t", "0", "writer")
	diff := strings.Split(e.run("podman", "diff", "writer"), "\n")
	for _, want := range []string{"C /data", "C /data/big", "A /newfile", "D /bin/renamed", "A /etc/dir", "D /opaque", "A /moved", "A /moved/sub/new"} {
		if !slices.Contains(diff, want) {
			e.t.Errorf("podman diff does not say %q: %q", want, diff)
		}
	}
}

// A second container sees what was committed, whole.
func testCommit(e *engine) {
	e.run("podman", "commit", "-q", "writer", "second")
	e.want(changed(map[int]byte{5000: 'X', 10000000: 'Y'})+"  -\n5:6\nnew\nnew", e.container("second", `
sha256sum </data/big
stat -c '%u:%g' /data/big
cat /newfile /moved/sub/new
test -d /etc/dir
! ls /bin/renamed /opaque 2>/dev/null`, "--rm")...)
	// The committed layer is made of ordinary files: whoever reads it as it lies finds the bytes.
	top := e.run("podman", "image", "inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", "second")
	b, err := os.ReadFile(top + "/data/big")
	must(e.t, err)
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != changed(map[int]byte{5000: 'X', 10000000: 'Y'}) {
		e.t.Error("the layer of the image does not hold what was committed")
	}
	e.remove("writer")
}

func testReadOnly(e *engine) {
	if msg := e.fails(e.container("second", "cat /newfile; touch /x", "--rm", "--read-only")...); !strings.Contains(msg, "Read-only file system") {
		e.t.Error(msg)
	}
}

func testVolumes(e *engine) {
	host := e.path("bind")
	must(e.t, os.Mkdir(host, 0o755))
	must(e.t, os.WriteFile(host+"/in", []byte("from the host\n"), 0o644))
	e.want("from the host", e.container("second", "cat /bind/in; echo back >/bind/out; echo more >/data/more", "--rm", "-v", host+":/bind", "-v", "named:/data")...)
	if b, err := os.ReadFile(host + "/out"); err != nil || string(b) != "back\n" {
		e.t.Errorf("%q %v", b, err)
	}
	// A named volume begins with what the image has there.
	e.want("big\nmore\n5:6", e.container("base", "ls /n; stat -c %u:%g /n/big", "--rm", "-v", "named:/n")...)
	// An overlay volume is a mount of its own over a directory of the host.
	e.want("from the host", e.container("second", "cat /bind/in; echo x >/bind/in", "--rm", "-v", host+":/bind:O")...)
	if b, err := os.ReadFile(host + "/in"); err != nil || string(b) != "from the host\n" {
		e.t.Errorf("a write to an overlay volume reached the host: %q %v", b, err)
	}
}

// Podman shows the image's owners to a container in a user namespace through the mount program.
func testMapped(e *engine) {
	const ids = "0:100000:65536"
	e.run(e.container("second", `
test "$(stat -c %u:%g /data/big)" = 5:6
test "$(stat -c %u:%g /newfile)" = 0:0
chown 7:8 /newfile
touch /created
test "$(stat -c %u:%g /created)" = 0:0
printf Z | dd of=/data/big bs=1 conv=notrunc 2>/dev/null`, "--name", "mapped", "--uidmap", ids, "--gidmap", ids)...)
	e.unmounted("mapped")
	// On disk they are as an image has them.
	upper := e.upper("mapped")
	for name, want := range map[string][2]uint32{"/newfile": {7, 8}, "/created": {0, 0}, "/data/big": {5, 6}} {
		var st unix.Stat_t
		must(e.t, unix.Lstat(upper+name, &st))
		if got := [2]uint32{st.Uid, st.Gid}; got != want {
			e.t.Errorf("on disk %s belongs to %v, want %v", name, got, want)
		}
	}
	e.run("podman", "commit", "-q", "mapped", "third")
	e.want("7:8\n0:0\n5:6\n"+changed(map[int]byte{0: 'Z', 5000: 'X', 10000000: 'Y'})+"  -", e.container("third",
		"for f in /newfile /created /data/big; do stat -c %u:%g $f; done; sha256sum </data/big", "--rm")...)
	e.remove("mapped")
}

// With one id only, everything belongs to it.
func testSquash(e *engine) {
	const id = "0:100000:1"
	e.want("0:0\n0:0\n0:0", e.container("second", `touch /created; for f in /data/big /newfile /created; do stat -c %u:%g $f; done`,
		"--rm", "--uidmap", id, "--gidmap", id)...)
}

// Containers of one image write to the same files and do not see each other.
func testTogether(e *engine) {
	const n = 3
	for i := range n {
		e.run(e.container("second", fmt.Sprintf("printf %d | dd of=/data/big bs=1 seek=%d conv=notrunc 2>/dev/null; sleep 1000", i, 1000000*i), "-d", "--name", fmt.Sprint("c", i))...)
	}
	for i := range n {
		name := fmt.Sprint("c", i)
		want := changed(map[int]byte{5000: 'X', 10000000: 'Y', 1000000 * i: byte('0' + i)}) + "  -"
		poll(e.t, name, func() bool { return e.status(name).SketchesCreated == 1 })
		poll(e.t, name+" to hold its own byte", func() bool { return e.run("podman", "exec", name, "sh", "-c", "sha256sum </data/big") == want })
	}
	e.remove("c0", "c1", "c2")
}

// An archive holds the image, whiteouts included.
func testSaveLoad(e *engine) {
	archive := e.path("image.tar")
	e.run("podman", "save", "-q", "-o", archive, "second")
	e.run("podman", "rmi", "-f", "third", "second", "base")
	e.run("podman", "load", "-q", "-i", archive)
	e.want(changed(map[int]byte{5000: 'X', 10000000: 'Y'})+"  -\nnew", e.container("second", `
sha256sum </data/big
cat /moved/sub/new
! ls /bin/renamed /opaque /etc/passwd /moved/sub/old 2>/dev/null`, "--rm")...)
}

// Buildah without a Containerfile: mount, run, copy, commit.
func testBuildah(e *engine) {
	c := e.run("buildah", "from", "localhost/second")
	e.run("buildah", "run", "--isolation", "chroot", c, "sh", "-ec", "echo run >/run.txt; rm /newfile")
	root := e.run("buildah", "mount", c)
	must(e.t, os.WriteFile(root+"/host.txt", []byte("host\n"), 0o644))
	e.run("buildah", "unmount", c)
	e.run("buildah", "commit", "-q", c, "built")
	e.run("buildah", "rm", c)
	e.want("run\nhost", e.container("built", "cat /run.txt /host.txt; ! ls /newfile 2>/dev/null", "--rm")...)
	e.run("podman", "rmi", "built")
}

// When a container's server dies, the container has lost its root and nothing else: the engine can stop, start and remove it,
// and what was synced is there.
func testServerKilled(e *engine) {
	e.run(e.container("second", `echo kept >/data/kept; printf K | dd of=/data/big bs=1 seek=123 conv=notrunc 2>/dev/null; sync /data/kept /data/big; echo synced >/data/done; sleep 1000`,
		"-d", "--name", "victim", "-v", "/data-elsewhere")...)
	poll(e.t, "the container's files", func() bool {
		_, err := e.try("podman", "exec", "victim", "test", "-e", "/data/done")
		return err == nil
	})
	st := e.status("victim")
	must(e.t, unix.Kill(st.PID, unix.SIGKILL))
	sockets, err := filepath.Glob(e.state + "/lamina/*." + fmt.Sprint(st.PID) + ".sock")
	must(e.t, err)
	e.killed = append(sockets, st.Log)
	e.fails("podman", "exec", "victim", "cat", "/data/kept")
	_, _ = e.try("podman", "stop", "-t", "0", "victim") // with its root gone it may have ended by itself
	e.run("podman", "start", "victim")
	e.want("kept", "podman", "exec", "victim", "cat", "/data/kept")
	e.want("K", "podman", "exec", "victim", "dd", "if=/data/big", "bs=1", "skip=123", "count=1", "status=none")
	e.remove("victim")
}

// poll waits for a condition.
func poll(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(mnt.Timeout); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
