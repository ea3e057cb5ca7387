package traps

import (
	"context"
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

// 500 lowers, as many as Podman's driver stacks.
func TestFiveHundredLowers(t *testing.T) {
	const n = 500
	base := mnt.Dirs(t, ".")[0]
	lowers := make([]string, n)
	for i := range lowers {
		lowers[i] = filepath.Join(base, fmt.Sprint(i))
		fill(t, lowers[i], map[string][]byte{
			fmt.Sprintf("file%d", i):   []byte(fmt.Sprint(i)),
			"everywhere":               []byte(fmt.Sprint(i)),
			fmt.Sprintf("d/file%d", i): []byte(fmt.Sprint(i)),
		})
	}
	m := mnt.New(t, lowers)
	wantFile(t, m.Path("everywhere"), []byte("0"))
	wantFile(t, m.Path("d/file499"), []byte("499"))
	entries, err := os.ReadDir(m.Path("d"))
	check(t, err)
	if len(entries) != n {
		t.Errorf("%d entries in a directory merged from %d layers", len(entries), n)
	}
	check(t, patch(m.Path("file499"), "changed", 0))
	check(t, os.RemoveAll(m.Path("d")))
	check(t, os.Mkdir(m.Path("d"), 0o755))
	m.Remount()
	wantFile(t, m.Path("file499"), []byte("changed"))
	if entries, err = os.ReadDir(m.Path("d")); err != nil || len(entries) > 0 {
		t.Errorf("%d entries in an opaque directory, %v", len(entries), err)
	}
}

// Layers really unpacked by a tool: tar archives, with OCI's whiteout files turned into overlayfs's as containerd's
// applier does.
func TestLayersUnpackedByTar(t *testing.T) {
	d := mnt.Dirs(t, "src1", "src2", "layer1", "layer2")
	fill(t, d[0], map[string][]byte{"etc/conf": []byte("one"), "etc/old": []byte("x"), "usr/a/b": []byte("b"), "usr/a/c": []byte("c"), "big": data(1, 3<<20)})
	check(t, os.Link(filepath.Join(d[0], "big"), filepath.Join(d[0], "usr/big")))
	check(t, os.Symlink("etc/conf", filepath.Join(d[0], "link")))
	fill(t, d[1], map[string][]byte{"etc/.wh.old": nil, "usr/.wh..wh..opq": nil, "usr/new": []byte("new"), "etc/conf": []byte("two")})
	for i := range 2 {
		shell(t, "tar -C %s -cf %s.tar --xattrs --numeric-owner . && tar -C %s -xpf %s.tar --xattrs --xattrs-include='*'", d[i], d[i], d[2+i], d[i])
		convertWhiteouts(t, d[2+i])
	}
	m := mnt.New(t, []string{d[3], d[2]})
	wantFile(t, m.Path("etc/conf"), []byte("two"))
	wantFile(t, m.Path("link"), []byte("two"))
	wantFile(t, m.Path("big"), data(1, 3<<20))
	for _, gone := range []string{"etc/old", "usr/a", "usr/big", "etc/.wh.old"} {
		if _, err := os.Lstat(m.Path(gone)); !os.IsNotExist(err) {
			t.Errorf("%s: %v, want it gone", gone, err)
		}
	}
	wantFile(t, m.Path("usr/new"), []byte("new"))
	// tar itself over the mount: what comes out is what is shown.
	check(t, patch(m.Path("big"), "patched", 1<<20))
	out := mnt.Dirs(t, "out")[0]
	shell(t, "tar -C %s -cf - . | tar -C %s -xf -", m.Dir, out)
	want := data(1, 3<<20)
	copy(want[1<<20:], "patched")
	wantFile(t, filepath.Join(out, "big"), want)
}

func convertWhiteouts(t *testing.T, dir string) {
	t.Helper()
	check(t, filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, is := strings.CutPrefix(e.Name(), ".wh.")
		if !is {
			return nil
		}
		if err := os.Remove(p); err != nil {
			return err
		}
		if name == ".wh..opq" {
			return unix.Setxattr(filepath.Dir(p), "trusted.overlay.opaque", []byte("y"), 0)
		}
		return unix.Mknod(filepath.Join(filepath.Dir(p), name), unix.S_IFCHR, 0)
	}))
}

