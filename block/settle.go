package block

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// waiting is a file that nobody has open any more and whose table is not known to be on disk.
type waiting struct {
	f     *File
	at    time.Time
	again bool // settling it has failed before
}

// Settle is called when the last descriptor of the file is closed. After Options.SettleDelay the engine completes the
// InTransit blocks, puts the table on disk, and calls done once, from its own goroutine; done decides whether to Close
// the File or to keep it, because it may have been opened again. If that fails (no space, lower file unreadable), the
// attempt is repeated after another delay, so that nothing written is lost; done is called when it has succeeded, or
// when the Engine is closed. A second Settle before done was called replaces done, and the delay begins again: who opens and
// closes a file for every write would otherwise have each of these delays end in a sync. What such a file holds is put on
// disk every Options.CommitInterval, as that of any open file.
func (f *File) Settle(done func(*File)) {
	e := f.e
	e.mu.Lock()
	if e.closing {
		e.mu.Unlock()
		_ = f.lastCommit() // which tells the operator; File.Close gives the error to whoever closes the file
		done(f)
		return
	}
	queued := f.settling != nil
	f.settling, f.settleAt = done, time.Now().Add(e.opts.SettleDelay)
	early := false // the settler sleeps longer than it may
	if !queued {
		e.waiting = append(e.waiting, waiting{f: f, at: f.settleAt})
		early = f.settleAt.Before(e.alarm) || len(e.waiting) > maxWaiting
	}
	e.mu.Unlock()
	if early {
		e.nudge()
	}
}

// nudge wakes the settler.
func (e *Engine) nudge() {
	select {
	case e.settle <- struct{}{}:
	default:
	}
}

// settleLoop settles files when their time has come, and commits the open ones every CommitInterval, one after another
// but for those that take long.
func (e *Engine) settleLoop() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var due []*File // whose turn to be committed has come
	commitAt := time.Now().Add(e.opts.CommitInterval)
	for {
		files, wait, closing := e.nextSettled(commitAt)
		switch untilCommit := time.Until(commitAt); {
		case closing:
			return
		case len(files) > 0:
			for _, f := range e.settleWholes(files) {
				e.patiently(f, e.settleOne)
			}
		case len(due) > 0:
			e.patiently(due[0], e.commitOpen)
			if due = due[1:]; len(due) == 0 {
				commitAt = time.Now().Add(e.opts.CommitInterval)
			}
		case untilCommit <= 0:
			due = e.openFiles()
			commitAt = time.Now().Add(e.opts.CommitInterval)
		default:
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-e.settle:
			}
		}
	}
}

// patience is how long other files wait for one whose lower layer is slow.
const patience = time.Second

// patiently puts f on disk, and waits for that, but not for ever: f may have to fetch blocks from a layer that answers
// slowly or not at all, and no other file depends on that.
func (e *Engine) patiently(f *File, work func(*File)) {
	if !f.Sketch() { // nothing to fetch
		work(f)
		return
	}
	done := make(chan struct{})
	e.wg.Go(func() {
		defer close(done)
		work(f)
	})
	select {
	case <-done:
	case <-time.After(patience):
	}
}

const (
	// maxSettled files are settled in one go.
	maxSettled = 1024
	// togetherPart: with a file whose time has come those are settled whose time comes within this part of the delay.
	togetherPart = 8
)

// nextSettled takes the files that have to be settled now off the list; if there is none, wait says how long that stays
// so, or until commitAt if that is sooner. Who puts a file on the list wakes the settler only if it would sleep too long:
// a wake-up costs more than the write before it.
func (e *Engine) nextSettled(commitAt time.Time) (files []*File, wait time.Duration, closing bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.alarm = commitAt
	if e.closing {
		return nil, 0, true
	}
	until, hurry := time.Now(), len(e.waiting) > maxWaiting
	if len(e.waiting) > 0 && !e.waiting[0].at.After(until) {
		until = until.Add(e.opts.SettleDelay / togetherPart)
	}
	for len(e.waiting) > 0 && len(files) < maxSettled {
		first := e.waiting[0]
		if first.at.After(until) && (first.again || !hurry) {
			break
		}
		e.waiting = e.waiting[1:]
		if later := first.f.settleAt; later.After(until) && !first.again && !hurry { // it was opened and closed since
			e.wait(waiting{f: first.f, at: later})
			continue
		}
		files = append(files, first.f)
	}
	if len(e.waiting) > 0 && e.waiting[0].at.Before(e.alarm) {
		e.alarm = e.waiting[0].at
	}
	return files, time.Until(e.alarm), false
}

