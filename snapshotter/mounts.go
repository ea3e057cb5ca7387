package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"lamina/mountopt"
	"lamina/pool"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// snapshot is one that is active or a view.
type snapshot struct {
	storage.Snapshot
	key    string
	info   snapshots.Info
	record *record // nil: Lamina does not mount it
}

// record says that Lamina mounts a snapshot, and what it wrote there kernel overlayfs cannot be trusted with. On disk it is a
// symbolic link in the snapshot's directory, whose target is the pool's name: unlike a file's contents, that is there as soon
// as the name is, whatever the power does.
type record struct {
	pool string // whose server mounts it
}

const recordName = "pool"

func (r *record) write(dir string) error { return os.Symlink(r.pool, filepath.Join(dir, recordName)) }

func (o *Snapshotter) readRecord(id string) (*record, error) {
	path := filepath.Join(o.dir(id), recordName)
	name, err := os.Readlink(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = checkPoolName(name)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: damaged: %w", path, err)
	}
	return &record{name}, nil
}

// LabelPool names the pool of a container. Without it, containers of one containerd namespace are one pool.
const LabelPool = "containerd.io/snapshot/lamina.pool"

// decide says whether Lamina mounts a new snapshot, and in which pool.
func (o *Snapshotter) decide(ctx context.Context, s *snapshot) error {
	if len(s.ParentIDs) == 0 {
		return nil // there is nothing to stack
	}
	written, err := o.anyWritten(s.ParentIDs)
	if err != nil {
		return err
	}
	if !written && (s.Kind == snapshots.KindView || isUnpack(s.key)) {
		return nil
	}
	name := s.info.Labels[LabelPool]
	if name == "" {
		if name, _ = namespaces.Namespace(ctx); name == "" {
			name = namespaces.Default
		}
	}
	if err := checkPoolName(name); err != nil {
		return fmt.Errorf("label %s: %w: %w", LabelPool, err, errdefs.ErrInvalidArgument)
	}
	s.record = &record{name}
	return nil
}

// anyWritten says whether one of the layers was written by Lamina, and makes sure that they are all there.
func (o *Snapshotter) anyWritten(ids []string) (bool, error) {
	written := false
	for _, id := range ids {
		var st unix.Stat_t
		if err := unix.Lstat(o.upper(id), &st); err != nil {
			return false, fmt.Errorf("parent layer %s: %w: the store is damaged: remove the image and pull it again", o.upper(id), err)
		}
		r, err := o.readRecord(id)
		if err != nil {
			return false, err
		}
		written = written || r != nil
	}
	return written, nil
}

// isUnpack says whether an image layer is to be unpacked into the snapshot. Before its own name containerd puts the
// namespace and a number, with slashes.
func isUnpack(key string) bool {
	return strings.HasPrefix(key[strings.LastIndexByte(key, '/')+1:], snapshots.UnpackKeyPrefix+"-")
}

// checkPoolName keeps a pool's name from leading out of its directory.
func checkPoolName(name string) error {
	const most = 64
	if name == "" || len(name) > most || name[0] == '.' || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" {
		return fmt.Errorf("%q cannot name a pool: use up to %d letters, digits, dots, dashes and underscores", name, most)
	}
	return nil
}

// mounts answers how to mount a snapshot, having mounted what Lamina mounts.
func (o *Snapshotter) mounts(ctx context.Context, s *snapshot) ([]mount.Mount, error) {
	if err := o.checkSynced(s.ParentIDs); err != nil {
		return nil, err
	}
	access := "rw"
	if s.Kind == snapshots.KindView {
		access = "ro"
	}
	switch {
	case s.record == nil && len(s.ParentIDs) == 0:
		return o.bind(o.upper(s.ID), access, o.idOptions(s)), nil
	case s.record == nil && s.Kind == snapshots.KindView && len(s.ParentIDs) == 1:
		return o.bind(o.upper(s.ParentIDs[0]), access, o.idOptions(s)), nil
	case s.record == nil:
		return o.overlay(s), nil
	}
	options, err := o.unionOptions(s)
	if err != nil {
		return nil, err
	}
	if o.c.Direct {
		return []mount.Mount{{Type: "fuse3.lamina", Source: "lamina", Options: append(options, access)}}, nil
	}
	if err := os.Mkdir(o.mnt(s.ID), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	if err := o.pools.of(s.record.pool).mount(ctx, o.mnt(s.ID), containerOf(s.key), options); err != nil {
		return nil, err
	}
	return o.bind(o.mnt(s.ID), access, nil), nil
}

// containerOf is the namespace and what containerd's clients call the snapshot there, which as a rule is the container's id.
// containerd puts a number between the two.
func containerOf(key string) string {
	namespace, _, _ := strings.Cut(key, "/")
	return namespace + "/" + key[strings.LastIndexByte(key, '/')+1:]
}

func (o *Snapshotter) bind(source, access string, more []string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: source, Options: append(more, access, "rbind")}}
}

