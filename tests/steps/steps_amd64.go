// Package steps runs a program under ptrace(2) up to one of its steps, and kills it there.
package steps

import (
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Run starts cmd, whose main thread stops itself (SIGSTOP) where the counting is to begin, and kills it (SIGKILL) in front of
// step n, counted from 1; -1 lets it run to its end. A step is a system call of the main thread that is one. It returns how
// many steps were begun.
func Run(t *testing.T, cmd *exec.Cmd, n int, isStep func(*unix.PtraceRegs) bool) int {
	t.Helper()
	runtime.LockOSThread() // ptrace requests come from the thread that traces
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Release()
	return trace(t, cmd.Process.Pid, n, isStep)
}

// trace follows the main thread of a process from its stop on, to its end or to step limit.
func trace(t *testing.T, pid, limit int, isStep func(*unix.PtraceRegs) bool) (count int) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	counting, inside := false, false
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(pid, &ws, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		must(err)
		if ws.Exited() && ws.ExitStatus() != 0 {
			t.Errorf("the operation failed: exit status %d", ws.ExitStatus())
		}
		if ws.Exited() || ws.Signaled() {
			return count
		}
		signal := 0
		switch stop := ws.StopSignal(); {
		case stop == unix.SIGTRAP && !counting: // the program was executed
			must(unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_EXITKILL))
		case stop == unix.SIGSTOP:
			counting = true
		case stop == unix.SIGTRAP|0x80:
			if inside = !inside; inside {
				var regs unix.PtraceRegs
				must(unix.PtraceGetRegs(pid, &regs))
				if isStep(&regs) {
					count++
				}
			}
		default:
			signal = int(stop)
		}
		switch {
		case inside && count == limit:
			must(unix.Kill(pid, unix.SIGKILL)) // in front of a system call, which is then not made
		case counting:
			must(unix.PtraceSyscall(pid, signal))
		default:
			must(unix.PtraceCont(pid, signal))
		}
	}
}
