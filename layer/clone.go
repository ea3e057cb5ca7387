package layer

import (
	"errors"

	"golang.org/x/sys/unix"
)

// cloneReadOnly opens path as the root of a detached, read-only copy of its mount. The copy is not recursive: like
// kernel overlayfs, a layer shows the directory under a mount point and not what is mounted there. nodev keeps every
// open away from devices. Without noatime every read that the kernel passes through would try to update the access time,
// and fail, because it stays old enough for relatime for ever; in a user namespace, where the kernel locks that flag
// (and nothing passes through), the mount's own stays. The copy goes with the last descriptor on it.
func cloneReadOnly(path string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_NO_AUTOMOUNT)
	if err != nil {
		return -1, err
	}
	safe := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV}
	fast := unix.MountAttr{Attr_set: safe.Attr_set | unix.MOUNT_ATTR_NOATIME, Attr_clr: unix.MOUNT_ATTR__ATIME}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &fast)
	if errors.Is(err, unix.EPERM) {
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &safe)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// cannotClone tells the errors that mean "not with these privileges, this kernel or this mount" (EINVAL: a mount of
// another namespace, or an unbindable one) from those about the path.
func cannotClone(err error) bool {
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL)
}