// idOptions have containerd map the owners of a plain directory.
func (o *Snapshotter) idOptions(s *snapshot) (options []string) {
	if !o.c.RemapIDs {
		return nil
	}
	for name, label := range map[string]string{"uidmap=": snapshots.LabelSnapshotUIDMapping, "gidmap=": snapshots.LabelSnapshotGIDMapping} {
		if v, ok := s.info.Labels[label]; ok {
			options = append(options, name+v)
		}
	}
	return options
}

// overlay is what kernel overlayfs would mount.
func (o *Snapshotter) overlay(s *snapshot) []mount.Mount {
	options := o.idOptions(s)
	if s.Kind == snapshots.KindActive {
		options = append(options, "workdir="+o.work(s.ID), "upperdir="+o.upper(s.ID))
	}
	options = append(options, "lowerdir="+strings.Join(o.uppers(s.ParentIDs), ":"))
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		options = append(options, "index=off") // an upper directory is not tied to its first workdir
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
}

func (o *Snapshotter) uppers(ids []string) []string {
	paths := make([]string, len(ids))
	for i, id := range ids {
		paths[i] = o.upper(id)
	}
	return paths
}

// unionOptions are Lamina's mount options for a snapshot.
func (o *Snapshotter) unionOptions(s *snapshot) ([]string, error) {
	var lowers []string
	for _, path := range o.uppers(s.ParentIDs) {
		lowers = append(lowers, mountopt.Escape(path))
	}
	options := []string{"lowerdir=" + strings.Join(lowers, ":")}
	if s.Kind == snapshots.KindActive {
		options = append(options, "upperdir="+mountopt.Escape(o.upper(s.ID)), "workdir="+mountopt.Escape(o.work(s.ID)))
	}
	options = append(options, o.c.Options...)
	ids, err := idMapOf(s.info.Labels)
	if err != nil {
		return nil, err
	}
	if ids != nil && o.c.RemapIDs {
		options = append(options, ids.options()...)
	}
	return options, nil
}

// checkOptions refuses mount options that no container could be mounted with, or that are the snapshotter's business.
func checkOptions(options []string) error {
	for _, option := range options {
		name, _, _ := strings.Cut(option, "=")
		switch name {
		case "lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir", "uidmapping", "gidmapping", "fsname", "ro":
			return fmt.Errorf("option %s: the snapshotter chooses it: leave it out", name)
		case "volatile":
			return errors.New("option volatile: a container could not be mounted again after a crash: leave it out")
		}
	}
	_, err := mountopt.Parse(options, mountopt.Env{Dir: "/"})
	return err
}

// settle puts what a container wrote on disk, takes its mount away, and leaves a layer that needs no workdir.
func (o *Snapshotter) settle(ctx context.Context, s *snapshot) error {
	options, err := o.unionOptions(s)
	if err != nil {
		return err
	}
	p := o.pools.of(s.record.pool)
	synced := false
	if !o.c.Direct {
		if synced, err = p.unmount(ctx, o.mnt(s.ID)); err != nil {
			return err
		}
		// Nothing is mounted there now, unless its server was killed. What that had not put on disk is lost in any case.
		if err := detachAll(o.mnt(s.ID)); err != nil {
			return err
		}
	}
	if err := p.seal(ctx, options); err != nil || synced {
		return err
	}
	// Nobody was there to ask for a sync. What servers flush by themselves are sketches, not ordinary files.
	return o.syncNow(nil)
}

// unmountDiscarded takes away whatever is mounted for a snapshot that nobody will ask for any more.
func (o *Snapshotter) unmountDiscarded(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, discardPatience)
	defer cancel()
	mnt := o.mnt(id)
	r, err := o.readRecord(id)
	if err == nil && r != nil {
		err = o.pools.of(r.pool).discard(ctx, mnt)
	}
	if err != nil {
		o.c.Logf("%s: %v", mnt, err)
	}
	// The server may have died, or never have known.
	if err := detachAll(mnt); err != nil {
		return err
	}
	if err := os.Remove(mnt); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// detachAll takes every mount off a mount point.
func detachAll(mnt string) error {
	for pool.IsLaminaMount(mnt) {
		if err := pool.UnmountPath(mnt, true); err != nil && !errors.Is(err, unix.EINVAL) { // somebody was faster
			return fmt.Errorf("%s: %w", mnt, err)
		}
	}
	return nil
}
