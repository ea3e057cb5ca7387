package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
	"lamina/bench/rival"
)

// Setup says what a contender is put over, and how.
type Setup struct {
	Layer *Layer
	// Fresh gives plain files a copy of their own, because names are going to change. Otherwise they keep one for all
	// rounds.
	Fresh bool
	// ReadOnly gives plain files the layer itself. Nothing may be written.
	ReadOnly bool
	// Keep leaves the upper layer until the scenario ends: ext4 without a journal looks at recently removed inodes
	// again for every new file, which would cost the next contender up to a millisecond a file.
	Keep bool
}

// Union is a contender's tree, ready to be used.
type Union struct {
	Contender *Contender
	Dir       string // the tree
	Upper     string // what is written lands here; empty: plain files, snapshots and floors

	lab    *Lab
	ground *ground
	base   string // upper, work and mount point are below it
	layer  string // the lower; of a floor the files that it shows
	mount  *rival.Mount
	floor  *exec.Cmd
	gone   chan struct{} // the floor has exited
	server int           // pid, 0 without a server
	took   time.Duration // the last mount
	before int64         // bytes taken of a filesystem of our own, before anything was written
	up     bool
}

// Path is a file of the tree.
func (u *Union) Path(name string) string { return filepath.Join(u.Dir, name) }

// On puts a contender over a layer for the time that f takes. Whatever happens, nothing is mounted afterwards, and the
// upper layer is removed, unmeasured.
func (l *Lab) On(c *Contender, s Setup, f func(u *Union) error) (err error) {
	if err := l.ctx.Err(); err != nil {
		return err
	}
	u, err := l.prepare(c, s)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, u.discard())
		if s.Keep {
			l.kept = append(l.kept, u.base)
		} else {
			err = errors.Join(err, u.remove(s))
		}
	}()
	late := false
	watch := l.watch(func(timeUp bool) { late = timeUp; u.abort() })
	defer func() {
		if watch(); late {
			err = errors.Join(fmt.Errorf("given up after %v", l.patience()), err)
		}
	}()
	if err := u.Up(); err != nil {
		return err
	}
	if err := f(u); err != nil {
		return err
	}
	return u.Down()
}

// patience is how long one contender may be busy with one thing before it is taken for hung.
func (l *Lab) patience() time.Duration {
	if l.cfg.patience > 0 {
		return l.cfg.patience
	}
	return Pick(l.Mode(), 2*time.Minute, 10*time.Minute, 30*time.Minute)
}

// watch calls abort when patience or the run ends before stop is called; stop returns when abort will not be called any
// more.
func (l *Lab) watch(abort func(timeUp bool)) (stop func()) {
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		timer := time.NewTimer(l.patience())
		defer timer.Stop()
		select {
		case <-done:
		case <-timer.C:
			abort(true)
		case <-l.ctx.Done():
			abort(false)
		}
	}()
	return func() { close(done); <-stopped }
}

// abortBelow is abort for everything that is mounted below a directory.
func (l *Lab) abortBelow(dir string) {
	mounts, _ := rival.MountsBelow(dir)
	for _, m := range mounts {
		_ = unix.Unmount(m, unix.MNT_FORCE)
	}
}

// abort makes whoever waits for a server's answer wait no longer. What serves itself, the kernel, cannot hang like that.
func (u *Union) abort() {
	if u.Contender.system == rival.Overlay || u.Contender.kind == plainCopy || u.Contender.kind == snapshot {
		return
	}
	_ = unix.Unmount(u.Dir, unix.MNT_FORCE) // it is in use, and stays; its connection is gone
}

// prepare makes the directories of a contender.
func (l *Lab) prepare(c *Contender, s Setup) (*Union, error) {
	g, err := l.ground(c.ground)
	if err != nil {
		return nil, err
	}
	u := &Union{Contender: c, lab: l, ground: g}
	if u.layer, err = s.Layer.At(c); err != nil {
		return nil, err
	}
	if c.kind == plainCopy {
		if u.Dir = u.layer; !s.ReadOnly {
			u.Dir, err = s.Layer.copied(c, s.Fresh)
		}
		u.base = u.Dir
		return u, err
	}
	if c.kind == floorFS && !s.ReadOnly {
		if u.layer, err = s.Layer.copied(c, s.Fresh); err != nil {
			return nil, err
		}
	}
	if u.base, err = l.place(c.ground, c.Name); err != nil {
		return nil, err
	}
	u.Dir = filepath.Join(u.base, "tree")
	dirs := []string{u.Dir}
	switch c.kind {
	case union:
		u.Upper = filepath.Join(u.base, "upper")
		dirs = append(dirs, u.Upper, u.work())
	case snapshot:
		dirs = nil // the snapshot is the directory
	}
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	if g.own && g.sharesBlocks() {
		u.before, err = g.used()
	}
	return u, err
}

func (u *Union) work() string { return filepath.Join(u.base, "work") }

// Up mounts, again after Down.
func (u *Union) Up() error {
	if u.up {
		return nil
	}
	var err error
	switch u.Contender.kind {
	case union:
		began := time.Now()
		u.mount, err = rival.Up(u.lab.ctx, rival.Config{
			System: u.Contender.system, Lowers: []string{u.layer}, Options: u.Contender.Options, Binary: u.lab.cfg.Lamina,
			Upper: u.Upper, Work: u.work(),
		}, u.Dir)
		u.took = time.Since(began)
		if err == nil {
			u.server, err = u.mount.Server()
		}
	case snapshot:
		if _, err := os.Stat(u.Dir); err != nil {
			_, err = rival.Run(u.lab.ctx, "btrfs", "-q", "subvolume", "snapshot", u.layer, u.Dir)
			if err != nil {
				return err
			}
		}
	case floorFS, nullFS:
		err = u.upFloor()
	}
	u.up = err == nil
	return err
}

