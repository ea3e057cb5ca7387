// Package bench measures Lamina beside everything that a user could pick instead, in one run, on the same files: plain
// files, kernel overlayfs in its variants, fuse-overlayfs, reflink and snapshot filesystems. Contenders take turns, so that
// whatever else the machine does meets all of them; every number is a median with its spread.
//
// A [Scenario] is one thing to show. It works in a [Lab], which gives it layers, and contenders mounted over them. Package
// report holds the result and shows it.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"lamina/bench/report"
	"lamina/bench/rival"
)

// Config says what to measure.
type Config struct {
	Lamina     string    // the binary; needed
	Dir        string    // everything happens below it; empty: the directory for temporary files
	Filesystem string    // "ext4", "xfs" or "btrfs": measure on a fresh one in an image file in Dir; OnDir: on Dir itself
	Mode       Mode      // empty: Normal
	Rounds     int       // turns of each contender; 0: as many as the mode's time allows
	Scenarios  []string  // names; none: all
	Contenders []string  // names; none: each scenario's own choice
	Progress   io.Writer // a line of what is being done, rewritten if it is a terminal; nil: silence

	patience time.Duration                                // see Lab.patience; 0: the mode's
	image    int64                                        // size of image files in bytes; 0: the mode's
	noFiles  bool                                         // no filesystem is measured: any will do
	find     func(*run, []Scenario) ([]*Contender, error) // who is here; nil: those that can be mounted
}

// total is the time that a whole run of a mode takes.
func (m Mode) total() time.Duration {
	return Pick(m, 165*time.Second, 560*time.Second, 33*time.Minute)
}

// run is one run's state.
type run struct {
	cfg      Config
	ctx      context.Context
	scratch  string
	grounds  map[groundName]*ground
	noGround map[groundName]error
	layers   map[string]*Layer
	kept     []string // directories to remove when the scenario is over
	serial   int
	need     int64    // bytes: of the scenario that takes the most of the main filesystem
	restore  []func() // undo changes to the environment
	progress *progress
	result   report.Run
}

// Run measures. It leaves nothing mounted and no file behind, also when ctx ends early; what was measured until then is in
// the result beside the error.
func Run(ctx context.Context, cfg Config) (*report.Run, error) {
	scenarios, err := chooseScenarios(cfg.Scenarios)
	if err == nil {
		err = checkNames(cfg.Contenders)
	}
	if err == nil {
		err = checkRights()
	}
	if err != nil {
		return nil, err
	}
	return measure(ctx, cfg, scenarios)
}

func measure(ctx context.Context, cfg Config, scenarios []Scenario) (_ *report.Run, err error) {
	if cfg.Mode == "" {
		cfg.Mode = Normal
	}
	r := &run{
		cfg: cfg, ctx: ctx, grounds: map[groundName]*ground{}, noGround: map[groundName]error{}, layers: map[string]*Layer{},
		progress: newProgress(cfg.Progress),
		result:   report.Run{Started: time.Now(), Mode: string(cfg.Mode)},
	}
	for _, s := range scenarios {
		r.need = max(r.need, s.Space(cfg.Mode))
	}
	if err := r.open(); err != nil {
		return nil, errors.Join(err, r.close())
	}
	defer func() {
		r.result.Seconds = time.Since(r.result.Started).Seconds()
		if ctx.Err() != nil {
			err = ctx.Err() // whatever else failed, failed of it
		}
		err = errors.Join(err, r.close())
	}()
	if r.result.Machine, err = describeMachine(ctx, r.grounds[mainGround].dir, cfg.Lamina); err != nil {
		return nil, err
	}
	return &r.result, r.all(scenarios)
}

