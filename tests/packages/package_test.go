// Package packages tests what "make package" makes: as a new machine's dpkg sees it, and as its user.
package packages

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"lamina/doctor"
	"lamina/net/peers"

	"golang.org/x/sys/unix"
)

const version = "1.2.3~test"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return string(out)
}

// build makes the packages and returns the directory that they are in.
func build(t *testing.T, env ...string) string {
	t.Helper()
	out := t.TempDir()
	run(t, append(env, "VERSION="+version), "../../scripts/package.sh", out)
	return out
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestPackage(t *testing.T) {
	dir := build(t)
	files := names(t, dir)
	if len(files) != 2 || !strings.HasPrefix(files[0], "lamina-"+version+"-linux-") || !strings.HasPrefix(files[1], "lamina_"+version+"_") {
		t.Fatalf("made: %q", files)
	}
	deb := filepath.Join(dir, files[1])
	t.Run("same bytes again", func(t *testing.T) {
		again := build(t, "TZ=Pacific/Chatham", "LC_ALL=C.UTF-8", "TMPDIR="+t.TempDir())
		for _, f := range files {
			a, err := os.ReadFile(filepath.Join(dir, f))
			must(t, err)
			b, err := os.ReadFile(filepath.Join(again, f))
			must(t, err)
			if sha256.Sum256(a) != sha256.Sum256(b) {
				t.Errorf("%s differs", f)
			}
		}
	})
	t.Run("tarball", func(t *testing.T) { sameFiles(t, filepath.Join(dir, files[0]), deb) })
	t.Run("install and purge", func(t *testing.T) { install(t, deb) })
}

// sameFiles: the tarball has the package's files below one directory.
func sameFiles(t *testing.T, tarball, deb string) {
	f, err := os.Open(tarball)
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	inTar := list(t, z, "lamina-"+version+"/")
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", deb)
	out, err := cmd.Output()
	must(t, err)
	if inDeb := list(t, bytes.NewReader(out), "./"); !slices.Equal(inTar, inDeb) {
		t.Errorf("tarball: %q\npackage: %q", inTar, inDeb)
	}
}

func list(t *testing.T, r io.Reader, prefix string) []string {
	var all []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			slices.Sort(all)
			return all
		}
		must(t, err)
		name, ok := strings.CutPrefix(h.Name, prefix)
		if !ok || h.Uid != 0 || h.Gid != 0 || h.Uname != "" && h.Uname != "root" || strings.Contains(name, "..") {
			t.Errorf("%+v", h)
		}
		all = append(all, fmt.Sprintf("%s %o %d %s", name, h.Mode, h.Size, h.Linkname))
	}
}

// newRoot is the least that a maintainer's script can run in.
func newRoot(t *testing.T) string {
	root := t.TempDir()
	for _, d := range []string{"bin", "sbin", "usr/bin", "usr/sbin", "usr/lib", "etc", "dev", "proc", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers"} {
		must(t, os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	must(t, os.WriteFile(root+"/var/lib/dpkg/status", nil, 0o644))
	must(t, unix.Mknod(root+"/dev/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	busybox, err := exec.LookPath("busybox")
	must(t, err)
	b, err := os.ReadFile(busybox)
	must(t, err)
	must(t, os.WriteFile(root+"/bin/busybox", b, 0o755))
	for _, applet := range []string{"sh", "grep", "rm", "cat"} {
		must(t, os.Symlink("busybox", root+"/bin/"+applet))
	}
	return root
}

// tree lists what is below root but for dpkg's own files.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var all []string
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		must(t, err)
		if rel, _ := filepath.Rel(root, path); strings.HasPrefix(rel, "var/lib/dpkg") || strings.HasPrefix(rel, "var/log") {
			return nil
		} else if !d.IsDir() || !strings.HasPrefix(rel, "usr") {
			all = append(all, rel)
		}
		return nil
	}))
	return all
}

