// Command lamina-cni is a CNI plugin: container runtimes run it for each pod that comes or goes. See docs/network.md.
package main

import (
	"runtime"

	"lamina/net/cni"

	"github.com/containernetworking/cni/pkg/skel"
)

// The host's namespace is that of the main thread.
func init() { runtime.LockOSThread() }

func main() {
	skel.PluginMainFuncs(cni.Funcs(), cni.Versions, "lamina-cni: pods in Lamina's network")
}
