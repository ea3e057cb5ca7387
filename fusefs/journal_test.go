package fusefs

import (
	"bytes"
	"os"
	"testing"

	"lamina/devfuse"
	"lamina/state"
	"lamina/union"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// journals are the servers of one union, one after another: none lives to give its answers to the kernel.
type journals struct {
	t     *testing.T
	fs    *union.FS
	state *state.Arena
	base  string
}

func newJournals(t *testing.T) *journals {
	t.Helper()
	j := &journals{t: t, base: t.TempDir()}
	for _, d := range []string{"/lower", "/upper", "/work"} {
		must(t, os.Mkdir(j.base+d, 0o755))
	}
	must(t, os.WriteFile(j.base+"/lower/file", bytes.Repeat([]byte("lower"), 100_000), 0o644))
	var err error
	j.state, err = state.Create("test")
	must(t, err)
	j.fs = openUnion(t, j.base+"/lower", j.base+"/upper", j.base+"/work", false)
	t.Cleanup(func() {
		must(t, j.fs.Close())
		must(t, j.state.Close())
	})
	return j
}

// next is the server that takes over.
func (j *journals) next() *journal {
	opt := Options{Logf: j.t.Logf, NoPassthrough: "no mount", Survive: &Survival{State: j.state}}
	n := newJournal(newServer(j.fs, opt))
	n.resume()
	return n
}

func (j *journals) ok(s fuse.Status) {
	j.t.Helper()
	if !s.Ok() {
		j.t.Fatal(s)
	}
}

// A lookup that comes again and again counts once.
func TestLookupAgain(t *testing.T) {
	j := newJournals(t)
	before := j.fs.Live()
	var out fuse.EntryOut
	h := fuse.InHeader{Unique: 10, NodeId: fuse.FUSE_ROOT_ID}
	j.ok(j.next().Lookup(nil, &h, "file", &out))
	h.Unique |= devfuse.Resent
	for range 3 {
		j.ok(j.next().Lookup(nil, &h, "file", &out))
	}
	last := j.next()
	j.ok(last.Lookup(nil, &h, "file", &out))
	last.answered(10)
	if n := j.fs.Live(); n != before+1 {
		t.Errorf("%d nodes, want %d", n, before+1)
	}
	last.Forget(out.NodeId, 1)
	if n := j.fs.Live(); n != before {
		t.Errorf("%d nodes after the kernel has forgotten them all, want %d", n, before)
	}
	if n := j.state.Count(state.Request); n != 0 {
		t.Errorf("%d requests are still written down", n)
	}
}

// An open that comes again does not truncate what was written since.
func TestTruncatingOpenAgain(t *testing.T) {
	j := newJournals(t)
	first := j.next()
	var found fuse.EntryOut
	j.ok(first.Lookup(nil, &fuse.InHeader{Unique: 10, NodeId: fuse.FUSE_ROOT_ID}, "file", &found))
	first.answered(10)
	in := fuse.OpenIn{InHeader: fuse.InHeader{Unique: 12, NodeId: found.NodeId}, Flags: unix.O_WRONLY | unix.O_TRUNC}
	var out fuse.OpenOut
	j.ok(first.Open(nil, &in, &out))
	must(t, os.WriteFile(j.base+"/upper/file", []byte("written since"), 0)) // as who has it passed through
	second := j.next()
	in.Unique |= devfuse.Resent
	in.Flags = unix.O_WRONLY | unix.O_TRUNC
	j.ok(second.Open(nil, &in, &out))
	if b, err := os.ReadFile(j.base + "/upper/file"); err != nil || string(b) != "written since" {
		t.Errorf("%q, %v", b, err)
	}
	second.Release(nil, &fuse.ReleaseIn{InHeader: fuse.InHeader{Unique: 14, NodeId: found.NodeId}, Fh: out.Fh})
	second.Forget(found.NodeId, 1)
	first.releaseAll()
}
