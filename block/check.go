package block

import (
	"errors"
	"fmt"
)

// Finding is one thing that Check found wrong.
type Finding struct {
	Block    int64 // the first block concerned; -1: the file as a whole
	What     string
	Repaired bool
}

// Check examines one sketch: header, table, lower file's identity. A nil lower leaves the lower file out of it. An
// ordinary file has nothing to find. With repair the damaged parts of the table are withdrawn, which gives their blocks
// back to the lower file (or to the older valid copy of the table, if there is one), and what a power cut interrupted is
// finished, as opening the file for writing does. err is for what kept Check from looking. It owns s.
func Check(s Store, lower func() (Lower, error), repair bool) ([]Finding, error) {
	c := checker{repair: repair}
	f, err := readers.openFile(s, lower, !repair)
	if err != nil {
		s.Close()
		if errors.Is(err, ErrInvalid) || errors.Is(err, ErrVersion) || errors.Is(err, ErrChecksum) {
			return []Finding{{Block: -1, What: err.Error()}}, nil
		}
		return nil, err
	}
	c.f = f
	err = c.run()
	return c.found, errors.Join(err, f.Abandon())
}

type checker struct {
	f      *File
	repair bool
	found  []Finding
	fixed  bool    // something was repaired in memory and has to be written
	rotten []int64 // pages whose older slot has to be emptied then
}

func (c *checker) find(block int64, format string, args ...any) {
	c.found = append(c.found, Finding{block, fmt.Sprintf(format, args...), c.repair && block >= 0})
	c.fixed = c.fixed || c.repair && block >= 0
}

func (c *checker) run() error {
	f := c.f
	if f.plain.Load() || f.hdr.Complete {
		return nil
	}
	if f.limit > 0 && f.open != nil {
		if _, err := f.lowerFor(); err != nil {
			c.find(-1, "lower file: %v", err)
		}
	}
	if err := c.pages(); err != nil {
		return err
	}
	if f.format != Sparse {
		if err := c.places(); err != nil {
			return err
		}
	}
	if !c.fixed {
		return nil
	}
	return c.write()
}

// pages looks at every page of the table.
func (c *checker) pages() error {
	f := c.f
	per := int64(bitsPerPage)
	if f.format != Sparse {
		per = entriesPerPage(f.format)
	}
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	for i := int64(0); ; i++ {
		var err error
		if i, err = f.tab.nextPage(f.s, i); err != nil {
			return err
		}
		if i >= f.tab.npages {
			return nil
		}
		p, err := f.tab.page(f.s, i)
		if err != nil {
			return err
		}
		if p.damaged {
			c.find(i*per, "table page %d of blocks %d to %d is damaged", i, i*per, (i+1)*per-1)
			if c.repair {
				p.damaged, p.dirty = false, true
				c.rotten = append(c.rotten, i)
			}
		}
	}
}

// places looks at where a bcow table says that blocks lie: inside the file, outside the table, and no two at one place.
func (c *checker) places() error {
	f := c.f
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	used := make(map[uint32]int64)
	for page, p := range f.tab.pages { // those that pages found to say something
		if p.damaged {
			continue
		}
		for i := range int64(wordsPerPage) {
			var err error
			if f.format == BCoW {
				err = c.leafPlaces(page*wordsPerPage+i, used)
			} else {
				err = c.place(page*wordsPerPage+i, used)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) leafPlaces(index int64, used map[uint32]int64) error {
	p, err := c.f.tab.page(c.f.s, index/wordsPerPage)
	if err != nil || p.word(index%wordsPerPage) == 0 {
		return err
	}
	l, err := c.f.leaf(index)
	if err != nil {
		return err
	}
	if l.damaged {
		c.find(index*leafEntries, "leaf of blocks %d to %d is damaged", index*leafEntries, (index+1)*leafEntries-1)
		if c.repair { // withdrawn from the level above: its place is not used again
			p.setWord(index%wordsPerPage, 0)
			p.dirty = true
		}
		return nil
	}
	for b := index * leafEntries; b < (index+1)*leafEntries; b++ {
		if err := c.place(b, used); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) place(b int64, used map[uint32]int64) error {
	phys, damaged, err := c.f.entry(b)
	if err != nil || phys == physNone || phys == physZero {
		return err
	}
	other, twice := used[phys]
	switch {
	case damaged:
		c.find(b, "block %d lies at %d, outside the file's data", b, phys)
	case twice:
		c.find(b, "block %d lies at %d, where block %d lies", b, phys, other)
	default:
		used[phys] = b
		return nil
	}
	if !c.repair {
		return nil
	}
	return c.f.setEntry(b, physNone)
}

// write puts the repaired table on disk.
func (c *checker) write() error {
	f := c.f
	err := f.quietly(func() error {
		if _, err := f.flushLeaves(); err != nil {
			return err
		}
		_, err := f.tab.flush(f.s)
		return err
	})
	if err := errors.Join(err, f.s.Sync()); err != nil || len(c.rotten) == 0 {
		return err
	}
	err = f.quietly(func() error {
		for _, i := range c.rotten {
			other := f.tab.pos + i*slotsSize + (1-f.tab.pages[i].slot)*pageSize
			if _, err := f.s.WriteAt(make([]byte, pageSize), other); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(err, f.s.Sync())
}
