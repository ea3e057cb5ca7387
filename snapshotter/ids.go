package snapshotter

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// idMap is what a snapshot's labels say of owners.
type idMap struct {
	uids, gids       []idRange
	rootUID, rootGID uint32 // of the container's root, outside
}

// idRange is one CONTAINER:HOST:LENGTH.
type idRange struct{ container, host, length uint32 }

// idMapOf reads the labels; nil: there are none.
func idMapOf(labels map[string]string) (*idMap, error) {
	uids, hasUIDs := labels[snapshots.LabelSnapshotUIDMapping]
	gids, hasGIDs := labels[snapshots.LabelSnapshotGIDMapping]
	if !hasUIDs && !hasGIDs {
		return nil, nil
	}
	m := &idMap{}
	for _, part := range []struct {
		label, text string
		ranges      *[]idRange
		root        *uint32
	}{
		{snapshots.LabelSnapshotUIDMapping, uids, &m.uids, &m.rootUID},
		{snapshots.LabelSnapshotGIDMapping, gids, &m.gids, &m.rootGID},
	} {
		ranges, err := parseIDRanges(part.text)
		if err == nil {
			*part.ranges = ranges
			*part.root, err = hostID(0, ranges)
		}
		if err != nil {
			return nil, fmt.Errorf("label %s: %w: %w", part.label, err, errdefs.ErrInvalidArgument)
		}
	}
	return m, nil
}

// parseIDRanges reads CONTAINER:HOST:LENGTH, several with commas between.
func parseIDRanges(text string) ([]idRange, error) {
	var ranges []idRange
	for item := range strings.SplitSeq(text, ",") {
		fields := strings.Split(item, ":")
		if len(fields) != 3 {
			return nil, fmt.Errorf("%q is not CONTAINER:HOST:LENGTH", item)
		}
		var n [3]uint32
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("%q is not a number from 0 to %d", f, uint32(math.MaxUint32))
			}
			n[i] = uint32(v)
		}
		r := idRange{n[0], n[1], n[2]}
		if r.length == 0 || uint64(r.container)+uint64(r.length) > math.MaxUint32 || uint64(r.host)+uint64(r.length) > math.MaxUint32 {
			return nil, fmt.Errorf("%q maps no ids, or ids beyond the last", item)
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

func hostID(id uint32, ranges []idRange) (uint32, error) {
	for _, r := range ranges {
		if id >= r.container && id-r.container < r.length {
			return r.host + (id - r.container), nil
		}
	}
	return 0, fmt.Errorf("id %d of the container is not mapped", id)
}

// options are Lamina's: in the layers are the container's ids, shown are the host's.
func (m *idMap) options() []string {
	list := func(name string, ranges []idRange) string {
		var triples []string
		for _, r := range ranges {
			triples = append(triples, fmt.Sprintf("%d:%d:%d", r.container, r.host, r.length))
		}
		return name + strings.Join(triples, ":")
	}
	return []string{list("uidmapping=", m.uids), list("gidmapping=", m.gids)}
}
