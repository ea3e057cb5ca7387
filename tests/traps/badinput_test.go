package traps

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

// refused runs lamina and expects one clear line that holds every one of the words, an exit status that is not 0, and
// nothing mounted or changed below dir.
func refused(t *testing.T, dir string, args []string, words ...string) {
	t.Helper()
	before := listing(t, dir)
	out, code := mnt.Lamina(t, args...)
	if code == 0 {
		t.Errorf("lamina %s: exit status 0", strings.Join(args, " "))
	}
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 1 || lines[0] == "" {
		t.Errorf("lamina %s: %d lines instead of one:\n%s", strings.Join(args, " "), len(lines), out)
	}
	for _, w := range words {
		if !strings.Contains(strings.ToLower(out), strings.ToLower(w)) {
			t.Errorf("lamina %s: the message does not name %q: %s", strings.Join(args, " "), w, out)
		}
	}
	if mounted, err := rival.Mounted(filepath.Join(dir, "mnt")); err != nil || mounted {
		t.Errorf("lamina %s: still mounted (%v)", strings.Join(args, " "), err)
		_ = unix.Unmount(filepath.Join(dir, "mnt"), unix.MNT_DETACH)
	}
	if after := listing(t, dir); !slices.Equal(before, after) {
		t.Errorf("lamina %s changed something:\nbefore %q\nafter  %q", strings.Join(args, " "), before, after)
	}
}

// listing names everything below dir with mode, owner, size, time and xattrs.
func listing(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	check(t, filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		all = append(all, fmt.Sprintf("%s %#o %d:%d %d %v %q", p, st.Mode, st.Uid, st.Gid, st.Size, st.Mtim, xattrNames(t, p)))
		return nil
	}))
	return all
}

func TestBadInput(t *testing.T) {
	base := mnt.Dirs(t, ".")[0]
	for _, d := range []string{"low/inner", "low2", "up/inner", "work/inner", "mnt", "with,comma:colon"} {
		check(t, os.MkdirAll(filepath.Join(base, d), 0o755))
	}
	check(t, os.WriteFile(filepath.Join(base, "file"), nil, 0o644))
	tmpfs := filepath.Join(base, "tmpfs")
	check(t, os.Mkdir(tmpfs, 0o755))
	check(t, unix.Mount("tmpfs", tmpfs, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { check(t, unix.Unmount(tmpfs, 0)) })

	at := func(name string) string { return filepath.Join(base, name) }
	dirs := func(lower, upper, work string) string {
		return fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", at(lower), at(upper), at(work))
	}
	good := dirs("low", "up", "work")
	for _, c := range []struct {
		name, opts string
		words      []string
	}{
		{"no lowerdir", "upperdir=" + at("up") + ",workdir=" + at("work"), []string{"lowerdir"}},
		{"no options", "ro", []string{"lowerdir"}},
		{"empty lowerdir", "lowerdir=", []string{"lowerdir"}},
		{"upperdir without workdir", "lowerdir=" + at("low") + ",upperdir=" + at("up"), []string{"workdir"}},
		{"workdir without upperdir", "lowerdir=" + at("low") + ",workdir=" + at("work"), []string{"upperdir"}},
		{"missing lower", dirs("missing", "up", "work"), []string{at("missing")}},
		{"one missing lower of two", dirs("low:"+at("missing"), "up", "work"), []string{at("missing")}},
		{"missing upper", dirs("low", "missing", "work"), []string{at("missing")}},
		{"missing work", dirs("low", "up", "missing"), []string{at("missing")}},
		{"lower is a file", dirs("file", "up", "work"), []string{at("file"), "director"}},
		{"upper is a file", dirs("low", "file", "work"), []string{at("file"), "director"}},
		{"upper is the lower", dirs("low", "low", "work"), []string{at("low")}},
		{"upper inside the lower", dirs("low", "low/inner", "work"), []string{at("low/inner"), at("low")}},
		{"lower inside the upper", dirs("up/inner", "up", "work"), []string{at("up/inner")}},
		{"work is the upper", dirs("low", "up", "up"), []string{"workdir"}},
		{"work inside the upper", dirs("low", "up", "up/inner"), []string{at("up/inner")}},
		{"upper inside the work", dirs("low", "work/inner", "work"), []string{at("work/inner")}},
		{"work is the lower", dirs("low", "up", "low"), []string{at("low")}},
		{"work on another filesystem", dirs("low", "up", "tmpfs"), []string{at("tmpfs"), "filesystem"}},
		{"unknown option", good + ",frobnicate", []string{"frobnicate"}},
		{"misspelt option", good + ",redirectdir=on", []string{"redirectdir", "redirect_dir"}},
		{"bad format", good + ",format=qcow", []string{"format", "qcow", "sparse"}},
		{"bad caw", good + ",caw=never", []string{"caw", "never", "eager"}},
		{"bad fill", good + ",fill=always", []string{"fill", "always", "idle"}},
		{"bad copyup", good + ",copyup=maybe", []string{"copyup", "maybe", "clone"}},
		{"bad passthrough", good + ",passthrough=yes", []string{"passthrough", "yes", "auto"}},
		{"bad block size", good + ",block_size=5000", []string{"block_size", "5000"}},
		{"bad mapping", good + ",uidmapping=0:x:1", []string{"uidmapping", `"x"`}},
		{"value for a flag", good + ",volatile=very", []string{"volatile"}},
		{"nfs_export", good + ",nfs_export=on", []string{"nfs_export"}},
		{"verity", good + ",verity=require", []string{"verity"}},
		{"clone that the disk cannot", good + ",copyup=clone", []string{"copyup=clone"}},
		{"clone from another disk", dirs("tmpfs", "up", "work") + ",copyup=clone", []string{"copyup=clone", at("tmpfs")}},
	} {
		t.Run(c.name, func(t *testing.T) { refused(t, base, []string{"mount", "-o", c.opts, at("mnt")}, c.words...) })
	}

	t.Run("missing mount point", func(t *testing.T) {
		refused(t, base, []string{"mount", "-o", good, at("nowhere")}, at("nowhere"))
	})
	t.Run("mount point is a file", func(t *testing.T) {
		refused(t, base, []string{"mount", "-o", good, at("file")}, at("file"), "director")
	})
	t.Run("no mount point", func(t *testing.T) { refused(t, base, []string{"mount", "-o", good}, "mount point") })
	t.Run("umount of nothing", func(t *testing.T) { refused(t, base, []string{"umount", at("mnt")}, at("mnt")) })
	t.Run("status of nothing", func(t *testing.T) { refused(t, base, []string{"status", at("mnt")}, at("mnt")) })
	t.Run("fsck of nothing", func(t *testing.T) { refused(t, base, []string{"fsck", at("missing")}, at("missing")) })
	t.Run("flatten of nothing", func(t *testing.T) {
		refused(t, base, []string{"flatten", "-o", "lowerdir=" + at("low"), at("missing")}, at("missing"))
	})
	t.Run("unknown command", func(t *testing.T) { refused(t, base, []string{"mout"}, "mout") })
	t.Run("unknown flag", func(t *testing.T) { refused(t, base, []string{"mount", "--frob", at("mnt")}, "frob") })

	t.Run("separators in names", func(t *testing.T) {
		check(t, os.WriteFile(at("with,comma:colon/f"), []byte("found"), 0o644))
		m := mnt.Start(t, rival.Config{Lowers: []string{at("with,comma:colon"), at("low2")}, Upper: at("up"), Work: at("work")})
		wantFile(t, m.Path("f"), []byte("found"))
	})
}

// A second mount on a busy upper or workdir would make two servers write over each other.
func TestBusyUpperIsRefused(t *testing.T) {
	d := mnt.Dirs(t, "low", "up", "work", "up2", "work2", "mnt")
	mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: d[:1], Upper: d[1], Work: d[2]})
	for _, c := range []struct{ name, upper, work, named string }{
		{"both", d[1], d[2], d[1]},
		{"the upper, with another workdir", d[1], d[4], d[1]},
		{"the workdir, with another upper", d[3], d[2], d[2]},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, code := mnt.Lamina(t, "mount", "-o", fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", d[0], c.upper, c.work), d[5])
			if code == 0 {
				t.Errorf("mounted a second time")
				mnt.Lamina(t, "umount", d[5])
			} else if strings.Count(strings.TrimSpace(out), "\n") != 0 || !strings.Contains(out, c.named) {
				t.Errorf("not one line that names %s: %s", c.named, out)
			}
		})
	}
	for _, args := range [][]string{{"flatten", "-o", "lowerdir=" + d[0], d[1]}, {"fsck", "--repair", "-o", "lowerdir=" + d[0], d[1]}} {
		if out, code := mnt.Lamina(t, args...); code == 0 || strings.Count(strings.TrimSpace(out), "\n") != 0 || !strings.Contains(out, d[1]) {
			t.Errorf("lamina %s of a mounted upper: exit status %d: %s", args[0], code, out)
		}
	}
}

