package crash

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/layers"
	"lamina/tests/mnt"
)

// A machine that shuts down right after umount(8), which does not wait for the server, sends SIGTERM to a server that still
// flushes. Nothing of what was written is lost for that.
func TestTerminatedWhileFlushing(t *testing.T) {
	const size = 50 * block
	want := layers.Bytes(3, size)
	lower := mnt.Dirs(t, "lower")[0]
	if err := os.WriteFile(filepath.Join(lower, "f"), want, 0o644); err != nil {
		t.Fatal(err)
	}
	disk := mnt.Loop(t, 64, []string{"mkfs.ext4", "-q"}, "")
	c := rival.Config{System: rival.Lamina, Lowers: []string{lower}, Upper: filepath.Join(disk, "u"), Work: filepath.Join(disk, "w"),
		Options: []string{"caw=lazy"}}
	if err := errors.Join(os.Mkdir(c.Upper, 0o755), os.Mkdir(c.Work, 0o755)); err != nil {
		t.Fatal(err)
	}
	m := mnt.Start(t, c)
	out, _ := mnt.Lamina(t, "status", "--json", m.Dir)
	var status struct {
		PID int
		Log string
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil || status.PID == 0 {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = os.Remove(status.Log) })

	fd := openFor(t, m.Path("f"), unix.O_RDWR)
	for b := range size / block {
		word := layers.Bytes(uint64(b), 100)
		if _, err := unix.Pwrite(fd, word, int64(b*block+1000)); err != nil {
			t.Fatal(err)
		}
		copy(want[b*block+1000:], word)
	}
	unix.Close(fd)
	thaw := freeze(t, disk) // the flush cannot end before we say so
	if err := unix.Unmount(m.Dir, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server flushes", func() bool {
		out, _ := mnt.Lamina(t, "status", "--json")
		var all []struct {
			PID      int
			Flushing bool
		}
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			t.Logf("%v: %s", err, out)
		}
		for _, s := range all {
			if s.PID == status.PID {
				return s.Flushing
			}
		}
		return false
	})
	if err := unix.Kill(status.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server has heard of it", func() bool {
		log, _ := os.ReadFile(status.Log)
		return strings.Contains(string(log), "still flushing")
	})
	thaw()
	wantGone(t, status.PID)
	m.Again()
	if got, err := os.ReadFile(m.Path("f")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was written before the unmount is not all there (%v)", err)
	}
}

// freeze makes everybody wait who writes to a filesystem, until thaw or the end of the test.
func freeze(t *testing.T, dir string) (thaw func()) {
	t.Helper()
	const fiFreeze, fiThaw = 0xC0045877, 0xC0045878 // FIFREEZE and FITHAW of linux/fs.h
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(fd, fiFreeze, 0); err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	thaw = sync.OnceFunc(func() {
		if err := unix.IoctlSetInt(fd, fiThaw, 0); err != nil {
			t.Error(err)
		}
		unix.Close(fd)
	})
	t.Cleanup(thaw)
	return thaw
}
