// Package inventory says which mounts there are on this machine, and which containers they belong to.
//
// They are found from what the engines leave in the mount table and in their files: containerd's runtime binds the mount to a
// directory that names the container, and Podman's store keeps the name of a container beside that of its layer. A server that
// mounts for the snapshotter also knows the key of the snapshot.
package inventory

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"lamina/pool"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mount is what the server of a mount tells, and whose the mount is.
type Mount struct {
	pool.Status
	Container *Container `json:"container,omitempty"` // nil: nobody's that is known
}

// Container is who uses a mount.
type Container struct {
	Engine    string `json:"engine"`              // containerd or podman
	Namespace string `json:"namespace,omitempty"` // containerd's
	ID        string `json:"id"`
	Name      string `json:"name,omitempty"`
	Snapshot  string `json:"snapshot,omitempty"` // the key of containerd's snapshot
}

func (c *Container) String() string {
	if c == nil {
		return ""
	}
	s := c.ID
	if isLongID(s) {
		s = s[:12] // as engines show them
	}
	if c.Name != "" {
		s = c.Name
	}
	if c.Namespace != "" {
		s = c.Namespace + "/" + s
	}
	return s
}

var longID = regexp.MustCompile(`^[0-9a-f]{64}$`)

func isLongID(s string) bool { return longID.MatchString(s) }

// Mounts lists the mounts on mnt, or all mounts if mnt is empty. What a server or a file fails to tell is joined into the
// error; the other mounts are returned all the same.
func Mounts(mnt string) ([]Mount, error) {
	all, err := pool.MountsOn(mnt)
	if len(all) == 0 {
		return nil, err
	}
	table, tableErr := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return !strings.HasPrefix(i.FSType, "fuse.lamina"), false })
	mounts := make([]Mount, len(all))
	stores := map[string]map[string]Container{}
	for i, st := range all {
		mounts[i] = Mount{Status: st, Container: ofContainerd(&st, table)}
		if mounts[i].Container != nil {
			continue
		}
		c, podmanErr := ofPodman(st.Mountpoint, stores)
		err = errors.Join(err, podmanErr)
		mounts[i].Container = c
	}
	return mounts, errors.Join(err, tableErr)
}

// bundle is where containerd's runtime binds a container's root filesystem: STATE/io.containerd.runtime.v2.task/NAMESPACE/ID/rootfs.
var bundle = regexp.MustCompile(`/io\.containerd\.runtime\.v[0-9]+\.[a-z]+/([^/]+)/([^/]+)/rootfs$`)

// ofContainerd looks for a bundle among the places where the mount is to be seen. Without one it is whose snapshot it is.
func ofContainerd(st *pool.Status, table []*mountinfo.Info) *Container {
	namespace, key, known := strings.Cut(st.Container, "/") // from the snapshotter
	for _, m := range table {
		if fmt.Sprintf("%d:%d", m.Major, m.Minor) != st.Device {
			continue
		}
		if part := bundle.FindStringSubmatch(m.Mountpoint); part != nil {
			return &Container{Engine: "containerd", Namespace: part[1], ID: part[2], Snapshot: key}
		}
	}
	if known { // nothing runs in it now
		return &Container{Engine: "containerd", Namespace: namespace, ID: key, Snapshot: key}
	}
	return nil
}

// merged is where containers/storage mounts a container's layer: ROOT/overlay/LAYER/merged.
var merged = regexp.MustCompile(`^(.*)/overlay/([0-9a-f]{64})/merged$`)

// ofPodman looks a layer up in the store that it is in. stores keeps what was read, by the store's root.
func ofPodman(mnt string, stores map[string]map[string]Container) (*Container, error) {
	part := merged.FindStringSubmatch(mnt)
	if part == nil {
		return nil, nil
	}
	root, layer := part[1], part[2]
	byLayer, known := stores[root]
	var err error
	if !known {
		byLayer, err = readStore(root)
		stores[root] = byLayer
	}
	if c, ok := byLayer[layer]; ok {
		return &c, err
	}
	return nil, err
}

// maxStore bounds what is read of a store's list, in bytes; a container takes about a thousand.
const maxStore = 64 << 20

// readStore reads the containers of a store by their layers. Those that do not outlive a boot are in a list of their own.
func readStore(root string) (map[string]Container, error) {
	byLayer := map[string]Container{}
	var failed error
	lists := []string{root + "/overlay-containers/containers.json", root + "/overlay-containers/volatile-containers.json",
		"/run/containers/storage/overlay-containers/volatile-containers.json"}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		lists = append(lists, dir+"/containers/overlay-containers/volatile-containers.json")
	}
	for _, list := range lists {
		b, err := readBounded(list)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || err == nil && len(b) == 0 {
			continue // another user's, or one to which nothing has been written yet
		}
		if err == nil {
			err = parseStore(b, byLayer)
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", list, err))
		}
	}
	return byLayer, failed
}

func readBounded(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), filepath.Base(path))
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxStore+1))
	if err == nil && len(b) > maxStore {
		err = fmt.Errorf("more than %d bytes", maxStore)
	}
	return b, err
}

func parseStore(b []byte, byLayer map[string]Container) error {
	var list []struct {
		ID    string   `json:"id"`
		Names []string `json:"names"`
		Layer string   `json:"layer"`
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return err
	}
	for _, c := range list {
		entry := Container{Engine: "podman", ID: c.ID}
		if len(c.Names) > 0 {
			entry.Name = c.Names[0]
		}
		byLayer[c.Layer] = entry
	}
	return nil
}
