package doctor

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sound is a machine that lacks nothing, engines aside.
var sound = map[string]string{
	"/proc/sys/kernel/osrelease":               "6.18.1\n",
	"/proc/sys/kernel/io_uring_disabled":       "0\n",
	"/proc/sys/fs/nr_open":                     "1048576\n",
	"/proc/sys/fs/fuse/max_pages_limit":        "256\n",
	"/proc/filesystems":                        "nodev\tproc\n\text4\nnodev\toverlay\n",
	"/proc/self/status":                        "Name:\tlamina\nCapEff:\t000001ffffffffff\n",
	"/proc/self/limits":                        "Limit                     Soft Limit           Hard Limit           Units     \nMax open files            1024                 1048576              files     \n",
	"/sys/module/fuse/parameters/enable_uring": "Y\n",
	"/sys/module/overlay/parameters/xino_auto": "Y\n",
}

// fake is a machine in a directory: sound, but for the files of changed; "" removes one.
func fake(t *testing.T, changed map[string]string) string {
	t.Helper()
	root := t.TempDir()
	files := map[string]string{}
	for _, m := range []map[string]string{sound, changed} {
		for path, text := range m {
			files[path] = text
		}
	}
	for path, text := range files {
		if text == "" {
			continue
		}
		put(t, root+path, text, 0o644)
	}
	must(t, os.MkdirAll(root+"/dev", 0o755))
	must(t, unix.Mknod(root+"/dev/fuse", unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))))
	return root
}