// all runs the scenarios. Only the end of the run is an error, or that nobody is there to be measured.
func (r *run) all(scenarios []Scenario) error {
	find := r.cfg.find
	if find == nil {
		find = (*run).probeAll
	}
	present, err := find(r, scenarios)
	if err != nil {
		return err
	}
	if len(present) == 0 {
		return fmt.Errorf("no contender can be mounted: %s", r.result.Absent[0].Why)
	}
	var share float64
	var whole float64
	for _, s := range Scenarios() {
		whole += s.Weight
	}
	for i := range scenarios {
		s := &scenarios[i]
		share += s.Weight / whole
		r.progress.overall(i, len(scenarios))
		lab := &Lab{run: r, scenario: s, deadline: r.result.Started.Add(time.Duration(share * float64(r.cfg.Mode.total())))}
		for _, c := range present {
			if slices.Contains(r.wanted(s), c.Name) {
				lab.contenders = append(lab.contenders, c)
			}
		}
		if err := lab.perform(); err != nil {
			return err
		}
	}
	return nil
}

// attempt runs the scenario. A fault of its own costs its figures, not those of the others.
func (l *Lab) attempt() (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a fault of the bench: %v\n%s", r, debug.Stack())
		}
	}()
	return l.scenario.Run(l)
}

// perform runs the lab's scenario, unless something that it needs is missing.
func (l *Lab) perform() error {
	err := l.checkNeeds()
	if err == nil {
		began := time.Now()
		l.progress.step(l.scenario.Name, "", 0)
		err = l.attempt()
		l.progress.done(l.scenario.Name, time.Since(began))
	}
	for _, dir := range l.kept {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	l.kept = nil
	if l.ctx.Err() != nil {
		err = errors.Join(l.ctx.Err(), err)
	} else if err != nil {
		l.fail("", err)
		err = nil
	}
	l.result.Scenarios = append(l.result.Scenarios, l.report())
	return err
}

func (l *Lab) report() report.Scenario {
	s := report.Scenario{Name: l.scenario.Name, Title: l.scenario.Title, Source: l.scenario.Source, Describes: l.scenario.Describes}
	for _, m := range l.metrics {
		if rm := m.report(); len(rm.Cells) > 0 {
			s.Metrics = append(s.Metrics, rm)
		}
	}
	return s
}

// checkNeeds tells what the scenario lacks: tools, space, contenders.
func (l *Lab) checkNeeds() error {
	if err := findTools(l.scenario.Tools...); err != nil {
		return err
	}
	if len(l.contenders) == 0 {
		return errors.New("none of its contenders is here")
	}
	need := l.scenario.Space(l.Mode())
	have, err := free(l.grounds[mainGround].dir)
	if err != nil {
		return err
	}
	if have < need {
		return fmt.Errorf("it needs %.1f GB of disk and %s has %.1f: free some, choose another --dir, or measure less (--quick)",
			float64(need)/1e9, filepath.Dir(l.scratch), float64(have)/1e9)
	}
	return nil
}

// checkRights tells what this process may not do.
func checkRights() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	if os.Geteuid() != 0 || caps[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return errors.New("mounting filesystems needs root with CAP_SYS_ADMIN: run it as root of the host, or in a privileged container")
	}
	return nil
}

func chooseScenarios(names []string) ([]Scenario, error) {
	all := Scenarios()
	if len(names) == 0 {
		return all, nil
	}
	var known []string
	for _, s := range all {
		known = append(known, s.Name)
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("scenario %s: unknown: use %s", name, strings.Join(known, ", "))
		}
	}
	return slices.DeleteFunc(all, func(s Scenario) bool { return !slices.Contains(names, s.Name) }), nil
}

func checkNames(contenders []string) error {
	for _, name := range contenders {
		if _, err := find(name); err != nil {
			return err
		}
	}
	return nil
}

