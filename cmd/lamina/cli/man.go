package cli

import (
	"fmt"
	"strings"

	"lamina/mountopt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

//go:generate go run ../genman ../../../man

// What the commands' own texts do not say.
var manExtra = map[string][]section{
	"lamina": {
		{"FILES", `/run/lamina holds one control socket for every mount of root, and the logs of their servers, named after the mount
point. For other users, and for the root of a user namespace who may not write to /run, it is $XDG_RUNTIME_DIR/lamina, or
lamina-UID in the directory for temporary files. LAMINA_RUNTIME_DIR names another one.`},
	},
	"mount": {
		{"EXIT STATUS", `0: mounted. 1: the command line is wrong. 32: the mount failed. These are mount(8)'s.`},
		{"FILES", `/run/lamina/NAME.log, where NAME is the mount point with dashes for slashes: what an operator must know. An empty one
is removed when the server ends.`},
		{"NOTES", `An upper directory and its workdir belong to one mount at a time. Mounted again right after umount(8), which does not wait
for the server, they are waited for, at most a minute, until the last mount is flushed.

Without privileges the layers' private attributes are user.overlay.* (option userxattr), the mount needs fusermount3,
and passthrough is off. As root of a user namespace fusermount3 is not needed.

mount -t fuse.lamina runs /sbin/mount.fuse.lamina if lamina is installed under that name, and otherwise mount.fuse3, which
runs lamina from the search path.

With Podman, mount_program in storage.conf(5) names lamina.`},
	},
	"umount": {{"EXIT STATUS", `0: unmounted and flushed. 32: failed.`}},
	"fsck": {{"EXIT STATUS", `0: clean. 1: something was found, repaired or not. 2: the layer could not be checked, or the command
line is wrong.`}},
	"bench": {{"EXIT STATUS", `0: measured. 32: failed, or with --strict a target was missed.`}},
	"doctor": {{"EXIT STATUS", `0: nothing to say, or notes. 1: something costs. 2: something is broken, or could not be
checked.`}},
	"metrics": {{"EXIT STATUS", `0: ended by a signal, or printed. 32: failed, or with --listen - some server did not answer.`}},
	"agent": {
		{"EXIT STATUS", `0: ended by a signal. 32: not started, or ended by an error; a first start that fails leaves nothing.`},
		{"FILES", `/etc/lamina/net.toml, which lamina-net.service names with --config, and /etc/lamina/peers.

/run/lamina/net/agent.sock, for lamina-cni(8) and the other commands of lamina net.

/var/lib/lamina/net/leases holds a file for each address in use, and policies beside it copies of those in force.

/sys/fs/bpf/lamina holds the maps and programs of the fast path.`},
	},
	"flatten": {{"EXIT STATUS", `0: no sketch is left. 2: failed; what was completed stays complete.`}},
}

type section struct{ title, text string }

// ManPages returns the manual pages by file name.
func ManPages() map[string]string {
	root := Command()
	pages := map[string]string{"lamina.1": manPage(root, 1, "")}
	var add func(of *cobra.Command, prefix string)
	add = func(of *cobra.Command, prefix string) {
		for _, c := range of.Commands() {
			if !c.Hidden && c.Name() != "help" && c.Name() != "completion" {
				pages[prefix+c.Name()+".8"] = manPage(c, 8, prefix)
				add(c, prefix+c.Name()+"-")
			}
		}
	}
	add(root, "lamina-")
	pages["lamina-cni.8"] = cniPage()
	return pages
}

// cniPage is that of the CNI plugin, a program of its own without flags.
func cniPage() string {
	var b strings.Builder
	writeHeading(&b, "lamina-cni", 8, "a CNI plugin: pods in Lamina's network")
	b.WriteString(".SH SYNOPSIS\n.B lamina\\-cni\n" + roff("< CONFIGURATION") + "\n")
	for _, s := range []section{
		{"DESCRIPTION", `Container runtimes run it for each pod that comes or goes, with a verb of the CNI specification in CNI_COMMAND (ADD, DEL, CHECK,
GC, STATUS or VERSION) and a network configuration on standard input. It speaks versions 0.4.0, 1.0.0 and 1.1.0.

ADD takes an address of the node's prefix, makes a veth pair into the pod's network namespace and tells lamina net agent, which
has the pod's policies in force when it returns. It waits five seconds for an agent that is being restarted. DEL, GC and CHECK
do without one. STATUS fails if an ADD could not work.

A runtime finds it by a configuration in /etc/cni/net.d, of which it takes the first file, and in a directory of plugins: most
look in /opt/cni/bin, the package installs to /usr/lib/cni. lamina doctor --only net says whether both fit.`},
		{"CONFIGURATION", `Beside what the specification says of every plugin:

socket: the agent's socket; /run/lamina/net/agent.sock if it is missing.

stateDir: the agent's directory of what survives a reboot; /var/lib/lamina/net if it is missing.

mtu: of pods, in bytes; the agent's if it is missing.

args.cni.labels: labels of the pod for network policies, [{"key": ..., "value": ...}].`},
		{"ENVIRONMENT", `CNI_ARGS: K8S_POD_NAMESPACE and K8S_POD_NAME name the pod, LAMINA_LABELS=KEY:VALUE,KEY:VALUE are its labels.`},
		{"FILES", `/etc/cni/net.d/10-lamina.conflist; /usr/share/doc/lamina/examples/net has one, with host ports by the standard plugin.`},
	} {
		writeSection(&b, s.title, s.text)
	}
	b.WriteString(".SH SEE ALSO\n" + roff("lamina-net(8), lamina-net-agent(8)") + "\n")
	return b.String()
}

func writeHeading(b *strings.Builder, name string, sec int, short string) {
	fmt.Fprintf(b, ".\\\" Generated by go generate ./cmd/lamina/cli. Do not edit.\n.TH %s %d \"\" \"Lamina\" \"Lamina\"\n",
		strings.ToUpper(strings.ReplaceAll(name, "-", `\-`)), sec)
	fmt.Fprintf(b, ".SH NAME\n%s \\- %s\n", roff(name), roff(short))
}

func manPage(c *cobra.Command, sec int, prefix string) string {
	var b strings.Builder
	name := prefix + c.Name()
	writeHeading(&b, name, sec, c.Short)
	writeSynopsis(&b, c, name)
	writeSection(&b, "DESCRIPTION", c.Long)
	writeSubcommands(&b, c, name)
	writeFlags(&b, c)
	if c.Name() == "mount" {
		writeMountOptions(&b)
	}
	if c.Example != "" {
		fmt.Fprintf(&b, ".SH EXAMPLES\n.nf\n%s\n.fi\n", roff(c.Example))
	}
	for _, s := range manExtra[c.Name()] {
		writeSection(&b, s.title, s.text)
	}
	writeSeeAlso(&b, c)
	return b.String()
}

func writeSynopsis(b *strings.Builder, c *cobra.Command, name string) {
	b.WriteString(".SH SYNOPSIS\n")
	if !c.HasParent() {
		fmt.Fprintf(b, ".B lamina\n%s\n.br\n.B lamina\n%s\n", roff("COMMAND [ARGUMENT...]"), roff("-o OPTION[,OPTION...] [NAME] MOUNTPOINT"))
		return
	}
	_, args, _ := strings.Cut(c.Use, " ")
	fmt.Fprintf(b, ".B %s\n%s\n", roff(c.CommandPath()), roff(args))
}

func writeSection(b *strings.Builder, title, text string) {
	fmt.Fprintf(b, ".SH %s\n", title)
	for i, par := range strings.Split(text, "\n\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		b.WriteString(roff(par) + "\n")
	}
}

func writeSubcommands(b *strings.Builder, c *cobra.Command, name string) {
	if !c.HasAvailableSubCommands() {
		return
	}
	b.WriteString(".SH COMMANDS\n")
	for _, sub := range c.Commands() {
		if !sub.Hidden && sub.Name() != "help" && sub.Name() != "completion" {
			fmt.Fprintf(b, ".TP\n.B %s\n%s. See %s(8).\n", roff(sub.Use), roff(upperFirst(sub.Short)), roff(name+"-"+sub.Name()))
		}
	}
}

func writeFlags(b *strings.Builder, c *cobra.Command) {
	flags, title := c.Flags(), "OPTIONS"
	if c.HasParent() {
		c.InitDefaultHelpFlag()
	} else {
		flags, title = c.PersistentFlags(), "OPTIONS OF EVERY COMMAND"
	}
	b.WriteString(".SH " + title + "\n")
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		names := "--" + f.Name
		if f.Shorthand != "" {
			names = "-" + f.Shorthand + ", " + names
		}
		if f.Value.Type() != "bool" {
			names += " " + valueName(f)
		}
		fmt.Fprintf(b, ".TP\n.B %s\n%s.\n", roff(names), roff(upperFirst(f.Usage)))
	})
}

