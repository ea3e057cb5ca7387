package fusefs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// mountDirect mounts with mount(2) and returns the connection's descriptor.
func mountDirect(mnt string, opt *Options, o *fuse.MountOptions) (fd int, err error) {
	fd, err = openDevice()
	if err != nil {
		return -1, err
	}
	if err := mountOn(fd, mnt, opt, o); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// mountOn mounts the connection of a descriptor of /dev/fuse.
func mountOn(fd int, mnt string, opt *Options, o *fuse.MountOptions) error {
	flags := opt.MountFlags
	if opt.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	data := []string{
		fmt.Sprintf("fd=%d", fd),
		"rootmode=40000",
		fmt.Sprintf("user_id=%d,group_id=%d", os.Geteuid(), os.Getegid()),
		"default_permissions",
		fmt.Sprintf("max_read=%d", o.MaxWrite),
	}
	if opt.AllowOther {
		data = append(data, "allow_other")
	}
	data = append(data, opt.Contexts...)
	if err := unix.Mount(opt.FSName, mnt, "fuse."+o.Name, flags, strings.Join(data, ",")); err != nil {
		if errors.Is(err, unix.EINVAL) && len(opt.Contexts) > 0 {
			return fmt.Errorf("mount point %s: %w: does this kernel's security module know %s?", mnt, err, strings.Join(opt.Contexts, ","))
		}
		return fmt.Errorf("mount point %s: %w", mnt, err)
	}
	return nil
}

// fuseDevice is /dev/fuse's number, 10:229 in the kernel's list of devices.
var fuseDevice = unix.Mkdev(10, 229)

// openDevice opens /dev/fuse, and makes sure that it is: a container may have something else in its place, and mount(2)
// would only say EINVAL.
func openDevice() (int, error) {
	const path, remedy = "/dev/fuse", "load the kernel module fuse, or give the container the device"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("%s: %w: %s", path, err, remedy)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != fuseDevice) {
		err = fmt.Errorf("not the FUSE device: %s", remedy)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("%s: %w", path, err)
	}
	return fd, nil
}

// mountByHelper has fusermount3 mount, which may, and returns the connection's descriptor, which it sends through a socket
// (fusermount3(1): _FUSE_COMMFD).
func mountByHelper(mnt string, opt *Options, o *fuse.MountOptions) (int, error) {
	flags, err := helperFlags(opt.MountFlags)
	if err != nil {
		return -1, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount3"), os.NewFile(uintptr(pair[1]), "fusermount3")
	defer ours.Close()
	opts := append([]string{"subtype=" + o.Name, "fsname=" + escapeOption(o.FsName), fmt.Sprintf("max_read=%d", o.MaxWrite)}, o.Options...)
	if o.AllowOther {
		opts = append(opts, "allow_other")
	}
	opts = append(opts, flags...)
	cmd := helperCommand(mnt, "-o", strings.Join(opts, ","))
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	err = runHelper(cmd)
	theirs.Close()
	if err != nil {
		return -1, fmt.Errorf("mount point %s: %w", mnt, err)
	}
	fd, err := receiveDescriptor(pair[0])
	if err != nil {
		return -1, fmt.Errorf("mount point %s: fusermount3 sent no descriptor: %w", mnt, err)
	}
	return fd, nil
}

// helperFlags names MS_* flags for fusermount3, which refuses by name those that it does not know.
func helperFlags(flags uintptr) (options []string, err error) {
	// Read-only is an option already, nosuid and nodev are the helper's doing, relatime is the kernel's default, and a silent
	// mount differs in what the kernel logs.
	flags &^= unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_RELATIME | unix.MS_SILENT
	for _, f := range []struct {
		bit  uintptr
		name string
	}{
		{unix.MS_NOEXEC, "noexec"}, {unix.MS_SYNCHRONOUS, "sync"}, {unix.MS_DIRSYNC, "dirsync"}, {unix.MS_NOATIME, "noatime"},
		{unix.MS_NODIRATIME, "nodiratime"}, {unix.MS_STRICTATIME, "strictatime"}, {unix.MS_LAZYTIME, "lazytime"},
	} {
		if flags&f.bit != 0 {
			options = append(options, f.name)
			flags &^= f.bit
		}
	}
	if flags != 0 {
		return nil, fmt.Errorf("mount flags %#x: need a privileged mount", flags)
	}
	return options, nil
}

// escapeOption keeps a comma from ending the option that it is in.
func escapeOption(v string) string {
	return strings.NewReplacer(`\`, `\\`, ",", `\,`).Replace(v)
}

// receiveDescriptor takes one descriptor from a socket.
func receiveDescriptor(socket int) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 8), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return -1, err
	}
	if len(messages) != 1 {
		return -1, unix.EPROTO
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	if len(fds) != 1 {
		return -1, unix.EPROTO
	}
	return fds[0], nil
}

func helperCommand(mnt string, args ...string) *exec.Cmd {
	name := "fusermount3"
	if _, err := exec.LookPath(name); err != nil {
		name = "fusermount" // of fuse 2: the same in what matters here
	}
	return exec.Command(name, append(args, "--", mnt)...)
}

// helper has fusermount3 do something with a mount.
func helper(mnt string, args ...string) error { return runHelper(helperCommand(mnt, args...)) }

// runHelper puts what the helper says into the error.
func runHelper(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("fusermount3 is needed to mount without privileges: install the package fuse3")
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
