package fusefs

import (
	"sync"

	"lamina/union"

	"golang.org/x/sys/unix"
)

// departed keeps files open whose last name went, by node number, until the kernel forgets them.
//
// An OPEN may be on its way when the name goes: the kernel looked the name up and holds the inode. On a local filesystem
// the open succeeds; here the file must still be there to be opened. ESTALE makes the VFS look up again only once, so
// that a program which opens a file that others keep replacing would see the error in the end.
type departed struct{ files sync.Map }

// keep takes over h.
func (d *departed) keep(id uint64, h *union.Handle) {
	if old, ok := d.files.Swap(id, h); ok {
		old.(*union.Handle).Release()
	}
}

// forget lets go of a node's file, if it is kept.
func (d *departed) forget(id uint64) {
	if h, ok := d.files.LoadAndDelete(id); ok {
		h.(*union.Handle).Release()
	}
}

func (d *departed) forgetAll() {
	d.files.Range(func(id, _ any) bool {
		d.forget(id.(uint64))
		return true
	})
}

// removing calls remove, which takes the name away from what it stands for, and keeps that if it was its last name.
// What cannot be opened (a special file, a damaged one) is removed all the same.
func (s *server) removing(dir *union.Node, name string, remove func() error) error {
	n, err := s.fs.Lookup(dir, name)
	if err != nil {
		return remove()
	}
	defer s.fs.Forget(n.ID(), 1)
	if n.Mode() != unix.S_IFREG {
		return remove()
	}
	h, err := s.fs.Open(n, unix.O_RDONLY)
	if err != nil {
		return remove()
	}
	err = remove()
	if st, statErr := s.fs.Attr(n); err == nil && statErr == nil && st.Nlink == 0 {
		s.departed.keep(n.ID(), h)
	} else {
		h.Release()
	}
	return err
}
