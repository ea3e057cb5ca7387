package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"

	"lamina/net/whole"
)

// Dir is a directory of policy files: every *.yaml and *.yml in it, not below it. A file whose name begins with "." is
// not read (editors and Kubernetes' ConfigMap volumes use such names for what is not ready).
type Dir struct {
	path string
	keep string // copies of files as they were when they last parsed
	good map[string]loaded
}

// loaded is a file as it was when it last parsed.
type loaded struct {
	data     []byte
	policies []*networkingv1.NetworkPolicy
}

// NewDir makes a Dir of the directory path, which need not exist yet. keep is a directory for copies of what has parsed
// (made if missing, mode 0700), so that a file that is broken when the agent starts still has the policy it had; empty:
// nothing outlives the agent.
func NewDir(path, keep string) (*Dir, error) {
	if keep != "" {
		if err := os.MkdirAll(keep, 0o700); err != nil {
			return nil, fmt.Errorf("directory for policies in force: %w: give another with --state-dir", err)
		}
	}
	return &Dir{path: path, keep: keep, good: map[string]loaded{}}, nil
}

// Load reads the directory. What it returns is always to be enforced: a file with an error counts as it was before the
// error, and the error tells of it. A policy that two files hold is an error of the later name.
func (d *Dir) Load() ([]*networkingv1.NetworkPolicy, error) {
	names, err := d.names()
	if err != nil {
		// Nothing is known of any file: all stay as they were.
		for _, name := range d.copies() {
			d.restore(name)
		}
		var twice error
		out := d.merge(&twice)
		return out, errors.Join(err, twice)
	}
	var errs []error
	for _, name := range names {
		if err := d.read(name); err != nil {
			errs = append(errs, err)
		}
	}
	for _, name := range sorted(d.good) {
		if !slices.Contains(names, name) {
			delete(d.good, name)
		}
	}
	if err := d.dropCopies(names); err != nil {
		errs = append(errs, err)
	}
	var twice error
	out := d.merge(&twice)
	return out, errors.Join(append(errs, twice)...)
}

// names lists the policy files. A directory that is missing has none; one that was there before and is gone is an error.
func (d *Dir) names() ([]string, error) {
	entries, err := os.ReadDir(d.path)
	if errors.Is(err, fs.ErrNotExist) && len(d.good) == 0 && len(d.copies()) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("policies: %w: the policies that were in it stay in force; put it back, or make an empty one to have none", err)
	}
	var out []string
	for _, e := range entries {
		if isPolicyFile(e.Name()) && !e.IsDir() {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

func isPolicyFile(name string) bool {
	ext := filepath.Ext(name)
	return (ext == ".yaml" || ext == ".yml") && !strings.HasPrefix(name, ".")
}

// copies names the files of which there is a copy.
func (d *Dir) copies() (out []string) {
	if d.keep == "" {
		return nil
	}
	entries, _ := os.ReadDir(d.keep) // what cannot be read is not there; writing a copy reports it
	for _, e := range entries {
		if isPolicyFile(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out
}

// restore takes a file's policies from its copy, unless they are known.
func (d *Dir) restore(name string) {
	if _, ok := d.good[name]; ok || d.keep == "" {
		return
	}
	data, err := os.ReadFile(filepath.Join(d.keep, name))
	if err != nil {
		return
	}
	if ps, err := Parse(filepath.Join(d.path, name), data); err == nil {
		d.good[name] = loaded{data, ps}
	}
}

// read takes one file's policies, or keeps those it had.
func (d *Dir) read(name string) error {
	path := filepath.Join(d.path, name)
	data, err := os.ReadFile(path)
	if err != nil {
		d.restore(name)
		return &FileError{File: path, Object: "file", Problem: err.Error(), Remedy: "make it readable or remove it"}
	}
	if was, ok := d.good[name]; ok && bytes.Equal(was.data, data) {
		return d.copyOf(name, data) // again, if it did not succeed before
	}
	ps, err := Parse(path, data)
	if err == nil {
		d.good[name] = loaded{data, ps}
		return d.copyOf(name, data)
	}
	d.restore(name)
	return err
}

// copyOf keeps what has parsed.
func (d *Dir) copyOf(name string, data []byte) error {
	if d.keep == "" {
		return nil
	}
	path := filepath.Join(d.keep, name)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := whole.Write(path, data); err != nil {
		return fmt.Errorf("copy of policies in force: %w: they are in force, but not known to an agent that starts while the file is broken", err)
	}
	return nil
}

// dropCopies removes copies of files that are gone.
func (d *Dir) dropCopies(names []string) error {
	if d.keep == "" {
		return nil
	}
	entries, err := os.ReadDir(d.keep)
	if err != nil {
		return fmt.Errorf("policies in force: %w", err)
	}
	for _, e := range entries {
		if !slices.Contains(names, e.Name()) {
			err = errors.Join(err, os.Remove(filepath.Join(d.keep, e.Name())))
		}
	}
	return err
}

// merge joins the files' policies in order of their names.
func (d *Dir) merge(errp *error) []*networkingv1.NetworkPolicy {
	from := map[string]string{}
	byKey := map[string]*networkingv1.NetworkPolicy{}
	for _, name := range sorted(d.good) {
		for _, p := range d.good[name].policies {
			if first, ok := from[key(p)]; ok {
				*errp = errors.Join(*errp, &FileError{filepath.Join(d.path, name), key(p), "metadata.name",
					"is in " + first + " already, which counts", "rename or remove one of the two"})
				continue
			}
			from[key(p)], byKey[key(p)] = filepath.Join(d.path, name), p
		}
	}
	out := make([]*networkingv1.NetworkPolicy, 0, len(byKey))
	for _, k := range slices.Sorted(maps.Keys(byKey)) {
		out = append(out, byKey[k])
	}
	return out
}
