package cli

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"lamina/pool"

	"golang.org/x/sys/unix"
)

// copyExecutable puts the program under test where every user can run it, under its name.
func copyExecutable(t *testing.T, dir string) string {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	b, err := os.ReadFile(exe)
	must(t, err)
	path := filepath.Join(dir, "lamina")
	must(t, os.WriteFile(path, b, 0o755))
	return path
}

// script runs a shell script in l's directory, with lamina in $L and a runtime directory of its own.
func (l *layers) script(attr *syscall.SysProcAttr, exe, text string) string {
	l.t.Helper()
	cmd := exec.Command("/bin/sh", "-e", "-c", text)
	cmd.Dir, cmd.SysProcAttr = l.dir, attr
	cmd.Env = append(os.Environ(), "L="+exe, pool.RuntimeDirVariable+"="+l.path("run"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		l.t.Fatalf("%v: %s", err, out.String())
	}
	return out.String()
}

const writeAndRead = `
$L mount -o lowerdir=l1:l2,upperdir=upper,workdir=work mnt
trap '$L umount -l mnt || true' EXIT
test "$(cat mnt/file)" = one
echo two >mnt/file
echo new >mnt/new
mkdir mnt/dir
rm mnt/big
printf x | dd of=mnt/file conv=notrunc status=none
test "$(cat mnt/file)" = xwo
$L status mnt
trap - EXIT
$L umount mnt
$L fsck -o lowerdir=l1:l2 upper
`

// userFlags: mount(8)'s flags count for a user too, and those that fusermount3 does not know are refused by name.
const userFlags = `
$L mount -o lowerdir=l1,noexec,noatime,sync mnt
trap '$L umount -l mnt || true' EXIT
grep " $PWD/mnt " /proc/self/mountinfo >flags
for flag in nosuid nodev noexec noatime sync; do grep -Eq "[ ,]$flag[ ,]" flags || { echo "no $flag:"; cat flags; false; }; done
trap - EXIT
$L umount mnt
! $L mount -o lowerdir=l1,lazytime mnt 2>refused
grep -q lazytime refused
`

// asUser runs the script in a mount namespace whose /dev/fuse is for everybody, as udev makes it: a machine without udev has
// it for root alone.
const asUser = `
mount --make-rprivate /
mknod fuse c 10 229
chmod 666 fuse
mount --bind fuse /dev/fuse
exec setpriv --reuid %[1]d --regid %[1]d --clear-groups sh -e script
`

// A user without privileges mounts through fusermount3 and keeps overlay's attributes in user.overlay.*.
func TestUnprivileged(t *testing.T) {
	const nobody = 65534
	l := newLayers(t)
	must(t, os.Mkdir(l.path("run"), 0o700))
	exe := copyExecutable(t, l.dir)
	must(t, os.Chmod(filepath.Dir(l.dir), 0o755)) // the testing package makes it for its own user only
	must(t, filepath.WalkDir(l.dir, func(path string, _ fs.DirEntry, err error) error {
		must(t, err)
		return os.Lchown(path, nobody, nobody)
	}))
	must(t, os.WriteFile(l.path("script"), []byte(writeAndRead+userFlags), 0o644))
	out := l.script(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}, exe, fmt.Sprintf(asUser, nobody))
	if !strings.Contains(out, "user.overlay") {
		t.Errorf("%s", out)
	}
	l.checkUserLayer()
}

// The root of a user namespace, as Podman without root runs its mount program.
func TestUserNamespace(t *testing.T) {
	l := newLayers(t)
	must(t, os.Mkdir(l.path("run"), 0o700))
	exe := copyExecutable(t, l.dir)
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
	out := l.script(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS, UidMappings: ids, GidMappings: ids,
		GidMappingsEnableSetgroups: true}, exe, writeAndRead)
	if !strings.Contains(out, "user.overlay") {
		t.Errorf("%s", out)
	}
	l.checkUserLayer()
}

func (l *layers) checkUserLayer() {
	l.t.Helper()
	if b, err := os.ReadFile(l.path("upper/new")); err != nil || string(b) != "new\n" {
		l.t.Errorf("upper/new: %q %v", b, err)
	}
	if n, err := unix.Llistxattr(l.path("upper/file"), nil); err != nil {
		l.t.Error(err)
	} else if n > 0 {
		names := make([]byte, n)
		_, err := unix.Llistxattr(l.path("upper/file"), names)
		if err != nil || bytes.Contains(names, []byte("trusted.")) {
			l.t.Errorf("attributes %q %v", names, err)
		}
	}
	if _, err := os.Lstat(l.path("mnt/file")); err == nil {
		l.t.Error("still mounted")
	}
	// The next mount needs an empty log directory; this one's is the test's own.
	left, err := filepath.Glob(l.path("run") + "/*.sock")
	if err != nil || len(left) > 0 {
		l.t.Error(fmt.Sprintf("sockets left: %v", left), err)
	}
}
