//go:build systemd

// Package systemd boots a new Debian 12 with a systemd of its own, installs Lamina's package in it, and does what the README
// says. It asks Debian's mirror for everything, and so has a build tag.
package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"lamina/tests/mnt"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { mnt.Main(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return string(out)
}

// machine is a Debian whose first process is systemd.
type machine struct {
	root  string
	init  int
	ended chan struct{}
	out   bytes.Buffer // what its console shows; to be read when it has ended
}

// boot returns when all units are up.
func boot(t *testing.T, root string) *machine {
	m := &machine{root: root, ended: make(chan struct{})}
	cmd := exec.Command("systemd-nspawn", "--quiet", "--boot", "--directory="+root, "--machine=lamina"+strconv.Itoa(os.Getpid()),
		"--register=no", "--keep-unit", "--capability=all", "--console=pipe", "--bind=/dev/fuse",
		"--system-call-filter=@keyring @mount @privileged bpf io_uring_setup io_uring_enter io_uring_register")
	cmd.Stdout, cmd.Stderr = &m.out, &m.out
	must(t, cmd.Start())
	go func() {
		defer close(m.ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		if m.init != 0 {
			_ = unix.Kill(m.init, unix.SIGKILL) // and with it everything in its namespace
		} else {
			_ = cmd.Process.Kill()
		}
		<-m.ended
		if t.Failed() {
			t.Logf("console:\n%s", m.out.String())
		}
	})
	m.eventually(t, time.Minute, "systemd runs", func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		if err != nil {
			return err
		}
		if m.init, err = strconv.Atoi(strings.TrimSpace(string(children))); err != nil {
			return err
		}
		_, err = m.try("systemctl", "is-system-running", "--wait")
		return err
	})
	// The engine makes control groups; nspawn shows those of the old hierarchies read-only.
	m.run(t, "sh", "-c", `for c in /sys/fs/cgroup/*/; do mount -o remount,bind,rw "$c" 2>/dev/null || true; done`)
	return m
}

func (m *machine) try(args ...string) (string, error) {
	all := append([]string{"-t", strconv.Itoa(m.init), "-m", "-u", "-i", "-p", "-n", "-C", "-r", "-w",
		"env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"}, args...)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", all...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%q: %w: %s", args, err, out)
	}
	return string(out), nil
}

func (m *machine) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := m.try(args...)
	must(t, err)
	return out
}

func (m *machine) eventually(t *testing.T, within time.Duration, what string, ok func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		select {
		case <-m.ended:
			t.Fatalf("%s: the machine has gone: %s", what, m.out.String())
		default:
		}
		if err = ok(); err == nil {
			return
		}
	}
	t.Fatalf("waited in vain: %s: %v", what, err)
}

// image makes an image of busybox and a file of 64 MiB in the machine's /root.
func image(t *testing.T, root string) {
	script := `set -eu
cd "$1"; mkdir -p root/bin root/data; cp "$(command -v busybox)" root/bin/busybox
for a in sh dd echo cat sleep; do ln -s busybox root/bin/$a; done
head -c 67108864 /dev/urandom >root/data/big
tar -C root -cf layer.tar .
echo '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":["sha256:'"$(sha256sum layer.tar | cut -d' ' -f1)"'"]}}' >config.json
echo '[{"Config":"config.json","RepoTags":["local/busybox:1"],"Layers":["layer.tar"]}]' >manifest.json
tar -cf "$2/root/image.tar" config.json manifest.json layer.tar`
	run(t, "sh", "-c", script, "sh", t.TempDir(), root)
}

const imageName = "docker.io/local/busybox:1"

// writer counts, in a file of the image and after that in one of its own, and does not mind SIGTERM.
const writer = `trap "" TERM; i=1000000; while :; do i=$((i+1)); echo $i | dd of=/data/big bs=8 seek=1000 conv=notrunc 2>/dev/null || exit 2
echo $i >>/data/log || exit 1; sleep 0.02; done`

