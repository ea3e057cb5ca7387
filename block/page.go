package block

import (
	"encoding/binary"
	"hash/crc32"
)

// A table is an array of entries kept in pages. Every page has two slots, A and B, side by side. It is always written
// into the slot that does not hold its newest copy, so a write that a power cut tears leaves the state before it.
//
// A slot is eight sectors of 512 bytes, the unit that a disk writes whole. Each carries its own check, so that a torn
// write (every sector good, of two generations, or still zero) is told apart from damage (a sector that is neither):
//
//	0   u32 'L' 'm', version, kind
//	4   u32 crc32c of bytes 0-3 and 8-511, then of the table's position (u64), the page's index (u32), the sector's number (u32)
//	8   u64 generation, the same in all eight sectors; the larger one of two whole slots is the newer; never 0
//	16      496 bytes of entries
//
// The position in the checksum binds a page to one table: what is left of a table that was moved away is never
// mistaken for a page of another.
const (
	pageSize       = 4096
	sectorSize     = 512
	sectorHeader   = 16
	sectorPayload  = sectorSize - sectorHeader
	sectorsPerPage = pageSize / sectorSize
	pagePayload    = sectorsPerPage * sectorPayload
	slotsSize      = 2 * pageSize // of one page: slot A, slot B
	pageVersion    = 1
	bitsPerPage    = pagePayload * 8
	wordsPerPage   = pagePayload / 4
	maxTablePages  = maxBlocks/wordsPerPage + 1
)

// pageKind says what the payload's entries are.
type pageKind uint8

const (
	kindBits pageKind = 1 // one bit a block: 1 = Upper
	kindPhys pageKind = 2 // one u32 a block: where it lies
	kindLeaf pageKind = 3 // one u32 a leaf: where it lies
)

// pageID is what a page's bytes are bound to.
type pageID struct {
	kind  pageKind
	pos   int64 // of the table in the upper file, bytes
	index int64
}

// page is the newest state of one page, in memory.
type page struct {
	gen     uint64 // 0: never written
	slot    int64  // the slot that holds gen
	dirty   bool   // payload is newer than what the slot holds
	damaged bool
	payload [pagePayload]byte
}

func (p *page) bit(i int64) bool { return p.payload[i/8]&(1<<(i%8)) != 0 }
func (p *page) setBit(i int64)   { p.payload[i/8] |= 1 << (i % 8) }

func (p *page) word(i int64) uint32       { return binary.LittleEndian.Uint32(p.payload[i*4:]) }
func (p *page) setWord(i int64, v uint32) { binary.LittleEndian.PutUint32(p.payload[i*4:], v) }

// encode writes the payload as generation gen into b, one slot.
func (p *page) encode(b []byte, id pageID, gen uint64) {
	for i := range sectorsPerPage {
		s := b[i*sectorSize : (i+1)*sectorSize]
		s[0], s[1], s[2], s[3] = headerMagic0, headerMagic1, pageVersion, byte(id.kind)
		binary.LittleEndian.PutUint64(s[8:], gen)
		copy(s[sectorHeader:], p.payload[i*sectorPayload:(i+1)*sectorPayload])
		binary.LittleEndian.PutUint32(s[4:], id.sum(s, i))
	}
}

func (id pageID) sum(s []byte, sector int) uint32 {
	var tail [16]byte
	binary.LittleEndian.PutUint64(tail[:], uint64(id.pos))
	binary.LittleEndian.PutUint32(tail[8:], uint32(id.index))
	binary.LittleEndian.PutUint32(tail[12:], uint32(sector))
	sum := crc32.Update(0, castagnoli, s[:4])
	sum = crc32.Update(sum, castagnoli, s[8:sectorSize])
	return crc32.Update(sum, castagnoli, tail[:])
}

// slot is what the bytes of one slot turned out to be.
type slot struct {
	whole  bool   // all sectors good and of one generation
	bad    bool   // a sector that is neither good nor zero
	newest uint64 // the largest generation among the good sectors; 0 if there is none
}

// parseSlot judges one slot: a pure function of its bytes and of where they were found.
func parseSlot(b []byte, id pageID) (s slot) {
	oldest := ^uint64(0)
	for i := range sectorsPerPage {
		sec := b[i*sectorSize : (i+1)*sectorSize]
		gen := binary.LittleEndian.Uint64(sec[8:])
		switch {
		case allZero(sec):
			oldest = 0
		case sec[0] != headerMagic0 || sec[1] != headerMagic1 || sec[2] != pageVersion || sec[3] != byte(id.kind) ||
			gen == 0 || binary.LittleEndian.Uint32(sec[4:]) != id.sum(sec, i):
			s.bad = true
		default:
			oldest, s.newest = min(oldest, gen), max(s.newest, gen)
		}
	}
	s.whole = !s.bad && oldest == s.newest && s.newest != 0
	return s
}

// parsePage chooses between the two slots in b. With no whole slot and no bad one the page was never written, or its
// very first write was torn: then it says nothing. A bad slot is overlooked only if it is provably the older one.
func parsePage(b []byte, id pageID) *page {
	p := &page{}
	slots := [2]slot{parseSlot(b[:pageSize], id), parseSlot(b[pageSize:slotsSize], id)}
	best := -1
	for i, s := range slots {
		if s.whole && (best < 0 || s.newest > slots[best].newest) {
			best = i
		}
	}
	for i, s := range slots {
		older := best >= 0 && s.newest != 0 && s.newest < slots[best].newest
		if i != best && s.bad && !older {
			p.damaged = true
		}
	}
	if best < 0 {
		// Never reuse a generation that a torn first write may have left in some sectors.
		p.gen, p.slot = max(slots[0].newest, slots[1].newest), 1
		return p
	}
	p.take(b, best, slots[best].newest)
	// The other slot may hold sectors of a torn, newer generation: the next one must be newer than that.
	p.gen = max(p.gen, slots[1-best].newest)
	return p
}

// take copies slot i of b into p.
func (p *page) take(b []byte, i int, gen uint64) {
	p.gen, p.slot = gen, int64(i)
	for k := range sectorsPerPage {
		sec := b[i*pageSize+k*sectorSize:]
		copy(p.payload[k*sectorPayload:(k+1)*sectorPayload], sec[sectorHeader:sectorSize])
	}
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