func put(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), mode))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// find returns the finding of a check, which must be there once.
func find(t *testing.T, all []Finding, check string) Finding {
	t.Helper()
	var found []Finding
	for _, f := range all {
		if f.Check == check {
			found = append(found, f)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d findings of %s: %+v", len(found), check, all)
	}
	return found[0]
}

// wellFormed: what is not ok says what it costs or how to fix it, in one line each.
func wellFormed(t *testing.T, all []Finding) {
	t.Helper()
	for _, f := range all {
		if f.Check == "" || f.Found == "" || f.Level > Note && (f.Cost == "" || f.Fix == "") || strings.Contains(f.Found+f.Cost+f.Fix, "\n") && f.Level != Broken {
			t.Errorf("half a finding: %+v", f)
		}
	}
}

func TestSoundMachine(t *testing.T) {
	all := Run(Options{Root: fake(t, nil)})
	wellFormed(t, all)
	for _, f := range all {
		if f.Level != OK {
			t.Errorf("%+v", f)
		}
	}
}

func TestMachines(t *testing.T) {
	const fuseOff = "/sys/module/fuse/parameters/enable_uring"
	unprivileged := "CapEff:\t0000000000000000\n"
	for name, c := range map[string]struct {
		changed map[string]string
		check   string
		level   Level
		says    string
	}{
		"old kernel":         {map[string]string{"/proc/sys/kernel/osrelease": "5.10.0-9-amd64"}, "kernel", Broken, "5.11"},
		"no passthrough":     {map[string]string{"/proc/sys/kernel/osrelease": "6.1.0-18-amd64"}, "passthrough", Costs, "6.9"},
		"built without":      {map[string]string{"/boot/config-6.18.1": "# CONFIG_FUSE_PASSTHROUGH is not set\n"}, "passthrough", Costs, "CONFIG_FUSE_PASSTHROUGH"},
		"built with":         {map[string]string{"/boot/config-6.18.1": "CONFIG_FUSE_PASSTHROUGH=y\n"}, "passthrough", OK, "passthrough"},
		"no uring":           {map[string]string{"/proc/sys/kernel/osrelease": "6.9.1", fuseOff: ""}, "io_uring", Costs, "6.14"},
		"uring not built":    {map[string]string{fuseOff: "", "/sys/module/fuse/initstate": "live"}, "io_uring", Costs, "CONFIG_FUSE_IO_URING"},
		"fuse not loaded":    {map[string]string{fuseOff: ""}, "io_uring", Note, "modprobe"},
		"uring off":          {map[string]string{fuseOff: "N"}, "io_uring", Note, "switches it on"},
		"uring forbidden":    {map[string]string{"/proc/sys/kernel/io_uring_disabled": "2"}, "io_uring", Costs, "io_uring_disabled"},
		"uring out of reach": {map[string]string{fuseOff: "N", "/proc/self/status": unprivileged}, "io_uring", Costs, "as root"},
		"no kernel release":  {map[string]string{"/proc/sys/kernel/osrelease": "plan9"}, "kernel", Broken, "plan9"},
		"small requests":     {map[string]string{"/proc/sys/fs/fuse/max_pages_limit": "32"}, "request-size", Costs, "32 pages"},
		"senseless limit":    {map[string]string{"/proc/sys/fs/fuse/max_pages_limit": "many"}, "request-size", Costs, "many"},
		"before the limit":   {map[string]string{"/proc/sys/fs/fuse/max_pages_limit": ""}, "request-size", OK, "1 MiB"},
		"no overlayfs":       {map[string]string{"/proc/filesystems": "\text4\n"}, "overlayfs", Note, "modprobe overlay"},
		"no xino":            {map[string]string{"/sys/module/overlay/parameters/xino_auto": "N"}, "xino", Note, "flatten"},
		"no rights":          {map[string]string{"/proc/self/status": unprivileged}, "rights", Costs, "user.overlay"},
		"no fusermount3":     {map[string]string{"/proc/self/status": unprivileged}, "fusermount3", Broken, "apt-get install fuse3"},
		"no user_allow":      {map[string]string{"/proc/self/status": unprivileged, "/etc/fuse.conf": "#user_allow_other\n"}, "fuse.conf", Note, "allow_other"},
		"some rights":        {map[string]string{"/proc/self/status": "CapEff:\t0000000000200000\n"}, "rights", Broken, "CAP_MKNOD"},
		"few descriptors": {map[string]string{"/proc/self/status": unprivileged, "/proc/self/limits": "Max open files            1024                 4096              files\n"},
			"descriptors", Costs, "4096"},
		"low nr_open": {map[string]string{"/proc/sys/fs/nr_open": "65536"}, "descriptors", Costs, "fs.nr_open"},
	} {
		t.Run(name, func(t *testing.T) {
			all := Run(Options{Root: fake(t, c.changed)})
			wellFormed(t, all)
			f := find(t, all, c.check)
			if f.Level != c.level || !strings.Contains(f.Found+f.Cost+f.Fix, c.says) {
				t.Errorf("%+v, want %v and %q", f, c.level, c.says)
			}
		})
	}
}

func TestFuseDevice(t *testing.T) {
	root := fake(t, nil)
	for _, spoil := range []func() error{
		func() error { return os.Remove(root + "/dev/fuse") },
		func() error { return os.WriteFile(root+"/dev/fuse", nil, 0o600) },
	} {
		must(t, spoil())
		if f := find(t, Run(Options{Root: root}), "fuse"); f.Level != Broken || !strings.Contains(f.Fix, "modprobe") {
			t.Errorf("%+v", f)
		}
	}
}

const containerdToml = "/etc/containerd/config.toml"

func program(says string) string { return "#!/bin/sh\necho '" + says + "'\n" }

// engine is a sound machine with files and programs of an engine.
func engine(t *testing.T, files map[string]string) string {
	root := fake(t, nil)
	for path, text := range files {
		put(t, root+path, text, 0o755)
	}
	return root
}

func TestContainerd(t *testing.T) {
	const (
		v16    = "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1"
		plugin = "[proxy_plugins]\n[proxy_plugins.lamina]\ntype = 'snapshot'\naddress = '/run/lamina/snapshotter.sock'\n"
		cri2   = "[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'lamina'\n"
		cri3   = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'lamina'\n"
	)
	for name, c := range map[string]struct {
		version, conf string
		more          map[string]string
		check         string
		level         Level
		says          string
	}{
		"version 1.6":       {v16, plugin, nil, "containerd", OK, "1.6.20"},
		"version 2":         {"containerd github.com/containerd/containerd/v2 v2.4.2 abc", plugin, nil, "containerd", OK, "v2.4.2"},
		"version 1.5":       {"containerd containerd.io 1.5.11 3df", plugin, nil, "containerd", Broken, "1.6"},
		"version 3":         {"containerd c 3.0.0 3df", plugin, nil, "containerd", Note, "3.0.0"},
		"version unknown":   {"what?", plugin, nil, "containerd", Note, "what?"},
		"plugin":            {v16, plugin, nil, "containerd-plugin", OK, "snapshotter.sock"},
		"no plugin":         {v16, "version = 2\n", nil, "containerd-plugin", Note, "proxy_plugins.lamina"},
		"other name":        {v16, strings.ReplaceAll(plugin, "plugins.lamina", "plugins.cow"), nil, "containerd-plugin", OK, `"cow"`},
		"other plugin":      {v16, "[proxy_plugins.stargz]\ntype='snapshot'\naddress='/run/stargz.sock'\n", nil, "containerd-plugin", Note, "lamina"},
		"wrong type":        {v16, strings.Replace(plugin, "'snapshot'", "'content'", 1), nil, "containerd-plugin", Broken, "content"},
		"no address":        {v16, "[proxy_plugins.lamina]\ntype='snapshot'\n", nil, "containerd-plugin", Broken, "address"},
		"pods without it":   {v16, "version = 2\n" + cri2, nil, "containerd-plugin", Broken, "pods cannot start"},
		"pods, version 2":   {v16, plugin + cri2, nil, "containerd-cri", OK, "lamina"},
		"pods, version 3":   {v16, "version = 3\n" + plugin + cri3, nil, "containerd-cri", OK, "lamina"},
		"pods on overlayfs": {v16, plugin, nil, "containerd-cri", Note, "overlayfs"},
		"no pods":           {v16, "disabled_plugins = ['cri']\n" + plugin, nil, "containerd-cri", OK, "switched off"},
		"drop-in": {v16, "version = 2\nimports = ['conf.d/*.toml', '/etc/elsewhere.toml']\n", map[string]string{"/etc/containerd/conf.d/lamina.toml": plugin, "/etc/elsewhere.toml": cri2},
			"containerd-cri", OK, "lamina"},
		"no snapshotter": {v16, plugin, nil, "snapshotter-socket", Broken, "no such file"},
		"no containerd":  {v16, plugin, nil, "containerd-socket", Note, "/run/containerd/containerd.sock"},
		"its own socket": {v16, plugin + "[grpc]\naddress = '/run/own.sock'\n", nil, "containerd-socket", Note, "/run/own.sock"},
		// Bad ones.
		"no TOML":             {v16, "version = = 2", nil, "containerd-plugin", Broken, "config.toml"},
		"wrong types":         {v16, "proxy_plugins = [1, 2]", nil, "containerd-plugin", Broken, "proxy_plugins is not a table"},
		"plugin is a word":    {v16, "[proxy_plugins]\nlamina = 'snapshot'", nil, "containerd-plugin", Broken, "proxy_plugins.lamina is not a table"},
		"address is a list":   {v16, "[proxy_plugins.lamina]\naddress = ['/run/lamina.sock']", nil, "containerd-plugin", Broken, "address is not a string"},
		"imports itself":      {v16, "imports = ['config.toml', '*']\n" + plugin, nil, "containerd-plugin", OK, "snapshotter.sock"},
		"imports nonsense":    {v16, "imports = ['[']\n" + plugin, nil, "containerd-plugin", Broken, "imports"},
		"imports a directory": {v16, "imports = ['/etc/*']\n" + plugin, nil, "containerd-plugin", Broken, "not a regular file"},
		"huge":                {v16, "# " + strings.Repeat("x", maxFile), nil, "containerd-plugin", Broken, "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			root := engine(t, map[string]string{"/usr/bin/containerd": program(c.version), containerdToml: c.conf})
			for path, text := range c.more {
				put(t, root+path, text, 0o644)
			}
			all := Run(Options{Root: root})
			wellFormed(t, all)
			f := find(t, all, c.check)
			if f.Level != c.level || !strings.Contains(f.Found+f.Cost+f.Fix, c.says) {
				t.Errorf("%+v, want %v and %q", f, c.level, c.says)
			}
		})
	}
}

