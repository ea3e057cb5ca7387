package cli

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"lamina/block"
	"lamina/fusefs"
	"lamina/layer"
	"lamina/mountopt"
	"lamina/union"

	"golang.org/x/sys/unix"
)

// instance is one mount being served by this process.
type instance struct {
	o       *mountopt.Options
	mnt     string
	log     *logger
	started time.Time

	layers  []*layer.Dir // for closing, as long as the union does not own them
	engine  *block.Engine
	fs      *union.FS
	control *control
	server  *fusefs.Server

	flushing atomic.Bool  // the mount is gone
	note     func(string) // tells whoever waits for the mount why it takes long
}

// serve mounts on mnt, calls ready, and returns when the mount is gone and everything is flushed. Before ready an error
// means that nothing was mounted or changed; after it, that data could not be flushed. If ready fails, whoever asked for
// the mount is gone, and so is the mount. note tells what takes long before that.
func serve(o *mountopt.Options, mnt string, lg *logger, note func(string), ready func() error) error {
	unix.Umask(0) // modes arrive from the kernel with the caller's umask already applied
	raiseDescriptorLimit()
	widenScheduler()
	lg.all = o.Debug
	in := &instance{o: o, mnt: mnt, log: lg, started: time.Now(), note: note}
	if err := in.start(); err != nil {
		return errors.Join(err, in.abandon())
	}
	stop := in.handleSignals()
	if err := ready(); err != nil {
		lg.printf("%s: the command that mounted it has gone: unmounting", mnt)
		if err := in.server.Unmount(); err != nil {
			lg.printf("%v", err)
		}
	}
	in.server.Wait()
	in.flushing.Store(true)
	stop()
	err := in.fs.Close()
	if err != nil {
		err = fmt.Errorf("flushing %s: %w", mnt, err)
		lg.printf("%v", err)
	}
	in.control.close()
	return err
}

// raiseDescriptorLimit asks for room: every open file of the mount is at least one descriptor here. Without privileges
// the limit stays what it is.
func raiseDescriptorLimit() {
	const enough = 1 << 20
	var rl unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &rl) == nil && rl.Max < enough {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: enough, Max: enough})
	}
}

// widenScheduler gives the runtime more processors than there are. Readers of requests sit in read(2), and one that
// wakes up has to wait for a processor that the runtime has not yet taken back from another in a system call: with twice
// two instead of two, a first write took a fifth less time on two CPUs, with four times a third. GOMAXPROCS overrides it.
func widenScheduler() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(min(4*runtime.GOMAXPROCS(0), 64))
	}
}

func (in *instance) start() (err error) {
	engineOpts := engineOptions(in.o, in.log.printf)
	if err := engineOpts.Validate(); err != nil {
		return err
	}
	cfg, err := in.openLayers()
	if err != nil {
		return err
	}
	if in.control, err = listen(in.mnt); err != nil {
		return err
	}
	if err := checkNamespace(cfg.Work, cfg.NS); err != nil {
		return err
	}
	in.engine = block.NewEngine(engineOpts)
	cfg.Engine = in.engine
	if in.fs, err = union.New(cfg); err != nil {
		return err
	}
	if err := markNamespace(cfg.Work, cfg.NS); err != nil {
		return err
	}
	if in.server, err = fusefs.Mount(in.fs, in.mnt, in.fuseOptions()); err != nil {
		return err
	}
	in.control.serve(in.status)
	return nil
}

// abandon undoes a start that failed half-way.
func (in *instance) abandon() error {
	if in.control != nil {
		in.control.close()
	}
	if in.fs != nil {
		return in.fs.Close()
	}
	if in.engine != nil {
		_ = in.engine.Close() // no file was opened
	}
	for _, d := range in.layers {
		_ = d.Close()
	}
	return nil
}

func (in *instance) open(path string, opt layer.Options) (*layer.Dir, error) {
	d, err := layer.OpenDir(path, opt)
	if err == nil {
		in.layers = append(in.layers, d)
	}
	return d, err
}

