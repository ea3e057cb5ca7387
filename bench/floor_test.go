package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
	"lamina/bench/rival"
	"lamina/tests/probe"
)

// traceFS mounts the kernel's tracing files for the length of the test, wherever the machine has them.
func traceFS(t *testing.T) string {
	t.Helper()
	probe.FuseTrace.Need(t)
	dir := t.TempDir()
	if err := unix.Mount("lamina-bench", dir, "tracefs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// requests counts the FUSE requests that f causes on a mount, by their names. When the kernel forgets is its own affair.
func requests(t *testing.T, tracing, dir string, f func() error) (map[string]int, error) {
	t.Helper()
	trace := filepath.Join(tracing, fmt.Sprintf("instances/lamina-bench-%d", os.Getpid()))
	if err := os.Mkdir(trace, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err := os.Remove(trace); err != nil { // rmdir(2): it is full of files that cannot be removed
			t.Error(err)
		}
	}()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	set := func(name, value string) error { return os.WriteFile(filepath.Join(trace, name), []byte(value), 0) }
	err := errors.Join(
		set("buffer_size_kb", "4096"),
		set("events/fuse/fuse_request_send/filter", fmt.Sprintf("connection == %d", unix.Minor(st.Dev))),
		set("events/fuse/fuse_request_send/enable", "1"))
	if err == nil {
		err = f()
	}
	err = errors.Join(err, set("tracing_on", "0"))
	lines, readErr := os.ReadFile(filepath.Join(trace, "trace"))
	count := map[string]int{}
	for _, m := range regexp.MustCompile(`opcode \d+ \((\w+)\)`).FindAllStringSubmatch(string(lines), -1) {
		if !strings.HasSuffix(m[1], "FORGET") {
			count[m[1]]++
		}
	}
	return count, errors.Join(err, set("events/fuse/fuse_request_send/enable", "0"), readErr)
}

// everyday is what programs do to trees of small files: names, links, attributes, new files and files of the layer.
const everyday = `set -e
cd "$1"
list() { find . -type d -printf '%p %m\n' -o -printf '%p %y %m %s %n %U:%G %l\n' | sort; }
list
mkdir -p new/a/b
for i in 1 2 3 4 5 6 7 8 9; do echo "content $i" >new/a/f$i; done
ln new/a/f1 new/hard
ln -s a/f2 new/soft
mv new/a/f3 new/b3
mv new/a/f4 new/a/f5
mv -T new/a new/c
rmdir new/c/b
cat new/c/f1 new/hard new/b3 new/c/f5
rm new/hard new/c/f6
echo more >>small
tail -c 5 small
chmod 600 small
chown 12:34 small
touch -d @1000000000 small
cp -a small copy
truncate -s 5 copy
mv copy deep/er/small
: >deep/er/empty
mkfifo pipe
stat -c '%n %Y' small
cksum deep/er/*
dd if=/dev/zero of=huge bs=100 count=1 seek=5000 conv=notrunc status=none
cksum huge
list
rm -r new/c deep
list
`

// The floors are floors only as long as the kernel sends them the requests that it sends Lamina, and the loopback one only
// as long as files are what they are elsewhere.
func TestFloorsGetLaminasRequests(t *testing.T) {
	tracing := traceFS(t)
	const blocks = 200
	wrote, lived, said := map[string]map[string]int{}, map[string]map[string]int{}, map[string]string{}
	s := tiny("tiny", nil)
	s.Contenders = []string{"plain", "lamina", "lamina-dev", "floor", "floor-dev", "floor-null"}
	s.Run = func(l *Lab) error {
		layer := l.Layer("large", func(ctx context.Context, dir string) error {
			return errors.Join(
				fillFile(ctx, filepath.Join(dir, huge), 8*mib), // too large to be copied whole
				fillFile(ctx, filepath.Join(dir, "small"), 100),
				os.MkdirAll(filepath.Join(dir, "deep", "er"), 0o755),
				fillFile(ctx, filepath.Join(dir, "deep", "er", "file"), 5000),
				os.Symlink("er/file", filepath.Join(dir, "deep", "link")))
		})
		m := l.Metric(report.Metric{Name: "time", Unit: report.Microseconds, LessIsBetter: true})
		return l.Rounds(func(c *Contender) error {
			err := l.On(c, Setup{Layer: layer, Fresh: true}, func(u *Union) error {
				if _, err := fileSize(u.Path(huge)); err != nil {
					return err
				}
				count, err := requests(t, tracing, u.Dir, func() error { return reopening(l.ctx, u.Path(huge), blocks) })
				wrote[c.Name] = count
				m.Add(c, "", Sample{Value: 1})
				return err
			})
			if err != nil || c.kind == nullFS {
				return err
			}
			return l.On(c, Setup{Layer: layer, Fresh: true}, func(u *Union) error {
				count, err := requests(t, tracing, u.Dir, func() (err error) {
					said[c.Name], err = rival.Run(l.ctx, "sh", "-c", everyday, "sh", u.Dir)
					return err
				})
				lived[c.Name] = count
				return err
			})
		})
	}
	o := bench(t, t.Context(), Config{Dir: t.TempDir()}, s)
	wantMeasured(t, o, "tiny", s.Contenders...)
	for floor, lamina := range map[string]string{"floor": "lamina", "floor-dev": "lamina-dev", "floor-null": "lamina"} {
		if !maps.Equal(wrote[floor], wrote[lamina]) {
			t.Errorf("%s got %v, and %s %v: make bench/floor answer as Lamina does", floor, wrote[floor], lamina, wrote[lamina])
		}
		if n := wrote[floor]["FUSE_WRITE"]; n != blocks+1 {
			t.Errorf("%s got %d writes, want %d: %s", floor, n, blocks+1, strings.TrimSpace(fmt.Sprint(wrote[floor])))
		}
		if floor != "floor-null" && !maps.Equal(lived[floor], lived[lamina]) {
			t.Errorf("everyday: %s got\n%v, and %s\n%v", floor, lived[floor], lamina, lived[lamina])
		}
	}
	for name, text := range said {
		if text != said["plain"] {
			t.Errorf("%s shows\n%s, plain files are\n%s", name, text, said["plain"])
		}
	}
}
