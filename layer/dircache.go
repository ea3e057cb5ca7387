package layer

import (
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Almost every call on a layer names an object by its path, and the way to its parent is the same for all siblings. So
// parents are kept open, as O_PATH descriptors, and most calls become a single *at system call on one name, which
// cannot be led astray.
//
// One cache serves all layers of the process: a union of 500 layers must not hold 500 times as many descriptors as a
// union of one.

// maxCachedDirs bounds the descriptors that the cache holds; with a small RLIMIT_NOFILE it takes a quarter of that.
const maxCachedDirs = 1024

// dirRef is an open directory. The cache holds one reference, every user one more; the last closes the descriptor.
type dirRef struct {
	fd   int
	refs atomic.Int32

	d          *Dir
	path       string
	prev, next *dirRef // LRU ring, guarded by dirCache.mu
}

func (r *dirRef) release() {
	if r.refs.Add(-1) == 0 {
		unix.Close(r.fd)
	}
}

type dirKey struct {
	d    *Dir
	path string
}

type dirCache struct {
	mu    sync.Mutex
	refs  map[dirKey]*dirRef
	ring  dirRef // sentinel: ring.next is the most recently used
	limit int
}

func newDirCache(limit int) *dirCache {
	c := &dirCache{refs: make(map[dirKey]*dirRef), limit: limit}
	c.ring.prev, c.ring.next = &c.ring, &c.ring
	return c
}

var sharedDirs = sync.OnceValue(func() *dirCache {
	limit := maxCachedDirs
	var rl unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &rl); err == nil && rl.Cur/4 < uint64(limit) {
		limit = max(int(rl.Cur/4), 1)
	}
	return newDirCache(limit)
})

func (r *dirRef) unlink() { r.prev.next, r.next.prev = r.next, r.prev }

func (c *dirCache) toFront(r *dirRef) {
	r.prev, r.next = &c.ring, c.ring.next
	r.prev.next, r.next.prev = r, r
}

// get returns the directory with a reference for the caller, or nil.
func (c *dirCache) get(d *Dir, path string) *dirRef {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.refs[dirKey{d, path}]
	if r == nil {
		return nil
	}
	r.refs.Add(1)
	r.unlink()
	c.toFront(r)
	return r
}

// put makes fd known as path, unless something in d was moved since gen was read: fd may then be the directory that
// had this path before. The caller gets its reference either way.
func (c *dirCache) put(d *Dir, path string, fd int, gen uint64) *dirRef {
	r := &dirRef{fd: fd, d: d, path: strings.Clone(path)}
	r.refs.Store(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	key := dirKey{d, r.path}
	if d.gen.Load() != gen || d.closed.Load() || c.refs[key] != nil {
		return r
	}
	for len(c.refs) >= c.limit {
		c.drop(c.ring.prev)
	}
	r.refs.Add(1)
	c.refs[key] = r
	c.toFront(r)
	return r
}

// drop forgets r. The caller holds c.mu.
func (c *dirCache) drop(r *dirRef) {
	delete(c.refs, dirKey{r.d, r.path})
	r.unlink()
	r.release()
}

// forget drops the directory at path.
func (c *dirCache) forget(d *Dir, path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d.gen.Add(1)
	if r := c.refs[dirKey{d, path}]; r != nil {
		c.drop(r)
	}
}

// forgetTree drops the directory at path and everything below; "" means all of d.
func (c *dirCache) forgetTree(d *Dir, path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d.gen.Add(1)
	for key, r := range c.refs {
		if key.d == d && (path == "" || isBelow(key.path, path)) {
			c.drop(r)
		}
	}
}

// isBelow tells whether path is top itself or lies below it.
func isBelow(path, top string) bool {
	return strings.HasPrefix(path, top) && (len(path) == len(top) || path[len(top)] == '/')
}