// openLayers opens and locks the directories.
func (in *instance) openLayers() (union.Config, error) {
	o := in.o
	cfg := unionConfig(o, in.log.printf)
	for _, path := range o.Lower {
		d, err := in.open(path, layer.Options{ReadOnly: true, NS: cfg.NS, OverrideStat: layer.OverrideAuto})
		if err != nil {
			return cfg, fmt.Errorf("lowerdir: %w", err)
		}
		if !d.Cloned() {
			in.log.printf("lowerdir %s: passthrough is off for its files: %v", path, d.CloneErr())
		}
		cfg.Lowers = append(cfg.Lowers, d)
	}
	if o.Upper == "" {
		return cfg, nil
	}
	var err error
	if cfg.Upper, err = in.openOwn("upperdir", o.Upper, cfg.NS); err != nil {
		return cfg, err
	}
	if cfg.Work, err = in.openOwn("workdir", o.Work, cfg.NS); err != nil {
		return cfg, err
	}
	return cfg, markOverride(cfg.Upper)
}

// openOwn opens and locks the upper directory or the workdir.
func (in *instance) openOwn(option, path string, ns layer.Namespace) (*layer.Dir, error) {
	d, err := in.open(path, layer.Options{NS: ns, OverrideStat: overrides[in.o.Perms]})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", option, err)
	}
	return d, claim(d.RootFD(), option+" "+path, unix.LOCK_EX, in.note)
}

var overrides = map[mountopt.Perms]layer.Override{
	mountopt.PermsInode: layer.OverrideNone, mountopt.PermsPrivileged: layer.OverridePrivileged, mountopt.PermsContainers: layer.OverrideContainers,
}

// markOverride makes the root of an upper layer say where its owners and modes are, as fuse-overlayfs does: later it
// will be a lower layer.
func markOverride(upper *layer.Dir) error {
	if upper.Override() == layer.OverrideNone {
		return nil
	}
	st, err := upper.Stat("")
	if err == nil {
		err = upper.Chmod("", st.Mode)
	}
	if err != nil {
		return fmt.Errorf("xattr_permissions: %w", err)
	}
	return nil
}

// unionConfig translates options; layers and engine are the caller's.
func unionConfig(o *mountopt.Options, logf func(string, ...any)) union.Config {
	return union.Config{
		NS:       namespace(o),
		CopyUp:   copyUps[o.CopyUp],
		Redirect: o.Redirect == mountopt.RedirectOn,
		Follow:   o.Redirect != mountopt.RedirectNoFollow,
		Index:    o.Index,
		Volatile: o.Volatile,
		Logf:     logf,
	}
}

var copyUps = map[mountopt.CopyUp]union.CopyUp{
	mountopt.CopyUpAuto: union.CopyUpAuto, mountopt.CopyUpBlock: union.CopyUpBlock, mountopt.CopyUpClone: union.CopyUpClone, mountopt.CopyUpFull: union.CopyUpFull,
}

// namespaceMark names an empty directory that the workdir keeps, beside package union's, for each namespace in which
// its upper layer has been written.
func namespaceMark(ns layer.Namespace) string { return "lamina/" + ns.Prefix() + "ns" }

// checkNamespace refuses an upper layer whose attributes are in the other namespace: its sketches would pass for
// ordinary files with holes.
func checkNamespace(work *layer.Dir, ns layer.Namespace) error {
	if work == nil {
		return nil
	}
	other := layer.Trusted
	if ns == layer.Trusted {
		other = layer.User
	}
	_, err := work.Stat(namespaceMark(other))
	if err == nil {
		return fmt.Errorf("workdir %s: its upper layer keeps its attributes in %s*, and this mount looks for %s*: mount it with the same privileges, and with or without userxattr as before",
			work.Name(), other.Prefix(), ns.Prefix())
	}
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("workdir: %w", err)
}

func markNamespace(work *layer.Dir, ns layer.Namespace) error {
	if work == nil {
		return nil
	}
	if err := work.Mkdir(namespaceMark(ns), 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("workdir: %w", err)
	}
	return nil
}

// namespace is user.overlay.* where trusted.* attributes are out of reach, or asked for.
func namespace(o *mountopt.Options) layer.Namespace {
	if o.UserXattr || !privileged() {
		return layer.User
	}
	return layer.Trusted
}

// initialUserNS is the inode number of the first user namespace (PROC_USER_INIT_INO).
const initialUserNS = 0xEFFFFFFD

// privileged tells whether this process has CAP_SYS_ADMIN in the initial user namespace.
func privileged() bool {
	var st unix.Stat_t
	if unix.Stat("/proc/self/ns/user", &st) != nil || st.Ino != initialUserNS {
		return false
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(status)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && caps&(1<<unix.CAP_SYS_ADMIN) != 0
		}
	}
	return false
}

