package uring

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// parameter switches FUSE over io_uring on for connections made from then on (fs/fuse/dev_uring.c).
const parameter = "/sys/module/fuse/parameters/enable_uring"

// Enable makes the kernel offer FUSE over io_uring, which is off by default, to filesystems mounted from now on. It needs
// the right to write the fuse module's parameter. The error wraps ErrNotSupported and says what is missing.
func Enable() error {
	v, err := os.ReadFile(parameter)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the kernel's fuse has no parameter enable_uring: Linux 6.14 with CONFIG_FUSE_IO_URING has it", ErrNotSupported)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	if strings.TrimSpace(string(v)) == "Y" {
		return nil
	}
	if err := os.WriteFile(parameter, []byte("Y"), 0); err != nil {
		return fmt.Errorf("%w: it is switched off and may not be switched on from here (%w): as root on the host, echo Y > %s", ErrNotSupported, err, parameter)
	}
	return nil
}