// A configuration that is a pipe, or a circle of links, must not hold the check up.
func TestConfigIsNoFile(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"pipe":   func(path string) error { return unix.Mkfifo(path, 0o644) },
		"circle": func(path string) error { return os.Symlink("config.toml", path) },
		"dir":    func(path string) error { return os.Mkdir(path, 0o755) },
		"device": func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))) },
	} {
		t.Run(name, func(t *testing.T) {
			root := engine(t, map[string]string{"/usr/bin/containerd": program("containerd c v2.1.0")})
			must(t, os.MkdirAll(filepath.Dir(root+containerdToml), 0o755))
			must(t, make(root+containerdToml))
			if f := find(t, Run(Options{Root: root}), "containerd-plugin"); f.Level != Broken {
				t.Errorf("%+v", f)
			}
		})
	}
}

func TestSockets(t *testing.T) {
	root := engine(t, map[string]string{"/usr/bin/containerd": program("containerd c v2.1.0"),
		containerdToml: "[proxy_plugins.lamina]\ntype = 'snapshot'\naddress = '/s'\n[grpc]\naddress = '/c'\n"})
	for _, s := range []string{"/s", "/c"} {
		l, err := net.Listen("unix", root+s)
		must(t, err)
		defer l.Close()
	}
	all := Run(Options{Root: root})
	for _, check := range []string{"snapshotter-socket", "containerd-socket"} {
		if f := find(t, all, check); f.Level != OK {
			t.Errorf("%+v", f)
		}
	}
}

