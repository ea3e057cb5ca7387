package fusefs

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// overflowID is shown for an owner that has no number in the mount, as the kernel shows it (fs.overflowuid's default).
const overflowID = 65534

// IDRange maps Len ids from Disk, as the layers store them, to Shown, as the mount shows them.
type IDRange struct {
	Disk, Shown, Len uint32
}

// IDMap translates owners. The zero value changes nothing.
type IDMap struct {
	UIDs, GIDs []IDRange // empty: as they are
	// SquashUID and SquashGID: every object is shown with this owner. Nil: no squashing.
	SquashUID, SquashGID *uint32
}

// ParseIDRanges reads fuse-overlayfs's notation of uidmapping= and gidmapping=: DISK:SHOWN:LEN, any number of them
// joined by ':'. Podman writes a ':' before the first one too.
func ParseIDRanges(s string) ([]IDRange, error) {
	fields := strings.Split(strings.TrimPrefix(s, ":"), ":")
	if len(fields)%3 != 0 {
		return nil, fmt.Errorf("id mapping %q: want DISK:SHOWN:LEN triplets joined by ':'", s)
	}
	nums := make([]uint32, len(fields))
	for i, f := range fields {
		n, err := strconv.ParseUint(f, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("id mapping %q: %q is not an id", s, f)
		}
		nums[i] = uint32(n)
	}
	var out []IDRange
	for t := range slices.Chunk(nums, 3) {
		out = append(out, IDRange{Disk: t[0], Shown: t[1], Len: t[2]})
	}
	return out, checkRanges(out)
}

func (m *IDMap) check() error {
	if err := checkRanges(m.UIDs); err != nil {
		return err
	}
	return checkRanges(m.GIDs)
}

// checkRanges refuses what the kernel refuses in /proc/PID/uid_map: empty, wrapping and overlapping ranges.
func checkRanges(rs []IDRange) error {
	for i, r := range rs {
		if r.Len == 0 || r.Disk > math.MaxUint32-r.Len || r.Shown > math.MaxUint32-r.Len {
			return fmt.Errorf("id mapping %d:%d:%d: the range is empty or reaches beyond 4294967294", r.Disk, r.Shown, r.Len)
		}
		for _, o := range rs[:i] {
			if overlap(r.Disk, r.Len, o.Disk, o.Len) || overlap(r.Shown, r.Len, o.Shown, o.Len) {
				return fmt.Errorf("id mapping %d:%d:%d overlaps %d:%d:%d", r.Disk, r.Shown, r.Len, o.Disk, o.Shown, o.Len)
			}
		}
	}
	return nil
}

func overlap(a, an, b, bn uint32) bool { return a < b+bn && b < a+an }

func (m *IDMap) showUID(id uint32) uint32 { return show(id, m.UIDs, m.SquashUID) }
func (m *IDMap) showGID(id uint32) uint32 { return show(id, m.GIDs, m.SquashGID) }

// storeUID gives the id that the layer stores for one of the mount; false if there is none.
func (m *IDMap) storeUID(id uint32) (uint32, bool) { return store(id, m.UIDs) }
func (m *IDMap) storeGID(id uint32) (uint32, bool) { return store(id, m.GIDs) }

func show(id uint32, rs []IDRange, squash *uint32) uint32 {
	if squash != nil {
		return *squash
	}
	if len(rs) == 0 {
		return id
	}
	for _, r := range rs {
		if id-r.Disk < r.Len {
			return r.Shown + (id - r.Disk)
		}
	}
	return overflowID
}

func store(id uint32, rs []IDRange) (uint32, bool) {
	if len(rs) == 0 {
		return id, true
	}
	for _, r := range rs {
		if id-r.Shown < r.Len {
			return r.Disk + (id - r.Shown), true
		}
	}
	return 0, false
}

// POSIX ACLs name ids too. Layout: uapi/linux/posix_acl_xattr.h, little endian: version 2, then {tag, perm u16; id u32}.
const (
	xattrACLAccess  = "system.posix_acl_access"
	xattrACLDefault = "system.posix_acl_default"

	aclVersion   = 2
	aclHeaderLen = 4
	aclEntryLen  = 8
	aclUser      = 0x02
	aclGroup     = 0x08
)

func isACL(name string) bool { return name == xattrACLAccess || name == xattrACLDefault }

// mapped says that ids need translating at all.
func (m *IDMap) mapped() bool { return len(m.UIDs) > 0 || len(m.GIDs) > 0 }

// showACL returns a copy of an ACL as the mount shows it. What is not an ACL is returned as it is: the kernel judges it.
func (m *IDMap) showACL(acl []byte) []byte {
	out, _ := m.mapACL(acl,
		func(id uint32) (uint32, bool) { return show(id, m.UIDs, nil), true },
		func(id uint32) (uint32, bool) { return show(id, m.GIDs, nil), true })
	return out
}

// storeACL returns a copy of an ACL as the layer stores it. EINVAL: an id has no number there.
func (m *IDMap) storeACL(acl []byte) ([]byte, error) {
	out, ok := m.mapACL(acl, m.storeUID, m.storeGID)
	if !ok {
		return nil, unix.EINVAL
	}
	return out, nil
}

func (m *IDMap) mapACL(acl []byte, user, group func(uint32) (uint32, bool)) ([]byte, bool) {
	if !m.mapped() || len(acl) < aclHeaderLen || binary.LittleEndian.Uint32(acl) != aclVersion {
		return acl, true
	}
	out := slices.Clone(acl)
	for at := aclHeaderLen; at+aclEntryLen <= len(out); at += aclEntryLen {
		conv := user
		switch binary.LittleEndian.Uint16(out[at:]) {
		case aclUser:
		case aclGroup:
			conv = group
		default:
			continue
		}
		id, ok := conv(binary.LittleEndian.Uint32(out[at+4:]))
		if !ok {
			return nil, false
		}
		binary.LittleEndian.PutUint32(out[at+4:], id)
	}
	return out, true
}
