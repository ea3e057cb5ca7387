package devfuse

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// TestBuffersAreGivenBack: after a burst of requests the memory of those buffers goes that nobody has needed for a while.
func TestBuffersAreGivenBack(t *testing.T) {
	c := New(-1, fuse.NewDefaultRawFileSystem(), Options{Mount: &fuse.MountOptions{MaxWrite: MaxWrite}})
	defer c.Close()
	use := func(n int) (taken []buffers) {
		t.Helper()
		for range n {
			b, err := c.takeBuffers()
			if err != nil {
				t.Fatal(err)
			}
			taken = append(taken, b)
		}
		for _, b := range taken {
			b.in[0], b.out[0] = 1, 1
			c.putBuffers(b)
		}
		return taken
	}
	burst := use(maxReaders)
	c.trim() // as when trimAfter has passed
	use(5)
	c.trim() // five were needed meanwhile
	if len(c.spare) != 5 || c.trimmer == nil {
		t.Errorf("%d spare buffers, want 5; trimmer %v", len(c.spare), c.trimmer)
	}
	c.trim()
	if len(c.spare) != keepSpare || c.trimmer != nil {
		t.Errorf("%d spare buffers, want %d; trimmer %v", len(c.spare), keepSpare, c.trimmer)
	}
	mapped := 0
	for _, b := range burst {
		if unix.Madvise(b.in[:4096], unix.MADV_WILLNEED) == nil { // ENOMEM: it is not mapped
			mapped++
		}
	}
	if mapped != keepSpare {
		t.Errorf("%d buffers are mapped, want %d", mapped, keepSpare)
	}
	use(3)
	if c.trimmer == nil {
		t.Error("what is spare again is not given back again")
	}
}
