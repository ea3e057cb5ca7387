package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"lamina/bench/rival"
)

// Epoch is the time that images and their files are of, so that the same content is always the same image.
var Epoch = time.Unix(1_700_000_000, 0).UTC()

// Layer is a file with an uncompressed layer's tar archive.
type Layer struct {
	Path   string
	Digest digest.Digest
	Size   int64
}

// Pack makes a layer of what is below root, in the file path. Whiteouts are files that are named so: .wh.NAME.
func Pack(ctx context.Context, root, path string) (Layer, error) {
	_, err := rival.Run(ctx, "tar", "--create", "--file", path, "--directory", root, "--sort=name", "--format=posix", "--numeric-owner",
		"--pax-option=delete=atime,delete=ctime", "--xattrs", "--xattrs-include=security.*", "--xattrs-include=user.*", fmt.Sprintf("--mtime=@%d", Epoch.Unix()), ".")
	if err != nil {
		return Layer{}, err
	}
	f, err := os.Open(path)
	if err != nil {
		return Layer{}, err
	}
	defer f.Close()
	d := digest.SHA256.Digester()
	n, err := io.Copy(d.Hash(), f)
	return Layer{Path: path, Digest: d.Digest(), Size: n}, err
}

// Import gives containerd an image of layers, lowest first, as an archive in the OCI image layout, and unpacks nothing.
func (e *Engine) Import(ctx context.Context, name string, args []string, layers ...Layer) (client.Image, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(WriteArchive(w, name, args, layers...)) }()
	list, err := e.Client.Import(ctx, r)
	r.CloseWithError(errors.Join(err, io.ErrClosedPipe))
	if err != nil {
		return nil, fmt.Errorf("importing %s: %w", name, err)
	}
	if len(list) != 1 || list[0].Name != name {
		return nil, fmt.Errorf("importing %s: containerd made %d images of the archive", name, len(list))
	}
	return client.NewImage(e.Client, list[0]), nil
}

func imageConfig(args []string, layers []digest.Digest) ocispec.Image {
	return ocispec.Image{
		Created: &Epoch, Platform: ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config: ocispec.ImageConfig{Cmd: args, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: layers},
	}
}

// blob is a piece of JSON under its digest.
type blob struct {
	desc ocispec.Descriptor
	text []byte
}

func makeBlob(mediaType string, v any) (blob, error) {
	text, err := json.Marshal(v)
	return blob{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}, text}, err
}

// makeManifest makes an image's configuration and manifest.
func makeManifest(config ocispec.Image, layers []ocispec.Descriptor) (c, m blob, err error) {
	if c, err = makeBlob(ocispec.MediaTypeImageConfig, config); err != nil {
		return c, m, err
	}
	m, err = makeBlob(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: c.desc, Layers: layers})
	return c, m, err
}

// WriteArchive writes an image of layers, lowest first, as an archive in the OCI image layout.
func WriteArchive(out io.Writer, name string, args []string, layers ...Layer) error {
	var ids []digest.Digest
	var descs []ocispec.Descriptor
	for _, l := range layers {
		ids = append(ids, l.Digest)
		descs = append(descs, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.Digest, Size: l.Size})
	}
	config, manifest, err := makeManifest(imageConfig(args, ids), descs)
	if err != nil {
		return err
	}
	platform := platforms.DefaultSpec()
	manifest.desc.Platform = &platform
	manifest.desc.Annotations = map[string]string{images.AnnotationImageName: name}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{manifest.desc}})
	if err != nil {
		return err
	}
	w := tar.NewWriter(out)
	file := func(name string, size int64, r io.Reader) error {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, ModTime: Epoch, Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		_, err := io.Copy(w, r)
		return err
	}
	blobName := func(d digest.Digest) string { return "blobs/sha256/" + d.Encoded() }
	for _, f := range []struct {
		name string
		text []byte
	}{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {"index.json", index},
		{blobName(config.desc.Digest), config.text}, {blobName(manifest.desc.Digest), manifest.text}} {
		if err := file(f.name, int64(len(f.text)), bytes.NewReader(f.text)); err != nil {
			return err
		}
	}
	done := map[digest.Digest]bool{}
	for _, l := range layers {
		if done[l.Digest] {
			continue
		}
		done[l.Digest] = true
		f, err := os.Open(l.Path)
		if err != nil {
			return err
		}
		if err := errors.Join(file(blobName(l.Digest), l.Size, f), f.Close()); err != nil {
			return err
		}
	}
	return w.Close()
}

