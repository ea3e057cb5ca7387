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
// copied up finds the upper file there. The union's link count is the upper inode's plus a difference that is stored on
// it, as overlayfs does, in overlay.nlink ("U+1").

func indexPath(k key) string { return fmt.Sprintf("%s/%016x-%016x", indexDir, k.fs, k.ino) }

// hasSeveralNames says whether a lower file must go through the index. The caller holds tree.
func (fs *FS) hasSeveralNames(n *Node) bool {
	if !fs.cfg.Index || n.upper || len(n.stack) == 0 || n.key == (key{}) {
		return false
	}
	st, err := fs.lowers[n.stack[0].layer].Stat(n.stack[0].path)
	return err == nil && st.Nlink > 1
}

func (fs *FS) readDelta(path string) (int64, error) {
	v, err := fs.work.Getxattr(path, fs.prefix+layer.XattrNlink)
	if errors.Is(err, unix.ENODATA) {
		return -1, nil // the index's own link is not a name
	}
	if err != nil {
		return 0, err
	}
	s, ok := strings.CutPrefix(string(v), "U")
	d, err := strconv.ParseInt(s, 10, 32)
	if !ok || err != nil {
		return 0, fmt.Errorf("index entry %s: damaged %s attribute %q: %w", path, layer.XattrNlink, v, unix.EIO)
	}
	return d, nil
}

// addDelta records that a name of an indexed file came or went without a link of the upper inode.
func (fs *FS) addDelta(n *Node, d int64) error {
	if !n.indexed {
		return nil
	}
	if err := fs.work.Setxattr(indexPath(n.key), fs.prefix+layer.XattrNlink, fmt.Appendf(nil, "U%+d", n.delta+d), 0); err != nil {
		return err
	}
	n.delta += d
	return nil
}
