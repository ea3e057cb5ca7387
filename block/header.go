package block

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/bits"
)

// The header of a sketch, as docs/format.md gives it:
//
//	0  u8  'L'     overlayfs's ovl_metacopy.version: anything but 0 makes kernel overlayfs refuse the file
//	1  u8  'm'
//	2  u8  1       version of this format
//	3  u8  format
//	4  u8  flags
//	5  u8  block shift
//	6  u32 crc32c of the header with these four bytes zero
//	10     uvarint lower size, varint lower mtime, u64 lower filesystem, uvarint lower inode,
//	       [uvarint limit] [uvarint size] [uvarint table position / 4096, uvarint table pages] [addendum]
//
// All integers are little-endian. Optional fields are present if their flag is set.
const (
	headerMagic0  = 'L'
	headerMagic1  = 'm'
	headerVersion = 1
	headerFixed   = 10
	headerMax     = headerFixed + 8*binary.MaxVarintLen64 + maxAddendum

	flagLimit    = 1 << 0 // the lower limit differs from the lower size
	flagSize     = 1 << 1 // the logical size is in the header; otherwise it is the upper file's st_size
	flagTable    = 1 << 2
	flagComplete = 1 << 3 // the upper file holds everything at its natural place; cut it to size and drop the header
	flagAddendum = 1 << 4 // the rest of the header names blocks that are Upper though the table does not say so
	flagsKnown   = flagLimit | flagSize | flagTable | flagComplete | flagAddendum

	minBlockShift = 12
	maxBlockShift = 20
	// maxBlocks bounds a sketch's length: 64 TiB of 4 KiB blocks. Larger files have to be copied.
	maxBlocks = 1 << 34
)

// naturalSize is Header.Size when the header leaves the size to the upper file's st_size.
const naturalSize = -1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Header is the parsed header attribute of a sketch.
type Header struct {
	// Kernel: not Lamina's header but kernel overlayfs's own metacopy attribute. The sketch holds no block, does not
	// know its lower file's identity, and is as long as the upper file's st_size. Nothing else is set but the Format.
	Kernel    bool
	Format    Format
	BlockSize int
	Ident     Ident
	// Limit: how many bytes of the lower file are still visible. Truncation lowers it for ever.
	Limit int64
	// Size: the logical size, or -1 when the upper file's st_size says it. See LogicalSize.
	Size int64
	// Complete: every byte lies in the upper file at its natural place (a crash interrupted the completion).
	Complete bool
	// TablePos is where the block table lies in the upper file, in bytes; TablePages how many pages it has. 0 pages: no table.
	TablePos   int64
	TablePages int64
	// Addendum: encoded ranges of blocks that are Upper whatever the table says (encodeRanges).
	Addendum string
}

// LogicalSize is the size that stat of the sketch shows, given the upper file's st_size. The lower file is visible up to
// the limit whatever became of st_size: btrfs may bring name and attributes of a new file to the disk with the sync of
// another file, but not yet its size (fs/btrfs/tree-log.c, LOG_INODE_EXISTS).
func (h *Header) LogicalSize(stSize int64) int64 {
	if h.Size == naturalSize {
		return max(stSize, h.Limit)
	}
	return h.Size
}

// IsKernelMetacopy says whether a header attribute is kernel overlayfs's own (fs/overlayfs/overlayfs.h, struct
// ovl_metacopy): empty, or of version 0.
func IsKernelMetacopy(b []byte) bool { return len(b) == 0 || b[0] == 0 }

