package mountopt

import (
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Origin says whose option it is.
type Origin uint8

const (
	Lamina Origin = iota
	Overlayfs
	FuseOverlayfs
	Mount
)

func (o Origin) String() string {
	return [...]string{"Lamina", "kernel overlayfs", "fuse-overlayfs", "mount(8)"}[o]
}

// Option describes one option.
type Option struct {
	Name   string
	Value  string // syntax of the value; in brackets if it may be left out; empty if there is none
	Help   string // meaning, default and limits, in sentences
	Origin Origin

	// set carries the option out, or returns why not.
	set func(p *parser, value string) string
}

// Syntax is how the option is written: name, name=VALUE or name[=VALUE].
func (d *Option) Syntax() string {
	switch {
	case d.Value == "":
		return d.Name
	case d.needsValue():
		return d.Name + "=" + d.Value
	}
	return d.Name + "[=" + strings.Trim(d.Value, "[]") + "]"
}

func (d *Option) needsValue() bool { return d.Value != "" && d.Value[0] != '[' }

// Table returns all options, in the order of the manual.
func Table() []Option { return slices.Clone(table) }

var byName map[string]*Option

func init() {
	byName = make(map[string]*Option, len(table))
	for i := range table {
		byName[table[i].Name] = &table[i]
	}
}

// find returns the definition of an option; those that begin with x- or X- belong to user space and are one.
func find(name string) *Option {
	if strings.HasPrefix(name, "x-") || strings.HasPrefix(name, "X-") {
		return byName["x-*"]
	}
	return byName[name]
}

// The table. Help texts are the manual's.
var table = []Option{
	{"lowerdir", "DIR[:DIR...][::DIR...]", "The lower directories, topmost first. Data-only layers, behind a double colon, are refused at mount: name one as the last lower directory, where its files are found too. A backslash takes the meaning from a colon, comma or backslash behind it. A relative path starts at the working directory.", Overlayfs, setLowers},
	{"lowerdir+", "DIR", "Adds one lower directory below those named so far.", Overlayfs, addLower},
	{"datadir+", "DIR", "Adds one data-only layer; refused at mount like those in lowerdir.", Overlayfs, addData},
	{"upperdir", "DIR", "The writable upper directory. Without one the mount is read-only.", Overlayfs,
		setPath(func(o *Options) *string { return &o.Upper })},
	{"workdir", "DIR", "A directory for Lamina alone, empty at first, on the same filesystem as the upper directory.", Overlayfs,
		setPath(func(o *Options) *string { return &o.Work })},
	{"redirect_dir", "on|off|follow|nofollow", "Whether lower directories can be renamed, which leaves a redirect in the upper layer: on (default), or follow existing redirects only (follow, off), or not even those (nofollow).", Overlayfs,
		choice("on", setRedirect(RedirectOn), "off", setRedirect(RedirectFollow), "follow", setRedirect(RedirectFollow), "nofollow", setRedirect(RedirectNoFollow))},
	{"index", "on|off", "Whether hard links between lower files stay linked after copy-up: on (default).", Overlayfs,
		onOff(func(o *Options, on bool) { o.Index = on })},
	{"metacopy", "on|off", "on (default): a change of metadata copies no data. off: no file of the upper layer lacks data, which is copyup=full.", Overlayfs,
		choice("on", func(p *parser) { p.metacopy = "on" }, "off", func(p *parser) { p.metacopy = "off" })},
	{"xino", "on|off|auto", "Inode numbers are unique and constant with any value.", Overlayfs, choice("on", accept, "off", accept, "auto", accept)},
	{"uuid", "off|null|auto", "statfs shows the id that the kernel gives to FUSE mounts with any of them. uuid=on is refused: FUSE cannot carry a persistent id.", Overlayfs,
		choice("off", accept, "null", accept, "auto", accept, "on", "FUSE carries no persistent filesystem id: leave it out, or use uuid=auto")},
	{"nfs_export", "off", "nfs_export=on is refused: a Lamina mount cannot be exported by the kernel's NFS server.", Overlayfs,
		choice("off", accept, "on", "a Lamina mount cannot be exported over NFS: leave it out, and export the merged tree with a user-space server")},
	{"verity", "off", "verity=on and verity=require are refused: Lamina does not check fs-verity digests.", Overlayfs,
		choice("off", accept, "on", noVerity, "require", noVerity)},
	{"volatile", "", "Never syncs. After a crash the upper and work directories are refused.", Overlayfs, func(p *parser, _ string) string { p.o.Volatile = true; return "" }},
	{"userxattr", "", "Keeps overlay's private attributes in user.overlay.* instead of trusted.overlay.*, which needs no privileges.", Overlayfs, func(p *parser, _ string) string { p.o.UserXattr = true; return "" }},
	{"default_permissions", "", "The kernel checks permissions, as always with Lamina.", Overlayfs, acceptFlag},
	{"override_creds", "", "Layers are accessed with the credentials of the server, as always with Lamina.", Overlayfs, acceptFlag},
	{"nooverride_creds", "", "Refused: a server in user space accesses the layers as itself.", Overlayfs, refuse("a server in user space accesses the layers with its own credentials: leave it out")},

	{"uidmapping", "DISK:SHOWN:LEN[:DISK:SHOWN:LEN...]", "Shows LEN user ids, from DISK on in the layers, as those from SHOWN on. Ids without a mapping are shown as 65534. A colon may go before the first number.", FuseOverlayfs,
		setMapping(func(o *Options) *[]IDRange { return &o.UIDs })},
	{"gidmapping", "DISK:SHOWN:LEN[:DISK:SHOWN:LEN...]", "The same as uidmapping, for group ids.", FuseOverlayfs,
		setMapping(func(o *Options) *[]IDRange { return &o.GIDs })},
	{"squash_to_root", "", "Shows every object as owned by 0:0. squash_to_uid and squash_to_gid go before it.", FuseOverlayfs, squashToRoot},
	{"squash_to_uid", "UID", "Shows every object as owned by this user.", FuseOverlayfs, setID(func(o *Options) **uint32 { return &o.SquashUID })},
	{"squash_to_gid", "GID", "Shows every object as owned by this group.", FuseOverlayfs, setID(func(o *Options) **uint32 { return &o.SquashGID })},
	{"static_nlink", "", "Directories are shown with one link, as always with Lamina.", FuseOverlayfs, acceptFlag},
	{"xattr_permissions", "0|1|2", "Where the upper layer keeps owners and modes: in its inodes (0, default), in security.fuseoverlayfs.override_stat (1), in user.containers.override_stat (2). A lower layer's root says it itself.", FuseOverlayfs,
		choice("0", setPerms(PermsInode), "1", setPerms(PermsPrivileged), "2", setPerms(PermsContainers))},
	{"noacl", "", "No POSIX access control lists.", FuseOverlayfs, func(p *parser, _ string) string { p.o.NoACL = true; return "" }},
	{"noxattrs", "[0]", "noxattrs=1 is refused: Lamina does not take the layers' extended attributes away.", FuseOverlayfs, setNoXattrs},
	{"disable_xattrs", "[0]", "The same as noxattrs.", FuseOverlayfs, setNoXattrs},
	{"fsync", "0|1", "fsync=0 never syncs, as volatile.", FuseOverlayfs,
		choice("0", func(p *parser) { p.o.Volatile = true }, "1", func(p *parser) { p.o.Volatile = false })},
	{"writeback", "[0]", "writeback=1 is refused: the kernel's writeback cache excludes passthrough and hides which bytes were written.", FuseOverlayfs,
		choice("0", accept, "1", noWriteback, "", noWriteback)},
	{"timeout", "SECONDS", "Kernel caches are right for any time, because nobody else changes the tree; any number is honoured.", FuseOverlayfs, acceptNumber},
	{"threaded", "[0|1]", "Requests are served concurrently with any value.", FuseOverlayfs, choice("0", accept, "1", accept, "", accept)},
	{"clone_fd", "[0|1]", "The transport arranges its own queues; accepted.", FuseOverlayfs, choice("0", accept, "1", accept, "", accept)},
	{"max_idle_threads", "N", "The server's threads are the Go runtime's; any number is accepted.", FuseOverlayfs, acceptNumber},
	{"max_threads", "N", "The same as max_idle_threads.", FuseOverlayfs, acceptNumber},
	{"fast_ino", "[0|1]", "Inode numbers take no extra time; accepted.", FuseOverlayfs, choice("0", accept, "1", accept, "", accept)},
	{"ino32_t", "[0]", "ino32_t=1 is refused: inode numbers have 64 bits.", FuseOverlayfs,
		choice("0", accept, "1", noIno32, "", noIno32)},
	{"plugins", "FILE[:FILE...]", "Refused: Lamina loads no plugins.", FuseOverlayfs, refuse("Lamina loads no plugins: leave it out, and name the layers as directories")},
	{"debug", "", "Logs every request.", FuseOverlayfs, func(p *parser, _ string) string { p.o.Debug = true; return "" }},

	{"format", "sparse|bcow|bcow-single", "Format of new sketches: blocks at their natural offsets (sparse, default), or compact with a two-level (bcow) or a single-level table (bcow-single).", Lamina,
		oneOf(func(o *Options) *Format { return &o.Format }, Sparse, BCoW, BCoWSingle)},
	{"block_size", "BYTES", "Size of a block of new sparse sketches: a power of two from 4096 to 1m; k and m are understood. Default: 4096.", Lamina, setBlockSize},
	{"caw", "eager|lazy|sync", "When the rest of a partly written block is copied: soon (eager, default), when it is read or synced (lazy), or before the write returns (sync).", Lamina,
		oneOf(func(o *Options) *CaW { return &o.CaW }, Eager, Lazy, Sync)},
	{"fill", "none|idle", "Whether files that hold nearly all their blocks, or are hot, are completed in the background: when nobody has them open, and, if they are synced again and again as a database is, while they are in use, slowly and only with space to spare. Default: none.", Lamina,
		oneOf(func(o *Options) *Fill { return &o.Fill }, FillNone, FillIdle)},
	{"copyup", "auto|block|clone|full", "How a file's data gets into the upper layer: cloned where the filesystem can, else block by block as it is written (auto, default); block by block; cloned, or an error; whole and synced (full).", Lamina, setCopyUp},
	{"whiteouts", "auto|devices|files", "How layers mark names that are gone: by devices and attributes as kernel overlayfs does (devices), or by .wh. files of image archives as well (files), whose names the mount then cannot hold. auto (default) takes files for the layers of a Podman, Buildah or CRI-O store that is set up with a mount program, because these engines leave them in layers, and devices for all others.", Lamina,
		oneOf(func(o *Options) *Whiteouts { return &o.Whiteouts }, WhiteoutsAuto, WhiteoutsDevices, WhiteoutsFiles)},
	{"transport", "auto|uring|dev", "How requests reach the server: over io_uring (Linux 6.14), which is faster, or through /dev/fuse. auto uses io_uring where it is to be had, switching it on if that is allowed, and otherwise /dev/fuse, and says so; uring insists.", Lamina,
		choice("auto", setTransport(TransportAuto), "uring", setTransport(TransportUring), "dev", setTransport(TransportDev))},
	{"survive", "on|off", "Whether the mount outlives its server. on: a supervisor starts another server when one is killed, and who uses the mount waits meanwhile and sees no error. It needs root and Linux 6.9, and requests come through /dev/fuse. Default: off.", Lamina,
		choice("on", func(p *parser) { p.o.Survive = true }, "off", func(p *parser) { p.o.Survive = false })},
	{"passthrough", "auto|on|off", "Which opens the kernel serves by itself: those that cannot lose coherence (auto, default); every read-only open, whose descriptor then keeps the old bytes after a copy-up (on); none (off).", Lamina,
		oneOf(func(o *Options) *Tri { return &o.Passthrough }, Auto, On, Off)},
	{"max_stack_depth", "1|2", "How many filesystems may be stacked below for passthrough: 1 (default) lets overlayfs be mounted over Lamina, 2 lets layers lie on overlayfs.", Lamina,
		choice("1", setStackDepth(1), "2", setStackDepth(2))},

	{"ro", "", "Mounts read-only.", Mount, flag(unix.MS_RDONLY, true)},
	{"rw", "", "Mounts read-write (default where there is an upper directory).", Mount, flag(unix.MS_RDONLY, false)},
	{"suid", "", "Set-id bits count (default).", Mount, flag(unix.MS_NOSUID, false)},
	{"nosuid", "", "Set-id bits do not count.", Mount, flag(unix.MS_NOSUID, true)},
	{"dev", "", "Devices can be opened (default).", Mount, flag(unix.MS_NODEV, false)},
	{"nodev", "", "Devices cannot be opened.", Mount, flag(unix.MS_NODEV, true)},
	{"exec", "", "Programs can be run (default).", Mount, flag(unix.MS_NOEXEC, false)},
	{"noexec", "", "Programs cannot be run.", Mount, flag(unix.MS_NOEXEC, true)},
	{"sync", "", "Every write to a file is synced. Changes of directories are not.", Mount, flag(unix.MS_SYNCHRONOUS, true)},
	{"async", "", "Writes are synced when asked (default).", Mount, flag(unix.MS_SYNCHRONOUS, false)},
	{"dirsync", "", "Refused: the kernel syncs no directory of a FUSE mount.", Mount, refuse("the kernel syncs no directory of a FUSE mount: leave it out, and call fsync(2) on directories")},
	{"atime", "", "Access times are kept as the kernel does by default.", Mount, flag(unix.MS_NOATIME, false)},
	{"noatime", "", "Access times are not kept.", Mount, flag(unix.MS_NOATIME, true)},
	{"diratime", "", "Access times of directories are kept.", Mount, flag(unix.MS_NODIRATIME, false)},
	{"nodiratime", "", "Access times of directories are not kept.", Mount, flag(unix.MS_NODIRATIME, true)},
	{"relatime", "", "Access times are kept relative to changes.", Mount, flag(unix.MS_RELATIME, true)},
	{"norelatime", "", "Undoes relatime.", Mount, flag(unix.MS_RELATIME, false)},
	{"strictatime", "", "Access times are always kept.", Mount, flag(unix.MS_STRICTATIME, true)},
	{"nostrictatime", "", "Undoes strictatime.", Mount, flag(unix.MS_STRICTATIME, false)},
	{"lazytime", "", "Times are written lazily.", Mount, flag(unix.MS_LAZYTIME, true)},
	{"nolazytime", "", "Undoes lazytime.", Mount, flag(unix.MS_LAZYTIME, false)},
	{"private", "", "Mounts made on the mount stay here, and those made elsewhere do not come here. Needs CAP_SYS_ADMIN, as the next three. What a new mount is otherwise, its surroundings decide; see mount_namespaces(7).", Mount, propagation(unix.MS_PRIVATE)},
	{"rprivate", "", "The same as private.", Mount, propagation(unix.MS_PRIVATE)},
	{"slave", "", "Mounts come here and do not leave.", Mount, propagation(unix.MS_SLAVE)},
	{"rslave", "", "The same as slave.", Mount, propagation(unix.MS_SLAVE)},
	{"shared", "", "Mounts come here and leave.", Mount, propagation(unix.MS_SHARED)},
	{"rshared", "", "The same as shared.", Mount, propagation(unix.MS_SHARED)},
	{"unbindable", "", "As private, and the mount cannot be bind-mounted.", Mount, propagation(unix.MS_UNBINDABLE)},
	{"runbindable", "", "The same as unbindable.", Mount, propagation(unix.MS_UNBINDABLE)},
	{"silent", "", "The kernel logs fewer messages.", Mount, flag(unix.MS_SILENT, true)},
	{"loud", "", "Undoes silent.", Mount, flag(unix.MS_SILENT, false)},
	{"allow_other", "", "Other users may use the mount. The default for root.", Mount, func(p *parser, _ string) string { p.o.AllowOther = true; return "" }},
	{"allow_root", "", "Refused: the kernel cannot tell root from other users here.", Mount, refuse("the kernel lets in all users or one: use allow_other")},
	{"fsname", "NAME", "The source shown in /proc/mounts. Default: lamina.", Mount, func(p *parser, v string) string { p.o.FSName = unescape(v); return "" }},
	{"context", "LABEL", "SELinux label of every object. A label with commas goes in double quotes.", Mount, setContext("context")},
	{"fscontext", "LABEL", "SELinux label of the filesystem.", Mount, setContext("fscontext")},
	{"defcontext", "LABEL", "SELinux label of objects without one.", Mount, setContext("defcontext")},
	{"rootcontext", "LABEL", "SELinux label of the root.", Mount, setContext("rootcontext")},
	{"remount", "", "Refused: options are fixed for the life of a mount.", Mount, refuse("a Lamina mount keeps its options for life: unmount it and mount it anew")},
	{"bind", "", "Refused here.", Mount, refuse("not a filesystem's option: use mount --bind")},
	{"defaults", "", "Without effect.", Mount, acceptFlag},
	{"auto", "", "For fstab(5); without effect here.", Mount, acceptFlag},
	{"noauto", "", "For fstab(5); without effect here.", Mount, acceptFlag},
	{"nofail", "", "For fstab(5); without effect here.", Mount, acceptFlag},
	{"_netdev", "", "For fstab(5); without effect here.", Mount, acceptFlag},
	{"user", "[NAME]", "For fstab(5); without effect here.", Mount, acceptAny},
	{"nouser", "", "For fstab(5); without effect here.", Mount, acceptFlag},
	{"users", "", "For fstab(5); without effect here.", Mount, acceptFlag},
	{"owner", "", "For fstab(5); without effect here.", Mount, acceptFlag},
	{"group", "", "For fstab(5); without effect here.", Mount, acceptFlag},
	{"comment", "TEXT", "For fstab(5); without effect here.", Mount, acceptAny},
	{"x-*", "[VALUE]", "Options of user space that begin with x- or X-; nothing here.", Mount, acceptAny},
}

const (
	noVerity    = "Lamina does not check fs-verity digests: leave it out, or mount with kernel overlayfs"
	noWriteback = "the kernel's writeback cache excludes passthrough: leave it out"
	noNoXattrs  = "Lamina shows the layers' extended attributes: leave it out"
	noIno32     = "inode numbers have 64 bits: leave it out"
)

type setter = func(p *parser, value string) string

func accept(*parser) {}

func acceptFlag(*parser, string) string { return "" }

func acceptAny(*parser, string) string { return "" }

func acceptNumber(_ *parser, v string) string {
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || math.IsNaN(f) || f < 0 {
		return fmt.Sprintf("%q is not a number", v)
	}
	return ""
}

func refuse(reason string) setter {
	return func(*parser, string) string { return "refused: " + reason }
}

// choice takes pairs of a value and either a func(*parser), which carries it out, or a string, the reason for refusing.
func choice(pairs ...any) setter {
	return func(p *parser, v string) string {
		var names []string
		for i := 0; i < len(pairs); i += 2 {
			name := pairs[i].(string)
			do, ok := pairs[i+1].(func(*parser))
			switch {
			case name != v && ok && name != "":
				names = append(names, name)
			case name != v:
			case ok:
				do(p)
				return ""
			default:
				return v + " is refused: " + pairs[i+1].(string)
			}
		}
		return fmt.Sprintf("%q is not one of %s", v, strings.Join(names, ", "))
	}
}

// oneOf stores the value if it is one of those allowed.
func oneOf[T ~string](field func(*Options) *T, allowed ...T) setter {
	return func(p *parser, v string) string {
		if !slices.Contains(allowed, T(v)) {
			names := make([]string, len(allowed))
			for i, a := range allowed {
				names[i] = string(a)
			}
			return fmt.Sprintf("%q is not one of %s", v, strings.Join(names, ", "))
		}
		*field(p.o) = T(v)
		return ""
	}
}

func onOff(set func(o *Options, on bool)) setter {
	return choice("on", func(p *parser) { set(p.o, true) }, "off", func(p *parser) { set(p.o, false) })
}

func setRedirect(r RedirectDir) func(*parser) { return func(p *parser) { p.o.Redirect = r } }
func setPerms(m Perms) func(*parser)          { return func(p *parser) { p.o.Perms = m } }
func setTransport(t Transport) func(*parser)  { return func(p *parser) { p.o.Transport = t } }
func setStackDepth(n int) func(*parser)       { return func(p *parser) { p.o.MaxStackDepth = n } }
func setFlags(o *Options, bits uintptr, on bool) {
	if on {
		o.MountFlags |= bits
	} else {
		o.MountFlags &^= bits
	}
	o.ReadOnly = o.MountFlags&unix.MS_RDONLY != 0
}

func flag(bits uintptr, on bool) setter {
	return func(p *parser, _ string) string {
		setFlags(p.o, bits, on)
		return ""
	}
}

func propagation(bits uintptr) setter {
	return func(p *parser, _ string) string {
		p.o.Propagation = bits
		return ""
	}
}

// path resolves a directory's name against the working directory.
func (p *parser) path(v string) (string, string) {
	switch {
	case v == "":
		return "", "the name of a directory is empty"
	case strings.IndexByte(v, 0) >= 0:
		return "", "the name of a directory holds a NUL byte"
	case !filepath.IsAbs(v):
		v = filepath.Join(p.env.Dir, v)
	}
	return filepath.Clean(v), ""
}

func setPath(field func(*Options) *string) setter {
	return func(p *parser, v string) string {
		path, reason := p.path(unescape(v))
		if reason == "" {
			*field(p.o) = path
		}
		return reason
	}
}

// setLowers replaces all layers named before, as overlayfs does.
func setLowers(p *parser, v string) string {
	p.o.Lower, p.o.Data = nil, nil
	add := addLowerPath
	items := splitList(v)
	for i := 0; i < len(items); i++ {
		// A piece that is empty stands between two colons.
		if items[i] == "" && i > 0 && i+1 < len(items) {
			add = addDataPath
			i++
		} else if len(p.o.Data) > 0 {
			return "data-only layers are separated by double colons"
		}
		if reason := add(p, items[i]); reason != "" {
			return reason
		}
	}
	return ""
}

func addLower(p *parser, v string) string { return addLowerPath(p, unescape(v)) }

func addData(p *parser, v string) string { return addDataPath(p, unescape(v)) }

func addLowerPath(p *parser, v string) string {
	if len(p.o.Data) > 0 {
		return "a lower directory cannot lie below data-only ones: name it before them"
	}
	path, reason := p.path(v)
	if reason == "" {
		p.o.Lower = append(p.o.Lower, path)
	}
	return reason
}

func addDataPath(p *parser, v string) string {
	if len(p.o.Lower) == 0 {
		return "a data-only layer needs a lower directory above it"
	}
	path, reason := p.path(v)
	if reason == "" {
		p.o.Data = append(p.o.Data, path)
	}
	return reason
}

// setMapping reads triples. Podman puts a colon before the first; fuse-overlayfs's manual puts commas between them.
func setMapping(field func(*Options) *[]IDRange) setter {
	return func(p *parser, v string) string {
		numbers := strings.FieldsFunc(unescape(v), func(r rune) bool { return r == ':' || r == ',' })
		if len(numbers) == 0 || len(numbers)%3 != 0 {
			return fmt.Sprintf("%q is not made of triples DISK:SHOWN:LEN", v)
		}
		var ranges []IDRange
		for triple := range slices.Chunk(numbers, 3) {
			r, reason := parseRange(triple)
			if reason != "" {
				return reason
			}
			ranges = append(ranges, r)
		}
		if reason := overlap(ranges); reason != "" {
			return reason
		}
		*field(p.o) = ranges
		return ""
	}
}

func parseRange(triple []string) (IDRange, string) {
	var n [3]uint32
	for i, s := range triple {
		v, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return IDRange{}, fmt.Sprintf("%q is not a number from 0 to 4294967295", s)
		}
		n[i] = uint32(v)
	}
	r := IDRange{Disk: n[0], Shown: n[1], Len: n[2]}
	switch {
	case r.Len == 0:
		return r, fmt.Sprintf("%s maps no ids", strings.Join(triple, ":"))
	case uint64(r.Disk)+uint64(r.Len) > math.MaxUint32 || uint64(r.Shown)+uint64(r.Len) > math.MaxUint32:
		return r, fmt.Sprintf("%s goes beyond the last id", strings.Join(triple, ":"))
	}
	return r, ""
}