func TestFreshDebian(t *testing.T) {
	dir := mnt.Dirs(t, "debian")[0]
	run(t, "../../scripts/package.sh", filepath.Join(dir, "out"))
	root := filepath.Join(dir, "root")
	run(t, "debootstrap", "--variant=minbase", "--include=systemd,systemd-sysv,dbus,ca-certificates,procps", "bookworm", root)
	debs, err := filepath.Glob(filepath.Join(dir, "out", "*.deb"))
	if err != nil || len(debs) != 1 {
		t.Fatalf("%v %q", err, debs)
	}
	run(t, "cp", debs[0], filepath.Join(root, "root", "lamina.deb"))
	image(t, root)
	conf := filepath.Join(root, "etc/systemd/system.conf.d")
	must(t, os.MkdirAll(conf, 0o755))
	must(t, os.WriteFile(filepath.Join(conf, "test.conf"), []byte("[Manager]\nDefaultTimeoutStopSec=10s\n"), 0o644))

	m := boot(t, root)
	m.run(t, "apt-get", "install", "-y", "-q", "/root/lamina.deb", "containerd")
	m.run(t, "sh", "-c", "cat /usr/share/doc/lamina/examples/containerd/proxy-plugin.toml >>/etc/containerd/config.toml && systemctl restart containerd")
	m.run(t, "ctr", "image", "import", "--snapshotter", "lamina", "/root/image.tar")
	if out := m.run(t, "ctr", "run", "--snapshotter", "lamina", "--rm", imageName, "first", "sh", "-c", "echo hello"); out != "hello\n" {
		t.Errorf("the first container said %q", out)
	}
	failed := m.run(t, "systemctl", "--failed", "--no-legend", "--plain")
	if failed != "" {
		t.Errorf("units that failed: %s", failed)
	}

	m.run(t, "ctr", "run", "-d", "--snapshotter", "lamina", imageName, "writer", "sh", "-c", writer)
	counts := func(t *testing.T) int {
		t.Helper()
		var n int
		m.eventually(t, time.Minute, "the writer counts", func() error {
			out, err := m.try("ctr", "task", "exec", "--exec-id", "look"+strconv.FormatInt(time.Now().UnixNano(), 36), "writer", "cat", "/data/log")
			lines := strings.Fields(out)
			if err != nil || len(lines) == 0 {
				return errors.Join(err, errors.New("no line yet"))
			}
			n, err = strconv.Atoi(lines[len(lines)-1])
			return err
		})
		return n
	}
	goesOn := func(t *testing.T) {
		t.Helper()
		before := counts(t)
		m.eventually(t, time.Minute, "the writer goes on", func() error {
			if now := counts(t); now <= before {
				return fmt.Errorf("it is at %d still", now)
			}
			return nil
		})
	}
	goesOn(t)
	m.run(t, "systemctl", "restart", "lamina-snapshotter")
	goesOn(t)
	m.run(t, "systemctl", "kill", "--signal=KILL", "--kill-whom=main", "lamina-snapshotter")
	m.eventually(t, time.Minute, "systemd starts the snapshotter again", func() error {
		_, err := m.try("systemctl", "is-active", "lamina-snapshotter")
		return err
	})
	goesOn(t)
	m.run(t, "systemctl", "restart", "containerd")
	goesOn(t)
	if out := m.run(t, "lamina", "status"); !strings.Contains(out, "default/writer") {
		t.Errorf("status does not know the container: %s", out)
	}

	// The machine goes down. Nobody ends the container but systemd's last SIGKILL.
	m.run(t, "systemctl", "poweroff")
	select {
	case <-m.ended:
	case <-time.After(3 * time.Minute):
		t.Fatal("the machine does not power off")
	}
	state := filepath.Join(root, "var/lib/lamina/snapshots")
	uppers, err := filepath.Glob(filepath.Join(state, "*", "fs", "data", "log"))
	if err != nil || len(uppers) != 1 {
		t.Fatalf("%v: the writer's logs: %q", err, uppers)
	}
	snapshot := filepath.Dir(filepath.Dir(filepath.Dir(uppers[0])))
	lowers, err := filepath.Glob(filepath.Join(state, "*", "fs", "bin", "busybox"))
	if err != nil || len(lowers) != 1 {
		t.Fatalf("%v: layers: %q", err, lowers)
	}
	merged := mnt.Dirs(t, "merged")[0]
	out, code := mnt.Lamina(t, "mount", "-o", fmt.Sprintf("lowerdir=%s,upperdir=%s/fs,workdir=%[2]s/work",
		filepath.Dir(filepath.Dir(lowers[0])), snapshot), merged)
	if code != 0 {
		t.Fatal(out)
	}
	defer func() {
		if out, code := mnt.Lamina(t, "umount", merged); code != 0 {
			t.Error(out)
		}
	}()
	log, err := os.ReadFile(filepath.Join(merged, "data/log"))
	must(t, err)
	lines := strings.Fields(string(log))
	big, err := os.ReadFile(filepath.Join(merged, "data/big"))
	must(t, err)
	want, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(lowers[0])), "data/big"))
	must(t, err)
	count := string(bytes.TrimSpace(big[8000:8008]))
	copy(want[8000:8008], big[8000:8008])
	if last, _ := strconv.Atoi(lines[len(lines)-1]); count != strconv.Itoa(last) && count != strconv.Itoa(last+1) {
		t.Errorf("the file of the image has %s, the log ends with %d", count, last)
	}
	if !bytes.Equal(big, want) {
		t.Error("other bytes of the file have changed")
	}
}
