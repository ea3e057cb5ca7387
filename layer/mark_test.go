package layer

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMarksBothNamespaces(t *testing.T) {
	for name, ns := range map[string]Namespace{"trusted": Trusted, "user": User} {
		t.Run(name, func(t *testing.T) {
			bothXattrWays(t, func(t *testing.T) {
				other := User
				if ns == User {
					other = Trusted
				}
				root := t.TempDir()
				must(t, os.Mkdir(root+"/dir", 0o755))
				writeFile(t, root+"/file", "")
				up := open(t, root, Options{NS: ns})
				set := func(path string, ns Namespace, attr, value string) {
					t.Helper()
					must(t, up.Setxattr(path, ns.Prefix()+attr, []byte(value), 0))
				}
				marks := func(path string, mode uint32) Marks {
					t.Helper()
					m, err := open(t, root, Options{ReadOnly: true, NS: ns}).Marks(path, mode)
					must(t, err)
					return m
				}
				if m := marks("dir", unix.S_IFDIR); m.Opaque || m.XWhiteouts || m.Redirect != "" || m.Metacopy || m.Origin != nil {
					t.Errorf("marks of an unmarked directory: %+v", m)
				}
				set("dir", other, XattrOpaque, "y")
				if marks("dir", unix.S_IFDIR).Opaque {
					t.Error("the other namespace counts")
				}
				set("dir", ns, XattrOpaque, "y")
				set("dir", ns, XattrRedirect, "/a/b")
				set("dir", ns, XattrMetacopy, "")
				set("dir", ns, XattrOrigin, "o")
				if m := marks("dir", unix.S_IFDIR); !m.Opaque || m.XWhiteouts || m.Redirect != "/a/b" || m.Metacopy || string(m.Origin) != "o" {
					t.Errorf("marks of a directory: %+v", m)
				}
				set("dir", ns, XattrOpaque, "x")
				if m := marks("dir", unix.S_IFDIR); m.Opaque || !m.XWhiteouts {
					t.Errorf("overlay.opaque=x: %+v", m)
				}
				set("file", ns, XattrOpaque, "y")
				set("file", ns, XattrRedirect, "name")
				if m := marks("file", unix.S_IFREG); m.Opaque || m.Redirect != "" {
					t.Errorf("a file without metacopy: %+v", m)
				}
				set("file", ns, XattrMetacopy, "")
				if m := marks("file", unix.S_IFREG); !m.Metacopy || m.Header == nil || m.Redirect != "name" {
					t.Errorf("a file with an empty metacopy: %+v", m)
				}
				set("file", ns, XattrMetacopy, strings.Repeat("h", 1000))
				if m := marks("file", unix.S_IFREG); len(m.Header) != 1000 {
					t.Errorf("a header of 1000 bytes: %d", len(m.Header))
				}
				if v, err := up.Origin("dir"); err != nil || string(v) != "o" {
					t.Errorf("Origin: %q %v", v, err)
				}
				_, err := up.Origin("file")
				wantErr(t, "Origin of none", err, unix.ENODATA)
				_, err = up.Marks("none", unix.S_IFREG)
				wantErr(t, "Marks of nothing", err, unix.ENOENT)
			})
		})
	}
}

// A redirect that could lead out of the tree is damage, of that object only, and the message names it.
func TestDamagedRedirect(t *testing.T) {
	root := t.TempDir()
	d := open(t, root, Options{})
	for i, v := range []string{"", "/", "..", ".", "/..", "/a/../b", "/a/./b", "//", "/a//b", "/a/", "a/b", "../a", "a\x00b",
		"/" + strings.Repeat("n", 256), strings.Repeat("/nnnnnnn", 511)} {
		name := "dir" + string(rune('a'+i))
		must(t, d.Mkdir(name, 0o755))
		if err := d.Setxattr(name, "trusted.overlay.redirect", []byte(v), 0); err != nil {
			if errors.Is(err, unix.ENOSPC) && len(v) > 3000 {
				continue // ext4 keeps one block of attributes; the parser's own test has this case
			}
			t.Fatal(err)
		}
		_, err := d.Marks(name, unix.S_IFDIR)
		var damaged *Damaged
		if !errors.As(err, &damaged) || !errors.Is(err, unix.EIO) {
			t.Errorf("redirect %q: %v", v, err)
		} else if !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), root) {
			t.Errorf("the message does not name the object: %v", err)
		}
	}
	must(t, d.Mkdir("good", 0o755))
	_, err := d.Marks("good", unix.S_IFDIR)
	must(t, err)
}

