//go:build docker

package containerd

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"lamina/bench/engine"
)

var dockerd = flag.String("dockerd", "", "Docker Engine's daemon")

// docker is a Docker Engine on the containerd of a rig, asked over its HTTP interface.
type docker struct {
	*rig
	http http.Client
}

// startDocker starts one, configured as deploy/examples says, without networks. It is stopped when the test ends.
func (r *rig) startDocker() *docker {
	r.t.Helper()
	dir := filepath.Join(r.Dir, "docker")
	r.must(os.Mkdir(dir, 0o711))
	socket, logName := filepath.Join(dir, "d.sock"), filepath.Join(dir, "log")
	log, err := os.Create(logName)
	r.must(err)
	defer log.Close()
	cmd := exec.Command(*dockerd, "--config-file", r.dockerConfig(dir), "--host", "unix://"+socket, "--containerd", r.Address(),
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"--userland-proxy=false", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none", "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", r.Cgroup)
	cmd.Stdout, cmd.Stderr = log, log
	r.must(cmd.Start())
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	r.t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		select {
		case <-exited:
		case <-time.After(time.Minute):
			r.t.Error("dockerd does not end on SIGTERM")
			_ = cmd.Process.Kill()
			<-exited
		}
		if text, err := os.ReadFile(logName); err == nil && r.t.Failed() {
			r.t.Logf("== dockerd\n%s", text[max(0, len(text)-8000):])
		}
	})
	d := &docker{rig: r}
	r.t.Cleanup(d.removeAll)
	d.http = http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	r.eventually("dockerd answers", func() bool {
		select {
		case err := <-exited:
			exited <- err
			text, _ := os.ReadFile(logName)
			r.t.Fatalf("dockerd has ended: %v\n%s", err, text)
		default:
		}
		answer, err := d.http.Get("http://docker/_ping")
		if err != nil {
			return false
		}
		return answer.Body.Close() == nil && answer.StatusCode == http.StatusOK
	})
	return d
}

// dockerConfig writes the example configuration, with one feature more: Debian 12's runc knows no time namespaces.
func (r *rig) dockerConfig(dir string) string {
	r.t.Helper()
	text, err := os.ReadFile("../../deploy/examples/daemon.json")
	r.must(err)
	var config map[string]any
	r.must(json.Unmarshal(text, &config))
	config["features"].(map[string]any)["time-namespaces"] = false
	text, err = json.Marshal(config)
	r.must(err)
	path := filepath.Join(dir, "daemon.json")
	r.must(os.WriteFile(path, text, 0o644))
	return path
}

// removeAll removes what a test that failed has left.
func (d *docker) removeAll() {
	if !d.t.Failed() {
		return
	}
	for _, kind := range []string{"containers", "images"} {
		answer, err := d.http.Get("http://docker/" + kind + "/json?all=true")
		if err != nil {
			return // it has ended
		}
		var list []struct{ ID string }
		_ = json.NewDecoder(answer.Body).Decode(&list)
		answer.Body.Close()
		for _, i := range list {
			request, err := http.NewRequest("DELETE", "http://docker/"+kind+"/"+url.PathEscape(i.ID)+"?force=true", nil)
			d.must(err)
			if answer, err := d.http.Do(request); err == nil {
				answer.Body.Close()
			}
		}
	}
}

