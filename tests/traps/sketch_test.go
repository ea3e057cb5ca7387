package traps

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/rival"
	"lamina/tests/mnt"
)

// Others forgot to mark overwritten blocks: reads returned old data.
func TestTrapOverwrittenBlocksReadNew(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		old, fresh := data(1, 10*block+100), data(2, 2*block)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": old})}, format)
		want := bytes.Clone(old)
		fd := open(t, m.Path("f"), unix.O_RDWR)
		for i, off := range []int{0, 3 * block, 3*block + 1, 9*block - 7, 10*block + 90} {
			p := fresh[i : i+block/(i+1)]
			pwrite(t, fd, p, int64(off))
			want = append(want[:off], append(bytes.Clone(p), want[min(off+len(p), len(want)):]...)...)
			if got := pread(t, fd, len(want)+1, 0); !bytes.Equal(got, want) {
				t.Fatalf("after a write of %d at %d: first difference at %d", len(p), off, firstDifference(got, want))
			}
		}
		wantFile(t, m.Path("f"), want)
	})
}

// Others never wrote the block map: a remount lost it.
func TestTrapBlockMapSurvivesRemount(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		want := data(1, 6<<20)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": want})}, format)
		want = bytes.Clone(want)
		fd, err := unix.Open(m.Path("f"), unix.O_WRONLY, 0)
		check(t, err)
		for i := range 100 {
			p, off := data(100+i, 1000), int64(i)*61_007
			pwrite(t, fd, p, off)
			copy(want[off:], p)
		}
		unix.Close(fd)
		for range 3 {
			m.Remount()
			wantFile(t, m.Path("f"), want)
		}
	})
}

// Others let mmap bypass the block map.
func TestTrapMmapGoesThroughTheMap(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		old := data(1, 8*block)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": old})}, format)
		fd, err := unix.Open(m.Path("f"), unix.O_RDWR, 0)
		check(t, err)
		pwrite(t, fd, []byte("written"), block+10)
		want := bytes.Clone(old)
		copy(want[block+10:], "written")

		mapping, err := unix.Mmap(fd, 0, len(old), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		check(t, err)
		if i := firstDifference(mapping, want); i >= 0 {
			t.Errorf("the mapping differs from what was written at %d", i)
		}
		copy(mapping[5*block+1:], "mapped")
		copy(want[5*block+1:], "mapped")
		check(t, unix.Msync(mapping, unix.MS_SYNC))
		if got := pread(t, fd, len(want), 0); !bytes.Equal(got, want) {
			t.Errorf("what was written through the mapping reads differently at %d", firstDifference(got, want))
		}
		check(t, unix.Munmap(mapping))
		check(t, unix.Close(fd))
		m.Remount()
		wantFile(t, m.Path("f"), want)
	})
}

// Others lost a second partial write to an in-transit block to the copier. Many writers of many blocks, each block
// written in several pieces right after one another, so that pieces meet the copier.
func TestTrapSecondPartialWriteBeatsTheCopier(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		const blocks = 600
		old := data(1, blocks*block)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": old})}, format, "caw=eager")
		want := bytes.Clone(old)
		var wg sync.WaitGroup
		for w := range 3 {
			fd, shut := opened(t, m.Path("f"), unix.O_RDWR)
			wg.Go(func() {
				defer shut()
				r := rand.New(rand.NewPCG(1, uint64(w)))
				for b := w; b < blocks; b += 3 {
					for range 4 {
						off := b*block + r.IntN(block-64)
						p := data(r.Int(), 1+r.IntN(63))
						copy(want[off:], p)
						if n, err := unix.Pwrite(fd, p, int64(off)); err != nil || n != len(p) {
							t.Errorf("wrote %d of %d: %v", n, len(p), err)
							return
						}
					}
				}
			})
		}
		wg.Wait()
		wantFile(t, m.Path("f"), want)
		m.Remount()
		wantFile(t, m.Path("f"), want)
	})
}

