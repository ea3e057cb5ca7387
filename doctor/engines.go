package doctor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// tree is a configuration: tables in tables, of any types.
type tree map[string]any

// table is the table at a path, nil if there is none. An error names what is there instead.
func (t tree) table(path ...string) (tree, error) {
	for i, key := range path {
		v, ok := t[key]
		if !ok {
			return nil, nil
		}
		sub, ok := v.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("%s is not a table", strings.Join(path[:i+1], "."))
		}
		t = sub
	}
	return t, nil
}

// text is the string at a path, "" if there is none.
func (t tree) text(path ...string) (string, error) {
	sub, err := t.table(path[:len(path)-1]...)
	if err != nil || sub == nil {
		return "", err
	}
	v, ok := sub[path[len(path)-1]]
	if !ok {
		return "", nil
	}
	s, ok := v.(string)
	if !ok {
		return "", fmt.Errorf("%s is not a string", strings.Join(path, "."))
	}
	return s, nil
}

// parseTOML reads a configuration.
func parseTOML(b []byte) (tree, error) {
	t := tree{}
	if err := toml.Unmarshal(b, &t); err != nil {
		return nil, err
	}
	return t, nil
}

// unreadable is a configuration file that cannot be taken as one.
func unreadable(check string, err error) Finding {
	return Finding{check, Broken, err.Error(), "the engine does not start with it, or not as it says", "correct the file"}
}

// absent is an engine that is not here.
func absent(check, engine string) []Finding {
	return []Finding{{Check: check, Level: OK, Found: engine + " is not installed"}}
}

// containerd

// proxyPlugin is what containerd's configuration says of a plugin in another process.
type proxyPlugin struct{ name, kind, address string }

// containerdConf is what Lamina needs to know of containerd's configuration.
type containerdConf struct {
	proxies  []proxyPlugin
	socket   string
	cri      string // the snapshotter of Kubernetes's pods, if it is set
	disabled []string
	cniBins  []string // where pods' network plugins are, if it is set
	cniConf  string   // and their configuration
}

// maxImports bounds how many files a configuration may consist of.
const maxImports = 100

// loadContainerd reads a configuration with what it imports; later files win.
func loadContainerd(m *machine, path string) (containerdConf, error) {
	var c containerdConf
	seen := map[string]bool{}
	queue := []string{path}
	for len(queue) > 0 {
		path, queue = queue[0], queue[1:]
		if seen[path] {
			continue
		}
		if seen[path] = true; len(seen) > maxImports {
			return c, fmt.Errorf("%s: it imports more than %d files", path, maxImports)
		}
		b, err := m.read(path)
		if err != nil {
			return c, err
		}
		imports, err := c.add(b)
		if err != nil {
			return c, fmt.Errorf("%s: %w", path, err)
		}
		for _, pattern := range imports {
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(path), pattern)
			}
			found, err := filepath.Glob(m.path(pattern))
			if err != nil {
				return c, fmt.Errorf("%s: imports %q: %w", path, pattern, err)
			}
			for _, f := range found {
				queue = append(queue, strings.TrimPrefix(f, strings.TrimSuffix(m.root, "/")))
			}
		}
	}
	return c, nil
}

// add takes one file in and returns the patterns of those that it imports.
func (c *containerdConf) add(b []byte) (imports []string, err error) {
	t, err := parseTOML(b)
	if err != nil {
		return nil, err
	}
	proxies, err := t.table("proxy_plugins")
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(proxies)) {
		kind, err1 := t.text("proxy_plugins", name, "type")
		address, err2 := t.text("proxy_plugins", name, "address")
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		c.proxies = slices.DeleteFunc(c.proxies, func(p proxyPlugin) bool { return p.name == name })
		c.proxies = append(c.proxies, proxyPlugin{name, kind, address})
	}
	// Version 2 of the configuration, and version 3.
	for _, path := range [][]string{{"plugins", "io.containerd.grpc.v1.cri", "containerd", "snapshotter"}, {"plugins", "io.containerd.cri.v1.images", "snapshotter"}} {
		s, err := t.text(path...)
		if err != nil {
			return nil, err
		}
		if s != "" {
			c.cri = s
		}
	}
	for _, path := range [][]string{{"plugins", "io.containerd.grpc.v1.cri", "cni"}, {"plugins", "io.containerd.cri.v1.runtime", "cni"}} {
		cni, err := t.table(path...)
		if err != nil {
			return nil, err
		}
		dir, _ := cni["bin_dir"].(string)
		if dirs := append(stringsOf(cni["bin_dirs"]), dir); first(dirs...) != "" {
			c.cniBins = slices.DeleteFunc(dirs, func(d string) bool { return d == "" })
		}
		if dir, _ := cni["conf_dir"].(string); dir != "" {
			c.cniConf = dir
		}
	}
	socket, err := t.text("grpc", "address")
	if err != nil {
		return nil, err
	}
	if socket != "" {
		c.socket = socket
	}
	c.disabled = append(c.disabled, stringsOf(t["disabled_plugins"])...)
	return stringsOf(t["imports"]), nil
}

