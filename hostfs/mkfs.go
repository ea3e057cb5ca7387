package hostfs

// Mkfs is the command to run instead of args, a mkfs command on an image that nobody has mounted.
//
// mkfs.btrfs first looks at the source of every mount of the machine (btrfs-progs, common/open-utils.c), and makes nothing
// where one of them cannot be looked at: the mount of a FUSE server that has died, of anybody's, is enough. It is run with
// an empty table of mounts, in a mount namespace of its own, which takes root.
func Mkfs(args ...string) []string {
	if args[0] != "mkfs.btrfs" {
		return args
	}
	const empty = `mount -t tmpfs none /proc && mkdir /proc/self && : >/proc/self/mounts && exec "$@"`
	return append([]string{"unshare", "--mount", "sh", "-ec", empty, "sh"}, args...)
}