// A volatile mount whose server was killed must not be used again: nothing was ever synced.
func TestVolatileIsRefusedAfterACrash(t *testing.T) {
	lower := lowerWith(t, map[string][]byte{"f": data(1, 10*block)})
	m := mnt.Start(t, rival.Config{System: rival.Lamina, Lowers: []string{lower}, Options: []string{"volatile"}, Foreground: true})
	m.SkipFsck = true // whatever it finds is what volatile means
	check(t, patch(m.Path("f"), "x", 3*block))
	m.Remount() // a clean end is no crash
	check(t, patch(m.Path("f"), "y", 5*block))
	check(t, m.Kill())
	_, err := mnt.Try(t, m.Config)
	if err == nil {
		t.Fatal("a volatile upper was mounted again after a crash")
	}
	if !strings.Contains(err.Error(), "volatile") || !strings.Contains(err.Error(), m.Upper) && !strings.Contains(err.Error(), m.Work) {
		t.Errorf("the refusal names neither the reason nor the directory: %v", err)
	}
}

// A machine without /dev/fuse: one line that says so.
func TestNoFuseDevice(t *testing.T) {
	d := mnt.Dirs(t, "low", "up", "work", "mnt")
	bin, err := rival.BinaryPath()
	check(t, err)
	out := shell(t, `unshare -m sh -c '
		mount --make-rprivate / && mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3
		%s mount -o lowerdir=%s,upperdir=%s,workdir=%s %s 2>&1; echo "status $?"'`, bin, d[0], d[1], d[2], d[3])
	if !strings.Contains(out, "/dev/fuse") || strings.Contains(out, "status 0") || strings.Count(out, "\n") != 2 {
		t.Errorf("want one line that names /dev/fuse and an exit status that is not 0:\n%s", out)
	}
}
