package layer

// Marks are overlayfs's conventions about one object of a layer
// (Documentation/filesystems/overlayfs.rst, fs/overlayfs/namei.c).
type Marks struct {
	// Opaque: a directory that hides everything below it (overlay.opaque=y).
	Opaque bool
	// XWhiteouts: a directory that may hold regular files marked overlay.whiteout (overlay.opaque=x).
	XWhiteouts bool
	// Redirect: where the object's lower counterpart lies. It starts with "/" when counted from the root of the layers
	// below, and is a single name when it lies in the parent's counterpart. Empty: under its own name.
	Redirect string
	// Metacopy: a regular file whose data lies in a layer below (overlay.metacopy present). Header holds the attribute's
	// value: empty or version 0 for kernel overlayfs's own, a Lamina sketch header otherwise (docs/format.md).
	Metacopy bool
	Header   []byte
	// Origin: the lower object that this one was copied up from, as Lamina records it (overlay.lamina.origin). Nil if absent.
	Origin []byte
	// Capable: the object carries security.capability.
	Capable bool
	// Bare: the object has no extended attribute at all, overlay's or other. False where that was not looked at.
	Bare bool
}

// Xattr names within the overlay namespace; the full name is Namespace.Prefix() + one of these.
const (
	XattrOpaque   = "opaque"
	XattrRedirect = "redirect"
	XattrMetacopy = "metacopy"
	XattrWhiteout = "whiteout"
	XattrNlink    = "nlink"
	XattrOrigin   = "lamina.origin"
)

// Namespace says where overlay's private attributes live.
type Namespace uint8

const (
	Trusted Namespace = iota // trusted.overlay.*: mounts made with CAP_SYS_ADMIN in the initial user namespace
	User                     // user.overlay.*: unprivileged mounts, option userxattr
)

// Prefix returns the attribute prefix with its trailing dot.
func (n Namespace) Prefix() string {
	if n == User {
		return "user.overlay."
	}
	return "trusted.overlay."
}
