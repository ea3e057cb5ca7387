package mountopt

import (
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var env = Env{Dir: "/cwd"}

func parse(t *testing.T, args ...string) *Options {
	t.Helper()
	o, err := Parse(args, env)
	if err != nil {
		t.Fatalf("%q: %v", args, err)
	}
	return o
}

func id(n uint32) *uint32 { return &n }

func TestMeaning(t *testing.T) {
	for _, c := range []struct {
		args string
		want func(*Options)
	}{
		{"", func(*Options) {}},
		{",,", func(*Options) {}},
		{"lowerdir=/a:b:/c/../d", func(o *Options) { o.Lower = []string{"/a", "/cwd/b", "/d"} }},
		{`lowerdir=/a\:b:/c\,d:/e\\f`, func(o *Options) { o.Lower = []string{"/a:b", "/c,d", `/e\f`} }},
		{"lowerdir=/a:/b::/c::/d", func(o *Options) { o.Lower, o.Data = []string{"/a", "/b"}, []string{"/c", "/d"} }},
		{"lowerdir=/old,lowerdir=/a,lowerdir+=/b:c,datadir+=/d", func(o *Options) { o.Lower, o.Data = []string{"/a", "/b:c"}, []string{"/d"} }},
		{"upperdir=u,workdir=/w\\:x", func(o *Options) { o.Upper, o.Work = "/cwd/u", "/w:x" }},
		{`upperdir=/with\,comma,workdir=/=eq=`, func(o *Options) { o.Upper, o.Work = "/with,comma", "/=eq=" }},
		{"redirect_dir=off", func(o *Options) { o.Redirect = RedirectFollow }},
		{"redirect_dir=nofollow,redirect_dir=on", func(*Options) {}},
		{"index=off,xino=auto,uuid=null,nfs_export=off,verity=off", func(o *Options) { o.Index = false }},
		{"metacopy=off", func(o *Options) { o.CopyUp = CopyUpFull }},
		{"metacopy=off,metacopy=on", func(*Options) {}},
		{"metacopy=off,copyup=clone", func(o *Options) { o.CopyUp = CopyUpClone }},
		{"volatile,userxattr,default_permissions,override_creds", func(o *Options) { o.Volatile, o.UserXattr = true, true }},
		{"fsync=0", func(o *Options) { o.Volatile = true }},
		// As Podman's mount_program gets them.
		{"uidmapping=:0:100000:65536,gidmapping=:0:1000:1:1:100000:65536", func(o *Options) {
			o.UIDs = []IDRange{{0, 100000, 65536}}
			o.GIDs = []IDRange{{0, 1000, 1}, {1, 100000, 65536}}
		}},
		{`uidmapping=0:10:1\,5:20:1`, func(o *Options) { o.UIDs = []IDRange{{0, 10, 1}, {5, 20, 1}} }},
		{"private", func(o *Options) { o.Propagation = unix.MS_PRIVATE }},
		{"private,rshared", func(o *Options) { o.Propagation = unix.MS_SHARED }},
		{"whiteouts=files", func(o *Options) { o.Whiteouts = WhiteoutsFiles }},
		{"whiteouts=devices,whiteouts=auto", func(*Options) {}},
		{"squash_to_root", func(o *Options) { o.SquashUID, o.SquashGID = id(0), id(0) }},
		{"squash_to_uid=7,squash_to_root", func(o *Options) { o.SquashUID, o.SquashGID = id(7), id(0) }},
		{"squash_to_root,squash_to_gid=8", func(o *Options) { o.SquashUID, o.SquashGID = id(0), id(8) }},
		{"xattr_permissions=2,static_nlink,noacl", func(o *Options) {
			o.Perms, o.NoACL = PermsContainers, true
		}},
		{"disable_xattrs=0,fast_ino=1,threaded=0,clone_fd,max_idle_threads=10,timeout=0.5,writeback=0,ino32_t=0", func(*Options) {}},
		{"format=bcow,block_size=64k,caw=lazy,fill=idle,copyup=block,transport=dev,passthrough=off,max_stack_depth=2", func(o *Options) {
			o.Format, o.BlockSize, o.CaW, o.Fill, o.CopyUp = BCoW, 65536, Lazy, FillIdle, CopyUpBlock
			o.Transport, o.Passthrough, o.MaxStackDepth = TransportDev, Off, 2
		}},
		{"survive=on", func(o *Options) { o.Survive, o.Transport = true, TransportDev }},
		{"survive=on,survive=off,transport=uring", func(o *Options) { o.Transport = TransportUring }},
		{"block_size=1m", func(o *Options) { o.BlockSize = 1 << 20 }},
		{"ro,nosuid,nodev,noexec,noatime", func(o *Options) {
			o.ReadOnly = true
			o.MountFlags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME
		}},
		{"ro,nodev,rw,dev", func(*Options) {}},
		{"allow_other,fsname=x,debug,_netdev,noauto,x-systemd.automount,x-foo=bar,comment=a=b,user=me", func(o *Options) {
			o.AllowOther, o.FSName, o.Debug = true, "x", true
		}},
		{`context="system_u:object_r:container_file_t:s0:c1,c2",ro`, func(o *Options) {
			o.Context = []string{`context="system_u:object_r:container_file_t:s0:c1,c2"`}
			o.ReadOnly, o.MountFlags = true, unix.MS_RDONLY
		}},
		{`context=a:b:c:s0,rootcontext="x",context=d`, func(o *Options) { o.Context = []string{"rootcontext=x", "context=d"} }},
		{`fscontext=a\,b`, func(o *Options) { o.Context = []string{`fscontext="a,b"`} }},
	} {
		want := defaults()
		c.want(want)
		if got := parse(t, c.args); !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n got %+v\nwant %+v", c.args, got, want)
		}
	}
}

