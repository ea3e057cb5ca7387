package layer

import (
	"golang.org/x/sys/unix"
)

// Marks reads overlay's attributes of the object at path, whose type is that of mode (S_IFMT bits). Most objects carry
// none, and that takes one system call. A redirect that could lead out of the tree is an error of type *Damaged.
func (d *Dir) Marks(path string, mode uint32) (Marks, error) {
	var m Marks
	typ := mode & unix.S_IFMT
	if d.ns == User && typ != unix.S_IFREG && typ != unix.S_IFDIR {
		return m, nil // the kernel keeps user.* attributes on files and directories only
	}
	parent, fd, name, err := d.at(path)
	if err != nil {
		return m, d.fail("marks", path, err)
	}
	defer done(parent)
	has, err := d.listMarks(fd, name)
	if err != nil {
		return m, d.fail("listxattr", path, err)
	}
	m.Bare, m.Capable = !has.any, has.capability
	if typ == unix.S_IFDIR && d.whFiles {
		// A redirect says what the directory merges with, whatever was here before it.
		m.Opaque = d.opaqueFile(fd, name) || !has.redirect && d.whiteoutFile(fd, name)
	}
	if has == (markSet{any: has.any, capability: has.capability}) {
		return m, nil
	}
	r := markReader{d: d, fd: fd, name: name, path: path}
	if typ == unix.S_IFDIR {
		if v, ok := r.read(has.opaque, XattrOpaque); ok {
			m.Opaque, m.XWhiteouts = m.Opaque || string(v) == "y", string(v) == "x"
		}
	}
	if typ == unix.S_IFREG {
		m.Header, m.Metacopy = r.read(has.metacopy, XattrMetacopy)
	}
	if typ == unix.S_IFDIR || m.Metacopy {
		if v, ok := r.read(has.redirect, XattrRedirect); ok {
			m.Redirect = string(v)
			r.checkRedirect(m.Redirect)
		}
	}
	m.Origin, _ = r.read(has.origin, XattrOrigin)
	return m, r.err
}

// markSet says which of overlay's attributes an object has, and whether it has capabilities, or any attribute at all.
type markSet struct{ opaque, redirect, metacopy, origin, capability, any bool }

func (d *Dir) listMarks(fd int, name string) (markSet, error) {
	var has markSet
	prefix := d.ns.Prefix()
	err := eachXattr(fd, name, func(attr []byte) {
		has.any = true
		has.capability = has.capability || string(attr) == "security.capability"
		if len(attr) <= len(prefix) || string(attr[:len(prefix)]) != prefix {
			return
		}
		switch string(attr[len(prefix):]) {
		case XattrOpaque:
			has.opaque = true
		case XattrRedirect:
			has.redirect = true
		case XattrMetacopy:
			has.metacopy = true
		case XattrOrigin:
			has.origin = true
		}
	})
	if err == unix.EOPNOTSUPP {
		err = nil
	}
	return has, err
}

// markReader reads attributes of one object until the first error.
type markReader struct {
	d    *Dir
	fd   int
	name string
	path string
	err  error
}

func (r *markReader) read(present bool, attr string) ([]byte, bool) {
	if !present || r.err != nil {
		return nil, false
	}
	v, err := readXattr(r.fd, r.name, r.d.ns.Prefix()+attr)
	if err == unix.ENODATA {
		return nil, false
	}
	r.err = r.d.fail("getxattr", r.path, err)
	return v, err == nil
}

func (r *markReader) checkRedirect(v string) {
	if r.err != nil {
		return
	}
	if what := checkRedirect(v); what != "" {
		r.err = r.d.damaged(r.path, what)
	}
}

// Origin returns the object's recorded origin, or ENODATA.
func (d *Dir) Origin(path string) ([]byte, error) {
	return d.Getxattr(path, d.ns.Prefix()+XattrOrigin)
}

// IsWhiteout tells whether the object at path, whose attributes are st, hides its name: a character device 0:0, or, in
// a directory marked overlay.opaque=x, an empty regular file that carries overlay.whiteout.
func (d *Dir) IsWhiteout(path string, st *unix.Stat_t, dirXWhiteouts bool) (bool, error) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		return st.Rdev == 0, nil
	case unix.S_IFREG:
		if !dirXWhiteouts || st.Size != 0 {
			return false, nil
		}
	default:
		return false, nil
	}
	_, err := d.Getxattr(path, d.ns.Prefix()+XattrWhiteout)
	if err == unix.ENODATA || err == unix.EOPNOTSUPP {
		return false, nil
	}
	return err == nil, err
}
