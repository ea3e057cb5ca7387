package probe

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ForbidRings has every thread of the process, and of what it becomes, get EPERM from io_uring_setup(2) for ever, as the
// seccomp profiles of container engines do.
func ForbidRings() error {
	const (
		load, jumpIfEqual, answer = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
		allow, refuse             = 0x7fff0000, 0x00050000 | uint32(unix.EPERM)
	)
	filter := []unix.SockFilter{
		{Code: load, K: 0}, // the system call's number
		{Code: jumpIfEqual, Jt: 0, Jf: 1, K: unix.SYS_IO_URING_SETUP},
		{Code: answer, K: refuse},
		{Code: answer, K: allow},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}
