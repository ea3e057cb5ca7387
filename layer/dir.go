package layer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

var (
	_ Layer = (*Dir)(nil)
	_ File  = (*dirFile)(nil)
	_ FDer  = (*dirFile)(nil)
)

// Options say how a directory is opened as a layer.
type Options struct {
	// ReadOnly opens the root through a read-only clone of its mount, so that not even the kernel can write through a
	// descriptor of this layer, and every operation that writes gives EROFS. Without it the layer can be written.
	ReadOnly bool
	// NS is where overlay's private attributes live. Zero: trusted.overlay.*.
	NS Namespace
	// OverrideStat is where owner and mode are kept. Zero: in the inodes.
	OverrideStat Override
	// WhiteoutFiles: ".wh." files are whiteouts, as in an image's archive. False: they are files like any other.
	WhiteoutFiles bool
}

// Dir is a directory used as a layer. All methods are safe for concurrent use, and all paths are relative to its root.
// The last component of a path is never followed. The process should run with umask 0: modes are taken as given.
type Dir struct {
	name     string
	root     int
	ns       Namespace
	override Override
	readOnly bool
	whFiles  bool  // see Options.WhiteoutFiles
	cloneErr error // why a ReadOnly root is no clone
	fsid     uint64

	gen    atomic.Uint64 // counts moves of directories, see dirCache.put
	closed atomic.Bool
	close  sync.Once
}

// OpenDir opens the directory at path, which may be reached through symbolic links.
//
// A ReadOnly root is a read-only clone of its mount (open_tree(2), mount_setattr(2)), which takes CAP_SYS_ADMIN in the
// mount namespace; without it, or on a kernel or a mount that cannot, the root is the directory itself and Cloned
// reports false. Such a layer is still never written by this package, but its descriptors must not be handed to the
// kernel as backing files.
func OpenDir(path string, opt Options) (*Dir, error) {
	d := &Dir{name: path, ns: opt.NS, override: opt.OverrideStat, readOnly: opt.ReadOnly, whFiles: opt.WhiteoutFiles, root: -1}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := d.openRoot(abs); err != nil {
		return nil, &os.PathError{Op: "open layer", Path: path, Err: err}
	}
	if err := d.identify(); err != nil {
		unix.Close(d.root)
		return nil, err
	}
	return d, nil
}

func (d *Dir) openRoot(path string) (err error) {
	const flags = unix.O_DIRECTORY | unix.O_CLOEXEC
	if d.readOnly {
		d.root, err = cloneReadOnly(path)
		if err == nil {
			return checkDir(d.root)
		}
		if !cannotClone(err) {
			return err
		}
		d.cloneErr = fmt.Errorf("cannot clone the mount of %s read-only: %w", path, err)
	}
	d.root, err = unix.Open(path, unix.O_RDONLY|flags, 0)
	return err
}

func checkDir(fd int) error {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	if err != nil {
		unix.Close(fd)
	}
	return err
}

// identify finds out which filesystem holds the layer, and where owners and modes are kept.
func (d *Dir) identify() error {
	sfs, err := d.Statfs()
	if err != nil {
		return err
	}
	d.fsid = uint64(uint32(sfs.Fsid.Val[0])) | uint64(uint32(sfs.Fsid.Val[1]))<<32
	if d.fsid == 0 {
		if d.fsid, err = transientID(d.root); err != nil {
			return d.fail("identify", "", err)
		}
	}
	if d.override == OverrideAuto {
		d.override, err = detectOverride(d.root)
	}
	return err
}

// transientID identifies a filesystem without an f_fsid until the next boot: its device number means nothing after it.
func transientID(fd int) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return 0, err
	}
	h := fnv.New64a()
	h.Write(boot)
	h.Write(binary.LittleEndian.AppendUint64(nil, st.Dev))
	return h.Sum64(), nil
}

func detectOverride(root int) (Override, error) {
	for _, o := range []Override{OverridePrivileged, OverrideContainers} {
		_, err := lgetxattr(root, ".", o.attr(), make([]byte, 256))
		switch {
		case err == nil:
			return o, nil
		case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
		default:
			return 0, fmt.Errorf("reading %s of a layer's root: %w", o.attr(), err)
		}
	}
	return OverrideNone, nil
}

