package fusefs

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestIDMappedMount: the kernel maps the owners of the whole mount (FUSE_ALLOW_IDMAP, Linux 6.12), which is how a
// container in a user namespace gets an image without a chown.
func TestIDMappedMount(t *testing.T) {
	r := newRig(t, Options{}, func(lower string) {
		must(t, os.WriteFile(lower+"/f", []byte("mapped"), 0o640))
		must(t, os.Lchown(lower+"/f", 5, 6))
	})
	must(t, os.Chmod(r.mnt, 0o777))
	view := t.TempDir()
	idmap(t, r.mnt, view, 100000)

	root, user := startActor(t, 0), startActor(t, 100007)
	if st := root.stat(view + "/f"); st.Uid != 100005 || st.Gid != 100006 {
		t.Errorf("5:6 is shown as %d:%d", st.Uid, st.Gid)
	}
	user.close(user.open(view+"/new", unix.O_CREAT|unix.O_RDWR))
	if st := root.stat(r.upper + "/new"); st.Uid != 7 || st.Gid != 7 {
		t.Errorf("a file of 100007 is stored with owner %d:%d", st.Uid, st.Gid)
	}
	user.must(request{Op: "mkdir", Path: view + "/dir", Mode: 0o700})
	if st := root.stat(r.path("dir")); st.Uid != 7 {
		t.Errorf("a directory of 100007 has owner %d in the mount below", st.Uid)
	}
	root.must(request{Op: "chown", Path: view + "/f", UID: 100009, GID: 100009})
	if st := root.stat(r.upper + "/f"); st.Uid != 9 || st.Gid != 9 {
		t.Errorf("chown to 100009 stored %d:%d", st.Uid, st.Gid)
	}
}

// idmap shows the mount at from once more at to, with ids shifted by shift.
func idmap(t *testing.T, from, to string, shift int) {
	t.Helper()
	ns := exec.Command("/bin/sleep", "1000")
	m := []syscall.SysProcIDMap{{ContainerID: 0, HostID: shift, Size: 65536}}
	ns.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: m, GidMappings: m}
	must(t, ns.Start())
	defer func() { ns.Process.Kill(); ns.Wait() }()
	userns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", ns.Process.Pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(userns)
	tree, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	must(t, err)
	defer unix.Close(tree)
	must(t, unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns)}))
	must(t, unix.MoveMount(tree, "", unix.AT_FDCWD, to, unix.MOVE_MOUNT_F_EMPTY_PATH))
	t.Cleanup(func() { must(t, unix.Unmount(to, 0)) })
}

// TestACL: the kernel checks ACLs, also those of lower files, and a default ACL decides instead of the umask.
func TestACL(t *testing.T) {
	named := acl(1000, 2000) // user 1000 may write, group 2000 read
	r := newRig(t, Options{ACL: true}, func(lower string) {
		must(t, os.WriteFile(lower+"/f", []byte("secret"), 0o600))
		must(t, unix.Lsetxattr(lower+"/f", xattrACLAccess, named, 0))
		must(t, os.WriteFile(lower+"/closed", []byte("secret"), 0o600))
		must(t, os.Mkdir(lower+"/dir", 0o755))
		must(t, unix.Lsetxattr(lower+"/dir", xattrACLDefault, named, 0))
	})
	root, user, other := startActor(t, 0), startActor(t, 1000), startActor(t, 3000)
	user.pwrite(user.open(r.path("f"), unix.O_RDWR), 0, "S")
	if out := other.do(request{Op: "open", Path: r.path("f"), Flags: unix.O_RDWR}); out.Errno != unix.EACCES {
		t.Errorf("opened by a user whom the ACL does not name: %v, want EACCES", out.Errno)
	}
	if out := user.do(request{Op: "open", Path: r.path("closed")}); out.Errno != unix.EACCES {
		t.Errorf("opened a closed file: %v, want EACCES", out.Errno)
	}
	root.must(request{Op: "setxattr", Path: r.path("closed"), Args: []string{xattrACLAccess}, Data: named})
	user.open(r.path("closed"), unix.O_RDWR)
	if st := root.stat(r.path("closed")); st.Mode&0o777 != 0o664 {
		t.Errorf("mode %o after setting an ACL with mask rw, want 664", st.Mode&0o777)
	}
	root.close(root.open(r.path("dir/new"), unix.O_CREAT|unix.O_RDWR))
	got := root.must(request{Op: "getxattr", Path: r.path("dir/new"), Args: []string{xattrACLAccess}})
	if len(got.Data) != len(named) {
		t.Errorf("a new file in a directory with a default ACL has the ACL % x", got.Data)
	}
	user.open(r.path("dir/new"), unix.O_RDONLY)
}
