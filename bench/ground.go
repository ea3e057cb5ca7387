package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/hostfs"
)

// groundName names a filesystem that contenders stand on.
type groundName string

const (
	mainGround  groundName = "the bench directory"
	xfsGround   groundName = "XFS"
	btrfsGround groundName = "btrfs"
)

// ground is a filesystem that contenders stand on, with their layers and uppers in dir.
type ground struct {
	name groundName
	dir  string
	own  bool // nothing but the bench is on it
}

// imageSize is that of an image file, in bytes: what most scenarios need there, with what earlier ones have left. The main
// filesystem has plain copies and whole copy-ups beside the layers; what rivals stand on shares blocks.
func imageSize(m Mode, main bool) int64 {
	if main {
		return Pick[int64](m, 4*gib, 8*gib, 16*gib)
	}
	return Pick[int64](m, gib, 4*gib, 8*gib)
}

// allocate makes an image file of a size, or of what the disk has room for. Every block of it has been written: whoever
// writes new blocks would otherwise wait for the filesystem below to find a place for them too, and whoever writes old ones
// again would not.
func allocate(ctx context.Context, path string, size int64) error {
	room, err := free(filepath.Dir(path))
	if err != nil {
		return err
	}
	size = min(size, room/10*9) / (4 * mib) * (4 * mib)
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_CLOEXEC
	fd, err := unix.Open(path, flags|unix.O_DIRECT, 0o600)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.Open(path, flags, 0o600)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	zeros := aligned(4 * mib)
	for done := int64(0); done < size; done += int64(len(zeros)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.Write(zeros); err != nil {
			return err
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

// filesystem says how to make one of a kind in an image. Nothing of what it does in the background may fall into a
// measurement: no blocks are discarded, neither as they become free nor by mkfs, which would make the image sparse again, and no
// tables are initialised late.
type filesystem struct {
	mkfs    []string
	options string
	tool    Tool
}

var filesystems = map[string]filesystem{
	"ext4":  {[]string{"mkfs.ext4", "-q", "-E", "lazy_journal_init=1,nodiscard"}, "nodiscard,noinit_itable", Tool{"mkfs.ext4", "e2fsprogs"}},
	"xfs":   {[]string{"mkfs.xfs", "-q", "-K", "-m", "reflink=1"}, "nodiscard", Tool{"mkfs.xfs", "xfsprogs"}},
	"btrfs": {[]string{"mkfs.btrfs", "-q", "-K"}, "nodiscard", Tool{"mkfs.btrfs", "btrfs-progs"}},
}

// caching says whether the page cache also holds the blocks of an image file, beside those of the files in it.
type caching bool

const (
	cachedOnce  caching = false // as on a disk of its own
	cachedTwice caching = true  // as `mount -o loop` does
)

// mountImage makes a filesystem in an image file below dir and mounts it. Its loop device goes with the mount, whatever
// becomes of this process.
func mountImage(ctx context.Context, dir, fstype string, cache caching, size int64) (mnt string, err error) {
	kind := filesystems[fstype]
	image := filepath.Join(dir, fstype+".img")
	mnt = filepath.Join(dir, fstype)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s on a loop device: %w", fstype, err), os.RemoveAll(image))
		}
	}()
	if err := findTools(kind.tool, Tool{"losetup", "mount"}); err != nil {
		return "", err
	}
	if err := os.Mkdir(mnt, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	if err := allocate(ctx, image, size); err != nil {
		return "", err
	}
	mkfs := hostfs.Mkfs(append(slices.Clone(kind.mkfs), image)...)
	if _, err := rival.Run(ctx, mkfs[0], mkfs[1:]...); err != nil {
		return "", err
	}
	loop, err := attach(ctx, image, cache)
	if err != nil {
		return "", err
	}
	_, err = rival.Run(ctx, "mount", "-t", fstype, "-o", kind.options, loop, mnt)
	// While the device is mounted this makes it go with the mount.
	_, detach := rival.Run(context.WithoutCancel(ctx), "losetup", "-d", loop)
	return mnt, errors.Join(err, detach)
}

// attach gives the image a loop device. Some filesystems cannot do without the page cache.
func attach(ctx context.Context, image string, cache caching) (string, error) {
	if cache == cachedOnce {
		if out, err := rival.Run(ctx, "losetup", "--find", "--show", "--direct-io=on", image); err == nil {
			return strings.TrimSpace(out), nil
		}
	}
	out, err := rival.Run(ctx, "losetup", "--find", "--show", image)
	return strings.TrimSpace(out), err
}

// imageSize is the mode's, or what the scenario with the largest need has room in, unless a test wants less.
func (r *run) imageSize(main bool) int64 {
	size := imageSize(r.cfg.Mode, main)
	switch {
	case r.cfg.image > 0:
		return r.cfg.image
	case main:
		need := r.need + r.need/8 // the filesystem itself takes and reserves some
		if room, err := free(r.scratch); err == nil && need < room/10*9 {
			return max(size, need)
		}
	}
	return size
}

// ground returns the filesystem of a name, making it if it is a loop device's.
func (r *run) ground(name groundName) (*ground, error) {
	if g := r.grounds[name]; g != nil {
		return g, nil
	}
	if err := r.noGround[name]; err != nil {
		return nil, err
	}
	// Rivals get the loop device that is faster: after a clone they read from the image what is not cached for the clone.
	mnt, err := mountImage(r.ctx, r.scratch, strings.ToLower(string(name)), cachedTwice, r.imageSize(false))
	if err != nil {
		if r.ctx.Err() == nil {
			r.noGround[name] = err
		}
		return nil, err
	}
	r.grounds[name] = &ground{name: name, dir: mnt, own: true}
	return r.grounds[name], nil
}

// mkdirLayer makes the directory of a layer: on btrfs one that snapshots can be taken of.
func (g *ground) mkdirLayer(ctx context.Context, dir string) error {
	if g.name != btrfsGround {
		return os.Mkdir(dir, 0o755)
	}
	_, err := rival.Run(ctx, "btrfs", "-q", "subvolume", "create", dir)
	return err
}

// sharesBlocks tells whether a copy may cost nothing, so that a file's blocks do not say what it occupies.
func (g *ground) sharesBlocks() bool {
	kind := filesystemOf(g.dir)
	return kind == "XFS" || kind == "btrfs"
}

// used is how many bytes of the filesystem are taken, once everything is written out.
func (g *ground) used() (int64, error) {
	if err := syncfs(g.dir); err != nil {
		return 0, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(g.dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, nil
}

// free is how many bytes can still be written to the filesystem at dir.
func free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}

func syncfs(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

// filesystemNames are magic numbers of statfs(2) that a user may want to be told of.
var filesystemNames = map[int64]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "XFS", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.FUSE_SUPER_MAGIC: "FUSE", unix.NFS_SUPER_MAGIC: "NFS", unix.MSDOS_SUPER_MAGIC: "FAT",
	unix.SQUASHFS_MAGIC: "squashfs", unix.RAMFS_MAGIC: "ramfs",
}

func filesystemOf(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "unknown: " + err.Error()
	}
	if name := filesystemNames[int64(st.Type)]; name != "" {
		return name
	}
	return fmt.Sprintf("filesystem %#x", st.Type)
}

// checkJournal tells why an ext4 without a journal is no ground for figures that are to hold elsewhere.
func checkJournal(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return err
	}
	device, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return nil // not on a device of its own: not ext4
	}
	task, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "journal_task"))
	if err == nil && strings.TrimSpace(string(task)) == "<none>" {
		return fmt.Errorf("%s is on an ext4 without a journal, which looks at recently removed inodes again for every new file", dir)
	}
	return nil
}

// checkUpper tells why dir cannot hold an upper layer: what a union needs is tried out.
func checkUpper(dir string) error {
	kind := filesystemOf(dir)
	cannot := func(what string, err error) error {
		return fmt.Errorf("%s is on %s, which cannot hold an upper layer: %s: %w", dir, kind, what, err)
	}
	switch kind {
	case "overlayfs", "FUSE":
		return fmt.Errorf("%s is on %s, which cannot hold an upper layer", dir, kind)
	}
	probe, err := os.MkdirTemp(dir, "probe.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(probe)
	if err := unix.Setxattr(probe, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		return cannot("attributes trusted.*", err)
	}
	whiteout, file := filepath.Join(probe, "whiteout"), filepath.Join(probe, "file")
	if err := unix.Mknod(whiteout, unix.S_IFCHR, 0); err != nil {
		return cannot("whiteouts (mknod)", err)
	}
	fd, err := unix.Open(probe, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return cannot("nameless files (O_TMPFILE)", err)
	}
	defer unix.Close(fd)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, file, unix.AT_FDCWD, whiteout, unix.RENAME_EXCHANGE); err != nil {
		return cannot("exchanging names", err)
	}
	return nil
}
