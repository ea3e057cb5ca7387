// Package snapshotter keeps the layers of containers for containerd: images unpacked as they are, containers on Lamina.
//
// # What is where
//
// Below the root directory:
//
//	metadata.db        containerd's own storage helper: names, parents, labels, usage
//	snapshots/ID/fs    the layer; a container's upper directory
//	snapshots/ID/work  a container's workdir
//	snapshots/ID/pool  says that Lamina writes this layer, and in which pool (see record)
//	snapshots/ID/unsynced  says that a power cut may leave the layer incomplete (see checkSynced)
//	snapshots/new-*    being made
//	mnt/ID             where a container's union is mounted
//	run/POOL.sock      where the server of a pool is asked; .log beside it is what it has to say
//	lock               held by the one snapshotter of this root
//
// # Which snapshots are mounted by whom
//
// A snapshot that an image layer is unpacked into is answered with a kernel overlay mount: containerd's applier sees one and
// writes straight into the upper directory, without mounting anything. So are read-only views, which nobody writes to. A
// container's snapshot is mounted by Lamina, in the server of its pool, and answered with a bind mount of that. So is
// everything whose parents hold a layer that Lamina wrote, because kernel overlayfs cannot read sketches.
//
// # Order
//
// What a snapshot consists of is made under a temporary name and renamed within the transaction that makes it known. It is
// unknown first and removed then. So whatever step a crash comes at, what is on disk and not known is garbage, and is removed
// at the next start; and what is known is complete.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"lamina/layer"
	"lamina/pool"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Config of a Snapshotter. Root is needed; the zero value of everything else is what most want.
type Config struct {
	// Root is the directory that everything lies in. Its filesystem must hold trusted.* attributes.
	Root string
	// Options are mount options of Lamina for every container, such as "format=bcow".
	Options []string
	// Direct has containerd mount containers itself, by mount.fuse3 and a server for each, instead of in pool servers.
	Direct bool
	// RemapIDs shows owners as a snapshot's uidmapping and gidmapping labels say. Without it containerd has changed the
	// owners of the layers below before, and only the root directory is given to the container's root.
	RemapIDs bool
	// Survive lets mounts outlive the pool servers: when one is killed another takes over. It excludes Direct.
	Survive bool
	// Cgroup is the directory of the cgroup that pool servers begin in. Empty: the snapshotter's own.
	Cgroup string
	// Program runs "lamina". Empty: this program.
	Program string
	// Logf receives one line per event that an operator must know of. Nil: nobody does.
	Logf func(format string, args ...any)
}

// Snapshotter is containerd's interface on a root directory.
type Snapshotter struct {
	c     Config
	ms    *storage.MetaStore
	lock  *os.File
	pools pools
	ids   keyed // orders what is done with one snapshot
	boot  string

	syncer syncer

	closed sync.Once
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens a root directory, makes what is missing, and removes what a crash has left. Mounts of running containers are
// left alone.
func New(c Config) (_ *Snapshotter, err error) {
	if c.Logf == nil {
		c.Logf = func(string, ...any) {}
	}
	if c.Root, err = prepareRoot(c.Root); err != nil {
		return nil, err
	}
	options := c.Options
	if c.Survive {
		options = append([]string{"survive=on"}, options...) // what the pools' servers add
	}
	if err := checkOptions(options); err != nil {
		return nil, err
	}
	if c.Survive && c.Direct {
		return nil, errors.New("survive: there are no pool servers with direct mounts: give the option survive=on instead")
	}
	if err := prepareCgroup(c.Cgroup); err != nil {
		return nil, err
	}
	o := &Snapshotter{c: c}
	if o.boot, err = bootID(); err != nil {
		return nil, err
	}
	if o.lock, err = pool.Lock(filepath.Join(c.Root, "lock"), "another snapshotter has it: end that first, or use another root"); err != nil {
		return nil, fmt.Errorf("root %s: %w", c.Root, err)
	}
	defer func() {
		if err != nil {
			o.lock.Close()
		}
	}()
	o.pools.init(c)
	if o.ms, err = storage.NewMetaStore(filepath.Join(c.Root, "metadata.db")); err != nil {
		return nil, err
	}
	// Nothing is known to hold it yet: the first transaction makes the file.
	if err := o.Cleanup(context.Background()); err != nil {
		// Some directory cannot be removed: no reason to keep all others' containers from starting. The next time tries again.
		c.Logf("root %s: removing what a crash has left: %v", c.Root, err)
	}
	if err = o.resumeSyncs(context.Background()); err != nil {
		o.syncer.done.Wait()
		_ = o.ms.Close()
		return nil, fmt.Errorf("root %s: %w", c.Root, err)
	}
	return o, nil
}

// Close lets go of the root. Containers' mounts stay, and so do the servers that have any.
func (o *Snapshotter) Close() error {
	var err error
	o.closed.Do(func() {
		o.pools.close()
		o.syncer.done.Wait()
		err = errors.Join(o.ms.Close(), o.lock.Close())
	})
	return err
}

func (o *Snapshotter) dir(id string) string   { return filepath.Join(o.c.Root, "snapshots", id) }
func (o *Snapshotter) upper(id string) string { return filepath.Join(o.dir(id), "fs") }
func (o *Snapshotter) work(id string) string  { return filepath.Join(o.dir(id), "work") }
func (o *Snapshotter) mnt(id string) string   { return filepath.Join(o.c.Root, "mnt", id) }

// Stat tells about a snapshot.
func (o *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = o.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes labels.
func (o *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = o.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Walk calls fn for every snapshot.
func (o *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return o.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		var failed error
		err := storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			failed = fn(ctx, info)
			return failed
		}, filters...)
		if failed == nil && errdefs.IsNotFound(err) {
			return nil // no snapshot was ever made
		}
		return err
	})
}