func TestPodman(t *testing.T) {
	conf := func(body string) map[string]string {
		return map[string]string{"/usr/bin/podman": program("podman version 4.3.1"), "/usr/bin/lamina": program("lamina"), "/usr/bin/fuse-overlayfs": program("f"),
			"/etc/containers/storage.conf": body}
	}
	lamina := func(root string) string {
		return "[storage]\ndriver = 'overlay'\n[storage.options.overlay]\nmount_program = '" + root + "'\n"
	}
	for name, c := range map[string]struct {
		body  string
		level Level
		says  string
	}{
		"lamina":        {lamina("/usr/bin/lamina"), OK, "/usr/bin/lamina"},
		"old place":     {"[storage]\ndriver = 'overlay'\n[storage.options]\nmount_program = '/usr/bin/lamina'\n", OK, "/usr/bin/lamina"},
		"another":       {lamina("/usr/bin/fuse-overlayfs"), Note, "does not use Lamina"},
		"none":          {"[storage]\ndriver = 'overlay'\n", Note, "no mount_program"},
		"missing":       {lamina("/opt/lamina"), Broken, "/opt/lamina"},
		"no program":    {lamina("/etc/containers/storage.conf"), Note, "does not use Lamina"},
		"a directory":   {lamina("/usr/bin"), Broken, "is not a program"},
		"wrong driver":  {strings.Replace(lamina("/usr/bin/lamina"), "'overlay'", "'vfs'", 1), Broken, "vfs"},
		"no TOML":       {"[storage", Broken, "storage.conf"},
		"driver is 7":   {"[storage]\ndriver = 7\n", Broken, "driver is not a string"},
		"storage is no": {"storage = false\n", Broken, "storage is not a table"},
	} {
		t.Run(name, func(t *testing.T) {
			root := engine(t, conf(c.body))
			f := find(t, Run(Options{Root: root}), "podman-storage")
			if f.Level != c.level || !strings.Contains(f.Found+f.Cost+f.Fix, c.says) {
				t.Errorf("%+v, want %v and %q", f, c.level, c.says)
			}
		})
	}
}

func TestDocker(t *testing.T) {
	for body, want := range map[string]struct {
		level Level
		says  string
	}{
		`{"storage-driver": "lamina", "features": {"containerd-snapshotter": true}}`:  {OK, "lamina"},
		`{"storage-driver": "lamina", "features": {"containerd-snapshotter": false}}`: {Broken, "containerd-snapshotter"},
		`{"storage-driver": "lamina"}`: {Broken, "containerd-snapshotter"},
		`{}`:                           {Note, "overlay2"},
		`{"features": [1]}`:            {Broken, "daemon.json"},
		`{"storage-driver": "lamina", "features": {"containerd-snapshotter": "yes"}}`: {Broken, "containerd-snapshotter"},
		`null`: {Note, "overlay2"},
		`{`:    {Broken, "daemon.json"},
		``:     {Broken, "daemon.json"},
	} {
		root := engine(t, map[string]string{"/usr/bin/dockerd": program("Docker version 29.0.1, build x"), "/etc/docker/daemon.json": body})
		f := find(t, Run(Options{Root: root}), "docker-storage")
		if f.Level != want.level || !strings.Contains(f.Found+f.Cost+f.Fix, want.says) {
			t.Errorf("%s: %+v, want %v and %q", body, f, want.level, want.says)
		}
	}
}

// Nothing stays in the directory that was looked at.
func examine(t *testing.T, dir string) []Finding {
	t.Helper()
	before, err := os.ReadDir(dir)
	must(t, err)
	all := Run(Options{Dir: dir})
	wellFormed(t, all)
	after, err := os.ReadDir(dir)
	must(t, err)
	if len(before) != len(after) {
		t.Errorf("left behind: %v", after)
	}
	return all
}

