package union

import (
	"lamina/block"
	"lamina/layer"
	"lamina/state"

	"golang.org/x/sys/unix"
)

// CopyUp says how a regular file's data gets into the upper layer.
type CopyUp uint8

const (
	CopyUpAuto  CopyUp = iota // clone where the filesystem can, otherwise block
	CopyUpBlock               // an empty sketch; blocks follow as they are written
	CopyUpClone               // FICLONE, and an error where the filesystem cannot
	CopyUpFull                // copy the whole file and sync it, as kernel overlayfs does
)

// Config is what a union is made of. The FS owns the layers from then on and closes them.
type Config struct {
	Lowers []layer.Layer // topmost first; at least one
	Upper  *layer.Dir    // nil: read-only
	Work   *layer.Dir    // an empty directory on the same filesystem as Upper
	NS     layer.Namespace
	Engine *block.Engine
	CopyUp CopyUp
	// Redirect: follow and create overlay.redirect (redirect_dir=on). Off: renaming a lower directory gives EXDEV.
	Redirect bool
	// Follow existing redirects (redirect_dir=on|follow).
	Follow bool
	// Index: keep hard links between lower files across copy-up.
	Index bool
	// Volatile: never sync.
	Volatile bool
	// State is memory that outlives this process, see memory.go; nil: there is none. Resume: it is what a killed process
	// left that had the same layers; Moved are places to which something may have been renamed in the moment of its death.
	State  *state.Arena
	Resume bool
	Moved  []Place
	// Logf receives one line per event that an operator must know of (damage, refused lower).
	Logf func(format string, args ...any)
}

// Cred is who creates an object: owner ids as the layer stores them, and the umask to apply where no default ACL rules.
type Cred struct {
	UID, GID uint32
	Umask    uint32
}

// Attr is what stat says of a node. Ino is the union's own stable number.
type Attr = unix.Stat_t

// SetAttr says what to change; nil means leave.
type SetAttr struct {
	Mode         *uint32 // permission bits and S_ISUID, S_ISGID, S_ISVTX
	UID, GID     *uint32
	Size         *int64
	Atime, Mtime *unix.Timespec // Nsec may be unix.UTIME_NOW
	// KillPriv drops S_ISUID, S_ISGID (where group-executable) and security.capability, as the kernel does when an
	// unprivileged process truncates or changes owner.
	KillPriv bool
}

// DirEntry is one name of a merged directory.
type DirEntry struct {
	Name string
	Ino  uint64 // what stat of this name would say
	Type uint8  // unix.DT_*
	Off  uint64 // position just behind this entry: stable as long as the name exists, whatever comes and goes around it
}