func TestSeveralStrings(t *testing.T) {
	o := parse(t, "lowerdir=/a", "lowerdir+=/b,ro", "", "upperdir=/u")
	if !slices.Equal(o.Lower, []string{"/a", "/b"}) || o.Upper != "/u" || !o.ReadOnly {
		t.Errorf("%+v", o)
	}
}

func Test500Lowers(t *testing.T) {
	var dirs []string
	for i := range 500 {
		dirs = append(dirs, fmt.Sprintf("/layers/%03d", i))
	}
	if got := parse(t, "lowerdir="+strings.Join(dirs, ":")).Lower; !slices.Equal(got, dirs) {
		t.Errorf("%d lowers", len(got))
	}
}

// Every refusal is one line that names the option and says what to do.
func TestRefused(t *testing.T) {
	for arg, want := range map[string]string{
		"survive=on,index=off":              "leave index=off out",
		"survive=on,userxattr":              "leave userxattr out",
		"transport=uring,survive=on":        "use transport=dev",
		"lowerdri=/a":                       "did you mean lowerdir?",
		"uperdir=/a":                        "did you mean upperdir?",
		"xyzzyplugh":                        "lamina-mount(8)",
		"lowerdir":                          "needs a value: lowerdir=DIR",
		"lowerdir=":                         "empty",
		"lowerdir=/a:":                      "empty",
		"lowerdir=:/a":                      "empty",
		"lowerdir=::/a":                     "empty",
		"lowerdir=/a:::/b":                  "empty",
		"lowerdir=/a::/b:/c":                "double colons",
		"lowerdir=/a::/b,lowerdir+=/c":      "before them",
		"datadir+=/a":                       "needs a lower directory",
		"upperdir=":                         "empty",
		"upperdir=/a\x00b":                  "NUL",
		"redirect_dir=maybe":                "on, off, follow, nofollow",
		"index=2":                           "on, off",
		"nfs_export=on":                     "user-space server",
		"verity=require":                    "kernel overlayfs",
		"uuid=on":                           "uuid=auto",
		"nooverride_creds":                  "leave it out",
		"volatile=yes":                      "takes no value",
		"uidmapping=0:1":                    "triples",
		"uidmapping=:":                      "triples",
		"uidmapping=0:1:x":                  "not a number",
		"uidmapping=0:0:0":                  "maps no ids",
		"uidmapping=4294967295:0:2":         "beyond",
		"uidmapping=0:0:10:5:100:1":         "mapped twice",
		"gidmapping=0:0:10:100:9:1":         "mapped twice",
		"squash_to_uid=-1":                  "not an id",
		"squash_to_uid=4294967295":          "not an id",
		"xattr_permissions=3":               "0, 1, 2",
		"writeback":                         "passthrough",
		"writeback=1":                       "passthrough",
		"ino32_t":                           "64 bits",
		"timeout=soon":                      "not a number",
		"timeout=NaN":                       "not a number",
		"noxattrs":                          "leave it out",
		"disable_xattrs=1":                  "leave it out",
		"plugins=a.so":                      "no plugins",
		"format=qcow":                       "sparse, bcow, bcow-single",
		"block_size=5000":                   "power of two",
		"block_size=2m":                     "power of two",
		"block_size=1k":                     "power of two",
		"block_size=k":                      "power of two",
		"block_size=9223372036854775807m":   "power of two",
		"caw=never":                         "eager, lazy, sync",
		"transport=fast":                    "auto, uring, dev",
		"passthrough=yes":                   "auto, on, off",
		"max_stack_depth=3":                 "1, 2",
		"allow_root":                        "allow_other",
		"remount":                           "unmount",
		"metacopy=off,copyup=block":         "leave one out",
		"copyup=sometimes":                  "auto, block, clone, full",
		`context=`:                          "label",
		`context="a`:                        "label",
		strings.Repeat("long", 1000) + "=1": "unknown",
		"lower\ndir=/a":                     "unknown",
		"metacopy=maybe":                    "on, off",
		"index=":                            "on, off",
		"threaded=2":                        "0, 1",
	} {
		o, err := Parse([]string{arg}, env)
		if err == nil {
			t.Errorf("%q was read as %+v", arg, o)
			continue
		}
		name, _, _ := strings.Cut(arg, "=")
		if strings.Contains(arg, "copyup=block") {
			name = "metacopy"
		}
		if strings.Contains(arg, "lowerdir+=") {
			name = "lowerdir+"
		}
		if msg := err.Error(); !strings.Contains(msg, want) || !strings.Contains(msg, printable(name)) || strings.ContainsRune(msg, '\n') {
			t.Errorf("%q: %s", arg, msg)
		}
	}
}