// valueName names a flag's value: that of -o is a list of mount options.
func valueName(f *pflag.Flag) string {
	if f.Name == "options" {
		return "OPTION[,OPTION...]"
	}
	name := strings.ToUpper(f.Name)
	if f.Value.Type() == "stringSlice" {
		name = strings.TrimSuffix(name, "S")
		return name + "[," + name + "...]"
	}
	return name
}

// writeMountOptions prints the table that the parser runs on.
func writeMountOptions(b *strings.Builder) {
	fmt.Fprint(b, ".SH MOUNT OPTIONS\nA later option overrides an earlier one. An option that Lamina cannot honour is refused by name.\n")
	for _, origin := range []mountopt.Origin{mountopt.Overlayfs, mountopt.FuseOverlayfs, mountopt.Lamina, mountopt.Mount} {
		heading := "Of " + origin.String()
		if origin == mountopt.Lamina {
			heading = "Lamina's own"
		}
		fmt.Fprintf(b, ".SS %s\n", heading)
		for _, o := range mountopt.Table() {
			if o.Origin == origin {
				fmt.Fprintf(b, ".TP\n.B %s\n%s\n", roff(o.Syntax()), roff(o.Help))
			}
		}
	}
}

// writeSeeAlso refers from a command to lamina(1), which refers to all of them.
func writeSeeAlso(b *strings.Builder, c *cobra.Command) {
	refs := "mount(8), fuse(4)"
	switch {
	case c.CommandPath() == "lamina net":
		refs = "lamina(1), lamina-cni(8)"
	case c.HasParent() && c.Parent().Name() == "net":
		refs = "lamina(1), lamina-net(8), lamina-cni(8)"
	case c.HasParent():
		refs = "lamina(1), " + refs
	}
	b.WriteString(".SH SEE ALSO\n" + roff(refs) + "\n")
}

// roff escapes text for the body of a page.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

func upperFirst(s string) string { return strings.ToUpper(s[:1]) + s[1:] }