func engineOptions(o *mountopt.Options, logf func(string, ...any)) block.Options {
	return block.Options{
		Format:    map[mountopt.Format]block.Format{mountopt.Sparse: block.Sparse, mountopt.BCoW: block.BCoW, mountopt.BCoWSingle: block.BCoWSingle}[o.Format],
		BlockSize: o.BlockSize,
		CaW:       map[mountopt.CaW]block.CaW{mountopt.Eager: block.CaWEager, mountopt.Lazy: block.CaWLazy, mountopt.Sync: block.CaWSync}[o.CaW],
		Fill:      map[mountopt.Fill]block.Fill{mountopt.FillNone: block.FillNone, mountopt.FillIdle: block.FillIdle}[o.Fill],
		Volatile:  o.Volatile,
		Logf:      logf,
	}
}

func (in *instance) fuseOptions() fusefs.Options {
	o := in.o
	return fusefs.Options{
		FSName:     o.FSName,
		AllowOther: o.AllowOther || os.Geteuid() == 0, // a container's processes have many users
		ReadOnly:   o.ReadOnly || o.Upper == "",
		MountFlags: o.MountFlags,
		Contexts:   o.Context,
		Passthrough: map[mountopt.Tri]fusefs.Passthrough{mountopt.Auto: fusefs.PassthroughAuto, mountopt.On: fusefs.PassthroughOn,
			mountopt.Off: fusefs.PassthroughOff}[o.Passthrough],
		Transport: map[mountopt.Transport]fusefs.Transport{mountopt.TransportAuto: fusefs.TransportAuto,
			mountopt.TransportUring: fusefs.TransportUring, mountopt.TransportDev: fusefs.TransportDev}[o.Transport],
		MaxStackDepth: o.MaxStackDepth,
		IDs:           fusefs.IDMap{UIDs: idRanges(o.UIDs), GIDs: idRanges(o.GIDs), SquashUID: o.SquashUID, SquashGID: o.SquashGID},
		ACL:           !o.NoACL,
		Logf:          in.log.printf,
		Debug:         o.Debug,
	}
}

func idRanges(ranges []mountopt.IDRange) []fusefs.IDRange {
	var out []fusefs.IDRange
	for _, r := range ranges {
		out = append(out, fusefs.IDRange(r))
	}
	return out
}

// handleSignals makes SIGTERM and SIGINT unmount. It returns the function that ends that.
func (in *instance) handleSignals() (stop func()) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	var ended atomic.Bool
	go func() {
		detached := false
		for sig := range signals {
			if ended.Load() {
				return
			}
			detached = in.onSignal(sig, detached)
		}
	}()
	return func() {
		ended.Store(true)
		signal.Stop(signals)
		close(signals)
	}
}

// onSignal unmounts, or detaches a mount that is in use, or cuts off the users of one that is detached.
func (in *instance) onSignal(sig os.Signal, detached bool) bool {
	if detached {
		in.log.printf("%s: %v again: cutting off those who still use it", in.mnt, sig)
		if err := in.abort(); err != nil {
			in.log.printf("%s: %v", in.mnt, err)
		}
		return true
	}
	err := in.server.Unmount()
	if errors.Is(err, unix.EINVAL) {
		in.log.printf("%s: %v: it is detached already, and served until the last user is gone, or until the next signal", in.mnt, sig)
		return true
	}
	if !errors.Is(err, unix.EBUSY) {
		if err != nil {
			in.log.printf("%s: %v: %v", in.mnt, sig, err)
		}
		return false
	}
	in.log.printf("%s: %v while in use by %s: detaching it; it is served until the last user is gone, or until the next signal", in.mnt, sig, holders(in.mnt))
	if err := unmountPath(in.mnt, true); err != nil {
		in.log.printf("%s: %v", in.mnt, err)
		return false
	}
	return true
}

// abort ends the FUSE connection: whoever uses the mount gets ENOTCONN. Where nobody has mounted the filesystem that
// controls connections, a detached mount of it serves.
func (in *instance) abort() error {
	_, minor := in.server.Device() // FUSE has no major number
	name := strconv.FormatUint(uint64(minor), 10) + "/abort"
	err := os.WriteFile("/sys/fs/fuse/connections/"+name, []byte("1"), 0)
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	dir, err := mountDetached("fusectl")
	if err != nil {
		return fmt.Errorf("mounting fusectl: %w", err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("fusectl %s: %w", name, err)
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte("1"))
	return err
}

// mountDetached mounts a filesystem that is reached by the returned descriptor alone and goes with it.
func mountDetached(fstype string) (int, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
}
