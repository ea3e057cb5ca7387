package cli

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"lamina/pool"

	"golang.org/x/sys/unix"
)

func TestMountStatusUmount(t *testing.T) {
	l := newLayers(t)
	if out := l.ok("mount", "-o", rw, "mnt"); out != "" {
		t.Errorf("mount said %q", out)
	}
	if !l.mounted() {
		t.Fatal("not mounted")
	}
	l.patch(100_000)

	var st pool.Status
	must(t, json.Unmarshal([]byte(l.ok("status", "--json", "mnt")), &st))
	if st.Mountpoint != l.path("mnt") || st.PID == os.Getpid() || st.Upper != l.path("upper") || len(st.Lower) != 2 ||
		st.Lower[0] != l.path("l1") || st.SketchesCreated != 1 || st.BytesNotCopied == 0 || st.Errors != 0 ||
		st.Descriptors <= 0 || st.Goroutines <= 0 || st.Transport == "" {
		t.Errorf("status: %+v", st)
	}
	// The server keeps nothing of the caller's busy.
	if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", st.PID)); err != nil || cwd != "/" {
		t.Errorf("the server's working directory: %q %v", cwd, err)
	}
	if sid, err := unix.Getsid(st.PID); err != nil || sid != st.PID {
		t.Errorf("the server's session: %d %v", sid, err)
	}
	var all []pool.Status
	must(t, json.Unmarshal([]byte(l.ok("status", "--json")), &all))
	if len(all) != 1 || all[0].PID != st.PID {
		t.Errorf("all mounts: %+v", all)
	}
	for _, args := range [][]string{{"status"}, {"status", "mnt"}} {
		if out := l.ok(args...); !strings.Contains(out, l.path("mnt")) || !strings.Contains(out, fmt.Sprint(st.PID)) {
			t.Errorf("%q: %s", args, out)
		}
	}

	l.ok("umount", "mnt")
	if l.mounted() {
		t.Error("still mounted")
	}
	if err := unix.Kill(st.PID, 0); err != unix.ESRCH {
		// A process that nobody has waited for yet is a zombie without an image.
		if _, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", st.PID)); err == nil {
			t.Error("umount returned while the server still runs")
		}
	}
	l.fails([]string{"status", "mnt"}, "mnt", "not a Lamina mount")
	l.fails([]string{"umount", "mnt"}, "mnt", "not a Lamina mount")
	if out := l.ok("status", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("no mounts: %q", out)
	}

	// What was written is there again.
	l.ok("mount", "-o", rw, "mnt")
	b, err := os.ReadFile(l.path("mnt/big"))
	must(t, err)
	if len(b) != 8<<15 || b[100_000] != 'x' || b[99_999] != "lower--\n"[99_999%8] {
		t.Errorf("after remount: %d bytes, %q", len(b), b[99_998:100_003])
	}
	l.ok("umount", "mnt")
	l.ok("fsck", "-o", "lowerdir=l1:l2", "upper")
	l.ok("flatten", "-o", "lowerdir=l1:l2", "upper")
	b, err = os.ReadFile(l.path("upper/big"))
	must(t, err)
	if len(b) != 8<<15 || b[100_000] != 'x' || b[0] != 'l' {
		t.Errorf("flattened: %d bytes, %q", len(b), b[:8])
	}
}

// Every form in which other programs call a mount program.
func TestCallingForms(t *testing.T) {
	for name, c := range map[string]struct {
		argv0 string
		args  func(l *layers) []string
	}{
		"podman":      {"lamina", func(l *layers) []string { return []string{"-o", rw + ",uidmapping=:0:0:65536", "mnt"} }},
		"mount.fuse3": {"lamina", func(l *layers) []string { return []string{"name", l.path("mnt"), "-o", "rw," + rw + ",dev,suid"} }},
		"mount.fuse.lamina": {"mount.fuse.lamina", func(l *layers) []string {
			return []string{"name", l.path("mnt"), "-n", "-s", "-o", "rw," + rw, "-t", "fuse.lamina"}
		}},
		"attached -o": {"lamina", func(l *layers) []string { return []string{"mount", "-o" + rw, "mnt"} }},
		"several -o":  {"lamina", func(l *layers) []string { return []string{"mount", "-o", rw, "-o", "ro", "mnt", "-v"} }},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLayers(t)
			if r := runAs(t, c.argv0, l.dir, c.args(l)...); r.code != 0 || r.err != "" {
				t.Fatalf("exit status %d: %s", r.code, r.err)
			}
			if b, err := os.ReadFile(l.path("mnt/file")); err != nil || string(b) != "one" {
				t.Errorf("%q %v", b, err)
			}
			l.ok("umount", "mnt")
		})
	}
	l := newLayers(t)
	if r := runAs(t, "mount.fuse.lamina", l.dir, "name", "mnt", "-f", "-o", rw); r.code != 0 || l.mounted() {
		t.Errorf("faked: exit status %d %s, mounted: %v", r.code, r.err, l.mounted())
	}
	if r := runAs(t, "mount.fuse.lamina", l.dir, "mnt"); r.code != exitUsage {
		t.Errorf("without a name: exit status %d", r.code)
	}
}