// Reusing an inode's old backing id after copy-up hands a writer the lower file.
func TestTrapOldBackingIDIsNotReused(t *testing.T) {
	eachPassthrough(t, func(t *testing.T, passthrough string) {
		// An executable image, so that passthrough=auto passes it through too.
		image := append([]byte("\x7fELF"), data(1, 5*block)...)
		lower := lowerWith(t, map[string][]byte{"f": image})
		m := mnt.New(t, []string{lower}, "passthrough="+passthrough)
		reader := open(t, m.Path("f"), unix.O_RDONLY)
		pread(t, reader, 100, 0)
		writer := open(t, m.Path("f"), unix.O_RDWR)
		pwrite(t, writer, []byte("changed"), 2*block)
		check(t, unix.Fsync(writer))

		wantFile(t, filepath.Join(lower, "f"), image)
		want := bytes.Clone(image)
		copy(want[2*block:], "changed")
		if got := pread(t, writer, len(want), 0); !bytes.Equal(got, want) {
			t.Errorf("the writer reads other bytes than it wrote, from %d on", firstDifference(got, want))
		}
		wantFile(t, m.Path("f"), want)
	})
}

// chown, rename and hard link of a sketch.
func TestTrapChownRenameLinkOfASketch(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		old := data(1, 100*block)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"d/f": old, "e/": nil})}, format)
		want := bytes.Clone(old)
		fd, err := unix.Open(m.Path("d/f"), unix.O_RDWR, 0)
		check(t, err)
		pwrite(t, fd, []byte("one"), 5)
		copy(want[5:], "one")
		check(t, unix.Lchown(m.Path("d/f"), 1000, 1000))
		check(t, unix.Rename(m.Path("d/f"), m.Path("e/g")))
		check(t, unix.Link(m.Path("e/g"), m.Path("d/h")))
		pwrite(t, fd, []byte("two"), 50*block)
		copy(want[50*block:], "two")
		check(t, unix.Unlink(m.Path("e/g")))
		check(t, unix.Rename(m.Path("d"), m.Path("moved")))
		unix.Close(fd)
		for range 2 {
			wantFile(t, m.Path("moved/h"), want)
			var st unix.Stat_t
			check(t, unix.Lstat(m.Path("moved/h"), &st))
			if st.Uid != 1000 || st.Nlink != 1 || st.Size != int64(len(want)) {
				t.Errorf("uid %d, nlink %d, size %d", st.Uid, st.Nlink, st.Size)
			}
			m.Remount()
		}
	})
}

// Metadata changes copy no data.
func TestTrapChownCopiesNoData(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": data(1, 8<<20)})}, format)
		check(t, unix.Lchown(m.Path("f"), 1000, 1000))
		check(t, os.Chmod(m.Path("f"), 0o600))
		check(t, unix.Lsetxattr(m.Path("f"), "user.a", []byte("1"), 0))
		check(t, unix.UtimesNanoAt(unix.AT_FDCWD, m.Path("f"), []unix.Timespec{{Sec: 1}, {Sec: 2}}, 0))
		m.Unmount()
		var st unix.Stat_t
		check(t, unix.Lstat(filepath.Join(m.Upper, "f"), &st))
		if st.Blocks*512 > 64<<10 {
			t.Errorf("metadata changes allocated %d bytes", st.Blocks*512)
		}
		m.Again()
		wantFile(t, m.Path("f"), data(1, 8<<20))
	})
}

// The base file changed under the sketch: EIO for that file, a finding, and nothing else suffers.
func TestTrapChangedLowerIsAnErrorForThatFileOnly(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		lower := lowerWith(t, map[string][]byte{"f": data(1, 20*block), "other": data(2, 20*block)})
		m := mnt.New(t, []string{lower}, format)
		m.SkipFsck = true
		for _, name := range []string{"f", "other"} {
			check(t, patch(m.Path(name), "x", 3*block))
		}
		m.Unmount()
		check(t, os.WriteFile(filepath.Join(lower, "f"), data(3, 21*block), 0o644))
		m.Again()

		if _, err := os.ReadFile(m.Path("f")); err == nil {
			t.Error("reading a sketch over a changed lower file succeeded")
		} else {
			wantErrno(t, "reading a sketch over a changed lower", err, unix.EIO)
		}
		want := data(2, 20*block)
		want[3*block] = 'x'
		wantFile(t, m.Path("other"), want)
		check(t, os.WriteFile(m.Path("new"), []byte("works"), 0o644))
		m.Unmount()
		out, code := mnt.FsckOutput(t, m.Config)
		if code != 1 || !bytes.Contains([]byte(out), []byte("f")) {
			t.Errorf("fsck: exit status %d, want 1 and a finding that names f:\n%s", code, out)
		}
	})
}

