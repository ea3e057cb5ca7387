package snapshotter_test

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"lamina/snapshotter"

	"github.com/containerd/containerd/v2/core/mount"
)

// Many containers of one image begin, write, are committed and removed at the same time, while garbage is collected.
func TestManyAtOnce(t *testing.T) {
	s := newStore(t, snapshotter.Config{})
	s.image()
	const many = 12
	one := func(i int) error {
		key, name, target := fmt.Sprint("c", i), fmt.Sprint("committed", i), fmt.Sprintf("%s/t%d", s.dir, i)
		mounts, err := s.Prepare(s.ctx, key, "top", gcRoot)
		if err != nil {
			return err
		}
		if err := os.Mkdir(target, 0o755); err != nil {
			return err
		}
		if err := mount.All(mounts, target); err != nil {
			return err
		}
		f, err := os.OpenFile(target+"/big", os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(fmt.Appendf(nil, "%04d", i), 700_000)
			err = errors.Join(err, f.Close())
		}
		if err = errors.Join(err, mount.UnmountAll(target, 0)); err != nil {
			return err
		}
		if err := s.Commit(s.ctx, name, key, gcRoot); err != nil {
			return err
		}
		if mounts, err = s.View(s.ctx, key, name, gcRoot); err != nil {
			return err
		}
		if err := mount.All(mounts, target); err != nil {
			return err
		}
		b, err := os.ReadFile(target + "/big")
		if err = errors.Join(err, mount.UnmountAll(target, 0)); err != nil {
			return err
		}
		if got := string(b[700_000:700_004]); got != fmt.Sprintf("%04d", i) {
			return fmt.Errorf("container %d reads %q", i, got)
		}
		return errors.Join(s.Remove(s.ctx, key), s.Remove(s.ctx, name))
	}
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() {
			if err := one(i); err != nil {
				t.Errorf("container %d: %v", i, err)
			}
		})
	}
	for range 20 {
		wg.Go(func() {
			if err := s.Snapshotter.(*snapshotter.Snapshotter).Cleanup(s.ctx); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s.clean()
	if served := s.served(); len(served) > 0 {
		t.Errorf("still served: %v", served)
	}
}
