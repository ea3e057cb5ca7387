// Command lamina mounts block-accessible overlay filesystems and looks after them.
package main

import (
	"os"
	"runtime"

	"lamina/cmd/lamina/cli"
)

// The first thread does nothing but wait. The kernel gives it the signals of the process (complete_signal in
// kernel/signal.c) and wakes no other: while it sat in a write that does not end, on a frozen or failing disk, a server
// would not hear SIGTERM.
func init() { runtime.LockOSThread() }

func main() {
	_ = os.WriteFile("/proc/self/comm", []byte("lamina"), 0) // or ps and systemd call those that we start ourselves "exe"
	status := make(chan int)
	go func() { status <- cli.Main(os.Args) }()
	os.Exit(<-status)
}