// One clear line, nothing mounted, nothing changed.
func TestBadInput(t *testing.T) {
	l := newLayers(t)
	must(t, os.MkdirAll(l.path("upper/inside"), 0o755))
	must(t, os.MkdirAll(l.path("l1/inside"), 0o755))
	must(t, os.MkdirAll(l.path("left/work/incompat/volatile"), 0o755))
	must(t, os.Symlink("l1", l.path("link")))
	for opts, want := range map[string][]string{
		"upperdir=upper,workdir=work":                       {"lowerdir", "missing"},
		"lowerdir=none":                                     {"none", "does not exist"},
		"lowerdir=l1:l1/file":                               {"l1/file", "not a directory"},
		"lowerdir=l1:link":                                  {"link", "same directory"},
		"lowerdir=l1,upperdir=upper":                        {"workdir", "missing"},
		"lowerdir=l1,workdir=work":                          {"workdir", "upperdir"},
		"lowerdir=l1,upperdir=none,workdir=work":            {"upperdir", "none"},
		"lowerdir=l1,upperdir=upper,workdir=none":           {"workdir", "none"},
		"lowerdir=l1,upperdir=link,workdir=work":            {"upperdir", "same directory", "l1"},
		"lowerdir=l1,upperdir=l1/inside,workdir=work":       {"upperdir", "inside lowerdir"},
		"lowerdir=upper/inside,upperdir=upper,workdir=work": {"lowerdir", "inside upperdir"},
		"lowerdir=l1,upperdir=upper,workdir=upper":          {"workdir", "same directory"},
		"lowerdir=l1,upperdir=upper,workdir=upper/inside":   {"workdir", "inside upperdir"},
		"lowerdir=l1,upperdir=upper/inside,workdir=upper":   {"upperdir", "inside workdir"},
		"lowerdir=l1,upperdir=upper,workdir=l1/inside":      {"workdir", "inside lowerdir"},
		"lowerdir=l1,upperdir=upper,workdir=/dev/shm":       {"workdir", "another filesystem"},
		"lowerdir=l1,upperdir=upper,workdir=left":           {"left", "volatile"},
		"lowerdir=l1::l2":                                   {"l2", "data-only"},
		"lowerdir=l1,format=qcow":                           {"format", "sparse"},
		"lowerdir=l1,format=bcow,block_size=64k":            {"block_size", "bcow"},
		"lowerdir=l1,nfs_export=on":                         {"nfs_export", "NFS"},
		"lowerdir=l1,dirsync":                               {"dirsync", "fsync"},
		"lowerdir=l1,lowerdri=l2":                           {"lowerdri", "did you mean lowerdir"},
	} {
		l.fails([]string{"mount", "-o", opts, "mnt"}, want...)
	}
	l.fails([]string{"mount", "-o", rw, "nowhere"}, "mount point nowhere", "mkdir")
	l.fails([]string{"mount", "-o", rw, "l1/file"}, "mount point l1/file", "not a directory")
	l.fails([]string{"mount", "-o", rw, "a", "b", "c"}, "arg")
	l.fails([]string{"moutn", "mnt"}, "moutn", "mount")
	if l.mounted() {
		t.Error("something is mounted")
	}
	for _, dir := range []string{"work", "mnt"} {
		if entries, err := os.ReadDir(l.path(dir)); err != nil || len(entries) > 0 {
			t.Errorf("%s was changed: %v %v", dir, entries, err)
		}
	}
}