// Close releases the root and every directory kept open. Files opened from the layer live on.
func (d *Dir) Close() error {
	err := unix.EBADF
	d.close.Do(func() {
		d.closed.Store(true)
		sharedDirs().forgetTree(d, "")
		err = 0
		if e := unix.Close(d.root); e != nil {
			err = e.(unix.Errno)
		}
	})
	if err != 0 {
		return d.fail("close", "", err)
	}
	return nil
}

// Name is the path that the layer was opened by.
func (d *Dir) Name() string { return d.name }

// FS identifies the filesystem: its f_fsid, or an id that changes with every boot where there is none.
func (d *Dir) FS() uint64 { return d.fsid }

// NS is the namespace of overlay's private attributes in this layer.
func (d *Dir) NS() Namespace { return d.ns }

// ReadOnly reports whether the layer was opened read-only.
func (d *Dir) ReadOnly() bool { return d.readOnly }

// Override is where owners and modes are kept, with OverrideAuto resolved.
func (d *Dir) Override() Override { return d.override }

// Cloned reports whether the root is a read-only clone of its mount, so that the kernel refuses every write through
// this layer's descriptors.
func (d *Dir) Cloned() bool { return d.readOnly && d.cloneErr == nil }

// CloneErr says why a ReadOnly layer is not Cloned.
func (d *Dir) CloneErr() error { return d.cloneErr }

// RootFD is the root's descriptor, owned by the Dir. That of a clone is O_PATH.
func (d *Dir) RootFD() int { return d.root }

// Statfs describes the filesystem that holds the layer.
func (d *Dir) Statfs() (unix.Statfs_t, error) {
	var st unix.Statfs_t
	err := unix.Fstatfs(d.root, &st)
	return st, d.fail("statfs", "", err)
}

// maxResolve is the longest path given to one openat2: longer ones are walked in steps. PATH_MAX counts the NUL.
const maxResolve = unix.PathMax - 1

const resolveInside = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// openDirPath opens the directory at path as O_PATH, in as many steps as its length takes.
func (d *Dir) openDirPath(path string) (int, error) {
	if err := checkPath(path); err != nil {
		return -1, err
	}
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolveInside}
	at := d.root
	for {
		step, rest := splitStep(path)
		fd, err := openat2(at, step, &how)
		if at != d.root {
			unix.Close(at)
		}
		if err != nil || rest == "" {
			return fd, err
		}
		at, path = fd, rest
	}
}

// splitStep cuts the longest leading part of path that one system call takes.
func splitStep(path string) (step, rest string) {
	if len(path) <= maxResolve {
		return path, ""
	}
	cut := strings.LastIndexByte(path[:maxResolve+1], '/')
	if cut <= 0 {
		return path, "" // a single absurd name: the kernel says ENAMETOOLONG
	}
	return path[:cut], path[cut+1:]
}

