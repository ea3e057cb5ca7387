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

// The same with a user's quota. Root is above quotas, so the server runs without CAP_SYS_RESOURCE.
func TestTrapEDQUOTLosesNothingAcknowledged(t *testing.T) {
	small := mnt.Loop(t, 64, []string{"mkfs.ext4", "-q", "-m", "0", "-O", "quota", "-E", "quotatype=usrquota"}, "usrquota")
	limit := func(kib int) { shell(t, "setquota -u 1000 0 %d 0 0 %s", kib, small) }
	limit(10_000)
	c := rival.Config{Prefix: []string{"setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"}}
	fillsUp(t, small, c, unix.EDQUOT, func() { limit(0) })
}

// fillsUp writes small pieces all over a lower file until there is no space, checks what was acknowledged, makes space,
// and checks again.
func fillsUp(t *testing.T, disk string, c rival.Config, full unix.Errno, makeSpace func()) {
	t.Helper()
	const size = 40 << 20
	want := data(1, size)
	lower := lowerWith(t, map[string][]byte{"f": want, "g": want[:100*block]})
	check(t, unix.Chown(filepath.Join(lower, "f"), 1000, 1000))
	c.Lowers, c.Upper, c.Work = []string{lower}, filepath.Join(disk, "u"), filepath.Join(disk, "w")
	check(t, os.Mkdir(c.Upper, 0o755))
	check(t, os.Mkdir(c.Work, 0o755))
	if full == unix.ENOSPC {
		check(t, os.WriteFile(filepath.Join(disk, "filler"), data(2, 12<<20), 0o600))
	}
	m := mnt.Start(t, c)
	want = bytes.Clone(want)
	fd := open(t, m.Path("f"), unix.O_RDWR)
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
			// What was not acknowledged may be anything between old and new; write it again until it is.
			copy(want[off:off+len(p)], pread(t, fd, len(p), int64(off)))
			break
		}
	}
	wantErrno(t, "writing to a full disk", err, full)
	if written < 100 {
		t.Fatalf("only %d writes until %v", written, err)
	}
	if got := pread(t, fd, size, 0); !bytes.Equal(got, want) {
		t.Errorf("full disk: acknowledged bytes differ from %d on", firstDifference(got, want))
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
	check(t, unix.Dup2(open(t, "/dev/null", unix.O_RDONLY), fd)) // lets go of the file before the remount
	m.Remount()
	wantFile(t, m.Path("f"), want)
}