// Mount boundaries keep directories apart: the host's root can be the lower layer of an upper on another filesystem.
func TestUpperOnMountInsideLower(t *testing.T) {
	l := newLayers(t)
	must(t, os.Mkdir(l.path("l1/disk"), 0o755))
	must(t, unix.Mount("tmpfs", l.path("l1/disk"), "tmpfs", 0, ""))
	defer func() { must(t, unix.Unmount(l.path("l1/disk"), 0)) }()
	must(t, os.Mkdir(l.path("l1/disk/u"), 0o755))
	must(t, os.Mkdir(l.path("l1/disk/w"), 0o755))
	l.ok("mount", "-o", "lowerdir=l1,upperdir=l1/disk/u,workdir=l1/disk/w", "mnt")
	must(t, os.WriteFile(l.path("mnt/new"), []byte("n"), 0o644))
	l.ok("umount", "mnt")
	if _, err := os.Stat(l.path("l1/disk/u/new")); err != nil {
		t.Error(err)
	}
}

func TestBusyUpper(t *testing.T) {
	l := newLayers(t)
	other := newLayers(t)
	l.ok("mount", "-o", rw, "mnt")
	second := func(opts string, want ...string) {
		t.Helper()
		l.fails([]string{"mount", "-o", opts, other.path("mnt")}, append(want, "in use")...)
	}
	second("lowerdir=l1,upperdir=upper,workdir="+other.path("work"), "upperdir", l.path("upper"))
	second("lowerdir=l1,upperdir="+other.path("upper")+",workdir=work", "workdir", l.path("work"))
	if other.mounted() {
		t.Error("mounted")
	}
	l.fails([]string{"fsck", "--repair", "upper"}, "upper", "in use")
	l.fails([]string{"flatten", "-o", "lowerdir=l1:l2", "upper"}, "upper", "in use")
	if r := l.run("fsck", "-o", "lowerdir=l1:l2", "upper"); r.code != 0 || !strings.Contains(r.err, "mounted") {
		t.Errorf("fsck of a mounted layer: %+v", r)
	}
	// Sharing lower layers is what they are for.
	l.ok("mount", "-o", "lowerdir=l1:l2,upperdir="+other.path("upper")+",workdir="+other.path("work"), other.path("mnt"))
	l.ok("umount", other.path("mnt"))
	l.ok("umount", "mnt")

	// Kernel overlayfs uses locks of its own.
	must(t, unix.Mount("overlay", l.path("mnt"), "overlay", 0,
		fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", l.path("l1"), l.path("upper"), l.path("work"))))
	l.fails([]string{"mount", "-o", rw, other.path("mnt")}, "in use by the overlay mount on "+l.path("mnt"))
	must(t, unix.Unmount(l.path("mnt"), 0))
}

// Who mounts again right after umount(2) meets the old server, which still flushes or has a last user.
func TestMountAfterUmount(t *testing.T) {
	l := newLayers(t)
	for range 10 {
		l.ok("mount", "-o", rw, "mnt")
		must(t, os.WriteFile(l.path("mnt/big"), []byte("upper"), 0o644))
		must(t, unix.Unmount(l.path("mnt"), 0))
	}
	l.ok("mount", "-o", rw, "mnt")
	f, err := os.Open(l.path("mnt/file"))
	must(t, err)
	defer f.Close()
	must(t, unix.Unmount(l.path("mnt"), unix.MNT_DETACH))
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe, "mount", "-o", rw, "mnt")
	cmd.Args[0], cmd.Dir = "lamina", l.dir
	stderr, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	said, err := bufio.NewReader(stderr).ReadString('\n')
	if err != nil || !strings.Contains(said, "waiting for the last user of the mount on "+l.path("mnt")) || l.mounted() {
		t.Errorf("while the old mount is in use: %q %v, mounted: %t", said, err, l.mounted())
	}
	must(t, f.Close())
	must(t, cmd.Wait())
	l.ok("umount", "mnt")
}

func TestUmountBusy(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw, "mnt")
	f, err := os.Open(l.path("mnt/file"))
	must(t, err)
	l.fails([]string{"umount", "mnt"}, "in use", fmt.Sprint(os.Getpid()), l.path("mnt/file"), "umount -l")
	if !l.mounted() {
		t.Fatal("unmounted all the same")
	}
	l.ok("umount", "-l", "mnt")
	if l.mounted() {
		t.Error("not detached")
	}
	b := make([]byte, 3)
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != "one" {
		t.Errorf("reading on after -l: %q %v", b, err)
	}
	must(t, f.Close())
	l.waitServersGone()
}