// ParseHeader reads a header attribute. It fails with ErrInvalid, ErrVersion or ErrChecksum.
func ParseHeader(b []byte) (Header, error) {
	if IsKernelMetacopy(b) {
		return Header{Kernel: true, Format: Sparse, BlockSize: defaultBlockSize, Size: naturalSize}, nil
	}
	if len(b) < headerFixed || len(b) > headerMax || b[0] != headerMagic0 || b[1] != headerMagic1 {
		return Header{}, fmt.Errorf("%w: %d bytes without the magic", ErrInvalid, len(b))
	}
	if b[2] != headerVersion {
		return Header{}, fmt.Errorf("%w: header version %d; this program knows %d", ErrVersion, b[2], headerVersion)
	}
	if headerSum(b) != binary.LittleEndian.Uint32(b[6:]) {
		return Header{}, ErrChecksum
	}
	flags := b[4]
	if flags&^flagsKnown != 0 {
		return Header{}, fmt.Errorf("%w: unknown flags %#x", ErrVersion, flags)
	}
	if b[5] < minBlockShift || b[5] > maxBlockShift {
		return Header{}, fmt.Errorf("%w: block shift %d", ErrInvalid, b[5])
	}
	h := Header{Format: Format(b[3]), BlockSize: 1 << b[5], Complete: flags&flagComplete != 0, Size: naturalSize}
	p := cursor{b: b[headerFixed:]}
	h.Ident.Size = p.length()
	h.Ident.MtimeNS = p.varint()
	h.Ident.FS = p.fixed64()
	h.Ident.Ino = p.uvarint()
	h.Limit = h.Ident.Size
	if flags&flagLimit != 0 {
		h.Limit = p.length()
	}
	if flags&flagSize != 0 {
		h.Size = p.length()
	}
	if flags&flagTable != 0 {
		h.TablePos = p.pages()
		h.TablePages = p.length()
	}
	if flags&flagAddendum != 0 && !p.bad {
		h.Addendum, p.b = string(p.b), nil
	}
	if p.bad || len(p.b) != 0 || flags&flagAddendum != 0 && h.Addendum == "" {
		return Header{}, fmt.Errorf("%w: malformed fields", ErrInvalid)
	}
	if err := h.validate(); err != nil {
		return Header{}, err
	}
	return h, nil
}

// validate refuses what no writer ever writes, so that nothing behind the parser has to think of overflow.
func (h *Header) validate() error {
	maxBytes := int64(maxBlocks) * int64(h.BlockSize)
	switch {
	case h.Format != Sparse && h.Format != BCoW && h.Format != BCoWSingle:
		return fmt.Errorf("%w: format %d", ErrVersion, h.Format)
	case h.Format == BCoW && h.BlockSize != defaultBlockSize:
		return fmt.Errorf("%w: two-level bcow with blocks of %d bytes", ErrInvalid, h.BlockSize)
	case h.Ident.Size > maxBytes || h.Limit > h.Ident.Size || h.Size > maxBytes:
		return fmt.Errorf("%w: lower size %d, limit %d, size %d", ErrInvalid, h.Ident.Size, h.Limit, h.Size)
	case h.Format != Sparse && h.Size == naturalSize:
		return fmt.Errorf("%w: bcow without a size", ErrInvalid)
	case h.Complete && h.Format != Sparse && h.Size != 0:
		return fmt.Errorf("%w: bcow complete in place", ErrInvalid)
	case h.TablePages > maxTablePages || h.TablePos > maxBytes*2:
		return fmt.Errorf("%w: table of %d pages at %d", ErrInvalid, h.TablePages, h.TablePos)
	}
	if h.Addendum != "" {
		_, ok := parseRanges(h.Addendum, ceilDiv(h.Ident.Size, int64(h.BlockSize)))
		if !ok || len(h.Addendum) > maxAddendum || h.Format != Sparse || h.Complete {
			return fmt.Errorf("%w: addendum of %d bytes", ErrInvalid, len(h.Addendum))
		}
	}
	if h.TablePages == 0 {
		if h.Format != Sparse && !h.Complete {
			return fmt.Errorf("%w: bcow without a table", ErrInvalid)
		}
		return nil
	}
	if h.Format == Sparse {
		blocks := ceilDiv(h.Limit, int64(h.BlockSize))
		switch {
		case h.Size == naturalSize:
			return fmt.Errorf("%w: a table but no size", ErrInvalid)
		case h.TablePos < h.Size || h.TablePos < h.Limit:
			return fmt.Errorf("%w: table at %d inside the data", ErrInvalid, h.TablePos)
		case h.TablePages < ceilDiv(blocks, bitsPerPage):
			return fmt.Errorf("%w: %d pages for %d blocks", ErrInvalid, h.TablePages, blocks)
		}
		return nil
	}
	if blocks := ceilDiv(h.Size, int64(h.BlockSize)); h.TablePages*entriesPerPage(h.Format) < blocks {
		return fmt.Errorf("%w: %d pages for %d blocks", ErrInvalid, h.TablePages, blocks)
	}
	return nil
}