// overlap finds ids mapped twice in either direction: such a mapping could not be turned round.
func overlap(ranges []IDRange) string {
	for _, side := range []struct {
		name  string
		start func(IDRange) uint64
	}{
		{"in the layers", func(r IDRange) uint64 { return uint64(r.Disk) }},
		{"shown", func(r IDRange) uint64 { return uint64(r.Shown) }},
	} {
		sorted := slices.Clone(ranges)
		slices.SortFunc(sorted, func(a, b IDRange) int { return int(side.start(a)) - int(side.start(b)) })
		for i := 1; i < len(sorted); i++ {
			if side.start(sorted[i-1])+uint64(sorted[i-1].Len) > side.start(sorted[i]) {
				return fmt.Sprintf("id %d (%s) is mapped twice", side.start(sorted[i]), side.name)
			}
		}
	}
	return ""
}

func squashToRoot(p *parser, _ string) string {
	for _, id := range []**uint32{&p.o.SquashUID, &p.o.SquashGID} {
		if *id == nil {
			*id = new(uint32)
		}
	}
	return ""
}

func setID(field func(*Options) **uint32) setter {
	return func(p *parser, v string) string {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil || n == math.MaxUint32 {
			return fmt.Sprintf("%q is not an id from 0 to 4294967294", v)
		}
		id := uint32(n)
		*field(p.o) = &id
		return ""
	}
}

