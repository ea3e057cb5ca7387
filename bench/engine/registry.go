package engine

import (
	"bytes"
	"net/http"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Registry serves an image of layers, lowest first, as registries do, under whatever name it is asked for.
func Registry(args []string, layers ...Layer) (http.Handler, error) {
	files := map[string]string{}
	var ids []digest.Digest
	var descs []ocispec.Descriptor
	for _, l := range layers {
		ids = append(ids, l.Digest)
		descs = append(descs, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.Digest, Size: l.Size})
		files[l.Digest.String()] = l.Path
	}
	config, manifest, err := makeManifest(imageConfig(args, ids), descs)
	if err != nil {
		return nil, err
	}
	blob := func(w http.ResponseWriter, r *http.Request, b blob) {
		w.Header().Set("Content-Type", b.desc.MediaType)
		w.Header().Set("Docker-Content-Digest", b.desc.Digest.String())
		http.ServeContent(w, r, "", Epoch, bytes.NewReader(b.text))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch name := path.Base(r.URL.Path); {
		case strings.Contains(r.URL.Path, "/manifests/"):
			blob(w, r, manifest)
		case name == config.desc.Digest.String():
			blob(w, r, config)
		case files[name] != "":
			w.Header().Set("Content-Type", ocispec.MediaTypeImageLayer)
			http.ServeFile(w, r, files[name])
		default:
			http.NotFound(w, r)
		}
	}), nil
}