// call makes a request and returns what is answered. Its body is a reader's contents, or anything else as JSON.
func (d *docker) call(method, path string, body any) []byte {
	d.t.Helper()
	content, ok := body.(io.Reader)
	kind := "application/x-tar"
	if !ok && body != nil {
		text, err := json.Marshal(body)
		d.must(err)
		content, kind = bytes.NewReader(text), "application/json"
	}
	request, err := http.NewRequestWithContext(d.ctx, method, "http://docker"+path, content)
	d.must(err)
	if body != nil {
		request.Header.Set("Content-Type", kind)
	}
	answer, err := d.http.Do(request)
	d.must(err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	d.must(err)
	if answer.StatusCode >= 300 {
		d.t.Fatalf("docker: %s %s: %s: %s", method, path, answer.Status, text)
	}
	return text
}

// read is call, and decodes what is answered.
func read[T any](d *docker, method, path string, body any) (v T) {
	d.t.Helper()
	text := d.call(method, path, body)
	if err := json.Unmarshal(text, &v); err != nil {
		d.t.Fatalf("docker: %s %s: %v: %s", method, path, err, text)
	}
	return v
}

type created struct{ ID string }

// run starts a container that does nothing, and checks that its root filesystem is Lamina's.
func (d *docker) run(image string) string {
	d.t.Helper()
	id := read[created](d, "POST", "/containers/create", map[string]any{
		"Image": image, "Cmd": []string{"sleep", "1000000"}, "HostConfig": map[string]any{"NetworkMode": "none"}}).ID
	d.call("POST", "/containers/"+id+"/start", nil)
	c := read[struct{ State struct{ Pid int } }](d, "GET", "/containers/"+id+"/json", nil)
	var st unix.Statfs_t
	d.must(unix.Statfs(fmt.Sprintf("/proc/%d/root", c.State.Pid), &st))
	if st.Type != unix.FUSE_SUPER_MAGIC {
		d.t.Fatalf("the container's root filesystem is of type %#x", st.Type)
	}
	return id
}

// prints fails the test unless a script in a container succeeds and prints what it should.
func (d *docker) prints(id, script, want string) {
	d.t.Helper()
	e := read[created](d, "POST", "/containers/"+id+"/exec", map[string]any{
		"Cmd": []string{"/bin/sh", "-ec", script}, "AttachStdout": true, "AttachStderr": true, "Tty": true}).ID
	out := d.call("POST", "/exec/"+e+"/start", map[string]any{"Tty": true})
	status := read[struct{ ExitCode int }](d, "GET", "/exec/"+e+"/json", nil)
	if got := strings.TrimSpace(strings.ReplaceAll(string(out), "\r\n", "\n")); got != want || status.ExitCode != 0 {
		d.t.Errorf("%s: exit status %d, %q, not %q", script, status.ExitCode, got, want)
	}
}

// changes is what `docker diff` says.
func (d *docker) changes(id string) string {
	d.t.Helper()
	var lines []string
	for _, c := range read[[]struct {
		Path string
		Kind int
	}](d, "GET", "/containers/"+id+"/changes", nil) {
		lines = append(lines, "CAD"[c.Kind:c.Kind+1]+" "+c.Path)
	}
	return strings.Join(lines, "\n")
}

// Docker Engine's containers on Lamina: an image is loaded, runs, is written to, compared, committed and built upon, and
// nothing is left when all is removed.
func TestDocker(t *testing.T) {
	if *dockerd == "" {
		t.Fatal("-dockerd names no Docker Engine: make docker")
	}
	r := start(t, engine.Config{})
	d := r.startDocker()
	info := read[struct {
		Driver       string
		DriverStatus [][2]string
	}](d, "GET", "/info", nil)
	if got, want := fmt.Sprint(info), "{lamina [[driver-type io.containerd.snapshotter.v1]]}"; got != want {
		t.Errorf("docker info: %s, not %s", got, want)
	}
	l, err := layers()
	r.must(err)
	archive, w := io.Pipe()
	go func() { w.CloseWithError(engine.WriteArchive(w, "debian.test/base:1", []string{"/bin/sh"}, l...)) }()
	d.call("POST", "/images/load", archive)

	first := d.run("debian.test/base:1")
	d.prints(first, "cat /srv/tree/deep/b; id -u", "b\n0")
	if got := d.changes(first); got != "" {
		t.Errorf("docker diff of a new container:\n%s", got)
	}
	d.prints(first, `printf XYZ | dd of=/srv/big.log bs=1 seek=5000000 conv=notrunc,fsync 2>/dev/null
		echo two >>/srv/tree/a; rm /srv/moved; mkdir /srv/new; mv /srv/tree/deep /srv/new/deep; chown 7:8 /srv/locked/secret`, "")
	const changed = `C /srv
C /srv/big.log
D /srv/moved
A /srv/new
A /srv/new/deep
A /srv/new/deep/b
C /srv/linked
C /srv/tree
C /srv/tree/a
D /srv/tree/deep
C /srv/locked
C /srv/locked/secret`
	if got := d.changes(first); !sameLines(got, changed) {
		t.Errorf("docker diff:\n%s\nnot\n%s", got, changed)
	}

	// Committed while it runs, as docker commit does.
	d.call("POST", "/commit?container="+first+"&repo=debian.test/committed&tag=1", map[string]any{})
	d.prints(first, "echo three >>/srv/tree/a; cat /srv/linked", "a\ntwo\nthree")
	second := d.run("debian.test/committed:1")
	d.prints(second, "cat /srv/new/deep/b /srv/linked; ls -1 /srv; stat -c '%u %g' /srv/locked/secret", "b\na\ntwo\nbig.log\nlinked\nlocked\nnew\npointer\ntree\n7 8")
	d.prints(second, "dd if=/srv/big.log bs=1 skip=5000000 count=3 2>/dev/null; wc -c </srv/big.log", fmt.Sprintf("XYZ%d", bigSize))

	d.build("debian.test/built:1", "FROM debian.test/committed:1\nRUN echo built >/srv/built && rm /srv/new/deep/b\nRUN echo four >>/srv/tree/a\n")
	third := d.run("debian.test/built:1")
	d.prints(third, "cat /srv/built /srv/linked; ls /srv/new/deep", "built\na\ntwo\nfour")

	// Stopped and started again, a container keeps what it wrote.
	d.call("POST", "/containers/"+first+"/restart?t=0", nil)
	d.prints(first, "cat /srv/tree/a", "a\ntwo\nthree")

	for _, id := range []string{first, second, third} {
		d.call("DELETE", "/containers/"+id+"?force=true", nil)
	}
	for _, name := range []string{"built", "committed", "base"} {
		d.call("DELETE", "/images/debian.test/"+name+":1", nil)
	}
	r.eventually("the snapshots are gone", func() bool {
		n := 0
		ctx := namespaces.WithNamespace(r.ctx, "moby")
		r.must(r.Client.SnapshotService(engine.Lamina).Walk(ctx, func(context.Context, snapshots.Info) error {
			n++
			return nil
		}))
		return n == 0
	})
}

// build builds an image of a Dockerfile, with the engine's own builder.
func (d *docker) build(name, file string) {
	d.t.Helper()
	var context bytes.Buffer
	w := tar.NewWriter(&context)
	d.must(w.WriteHeader(&tar.Header{Name: "Dockerfile", Mode: 0o644, Size: int64(len(file))}))
	_, err := io.WriteString(w, file)
	d.must(err)
	d.must(w.Close())
	out := d.call("POST", "/build?networkmode=none&rm=1&forcerm=1&t="+url.QueryEscape(name), &context)
	if bytes.Contains(out, []byte(`"errorDetail"`)) {
		d.t.Fatalf("docker build: %s", out)
	}
}

func sameLines(a, b string) bool {
	count := map[string]int{}
	for line := range strings.SplitSeq(a, "\n") {
		count[line]++
	}
	for line := range strings.SplitSeq(b, "\n") {
		count[line]--
	}
	for _, n := range count {
		if n != 0 {
			return false
		}
	}
	return true
}