// stringsOf are the strings of a list; anything else is none.
func stringsOf(v any) []string {
	list, _ := v.([]any)
	var out []string
	for _, e := range list {
		if s, ok := e.(string); ok {
			out = append(out, s)
		}
	}
	return out
}

const dropIn = "see /usr/share/doc/lamina/examples/containerd"

func containerdChecks(m *machine, opt Options) []Finding {
	path := first(opt.ContainerdConfig, "/etc/containerd/config.toml")
	program := m.program("containerd")
	if program == "" && !m.exists(path) {
		return absent("containerd", "containerd")
	}
	var all []Finding
	if program != "" {
		all = append(all, containerdVersion(m, program))
	}
	c, err := loadContainerd(m, path)
	if errors.Is(err, fs.ErrNotExist) && opt.ContainerdConfig == "" {
		f := Finding{"containerd-plugin", Note, path + " does not exist: containerd runs with its defaults", "containers do not use Lamina", "create it: " + dropIn}
		return append(all, f)
	}
	if err != nil {
		return append(all, unreadable("containerd-plugin", err))
	}
	all = append(all, proxyChecks(m, path, &c)...)
	socket := first(opt.ContainerdSocket, c.socket, "/run/containerd/containerd.sock")
	if program != "" {
		f := Finding{Check: "containerd-socket", Found: "containerd answers on " + socket}
		if err := m.dial(socket); err != nil {
			f.Level, f.Found, f.Fix = Note, "containerd does not answer: "+err.Error(), "systemctl start containerd"
		}
		all = append(all, f)
	}
	return all
}

func containerdVersion(m *machine, program string) Finding {
	line := m.version(program)
	f := Finding{Check: "containerd", Found: line}
	major, minor, ok := numbers(line)
	switch {
	case !ok:
		f.Level, f.Found, f.Fix = Note, fmt.Sprintf("%s --version says %q", program, line), "Lamina is made for containerd 1.6, 1.7 and 2"
	case major < 1 || major == 1 && minor < 6:
		f.Level, f.Cost, f.Fix = Broken, "Lamina is not made for it", "use containerd 1.6 or later"
	case major > 2:
		f.Level, f.Cost = Note, "Lamina knows containerd 1.6, 1.7 and 2"
	}
	return f
}

// proxyChecks looks for a snapshotter of ours among the plugins in other processes, and for who answers there.
func proxyChecks(m *machine, path string, c *containerdConf) []Finding {
	i := slices.IndexFunc(c.proxies, func(p proxyPlugin) bool {
		return p.name == "lamina" || strings.Contains(filepath.Base(p.address), "lamina") || strings.Contains(p.address, "/lamina/")
	})
	if i < 0 {
		f := Finding{Check: "containerd-plugin", Level: Note, Found: path + " has no [proxy_plugins.lamina]", Cost: "containers do not use Lamina", Fix: dropIn}
		if c.cri == "lamina" {
			f.Level, f.Cost = Broken, "pods cannot start: the CRI plugin asks for the snapshotter lamina"
		}
		return []Finding{f}
	}
	p := c.proxies[i]
	f := Finding{Check: "containerd-plugin", Found: fmt.Sprintf("%s has the snapshotter %q on %s", path, p.name, p.address)}
	switch {
	case p.kind != "snapshot":
		f.Level, f.Found = Broken, fmt.Sprintf("%s: proxy_plugins.%s has the type %q", path, p.name, p.kind)
		f.Cost, f.Fix = "containerd does not take it for a snapshotter", `type = "snapshot"`
	case !filepath.IsAbs(p.address):
		f.Level, f.Found = Broken, fmt.Sprintf("%s: proxy_plugins.%s has the address %q", path, p.name, p.address)
		f.Cost, f.Fix = "containerd cannot reach it", `address = "/run/lamina/snapshotter.sock"`
	}
	all := []Finding{f}
	if f.Level == Broken {
		return all
	}
	s := Finding{Check: "snapshotter-socket", Found: "the snapshotter answers on " + p.address}
	if err := m.dial(p.address); err != nil {
		s.Level, s.Found = Broken, "the snapshotter does not answer: "+err.Error()
		s.Cost, s.Fix = "containerd refuses the snapshotter "+p.name, "systemctl start lamina-snapshotter"
	}
	all = append(all, s)
	cri := Finding{Check: "containerd-cri", Found: "pods use the snapshotter " + c.cri}
	switch {
	case slices.ContainsFunc(c.disabled, func(d string) bool { return d == "cri" || strings.HasSuffix(d, ".cri") }):
		cri.Found = "the CRI plugin is switched off"
	case c.cri != p.name:
		cri.Level, cri.Found = Note, fmt.Sprintf("the CRI plugin's snapshotter is %q", first(c.cri, "overlayfs"))
		cri.Cost, cri.Fix = "Kubernetes's pods do not use Lamina; ctr and nerdctl do with --snapshotter "+p.name, dropIn
	}
	return append(all, cri)
}

// Podman, Buildah, CRI-O