func TestWhiteouts(t *testing.T) {
	for _, ns := range []Namespace{Trusted, User} {
		root := t.TempDir()
		d := open(t, root, Options{NS: ns})
		must(t, d.Mknod("char", unix.S_IFCHR, 0))
		must(t, d.Mknod("null", unix.S_IFCHR, unix.Mkdev(1, 3)))
		must(t, d.Mknod("block", unix.S_IFBLK, 0))
		must(t, d.Mknod("fifo", unix.S_IFIFO, 0))
		must(t, d.Mkdir("dir", 0o755))
		for _, name := range []string{"marked", "plain", "full"} {
			must(t, d.Mknod(name, unix.S_IFREG|0o644, 0))
			if name != "plain" {
				must(t, d.Setxattr(name, ns.Prefix()+XattrWhiteout, []byte("y"), 0))
			}
		}
		writeFile(t, root+"/full", "not empty")
		for _, c := range []struct {
			name         string
			plain, inDir bool // as a child of an ordinary directory, and of one marked overlay.opaque=x
		}{
			{"char", true, true}, {"null", false, false}, {"block", false, false}, {"fifo", false, false},
			{"dir", false, false}, {"marked", false, true}, {"plain", false, false}, {"full", false, false},
		} {
			st, err := d.Stat(c.name)
			must(t, err)
			for x, want := range map[bool]bool{false: c.plain, true: c.inDir} {
				if got, err := d.IsWhiteout(c.name, &st, x); err != nil || got != want {
					t.Errorf("%s, dirXWhiteouts=%v: %v %v, want %v", c.name, x, got, err, want)
				}
			}
		}
	}
}

// A layer that kernel overlayfs wrote is read as it meant it.
func TestKernelLayer(t *testing.T) {
	for name, c := range map[string]struct {
		ns   Namespace
		opts string
	}{
		"trusted": {Trusted, ",redirect_dir=on,metacopy=on,index=off"},
		"user":    {User, ",userxattr"},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			for _, dir := range []string{"lower/gone", "lower/again", "lower/moved/deep", "upper", "work", "mnt"} {
				must(t, os.MkdirAll(base+"/"+dir, 0o755))
			}
			writeFile(t, base+"/lower/file", "x")
			writeFile(t, base+"/lower/meta", "data")
			mount(t, "overlay", base+"/mnt", "overlay",
				"lowerdir="+base+"/lower,upperdir="+base+"/upper,workdir="+base+"/work"+c.opts)
			must(t, os.Remove(base+"/mnt/file"))
			must(t, os.Remove(base+"/mnt/gone"))
			must(t, os.Remove(base+"/mnt/again"))
			must(t, os.Mkdir(base+"/mnt/again", 0o755))
			must(t, os.Chmod(base+"/mnt/meta", 0o600))
			if c.ns == Trusted {
				must(t, os.Rename(base+"/mnt/moved/deep", base+"/mnt/deep"))
				must(t, os.Rename(base+"/mnt/moved", base+"/mnt/renamed"))
			}
			must(t, unix.Unmount(base+"/mnt", 0))

			d := open(t, base+"/upper", Options{ReadOnly: true, NS: c.ns})
			whiteout := func(path string) {
				t.Helper()
				st, err := d.Stat(path)
				must(t, err)
				if is, err := d.IsWhiteout(path, &st, false); err != nil || !is {
					t.Errorf("%s is no whiteout: %o %v", path, st.Mode, err)
				}
			}
			marks := func(path string) Marks {
				t.Helper()
				st, err := d.Stat(path)
				must(t, err)
				m, err := d.Marks(path, st.Mode)
				must(t, err)
				return m
			}
			whiteout("file")
			whiteout("gone")
			if !marks("again").Opaque {
				t.Error("a directory made anew is not opaque")
			}
			if c.ns == User {
				return
			}
			if m := marks("meta"); !m.Metacopy || m.Redirect != "" {
				t.Errorf("chmod with metacopy: %+v", m)
			}
			whiteout("moved")
			if m := marks("renamed"); m.Redirect != "moved" && m.Redirect != "/moved" {
				t.Errorf("redirect of a renamed directory: %q", m.Redirect)
			}
			if m := marks("deep"); m.Redirect != "/moved/deep" {
				t.Errorf("redirect of a directory moved elsewhere: %q", m.Redirect)
			}
		})
	}
}

func FuzzCheckRedirect(f *testing.F) {
	for _, v := range []string{"", "/", "a", "/a/b", "..", "/a/../b", "//", "a/b", "a\x00", "/a/", ".", "..."} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v string) {
		if checkRedirect(v) != "" {
			return
		}
		path, absolute := strings.CutPrefix(v, "/")
		if !absolute && strings.Contains(path, "/") {
			t.Errorf("%q is a relative path of several names", v)
		}
		if len(v) >= unix.PathMax || checkPath(path) != nil || strings.ContainsRune(path, 0) {
			t.Errorf("%q was accepted", v)
		}
	})
}

func TestCheckRedirectLength(t *testing.T) {
	v := strings.Repeat("/n", unix.PathMax/2)
	if checkRedirect(v) == "" {
		t.Error("a redirect of PATH_MAX bytes was accepted")
	}
	if what := checkRedirect(v[2:]); what != "" {
		t.Errorf("a redirect of less than PATH_MAX bytes was refused: %s", what)
	}
}