// Diff is the layer, complete and uncompressed, that a container's root filesystem has over its image.
func (e *Engine) Diff(ctx context.Context, c *Container) (ocispec.Descriptor, error) {
	return e.DiffOf(ctx, c.Snapshotter, c.ID())
}

// DiffOf is Diff of any snapshot.
func (e *Engine) DiffOf(ctx context.Context, snapshotter, name string) (ocispec.Descriptor, error) {
	return rootfs.CreateDiff(ctx, name, e.Client.SnapshotService(snapshotter), e.Client.DiffService(), diff.WithMediaType(ocispec.MediaTypeImageLayer))
}

// Commit makes an image of a stopped container, and of the container's root filesystem the image's topmost snapshot, as it is:
// nothing is unpacked again. The container has no root filesystem after that.
func (e *Engine) Commit(ctx context.Context, c *Container, name string) (client.Image, error) {
	ctx, done, err := e.Client.WithLease(ctx) // until the image holds them, its pieces are garbage
	if err != nil {
		return nil, err
	}
	defer done(ctx)
	layer, err := e.Diff(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("diff of %s: %w", c.ID(), err)
	}
	base, err := c.Image(ctx)
	if err != nil {
		return nil, err
	}
	image, chain, err := e.extend(ctx, base, layer, c.Snapshotter, name)
	if err != nil {
		return nil, err
	}
	return image, e.Client.SnapshotService(c.Snapshotter).Commit(ctx, chain, c.ID())
}

// extend makes an image of another one and a further layer, and names the snapshot that will be its root filesystem.
func (e *Engine) extend(ctx context.Context, base client.Image, layer ocispec.Descriptor, snapshotter, name string) (_ client.Image, chain string, _ error) {
	store := e.Client.ContentStore()
	config, err := base.Spec(ctx)
	if err != nil {
		return nil, "", err
	}
	old, err := images.Manifest(ctx, store, base.Target(), base.Platform())
	if err != nil {
		return nil, "", err
	}
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, layer.Digest)
	chain = identity.ChainID(config.RootFS.DiffIDs).String()
	c, m, err := makeManifest(config, append(old.Layers, layer))
	if err != nil {
		return nil, "", err
	}
	labels := map[string]string{"containerd.io/gc.ref.content.config": c.desc.Digest.String()}
	for i, l := range append(old.Layers, layer) {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	if err := content.WriteBlob(ctx, store, c.desc.Digest.String(), bytes.NewReader(c.text), c.desc); err != nil {
		return nil, "", err
	}
	// The same image may be there from another snapshotter: then nothing is written, and no label either.
	keeps := "containerd.io/gc.ref.snapshot." + snapshotter
	if _, err := store.Update(ctx, content.Info{Digest: c.desc.Digest, Labels: map[string]string{keeps: chain}}, "labels."+keeps); err != nil {
		return nil, "", err
	}
	if err := content.WriteBlob(ctx, store, m.desc.Digest.String(), bytes.NewReader(m.text), m.desc, content.WithLabels(labels)); err != nil {
		return nil, "", err
	}
	image, err := e.Client.ImageService().Create(ctx, images.Image{Name: name, Target: m.desc})
	return client.NewImage(e.Client, image), chain, err
}

