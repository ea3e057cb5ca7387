package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// An image layer that containerd has unpacked lies in the page cache, while the database on disk already says that it is
// complete: a power cut in the next half minute leaves empty files under an image that counts as whole (containerd issues
// 5854, 9497). Syncing before the commit would keep the unpacking of the next layer waiting for the disk. So a layer carries a
// mark from its first moment until it is synced, which happens behind the commit. The mark is made before the layer's
// directory gets its name, so the journal brings no layer to the disk without it. One that is found after the machine has
// started again is on a layer that may be incomplete, and nothing is mounted on that.

// unsyncedName is a symbolic link in a snapshot's directory. Its target is the id of the boot that the layer was made in.
const unsyncedName = "unsynced"

// bootID tells this start of the machine from every other (Linux, random(4)).
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// checkSynced refuses layers that a crash of the machine may have left incomplete.
func (o *Snapshotter) checkSynced(ids []string) error {
	for _, id := range ids {
		switch boot, err := os.Readlink(filepath.Join(o.dir(id), unsyncedName)); {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			return err
		case boot != o.boot:
			return fmt.Errorf("parent layer %s: the machine went down before it was on disk, it may be incomplete: remove the image and pull it again",
				o.upper(id))
		}
	}
	return nil
}

// syncer brings committed layers to the disk, many by one sync.
type syncer struct {
	mu      sync.Mutex
	ids     []string // committed, and not begun to sync
	running bool
	done    sync.WaitGroup
}

// syncLater has a layer synced and its mark taken away.
func (o *Snapshotter) syncLater(id string) {
	s := &o.syncer
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ids = append(s.ids, id)
	if !s.running {
		s.running = true
		s.done.Go(o.syncLayers)
	}
}

func (o *Snapshotter) syncLayers() {
	s := &o.syncer
	for {
		s.mu.Lock()
		ids := s.ids
		s.ids, s.running = nil, len(ids) > 0
		s.mu.Unlock()
		if len(ids) == 0 {
			return
		}
		if err := o.syncNow(ids); err != nil {
			// The marks stay: the next snapshotter tries again, and a crash before that is noticed.
			o.c.Logf("%s: syncing %d new layers: %v", o.c.Root, len(ids), err)
		}
	}
}

func (o *Snapshotter) syncNow(ids []string) error {
	root, err := os.Open(filepath.Join(o.c.Root, "snapshots"))
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.Syncfs(int(root.Fd())); err != nil {
		return err
	}
	for _, id := range ids {
		if err := unmark(o.dir(id)); err != nil && !errors.Is(err, os.ErrNotExist) { // removed meanwhile
			return err
		}
	}
	return nil
}

// unmark takes a mark away, durably: one that came back would have a good layer refused.
func unmark(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Unlinkat(int(d.Fd()), unsyncedName, 0); err != nil {
		return err
	}
	return d.Sync()
}

// resumeSyncs goes on with layers that an earlier snapshotter of this boot has committed, and names those of other boots.
func (o *Snapshotter) resumeSyncs(ctx context.Context) error {
	return o.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		known, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) { // as long as no snapshot was ever made
			return err
		}
		for id, key := range known {
			if _, info, _, err := storage.GetInfo(ctx, key); err != nil || info.Kind != snapshots.KindCommitted {
				continue // an active one is synced when it is committed
			}
			switch boot, err := os.Readlink(filepath.Join(o.dir(id), unsyncedName)); {
			case errors.Is(err, os.ErrNotExist):
			case err != nil:
				return err
			case boot == o.boot:
				o.syncLater(id)
			default:
				o.c.Logf("%v", o.checkSynced([]string{id}))
			}
		}
		return nil
	})
}

// writtenByOthers says whether a snapshot is written by others than Lamina, whose servers sync what they write.
func (s *snapshot) writtenByOthers() bool { return s.record == nil && s.Kind == snapshots.KindActive }