var setNoXattrs = choice("0", accept, "1", noNoXattrs, "", noNoXattrs)

func setCopyUp(p *parser, v string) string {
	p.copyUp = CopyUp(v)
	return oneOf(func(o *Options) *CopyUp { return &o.CopyUp }, CopyUpAuto, CopyUpBlock, CopyUpClone, CopyUpFull)(p, v)
}

const (
	minBlockSize = 4096
	maxBlockSize = 1 << 20
)

func setBlockSize(p *parser, v string) string {
	digits, unit := v, 1
	switch {
	case strings.HasSuffix(v, "k"), strings.HasSuffix(v, "K"):
		digits, unit = v[:len(v)-1], 1<<10
	case strings.HasSuffix(v, "m"), strings.HasSuffix(v, "M"):
		digits, unit = v[:len(v)-1], 1<<20
	}
	n, err := strconv.ParseUint(digits, 10, 31)
	size := n * uint64(unit)
	if err != nil || size < minBlockSize || size > maxBlockSize || size&(size-1) != 0 {
		return fmt.Sprintf("%q is not a power of two from 4096 to 1m", v)
	}
	p.o.BlockSize = int(size)
	return ""
}

func setContext(name string) setter {
	return func(p *parser, v string) string {
		label := v
		if len(v) >= 2 && v[0] == '"' && v[len(v)-1] == '"' {
			label = v[1 : len(v)-1]
		} else {
			label = unescape(v)
		}
		if label == "" || strings.ContainsAny(label, "\"\x00\n") {
			return fmt.Sprintf("%q is not an SELinux label", v)
		}
		if strings.Contains(label, ",") {
			label = `"` + label + `"`
		}
		item := name + "=" + label
		p.o.Context = slices.DeleteFunc(p.o.Context, func(s string) bool { return strings.HasPrefix(s, name+"=") })
		p.o.Context = append(p.o.Context, item)
		return ""
	}
}