// patch writes a few bytes into a file through a descriptor of its own.
func patch(path, p string, off int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(p), off)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// A damaged header: every bit of it counts. EIO for that file only, and fsck says so.
func TestTrapDamagedHeader(t *testing.T) {
	const xattr = "trusted.overlay.metacopy"
	eachFormat(t, func(t *testing.T, format string) {
		want := data(1, 20*block)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": want, "other": want})}, format)
		m.SkipFsck = true
		check(t, patch(m.Path("f"), "x", 3*block))
		want = bytes.Clone(want)
		want[3*block] = 'x'
		m.Unmount()
		upper := filepath.Join(m.Upper, "f")
		header := make([]byte, 4096)
		n, err := unix.Lgetxattr(upper, xattr, header)
		check(t, err)
		header = header[:n]
		for i := 0; i < n; i += 1 + n/12 {
			bad := bytes.Clone(header)
			bad[i] ^= 0x41
			check(t, unix.Lsetxattr(upper, xattr, bad, 0))
			m.Again()
			if got, err := os.ReadFile(m.Path("f")); err == nil {
				t.Errorf("byte %d of %d damaged: read %d bytes (right ones: %t) instead of EIO", i, n, len(got), bytes.Equal(got, want))
			} else {
				wantErrno(t, fmt.Sprintf("byte %d damaged", i), err, unix.EIO)
			}
			wantFile(t, m.Path("other"), data(1, 20*block))
			m.Unmount()
			if out, code := mnt.FsckOutput(t, m.Config); code != 1 {
				t.Errorf("byte %d damaged: fsck's exit status is %d, want 1:\n%s", i, code, out)
			}
		}
		check(t, unix.Lsetxattr(upper, xattr, header, 0))
		m.Fsck()
		m.Again()
		wantFile(t, m.Path("f"), want)
	})
}

// A damaged block table: what cannot be known is EIO, what is read is right.
func TestTrapDamagedTable(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		// More single blocks are written than a header can name in the table's place (docs/format.md).
		const blocks = 1300
		want := data(1, blocks*block)
		m := mnt.New(t, []string{lowerWith(t, map[string][]byte{"f": want, "other": want})}, format)
		m.SkipFsck = true
		want = bytes.Clone(want)
		f, err := os.OpenFile(m.Path("f"), os.O_WRONLY, 0)
		check(t, err)
		for b := int64(1); b < blocks; b += 2 {
			want[b*block] = 'x'
			_, err = f.WriteAt([]byte("x"), b*block)
			check(t, err)
		}
		check(t, f.Close())
		m.Unmount()
		upper := filepath.Join(m.Upper, "f")
		clean, err := os.ReadFile(upper)
		check(t, err)
		damaged := 0
		for _, off := range tableBytes(clean, want) {
			bad := clean[off] ^ 0x10
			check(t, patch(upper, string([]byte{bad}), off))
			m.Again()
			if got, err := os.ReadFile(m.Path("f")); err != nil {
				wantErrno(t, fmt.Sprintf("damage at %d", off), err, unix.EIO)
				damaged++
			} else if !bytes.Equal(got, want) {
				t.Errorf("damage at %d: wrong bytes were read without an error, from %d on", off, firstDifference(got, want))
			}
			wantFile(t, m.Path("other"), data(1, blocks*block))
			m.Unmount()
			if out, code := mnt.FsckOutput(t, m.Config); code != 1 {
				t.Errorf("damage at %d: fsck's exit status is %d, want 1:\n%s", off, code, out)
			}
			check(t, patch(upper, string(clean[off:off+1]), off))
		}
		if damaged == 0 {
			t.Error("no damage was ever noticed: the test found no table")
		}
		m.Fsck()
	})
}

