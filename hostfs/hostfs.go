// Package hostfs tells what the filesystem that holds a layer promises beyond what every filesystem does. It asks the
// kernel about the mounted filesystem, and what it cannot find out is not promised. It also knows how to make one.
package hostfs

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Orders says whether the filesystem of the open file fd never lets a change of an inode reach the disk before data that
// was written out earlier: written out in the sense of sync_file_range(2), which returns when the device has the bytes, be
// it only in its volatile cache. nil: it does. Otherwise the error says what is missing.
//
// ext4 with an internal journal and barriers does. A change of an inode is on the disk when its transaction's commit
// record is. That record is written last, with a flush of the device's cache before it, and the cache held the data by
// then. In data=journal data go another way, and an external journal is on a device whose flush concerns no data.
func Orders(fd int) error {
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(fd, &sfs); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if sfs.Type != unix.EXT4_SUPER_MAGIC {
		return fmt.Errorf("filesystem type %#x is not ext4", sfs.Type)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	dev, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return fmt.Errorf("the filesystem's device is not known: %w", err)
	}
	name := filepath.Base(dev)
	// The options with all defaults, which the mount table leaves out.
	options, err := os.ReadFile(filepath.Join("/proc/fs/ext4", name, "options"))
	if err != nil {
		return fmt.Errorf("the filesystem's options are not known: %w", err)
	}
	if err := orderingOptions(string(options)); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join("/proc/fs/jbd2", name+"-8")); err != nil { // inode 8 is the internal journal
		return fmt.Errorf("no internal journal: %w", err)
	}
	return nil
}

// orderingOptions looks at ext4's options, one a line.
func orderingOptions(text string) error {
	have := strings.Split(text, "\n")
	for _, want := range []string{"data=ordered", "barrier"} {
		if !slices.Contains(have, want) {
			return fmt.Errorf("mounted without %s", want)
		}
	}
	for _, not := range []string{"journal_async_commit", "nobarrier"} {
		if slices.Contains(have, not) {
			return fmt.Errorf("mounted with %s", not)
		}
	}
	return nil
}