func install(t *testing.T, deb string) {
	root := newRoot(t)
	before := tree(t, root)
	dpkg := func(args ...string) {
		t.Helper()
		run(t, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive"}, "dpkg", append([]string{"--root=" + root, "--force-not-root", "--force-bad-path", "--log=/dev/null"}, args...)...)
	}
	dpkg("--install", deb)
	inside := func(args ...string) (string, int) {
		t.Helper()
		cmd := exec.Command(args[0], args[1:]...)
		cmd.SysProcAttr, cmd.Dir = &syscall.SysProcAttr{Chroot: root}, "/"
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatalf("%q: %v", args, err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	// A program without any library of the machine's.
	if out, code := inside("/usr/bin/lamina", "--version"); code != 0 || strings.TrimSpace(out) != "lamina: version "+version {
		t.Errorf("%d %q", code, out)
	}
	if out, code := inside("/usr/sbin/mount.fuse.lamina"); code != 1 || !strings.Contains(out, "mount.fuse.lamina NAME MOUNTPOINT") {
		t.Errorf("%d %q", code, out)
	}
	if out, code := inside("/bin/sh", "-c", `echo '{"cniVersion": "1.1.0"}' | CNI_COMMAND=VERSION /usr/lib/cni/lamina-cni`); code != 0 || !strings.Contains(out, `"1.1.0"`) {
		t.Errorf("lamina-cni: %d %q", code, out)
	}
	examples(t, root)
	netExamples(t, root)
	units(t, root)
	completions(t, root)
	pages(t, root)
	licences(t, root)

	// Installed over itself, as an upgrade; then taken away with all that it made.
	dpkg("--install", deb)
	must(t, os.MkdirAll(root+"/var/lib/lamina/snapshots/1/fs", 0o700))
	must(t, os.MkdirAll(root+"/etc/default", 0o755))
	must(t, os.WriteFile(root+"/etc/default/lamina", nil, 0o644))
	dpkg("--purge", "lamina")
	must(t, os.Remove(root+"/etc/default"))
	if after := tree(t, root); !slices.Equal(before, after) {
		t.Errorf("before: %q\nafter: %q", before, after)
	}
	if left, err := filepath.Glob(root + "/var/lib/dpkg/info/lamina*"); err != nil || len(left) > 0 {
		t.Errorf("dpkg still has %v %v", left, err)
	}
}

// examples are what the engines want, in the doctor's opinion, and containerd's.
func examples(t *testing.T, root string) {
	const from = "/usr/share/doc/lamina/examples"
	for example, as := range map[string]string{"storage.conf": "/etc/containers/storage.conf", "daemon.json": "/etc/docker/daemon.json"} {
		b, err := os.ReadFile(filepath.Join(root, from, example))
		must(t, err)
		must(t, os.MkdirAll(filepath.Dir(root+as), 0o755))
		must(t, os.WriteFile(root+as, b, 0o644))
	}
	defer func() {
		for _, dir := range []string{"/etc/containers", "/etc/docker", "/etc/containerd"} {
			must(t, os.RemoveAll(root+dir))
		}
	}()
	for _, conf := range []string{"containerd-1.toml", "containerd-2.toml", "proxy-plugin.toml"} {
		path := filepath.Join(root, from, "containerd", conf)
		b, err := os.ReadFile(path)
		must(t, err)
		must(t, os.MkdirAll(root+"/etc/containerd", 0o755))
		must(t, os.WriteFile(root+"/etc/containerd/config.toml", b, 0o644))
		levels := map[string]doctor.Level{}
		for _, f := range doctor.Run(doctor.Options{Root: root}) {
			levels[f.Check] = f.Level
		}
		for _, check := range []string{"containerd-plugin", "podman-storage", "docker-storage"} {
			if level, is := levels[check]; !is || level != doctor.OK {
				t.Errorf("%s: %s: %v (%t)", conf, check, level, is)
			}
		}
		if cri := levels["containerd-cri"]; (cri == doctor.OK) == (conf == "proxy-plugin.toml") && levels["snapshotter-socket"] != doctor.Broken {
			t.Errorf("%s: pods: %v", conf, cri)
		}
	}
	// Debian 12's containerd reads its own configuration with ours behind it, and the drop-in.
	debian := "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.internal.v1.opt\"]\n    path = \"/var/lib/containerd/opt\"\n"
	snippet, err := os.ReadFile(filepath.Join(root, from, "containerd/proxy-plugin.toml"))
	must(t, err)
	whole := filepath.Join(t.TempDir(), "config.toml")
	must(t, os.WriteFile(whole, append([]byte(debian), snippet...), 0o644))
	importing := filepath.Join(t.TempDir(), "config.toml")
	must(t, os.WriteFile(importing, []byte("imports = [\""+filepath.Join(root, from, "containerd/containerd-1.toml")+"\"]\n"+debian), 0o644))
	for _, conf := range []string{whole, importing} {
		dump := run(t, nil, "containerd", "--config", conf, "config", "dump")
		if !strings.Contains(dump, "/run/lamina/snapshotter.sock") || conf == importing && !strings.Contains(dump, `snapshotter = "lamina"`) {
			t.Errorf("containerd understands %s as\n%s", conf, dump)
		}
	}
}

// netExamples are the container network's: the doctor misses nothing but what another package has, and the agent takes the
// peers.
func netExamples(t *testing.T, root string) {
	const from = "/usr/share/doc/lamina/examples/net"
	for _, f := range []struct{ example, as string }{{"10-lamina.conflist", "/etc/cni/net.d"}, {"net.toml", "/etc/lamina"}, {"peers", "/etc/lamina"}} {
		b, err := os.ReadFile(filepath.Join(root, from, f.example))
		must(t, err)
		must(t, os.MkdirAll(root+f.as, 0o755))
		must(t, os.WriteFile(filepath.Join(root, f.as, f.example), b, 0o644))
	}
	defer func() {
		for _, dir := range []string{"/etc/cni", "/etc/lamina"} {
			must(t, os.RemoveAll(root+dir))
		}
	}()
	found := map[string]doctor.Finding{}
	for _, f := range doctor.Run(doctor.Options{Root: root}) {
		found[f.Check] = f
	}
	if f := found["net-cni"]; f.Level != doctor.OK || f.Found == "" {
		t.Errorf("%+v", f)
	}
	if f := found["net-plugins"]; f.Level != doctor.Broken || !strings.HasPrefix(f.Found, "portmap ") {
		t.Errorf("%+v", f)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	updates, err := peers.File(root + "/etc/lamina/peers").Watch(ctx)
	must(t, err)
	if u := <-updates; u.Err != nil || len(u.Leases) != 2 {
		t.Errorf("%+v", u)
	}
}

// units are without fault in systemd's opinion, on a machine that has the program.
func units(t *testing.T, root string) {
	host := "/lib/systemd/system"
	must(t, os.MkdirAll(root+"/etc/systemd/system", 0o755))
	defer os.RemoveAll(root + "/etc/systemd")
	here, err := filepath.Glob(host + "/*")
	must(t, err)
	for _, u := range here { // what they refer to
		if st, err := os.Stat(u); err == nil && st.Mode().IsRegular() {
			b, err := os.ReadFile(u)
			must(t, err)
			must(t, os.WriteFile(root+"/etc/systemd/system/"+filepath.Base(u), b, 0o644))
		}
	}
	ours := []string{"lamina.slice", "lamina-snapshotter.socket", "lamina-snapshotter.service", "lamina-metrics.service", "lamina-net.service"}
	cmd := exec.Command("systemd-analyze", append([]string{"verify", "--man=no", "--recursive-errors=no", "--root=" + root}, ours...)...)
	out, err := cmd.CombinedOutput()
	if err != nil || bytes.Contains(bytes.ReplaceAll(out, []byte(root), nil), []byte("lamina")) {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
}

func completions(t *testing.T, root string) {
	lamina := root + "/usr/bin/lamina"
	for args, want := range map[string]string{"__complete sta": "status", "__complete top --s": "--sort", "__complete mount -o x --fo": "--foreground",
		"__complete net tr": "trace", "__complete net agent --fa": "--fastpath", "__complete net agent --fastpath=a": "auto"} {
		if out := run(t, nil, lamina, strings.Fields(args)...); !strings.Contains(out, want) {
			t.Errorf("%s: %s", args, out)
		}
	}
	run(t, nil, "bash", "-n", root+"/usr/share/bash-completion/completions/lamina")
	for _, file := range []string{"/usr/share/zsh/vendor-completions/_lamina", "/usr/share/fish/vendor_completions.d/lamina.fish"} {
		if b, err := os.ReadFile(root + file); err != nil || !strings.Contains(string(b), "lamina") {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// pages: every command that help shows has one, and so have commands of commands and the CNI plugin.
func pages(t *testing.T, root string) {
	n := 0
	page := func(name string) {
		n++
		if _, err := os.Stat(root + "/usr/share/man/man8/" + name + ".8.gz"); err != nil {
			t.Error(err)
		}
	}
	for _, name := range commands(t, root) {
		page("lamina-" + name)
	}
	for _, name := range commands(t, root, "net") {
		page("lamina-net-" + name)
	}
	page("lamina-cni")
	if n < 15 {
		t.Errorf("%d commands", n)
	}
}

// commands are those that help shows.
func commands(t *testing.T, root string, of ...string) (names []string) {
	help := run(t, nil, root+"/usr/bin/lamina", append(of, "--help")...)
	_, list, _ := strings.Cut(help, "Available Commands:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	for line := range strings.Lines(list) {
		if name := strings.Fields(line)[0]; name != "help" && name != "completion" {
			names = append(names, name)
		}
	}
	return names
}

// licences: what the program was built from is named in it, and in the file.
func licences(t *testing.T, root string) {
	f, err := os.Open(root + "/usr/share/doc/lamina/third-party-licenses.gz")
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	b, err := io.ReadAll(z)
	must(t, err)
	var modules struct{ Deps []struct{ Path string } }
	out := run(t, nil, "go", "version", "-m", "-json", root+"/usr/bin/lamina")
	var info []json.RawMessage
	if json.Unmarshal([]byte(out), &info) != nil {
		info = []json.RawMessage{json.RawMessage(out)}
	}
	for _, i := range info {
		must(t, json.Unmarshal(i, &modules))
	}
	if len(modules.Deps) < 10 {
		t.Errorf("the program was built from %d modules: %s", len(modules.Deps), out)
	}
	for _, m := range modules.Deps {
		if !bytes.Contains(b, []byte("==== "+m.Path+" ")) {
			t.Errorf("no licence of %s", m.Path)
		}
	}
}