// Usage is what a snapshot takes itself, without its parents: of a container that wrote one block to a large file, a block.
func (o *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var id string
	var info snapshots.Info
	err = o.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil || info.Kind != snapshots.KindActive {
		return usage, err
	}
	return o.diskUsage(ctx, id)
}

func (o *Snapshotter) diskUsage(ctx context.Context, id string) (snapshots.Usage, error) {
	du, err := fs.DiskUsage(ctx, o.upper(id))
	return snapshots.Usage(du), err
}

// Prepare makes a snapshot to be written to.
func (o *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return o.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes a snapshot to be read.
func (o *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return o.create(ctx, snapshots.KindView, key, parent, opts)
}

// Mounts tells how to mount a snapshot that is active or a view, and mounts it in its pool's server if that is not the case:
// after a reboot, say. It may be called any number of times.
func (o *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	s, err := o.open(ctx, key)
	if err != nil {
		return nil, err
	}
	defer o.ids.hold(s.ID)()
	// It may have been committed or removed while we waited.
	if s, err = o.open(ctx, key); err != nil {
		return nil, err
	}
	return o.mounts(ctx, s)
}

// open reads an active snapshot or a view and its record.
func (o *Snapshotter) open(ctx context.Context, key string) (*snapshot, error) {
	s := &snapshot{key: key}
	err := o.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if s.Snapshot, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		_, s.info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.record, err = o.readRecord(s.ID)
	return s, err
}

// create makes a snapshot and mounts it. If it cannot be mounted there is none.
func (o *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (_ []mount.Mount, err error) {
	s := &snapshot{key: key}
	var tmp, made string
	var release func()
	defer func() {
		if err != nil {
			err = errors.Join(err, removeAll(tmp), removeAll(made))
		}
		if release != nil {
			release()
		}
	}()
	err = o.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if s.Snapshot, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return err
		}
		if _, s.info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		// Somebody who failed may have had the number before, and be removing what he made.
		release = o.ids.hold(s.ID)
		if _, ok := s.info.Labels[snapshots.LabelSnapshotMaxSize]; ok && kind == snapshots.KindActive {
			return fmt.Errorf("label %s: Lamina limits no snapshot's size: leave it out: %w", snapshots.LabelSnapshotMaxSize, errdefs.ErrNotImplemented)
		}
		if err := o.decide(ctx, s); err != nil {
			return err
		}
		if tmp, err = o.makeDir(s); err != nil {
			return err
		}
		if err := os.Rename(tmp, o.dir(s.ID)); err != nil {
			return err
		}
		tmp, made = "", o.dir(s.ID)
		return nil
	})
	if err != nil {
		return nil, named(key, err)
	}
	mounts, err := o.mounts(ctx, s)
	if err != nil {
		made = ""
		return nil, named(key, errors.Join(err, o.forget(context.WithoutCancel(ctx), s)))
	}
	return mounts, nil
}

