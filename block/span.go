package block

// span is a byte range [lo, hi) within one block.
type span struct{ lo, hi uint32 }

// addSpan adds s to a sorted list of disjoint, non-touching spans, and keeps it one.
func addSpan(list []span, s span) []span {
	i := 0
	for i < len(list) && list[i].hi < s.lo {
		i++
	}
	k := i
	for k < len(list) && list[k].lo <= s.hi {
		s.lo, s.hi = min(s.lo, list[k].lo), max(s.hi, list[k].hi)
		k++
	}
	if i == k {
		list = append(list, span{})
		copy(list[i+1:], list[i:])
		list[i] = s
		return list
	}
	list[i] = s
	return append(list[:i+1], list[k:]...)
}

// gaps calls do for every part of [0, end) that no span of the list covers.
func gaps(list []span, end uint32, do func(lo, hi uint32) error) error {
	at := uint32(0)
	for _, s := range list {
		if s.lo >= end {
			break
		}
		if at < s.lo {
			if err := do(at, s.lo); err != nil {
				return err
			}
		}
		at = max(at, s.hi)
	}
	if at < end {
		return do(at, end)
	}
	return nil
}

// clip cuts a list at end.
func clip(list []span, end uint32) []span {
	for i, s := range list {
		if s.lo >= end {
			return list[:i]
		}
		if s.hi > end {
			list[i].hi = end
		}
	}
	return list
}
