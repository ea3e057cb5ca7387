package union

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"lamina/layer"

	"golang.org/x/sys/unix"
)

// The index keeps hard links between lower files across copy-up (overlayfs: index=on). It holds, for every copied-up
// file that had several names below, one more link to the upper inode, named after the lower inode: a name not yet
// copied up finds the upper file there.
//
// The union's link count is stored on the upper inode, in overlay.nlink, as overlayfs does: as a difference to the
// inode's own count ("U+1") while both change together in one step, which is what linking, unlinking and renaming do;
// as the number itself ("=3") while a name that only the lower layers have gets its upper link, which changes the
// inode's count alone. So whatever a crash leaves is right.

func indexPath(k key) string { return fmt.Sprintf("%s/%016x-%016x", indexDir, k.fs, k.ino) }

// hasSeveralNames says whether a file must go through the index when it is copied up. The caller holds tree.
func (fs *FS) hasSeveralNames(n *Node) bool { return n.several && !n.upper }

// nlinkOf reads the stored link count of an index entry whose inode has links: what the union adds to that, and whether it
// is stored as the number itself.
func (fs *FS) nlinkOf(path string, links uint64) (delta int64, absolute bool, err error) {
	v, err := fs.work.Getxattr(path, fs.prefix+layer.XattrNlink)
	if errors.Is(err, unix.ENODATA) {
		return -1, false, nil // the index's own link is not a name
	}
	if err != nil {
		return 0, false, err
	}
	text, absolute := strings.CutPrefix(string(v), "=")
	if !absolute {
		text, _ = strings.CutPrefix(text, "U")
	}
	d, err := strconv.ParseInt(text, 10, 32)
	if err != nil || len(text) == len(v) {
		return 0, false, fmt.Errorf("index entry %s: damaged %s attribute %q: %w", path, layer.XattrNlink, v, unix.EIO)
	}
	if absolute {
		d -= int64(links)
	}
	return d, absolute, nil
}

func (fs *FS) storeNlink(n *Node, value string) error {
	return fs.work.Setxattr(indexPath(n.key), fs.prefix+layer.XattrNlink, []byte(value), 0)
}

// relate stores an indexed node's count as a difference, before the inode's own count changes with it.
func (fs *FS) relate(n *Node) error {
	if !n.indexed || !n.absolute {
		return nil
	}
	if err := fs.storeNlink(n, fmt.Sprintf("U%+d", n.delta)); err != nil {
		return err
	}
	n.absolute = false
	return nil
}

// linkUp makes path, a name of an indexed file that only the lower layers have, a name in the upper layer. The caller
// holds tree for writing.
func (fs *FS) linkUp(n *Node, path string) error {
	st, err := fs.work.Stat(indexPath(n.key))
	if err != nil {
		return err
	}
	if err := fs.storeNlink(n, fmt.Sprintf("=%d", int64(st.Nlink)+n.delta)); err != nil {
		return err
	}
	n.absolute = true
	if err := layer.LinkBetween(fs.work, indexPath(n.key), fs.upper, path); err != nil {
		return err
	}
	n.delta--
	return nil
}

// dropNameless removes the index entries of files whose last name went in the moment before a crash.
func (fs *FS) dropNameless() error {
	entries, err := fs.work.ReadDir(indexDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := join(indexDir, e.Name)
		st, err := fs.work.Stat(path)
		if err != nil {
			return err
		}
		delta, _, err := fs.nlinkOf(path, st.Nlink)
		if err != nil {
			fs.cfg.Logf("%v", err) // whoever looks the file up gets the error; lamina fsck reports it
			continue
		}
		if int64(st.Nlink)+delta < 1 {
			if err := fs.work.Unlink(path); err != nil {
				return err
			}
		}
	}
	return nil
}