// A killed server leaves a mount without an answer, and a socket.
func TestDeadServer(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw, "mnt")
	var st pool.Status
	must(t, json.Unmarshal([]byte(l.ok("status", "--json", "mnt")), &st))
	pidfd, err := unix.PidfdOpen(st.PID, 0)
	must(t, err)
	defer unix.Close(pidfd)
	must(t, unix.Kill(st.PID, unix.SIGKILL))
	must(t, (&mountServer{pidfd: pidfd}).waitEnd("mnt"))
	// Of all that can be asked the kernel keeps no answer to statfs; whoever walks the machine's files may have made it
	// remember others.
	var fs unix.Statfs_t
	if err := unix.Statfs(l.path("mnt"), &fs); err == nil {
		t.Error("the mount answers")
	}
	l.fails([]string{"mount", "-o", rw, "mnt"}, "mnt", "umount")
	l.fails([]string{"status", "mnt"}, "no server")
	l.ok("umount", "mnt")
	if l.mounted() {
		t.Error("still mounted")
	}
	if out := l.ok("status", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("after it: %s", out)
	}
	// The log is empty, but nobody was left to remove it.
	must(t, os.Remove(filepath.Join(runtimeRoot, filepath.Base(logPath(l.path("mnt"))))))
	// The locks went with the process.
	l.ok("mount", "-o", rw, "mnt")
	l.ok("umount", "mnt")
	l.ok("fsck", "-o", "lowerdir=l1:l2", "upper")
}

// startForeground runs lamina mount -f and returns when it has mounted.
func (l *layers) startForeground(opts string) *exec.Cmd {
	l.t.Helper()
	exe, err := os.Executable()
	must(l.t, err)
	cmd := exec.Command(exe, "mount", "-f", "-o", opts, "mnt")
	cmd.Args[0], cmd.Dir, cmd.Stderr = "lamina", l.dir, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	must(l.t, cmd.Start())
	for deadline := time.Now().Add(2 * time.Minute); !l.mounted(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			l.t.Fatal("does not mount")
		}
	}
	// The mount answers before the server listens to signals.
	for deadline := time.Now().Add(2 * time.Minute); l.run("status", "mnt").code != 0; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Fatal("does not answer")
		}
	}
	return cmd
}

func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			l := newLayers(t)
			cmd := l.startForeground(rw)
			must(t, os.WriteFile(l.path("mnt/new"), []byte("n"), 0o644))
			must(t, cmd.Process.Signal(sig))
			if err := cmd.Wait(); err != nil {
				t.Errorf("exit: %v", err)
			}
			if l.mounted() {
				t.Error("still mounted")
			}
			if b, err := os.ReadFile(l.path("upper/new")); err != nil || string(b) != "n" {
				t.Errorf("%q %v", b, err)
			}
		})
	}
}

// A signal while the mount is in use detaches it; a second one cuts the users off.
func TestSignalWhileBusy(t *testing.T) {
	for _, again := range []bool{false, true} {
		t.Run(fmt.Sprintf("again=%v", again), func(t *testing.T) {
			l := newLayers(t)
			cmd := l.startForeground(rw)
			f, err := os.Open(l.path("mnt/file"))
			must(t, err)
			defer f.Close()
			must(t, cmd.Process.Signal(unix.SIGTERM))
			for l.mounted() {
				time.Sleep(time.Millisecond)
			}
			b := make([]byte, 3)
			if _, err := f.ReadAt(b, 0); err != nil || string(b) != "one" {
				t.Errorf("reading on: %q %v", b, err)
			}
			if again {
				must(t, cmd.Process.Signal(unix.SIGTERM))
			} else {
				must(t, f.Close())
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("exit: %v", err)
			}
		})
	}
}

// The server holds nothing of the caller's: a pipe that the caller reads to its end would keep it waiting for ever.
func TestServerLetsGo(t *testing.T) {
	l := newLayers(t)
	exe, err := os.Executable()
	must(t, err)
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	cmd := exec.Command(exe, "mount", "-o", rw, "mnt")
	cmd.Args[0], cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = "lamina", l.dir, w, w, []*os.File{w}
	err = cmd.Run()
	w.Close()
	must(t, err)
	must(t, r.SetReadDeadline(time.Now().Add(20*time.Second)))
	if out, err := io.ReadAll(r); err != nil || len(out) > 0 {
		t.Errorf("%q %v", out, err)
	}
	l.ok("umount", "mnt")
}

