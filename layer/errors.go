package layer

import (
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"
)

// Damaged reports an object of a layer whose overlay attributes cannot be meant: a redirect that leads out of the tree,
// a forged override. It unwraps to EIO, which is what the application gets for that object and for no other.
type Damaged struct {
	Layer string // the layer's name
	Path  string // the object, relative to the layer's root
	What  string // what is wrong with it
}

func (e *Damaged) Error() string {
	return "layer " + e.Layer + ": " + strconv.Quote("/"+e.Path) + " is damaged: " + e.What
}

// Unwrap lets errors.Is(err, unix.EIO) find it.
func (e *Damaged) Unwrap() error { return unix.EIO }

func (d *Dir) damaged(path, what string) error {
	return &Damaged{Layer: d.name, Path: path, What: what}
}

// fail wraps err with the operation and the object. The answers that are part of everyday lookup stay bare, because a
// union of hundreds of layers gets them hundreds of times for one name.
func (d *Dir) fail(op, path string, err error) error {
	switch err {
	case nil:
		return nil
	case unix.ENOENT, unix.ENODATA, unix.ENOTDIR, unix.EEXIST, unix.ENOTEMPTY, unix.EOPNOTSUPP, unix.ENXIO:
		return err
	}
	switch err.(type) {
	case *fs.PathError, *Damaged:
		return err
	}
	return &fs.PathError{Op: op, Path: d.name + "/" + path, Err: err}
}
