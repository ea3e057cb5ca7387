// Package pool makes and serves Lamina's mounts: one for "lamina mount", or the many of a pool of containers in one process.
//
// A [Mount] is made by [Start] from a [Config] and lives until nobody uses the mount any more and everything is flushed.
// Everybody who mounts goes this way, so that the claim on the layers, the control socket and the clean-up are the same.
package pool

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"lamina/block"
	"lamina/fusefs"
	"lamina/layer"
	"lamina/mountopt"
	"lamina/union"

	"golang.org/x/sys/unix"
)

// Config says what is to be mounted where.
type Config struct {
	Options *mountopt.Options
	// Mountpoint is absolute and without symbolic links, see CheckMountPoint.
	Mountpoint string
	// Logf receives one line per event that an operator must know of. Log is the file that it writes, empty if there is none.
	Logf func(format string, args ...any)
	Log  string
	// Version is what the status tells of the program.
	Version string
	// Shared says that the process serves other mounts too: it does not end with this one.
	Shared bool
	// Container is whose root the mount is, for the status alone. Empty: not known.
	Container string
	// Requested are the options as a pool server was asked for them.
	Requested []string
	// Survival makes the mount outlive this process. Options.Survive asks for it; whoever starts mounts sees to it.
	Survival *Survival
	// Note tells whoever waits for the mount why it takes long. Nil: nobody does.
	Note func(string)
}

// Mount is one mount being served by this process.
type Mount struct {
	Config
	o       *mountopt.Options
	started time.Time

	layers  []*layer.Dir // for closing, as long as the union does not own them
	engine  *block.Engine
	fs      *union.FS
	control *control
	server  *fusefs.Server

	kept kept

	flushing atomic.Bool   // the mount is gone
	gone     chan struct{} // closed when it is
	done     chan struct{} // closed when everything is flushed, too
	closing  sync.Mutex    // held while the union is closed, or synced because the end is near
	err      error         // of the flush; to be read when done is closed
}

// Start mounts and returns when the mount answers. An error means that nothing was mounted or changed. The directories must
// have been checked with CheckDirs. Modes arrive from the kernel with the caller's umask already applied, so the process must
// have umask 0: see Tune.
func Start(c Config) (*Mount, error) {
	if c.Note == nil {
		c.Note = func(string) {}
	}
	in := &Mount{Config: c, o: c.Options, started: time.Now(), gone: make(chan struct{}), done: make(chan struct{})}
	if c.Options.Survive && c.Survival == nil {
		return nil, errors.New("survive=on: this process has no supervisor")
	}
	if err := in.start(); err != nil {
		if in.resuming() {
			if in.Shared {
				in.giveUp()
			}
			return nil, err // nothing is tidied away that the next process can go on with
		}
		return nil, errors.Join(err, in.abandon())
	}
	go in.end()
	return in, nil
}

// end waits for the end of the mount and flushes.
func (in *Mount) end() {
	defer close(in.done)
	in.server.Wait()
	in.flushing.Store(true)
	close(in.gone)
	in.closing.Lock()
	err := in.fs.Close()
	in.closing.Unlock()
	if err != nil {
		in.err = fmt.Errorf("flushing %s: %w", in.Mountpoint, err)
		in.Logf("%v", in.err)
	}
	in.control.close()
	in.letGo()
}

// Done is closed when the mount is gone and flushed.
func (in *Mount) Done() <-chan struct{} { return in.done }

// Wait returns when the mount is gone and everything is flushed. An error means that data could not be.
func (in *Mount) Wait() error {
	<-in.done
	return in.err
}

// Gone returns when the mount is gone; what is left may still be being flushed.
func (in *Mount) Gone() { in.server.Wait() }

// Flushing says that the mount is gone and what is left is being flushed.
func (in *Mount) Flushing() bool { return in.flushing.Load() }

// Unmount takes the mount away. EBUSY: somebody uses it; nothing has changed. It does not wait for the flush.
func (in *Mount) Unmount() error { return in.server.Unmount() }

// Ending is said when the mount is to go. Somebody may use it still, here or in another mount namespace, and this process may
// be killed with him, as at the end of a machine that shuts down. So what was written is put on disk now, and every later write
// before it is answered.
func (in *Mount) Ending() {
	in.fs.WriteThrough()
	go func() {
		select {
		case <-in.gone: // everything is flushed, or discarded
			return
		case <-time.After(100 * time.Millisecond):
		}
		in.closing.Lock() // what is closed meanwhile cannot be synced
		defer in.closing.Unlock()
		select {
		case <-in.gone:
			return
		default:
		}
		if err := in.Sync(); err != nil {
			in.Logf("%v", err)
			return
		}
		in.Logf("%s: in use: what was written is on disk, and from now on every write is before it is answered", in.Mountpoint)
	}()
}

// Sync puts everything that was written on disk, with the mount in use or not. What could not be is kept and tried again.
func (in *Mount) Sync() error {
	if err := in.fs.Sync(); err != nil {
		return fmt.Errorf("syncing %s: %w", in.Mountpoint, err)
	}
	return nil
}

