package fusefs

import (
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseIDRanges(t *testing.T) {
	good := map[string][]IDRange{
		"0:100000:65536":         {{0, 100000, 65536}},
		":0:100000:65536":        {{0, 100000, 65536}}, // Podman's
		"0:1000:1:1:100000:9999": {{0, 1000, 1}, {1, 100000, 9999}},
	}
	for in, want := range good {
		if got, err := ParseIDRanges(in); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v; want %v", in, got, err, want)
		}
	}
	bad := []string{"", ":", "0:1", "0:1:2:3", "a:0:1", "0:0:0", "-1:0:1", "4294967296:0:1", "4294967295:0:1",
		"0:0:10:5:100:10", "0:0:10:100:5:10"}
	for _, in := range bad {
		if got, err := ParseIDRanges(in); err == nil {
			t.Errorf("%q was accepted as %v", in, got)
		} else if !strings.Contains(err.Error(), "id mapping") {
			t.Errorf("%q: the error does not say what it is about: %v", in, err)
		}
	}
}

func FuzzParseIDRanges(f *testing.F) {
	for _, s := range []string{"0:100000:65536", ":0:100000:65536", "0:1000:1:1:100000:9999", "0:0:0", "::", "4294967295:4294967295:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		rs, err := ParseIDRanges(s)
		if err != nil {
			return
		}
		m := IDMap{UIDs: rs, GIDs: rs}
		for _, r := range rs {
			for _, id := range []uint32{r.Disk, r.Disk + r.Len - 1} {
				if back, ok := m.storeUID(m.showUID(id)); !ok || back != id {
					t.Errorf("%q: %d is shown as %d, which is stored as %d (%v)", s, id, m.showUID(id), back, ok)
				}
			}
		}
	})
}

func TestIDMap(t *testing.T) {
	m := IDMap{UIDs: []IDRange{{0, 1000, 1}, {1, 100000, 10}}}
	for disk, shown := range map[uint32]uint32{0: 1000, 1: 100000, 10: 100009, 11: overflowID, 1 << 31: overflowID} {
		if got := m.showUID(disk); got != shown {
			t.Errorf("uid %d is shown as %d, want %d", disk, got, shown)
		}
	}
	if got := m.showGID(7); got != 7 {
		t.Errorf("gid 7 without a mapping is shown as %d", got)
	}
	if id, ok := m.storeUID(5); ok {
		t.Errorf("uid 5 is not mapped and yet stored as %d", id)
	}
	squashed := uint32(42)
	m.SquashUID = &squashed
	if got := m.showUID(1); got != 42 {
		t.Errorf("squashed uid is shown as %d", got)
	}
	if id, ok := m.storeUID(100000); !ok || id != 1 {
		t.Errorf("squashing changed what is stored: %d, %v", id, ok)
	}
}

// acl makes an ACL with one named user and one named group.
func acl(user, group uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range [][3]uint32{{0x01, 6, 0xffffffff}, {aclUser, 6, user}, {0x04, 4, 0xffffffff}, {aclGroup, 4, group}, {0x10, 6, 0xffffffff}, {0x20, 4, 0xffffffff}} {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

func TestACLIDs(t *testing.T) {
	m := IDMap{UIDs: []IDRange{{0, 100000, 1000}}, GIDs: []IDRange{{0, 200000, 1000}}}
	disk := acl(5, 7)
	if got := m.showACL(disk); !slices.Equal(got, acl(100005, 200007)) {
		t.Errorf("shown as % x", got)
	}
	if !slices.Equal(disk, acl(5, 7)) {
		t.Error("the layer's value was changed in place")
	}
	if got, err := m.storeACL(acl(100005, 200007)); err != nil || !slices.Equal(got, disk) {
		t.Errorf("stored as % x, %v", got, err)
	}
	if got, err := m.storeACL(acl(5, 200007)); err != unix.EINVAL {
		t.Errorf("an unmapped user was stored: % x, %v", got, err)
	}
	for _, odd := range [][]byte{nil, {1}, {1, 0, 0, 0, 2, 0, 6, 0, 5, 0, 0, 0}, disk[:len(disk)-3]} {
		if got := m.showACL(odd); len(got) != len(odd) {
			t.Errorf("% x became % x", odd, got)
		}
	}
}

// TestMappedOwners: owners are translated on stat, creation and chown, and what has no number is refused.
func TestMappedOwners(t *testing.T) {
	ranges, err := ParseIDRanges(":0:1000:100")
	must(t, err)
	r := newRig(t, Options{IDs: IDMap{UIDs: ranges, GIDs: ranges}}, func(lower string) {
		must(t, os.WriteFile(lower+"/inside", nil, 0o644))
		must(t, os.Lchown(lower+"/inside", 5, 6))
		must(t, os.WriteFile(lower+"/outside", nil, 0o644))
		must(t, os.Lchown(lower+"/outside", 500, 600))
	})
	root, user := startActor(t, 0), startActor(t, 1007)
	if st := root.stat(r.path("inside")); st.Uid != 1005 || st.Gid != 1006 {
		t.Errorf("5:6 is shown as %d:%d", st.Uid, st.Gid)
	}
	if st := root.stat(r.path("outside")); st.Uid != overflowID || st.Gid != overflowID {
		t.Errorf("500:600 is shown as %d:%d", st.Uid, st.Gid)
	}
	root.must(request{Op: "chmod", Path: r.mnt, Mode: 0o777})
	user.close(user.open(r.path("new"), unix.O_CREAT|unix.O_RDWR))
	if st := root.stat(r.upper + "/new"); st.Uid != 7 || st.Gid != 7 {
		t.Errorf("a file of 1007 is stored with owner %d:%d", st.Uid, st.Gid)
	}
	if st := root.stat(r.path("new")); st.Uid != 1007 || st.Gid != 1007 {
		t.Errorf("a file of 1007 is shown with owner %d:%d", st.Uid, st.Gid)
	}
	root.must(request{Op: "chown", Path: r.path("inside"), UID: 1050, GID: 1051})
	if st := root.stat(r.upper + "/inside"); st.Uid != 50 || st.Gid != 51 {
		t.Errorf("chown to 1050:1051 stored %d:%d", st.Uid, st.Gid)
	}
	if out := root.do(request{Op: "chown", Path: r.path("inside"), UID: 5, GID: -1}); out.Errno != unix.EINVAL {
		t.Errorf("chown to an unmapped owner: %v, want EINVAL", out.Errno)
	}
	if out := root.do(request{Op: "mkdir", Path: r.path("dir"), Mode: 0o755}); out.Errno != unix.EOVERFLOW {
		t.Errorf("mkdir by an unmapped owner: %v, want EOVERFLOW", out.Errno)
	}
}
