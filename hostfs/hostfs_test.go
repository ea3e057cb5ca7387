package hostfs

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOrders asks about real filesystems.
func TestOrders(t *testing.T) {
	for name, c := range map[string]struct {
		mkfs    []string
		options string
		orders  bool
	}{
		"ext4":           {[]string{"mkfs.ext4", "-q"}, "loop", true},
		"data=writeback": {[]string{"mkfs.ext4", "-q"}, "loop,data=writeback", false},
		"data=journal":   {[]string{"mkfs.ext4", "-q"}, "loop,data=journal", false},
		"nobarrier":      {[]string{"mkfs.ext4", "-q"}, "loop,nobarrier", false},
		"no journal":     {[]string{"mkfs.ext4", "-q", "-O", "^has_journal"}, "loop", false},
		"ext2":           {[]string{"mkfs.ext4", "-q", "-t", "ext2"}, "loop", false},
		"tmpfs":          {nil, "size=1m", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			image, at, what := filepath.Join(dir, "image"), filepath.Join(dir, "fs"), "tmpfs"
			if err := errors.Join(os.Mkdir(at, 0o755), os.WriteFile(image, nil, 0o600), os.Truncate(image, 16<<20)); err != nil {
				t.Fatal(err)
			}
			args := []string{"-o", c.options}
			if c.mkfs == nil {
				args = append(args, "-t", "tmpfs")
			} else {
				what = image
				run(t, c.mkfs[0], append(c.mkfs[1:], image)...)
			}
			run(t, "mount", append(args, what, at)...)
			t.Cleanup(func() {
				if err := unix.Unmount(at, 0); err != nil {
					t.Errorf("unmounting: %v", err)
					_ = unix.Unmount(at, unix.MNT_DETACH)
				}
			})
			fd, err := unix.Open(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := Orders(fd); (err == nil) != c.orders {
				t.Errorf("orders: %v", err)
			} else {
				t.Log(err)
			}
		})
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}
