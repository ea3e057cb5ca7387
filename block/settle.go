package block

import "time"

// waiting is a file that nobody has open any more and whose table is not known to be on disk.
type waiting struct {
	f  *File
	at time.Time
}

// Settle is called when the last descriptor of the file is closed. After Options.SettleDelay the engine completes the
// InTransit blocks, puts the table on disk, and calls done once, from its own goroutine; done decides whether to Close
// the File or to keep it, because it may have been opened again. If that fails (no space, lower file unreadable), the
// attempt is repeated after another delay, so that nothing written is lost; done is called when it has succeeded, or
// when the Engine is closed. A second Settle before done was called replaces done.
func (f *File) Settle(done func(*File)) {
	e := f.e
	e.mu.Lock()
	if e.closing {
		e.mu.Unlock()
		if err := f.commit(); err != nil {
			e.fail("settling the sketch of inode %d: %v", f.ino(), err)
		}
		done(f)
		return
	}
	queued := f.settling != nil
	f.settling = done
	if !queued {
		e.waiting = append(e.waiting, waiting{f, time.Now().Add(e.opts.SettleDelay)})
	}
	e.mu.Unlock()
	e.nudge()
}

// nudge wakes the settler.
func (e *Engine) nudge() {
	select {
	case e.settle <- struct{}{}:
	default:
	}
}

// settleLoop settles files when their time has come.
func (e *Engine) settleLoop() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		e.mu.Lock()
		closing, next := e.closing, time.Hour
		var f *File
		if len(e.waiting) > 0 {
			next = time.Until(e.waiting[0].at)
			if next <= 0 || len(e.waiting) > maxWaiting {
				f, e.waiting = e.waiting[0].f, e.waiting[1:]
			}
		}
		e.mu.Unlock()
		if closing {
			if f != nil {
				e.mu.Lock()
				e.waiting = append(e.waiting, waiting{f: f})
				e.mu.Unlock()
			}
			return
		}
		if f != nil {
			e.settleOne(f)
			continue
		}
		timer.Reset(next)
		select {
		case <-timer.C:
		case <-e.settle:
		}
	}
}

// settleOne settles f, or lets it wait again if that failed.
func (e *Engine) settleOne(f *File) {
	err := f.commit()
	if err == nil && e.opts.Fill == FillIdle && f.nearlyComplete() {
		err = f.Complete()
	}
	e.mu.Lock()
	if err != nil && !f.closed.Load() {
		e.waiting = append(e.waiting, waiting{f, time.Now().Add(e.opts.SettleDelay)})
		e.mu.Unlock()
		e.fail("settling the sketch of inode %d, tried again later: %v", f.ino(), err)
		return
	}
	done := f.settling
	f.settling = nil
	e.mu.Unlock()
	if done != nil {
		done(f)
	}
}

// settleRest settles whatever still waits when the engine closes.
func (e *Engine) settleRest() (first error) {
	for {
		e.mu.Lock()
		if len(e.waiting) == 0 {
			e.mu.Unlock()
			return first
		}
		f := e.waiting[0].f
		e.waiting = e.waiting[1:]
		done := f.settling
		f.settling = nil
		e.mu.Unlock()
		if err := f.commit(); err != nil && first == nil {
			first = err
		}
		if done != nil {
			done(f)
		}
	}
}

// fillRest: a file that holds fillRest times as many blocks as it lacks is worth completing when nobody uses it.
const fillRest = 8

// nearlyComplete says whether fill=idle should finish the file.
func (f *File) nearlyComplete() bool {
	lower, transit, upper := f.States()
	return f.Sketch() && upper > 0 && lower+transit <= upper/fillRest
}