// forget undoes a creation.
func (o *Snapshotter) forget(ctx context.Context, s *snapshot) error {
	err := o.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, _, err := storage.Remove(ctx, s.key)
		return err
	})
	if err != nil {
		return err
	}
	return o.discard(ctx, s.ID)
}

// makeDir makes a snapshot's directory under a temporary name.
func (o *Snapshotter) makeDir(s *snapshot) (tmp string, err error) {
	tmp, err = os.MkdirTemp(filepath.Join(o.c.Root, "snapshots"), "new-")
	if err != nil {
		return "", err
	}
	upper := filepath.Join(tmp, "fs")
	if err = os.Mkdir(upper, 0o755); err == nil && s.Kind == snapshots.KindActive {
		err = os.Mkdir(filepath.Join(tmp, "work"), 0o711)
	}
	if err == nil {
		err = os.Chmod(upper, 0o755) // whatever the umask
	}
	if err == nil {
		err = o.ownUpper(s, upper)
	}
	if err == nil && s.record != nil {
		err = s.record.write(tmp)
	}
	if err == nil && s.writtenByOthers() {
		err = os.Symlink(o.boot, filepath.Join(tmp, unsyncedName))
	}
	if err != nil {
		return "", errors.Join(err, removeAll(tmp))
	}
	return tmp, nil
}

// ownUpper gives a container's root directory to its owner: the one of the layer below, or the container's root.
func (o *Snapshotter) ownUpper(s *snapshot, upper string) error {
	uid, gid := -1, -1
	if len(s.ParentIDs) > 0 {
		var st unix.Stat_t
		if err := unix.Stat(o.upper(s.ParentIDs[0]), &st); err != nil {
			return fmt.Errorf("layer %s of the parent %q: %w", o.upper(s.ParentIDs[0]), s.info.Parent, err)
		}
		uid, gid = int(st.Uid), int(st.Gid)
	}
	ids, err := idMapOf(s.info.Labels)
	if err != nil {
		return err
	}
	if ids != nil && !o.c.RemapIDs {
		uid, gid = int(ids.rootUID), int(ids.rootGID)
	}
	if uid < 0 {
		return nil
	}
	return os.Lchown(upper, uid, gid)
}

// Commit makes a layer of an active snapshot. What a container has written to files of its image stays in sketches: the
// layer is a delta of blocks.
func (o *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	s, err := o.open(ctx, key)
	if err != nil {
		return named(key, err)
	}
	defer o.ids.hold(s.ID)()
	if err := o.checkCommit(ctx, name, key); err != nil {
		return named(key, err)
	}
	if s.record != nil {
		if err := o.settle(ctx, s); err != nil {
			return named(key, err)
		}
	}
	usage, err := o.diskUsage(ctx, s.ID)
	if err != nil {
		return named(key, err)
	}
	err = o.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, key, name, usage, opts...)
		return err
	})
	if err != nil {
		return named(key, err)
	}
	if s.record != nil {
		_ = os.Remove(o.mnt(s.ID)) // it is empty, or the next start removes it
	}
	if s.writtenByOthers() {
		o.syncLater(s.ID)
	}
	return nil
}

// checkCommit finds out what would make a commit fail, before anything is unmounted.
func (o *Snapshotter) checkCommit(ctx context.Context, name, key string) error {
	return o.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if info.Kind != snapshots.KindActive {
			return fmt.Errorf("is not active: %w", errdefs.ErrFailedPrecondition)
		}
		if _, _, _, err := storage.GetInfo(ctx, name); err == nil {
			return fmt.Errorf("committing as %q: %w", name, errdefs.ErrAlreadyExists)
		}
		return nil
	})
}

// Remove forgets a snapshot, and then removes what it consists of. Still mounted somewhere, it is served until it is not.
func (o *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := o.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return named(key, err)
	}
	defer o.ids.hold(id)()
	// The snapshot is gone, whatever becomes of its directory: the next start or Cleanup tries again.
	if err := o.discard(context.WithoutCancel(ctx), id); err != nil {
		o.c.Logf("removing what is left of snapshot %s (%s): %v", id, key, err)
	}
	return nil
}

// discard removes a snapshot that is not known any more.
func (o *Snapshotter) discard(ctx context.Context, id string) error {
	if err := o.unmountDiscarded(ctx, id); err != nil {
		return err
	}
	return removeAll(o.dir(id))
}

