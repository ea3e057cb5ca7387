package union

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"lamina/layer"
	"lamina/tests/steps"

	"golang.org/x/sys/unix"
)

// The tests below run one operation in a process of its own and kill it (SIGKILL) in front of its first change to the
// layers, then, on fresh layers, in front of its second, and so on. Each time a new mount must show the tree as it was
// before the operation or as it is after, and doing it again must work.

// changes are the system calls that change a filesystem by name. Those on a descriptor are left out: what operations on
// names change so is a file that has no name yet, and dies with the process.
var changes = map[uint64]bool{
	unix.SYS_LINKAT: true, unix.SYS_RENAMEAT2: true, unix.SYS_UNLINKAT: true, unix.SYS_MKDIRAT: true, unix.SYS_MKNODAT: true,
	unix.SYS_SYMLINKAT: true, unix.SYS_SETXATTR: true, unix.SYS_LSETXATTR: true, unix.SYS_LREMOVEXATTR: true,
	unix.SYS_FCHOWNAT: true, unix.SYS_FCHMODAT: true, unix.SYS_FCHMODAT2: true,
}

const victimEnv = "LAMINA_TEST_VICTIM" // NAME OF THE OPERATION:DIRECTORY OF THE STACK

// The tracer follows the main thread, and an init function is what can stay on it.
func init() {
	if _, ok := os.LookupEnv(victimEnv); ok {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if v, ok := os.LookupEnv(victimEnv); ok {
		op, dir, _ := strings.Cut(v, ":")
		if err := victim(killOps[op], dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type killOp struct {
	before func(s *stack) // made ready, in the test's process
	do     func(fs *FS, at func(path string) *Node) error
}

var killOps = map[string]killOp{
	"copy up for writing": {do: func(fs *FS, at func(string) *Node) error { return openAndClose(fs, at("d/e/f")) }},
	"copy up a hard link": {do: func(fs *FS, at func(string) *Node) error { return openAndClose(fs, at("d/l2")) }},
	"unlink a lower file": {do: func(fs *FS, at func(string) *Node) error { return fs.Unlink(at("d/e"), "f") }},
	"unlink a hard link":  {do: func(fs *FS, at func(string) *Node) error { return fs.Unlink(at("d"), "l2") }},
	"unlink a copied-up file": {
		before: func(s *stack) { s.write("d/e/f", "X", 0) },
		do:     func(fs *FS, at func(string) *Node) error { return fs.Unlink(at("d/e"), "f") },
	},
	"unlink another name of a copied-up file": {
		before: func(s *stack) { s.write("d/l1", "X", 0) },
		do:     func(fs *FS, at func(string) *Node) error { return fs.Unlink(at("d"), "l2") },
	},
	"unlink the last of several names": {
		before: func(s *stack) { must(s.t, s.unlink("d/l1")); must(s.t, s.unlink("l3")) },
		do:     func(fs *FS, at func(string) *Node) error { return fs.Unlink(at("d"), "l2") },
	},
	"create where a whiteout is": {
		before: func(s *stack) { must(s.t, s.unlink("d/e/f")) },
		do: func(fs *FS, at func(string) *Node) error {
			_, h, err := fs.Create(at("d/e"), "f", unix.O_RDWR|unix.O_EXCL, 0o644, Cred{})
			if err == nil {
				h.Release()
			}
			return err
		},
	},
	"mkdir where a whiteout is": {
		before: func(s *stack) {
			must(s.t, s.unlink("d/e/f"))
			must(s.t, s.rmdir("d/e"))
		},
		do: func(fs *FS, at func(string) *Node) error { _, err := fs.Mkdir(at("d"), "e", 0o755, Cred{}); return err },
	},
	"rmdir of whiteouts over a lower directory": {
		before: func(s *stack) { must(s.t, s.unlink("d/e/f")) },
		do:     func(fs *FS, at func(string) *Node) error { return fs.Rmdir(at("d"), "e") },
	},
	"rename a lower file":         {do: renaming("d/e/f", "moved", 0)},
	"rename a lower directory":    {do: renaming("d/e", "moved", 0)},
	"rename a hard link":          {do: renaming("d/l2", "d/e/moved", 0)},
	"rename over a hard link":     {do: renaming("d/e/f", "d/l2", 0)},
	"rename over a lower file":    {do: renaming("d/l2", "d/e/f", 0)},
	"exchange directory and file": {do: renaming("d/e", "l3", unix.RENAME_EXCHANGE)},
	"rename another name of a copied-up file": {
		before: func(s *stack) { s.write("d/l1", "X", 0) },
		do:     renaming("d/l2", "moved", 0),
	},
	"rename a directory over a whiteout": {
		before: func(s *stack) { must(s.t, s.unlink("l3")); s.mkdir("new"); s.create("new/x", "x") },
		do:     renaming("new", "l3", 0),
	},
	"rename a directory over whiteouts": {
		before: func(s *stack) { must(s.t, s.unlink("d/e/f")); s.mkdir("new"); s.create("new/x", "x") },
		do:     renaming("new", "d/e", 0),
	},
	"link a lower file": {do: func(fs *FS, at func(string) *Node) error { _, err := fs.Link(at("d/e/f"), at("d"), "new"); return err }},
	"link a hard link where a whiteout is": {
		before: func(s *stack) { must(s.t, s.unlink("d/e/f")) },
		do:     func(fs *FS, at func(string) *Node) error { _, err := fs.Link(at("d/l1"), at("d/e"), "f"); return err },
	},
	"change the owner of a directory": {do: func(fs *FS, at func(string) *Node) error {
		uid := uint32(77)
		_, err := fs.SetAttr(at("d/e"), SetAttr{UID: &uid})
		return err
	}},
}

func openAndClose(fs *FS, n *Node) error {
	h, err := fs.Open(n, unix.O_RDWR)
	if err == nil {
		h.Release()
	}
	return err
}

func renaming(from, to string, flags uint32) func(*FS, func(string) *Node) error {
	return func(fs *FS, at func(string) *Node) error {
		return fs.Rename(at(filepath.Dir(from)), filepath.Base(from), at(filepath.Dir(to)), filepath.Base(to), flags)
	}
}

// victim mounts the stack at dir, stops for the tracer to take note, and does op.
func victim(op killOp, dir string) error {
	unix.Umask(0)
	cfg := Config{Redirect: true, Follow: true, Index: true, Engine: newTestEngine(nil)}
	for _, d := range []struct {
		path string
		to   **layer.Dir
	}{{"upper", &cfg.Upper}, {"work", &cfg.Work}} {
		l, err := layer.OpenDir(filepath.Join(dir, d.path), layer.Options{})
		if err != nil {
			return err
		}
		*d.to = l
	}
	l, err := layer.OpenDir(filepath.Join(dir, "lower0"), layer.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	cfg.Lowers = []layer.Layer{l}
	fs, err := New(cfg)
	if err != nil {
		return err
	}
	at := func(path string) *Node {
		n := fs.Root()
		for comp := range strings.SplitSeq(path, "/") {
			if comp != "." {
				if n, err = fs.Lookup(n, comp); err != nil {
					panic(err)
				}
			}
		}
		return n
	}
	if err := unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGSTOP); err != nil {
		return err
	}
	return op.do(fs, at)
}

func TestKilledBetweenAnyTwoSteps(t *testing.T) {
	for name, op := range killOps {
		t.Run(name, func(t *testing.T) {
			onFilesystem(t, "tmpfs", nil) // hundreds of small trees
			whole := newKillStack(t, op)
			before := whole.tree()
			if n := whole.run(name, -1); n == 0 {
				t.Fatal("the operation changed nothing")
			}
			after := whole.tree()
			if maps.Equal(before, after) != strings.HasPrefix(name, "copy up") {
				t.Fatal("the operation does not show, or shows where it must not")
			}
			for n := 1; ; n++ {
				s := newKillStack(t, op)
				if done := s.run(name, n); done < n {
					break
				}
				got := s.tree()
				if !maps.Equal(got, before) && !maps.Equal(got, after) {
					t.Errorf("killed before change %d the tree is\n%v\nbefore the operation it was\n%v\nafter it\n%v", n, got, before, after)
				}
				s.clean()
				if maps.Equal(got, before) && !maps.Equal(got, after) || strings.HasPrefix(name, "copy up") {
					s.run(name, -1)
					if got := s.tree(); !maps.Equal(got, after) {
						t.Errorf("killed before change %d and done again, the tree is\n%v\nwant\n%v", n, got, after)
					}
				}
			}
		})
	}
}

type killStack struct{ *stack }

func newKillStack(t *testing.T, op killOp) killStack {
	s := newStack(t, 1, func(p func(int, string) string) {
		put(t, p(0, "d/e/f"), strings.Repeat("f", 9000))
		put(t, p(0, "d/l1"), strings.Repeat("l", 9000))
		must(t, os.Link(p(0, "d/l1"), p(0, "d/l2")))
		must(t, os.Link(p(0, "d/l1"), p(0, "l3")))
	})
	if op.before != nil {
		op.before(s)
	}
	s.umount()
	return killStack{s}
}

var inoOfDump = regexp.MustCompile(`ino \d+ `)

// tree is what a new mount shows, but for inode numbers, which differ from one stack to the next.
func (s killStack) tree() map[string]string {
	s.mount()
	defer s.umount()
	tree := s.dump()
	for p, d := range tree {
		tree[p] = inoOfDump.ReplaceAllString(d, "")
	}
	return tree
}

// clean fails unless the workdir holds nothing but entries of files that have names.
func (s killStack) clean() {
	s.t.Helper()
	list, err := os.ReadDir(filepath.Join(s.work(), tmpDir))
	must(s.t, err)
	if len(list) > 0 {
		s.t.Errorf("a mount leaves %v in %s", list, tmpDir)
	}
}

// run does the operation in a process of its own and kills that in front of change n, counted from 1. It returns how
// many changes were begun.
func (s killStack) run(op string, n int) int {
	s.t.Helper()
	self, err := os.Executable()
	must(s.t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), victimEnv+"="+op+":"+s.dir, "GORACE=atexit_sleep_ms=0") // or each exit takes a second
	cmd.Stderr = os.Stderr
	return steps.Run(s.t, cmd, n, isChange)
}

// isChange looks at the system call that a stopped thread is about to make.
func isChange(regs *unix.PtraceRegs) bool {
	switch regs.Orig_rax {
	case unix.SYS_OPENAT:
		return regs.Rdx&unix.O_CREAT != 0
	case unix.SYS_UTIMENSAT:
		return regs.Rsi != 0 // 0: of a descriptor
	}
	return changes[regs.Orig_rax]
}
