package fusefs

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const fileLen = 64 << 10

// content of a test file: lines of 16 bytes that say where they are.
func content(magic string) string {
	var b strings.Builder
	b.WriteString(magic)
	for b.Len() < fileLen {
		fmt.Fprintf(&b, "%015d\n", b.Len())
	}
	return b.String()[:fileLen]
}

// kinds of files, and which reads of them are passed through to the lower file.
var kinds = []struct {
	name, magic string
	upper       bool // made through the mount before
	frozen      map[Passthrough]bool
}{
	{name: "data", frozen: map[Passthrough]bool{PassthroughOn: true}},
	{name: "image", magic: "\x7fELF", frozen: map[Passthrough]bool{PassthroughOn: true, PassthroughAuto: true}},
	{name: "upper", upper: true},
}

// TestCoherence: a reader and a writer of one file, in both orders, by read and through a mapping. Only a descriptor
// that was passed through to the lower file before the first write may show the old bytes.
func TestCoherence(t *testing.T) {
	for _, mode := range []Passthrough{PassthroughAuto, PassthroughOn, PassthroughOff} {
		for _, k := range kinds {
			for _, readerFirst := range []bool{true, false} {
				for _, mapped := range []bool{false, true} {
					name := fmt.Sprintf("%v/%s/readerFirst=%v/mappedWrite=%v", mode, k.name, readerFirst, mapped)
					t.Run(name, func(t *testing.T) {
						old := content(k.magic)
						r := newRig(t, Options{Passthrough: mode}, func(lower string) {
							must(t, os.WriteFile(lower+"/f", []byte(old), 0o644))
						})
						file := r.path("f")
						if k.upper {
							file = r.path("new")
							must(t, os.WriteFile(file, []byte(old), 0o644))
						}
						coherence(t, r, file, old, readerFirst, mapped, readerFirst && k.frozen[mode])
						if b, err := os.ReadFile(r.lower + "/f"); err != nil || string(b) != old {
							t.Errorf("the lower file changed (%v)", err)
						}
					})
				}
			}
		}
	}
}

const (
	mark   = "written here"
	markAt = 20480 + 100
)

func coherence(t *testing.T, r *rig, file, old string, readerFirst, mappedWrite, frozen bool) {
	reader, writer := startActor(t, 0), startActor(t, 0)
	var rfd, wfd, oldMap int
	openReader := func() {
		rfd = reader.open(file, unix.O_RDONLY)
		oldMap = reader.mmap(rfd, fileLen, unix.PROT_READ)
		if got := reader.pread(rfd, 0, fileLen); got != old {
			t.Fatal("the reader does not see the file as it was")
		}
		reader.load(oldMap, 0, fileLen)
	}
	if readerFirst {
		openReader()
	}
	wfd = writer.open(file, unix.O_RDWR)
	if !readerFirst {
		openReader()
	}
	if mappedWrite {
		m := writer.mmap(wfd, fileLen, unix.PROT_READ|unix.PROT_WRITE)
		writer.store(m, markAt, mark)
		defer writer.munmap(m)
	} else {
		writer.pwrite(wfd, markAt, mark)
	}
	now := old[:markAt] + mark + old[markAt+len(mark):]
	seen := now
	if frozen {
		seen = old
	}
	same(t, "the old descriptor, read", reader.pread(rfd, 0, fileLen), seen)
	same(t, "the old mapping", reader.load(oldMap, 0, fileLen), seen)
	same(t, "a fresh mapping of the old descriptor", reader.load(reader.mmap(rfd, fileLen, unix.PROT_READ), 0, fileLen), seen)
	same(t, "the writer", writer.pread(wfd, 0, fileLen), now)
	fresh := reader.open(file, unix.O_RDONLY)
	same(t, "a new descriptor, read", reader.pread(fresh, 0, fileLen), now)
	same(t, "a new descriptor, mapping", reader.load(reader.mmap(fresh, fileLen, unix.PROT_READ), 0, fileLen), now)

	// Everybody goes, and the file is opened anew in whatever mode it now gets.
	reader.stop()
	writer.close(wfd)
	again := writer.open(file, unix.O_RDWR)
	same(t, "after reopening", writer.pread(again, 0, fileLen), now)
	writer.pwrite(again, 0, "second")
	now = "second" + now[6:]
	same(t, "after a second write", writer.pread(again, 0, fileLen), now)
	m := writer.mmap(again, fileLen, unix.PROT_READ)
	same(t, "after a second write, mapping", writer.load(m, 0, fileLen), now)
	writer.munmap(m)
	writer.close(again)
	if st := writer.stat(file); st.Size != fileLen {
		t.Errorf("size %d, want %d", st.Size, fileLen)
	}
}

func same(t *testing.T, who, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	t.Errorf("%s: %d bytes, want %d, which differ from byte %d on: %q, want %q", who, len(got), len(want), at,
		got[at:min(at+24, len(got))], want[at:min(at+24, len(want))])
}