func TestFilesystems(t *testing.T) {
	dir := t.TempDir()
	mount := func(fstype string, mkfs ...string) string {
		mnt := filepath.Join(dir, fmt.Sprintf("%s-%d", fstype, len(mkfs)))
		must(t, os.Mkdir(mnt, 0o755))
		args := []string{"-t", fstype, "lamina-test", mnt}
		if len(mkfs) > 0 {
			image := mnt + ".img"
			must(t, os.WriteFile(image, nil, 0o600))
			must(t, os.Truncate(image, 512<<20))
			run(t, mkfs[0], append(mkfs[1:], image)...)
			args = []string{"-t", fstype, "-o", "loop", image, mnt}
		}
		run(t, "mount", args...)
		t.Cleanup(func() { must(t, unix.Unmount(mnt, 0)) })
		return mnt
	}
	mke2fs := []string{"mkfs.ext4", "-q", "-F"}
	for name, c := range map[string]struct {
		mnt   func() string
		check string
		level Level
		says  string
	}{
		"tmpfs":                  {func() string { return mount("tmpfs") }, "journal", Note, "memory"},
		"ext4":                   {func() string { return mount("ext4", mke2fs...) }, "journal", OK, "data=ordered"},
		"ext4 without a journal": {func() string { return mount("ext4", append(mke2fs, "-O", "^has_journal")...) }, "journal", Costs, "without a journal"},
		"xfs":                    {func() string { return mount("xfs", "mkfs.xfs", "-q") }, "reflink", OK, "can be cloned"},
		"ramfs":                  {func() string { return mount("ramfs") }, "filesystem", Note, "not tested"},
	} {
		t.Run(name, func(t *testing.T) {
			all := examine(t, c.mnt())
			f := find(t, all, c.check)
			if f.Level != c.level || !strings.Contains(f.Found+f.Cost+f.Fix, c.says) {
				t.Errorf("%+v, want %v and %q", f, c.level, c.says)
			}
			// ramfs has no attributes, the others have all that is needed.
			for _, trial := range []string{"xattrs", "whiteouts", "rename-exchange", "rename-whiteout"} {
				if f := find(t, all, trial); f.Level != OK && name != "ramfs" {
					t.Errorf("%+v", f)
				}
			}
			if f := find(t, all, "xattrs"); name == "ramfs" && f.Level != Broken {
				t.Errorf("%+v", f)
			}
		})
	}
}

// Kernel overlayfs below an upper layer, a file, and nothing at all.
func TestUnusableDirectories(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"l", "u", "w", "m"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	must(t, unix.Mount("overlay", dir+"/m", "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/l,upperdir=%[1]s/u,workdir=%[1]s/w", dir)))
	t.Cleanup(func() { must(t, unix.Unmount(dir+"/m", 0)) })
	put(t, dir+"/file", "", 0o644)
	for path, says := range map[string]string{"/m": "overlayfs itself", "/file": "not a directory", "/none": "no such file"} {
		all := Run(Options{Dir: dir + path})
		if f := find(t, all, "filesystem"); f.Level != Broken || !strings.Contains(f.Found+f.Cost, says) {
			t.Errorf("%s: %+v", path, f)
		}
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

func TestLevels(t *testing.T) {
	for l := OK; l <= Broken; l++ {
		b, err := json.Marshal(Finding{Level: l})
		must(t, err)
		var back Finding
		must(t, json.Unmarshal(b, &back))
		if back.Level != l {
			t.Errorf("%v: %s", l, b)
		}
	}
	var l Level
	if l.UnmarshalText([]byte("fine")) == nil {
		t.Error("a level that is none was taken")
	}
}

// No configuration, however mad, makes a check fall over or say nothing.
func FuzzConfigurations(f *testing.F) {
	f.Add([]byte("[proxy_plugins.lamina]\ntype='snapshot'\naddress='/run/x'\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter='lamina'\n"))
	f.Add([]byte("[storage]\ndriver='overlay'\n[storage.options.overlay]\nmount_program='/bin/true'\n"))
	f.Add([]byte(`{"storage-driver":"lamina","features":{"containerd-snapshotter":true}}`))
	f.Add([]byte("imports = [1, 'a']\ndisabled_plugins = 'cri'\n"))
	m := &machine{root: f.TempDir()}
	f.Fuzz(func(t *testing.T, b []byte) {
		var c containerdConf
		if _, err := c.add(b); err == nil {
			wellFormed(t, proxyChecks(m, "config.toml", &c))
		}
		if conf, err := parseTOML(b); err == nil {
			storageChecks(m, "storage.conf", conf, "")
		}
		if f := daemonChecks("daemon.json", b, "see"); f.Found == "" {
			t.Errorf("%+v", f)
		}
	})
}
