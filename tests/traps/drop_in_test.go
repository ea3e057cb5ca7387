package traps

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

// program is what a container engine would run: Lamina, or fuse-overlayfs to see what is right.
func program(t *testing.T) string {
	t.Helper()
	if mnt.Subject() == rival.FuseOverlay {
		return "fuse-overlayfs"
	}
	bin, err := rival.BinaryPath()
	check(t, err)
	return bin
}

// detach unmounts dir when the test ends, as Podman does: with the ordinary unmounting tools, knowing of no server.
func detach(t *testing.T, dir string) {
	t.Helper()
	t.Cleanup(func() {
		if mounted, _ := rival.Mounted(dir); mounted {
			ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
			defer cancel()
			if _, err := rival.Run(ctx, "umount", dir); err != nil {
				t.Error(err)
				_ = unix.Unmount(dir, unix.MNT_DETACH)
			}
		}
	})
}

// Podman's storage driver: lowers are symbolic links relative to the driver's home, which is the working directory; id
// maps have a leading colon; the program must daemonise and exit 0.
func TestTrapPodmanArguments(t *testing.T) {
	home := mnt.Dirs(t, "l", "one/diff", "two/diff", "c/diff", "c/work", "c/merged")
	driver := filepath.Dir(home[0])
	fill(t, driver, map[string][]byte{"one/diff/f": []byte("one"), "two/diff/f": []byte("two"), "two/diff/only": []byte("two")})
	check(t, unix.Chown(filepath.Join(driver, "one/diff/f"), 5, 6))
	check(t, os.Symlink("../one/diff", filepath.Join(driver, "l/ONE")))
	check(t, os.Symlink("../two/diff", filepath.Join(driver, "l/TWO")))
	merged := filepath.Join(driver, "c/merged")
	run := func(t *testing.T, opts string) error {
		t.Helper()
		detach(t, merged)
		cmd := exec.Command(program(t), "-o", opts, merged)
		cmd.Dir = driver
		cmd.WaitDelay = mnt.Timeout
		out, err := cmd.CombinedOutput() // returns when the streams close: the daemon must let go of them
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	unmount := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
		defer cancel()
		_, err := rival.Run(ctx, "fusermount3", "-u", merged)
		check(t, err)
	}
	rw := "lowerdir=l/ONE:l/TWO,upperdir=" + driver + "/c/diff,workdir=" + driver + "/c/work"
	owner := func(name string) (uint32, uint32) {
		t.Helper()
		var st unix.Stat_t
		check(t, unix.Lstat(filepath.Join(merged, name), &st))
		return st.Uid, st.Gid
	}

	t.Run("plain", func(t *testing.T) {
		check(t, run(t, rw))
		wantFile(t, merged+"/f", []byte("one"))
		wantFile(t, merged+"/only", []byte("two"))
		unmount()
	})
	t.Run("mountopts", func(t *testing.T) {
		check(t, run(t, rw+",nodev,volatile"))
		wantFile(t, merged+"/f", []byte("one"))
		unmount()
	})
	t.Run("mapped", func(t *testing.T) {
		check(t, run(t, rw+",uidmapping=:0:100000:65536,gidmapping=:0:100000:65536"))
		if uid, gid := owner("f"); uid != 100005 || gid != 100006 {
			t.Errorf("f belongs to %d:%d, want 100005:100006", uid, gid)
		}
		if err := os.WriteFile(merged+"/new", nil, 0o644); !errors.Is(err, unix.EOVERFLOW) {
			t.Errorf("a user without a number in the layers created a file: %v", err)
		}
		out, err := exec.Command("setpriv", "--reuid=100000", "--regid=100000", "--clear-groups", "touch", merged+"/new").CombinedOutput()
		if err != nil {
			t.Fatalf("the container's root creates a file: %v: %s", err, out)
		}
		check(t, unix.Lchown(merged+"/new", 100010, 100011))
		if uid, gid := owner("new"); uid != 100010 || gid != 100011 {
			t.Errorf("new belongs to %d:%d", uid, gid)
		}
		unmount()
		var st unix.Stat_t
		check(t, unix.Lstat(driver+"/c/diff/new", &st))
		if st.Uid != 10 || st.Gid != 11 {
			t.Errorf("on disk new belongs to %d:%d, want 10:11", st.Uid, st.Gid)
		}
		check(t, os.Remove(driver+"/c/diff/new"))
	})
	t.Run("squashed", func(t *testing.T) {
		check(t, run(t, rw+",squash_to_uid=1234,squash_to_gid=4321"))
		if uid, gid := owner("f"); uid != 1234 || gid != 4321 {
			t.Errorf("f belongs to %d:%d, want 1234:4321", uid, gid)
		}
		unmount()
	})
	t.Run("xattr_permissions", func(t *testing.T) {
		check(t, run(t, rw+",xattr_permissions=2"))
		check(t, os.WriteFile(merged+"/x", nil, 0o640))
		check(t, unix.Lchown(merged+"/x", 77, 88))
		if uid, gid := owner("x"); uid != 77 || gid != 88 {
			t.Errorf("x belongs to %d:%d, want 77:88", uid, gid)
		}
		unmount()
		b := make([]byte, 100)
		n, err := unix.Getxattr(driver+"/c/diff/x", "user.containers.override_stat", b)
		if err != nil || !strings.HasPrefix(string(b[:n]), "77:88:") {
			t.Errorf("override_stat is %q, %v", b[:max(n, 0)], err)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		check(t, run(t, "lowerdir="+driver+"/one/diff:l/TWO"))
		wantFile(t, merged+"/f", []byte("one"))
		wantErrno(t, "writing without an upper", os.WriteFile(merged+"/f", nil, 0o644), unix.EROFS)
		unmount()
	})
}

// `mount -t fuse.lamina` through the helper that `make install` installs, in a mount namespace of its own, so that
// nothing of the host changes.
func TestMountHelper(t *testing.T) {
	d := mnt.Dirs(t, "low", "up", "work", "mnt", "helper", "scratch")
	fill(t, d[0], map[string][]byte{"f": []byte("through the helper\n")})
	bin, err := rival.BinaryPath()
	check(t, err)
	check(t, os.Symlink(bin, filepath.Join(d[4], "mount.fuse.lamina")))
	out := shell(t, `unshare -m sh -ec '
		mount --make-rprivate /
		mount -t overlay -o lowerdir=%[5]s:/usr/sbin overlay /usr/sbin
		mount -t fuse.lamina name %[4]s -o lowerdir=%[1]s,upperdir=%[2]s,workdir=%[3]s,noatime
		cat %[4]s/f
		echo written > %[4]s/g
		grep " %[4]s " /proc/self/mounts
		umount %[4]s
		mount -t fuse.lamina name %[4]s -o ro,lowerdir=%[1]s
		! touch %[4]s/h 2>/dev/null
		umount %[4]s
		! mount -t fuse.lamina name %[4]s -o lowerdir=/nonexistent 2>&1
		! grep " %[4]s " /proc/self/mounts'`, d[0], d[1], d[2], d[3], d[4])
	for _, want := range []string{"through the helper", "name " + d[3] + " fuse.lamina", "/nonexistent"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in:\n%s", want, out)
		}
	}
	eventually(t, "the written file arrives in the upper", func() error {
		b, err := os.ReadFile(filepath.Join(d[1], "g"))
		if err == nil && string(b) != "written\n" {
			err = fmt.Errorf("%q", b)
		}
		return err
	})
}