func openat2(at int, path string, how *unix.OpenHow) (int, error) {
	for {
		fd, err := unix.Openat2(at, path, how)
		// EAGAIN: a rename somewhere raced with the check that ".." stays inside; EINTR: a signal on a slow filesystem.
		if err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
}

// checkPath refuses what the package promises never to walk.
func checkPath(path string) error {
	for name := range strings.SplitSeq(path, "/") {
		if err := checkName(name); err != nil {
			return err
		}
	}
	return nil
}

func checkName(name string) error {
	if name == "" || name == "." || name == ".." {
		return unix.EINVAL
	}
	return nil
}

// at returns the open parent of path, and path's last name in it. The caller releases the parent. For the root itself
// it is the root and ".".
func (d *Dir) at(path string) (parent *dirRef, fd int, name string, err error) {
	if path == "" {
		return nil, d.root, ".", nil
	}
	cut := strings.LastIndexByte(path, '/')
	name = path[cut+1:]
	if err := checkName(name); err != nil {
		return nil, -1, "", err
	}
	if d.reserved(name) {
		return nil, -1, "", unix.EINVAL // as fuse-overlayfs says of a name that an image cannot hold
	}
	if cut < 0 {
		return nil, d.root, name, nil
	}
	parent, err = d.dir(path[:cut])
	if err != nil {
		return nil, -1, "", err
	}
	return parent, parent.fd, name, nil
}

// done releases what at returned.
func done(parent *dirRef) {
	if parent != nil {
		parent.release()
	}
}

// dir returns the directory at path, not the root, with a reference for the caller.
func (d *Dir) dir(path string) (*dirRef, error) {
	cache := sharedDirs()
	if r := cache.get(d, path); r != nil {
		return r, nil
	}
	gen := d.gen.Load()
	fd, err := d.openDirPath(path)
	if err != nil {
		return nil, err
	}
	return cache.put(d, path, fd, gen), nil
}

// Stat implements Layer.
func (d *Dir) Stat(path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	if d.reserved(path) {
		return st, d.fail("stat", path, unix.ENOENT)
	}
	parent, fd, name, err := d.at(path)
	if err != nil {
		return st, d.fail("stat", path, err)
	}
	defer done(parent)
	err = d.statAt(fd, name, path, &st)
	if err != nil && errors.Is(err, unix.ENOENT) && d.whiteoutFile(fd, name) {
		return unix.Stat_t{Mode: unix.S_IFCHR, Nlink: 1}, nil
	}
	return st, err
}

func (d *Dir) statAt(fd int, name, path string, st *unix.Stat_t) error {
	if err := unix.Fstatat(fd, name, st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT); err != nil {
		return d.fail("stat", path, err)
	}
	if d.override == OverrideNone || !d.canOverride(st) {
		return nil
	}
	v, err := readXattr(fd, name, d.override.attr())
	return d.applyOverride(path, st, v, err)
}

// canOverride tells whether the object can carry the override attribute: user.* exists on files and directories only.
func (d *Dir) canOverride(st *unix.Stat_t) bool {
	typ := st.Mode & unix.S_IFMT
	return d.override == OverridePrivileged || typ == unix.S_IFREG || typ == unix.S_IFDIR
}

func (d *Dir) applyOverride(path string, st *unix.Stat_t, v []byte, err error) error {
	if err == unix.ENODATA || err == unix.EOPNOTSUPP {
		return nil
	}
	if err == unix.ERANGE {
		return d.damaged(path, "override_stat is longer than any valid value")
	}
	if err != nil {
		return d.fail("getxattr", path, err)
	}
	o, err := parseOverride(string(v))
	if err != nil {
		return d.damaged(path, err.Error())
	}
	if !o.apply(st) {
		return d.damaged(path, fmt.Sprintf("override_stat %q contradicts the object's type", v))
	}
	return nil
}

// ReadDir implements Layer.
func (d *Dir) ReadDir(path string) ([]Entry, error) {
	entries, err := d.RawReadDir(path)
	if d.whFiles {
		entries = translate(entries)
	}
	return entries, err
}

// openDirRead opens the directory at path for reading its entries or syncing it.
func (d *Dir) openDirRead(path string) (int, error) {
	parent, fd, name, err := d.at(path)
	if err != nil {
		return -1, err
	}
	defer done(parent)
	return openat2(fd, name, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: resolveInside})
}

var direntBufs = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// Offsets within struct linux_dirent64.
const (
	direntIno    = 0
	direntReclen = 16
	direntType   = 18
	direntName   = 19
)

