package steer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"lamina/net/ns"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// sysfs is a network namespace's, mounted nowhere: /sys shows the interfaces of the namespace in which somebody mounted it.
type sysfs struct{ dir int }

func openSysfs(h netns.NsHandle) (s sysfs, err error) {
	err = ns.Do(h, func() error {
		ctx, err := unix.Fsopen("sysfs", unix.FSOPEN_CLOEXEC)
		if err != nil {
			return err
		}
		defer unix.Close(ctx)
		if err := unix.FsconfigCreate(ctx); err != nil {
			return err
		}
		s.dir, err = unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
		return err
	})
	if err != nil {
		return s, fmt.Errorf("sysfs of a network namespace: %w", err)
	}
	return s, nil
}

func (s sysfs) close() { unix.Close(s.dir) }

func (s sysfs) open(name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(s.dir, name, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: "/sys/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), "/sys/"+name), nil
}

func rpsFile(device, queue string) string {
	return path.Join("class/net", device, "queues", queue, "rps_cpus")
}

// masks are RPS' of a device, by queue.
func (s sysfs) masks(device string) (map[string]cpuSet, error) {
	dir, err := s.open(path.Join("class/net", device, "queues"), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	queues, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	all := map[string]cpuSet{}
	for _, q := range queues {
		if !strings.HasPrefix(q, "rx-") {
			continue
		}
		if all[q], err = s.mask(device, q); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func (s sysfs) mask(device, queue string) (cpuSet, error) {
	f, err := s.open(rpsFile(device, queue), unix.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: receive packet steering is missing (CONFIG_RPS): %w", ErrNotSupported, err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, 4096)
	n, err := f.Read(b)
	if err != nil {
		return nil, err
	}
	return parseMask(string(b[:n]))
}

// setMask returns the mask that the kernel made of it: CPUs that are isolated are none of it.
func (s sysfs) setMask(device, queue string, want cpuSet) (cpuSet, error) {
	f, err := s.open(rpsFile(device, queue), unix.O_WRONLY)
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString(want.mask())
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("receive packet steering of %s: %w", device, err)
	}
	return s.mask(device, queue)
}

// saved is what the masks of a device were.
type saved struct {
	Index  int               `json:"index"` // of the device that had them
	Queues map[string]string `json:"queues"`
}

// hold makes the masks of a device those that are wanted, and returns what the kernel made of it and what they were, unless
// that is known of this device.
func (s sysfs) hold(device string, index int, want cpuSet, known saved) (is cpuSet, was saved, changed bool, err error) {
	now, err := s.masks(device)
	if err != nil {
		return nil, known, false, err
	}
	was = known
	if was.Index != index || was.Queues == nil {
		was = saved{index, map[string]string{}}
		for q, set := range now {
			was.Queues[q] = set.mask()
		}
		changed = true
	}
	for q, set := range now {
		if is = set; slices.Equal(set, want) {
			continue
		}
		if is, err = s.setMask(device, q, want); err != nil {
			return nil, was, changed, err
		}
	}
	return is, was, changed, nil
}

// putBack makes the masks of a device what they were. A device that has gone, or is another, has none to put back.
func (s sysfs) putBack(device string, index int, was saved) error {
	if was.Index != index {
		return nil
	}
	var errs []error
	for q, mask := range was.Queues {
		set, err := parseMask(mask)
		if err == nil {
			_, err = s.setMask(device, q, set)
		}
		if !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