// upFloor starts the floor.
func (u *Union) upFloor() error {
	args := []string{"bench", "floor"}
	for _, o := range u.Contender.Options {
		args = append(args, "-o", o)
	}
	if u.Contender.kind == nullFS {
		args = append(args, "--null")
	}
	cmd := exec.Command(u.lab.cfg.Lamina, append(args, u.layer, u.Dir)...)
	// In a process group of its own a Ctrl-C reaches us alone, and we unmount in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: 0}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	u.floor, u.gone, u.server = cmd, make(chan struct{}), cmd.Process.Pid
	line, _ := bufio.NewReader(out).ReadString('\n')
	go func() { _ = cmd.Wait(); close(u.gone) }()
	if line == "ready\n" {
		return nil
	}
	<-u.gone
	u.floor = nil
	return fmt.Errorf("floor: %s", strings.TrimSpace(stderr.String()))
}

// Down unmounts, and returns when everything that a server had to write is written.
func (u *Union) Down() error {
	if !u.up {
		return nil
	}
	var err error
	switch {
	case u.mount != nil:
		err = u.mount.Down()
	case u.floor != nil:
		if err = unix.Unmount(u.Dir, 0); err == nil {
			<-u.gone
			u.floor = nil
		}
	}
	u.up = err != nil
	return err
}

// discard takes away what Down did not.
func (u *Union) discard() error {
	if u.mount != nil {
		u.mount.Discard()
	}
	if u.floor != nil {
		_ = unix.Unmount(u.Dir, unix.MNT_FORCE|unix.MNT_DETACH)
		_ = u.floor.Process.Kill()
		<-u.gone
	}
	if mounted, err := rival.Mounted(u.Dir); u.Contender.kind == plainCopy || err == nil && !mounted {
		return nil
	}
	return fmt.Errorf("%s is still mounted", u.Dir)
}

// remove deletes what was written, if it is this setup's own.
func (u *Union) remove(s Setup) error {
	switch {
	case u.Contender.kind == plainCopy && !s.Fresh:
		return nil
	case u.Contender.kind == snapshot:
		if _, err := os.Stat(u.Dir); err == nil {
			if _, err := rival.Run(context.Background(), "btrfs", "-q", "subvolume", "delete", "--commit-after", u.Dir); err != nil {
				return err
			}
		}
	}
	if mounted, err := rival.Mounted(u.Dir); err != nil || mounted {
		return err // discard has said so
	}
	if u.Contender.kind == floorFS && s.Fresh && !s.ReadOnly {
		if err := os.RemoveAll(u.layer); err != nil {
			return err
		}
	}
	return os.RemoveAll(u.base)
}

// Quiet returns when Lamina has nothing left to copy. Others have nothing to wait for.
func (u *Union) Quiet() error {
	if !u.Contender.IsLamina() {
		return nil
	}
	giveUp := time.After(u.lab.patience())
	for {
		st, err := u.status()
		switch {
		case err != nil:
			return err
		case st.Errors > 0:
			return fmt.Errorf("%d errors in the background of %s: lamina status tells the log", st.Errors, u.Dir)
		case st.Queue == 0 && (st.Blocks.InTransit == 0 || st.CaW == "lazy"):
			return nil
		}
		select {
		case <-u.lab.ctx.Done():
			return u.lab.ctx.Err()
		case <-giveUp:
			return fmt.Errorf("after %v there are still %d blocks to copy", u.lab.patience(), st.Blocks.InTransit)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// laminaStatus is what the bench wants to know of `lamina status --json`.
type laminaStatus struct {
	Transport   string `json:"transport"`
	Passthrough string `json:"passthrough"`
	CaW         string `json:"caw"`
	Format      string `json:"format"`
	Queue       int    `json:"queue"`
	Errors      int64  `json:"errors"`
	Blocks      struct {
		InTransit int64 `json:"in_transit"`
	} `json:"blocks"`
}

func (u *Union) status() (st laminaStatus, err error) {
	out, err := rival.Run(u.lab.ctx, u.lab.cfg.Lamina, "status", "--json", u.Dir)
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		return st, fmt.Errorf("lamina status --json: %w", err)
	}
	return st, nil
}

// Allocated is what the contender's writes occupy on the disk, in bytes; everything is written out first. On filesystems
// that share blocks between files it is what the filesystem grew by, its own metadata included; elsewhere the blocks of
// the upper layer's files.
func (u *Union) Allocated() (int64, error) {
	if u.ground.own && u.ground.sharesBlocks() {
		now, err := u.ground.used()
		return now - u.before, err
	}
	if u.Upper == "" {
		return 0, nil
	}
	if err := syncfs(u.Upper); err != nil {
		return 0, err
	}
	return allocatedBelow(u.Upper)
}

// allocatedBelow sums the blocks of the files below dir, directories not counted.
func allocatedBelow(dir string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		sum += st.Blocks * 512
		return nil
	})
	return sum, err
}

// PeakMemory is the most that the server has held since it began, in bytes resident; 0 without a server.
func (u *Union) PeakMemory() (int64, error) {
	if u.server == 0 {
		return 0, nil
	}
	return statusField(u.server, "VmHWM:")
}

// Server is the pid of the server process, 0 without one.
func (u *Union) Server() int { return u.server }

// reference is the first contender of a kind, nil without any.
func (l *Lab) reference(k report.Kind) *Contender {
	for _, c := range l.contenders {
		if c.Kind == k {
			return c
		}
	}
	return nil
}