// The server is a daemon: it holds neither its caller's working directory nor its streams nor its session, and
// umount(2) and SIGTERM end it in order.
func TestServerIsADaemon(t *testing.T) {
	busy := mnt.Dirs(t, "cwd")[0]
	check(t, unix.Mount("tmpfs", busy, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { _ = unix.Unmount(busy, unix.MNT_DETACH) })
	m := mnt.Start(t, rival.Config{System: rival.Lamina, Cwd: busy, Lowers: []string{lowerWith(t, map[string][]byte{"f": data(1, 20*block)})}})
	check(t, unix.Unmount(busy, 0))
	pid := server(t, m)
	sid, err := unix.Getsid(pid)
	check(t, err)
	if own, _ := unix.Getsid(0); sid == own {
		t.Error("the server is still in its caller's session")
	}
	for fd := range 3 {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
		if err == nil && target != "/dev/null" && !strings.Contains(target, "lamina") {
			t.Errorf("descriptor %d of the server is %s", fd, target)
		}
	}
	gone := func() error {
		if _, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil {
			return fmt.Errorf("server %d still runs", pid)
		}
		return nil
	}
	check(t, patch(m.Path("f"), "one", 3*block))
	check(t, unix.Unmount(m.Dir, 0))
	eventually(t, "the server ends after umount(2)", gone)
	m.Fsck()

	m.Again()
	pid = server(t, m)
	check(t, patch(m.Path("f"), "two", 5*block))
	check(t, unix.Kill(pid, unix.SIGTERM))
	eventually(t, "the server ends after SIGTERM", gone)
	if mounted, err := rival.Mounted(m.Dir); err != nil || mounted {
		t.Errorf("still mounted after SIGTERM (%v)", err)
	}
	m.Fsck()
	m.Again()
	want := data(1, 20*block)
	copy(want[3*block:], "one")
	copy(want[5*block:], "two")
	wantFile(t, m.Path("f"), want)
}

// status tells what there is to tell.
func TestStatus(t *testing.T) {
	m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lowerWith(t, map[string][]byte{"f": data(1, 100*block)})}, Options: []string{"caw=lazy"}})
	fd := open(t, m.Path("f"), unix.O_RDWR)
	pwrite(t, fd, []byte("partial"), 100)
	pwrite(t, fd, data(2, 2*block), 10*block)
	out, code := mnt.Lamina(t, "status", "--json", m.Dir)
	if code != 0 {
		t.Fatalf("exit status %d: %s", code, out)
	}
	type status struct {
		Mountpoint, Upper, Format, CaW, Transport string
		PID                                       int
		OpenFiles                                 int `json:"open_files"`
		Sketches                                  int
		Blocks                                    struct {
			Lower, Upper int
			InTransit    int `json:"in_transit"`
		}
	}
	var all []status
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		var one status
		if err := json.Unmarshal([]byte(out), &one); err != nil {
			t.Fatalf("%v:\n%s", err, out)
		}
		all = []status{one}
	}
	if len(all) != 1 {
		t.Fatalf("%d mounts, want the one that was asked for", len(all))
	}
	s := all[0]
	if s.Mountpoint != m.Dir || s.Upper != m.Upper || s.PID != server(t, m) || s.CaW != "lazy" || s.Format == "" || s.Transport == "" {
		t.Errorf("%+v", s)
	}
	if s.OpenFiles < 1 || s.Sketches != 1 || s.Blocks.Upper != 2 || s.Blocks.InTransit != 1 || s.Blocks.Lower != 97 {
		t.Errorf("one open sketch of 100 blocks, 2 written and 1 in transit: %+v", s)
	}
	if out, code := mnt.Lamina(t, "status"); code != 0 || !strings.Contains(out, m.Dir) {
		t.Errorf("status without a mount point, exit status %d:\n%s", code, out)
	}
}