func readEntries(fd int) ([]Entry, error) {
	buf := direntBufs.Get().(*[32 << 10]byte)
	defer direntBufs.Put(buf)
	var entries []Entry
	for {
		n, err := unix.Getdents(fd, buf[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return entries, err
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e Entry
			if e, rest, err = nextEntry(rest); err != nil {
				return nil, err
			}
			if e.Name != "." && e.Name != ".." {
				entries = append(entries, e)
			}
		}
	}
}

func nextEntry(b []byte) (e Entry, rest []byte, err error) {
	if len(b) <= direntName {
		return e, nil, unix.EIO
	}
	reclen := int(binary.NativeEndian.Uint16(b[direntReclen:]))
	if reclen <= direntName || reclen > len(b) {
		return e, nil, unix.EIO
	}
	name := b[direntName:reclen]
	if nul := bytes.IndexByte(name, 0); nul >= 0 {
		name = name[:nul]
	}
	// A name with a slash can only come from a broken filesystem; handing it on would build paths out of it.
	if len(name) == 0 || bytes.IndexByte(name, '/') >= 0 {
		return e, nil, unix.EIO
	}
	return Entry{Name: string(name), Ino: binary.NativeEndian.Uint64(b[direntIno:]), Type: b[direntType]}, b[reclen:], nil
}

// Readlink implements Layer.
func (d *Dir) Readlink(path string) (string, error) {
	parent, fd, name, err := d.at(path)
	if err != nil {
		return "", d.fail("readlink", path, err)
	}
	defer done(parent)
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(fd, name, buf[:])
	if err != nil {
		return "", d.fail("readlink", path, err)
	}
	return string(buf[:n]), nil
}

// Getxattr implements Layer.
func (d *Dir) Getxattr(path, attr string) ([]byte, error) {
	parent, fd, name, err := d.at(path)
	if err != nil {
		return nil, d.fail("getxattr", path, err)
	}
	defer done(parent)
	v, err := readXattr(fd, name, attr)
	return v, d.fail("getxattr", path, err)
}

// Listxattr implements Layer.
func (d *Dir) Listxattr(path string) ([]string, error) {
	parent, fd, name, err := d.at(path)
	if err != nil {
		return nil, d.fail("listxattr", path, err)
	}
	defer done(parent)
	var attrs []string
	err = eachXattr(fd, name, func(attr []byte) { attrs = append(attrs, string(attr)) })
	return attrs, d.fail("listxattr", path, err)
}

// Open implements Layer.
func (d *Dir) Open(path string) (File, error) {
	f := &dirFile{d: d, path: path}
	var err error
	if d.Cloned() && d.override == OverrideNone {
		err = f.openImmutable()
	}
	if f.st == nil {
		f.fd, err = d.OpenFile(path, unix.O_RDONLY, 0)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// OpenPath returns an O_PATH descriptor of the object itself, whatever its type.
func (d *Dir) OpenPath(path string) (int, error) {
	parent, fd, name, err := d.at(path)
	if err != nil {
		return -1, d.fail("open", path, err)
	}
	defer done(parent)
	got, err := unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	return got, d.fail("open", path, err)
}

// dirFile is an open regular file.
type dirFile struct {
	d    *Dir
	path string
	fd   int
	st   *unix.Stat_t // of a file of a clone, when it was opened
}

// openImmutable opens a file of a clone, keeping the attributes that were looked at on the way. Without them it leaves
// the file to be opened with more patience.
func (f *dirFile) openImmutable() error {
	parent, at, name, err := f.d.at(f.path)
	if err != nil {
		return f.d.fail("open", f.path, err)
	}
	defer done(parent)
	var st unix.Stat_t
	f.fd, err = openImmutable(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NOCTTY, &st)
	if err == unix.EAGAIN {
		return nil
	}
	f.st = &st
	return f.d.fail("open", f.path, err)
}

func (f *dirFile) FD() int { return f.fd }

func (f *dirFile) ReadAt(p []byte, off int64) (int, error) {
	total := 0
	for total < len(p) {
		n, err := unix.Pread(f.fd, p[total:], off+int64(total))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return total, f.d.fail("read", f.path, err)
		case n == 0:
			return total, io.EOF
		}
		total += n
	}
	return total, nil
}

func (f *dirFile) Stat() (unix.Stat_t, error) {
	if f.st != nil {
		return *f.st, nil
	}
	return f.d.FStat(f.fd)
}

func (f *dirFile) SeekData(off int64) (start, end int64, err error) {
	if start, err = unix.Seek(f.fd, off, unix.SEEK_DATA); err == nil {
		end, err = unix.Seek(f.fd, start, unix.SEEK_HOLE)
	}
	return start, end, f.d.fail("seek", f.path, err)
}

func (f *dirFile) Close() error {
	fd := f.fd
	f.fd = -1
	return f.d.fail("close", f.path, unix.Close(fd))
}

// FStat is Stat of an open file or O_PATH descriptor of this layer.
func (d *Dir) FStat(fd int) (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return st, fmt.Errorf("stat of an open file in %s: %w", d.name, err)
	}
	if d.override == OverrideNone || !d.canOverride(&st) {
		return st, nil
	}
	var buf [maxOverride]byte
	n, err := unix.Getxattr(fdPath(fd), d.override.attr(), buf[:])
	return st, d.applyOverride("(open file)", &st, buf[:max(n, 0)], err)
}
