// Package tcx attaches eBPF programs to interfaces by links that are pinned: they outlive the process, and another process
// replaces their programs without a gap.
package tcx

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Attach makes a program run at the interface with an index, behind those that are there, by a link pinned at file. If the
// link is there already its program is replaced, in place. A file that is the link of an interface that has gone is removed;
// with create unset that is all.
func Attach(file string, index int, program *ebpf.Program, where ebpf.AttachType, create bool) error {
	if l, err := link.LoadPinnedLink(file, nil); err == nil {
		defer l.Close()
		if linkedTo(l) == index {
			if err := l.Update(program); err != nil {
				return fmt.Errorf("replacing the program at interface %d: %w", index, err)
			}
			return nil
		}
		if err := os.Remove(file); err != nil {
			return err
		}
	}
	if !create {
		return nil
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: program, Attach: where})
	if err != nil {
		return fmt.Errorf("attaching to interface %d: %w", index, err)
	}
	defer l.Close()
	if err := l.Pin(file); err != nil {
		return fmt.Errorf("pinning the link of interface %d: %w", index, err)
	}
	return nil
}

// LinkedTo is the interface of the link that is pinned at file; 0 if there is none, or its interface has gone.
func LinkedTo(file string) int {
	l, err := link.LoadPinnedLink(file, nil)
	if err != nil {
		return 0
	}
	defer l.Close()
	return linkedTo(l)
}

func linkedTo(l link.Link) int {
	info, err := l.Info()
	if err != nil || info.TCX() == nil {
		return 0
	}
	return int(info.TCX().Ifindex)
}

// Detach takes a program off its interface at once, whoever else holds the link. That there is none is no error.
func Detach(file string) error {
	l, err := link.LoadPinnedLink(file, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	if d, ok := l.(interface{ Detach() error }); ok {
		_ = d.Detach() // fails if the interface is gone
	}
	return os.Remove(file)
}