// A mount command that is killed before it returns leaves no mount.
func TestMountCommandGone(t *testing.T) {
	l := newLayers(t)
	exe, err := os.Executable()
	must(t, err)
	r, w, err := os.Pipe()
	must(t, err)
	r.Close() // nobody listens to the server
	cmd := exec.Command(exe, "mount", "--ready-fd", "3", "-o", rw, "mnt")
	cmd.Args[0], cmd.Dir, cmd.ExtraFiles = "lamina", l.dir, []*os.File{w}
	err = cmd.Run()
	w.Close()
	must(t, err)
	if l.mounted() {
		t.Error("mounted for nobody")
	}
	log := filepath.Join(runtimeRoot, filepath.Base(logPath(l.path("mnt"))))
	if b, err := os.ReadFile(log); err != nil || !strings.Contains(string(b), "has gone") {
		t.Errorf("log: %q %v", b, err)
	}
	must(t, os.Remove(log))
}

func TestStackedMounts(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", "lowerdir=l1", "mnt")
	l.ok("mount", "-o", "lowerdir=l2", "mnt")
	var st pool.Status
	must(t, json.Unmarshal([]byte(l.ok("status", "--json", "mnt")), &st))
	if st.Lower[0] != l.path("l2") {
		t.Errorf("the topmost mount has lower %q", st.Lower)
	}
	l.ok("umount", "mnt")
	if _, err := os.Stat(l.path("mnt/file")); err != nil {
		t.Errorf("the mount below: %v", err)
	}
	l.ok("umount", "mnt")
}

func TestVolatileLeftover(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw+",volatile", "mnt")
	l.ok("umount", "mnt")
	l.ok("mount", "-o", rw+",volatile", "mnt")
	var st pool.Status
	must(t, json.Unmarshal([]byte(l.ok("status", "--json", "mnt")), &st))
	pidfd, err := unix.PidfdOpen(st.PID, 0)
	must(t, err)
	defer unix.Close(pidfd)
	must(t, unix.Kill(st.PID, unix.SIGKILL))
	must(t, (&mountServer{pidfd: pidfd}).waitEnd("mnt"))
	l.ok("umount", "mnt")
	must(t, os.Remove(filepath.Join(runtimeRoot, filepath.Base(logPath(l.path("mnt"))))))
	l.fails([]string{"mount", "-o", rw, "mnt"}, "volatile", "empty upperdir")
}

// Sketches of one namespace would pass for ordinary files in the other.
func TestNamespaceMismatch(t *testing.T) {
	for first, second := range map[string]string{"": ",userxattr", ",userxattr": ""} {
		l := newLayers(t)
		l.ok("mount", "-o", rw+first, "mnt")
		l.ok("umount", "mnt")
		l.fails([]string{"mount", "-o", rw + second, "mnt"}, "workdir", "userxattr", "trusted.overlay", "user.overlay")
		if l.mounted() {
			t.Error("mounted")
		}
		l.ok("mount", "-o", rw+first, "mnt")
		l.ok("umount", "mnt")
	}
}

func Test500Lowers(t *testing.T) {
	l := newLayers(t)
	var dirs []string
	for i := range 500 {
		dir := fmt.Sprintf("many/%03d", i)
		must(t, os.MkdirAll(l.path(dir), 0o755))
		must(t, os.WriteFile(l.path(fmt.Sprintf("%s/f%03d", dir, i)), nil, 0o644))
		dirs = append(dirs, dir)
	}
	l.ok("mount", "-o", "lowerdir="+strings.Join(dirs, ":")+",upperdir=upper,workdir=work", "mnt")
	entries, err := os.ReadDir(l.path("mnt"))
	must(t, err)
	if len(entries) != 500 {
		t.Errorf("%d names", len(entries))
	}
	l.ok("umount", "mnt")
}

func TestFsckExitStatus(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw, "mnt")
	l.patch(50_000)
	l.ok("umount", "mnt")
	if out := l.ok("fsck", "-o", "lowerdir=l1:l2", "upper"); !strings.Contains(out, "clean") {
		t.Errorf("%s", out)
	}
	l.forge()
	r := l.run("fsck", "-o", "lowerdir=l1:l2", "upper")
	if r.code != exitFindings || !strings.Contains(r.out, "/big") || r.err != "" {
		t.Errorf("findings: %+v", r)
	}
	r = l.run("fsck", "--json", "-o", "lowerdir=l1:l2", "upper")
	var finding struct{ Path, What string }
	must(t, json.Unmarshal([]byte(r.out), &finding))
	if r.code != exitFindings || finding.Path != "big" || finding.What == "" {
		t.Errorf("findings as JSON: %+v", r)
	}
	for _, wrong := range [][]string{{"fsck"}, {"fsck", "--mend", "upper"}, {"flatten"}, {"doctor", "upper", "mnt"}} {
		if r := l.run(wrong...); r.code != exitTrouble { // 1 would be a finding
			t.Errorf("%q: %+v", wrong, r)
		}
	}
	if r := l.run("fsck", "none"); r.code != exitTrouble || !strings.Contains(r.err, "none: does not exist") || strings.Contains(r.err, "option") {
		t.Errorf("a missing layer: %+v", r)
	}
	if r := l.run("flatten", "upper"); r.code != exitTrouble || !strings.Contains(r.err, "lowerdir") {
		t.Errorf("flatten without lowers: %+v", r)
	}
}