func podmanChecks(m *machine, opt Options) []Finding {
	program := m.program("podman")
	path := opt.StorageConf
	for _, p := range []string{"/etc/containers/storage.conf", "/usr/share/containers/storage.conf"} {
		if path == "" && m.exists(p) {
			path = p
		}
	}
	if program == "" && path == "" {
		return absent("podman", "Podman")
	}
	var all []Finding
	if program != "" {
		all = append(all, podmanVersion(m, program))
	}
	const example = "see /usr/share/doc/lamina/examples/storage.conf"
	if path == "" {
		return append(all, Finding{"podman-storage", Note, "there is no /etc/containers/storage.conf", "Podman does not use Lamina", example})
	}
	b, err := m.read(path)
	var t tree
	if err == nil {
		if t, err = parseTOML(b); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	if err != nil {
		return append(all, unreadable("podman-storage", err))
	}
	return append(all, storageChecks(m, path, t, example))
}

func podmanVersion(m *machine, program string) Finding {
	line := m.version(program)
	f := Finding{Check: "podman", Found: line}
	if major, _, ok := numbers(line); !ok || major < 4 {
		f.Level, f.Cost = Note, "Lamina is tested with Podman 4.3 and later"
	}
	return f
}

func storageChecks(m *machine, path string, t tree, example string) Finding {
	driver, err := t.text("storage", "driver")
	program, err2 := t.text("storage", "options", "overlay", "mount_program")
	old, err3 := t.text("storage", "options", "mount_program")
	if err := errors.Join(err, err2, err3); err != nil {
		return unreadable("podman-storage", fmt.Errorf("%s: %w", path, err))
	}
	program = first(program, old)
	f := Finding{Check: "podman-storage", Found: fmt.Sprintf("%s mounts with %s", path, program)}
	real, err := filepath.EvalSymlinks(m.path(program))
	st, statErr := os.Stat(real)
	switch {
	case program == "":
		f.Level, f.Found, f.Cost, f.Fix = Note, path+" has no mount_program", "Podman does not use Lamina", example
	case err != nil || statErr != nil:
		f.Level, f.Found = Broken, fmt.Sprintf("%s: mount_program %s does not exist", path, program)
		f.Cost, f.Fix = "Podman cannot start containers", "name lamina's path: "+example
	case !st.Mode().IsRegular() || st.Mode()&0o111 == 0:
		f.Level, f.Found = Broken, fmt.Sprintf("%s: mount_program %s is not a program", path, program)
		f.Cost, f.Fix = "Podman cannot start containers", "name lamina's path: "+example
	case filepath.Base(real) != "lamina":
		f.Level, f.Cost, f.Fix = Note, "Podman does not use Lamina", example
	case driver != "overlay" && driver != "":
		f.Level, f.Found = Broken, fmt.Sprintf("%s: the driver is %q, and mount_program belongs to overlay", path, driver)
		f.Cost, f.Fix = "Podman does not use Lamina", `driver = "overlay"; podman system reset if there are images of the other driver`
	}
	return f
}

// Docker

func dockerChecks(m *machine, opt Options) []Finding {
	path := first(opt.DaemonJSON, "/etc/docker/daemon.json")
	program := m.program("dockerd")
	if program == "" && !m.exists(path) {
		return absent("docker", "Docker Engine")
	}
	var all []Finding
	if program != "" {
		all = append(all, Finding{Check: "docker", Found: m.version(program)})
	}
	const example = "see /usr/share/doc/lamina/examples/daemon.json"
	b, err := m.read(path)
	if errors.Is(err, fs.ErrNotExist) && opt.DaemonJSON == "" {
		return append(all, Finding{"docker-storage", Note, path + " does not exist", "Docker does not use Lamina", example})
	}
	if err != nil {
		return append(all, unreadable("docker-storage", err))
	}
	return append(all, daemonChecks(path, b, example))
}

func daemonChecks(path string, b []byte, example string) Finding {
	var conf struct {
		Driver   string         `json:"storage-driver"`
		Features map[string]any `json:"features"`
	}
	if err := json.Unmarshal(bytes.TrimSpace(b), &conf); err != nil {
		return unreadable("docker-storage", fmt.Errorf("%s: %w", path, err))
	}
	f := Finding{Check: "docker-storage", Found: path + " uses containerd's image store with the snapshotter lamina"}
	on, set := conf.Features["containerd-snapshotter"].(bool)
	switch {
	case conf.Driver != "lamina":
		f.Level, f.Found = Note, fmt.Sprintf("%s: the storage driver is %q", path, first(conf.Driver, "overlay2 or overlayfs"))
		f.Cost, f.Fix = "Docker does not use Lamina", example
	case !set || !on:
		f.Level, f.Found = Broken, path+": the storage driver is lamina, but containerd's image store is not switched on"
		f.Cost, f.Fix = "Docker Engine before version 29 does not start", `"features": {"containerd-snapshotter": true}`
	}
	return f
}

func first(words ...string) string {
	for _, w := range words {
		if w != "" {
			return w
		}
	}
	return ""
}