// tableBytes picks offsets of bytes that are not zero and not the file's data: those of its table. The blocks that were
// written are whole, so their bytes are easily told apart.
func tableBytes(upper, logical []byte) []int64 {
	written := map[string]bool{}
	for off := block; off < len(logical); off += 2 * block {
		written[string(logical[off:off+block])] = true
	}
	var found []int64
	for off := 0; off < len(upper); {
		if off%block == 0 && off+block <= len(upper) && written[string(upper[off:off+block])] {
			off += block
			continue
		}
		if upper[off] == 0 {
			off++
			continue
		}
		found = append(found, int64(off))
		off += 7
	}
	step := max(1, len(found)/8)
	var picked []int64
	for i := 0; i < len(found); i += step {
		picked = append(picked, found[i])
	}
	return picked
}

// A copy of a big file must not lock the whole namespace: others get work done before it ends.
func TestTrapNamespaceIsFreeDuringACopy(t *testing.T) {
	lower := lowerWith(t, map[string][]byte{"huge": data(1, 256<<20), "d/": nil})
	m := mnt.New(t, []string{lower}, "copyup=full")
	var copied atomic.Bool
	started := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		close(started)
		err := patch(m.Path("huge"), "x", 0)
		copied.Store(true)
		done <- err
	}()
	<-started
	during := 0
	for i := 0; !copied.Load(); i++ {
		p := m.Path("d", fmt.Sprint(i))
		check(t, os.WriteFile(p, []byte("x"), 0o644))
		check(t, os.Rename(p, p+".moved"))
		if !copied.Load() {
			during++
		}
	}
	check(t, <-done)
	if during == 0 {
		t.Error("nothing else was done while a file was copied")
	}
}

// A committed upper layer full of sketches is the lower layer of the next container: blocks come through the chain.
func TestSketchesStackUp(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		want := data(1, 5<<20+77)
		stack := []string{lowerWith(t, map[string][]byte{"f": want, "untouched": want})}
		want = bytes.Clone(want)
		for level := range 4 {
			m := mnt.Start(t, rival.Config{Lowers: stack, Options: []string{format}})
			fd, err := unix.Open(m.Path("f"), unix.O_RDWR, 0)
			check(t, err)
			for i := range 20 {
				p, off := data(level*100+i, 3000), int64(level*7000+i*230_011)
				pwrite(t, fd, p, off)
				copy(want[off:], p)
			}
			if level == 2 { // a shorter file, and longer again: the tail is zeros for ever
				check(t, unix.Ftruncate(fd, 4<<20+5))
				check(t, unix.Ftruncate(fd, int64(len(want))))
				clear(want[4<<20+5:])
			}
			unix.Close(fd)
			check(t, os.Chmod(m.Path("untouched"), os.FileMode(0o600+level)))
			wantFile(t, m.Path("f"), want)
			m.Remount()
			wantFile(t, m.Path("f"), want)
			wantFile(t, m.Path("untouched"), data(1, 5<<20+77))
			m.Unmount()
			stack = append([]string{m.Upper}, stack...)
		}
		// And read-only, all of them lower.
		m := mnt.Start(t, rival.Config{Lowers: stack, Upper: "-", Options: []string{format}})
		wantFile(t, m.Path("f"), want)
		wantErrno(t, "writing to a mount without an upper", patch(m.Path("f"), "x", 0), unix.EROFS)
	})
}

// flatten leaves what kernel overlayfs can use.
func TestFlattenedUpperServesKernelOverlayfs(t *testing.T) {
	eachFormat(t, func(t *testing.T, format string) {
		want := data(1, 3<<20)
		lower := lowerWith(t, map[string][]byte{"f": want, "chowned": want, "gone": want})
		m := mnt.New(t, []string{lower}, format)
		want = bytes.Clone(want)
		check(t, patch(m.Path("f"), "partly", 2<<20))
		copy(want[2<<20:], "partly")
		check(t, unix.Lchown(m.Path("chowned"), 7, 7))
		check(t, unix.Unlink(m.Path("gone")))
		m.Unmount()
		m.Flatten()
		m.Fsck()
		o := mnt.Start(t, rival.Config{System: rival.Overlay, Lowers: m.Lowers, Upper: m.Upper, Work: m.Work})
		wantFile(t, o.Path("f"), want)
		wantFile(t, o.Path("chowned"), data(1, 3<<20))
		if _, err := os.Lstat(o.Path("gone")); !os.IsNotExist(err) {
			t.Errorf("a removed file is back: %v", err)
		}
	})
}
