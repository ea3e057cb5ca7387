package oracle

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// asUser runs f with the filesystem identity of uid, and so without root's powers over files unless uid is 0.
// The identity belongs to the thread: f must not start goroutines that act on files.
func asUser(uid int, f func()) {
	if uid == 0 {
		f()
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// setfsuid reports no errors; the kernel drops and restores the file capabilities with it.
	_ = unix.Setfsgid(uid)
	_ = unix.Setfsuid(uid)
	defer func() {
		_ = unix.Setfsuid(0)
		_ = unix.Setfsgid(0)
	}()
	f()
}
