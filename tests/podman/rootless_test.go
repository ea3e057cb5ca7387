package podman

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

// A user who is on no system, with subordinate ids of their own.
const (
	guestID    = 54321
	guestSub   = 700000
	guestCount = 65536
)

// newRootless is Podman of a user without privileges. What such a user needs of the system (an entry in passwd, subordinate
// ids, a FUSE device that everybody may open) is there in a mount namespace of the test's own only.
func newRootless(t *testing.T) *engine {
	t.Helper()
	lamina, err := rival.BinaryPath()
	must(t, err)
	e := &engine{t: t, dir: filepath.Dir(mnt.Dirs(t, "home", "etc", "bin")[0])}
	// The binary under test may lie where only root can go.
	b, err := os.ReadFile(lamina)
	must(t, err)
	e.lamina = e.path("bin/lamina")
	must(t, os.WriteFile(e.lamina, b, 0o755))
	e.configure()
	for file, line := range map[string]string{
		"passwd": fmt.Sprintf("guest:x:%d:%d::%s:/bin/sh\n", guestID, guestID, e.path("home")),
		"group":  fmt.Sprintf("guest:x:%d:\n", guestID),
	} {
		old, err := os.ReadFile("/etc/" + file)
		must(t, err)
		e.write("etc/"+file, strings.TrimSuffix(string(old), "\n")+"\n"+line)
	}
	ids := fmt.Sprintf("guest:%d:%d\n", guestSub, guestCount)
	e.write("etc/subuid", ids)
	e.write("etc/subgid", ids)
	must(t, unix.Mknod(e.path("etc/fuse"), unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))))
	must(t, os.Lchown(e.state, guestID, guestID))
	must(t, filepath.WalkDir(e.dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || strings.HasPrefix(path, e.path("etc")) {
			return err
		}
		return os.Lchown(path, guestID, guestID)
	}))
	pid := strconv.Itoa(e.namespace())
	as := strconv.Itoa(guestID)
	e.prefix = []string{"nsenter", "--mount=/proc/" + pid + "/ns/mnt", "setpriv", "--reuid", as, "--regid", as, "--clear-groups",
		"sh", "-c", `cd && exec "$@"`, "sh"} // nsenter's --wd would be a directory of the namespace that is left
	t.Cleanup(func() {
		e.destroy()
		// The process that keeps the user namespace of all of the user's containers.
		pause := ""
		if b, err := os.ReadFile(e.state + "/libpod/tmp/pause.pid"); err == nil {
			pause = strings.TrimSpace(string(b))
		}
		if _, err := e.try("podman", "system", "migrate"); err != nil {
			t.Error(err)
		}
		poll(t, "Podman's pause process "+pause+" to end", func() bool {
			_, err := os.Stat("/proc/" + pause)
			return pause == "" || err != nil
		})
	})
	return e
}

// namespace starts a process that keeps the mount namespace, and returns its pid.
func (e *engine) namespace() int {
	e.t.Helper()
	script := `set -e
cd "$1"
for f in passwd group subuid subgid; do
	[ -e /etc/$f ] || : >/etc/$f
	mount --bind etc/$f /etc/$f
done
mount --bind etc/fuse /dev/fuse
echo ready
exec cat`
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", e.dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(e.t, err)
	out, err := cmd.StdoutPipe()
	must(e.t, err)
	must(e.t, cmd.Start())
	e.t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			e.t.Error(err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		e.t.Fatalf("a mount namespace for the test: %q %v", line, err)
	}
	return cmd.Process.Pid
}

// Podman and Buildah of a user without privileges: layers keep their attributes in user.overlay.*, nothing passes through, and
// whoever asks is told.
func TestRootless(t *testing.T) {
	e := newRootless(t)
	e.build("base")
	e.want(changed(map[int]byte{5000: 'X'})+"  -\n5:6\nnew", e.container("base", `
sha256sum </data/big
stat -c %u:%g /data/big
ls /opaque/sub
! ls /etc/passwd /bin/vi 2>/dev/null`, "--rm")...)

	e.run(e.container("base", `printf Y | dd of=/data/big bs=1 seek=10000000 conv=notrunc 2>/dev/null; chown 7:8 /data/big; rm /bin/renamed; sleep 1000`, "-d", "--name", "writer")...)
	poll(t, "the write", func() bool { return e.status("writer").SketchesCreated == 1 })
	st := e.status("writer")
	if st.Status.Namespace != "user.overlay" || st.Passthrough != "off" || !strings.Contains(st.PassthroughReason, "CAP_SYS_ADMIN") || st.Errors != 0 {
		t.Errorf("status: %+v", st)
	}
	log, err := os.ReadFile(st.Log)
	if err != nil || strings.Count(string(log), "passthrough") != 1 || !strings.Contains(string(log), "CAP_SYS_ADMIN") {
		t.Errorf("the log does not say once what the mount goes without: %q %v", log, err)
	}
	// The user asks from outside of the namespace that Podman keeps, and from inside.
	for _, inside := range [][]string{nil, {"podman", "unshare"}} {
		if out := e.run(append(inside, e.lamina, "status")...); !strings.Contains(out, st.Mountpoint) {
			t.Errorf("%q lamina status: %s", inside, out)
		}
	}
	if n := allocated(t, e.upper("writer")); n > 1<<20 {
		t.Errorf("the upper layer takes %d bytes for one that was written", n)
	}
	var on unix.Stat_t
	must(t, unix.Lstat(e.upper("writer")+"/data/big", &on))
	if on.Uid != guestSub+7-1 || on.Gid != guestSub+8-1 {
		t.Errorf("on disk the file belongs to %d:%d", on.Uid, on.Gid)
	}
	e.run("podman", "stop", "-t", "0", "writer")
	e.run("podman", "commit", "-q", "writer", "second")
	e.want(changed(map[int]byte{5000: 'X', 10000000: 'Y'})+"  -\n7:8", e.container("second", `
sha256sum </data/big
stat -c %u:%g /data/big
! ls /bin/renamed 2>/dev/null`, "--rm")...)
	e.want("54321", e.container("second", "id -u", "--rm", "--userns", "keep-id")...)

	// A mount of the user's own, without Podman: through fusermount3.
	for _, d := range []string{"l", "u", "w", "m"} {
		e.run("mkdir", e.path("home/"+d))
	}
	e.run(e.lamina, "mount", "-o", "lowerdir=l,upperdir=u,workdir=w", "m")
	defer func() { e.run(e.lamina, "umount", "m") }()
	e.run("sh", "-c", "echo x >m/x")
	if out := e.run(e.lamina, "status", "m"); !strings.Contains(out, "CAP_SYS_ADMIN") || !strings.Contains(out, "user.overlay.*") {
		t.Error(out)
	}
	if msg := e.fails(e.lamina, "mount", "-o", "lowerdir=l,passthrough=on", "w"); !strings.Contains(msg, "CAP_SYS_ADMIN") {
		t.Error(msg)
	}
	e.remove("writer")
}
