package union

import (
	"errors"
	"fmt"

	"lamina/layer"

	"golang.org/x/sys/unix"
)

const goodFilesystems = "use ext4, XFS, btrfs or tmpfs"

// dropACLs takes the ACLs away that the directory of temporary objects got from the workdir: they would be inherited by
// every copied-up file.
func (fs *FS) dropACLs() error {
	for _, acl := range []string{aclDefault, aclAccess} {
		err := fs.work.Removexattr(tmpDir, acl)
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("workdir %s: cannot remove %s from %s: %w", fs.work.Name(), acl, tmpDir, err)
		}
	}
	return nil
}

// probe finds out what the upper layer's filesystem can do, before the first operation that would need it: private
// attributes, whiteouts, and renames that leave one or exchange two names. Without O_TMPFILE there is another way.
func (fs *FS) probe() error {
	if err := fs.dropACLs(); err != nil {
		return err
	}
	fd, err := fs.work.Tmpfile(tmpDir, 0o600)
	if err == nil {
		unix.Close(fd)
	} else if fs.noTmpfile = isUnsupported(err); !fs.noTmpfile {
		return fmt.Errorf("workdir %s: cannot create a file: %w", fs.work.Name(), err)
	}
	name, other := fs.tmpName(), fs.tmpName()
	fd, err = fs.work.OpenFile(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("workdir %s: cannot create a file: %w", fs.work.Name(), err)
	}
	defer unix.Close(fd)
	born, err := fs.work.FStat(fd)
	if err != nil {
		return err
	}
	fs.bornUID, fs.bornGID = born.Uid, born.Gid
	if err := unix.Fsetxattr(fd, fs.prefix+"lamina.probe", []byte{1}, 0); err != nil {
		return fmt.Errorf("upperdir %s: the filesystem refuses %s* attributes (%w): %s, or option userxattr without privileges", fs.upper.Name(), fs.prefix, err, goodFilesystems)
	}
	if err := fs.whiteout(fs.work, other); err != nil {
		return fmt.Errorf("upperdir %s: the filesystem refuses whiteouts, which are character devices 0:0 (%w): %s", fs.upper.Name(), err, goodFilesystems)
	}
	if err := layer.Rename(fs.work, name, fs.work, other, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("upperdir %s: the filesystem cannot exchange two names (RENAME_EXCHANGE: %w): %s", fs.upper.Name(), err, goodFilesystems)
	}
	if err := layer.Rename(fs.work, other, fs.work, name, unix.RENAME_WHITEOUT); err != nil {
		return fmt.Errorf("upperdir %s: the filesystem cannot leave a whiteout behind a rename (RENAME_WHITEOUT: %w): %s", fs.upper.Name(), err, goodFilesystems)
	}
	for _, p := range []string{name, other} {
		if err := fs.work.Unlink(p); err != nil {
			return fmt.Errorf("workdir %s: %w", fs.work.Name(), err)
		}
	}
	return nil
}

// isUnsupported says that a filesystem knows no O_TMPFILE.
func isUnsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EINVAL)
}