// Cleanup removes whatever no snapshot is known for: what a crash has left, or a removal that failed.
func (o *Snapshotter) Cleanup(ctx context.Context) error {
	var garbage []string
	// A writer's transaction, so that nobody makes a snapshot meanwhile.
	err := o.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		known, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) { // as long as no snapshot was ever made
			return err
		}
		for _, dir := range []string{"snapshots", "mnt"} {
			names, err := unknown(filepath.Join(o.c.Root, dir), known)
			if err != nil {
				return err
			}
			garbage = append(garbage, names...)
		}
		return nil
	})
	for _, name := range garbage {
		err = errors.Join(err, o.clear(ctx, name))
	}
	return err
}

// clear removes what is left under a name, if there is no snapshot by now that has it.
func (o *Snapshotter) clear(ctx context.Context, name string) error {
	defer o.ids.hold(name)()
	err := o.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		known, err := storage.IDMap(ctx)
		if _, ok := known[name]; ok {
			return errdefs.ErrAlreadyExists
		}
		return err
	})
	switch {
	case errdefs.IsAlreadyExists(err):
		return nil
	case err != nil && !errdefs.IsNotFound(err):
		return err
	}
	return o.discard(ctx, name)
}

// unknown lists the entries of a directory that no snapshot is known for.
func unknown(dir string, known map[string]string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if _, ok := known[e.Name()]; !ok {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// removeAll removes a tree. An empty path is no tree.
func removeAll(path string) error {
	if path == "" {
		return nil
	}
	return os.RemoveAll(path)
}

// named says which snapshot an error is about. Errors of containerd's storage name it themselves.
func named(key string, err error) error {
	if err == nil || strings.Contains(err.Error(), key) {
		return classed(err)
	}
	return fmt.Errorf("snapshot %q: %w", key, classed(err))
}

// classed gives an error one of containerd's classes, which is what the engine sees of it besides the text.
func classed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

// keyed is a mutex for each of many names.
type keyed struct {
	mu   sync.Mutex
	held map[string]*keyedLock
}

type keyedLock struct {
	sync.Mutex
	users int
}

// hold locks a name and returns what unlocks it.
func (k *keyed) hold(name string) (release func()) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*keyedLock{}
	}
	l := k.held[name]
	if l == nil {
		l = &keyedLock{}
		k.held[name] = l
	}
	l.users++
	k.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.held, name)
		}
	}
}

// prepareRoot makes the root directory and what is in it, and makes sure that layers can be kept there.
func prepareRoot(root string) (string, error) {
	if root == "" {
		return "", errors.New("root: missing: name the directory that the layers are to be kept in")
	}
	if err := os.MkdirAll(root, 0o711); err != nil {
		return "", fmt.Errorf("root: %w", err)
	}
	abs, err := filepath.Abs(root)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return "", fmt.Errorf("root: %w", err)
	}
	if err := checkAttributes(abs); err != nil {
		return "", err
	}
	for _, name := range []string{"snapshots", "mnt", "run"} {
		if err := os.Mkdir(filepath.Join(abs, name), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return "", fmt.Errorf("root %s: %w", abs, err)
		}
	}
	return abs, nil
}

// prepareCgroup makes the cgroup that servers are to begin in.
func prepareCgroup(path string) error {
	if path == "" {
		return nil
	}
	var st unix.Statfs_t
	err := unix.Statfs(filepath.Dir(path), &st)
	if err == nil && st.Type != unix.CGROUP2_SUPER_MAGIC {
		err = errors.New("is not in a cgroup filesystem of version 2 (usually /sys/fs/cgroup)")
	}
	if err == nil {
		if err = os.Mkdir(path, 0o755); errors.Is(err, os.ErrExist) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", path, err)
	}
	return nil
}

// checkAttributes refuses a filesystem that cannot keep what a layer is made of.
func checkAttributes(root string) error {
	probe, err := os.MkdirTemp(root, ".probe-")
	if err != nil {
		return fmt.Errorf("root %s: %w", root, err)
	}
	defer os.Remove(probe)
	err = unix.Setxattr(probe, layer.Trusted.Prefix()+"lamina.probe", []byte("y"), 0)
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("root %s: setting attributes of trusted.*: %w: run the snapshotter as root, outside a user namespace", root, err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("root %s: its filesystem keeps no trusted.* attributes, which layers need: use a directory on ext4, XFS or btrfs", root)
	case err != nil:
		return fmt.Errorf("root %s: setting attributes of trusted.*: %w", root, err)
	}
	return nil
}
