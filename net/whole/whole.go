// Package whole replaces files as a whole: whoever reads one, also after a power cut, finds what it was or what it is.
package whole

import (
	"errors"
	"os"
	"path/filepath"
)

// Write replaces a file by one with these bytes, which is synced, with mode 0600. Its directory must exist.
func Write(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
