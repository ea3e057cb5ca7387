package inventory

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"lamina/pool"

	"github.com/moby/sys/mountinfo"
)

const layerID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestOfContainerd(t *testing.T) {
	const table = `30 24 0:52 / /var/lib/lamina/snapshots/7/mnt rw - fuse.lamina lamina rw
31 24 0:52 / /run/containerd/io.containerd.runtime.v2.task/k8s.io/abc/rootfs rw - fuse.lamina lamina rw
32 24 0:53 / /run/k3s/containerd/io.containerd.runtime.v2.task/default/other\040one/rootfs rw - fuse.lamina lamina rw
33 24 0:54 / /srv/mnt rw - fuse.lamina lamina rw
34 24 0:55 / /run/containerd/io.containerd.runtime.v2.task/ns/id/rootfs/below rw - fuse.lamina lamina rw
`
	list, err := mountinfo.GetMountsFromReader(strings.NewReader(table), nil)
	if err != nil {
		t.Fatal(err)
	}
	for device, want := range map[string]string{"0:52": "k8s.io/abc", "0:53": "default/other one", "0:54": "", "0:55": "", "0:99": ""} {
		c := ofContainerd(&pool.Status{Device: device}, list)
		if c.String() != want || c != nil && c.Engine != "containerd" {
			t.Errorf("%s: %+v, want %q", device, c, want)
		}
	}
	// The snapshotter's word: beside the bundle's, and alone.
	for device, want := range map[string]Container{"0:52": {"containerd", "k8s.io", "abc", "", "key"}, "0:54": {"containerd", "ns", "key", "", "key"}} {
		if c := ofContainerd(&pool.Status{Device: device, Container: "ns/key"}, list); c == nil || *c != want {
			t.Errorf("%s: %+v, want %+v", device, c, want)
		}
	}
}

func TestOfPodman(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		dir := filepath.Join(root, "overlay-containers")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	other := strings.Repeat("f", 64)
	write("containers.json", `[{"id":"c1","names":["web","alias"],"layer":"`+layerID+`","image":"i"},{"id":"c2","layer":"none"}]`)
	write("volatile-containers.json", `[{"id":"`+other+`","layer":"`+other+`"}]`)
	for mnt, want := range map[string]string{
		root + "/overlay/" + layerID + "/merged": "web",
		root + "/overlay/" + other + "/merged":   strings.Repeat("f", 12),
		root + "/overlay/" + layerID + "/diff":   "",
		"/srv/overlay/short/merged":              "",
		"/nowhere/overlay/" + other + "/merged":  "",
	} {
		c, err := ofPodman(mnt, map[string]map[string]Container{})
		if err != nil || c.String() != want {
			t.Errorf("%s: %+v %v, want %q", mnt, c, err, want)
		}
	}
	write("containers.json", `{"id": 7}`)
	c, err := ofPodman(root+"/overlay/"+other+"/merged", map[string]map[string]Container{})
	if err == nil || !strings.Contains(err.Error(), "containers.json") || c == nil {
		t.Errorf("one broken list: %+v %v", c, err)
	}
}

// A mount is one object in JSON: the server's words, and whose it is.
func TestJSON(t *testing.T) {
	b, err := json.Marshal(Mount{Status: pool.Status{Mountpoint: "/m"}, Container: &Container{Engine: "podman", ID: "x"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"mountpoint":"/m"`, `"container":{"engine":"podman","id":"x"}`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s lacks %s", b, want)
		}
	}
}

func FuzzStore(f *testing.F) {
	f.Add([]byte(`[{"id":"c1","names":["web"],"layer":"l"}]`))
	f.Fuzz(func(_ *testing.T, b []byte) { _ = parseStore(b, map[string]Container{}) })
}
