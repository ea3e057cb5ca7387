package layer

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseOverride(t *testing.T) {
	for v, want := range map[string]overrideStat{
		"0:0:755":                {mode: 0o755},
		"1000:1001:0644":         {uid: 1000, gid: 1001, mode: 0o644},
		"1:2:100644":             {uid: 1, gid: 2, mode: 0o644}, // fuse-overlayfs writes st_mode whole
		"1:2:4755:file":          {uid: 1, gid: 2, mode: 0o4755, typ: unix.S_IFREG},
		"1:2:0755:dir":           {uid: 1, gid: 2, mode: 0o755, typ: unix.S_IFDIR},
		"1:2:0600:block-8-0":     {uid: 1, gid: 2, mode: 0o600, typ: unix.S_IFBLK, rdev: unix.Mkdev(8, 0)},
		"1:2:0600:char-1-300":    {uid: 1, gid: 2, mode: 0o600, typ: unix.S_IFCHR, rdev: unix.Mkdev(1, 300)},
		"4294967294:0:0666:pipe": {uid: 4294967294, mode: 0o666, typ: unix.S_IFIFO},
	} {
		if got, err := parseOverride(v); err != nil || got != want {
			t.Errorf("%q: %+v %v, want %+v", v, got, err, want)
		}
	}
	for _, v := range []string{"", "0", "0:0", "::", "a:0:755", "0:-1:755", "0:0:888", "0:0:755:", "0:0:755:door",
		"0:0:755:char", "0:0:755:char-1", "0:0:755:char-1-2-3", "0:0:755:file-1-2", "4294967296:0:755", " 0:0:755"} {
		if got, err := parseOverride(v); err == nil {
			t.Errorf("%q was read as %+v", v, got)
		}
	}
}

func FuzzParseOverride(f *testing.F) {
	for _, v := range []string{"0:0:755", "1:2:0600:char-1-3", "1:2:0600:block-8-0", "1:2:4755:file", "x", "1:2:3:4:5"} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v string) {
		o, err := parseOverride(v)
		if err != nil {
			return
		}
		again, err := parseOverride(o.String())
		if err != nil || again != o {
			t.Errorf("%q: %+v became %q, which is %+v, %v", v, o, o, again, err)
		}
	})
}

// Owner and mode live in an attribute in both directions; the inodes stay the store's.
func TestOverrideStat(t *testing.T) {
	for attr, kind := range map[string]Override{xattrOverrideContainers: OverrideContainers, xattrOverridePrivileged: OverridePrivileged} {
		t.Run(attr, func(t *testing.T) {
			root := t.TempDir()
			d := open(t, root, Options{OverrideStat: kind})
			check := func(d *Dir, path string, mode, uid, gid uint32, rdev uint64) {
				t.Helper()
				st, err := d.Stat(path)
				must(t, err)
				if st.Mode != mode || st.Uid != uid || st.Gid != gid || st.Rdev != rdev {
					t.Errorf("%s: %o %d:%d %x, want %o %d:%d %x", path, st.Mode, st.Uid, st.Gid, st.Rdev, mode, uid, gid, rdev)
				}
			}
			must(t, d.Mknod("file", unix.S_IFREG|0o644, 0))
			check(d, "file", unix.S_IFREG|0o644, 0, 0, 0)
			must(t, d.Chown("file", 1000, -1))
			check(d, "file", unix.S_IFREG|0o644, 1000, 0, 0)
			must(t, d.Chmod("file", 0o6755))
			check(d, "file", unix.S_IFREG|0o6755, 1000, 0, 0)
			must(t, d.Chown("file", -1, 7)) // as chown(2), which drops the set-id bits
			check(d, "file", unix.S_IFREG|0o755, 1000, 7, 0)
			fd, err := d.OpenFile("file", unix.O_RDWR, 0)
			must(t, err)
			defer unix.Close(fd)
			must(t, d.FChown(fd, 2, 3))
			must(t, d.FChmod(fd, 0o4711))
			check(d, "file", unix.S_IFREG|0o4711, 2, 3, 0)
			if st, err := d.FStat(fd); err != nil || st.Uid != 2 || st.Mode != unix.S_IFREG|0o4711 {
				t.Errorf("FStat: %+v %v", st, err)
			}
			var real unix.Stat_t
			must(t, unix.Stat(root+"/file", &real))
			if real.Uid != 0 || real.Mode != unix.S_IFREG|0o644 {
				t.Errorf("the inode was changed: %+v", real)
			}
			must(t, d.Mkdir("dir", 0o700))
			must(t, d.Chown("dir", 4, 5))
			check(d, "dir", unix.S_IFDIR|0o700, 4, 5, 0)
			must(t, d.Mknod("dev", unix.S_IFCHR|0o620, unix.Mkdev(5, 1)))
			check(d, "dev", unix.S_IFCHR|0o620, 0, 0, unix.Mkdev(5, 1))
			must(t, d.Chown("dev", 0, 5))
			check(d, "dev", unix.S_IFCHR|0o620, 0, 5, unix.Mkdev(5, 1))
			must(t, d.Symlink("x", "link"))
			must(t, d.Chown("link", 0, 0))

			// A lower layer made like this is recognised by its root, as fuse-overlayfs does.
			if got := open(t, root, Options{ReadOnly: true, OverrideStat: OverrideAuto}).Override(); got != OverrideNone {
				t.Errorf("recognised without a mark: %v", got)
			}
			must(t, d.Chmod("", 0o555))
			lower := open(t, root, Options{ReadOnly: true, OverrideStat: OverrideAuto})
			if lower.Override() != kind {
				t.Errorf("not recognised: %v", lower.Override())
			}
			check(lower, "file", unix.S_IFREG|0o4711, 2, 3, 0)
		})
	}
}

// Values that cannot be meant are damage of that object only.
func TestForgedOverride(t *testing.T) {
	root := t.TempDir()
	must(t, os.Mkdir(root+"/dir", 0o755))
	writeFile(t, root+"/full", "content")
	writeFile(t, root+"/long", "")
	writeFile(t, root+"/good", "")
	d := open(t, root, Options{OverrideStat: OverrideContainers})
	for path, v := range map[string]string{"dir": "0:0:755:file", "full": "0:0:644:char-1-3", "long": "0:0:644:" + string(make([]byte, 2000))} {
		must(t, d.Setxattr(path, xattrOverrideContainers, []byte(v), 0))
		_, err := d.Stat(path)
		wantErr(t, path, err, unix.EIO)
	}
	fd, err := unix.Open(root+"/long", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	_, err = d.FStat(fd)
	wantErr(t, "FStat of a forged value", err, unix.EIO)
	_, err = d.Stat("good")
	must(t, err)
}
