package block

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Each way in which a sketch can be unusable has its own error. All of them are EIO to an application:
// errors.Is(err, unix.EIO) holds, so one mapping at the edge is enough.
var (
	// ErrInvalid: the header is not one, or says something impossible.
	ErrInvalid error = &corruption{"not a valid sketch header"}
	// ErrVersion: a valid header of a version, format or flag that this program does not know.
	ErrVersion error = &corruption{"sketch of an unknown version"}
	// ErrChecksum: the header's checksum does not match its bytes.
	ErrChecksum error = &corruption{"sketch header with a bad checksum"}
	// ErrDamaged: a part of the block table is unreadable; blocks outside that part are not concerned.
	ErrDamaged error = &corruption{"damaged block table"}
	// ErrLowerChanged: the lower file is not the one that the sketch was made from.
	ErrLowerChanged error = &corruption{"lower file changed under its sketch"}
)

type corruption struct{ what string }

func (c *corruption) Error() string { return c.what }

// Unwrap makes every corruption an EIO.
func (c *corruption) Unwrap() error { return unix.EIO }

// damagedError names the blocks that a damaged piece of the table speaks for.
type damagedError struct {
	first, last int64 // blocks, inclusive
	why         string
}

func (d *damagedError) Error() string {
	return fmt.Sprintf("%v: %s: blocks %d to %d cannot be read (lamina fsck --repair gives them back to the lower file)",
		ErrDamaged, d.why, d.first, d.last)
}

func (d *damagedError) Unwrap() error { return ErrDamaged }
