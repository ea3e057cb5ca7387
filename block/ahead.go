package block

// A log that lies in a lower file, a database's above all, is written from front to back and synced after every few bytes.
// A block that is new costs such a sync twice: first its bytes have to be on disk, then the table. So where a file goes on
// like that, the blocks that come next are brought up together with the new one. The syncs that follow find them in the
// table, and cost what they cost in an ordinary file.

const (
	// logSyncs is how many syncs in a row have to go on where the one before ended, until a file is taken for a log.
	logSyncs = 4
	// aheadBytes are brought up before they are written. It is the most that is copied for nothing.
	aheadBytes = 256 << 10
)

// bringAhead looks whether the file goes on as a log does, and if so brings up what it will write next. Where that fails,
// because there is no space or the lower file cannot be read, the blocks stay Lower: whoever needs them meets the error.
// The caller holds commitMu.
func (f *File) bringAhead() {
	if f.format != Sparse || f.plain.Load() || f.readOnly {
		return
	}
	_ = f.completeAll() // the commit that follows tries again what fails here, and tells
	at, found := f.goesOn()
	if !found {
		return
	}
	if f.logSyncs++; f.logSyncs < logSyncs {
		return
	}
	_ = f.bringUp(at, at+aheadBytes)
}

// goesOn finds blocks that are Upper without the table knowing, right behind one that it knows, and returns where they
// end.
func (f *File) goesOn() (at int64, found bool) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	for n, p := range f.dir.all() {
		r := p.Load()
		if !r.dirty.Load() {
			continue
		}
		page, err := f.tab.page(f.s, n/regionsPerPage)
		if err != nil || page.damaged {
			return 0, false // the commit will tell
		}
		first := n % regionsPerPage * regionBlocks
		for i := int64(1); i < regionBlocks; i++ {
			if r.state(i) == stateUpper && !page.bit(first+i) && page.bit(first+i-1) {
				return (n*regionBlocks + r.runEnd(i, regionBlocks, stateUpper)) << f.shift, true
			}
		}
	}
	return 0, false
}