// Layers that kernel overlayfs wrote with metacopy=on hold files without data.
func TestKernelMetacopyLayers(t *testing.T) {
	want := data(1, 50*block)
	bottom := lowerWith(t, map[string][]byte{"f": want, "d/g": want, "h": want})
	kernel := mnt.Dirs(t, "upper", "work", "merged")
	ctx, cancel := context.WithTimeout(context.Background(), mnt.Timeout)
	defer cancel()
	k, err := rival.Up(ctx, rival.Config{System: rival.Overlay, Lowers: []string{bottom}, Upper: kernel[0], Work: kernel[1],
		Options: []string{"metacopy=on", "redirect_dir=on", "index=on"}}, kernel[2])
	check(t, err)
	defer k.Discard()
	check(t, os.Chmod(filepath.Join(k.Dir, "f"), 0o600))
	check(t, os.Rename(filepath.Join(k.Dir, "d"), filepath.Join(k.Dir, "e")))
	check(t, os.Chmod(filepath.Join(k.Dir, "e/g"), 0o640))
	check(t, os.Rename(filepath.Join(k.Dir, "e/g"), filepath.Join(k.Dir, "moved")))
	check(t, k.Down())

	m := mnt.New(t, []string{kernel[0], bottom})
	for _, name := range []string{"f", "moved", "h"} {
		wantFile(t, m.Path(name), want)
	}
	var st unix.Stat_t
	check(t, unix.Stat(m.Path("f"), &st))
	if st.Mode&0o777 != 0o600 || st.Size != int64(len(want)) {
		t.Errorf("mode %#o, size %d", st.Mode, st.Size)
	}
	check(t, patch(m.Path("moved"), "written", 7*block))
	w := slices.Clone(want)
	copy(w[7*block:], "written")
	m.Remount()
	wantFile(t, m.Path("moved"), w)
	wantFile(t, m.Path("f"), want)
}

// An upper layer that kernel overlayfs wrote goes on under Lamina, and the other way round once it is flattened.
func TestUpperChangesHands(t *testing.T) {
	want := data(1, 50*block)
	lower := lowerWith(t, map[string][]byte{"a": want, "b": want, "d/x": nil, "e/y": nil, "gone": nil})
	o := mnt.Start(t, rival.Config{System: rival.Overlay, Lowers: []string{lower}})
	check(t, patch(o.Path("a"), "kernel", block))
	check(t, os.Rename(o.Path("d"), o.Path("moved")))
	check(t, os.Remove(o.Path("gone")))
	o.Unmount()
	m := mnt.Start(t, rival.Config{Lowers: o.Lowers, Upper: o.Upper, Work: o.Work})
	wa, wb := slices.Clone(want), slices.Clone(want)
	copy(wa[block:], "kernel")
	wantFile(t, m.Path("a"), wa)
	check(t, patch(m.Path("a"), "lamina", 9*block))
	copy(wa[9*block:], "lamina")
	check(t, patch(m.Path("b"), "lamina", 9*block))
	copy(wb[9*block:], "lamina")
	check(t, os.Rename(m.Path("e"), m.Path("moved/e")))
	m.Unmount()
	m.Flatten()
	o.Again()
	wantFile(t, o.Path("a"), wa)
	wantFile(t, o.Path("b"), wb)
	for _, p := range []string{"moved/x", "moved/e/y"} {
		if _, err := os.Lstat(o.Path(p)); err != nil {
			t.Error(err)
		}
	}
	for _, p := range []string{"gone", "d", "e"} {
		if _, err := os.Lstat(o.Path(p)); !os.IsNotExist(err) {
			t.Errorf("%s: %v, want it gone", p, err)
		}
	}
}

// A filesystem that clones: copy-up may be a clone, and must look the same.
func TestCopyUpByClone(t *testing.T) {
	xfs := mnt.Loop(t, 400, []string{"mkfs.xfs", "-q", "-f"}, "")
	for _, how := range []string{"auto", "clone", "block", "full"} {
		t.Run("copyup="+how, func(t *testing.T) {
			base := filepath.Join(xfs, how)
			fill(t, base, map[string][]byte{"low/f": data(1, 20<<20), "up/": nil, "work/": nil})
			m := mnt.Start(t, rival.Config{Lowers: []string{base + "/low"}, Upper: base + "/up", Work: base + "/work", Options: []string{"copyup=" + how}})
			check(t, patch(m.Path("f"), "written", 7<<20))
			want := data(1, 20<<20)
			copy(want[7<<20:], "written")
			wantFile(t, m.Path("f"), want)
			m.Remount()
			wantFile(t, m.Path("f"), want)
			wantFile(t, base+"/low/f", data(1, 20<<20))
		})
	}
}