// wait puts a file on the list where its time is. The caller holds mu.
func (e *Engine) wait(w waiting) {
	i, _ := slices.BinarySearchFunc(e.waiting, w.at, func(w waiting, at time.Time) int { return w.at.Compare(at) })
	e.waiting = slices.Insert(e.waiting, i, w)
}

// commitOpen commits a file that may be in use, so that a power cut costs it no more than CommitInterval.
func (e *Engine) commitOpen(f *File) {
	if !f.Sketch() || f.nameless.Load() || f.committing.Swap(true) {
		return // it is still at it
	}
	defer f.committing.Store(false)
	wrote, err := f.commitNew()
	if wrote {
		e.commits.Add(1)
	}
	f.report("committing", err)
	e.fillInUse(f)
}

// report tells the operator of a background failure, once until it changes or goes away: such work is tried again and
// again for as long as the file is open.
func (f *File) report(what string, err error) {
	text := ""
	if err != nil {
		f.e.errs.Add(1)
		text = err.Error()
	}
	if old := f.complaint.Swap(&text); err != nil && (old == nil || *old != text) {
		f.e.opts.Logf("%s the sketch of inode %d, tried again later: %v", what, f.ino(), err)
	}
}

// settleOne settles f, or lets it wait again if that failed.
func (e *Engine) settleOne(f *File) {
	if f.nameless.Load() {
		e.settled(f)
		return
	}
	err := f.commit()
	f.report("settling", err)
	if err != nil && !f.closed.Load() {
		e.mu.Lock()
		e.waiting = append(e.waiting, waiting{f, time.Now().Add(e.opts.SettleDelay), true})
		e.mu.Unlock()
		return
	}
	if e.opts.Fill == FillIdle && f.worthCompleting() {
		select {
		case e.fills <- f:
			return
		default: // enough others are being completed; it stays a sketch
		}
	}
	e.settled(f)
}

// settled calls what the last Settle of f asked for.
func (e *Engine) settled(f *File) {
	e.mu.Lock()
	done := f.settling
	f.settling = nil
	e.mu.Unlock()
	if done != nil {
		done(f)
	}
}

// fillLoop completes settled files, which may take long: no other file's table waits for that.
func (e *Engine) fillLoop() {
	for {
		select {
		case <-e.end:
			return
		case f := <-e.fills:
			if err := e.fill(f); err != nil { // nothing that was written hangs on it
				e.fail("completing the sketch of inode %d, which stays one: %v", f.ino(), err)
			}
			e.settled(f)
		}
	}
}

// fill completes f, unless the engine ends first.
func (e *Engine) fill(f *File) error {
	for off := int64(0); !e.ended(); {
		next, err := f.bringPiece(off, unbounded)
		if err != nil {
			return err
		}
		if next <= off {
			return f.Complete()
		}
		off = next
	}
	return nil
}

const (
	// hotSyncs that found new blocks are what makes a file in use worth completing before it is closed.
	hotSyncs = 16
	// restPart: of the time for which a file in use is being completed, one part in restPart is work, so that its users and
	// those of the disk come first.
	restPart = 4
	// roomPart of the filesystem stays free, whatever is completed in use.
	roomPart = 20
)

// fillInUse begins to complete f, which is open, if it is synced again and again, as a database is: once it is an ordinary
// file a sync of it is one of the filesystem's, with nothing to be told of. It completes one file at a time.
func (e *Engine) fillInUse(f *File) {
	if e.opts.Fill != FillIdle || f.syncs.Load() < hotSyncs || f.format != Sparse || !f.worthCompleting() || !f.hasRoom() || e.filling.Swap(true) {
		return
	}
	e.wg.Go(func() {
		defer e.filling.Store(false)
		if err := e.fillSlowly(f); !f.closed.Load() {
			f.report("completing", err)
		}
	})
}

// fillSlowly is fill for a file in use.
func (e *Engine) fillSlowly(f *File) error {
	for off := int64(0); !f.closed.Load() && !f.nameless.Load(); {
		began := time.Now()
		next, err := f.bringPiece(off, unbounded)
		if err != nil {
			return err
		}
		if next <= off {
			return f.Complete()
		}
		off = next
		select {
		case <-time.After(time.Since(began) * (restPart - 1)):
		case <-e.end:
			return nil
		}
	}
	return nil
}