func TestComplete(t *testing.T) {
	for args, want := range map[string]string{
		"lowerdir=/a": "", "lowerdir=/a,upperdir=/u,workdir=/w": "", "upperdir=/u,workdir=/w": "lowerdir",
		"lowerdir=/a,upperdir=/u": "workdir", "lowerdir=/a,workdir=/w": "workdir",
	} {
		err := parse(t, args).Complete()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), "option "+want+":") {
			t.Errorf("%s: %v", args, err)
		}
	}
}

// The table is what the manual is made from, and what the parser knows.
func TestTable(t *testing.T) {
	seen := map[string]bool{}
	for _, d := range Table() {
		if seen[d.Name] {
			t.Errorf("%s is there twice", d.Name)
		}
		seen[d.Name] = true
		if d.Help == "" || !strings.HasSuffix(d.Help, ".") {
			t.Errorf("%s: help %q", d.Name, d.Help)
		}
		if d.set == nil {
			t.Errorf("%s does nothing", d.Name)
		}
		if d.Name != "x-*" && find(d.Name) == nil {
			t.Errorf("%s is not found", d.Name)
		}
		// Every value that the syntax lists as a choice is known to the parser, and no other.
		if values := strings.Trim(d.Value, "[]"); strings.Contains(values, "|") {
			for v := range strings.SplitSeq(values, "|") {
				if _, err := Parse([]string{"lowerdir=/a," + d.Name + "=" + v}, env); err != nil {
					t.Errorf("%s=%s: %v", d.Name, v, err)
				}
			}
			if _, err := Parse([]string{d.Name + "=nonsense"}, env); err == nil {
				t.Errorf("%s=nonsense was accepted", d.Name)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"lowerdir=/a:/b,upperdir=/u,workdir=/w", `lowerdir=/a\:b\,c\\:/d::/e`, "lowerdir+=/a,datadir+=/b",
		"uidmapping=:0:100000:65536,squash_to_uid=5", `context="a,b",ro`, `context="a`, `\`, `lowerdir=\`, "block_size=4k",
		"volatile,userxattr,nodev,metacopy=on", "redirect_dir=off,index=off,xino=off", "x-a=b,comment=c", "=", ",", "a=b=c",
		"timeout=1e308,max_idle_threads=-0", "lowerdir=:::",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		o, err := Parse([]string{s}, env)
		if err != nil {
			if o != nil {
				t.Errorf("%q: options and an error", s)
			}
			if msg := err.Error(); msg == "" || strings.ContainsAny(msg, "\n\x00") {
				t.Errorf("%q: message %q", s, msg)
			}
			return
		}
		for _, dir := range slices.Concat(o.Lower, o.Data, []string{o.Upper, o.Work}) {
			if dir != "" && (!filepath.IsAbs(dir) || filepath.Clean(dir) != dir || strings.ContainsRune(dir, 0)) {
				t.Errorf("%q: directory %q", s, dir)
			}
		}
		if len(o.Data) > 0 && len(o.Lower) == 0 {
			t.Errorf("%q: data-only layers alone", s)
		}
		for _, c := range o.Context {
			if strings.Count(c, `"`)%2 != 0 {
				t.Errorf("%q: unbalanced %q", s, c)
			}
		}
		// An option list read twice means the same.
		again, err := Parse([]string{s}, env)
		if err != nil || !reflect.DeepEqual(o, again) {
			t.Errorf("%q: read differently the second time: %v", s, err)
		}
	})
}
