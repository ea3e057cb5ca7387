package containerd

import (
	"context"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"lamina/bench/engine"
)

const pause = "lamina.test/pause:1"

// example is the example configuration for the containerd under test, and whether it goes into a file of its own.
func example(t *testing.T) (words string, imported bool) {
	t.Helper()
	out, err := exec.Command(filepath.Join(*bin, "containerd"), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	imported = strings.Contains(string(out), "github.com/containerd/containerd/v2 ")
	file := "containerd-1.toml"
	if imported {
		file = "containerd-2.toml"
	}
	text, err := os.ReadFile(filepath.Join("../../deploy/examples/containerd", file))
	if err != nil {
		t.Fatal(err)
	}
	words = string(text)
	if !imported { // it is a part of a file that has its version
		words = strings.Replace(words, "version = 2\n", "", 1)
	}
	return words, imported
}

// A kubelet's dealings with containerd, which is configured as the examples say: an image pulled, a pod on the host's network, a container in it, a program run in that, statistics, and
// everything removed, the image with its snapshots too.
func TestCRI(t *testing.T) {
	each(t, func(t *testing.T, s string) {
		cfg := engine.Config{CRI: true, Default: s, Pause: pause}
		if s == engine.Lamina {
			cfg.Words, cfg.Imported = example(t)
		}
		r := start(t, cfg)
		conn, err := grpc.NewClient("unix://"+r.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		r.must(err)
		defer conn.Close()
		k, images := cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()

		status, err := k.Status(ctx, &cri.StatusRequest{})
		r.must(err)
		for _, c := range status.Status.Conditions {
			if c.Type == "RuntimeReady" && !c.Status {
				t.Fatalf("the runtime is not ready: %s", c.Message)
			}
		}
		l, err := layers()
		r.must(err)
		i, err := r.Import(r.ctx, pause, []string{"/bin/sleep", "1000000"}, l[:1]...)
		r.must(err)
		r.must(i.Unpack(r.ctx, s))
		r.eventually("the CRI knows the sandbox's image", func() bool { // it learns of it by an event
			a, err := images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: pause}})
			r.must(err)
			return a.Image != nil
		})
		handler, err := engine.Registry([]string{"/bin/sleep", "1000000"}, l...)
		r.must(err)
		registry := httptest.NewServer(handler)
		defer registry.Close()
		spec := &cri.ImageSpec{Image: registry.Listener.Addr().String() + "/base:1"}
		_, err = images.PullImage(ctx, &cri.PullImageRequest{Image: spec})
		r.must(err)

		logs := t.TempDir()
		pod := &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: "pod", Uid: "uid", Namespace: "ns"}, LogDirectory: logs,
			Linux: &cri.LinuxPodSandboxConfig{CgroupParent: r.Cgroup, SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}}},
		}
		box, err := k.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod})
		r.must(err)
		made, err := k.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: box.PodSandboxId, SandboxConfig: pod, Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"}, Image: spec, LogPath: "c.log",
			Command: []string{"sh", "-c", "echo up; exec sleep 1000000"},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}}},
		}})
		r.must(err)
		_, err = k.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.ContainerId})
		r.must(err)
		r.eventually("the container has logged", func() bool {
			log, err := os.ReadFile(filepath.Join(logs, "c.log"))
			return err == nil && strings.Contains(string(log), "up")
		})
		sh := func(script, want string) {
			t.Helper()
			a, err := k.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: made.ContainerId, Cmd: []string{"sh", "-ec", script}, Timeout: 60})
			r.must(err)
			if got := strings.TrimSpace(string(a.Stdout)); a.ExitCode != 0 || got != want {
				t.Errorf("%s: exit status %d, %q, %s; want %q", script, a.ExitCode, got, a.Stderr, want)
			}
		}
		sh("cat /srv/tree/deep/b", "b")
		sh("printf XYZ | dd of=/srv/big.log bs=1 seek=5000000 conv=notrunc 2>/dev/null; dd if=/srv/big.log bs=1 skip=5000000 count=3 2>/dev/null", "XYZ")
		sh("rm /srv/moved; ls /srv", "big.log\nlinked\nlocked\npointer\ntree")

		// The statistics are gathered every ten seconds, and the image filesystem's need to know whose it is.
		r.eventually("statistics tell of the image's bytes", func() bool {
			info, err := images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
			r.must(err)
			return len(info.ImageFilesystems) > 0 && info.ImageFilesystems[0].UsedBytes.GetValue() > bigSize
		})
		r.eventually("statistics tell of the container's bytes", func() bool {
			a, err := k.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: made.ContainerId})
			r.must(err)
			return a.Stats.GetWritableLayer().GetUsedBytes().GetValue() > 0
		})

		_, err = k.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: made.ContainerId})
		r.must(err)
		_, err = k.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: made.ContainerId})
		r.must(err)
		_, err = k.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: box.PodSandboxId})
		r.must(err)
		_, err = k.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: box.PodSandboxId})
		r.must(err)
		_, err = images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: spec})
		r.must(err)
		r.eventually("the image's snapshots are gone", func() bool {
			names, err := r.SnapshotNames(r.ctx, s)
			r.must(err)
			return len(names) == 1 // the pause image's
		})
		a, err := images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: spec})
		r.must(err)
		if a.Image != nil {
			t.Errorf("the image is still there: %v", a.Image.RepoTags)
		}
	})
}
