package lab

import (
	"fmt"
	"os"
)

// Kubeconfig writes a kubeconfig file for an API server at an address, whose authority's certificate is in the file ca.
func Kubeconfig(path, address, ca, token string) error {
	return os.WriteFile(path, fmt.Appendf(nil, `
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://%s", certificate-authority: %q}}]
users: [{name: u, user: {token: %q}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, address, ca, token), 0o600)
}
