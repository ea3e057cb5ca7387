package cli

import (
	"errors"
	"os"
	"os/signal"

	"lamina/mountopt"
	"lamina/pool"

	"golang.org/x/sys/unix"
)

// serve mounts on mnt, calls ready, and returns when the mount is gone and everything is flushed. Before ready an error
// means that nothing was mounted or changed; after it, that data could not be flushed. If ready fails, whoever asked for
// the mount is gone, and so is the mount. note tells what takes long before that.
// s is how the mount outlives this process; nil: it does not.
func serve(o *mountopt.Options, mnt string, lg *logger, note func(string), s *pool.Survival, ready func() error) error {
	pool.Tune()
	lg.all = o.Debug
	m, err := pool.Start(pool.Config{Options: o, Mountpoint: mnt, Logf: lg.printf, Log: lg.path, Version: Version(), Note: note, Survival: s})
	if err != nil {
		return err
	}
	lg.made()
	defer handleSignals(m, lg)()
	if s != nil {
		if err := s.Store.Ready(); err != nil {
			lg.printf("%s: %v", mnt, err)
		}
	}
	if err := ready(); err != nil {
		lg.printf("%s: the command that mounted it has gone: unmounting", mnt)
		if err := m.Unmount(); err != nil {
			lg.printf("%v", err)
		}
	}
	return m.Wait()
}

// handleSignals makes SIGTERM and SIGINT unmount. When the mount is gone the first of them is told that what was written is
// still being flushed, as it may be when a machine shuts down right after an umount(8); the second ends the process without.
// It returns the function that ends that.
func handleSignals(m *pool.Mount, lg *logger) (stop func()) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	go func() {
		detached, told := false, false
		for sig := range signals {
			switch {
			case !m.Flushing():
				detached = onSignal(m, lg, sig, detached)
			case !told:
				lg.infof("%s: %v: still flushing what was written; the next signal gives it up", m.Mountpoint, sig)
				told = true
			default:
				_ = m.Forsake() // or a successor would go on with it
				signal.Reset(sig)
				_ = unix.Kill(os.Getpid(), sig.(unix.Signal))
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
	}
}

// onSignal unmounts, or detaches a mount that is in use, or cuts off the users of one that is detached.
func onSignal(m *pool.Mount, lg *logger, sig os.Signal, detached bool) bool {
	mnt := m.Mountpoint
	if detached {
		lg.infof("%s: %v again: cutting off those who still use it", mnt, sig)
		if err := m.Abort(); err != nil {
			lg.printf("%s: %v", mnt, err)
		}
		return true
	}
	m.Ending()
	err := m.Unmount()
	if errors.Is(err, unix.EINVAL) {
		lg.infof("%s: %v: it is detached already, and served until the last user is gone, or until the next signal", mnt, sig)
		return true
	}
	if !errors.Is(err, unix.EBUSY) {
		if err != nil {
			lg.printf("%s: %v: %v", mnt, sig, err)
		}
		return false
	}
	lg.infof("%s: %v while in use by %s: detaching it; it is served until the last user is gone, or until the next signal", mnt, sig, pool.Holders(mnt))
	if err := pool.UnmountPath(mnt, true); err != nil {
		lg.printf("%s: %v", mnt, err)
		return false
	}
	return true
}
