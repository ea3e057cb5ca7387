// Package block is one overlay file: block states, copy-after-write, table formats, durability. It knows nothing of
// names or FUSE.
package block