// wanted are the names of a scenario's contenders in this run.
func (r *run) wanted(s *Scenario) []string {
	switch {
	case len(r.cfg.Contenders) > 0:
		return slices.DeleteFunc(slices.Clone(r.cfg.Contenders), func(name string) bool {
			c, err := find(name)
			return err == nil && c.special && !slices.Contains(s.Contenders, name) && !slices.Contains(s.More, name)
		})
	case r.cfg.Mode == Quick && s.Quick != nil:
		return s.Quick
	case r.cfg.Mode == Full:
		return append(slices.Clone(s.Contenders), s.More...)
	}
	return s.Contenders
}

// probeAll tries every contender that a scenario wants, and names those that this machine does not have. The rest is
// returned in the catalogue's order.
func (r *run) probeAll(scenarios []Scenario) ([]*Contender, error) {
	var names []string
	for _, known := range append(ContenderNames(), r.cfg.Contenders...) {
		wanted := slices.ContainsFunc(scenarios, func(s Scenario) bool { return slices.Contains(r.wanted(&s), known) })
		if wanted && !slices.Contains(names, known) {
			names = append(names, known)
		}
	}
	var present []*Contender
	for _, name := range names {
		c, err := find(name)
		if err != nil {
			return nil, err
		}
		r.progress.step("looking for", name, 0)
		err = r.probe(c)
		if r.ctx.Err() != nil {
			return nil, errors.Join(r.ctx.Err(), err)
		}
		if err != nil {
			r.result.Absent = append(r.result.Absent, report.Absent{Name: name, Why: oneLine(err)})
			r.progress.note("%s is absent: %s", name, oneLine(err))
			continue
		}
		present = append(present, c)
		r.result.Contenders = append(r.result.Contenders, c.Contender)
	}
	return present, nil
}

// probe mounts a contender over a file, writes to it and unmounts.
func (r *run) probe(c *Contender) error {
	if err := findTools(c.tools...); err != nil {
		return err
	}
	l := &Lab{run: r, scenario: &Scenario{Name: "probe"}}
	layer := l.Layer("probe", func(_ context.Context, dir string) error {
		return os.WriteFile(filepath.Join(dir, "file"), make([]byte, 8192), 0o644)
	})
	return l.On(c, Setup{Layer: layer}, func(u *Union) error {
		if c.IsLamina() {
			st, err := u.status()
			if err != nil {
				return err
			}
			c.setTransport(st.Transport)
		}
		fd, err := unix.Open(u.Path("file"), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening a file for writing: %w", err)
		}
		_, err = unix.Pwrite(fd, []byte("x"), 1)
		return errors.Join(err, unix.Close(fd))
	})
}

// setTransport notes what carries the requests, if the options leave it open.
func (c *Contender) setTransport(transport string) {
	c.transport = transport
	if transport != "" && !slices.ContainsFunc(c.Options, func(o string) bool { return strings.HasPrefix(o, "transport=") }) {
		c.Contender.Describes += " (requests carried by " + transport + ")"
	}
}

func (r *run) failed(f report.Failed) {
	f.Why = oneLine(errors.New(f.Why))
	r.result.Failed = append(r.result.Failed, f)
	who := f.Scenario
	if f.Contender != "" {
		who += ", " + f.Contender
	}
	r.progress.note("%s: %s", who, f.Why)
}

func oneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(c rune) bool { return c == '\n' || c == '\r' }), "; ")
}

// place returns a new directory on a filesystem.
func (r *run) place(name groundName, what string) (string, error) {
	g, err := r.ground(name)
	if err != nil {
		return "", err
	}
	r.serial++
	dir := filepath.Join(g.dir, fmt.Sprintf("%d-%s", r.serial, strings.Map(fileName, what)))
	return dir, os.Mkdir(dir, 0o755)
}

// fileName leaves out what mount options and paths would have to escape.
func fileName(c rune) rune {
	if c == '-' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' {
		return c
	}
	return '_'
}

