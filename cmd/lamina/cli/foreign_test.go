package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"lamina/tests/mnt"

	"golang.org/x/sys/unix"
)

// A mount of somebody else's whose server is gone, or answers nobody any more, keeps no command from its work.
func TestForeignMounts(t *testing.T) {
	for name, foreign := range map[string]func(testing.TB, string){"dead": mnt.DeadFUSE, "hung": mnt.HungFUSE} {
		t.Run(name, func(t *testing.T) {
			l := newLayers(t)
			for _, dir := range []string{"theirs", "covered/upper", "covered/work", "overlay"} {
				must(t, os.MkdirAll(l.path(dir), 0o755))
			}
			foreign(t, l.path("theirs"))
			// An overlay mount says that it has its upper layer below what is now a FUSE mount.
			must(t, unix.Mount("overlay", l.path("overlay"), "overlay", 0,
				fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", l.path("l1"), l.path("covered/upper"), l.path("covered/work"))))
			t.Cleanup(func() { must(t, unix.Unmount(l.path("overlay"), 0)) })
			foreign(t, l.path("covered"))

			l.ok("mount", "-o", rw, "mnt")
			l.ok("status")
			l.ok("status", "--json", "mnt")
			l.ok("metrics", "--listen", "-")
			l.ok("top", "--once")
			l.fails([]string{"status", "theirs"}, "not a Lamina mount")
			l.fails([]string{"umount", "theirs"}, "not a Lamina mount")
			if r := l.run("doctor", "l1"); r.code == exitBroken && !strings.Contains(r.out, "trial") || r.err != "" {
				t.Errorf("doctor: %+v", r)
			}
			busy, err := os.Open(filepath.Join(l.path("mnt"), "file"))
			must(t, err)
			l.fails([]string{"umount", "mnt"}, "in use by process")
			must(t, busy.Close())
			l.ok("umount", "mnt")
			l.ok("fsck", "upper")
			l.ok("flatten", "-o", "lowerdir=l1:l2", "upper")
		})
	}
}