// A layer whose owners are in attributes says so by its root, for later use as a lower layer.
func TestXattrPermissions(t *testing.T) {
	l := newLayers(t)
	l.ok("mount", "-o", rw+",xattr_permissions=2", "mnt")
	must(t, os.WriteFile(l.path("mnt/f"), nil, 0o640))
	must(t, os.Chown(l.path("mnt/f"), 1234, 5678))
	must(t, os.Chmod(l.path("mnt/f"), 0o604))
	check := func() {
		t.Helper()
		var st unix.Stat_t
		must(t, unix.Stat(l.path("mnt/f"), &st))
		if st.Uid != 1234 || st.Gid != 5678 || st.Mode != unix.S_IFREG|0o604 {
			t.Errorf("%d:%d %o", st.Uid, st.Gid, st.Mode)
		}
	}
	check()
	l.ok("umount", "mnt")
	var st unix.Stat_t
	must(t, unix.Stat(l.path("upper/f"), &st))
	if st.Uid != 0 {
		t.Errorf("the inode belongs to %d", st.Uid)
	}
	l.ok("mount", "-o", "lowerdir=upper", "mnt")
	check()
	l.ok("umount", "mnt")
}

// A message that comes without end is counted, not repeated; a log that is full is put aside.
func TestLogBounds(t *testing.T) {
	path := t.TempDir() + "/log"
	f, err := os.Create(path)
	must(t, err)
	lg := &logger{out: f}
	for i := range 10_000 {
		lg.printf("the same\nagain")
		if i%1000 == 0 {
			lg.printf("different: %d", i)
		}
	}
	for i := range 2 * maxTracked {
		lg.printf("never the same: %d", i)
	}
	lg.close("/nowhere")
	must(t, f.Close())
	b, err := os.ReadFile(path)
	must(t, err)
	text := string(b)
	if n := strings.Count(text, `the same\nagain`); n != maxRepeats+1 || !strings.Contains(text, "(9995 times more)") {
		t.Errorf("%d times: %s", n, text[:min(len(text), 2000)])
	}
	if n := strings.Count(text, "different:"); n != 10 {
		t.Errorf("%d other messages", n)
	}
	if n := strings.Count(text, "\n"); n > maxTracked+3*maxRepeats || !strings.Contains(text, "messages of other kinds (") {
		t.Errorf("%d lines", n)
	}
}

func TestLogName(t *testing.T) {
	long := "/" + strings.Repeat("d/", 2000)
	for _, mnt := range []string{"/", "/a/b c", long} {
		name := filepath.Base(logPath(mnt))
		if len(name) > 255 || !strings.HasSuffix(name, ".log") || name == ".log" {
			t.Errorf("%q: %q", mnt, name)
		}
	}
}

func TestUnescapeMountinfo(t *testing.T) {
	for in, want := range map[string]string{`/a`: "/a", `/a\040b`: "/a b", `/a\134b`: `/a\b`, `/a\`: `/a\`, `\04`: `\04`, `\999`: `\999`} {
		if got := pool.UnescapeMountinfo(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestHumanBytes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1 << 30: "1.0 GiB", 1 << 62: "4096.0 PiB"} {
		if got := humanBytes(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

// The committed pages are those that the commands and the option table make.
func TestManPages(t *testing.T) {
	dir := "../../../man"
	pages := ManPages()
	for name, text := range pages {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != text {
			t.Errorf("%s is not up to date (%v): run go generate ./cmd/lamina/cli", name, err)
		}
	}
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		if _, ok := pages[e.Name()]; !ok {
			t.Errorf("%s belongs to no command", e.Name())
		}
	}
	if !strings.Contains(pages["lamina-mount.8"], `redirect_dir=on|off|follow|nofollow`) {
		t.Error("the mount options are missing")
	}
}