// Tune prepares the process for serving mounts.
func Tune() {
	unix.Umask(0)
	raiseDescriptorLimit()
	widenScheduler()
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

func (in *Mount) start() (err error) {
	engineOpts := engineOptions(in.o, in.Logf)
	if err := engineOpts.Validate(); err != nil {
		return err
	}
	if in.resuming() {
		if err := in.takeKept(); err != nil {
			return fmt.Errorf("survive=on: %w", err)
		}
	}
	fuseOpts := FuseOptions(in.o, in.Logf)
	if !privileged() {
		if in.o.Passthrough == mountopt.On {
			return errors.New("option passthrough=on: " + fusefs.NeedsPrivileges + ", or leave the option out")
		}
		fuseOpts.NoPassthrough = fusefs.NeedsPrivileges
	}
	cfg, err := in.openLayers()
	if err != nil {
		return err
	}
	if in.control == nil {
		if in.control, err = listen(in.Mountpoint, in.started); err != nil {
			return err
		}
	}
	if err := checkNamespace(cfg.Work, cfg.NS); err != nil {
		return err
	}
	if err := in.survive(&engineOpts, &cfg); err != nil {
		return fmt.Errorf("survive=on: %w", err)
	}
	in.engine = block.NewEngine(engineOpts)
	cfg.Engine = in.engine
	if in.fs, err = union.New(cfg); err != nil {
		return err
	}
	if err := markNamespace(cfg.Work, cfg.NS); err != nil {
		return err
	}
	if in.Survival != nil {
		fuseOpts.Survive = &fusefs.Survival{Device: in.kept.device, State: in.kept.state, Resume: in.resuming()}
	}
	if in.server, err = fusefs.Mount(in.fs, in.Mountpoint, fuseOpts); err != nil {
		return err
	}
	if bits := in.o.Propagation; bits != 0 {
		if err := unix.Mount("", in.Mountpoint, "", bits, ""); err != nil {
			return errors.Join(fmt.Errorf("mount point %s: making the mount private, slave, shared or unbindable as asked: %w", in.Mountpoint, err), in.undo())
		}
	}
	in.control.serve(in.Status)
	return nil
}

// undo takes a mount away that was made and cannot be what it was asked to be.
func (in *Mount) undo() error {
	if err := in.server.Unmount(); err != nil {
		return err
	}
	in.server.Wait()
	return nil
}

// abandon undoes a start that failed half-way.
func (in *Mount) abandon() error {
	defer in.letGo()
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

// Seal makes an upper directory that is not mounted a layer on its own: see union.Seal.
func Seal(o *mountopt.Options, logf func(string, ...any)) (err error) {
	in := &Mount{Config: Config{Logf: logf, Note: func(string) {}}, o: o}
	defer func() {
		for _, d := range in.layers {
			_ = d.Close()
		}
	}()
	cfg, err := in.openLayers()
	if err != nil {
		return err
	}
	cfg.Engine = block.NewEngine(engineOptions(o, logf))
	return errors.Join(union.Seal(cfg), cfg.Engine.Close())
}

func (in *Mount) open(path string, opt layer.Options) (*layer.Dir, error) {
	d, err := layer.OpenDir(path, opt)
	if err == nil {
		in.layers = append(in.layers, d)
	}
	return d, err
}

// openLayers opens and locks the directories.
func (in *Mount) openLayers() (union.Config, error) {
	o := in.o
	cfg := UnionConfig(o, in.Logf)
	for _, path := range o.Lower {
		d, err := in.openLower(path, cfg.NS)
		if err != nil {
			return cfg, fmt.Errorf("lowerdir: %w", err)
		}
		if !d.Cloned() && privileged() { // else that is the least of what it goes without
			in.Logf("lowerdir %s: passthrough is off for its files: %v", path, d.CloneErr())
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

func (in *Mount) openLower(path string, ns layer.Namespace) (*layer.Dir, error) {
	if o := in.o; o.UIDs != nil || o.GIDs != nil || o.SquashUID != nil || o.SquashGID != nil {
		plain, err := unmapped(path)
		if err != nil && (o.UIDs != nil || o.GIDs != nil) {
			return nil, err
		}
		if err == nil {
			path = plain
		}
	}
	return in.open(path, layer.Options{ReadOnly: true, NS: ns, OverrideStat: layer.OverrideAuto, WhiteoutFiles: WhiteoutFiles(in.o, path)})
}

// openOwn opens and locks the upper directory or the workdir.
func (in *Mount) openOwn(option, path string, ns layer.Namespace) (*layer.Dir, error) {
	d, err := in.open(path, layer.Options{NS: ns, OverrideStat: Overrides[in.o.Perms], WhiteoutFiles: option == "upperdir" && WhiteoutFiles(in.o, path)})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", option, err)
	}
	if in.resuming() { // the supervisor has the lock
		return d, nil
	}
	return d, Claim(d.RootFD(), option+" "+path, unix.LOCK_EX, in.Note)
}

// Overrides translates xattr_permissions.
var Overrides = map[mountopt.Perms]layer.Override{
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

// UnionConfig translates options; layers and engine are the caller's.
func UnionConfig(o *mountopt.Options, logf func(string, ...any)) union.Config {
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

// FuseOptions translates options.
func FuseOptions(o *mountopt.Options, logf func(string, ...any)) fusefs.Options {
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
		Logf:          logf,
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

// Abort ends the FUSE connection: whoever uses the mount gets ENOTCONN. Where nobody has mounted the filesystem that
// controls connections, a detached mount of it serves.
func (in *Mount) Abort() error {
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