// Programs copies programs of the host's into root, with the libraries that they load.
func Programs(ctx context.Context, root string, names ...string) error {
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			return err
		}
		files := []string{path}
		out, err := rival.Run(ctx, "ldd", path)
		if err == nil { // otherwise it is linked statically
			for _, f := range strings.Fields(out) {
				if strings.HasPrefix(f, "/") {
					files = append(files, f)
				}
			}
		}
		if err := Files(ctx, root, files...); err != nil {
			return err
		}
	}
	return nil
}

// Files copies files of the host's into root, to the same paths. What a link points to is copied in its place.
func Files(ctx context.Context, root string, paths ...string) error {
	for _, p := range paths {
		to := filepath.Join(root, p)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if _, err := rival.Run(ctx, "cp", "-rL", "--preserve=mode", "--reflink=never", p, to); err != nil {
			return err
		}
	}
	return nil
}

// Package copies the files of an installed Debian package into root, as they are: owners, modes, links.
func Package(ctx context.Context, root, name string) error {
	list, err := rival.Run(ctx, "dpkg-query", "--listfiles", name)
	if err != nil {
		return err
	}
	var paths []string
	for line := range strings.Lines(list) {
		p := strings.TrimSpace(line)
		// What dpkg was told to leave out, such as manual pages, is not there. Names below /bin, /lib and /sbin are
		// links' names on a merged-/usr system: tar does not follow them.
		if _, err := os.Lstat(p); err == nil && p != "/." {
			if real, err := filepath.EvalSymlinks(filepath.Dir(p)); err == nil {
				p = filepath.Join(real, filepath.Base(p))
			}
			paths = append(paths, strings.TrimPrefix(p, "/"))
		}
	}
	pack := exec.CommandContext(ctx, "tar", "--create", "--no-recursion", "--xattrs", "--directory=/", "--null", "--verbatim-files-from", "--files-from=-")
	pack.Stdin = strings.NewReader(strings.Join(paths, "\x00"))
	unpack := exec.CommandContext(ctx, "tar", "--extract", "--xattrs", "--preserve-permissions", "--same-owner", "--keep-directory-symlink", "--directory", root)
	var said, saidToo bytes.Buffer
	pack.Stderr, unpack.Stderr = &said, &saidToo
	if unpack.Stdin, err = pack.StdoutPipe(); err != nil {
		return err
	}
	if err := unpack.Start(); err != nil {
		return err
	}
	err = pack.Run()
	if err = errors.Join(err, unpack.Wait()); err != nil {
		return fmt.Errorf("copying package %s: %w: %s", name, err, said.String()+saidToo.String())
	}
	return nil
}

// Skeleton makes the directories and links that every root filesystem has, with /usr merged as Debian's is, and busybox as
// its shell and tools.
func Skeleton(ctx context.Context, root string) error {
	for _, d := range []string{"dev", "etc", "proc", "run", "sys", "tmp", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "var/tmp", "root", "srv"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+d, filepath.Join(root, d)); err != nil {
			return err
		}
	}
	if err := errors.Join(os.Chmod(filepath.Join(root, "tmp"), 0o1777), os.Chmod(filepath.Join(root, "var/tmp"), 0o1777),
		os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"), 0o644),
		os.WriteFile(filepath.Join(root, "etc/group"), []byte("root:x:0:\nnogroup:x:65534:\n"), 0o644)); err != nil {
		return err
	}
	if err := Programs(ctx, root, "busybox"); err != nil {
		return err
	}
	path, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	applets, err := rival.Run(ctx, "busybox", "--list")
	if err != nil {
		return err
	}
	if want := filepath.Join(root, "usr/bin/busybox"); path != "/usr/bin/busybox" {
		if err := os.Rename(filepath.Join(root, path), want); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for a := range strings.FieldsSeq(applets) {
		if err := os.Symlink("busybox", filepath.Join(root, "usr/bin", a)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}
