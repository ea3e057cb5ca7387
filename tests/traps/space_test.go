package traps

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
	"lamina/tests/probe"
)

func configOn(t *testing.T, lower, upper, work string, options ...string) rival.Config {
	t.Helper()
	return rival.Config{Lowers: []string{lower}, Upper: upper, Work: work, Options: options}
}

// The upper's disk runs full in the middle of writes and copies. The application gets ENOSPC; what was acknowledged is
// there, at once and after a remount once there is space again to write it down.
func TestTrapENOSPCLosesNothingAcknowledged(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		small := mnt.Loop(t, 48, []string{"mkfs.ext4", "-q", "-m", "0"}, "")
		fillsUp(t, small, rival.Config{Options: []string{format}}, unix.ENOSPC, func() {
			check(t, os.Remove(filepath.Join(small, "filler")))
		})
	})
}

// The same with a quota: btrfs's count for root too.
func TestTrapEDQUOTLosesNothingAcknowledged(t *testing.T) {
	probe.Filesystem("btrfs", [2]int{2, 6}).Need(t)
	eachFormat(t, func(t *testing.T, format string) {
		disk := mnt.Loop(t, 300, []string{"mkfs.btrfs", "-q"}, "")
		shell(t, "btrfs quota enable %[1]s && btrfs subvolume create %[1]s/sub && btrfs qgroup limit 24M %[1]s/sub", disk)
		fillsUp(t, filepath.Join(disk, "sub"), rival.Config{Options: []string{format}}, unix.EDQUOT, func() {
			shell(t, "btrfs quota disable %s", disk) // raising the limit would itself need space within it
		})
	})
}

// fillsUp writes small pieces all over a lower file until there is no space, checks what was acknowledged, makes space,
// and checks again.
func fillsUp(t *testing.T, disk string, c rival.Config, full unix.Errno, makeSpace func()) {
	t.Helper()
	const size = 40 << 20
	want := data(1, size)
	lower := lowerWith(t, map[string][]byte{"f": want, "g": want[:100*block]})
	c.Lowers, c.Upper, c.Work = []string{lower}, filepath.Join(disk, "u"), filepath.Join(disk, "w")
	check(t, os.Mkdir(c.Upper, 0o755))
	check(t, os.Mkdir(c.Work, 0o755))
	if full == unix.ENOSPC {
		check(t, os.WriteFile(filepath.Join(disk, "filler"), data(2, 12<<20), 0o600))
	}
	m := mnt.Start(t, c)
	want = bytes.Clone(want)
	fd, shut := opened(t, m.Path("f"), unix.O_RDWR)
	r := rand.New(rand.NewPCG(4, 4))
	var err error
	written := 0
	for _, b := range r.Perm(size / block) {
		off, p := b*block+r.IntN(2000), data(b, 1+r.IntN(2000))
		if r.IntN(2) == 0 {
			off, p = b*block, data(b, block)
		}
		var n int
		if n, err = unix.Pwrite(fd, p, int64(off)); n > 0 {
			copy(want[off:], p[:n])
			written++
		}
		if err != nil {
			// What was not acknowledged may be anything between old and new: from here on it is what it is.
			now := make([]byte, len(p))
			if n, rerr := unix.Pread(fd, now, int64(off)); rerr == nil {
				copy(want[off:off+len(p)], now[:n])
			}
			break
		}
	}
	wantErrno(t, "writing to a full disk", err, full)
	if written < 100 {
		t.Fatalf("only %d writes until %v", written, err)
	}
	for off := 0; off < size; off += block {
		// A block whose other half cannot be copied may say so, but nothing else than what was written may be read.
		got := make([]byte, block)
		if n, err := unix.Pread(fd, got, int64(off)); err != nil {
			wantErrno(t, "reading on a full disk", err, full)
		} else if n != block || !bytes.Equal(got, want[off:off+block]) {
			t.Fatalf("full disk: block %d is wrong: %d bytes, first difference at %d", off/block, n, firstDifference(got, want[off:off+block]))
		}
	}
	wantFile(t, m.Path("g"), data(1, size)[:100*block])
	if err := unix.Fsync(fd); err != nil {
		wantErrno(t, "fsync on a full disk", err, full)
	}

	makeSpace()
	eventually(t, "fsync once there is space", func() error { return unix.Fsync(fd) })
	if got := pread(t, fd, size, 0); !bytes.Equal(got, want) {
		t.Errorf("space again: bytes differ from %d on", firstDifference(got, want))
	}
	pwrite(t, fd, []byte("goes on"), 77)
	copy(want[77:], "goes on")
	check(t, unix.Fsync(fd))
	shut()
	m.Remount()
	wantFile(t, m.Path("f"), want)
}
