package fusefs

import (
	"fmt"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func TestHandles(t *testing.T) {
	var tab handles
	if tab.get(0) != nil || tab.get(1) != nil || tab.remove(7) != nil {
		t.Error("an empty table finds something")
	}
	seen := map[uint64]*handle{}
	for i := range 3 * handleChunk {
		h := &handle{id: uint64(i)}
		fh := tab.add(h)
		if fh == 0 || seen[fh] != nil {
			t.Fatalf("number %d was given out before", fh)
		}
		seen[fh] = h
	}
	for fh, h := range seen {
		if tab.get(fh) != h {
			t.Fatalf("handle %d is another", fh)
		}
		if fh%2 == 0 && tab.remove(fh) != h {
			t.Fatalf("removing %d gave another", fh)
		}
	}
	if got, want := tab.open(), 3*handleChunk/2; got != want {
		t.Errorf("%d open, want %d", got, want)
	}
	if fh := tab.add(&handle{}); seen[fh] != nil || placeOf(fh)%2 != 1 || placeOf(fh) >= 3*handleChunk {
		t.Errorf("number %d is not a freed one", fh)
	}
}

func TestHandlesConcurrently(t *testing.T) {
	var tab handles
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 2000 {
				h := &handle{}
				fh := tab.add(h)
				if tab.get(fh) != h || tab.remove(fh) != h || tab.get(fh) == h {
					t.Error("a handle is not where it was put")
				}
			}
		})
	}
	wg.Wait()
	if n := tab.open(); n != 0 {
		t.Errorf("%d handles left", n)
	}
}

// TestStatusOfErrors: what must not reach the kernel does not.
func TestStatusOfErrors(t *testing.T) {
	var lines logLines
	s := &server{opt: Options{Logf: lines.add}}
	for _, c := range []struct {
		err  error
		want unix.Errno
	}{
		{nil, 0},
		{unix.ENOENT, unix.ENOENT},
		{&wrapped{unix.ENOSPC}, unix.ENOSPC},
		{unix.ENOSYS, unix.EOPNOTSUPP},
		{unix.EINTR, unix.EIO},
		{errUnknown, unix.EIO},
	} {
		if got := s.status(c.err); got != fuse.Status(c.want) {
			t.Errorf("%v is answered with %v, want %v", c.err, got, c.want)
		}
	}
	if lines.count("answered as EIO") != 2 {
		t.Errorf("logged %d surprises, want 2", lines.count("answered as EIO"))
	}
}

type wrapped struct{ err error }

func (w *wrapped) Error() string { return fmt.Sprint("wrapped: ", w.err) }
func (w *wrapped) Unwrap() error { return w.err }

var errUnknown = &wrapped{nil}

// A RELEASE that comes again after a take-over must not close what was opened since.
func TestHandlesAfterTakeOver(t *testing.T) {
	var before, after handles
	fh := before.add(&handle{})
	before.remove(fh)
	after.putDone()
	h := &handle{}
	now := after.add(h)
	if after.remove(fh) != nil || after.get(now) != h {
		t.Errorf("number %#x was released before, and is given out again as %#x", fh, now)
	}
}
