package layer

import (
	"strings"

	"golang.org/x/sys/unix"
)

// checkRedirect returns what is wrong with the value of an overlay.redirect attribute, or "". Valid are one name, and
// an absolute path of one or more names.
func checkRedirect(v string) string {
	if len(v) >= unix.PathMax {
		return "overlay.redirect is longer than PATH_MAX"
	}
	names := v
	if strings.HasPrefix(v, "/") {
		names = v[1:]
	} else if strings.Contains(v, "/") {
		return "overlay.redirect is a relative path of several names"
	}
	if strings.IndexByte(v, 0) >= 0 {
		return "overlay.redirect holds a NUL byte"
	}
	for name := range strings.SplitSeq(names, "/") {
		switch {
		case name == "":
			return "overlay.redirect holds an empty name"
		case name == "." || name == "..":
			return "overlay.redirect holds \"" + name + "\""
		case len(name) > unix.NAME_MAX:
			return "overlay.redirect holds a name longer than NAME_MAX"
		}
	}
	return ""
}