// open makes the scratch directory and sees that unions can be measured there.
func (r *run) open() error {
	dir := r.cfg.Dir
	if dir == "" {
		dir = os.TempDir()
	}
	dir, err := filepath.Abs(dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return fmt.Errorf("--dir: %w", err)
	}
	if r.scratch, err = os.MkdirTemp(dir, "lamina-bench."); err != nil {
		r.scratch = ""
		return fmt.Errorf("--dir: %w", err)
	}
	if err := r.ownPlaces(); err != nil {
		return err
	}
	why, err := r.chooseFilesystem()
	if err != nil {
		return err
	}
	if r.cfg.Filesystem == OnDir {
		r.grounds[mainGround] = &ground{name: mainGround, dir: filepath.Join(r.scratch, "main")}
		return os.Mkdir(r.grounds[mainGround].dir, 0o755)
	}
	// A directory of its own, so that the main filesystem may be of the same type as one of the others.
	images := filepath.Join(r.scratch, "main")
	if err := os.Mkdir(images, 0o755); err != nil {
		return err
	}
	r.progress.detail("making an image file for a fresh " + r.cfg.Filesystem)
	mnt, err := mountImage(r.ctx, images, r.cfg.Filesystem, cachedOnce, r.imageSize(true))
	if err != nil {
		return errors.Join(why, err)
	}
	r.grounds[mainGround] = &ground{name: mainGround, dir: mnt, own: true}
	return nil
}

// OnDir is the Filesystem that holds Config.Dir.
const OnDir = "dir"

// chooseFilesystem fills Config.Filesystem in, and says why it is not the directory's own.
func (r *run) chooseFilesystem() (why, err error) {
	if r.cfg.Filesystem == "" {
		if why = checkUpper(r.scratch); why == nil {
			why = checkJournal(r.scratch)
		}
		if r.cfg.Filesystem = OnDir; why != nil {
			r.cfg.Filesystem = "ext4"
			r.progress.note("%v: measuring on a fresh ext4 in an image file there", why)
		}
		return why, nil
	}
	if r.cfg.Filesystem == OnDir {
		if r.cfg.noFiles {
			return nil, nil
		}
		return nil, checkUpper(r.scratch)
	}
	if _, known := filesystems[r.cfg.Filesystem]; !known {
		return nil, fmt.Errorf("--filesystem %s: unknown: use ext4, xfs, btrfs or %s", r.cfg.Filesystem, OnDir)
	}
	return nil, nil
}

// ownPlaces keeps what Lamina's servers and other programs write within the scratch directory: control sockets, logs,
// temporary files.
func (r *run) ownPlaces() error {
	for name, variable := range map[string]string{"run": "LAMINA_RUNTIME_DIR", "tmp": "TMPDIR"} {
		dir := filepath.Join(r.scratch, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		old, had := os.LookupEnv(variable)
		if err := os.Setenv(variable, dir); err != nil {
			return err
		}
		r.restore = append(r.restore, func() {
			if had {
				_ = os.Setenv(variable, old)
			} else {
				_ = os.Unsetenv(variable)
			}
		})
	}
	return nil
}

// close takes everything down that the run has set up. What should be gone already is named.
func (r *run) close() error {
	r.progress.clear()
	for _, f := range r.restore {
		f()
	}
	if r.scratch == "" {
		return nil
	}
	var err error
	expected := map[string]bool{}
	for _, g := range r.grounds {
		expected[g.dir] = g.own
	}
	left, listErr := rival.MountsBelow(r.scratch)
	for _, dir := range slices.Backward(left) {
		if !expected[dir] {
			err = errors.Join(err, fmt.Errorf("%s was still mounted", dir))
		}
		if unix.Unmount(dir, 0) != nil {
			err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
		}
	}
	// Nothing is removed through a mount that did not go.
	if left, againErr := rival.MountsBelow(r.scratch); listErr != nil || againErr != nil || len(left) > 0 {
		return errors.Join(err, listErr, againErr, fmt.Errorf("%s is left: it has mounts %s", r.scratch, strings.Join(left, " ")))
	}
	return errors.Join(err, os.RemoveAll(r.scratch))
}