// An ordinary user, with fusermount3, and root of a user namespace: overlay's attributes are then user.overlay.*.
func TestUnprivilegedMounts(t *testing.T) {
	bin, err := rival.BinaryPath()
	check(t, err)
	copied := filepath.Join(mnt.Dirs(t, "bin")[0], "lamina") // where everybody can run it
	b, err := os.ReadFile(bin)
	check(t, err)
	check(t, os.WriteFile(copied, b, 0o755))
	check(t, os.Chmod("/dev/fuse", 0o666)) // as udev makes it
	script := `
		mkdir $D/up $D/work $D/mnt
		$L mount -o lowerdir=$D/low,upperdir=$D/up,workdir=$D/work $D/mnt
		cat $D/mnt/f > /dev/null
		printf changed | dd of=$D/mnt/f bs=1 seek=8192 conv=notrunc status=none
		rm -r $D/mnt/gone && mkdir $D/mnt/gone
		mv $D/mnt/dir $D/mnt/moved
		$L umount $D/mnt
		$L fsck -o lowerdir=$D/low $D/up
		$L mount -o lowerdir=$D/low,upperdir=$D/up,workdir=$D/work $D/mnt
		dd if=$D/mnt/f bs=1 skip=8192 count=7 status=none
		echo; ls $D/mnt/gone $D/mnt/moved; stat -c "size %%s" $D/mnt/f
		$L umount $D/mnt`
	for name, as := range map[string]string{
		"user":           "setpriv --reuid=1000 --regid=1000 --clear-groups",
		"user namespace": "setpriv --reuid=1000 --regid=1000 --clear-groups unshare -Urm",
	} {
		t.Run(name, func(t *testing.T) {
			base := mnt.Dirs(t, "low/gone", "low/dir")
			low := filepath.Dir(base[0])
			fill(t, low, map[string][]byte{"f": data(1, 100*block), "gone/below": nil, "dir/inside": nil})
			top := filepath.Dir(low)
			shell(t, "chown -R 1000:1000 %s", top)
			t.Cleanup(func() {
				ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
				defer cancel()
				if mounted, _ := rival.Mounted(top + "/mnt"); mounted {
					t.Errorf("still mounted")
					_, _ = rival.Run(ctx, "umount", "-l", top+"/mnt")
				}
			})
			out := shell(t, "export D=%s L=%s; export LAMINA_RUNTIME_DIR=$D/run; "+as+" sh -ec '"+script+"'", top, copied)
			if !strings.Contains(out, "changed\n") || strings.Contains(out, "below") || !strings.Contains(out, "inside") ||
				!strings.Contains(out, fmt.Sprintf("size %d", 100*block)) {
				t.Errorf("unexpected:\n%s", out)
			}
		})
	}
}
