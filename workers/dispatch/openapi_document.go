package dispatch

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
)

const (
	// maxDocument bounds the files of a document together. GitHub's, one of
	// the largest there are, has 12 MB.
	maxDocument      = 32 << 20
	maxDocumentFiles = 200

	// A file that was modified so shortly before it was read may be modified
	// again within the same tick of its clock, and is read again.
	fileClock = 2 * time.Second
)

// readAPI is a document as it was read: syntax and references are sound.
type readAPI struct {
	*openapi3.T
	pin string // SHA-256 in hex, over all files
}

// fileState tells whether a file is what it was.
type fileState struct {
	name     string // relative to the document's directory
	modified time.Time
	size     int64
	read     time.Time
}

// readDocument reads a document and what it refers to, which must lie in its
// directory or below; links that lead out count as outside. The states are
// returned with an error too, of what was read before it.
func readDocument(file string, now func() time.Time) (_ *readAPI, _ []fileState, err error) {
	root, err := os.OpenRoot(filepath.Dir(file))
	if err != nil {
		return nil, nil, fmt.Errorf("the OpenAPI document: %w", err)
	}
	defer root.Close()

	contents, states, left := map[string][]byte{}, map[string]fileState{}, int64(maxDocument)
	listed := func() []fileState {
		return slices.SortedFunc(maps.Values(states), func(a, b fileState) int { return cmp.Compare(a.name, b.name) })
	}
	read := func(name string) ([]byte, error) {
		if b, ok := contents[name]; ok {
			return b, nil
		}
		if len(contents) >= maxDocumentFiles {
			return nil, fmt.Errorf("the document has more than %d files", maxDocumentFiles)
		}
		info, err := root.Stat(name)
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() { // to open a pipe would wait for who writes to it
			return nil, fmt.Errorf("%s is not a file", name)
		}
		f, err := root.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		states[name] = fileState{name, info.ModTime(), info.Size(), now()}
		b, err := io.ReadAll(io.LimitReader(f, left+1))
		if err != nil {
			return nil, err
		}
		if left -= int64(len(b)); left < 0 {
			return nil, fmt.Errorf("the document has more than %d bytes", maxDocument)
		}
		contents[name] = b
		return b, nil
	}

	name := filepath.Base(file)
	main, err := read(name)
	if err != nil {
		return nil, listed(), fmt.Errorf("the OpenAPI document: %w", err)
	}
	doc, err := load(main, name, read)
	if err != nil {
		return nil, listed(), fmt.Errorf("the OpenAPI document %s: %s", name, clip(err.Error(), maxWords))
	}
	sum := sha256.New()
	for _, n := range slices.Sorted(maps.Keys(contents)) {
		if len(contents) > 1 {
			fmt.Fprintf(sum, "%s %d\n", n, len(contents[n]))
		}
		sum.Write(contents[n])
	}
	return &readAPI{doc, hex.EncodeToString(sum.Sum(nil))}, listed(), nil
}

// load parses a document and resolves its references by read.
func load(main []byte, name string, read func(string) ([]byte, error)) (doc *openapi3.T, err error) {
	// The document is read while the gateway runs, by a parser that is not
	// ours and walks whatever cycles the text describes.
	defer func() {
		if p := recover(); p != nil {
			doc, err = nil, fmt.Errorf("the parser gave up: %v", p)
		}
	}()
	loader := openapi3.NewLoader()
	loader.IsExternalRefsAllowed = true
	var outside error // the loader wraps errors beyond recognition
	loader.ReadFromURIFunc = func(_ *openapi3.Loader, u *url.URL) ([]byte, error) {
		if u.Scheme != "" || u.Host != "" || u.User != nil {
			outside = fmt.Errorf("it refers to %s: nothing is fetched; keep what is needed beside the document", u.Redacted())
			return nil, outside
		}
		b, err := read(filepath.FromSlash(u.Path))
		if err != nil {
			outside = fmt.Errorf("it refers to %s: only files in its own directory are read: %w", u.Path, err)
			return nil, outside
		}
		return b, nil
	}
	doc, err = loader.LoadFromDataWithPath(main, &url.URL{Path: filepath.ToSlash(name)})
	switch {
	case outside != nil:
		return nil, outside
	case err != nil:
		// Of the two parsers that the loader tries, the one for YAML reads JSON too.
		if _, yaml, ok := strings.Cut(err.Error(), "yaml error: "); ok {
			return nil, errors.New(yaml)
		}
		return nil, err
	case doc == nil || doc.OpenAPI == "":
		return nil, errors.New(`it has no member "openapi"; Swagger 2.0 is not read`)
	case !doc.IsOpenAPI30() && doc.OpenAPIMajorMinor() != "3.1":
		return nil, fmt.Errorf("openapi: %q is neither 3.0 nor 3.1", clip(doc.OpenAPI, 20))
	case doc.Paths.Len() == 0:
		return nil, errors.New("it has no paths")
	}
	return doc, nil
}

// unchanged tells whether all files are as they were when they were read.
func unchanged(file string, files []fileState) bool {
	root, err := os.OpenRoot(filepath.Dir(file))
	if err != nil {
		return false
	}
	defer root.Close()
	for _, f := range files {
		info, err := root.Stat(f.name)
		if err != nil || !info.ModTime().Equal(f.modified) || info.Size() != f.size || f.read.Sub(f.modified) < fileClock {
			return false
		}
	}
	return len(files) > 0
}

// baseURL checks where an API is said to be.
func baseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return nil, errors.New("the url of the API cannot be read")
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("url %q: must be http or https", u.Redacted())
	case u.User != nil:
		return nil, fmt.Errorf("url %q: holds credentials", u.Redacted())
	case u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("url %q: must have no query and no fragment", u.Redacted())
	}
	u.Path, u.RawPath = strings.TrimSuffix(u.Path, "/"), strings.TrimSuffix(u.RawPath, "/")
	return u, nil
}
