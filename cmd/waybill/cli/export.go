package cli

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"waybill.dev/schemas"
)

// exportCommand is `waybill export`.
func exportCommand(ctx context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("export", flag.ContinueOnError)
	connect := clientFlags(fs)
	out := fs.String("o", "", "write `FILE` (default: SESSION.waybill)")
	redact := fs.Bool("redact-bodies", false, "leave out what was said; that it was this can be proven with the gateway's original")
	from := fs.String("from", fromStream, "where the events are read: `F`, stream (the log) or clickhouse (the record)")
	rest, err := parse(env, fs, args)
	switch {
	case err != nil:
		return err
	case len(rest) == 2 && *out == "":
		*out = rest[1]
	case len(rest) != 1:
		return usagef("name one session; `waybill sessions` lists them")
	}
	if err := schemas.CheckToken(rest[0]); err != nil {
		return usagef("%q is no session key: %v", rest[0], err)
	}
	if *from != fromStream && *from != fromRecord {
		return usagef("--from %q: there are stream and clickhouse", *from)
	}
	r := replaying{session: schemas.SessionKey(rest[0]), from: *from}
	r.connect = sync.OnceValues(func() (*client, error) { return connect(env) })
	c, err := r.connect()
	if err != nil {
		return err
	}
	q := url.Values{"from": {*from}}
	if *redact {
		q.Set("redact", "bodies")
	}
	if *out == "" {
		*out = rest[0] + ".waybill"
	}
	raw := rawLines(ctx, c, "/api/v1/sessions/"+rest[0]+"/export", q)
	keys, err := r.trusted()
	if err != nil {
		return err
	}
	var v *verification
	err = writeFile(*out, func(w io.Writer) (err error) {
		v, err = verifyExport(exportLines(kept(raw, w)), keys, true)
		return err
	})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "%s: %s of session %s, %d proven under the signed tree of %d leaves\n", *out, count(v.Events, "event"), v.Session, v.Leaves, v.Size)
	for _, note := range v.Notes {
		_, _ = fmt.Fprintf(env.Stderr, "%s\n", visible(note))
	}
	if err == nil {
		err = v.err() // it is written, as it is; but nobody is to think that it is whole
	}
	return err
}

// kept copies lines to a writer as they go by.
func kept(lines iter.Seq2[[]byte, error], w io.Writer) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for line, err := range lines {
			if err == nil {
				_, err = w.Write(line)
			}
			if !yield(line, err) || err != nil {
				return
			}
		}
	}
}

// writeFile makes a file whole or not at all, readable by its owner.
func writeFile(name string, write func(io.Writer) error) (err error) {
	// What is no file, such as /dev/stdout, must not be replaced by one, nor a link.
	if real, err := filepath.EvalSymlinks(name); err == nil {
		name = real
	}
	if st, err := os.Lstat(name); err == nil && !st.Mode().IsRegular() {
		return fmt.Errorf("%s is there and is no file", name)
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*.new")
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(f, 256<<10)
	err = write(out)
	if err == nil {
		err = errors.Join(out.Flush(), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// importCommand is `waybill import`: it keeps an exported session beside the
// gateway's data, read-only, and never in the log.
func importCommand(_ context.Context, env Env, args []string) error {
	fs := flag.NewFlagSet("import", flag.ContinueOnError)
	file := fs.String("config", "", "configuration `FILE`, whose data directory keeps it (default: waybill.yaml, where there is one)")
	given := keyFlag(fs, " for the file's checkpoint")
	rest, err := parse(env, fs, args)
	switch {
	case err != nil:
		return err
	case len(rest) != 1:
		return usagef("name one file, as `waybill export` wrote it")
	}
	c := defaults()
	if *file == "" {
		if _, err := os.Stat("waybill.yaml"); err == nil {
			*file = "waybill.yaml"
		}
	}
	if *file != "" {
		loaded, err := loadConfig(*file)
		if err != nil {
			return err
		}
		c = *loaded
	}
	keys, err := trustedKeys(*given, func() (string, error) { return c.Data, nil })
	if err != nil {
		return err
	}
	dir := filepath.Join(c.Data, "archive")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// What is verified is what is kept, whatever becomes of the file meanwhile.
	var v *verification
	digest := sha256.New()
	copied := filepath.Join(dir, "import-"+strconv.Itoa(os.Getpid()))
	err = writeFile(copied, func(w io.Writer) (err error) {
		v, err = verifyExport(exportLines(kept(fileLines(rest[0]), io.MultiWriter(w, digest))), keys, true)
		if err != nil {
			return fmt.Errorf("%s: %w", rest[0], err)
		}
		for _, note := range v.Notes {
			_, _ = fmt.Fprintf(env.Stderr, "%s\n", visible(note))
		}
		if err := v.err(); err != nil {
			return fmt.Errorf("%s is not kept: %w", rest[0], err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	name := filepath.Join(dir, string(v.Session)+"-"+hex.EncodeToString(digest.Sum(nil)[:4])+".waybill")
	if err := errors.Join(os.Chmod(copied, 0o400), os.Rename(copied, name)); err != nil {
		return errors.Join(err, os.Remove(copied))
	}
	_, err = fmt.Fprintf(env.Stdout, "%s: %s of session %s; %s replay --from %[1]s shows it\n", name, count(v.Events, "event"), v.Session, env.Program)
	return err
}