// encode is ParseHeader's inverse.
func (h *Header) encode() []byte {
	b := make([]byte, headerFixed, headerMax)
	b[0], b[1], b[2], b[3] = headerMagic0, headerMagic1, headerVersion, byte(h.Format)
	b[5] = byte(bits.TrailingZeros(uint(h.BlockSize)))
	b = binary.AppendUvarint(b, uint64(h.Ident.Size))
	b = binary.AppendVarint(b, h.Ident.MtimeNS)
	b = binary.LittleEndian.AppendUint64(b, h.Ident.FS)
	b = binary.AppendUvarint(b, h.Ident.Ino)
	if h.Limit != h.Ident.Size {
		b[4] |= flagLimit
		b = binary.AppendUvarint(b, uint64(h.Limit))
	}
	if h.Size != naturalSize {
		b[4] |= flagSize
		b = binary.AppendUvarint(b, uint64(h.Size))
	}
	if h.TablePages != 0 {
		b[4] |= flagTable
		b = binary.AppendUvarint(b, uint64(h.TablePos/pageSize))
		b = binary.AppendUvarint(b, uint64(h.TablePages))
	}
	if h.Complete {
		b[4] |= flagComplete
	}
	if h.Addendum != "" {
		b[4] |= flagAddendum
		b = append(b, h.Addendum...)
	}
	binary.LittleEndian.PutUint32(b[6:], headerSum(b))
	return b
}

// headerSum is the crc32c of b with its checksum field taken as zero.
func headerSum(b []byte) uint32 {
	var zero [4]byte
	sum := crc32.Update(0, castagnoli, b[:6])
	sum = crc32.Update(sum, castagnoli, zero[:])
	return crc32.Update(sum, castagnoli, b[headerFixed:])
}

// Origin is what remains of the header when the sketch is complete: where the file came from, so that its inode number
// stays what it was. See ParseOrigin.
func (id Ident) Origin() []byte {
	b := []byte{headerMagic0, headerVersion}
	b = binary.LittleEndian.AppendUint64(b, id.FS)
	return binary.AppendUvarint(b, id.Ino)
}

// ParseOrigin reads what Ident.Origin wrote. It fails with ErrInvalid.
func ParseOrigin(b []byte) (fs, ino uint64, err error) {
	if len(b) < 2 || b[0] != headerMagic0 || b[1] != headerVersion {
		return 0, 0, fmt.Errorf("%w: origin", ErrInvalid)
	}
	p := cursor{b: b[2:]}
	fs, ino = p.fixed64(), p.uvarint()
	if p.bad || len(p.b) != 0 {
		return 0, 0, fmt.Errorf("%w: origin", ErrInvalid)
	}
	return fs, ino, nil
}

// cursor takes fields off a buffer; once one is malformed, bad stays set and everything reads as 0.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) advance(n int) bool {
	if n <= 0 || n > len(c.b) {
		c.bad, c.b = true, nil
		return false
	}
	c.b = c.b[n:]
	return true
}

func (c *cursor) uvarint() uint64 {
	v, n := binary.Uvarint(c.b)
	if !c.advance(n) {
		return 0
	}
	return v
}

func (c *cursor) varint() int64 {
	v, n := binary.Varint(c.b)
	if !c.advance(n) {
		return 0
	}
	return v
}

func (c *cursor) fixed64() uint64 {
	if len(c.b) < 8 {
		c.advance(0)
		return 0
	}
	v := binary.LittleEndian.Uint64(c.b)
	c.advance(8)
	return v
}

// length takes a byte count or position: anything that cannot be one is malformed.
func (c *cursor) length() int64 {
	v := c.uvarint()
	if v > 1<<62 {
		c.advance(0)
		return 0
	}
	return int64(v)
}

// pages takes a position that is counted in pages and gives it in bytes.
func (c *cursor) pages() int64 {
	v := c.uvarint()
	if v > 1<<62/pageSize {
		c.advance(0)
		return 0
	}
	return int64(v) * pageSize
}

// ceilDiv is a/b rounded up; it does not overflow for a near 2^63, as the length of a hostile file may be.
func ceilDiv(a, b int64) int64 {
	if a%b > 0 {
		return a/b + 1
	}
	return a / b
}

func roundUp(a, b int64) int64 { return ceilDiv(a, b) * b }