// hasRoom says whether the filesystem has space for twice what f lacks, and a part of itself besides.
func (f *File) hasRoom() bool {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(f.s.FD(), &st) }); err != nil {
		return false
	}
	lower, transit, _ := f.States()
	return uint64((lower+transit)<<f.shift)*2/uint64(st.Bsize)+st.Blocks/roomPart < st.Bavail
}

// settleRest settles whatever still waits when the engine has ended.
func (e *Engine) settleRest() (first error) {
	e.mu.Lock()
	var files []*File
	for _, w := range e.waiting {
		files = append(files, w.f)
	}
	e.waiting = nil
	e.mu.Unlock()
	for len(e.fills) > 0 {
		files = append(files, <-e.fills)
	}
	if e.discard.Load() {
		for _, f := range files {
			e.settled(f)
		}
		return nil
	}
	for _, f := range e.settleWholes(files) {
		if err := f.lastCommit(); err != nil && first == nil {
			first = err
		}
		e.settled(f)
	}
	return first
}

// fillRest: a file that holds fillRest times as many blocks as it lacks is worth completing when nobody uses it.
const fillRest = 8

// worthCompleting says whether fill=idle should finish the file: it is nearly there, or hot, which is that at least as
// many bytes were written to it since it was opened as completing it would copy.
func (f *File) worthCompleting() bool {
	lower, transit, upper := f.States()
	rest := lower + transit
	near := upper > 0 && rest <= upper/fillRest
	hot := rest > 0 && f.written.Load() >= rest<<f.shift
	return f.Sketch() && (near || hot)
}

// lastCommit is commit when nothing can be tried later: what it cannot put on disk is named to the operator.
func (f *File) lastCommit() error {
	if f.nameless.Load() {
		return nil
	}
	err := f.commit()
	if err == nil {
		return nil
	}
	err = fmt.Errorf("sketch of inode %d: %w", f.ino(), err)
	if !f.mourned.Swap(true) {
		f.nameLosses(err)
	}
	return err
}

// maxLosses ranges of blocks are named, one line each.
const maxLosses = 16

// nameLosses logs the ranges of blocks that hold bytes which no reader will find again.
func (f *File) nameLosses(why error) {
	transit, untold := f.unsaved()
	for i, r := range append(transit, untold...) {
		if i == maxLosses {
			f.e.fail("%d more ranges of blocks: what was written to them since the last sync is lost", len(transit)+len(untold)-i)
			return
		}
		if i < len(transit) {
			f.e.fail("blocks %d to %d: what was written to them is lost, because the rest of each cannot be copied: %v", r.lo, r.hi, why)
		} else {
			f.e.fail("blocks %d to %d: what was written to them since the last sync is lost, because the table cannot be written: %v", r.lo, r.hi, why)
		}
	}
	if len(transit)+len(untold) == 0 {
		f.e.fail("what was written since the last sync may be lost: %v", why)
	}
}

// unsaved returns the InTransit blocks, and the blocks that some piece of the table on disk does not know.
func (f *File) unsaved() (transit, untold []blockRange) {
	f.shape.RLock()
	defer f.shape.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range slices.Sorted(maps.Keys(f.transit)) {
		if n := len(transit); n > 0 && transit[n-1].hi == b-1 {
			transit[n-1].hi = b
		} else {
			transit = append(transit, blockRange{b, b})
		}
	}
	if f.plain.Load() || f.closed.Load() {
		return transit, nil
	}
	f.tab.mu.Lock()
	defer f.tab.mu.Unlock()
	for n, p := range f.dir.all() {
		if p.Load().dirty.Load() {
			untold = append(untold, blockRange{n * regionBlocks, (n+1)*regionBlocks - 1})
		}
	}
	per := int64(bitsPerPage)
	if f.format != Sparse {
		per = entriesPerPage(f.format)
	}
	for i, p := range f.tab.pages {
		if p.dirty && f.untoldIn(i*per, (i+1)*per-1) {
			untold = append(untold, blockRange{i * per, (i+1)*per - 1})
		}
	}
	for i, l := range f.bcow.leaves {
		if l.dirty {
			untold = append(untold, blockRange{i * leafEntries, (i+1)*leafEntries - 1})
		}
	}
	slices.SortFunc(untold, func(a, b blockRange) int { return cmp.Compare(a.lo, b.lo) })
	return transit, untold
}

// untoldIn says whether one of the blocks lo to hi, of a page that is newer than the disk, is known to nothing on disk.
func (f *File) untoldIn(lo, hi int64) bool {
	return f.format != Sparse || slices.ContainsFunc(f.fresh, func(r blockRange) bool { return r.lo <= hi && r.hi >= lo })
}
