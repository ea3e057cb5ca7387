// Package ns runs code in a network namespace.
package ns

import (
	"fmt"
	"runtime"

	"github.com/vishvananda/netns"
)

// Do runs f in the network namespace h. A goroutine that f starts runs in whatever namespace its thread is in; sockets stay
// in the namespace they were made in.
func Do(h netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	before, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("own network namespace: %w", err)
	}
	defer before.Close()
	if err := netns.Set(h); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("entering a network namespace: %w", err)
	}
	// A thread that cannot come back stays locked, and ends with its goroutine.
	defer func() {
		if netns.Set(before) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}
