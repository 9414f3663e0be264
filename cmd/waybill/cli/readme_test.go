package cli

import (
	"encoding/json"
	"go/format"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"waybill.dev/schemas"
)

// root is the module's directory as seen from here.
var root = filepath.Join("..", "..", "..")

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// fences are the README's blocks by their language.
func fences(t *testing.T) map[string][]string {
	blocks := map[string][]string{}
	for _, m := range regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$").FindAllStringSubmatch(read(t, "README.md"), -1) {
		blocks[m[1]] = append(blocks[m[1]], m[2])
	}
	return blocks
}

// What README shows is what the program takes and prints.
func TestReadme(t *testing.T) {
	readme, blocks := read(t, "README.md"), fences(t)
	if have, want := slices.Sorted(maps.Keys(blocks)), []string{"go", "js", "json", "sh", "text", "yaml"}; !slices.Equal(have, want) {
		t.Errorf("blocks of %v, want %v: a language that is not looked at may say anything", have, want)
	}

	var help strings.Builder
	usage(&help, commands())
	if !slices.Contains(blocks["text"], help.String()) {
		t.Error("README does not show the text of `waybill --help`")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "petstore.yaml"), []byte(read(t, "workers/dispatch/testdata/openapi/petstore.yaml")), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, b := range blocks["yaml"] {
		// Who copies it must put in a token of their own.
		if _, err := parseConfig([]byte(b), dir); err == nil || !strings.Contains(err.Error(), "token_sha256: not a SHA-256") {
			t.Errorf("%staken as it is: %v", b, err)
		}
		own := strings.ReplaceAll(b, "SHA256_OF_A_TOKEN_OF_YOURS", strings.Repeat("5a", 32))
		if _, err := parseConfig([]byte(own), dir); err != nil {
			t.Errorf("%s%v", own, err)
		}
	}
	for _, b := range blocks["json"] {
		checkJSON(t, strings.TrimSpace(b))
	}
	for _, b := range blocks["go"] {
		if formatted, err := format.Source([]byte(b)); err != nil || string(formatted) != b {
			t.Errorf("not as gofmt writes it (%v):\n%s", err, b)
		}
	}
	for _, b := range blocks["sh"] {
		for line := range strings.Lines(strings.ReplaceAll(b, "\\\n", " ")) {
			checkShell(t, strings.TrimSpace(line))
		}
	}
	// Commands and targets named in the text, too.
	for _, m := range regexp.MustCompile("`(waybill|make) ([^`]+)`").FindAllStringSubmatch(readme, -1) {
		checkShell(t, m[1]+" "+m[2])
	}

	for _, code := range schemas.Failures() {
		if !strings.Contains(readme, "| `"+string(code)+"` |") {
			t.Errorf("README does not say what the failure %s means", code)
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^//\tGET (\S+)`).FindAllStringSubmatch(read(t, "cmd/waybill/cli/admin.go"), -1) {
		if path := strings.Replace(m[1], "/S/", "/SESSION/", 1); !strings.Contains(readme, "`GET "+path) {
			t.Errorf("README does not show GET %s of the admin API", path)
		}
	}
	// What is linked to is there.
	for _, m := range regexp.MustCompile(`\]\(([^)#:]+)\)`).FindAllStringSubmatch(readme, -1) {
		if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
			t.Errorf("README links to %s: %v", m[1], err)
		}
	}
}

// checkJSON checks that a text is JSON, and an event where it has the form of
// one.
func checkJSON(t *testing.T, text string) {
	t.Helper()
	var form struct{ Kind, ID string }
	if err := json.Unmarshal([]byte(text), &form); err != nil && !strings.Contains(err.Error(), "cannot unmarshal") {
		t.Errorf("%s\n%v", text, err)
	}
	if form.Kind == "" {
		return
	}
	var e schemas.Event
	if err := json.Unmarshal([]byte(text), &e); err != nil || string(e.ID()) != form.ID {
		t.Errorf("not an event: %s\n%v", text, err)
	}
}

// checkShell checks a command: ours has the flags it is given, make has the
// target, and curl sends JSON.
func checkShell(t *testing.T, line string) {
	t.Helper()
	if line == "" {
		return
	}
	words := strings.Fields(line)
	switch program := words[0]; {
	case program == "waybill" && words[1] == "COMMAND":
	case program == "waybill", program == "bin/waybill":
		// The flags before --help are read first.
		var errs strings.Builder
		code := Run(t.Context(), append(slices.Clone(words[1:]), "--help"), Env{Getenv: os.Getenv, Stdout: io.Discard, Stderr: &errs})
		if code != exitOK {
			t.Errorf("%s: exit %d: %s", line, code, errs.String())
		}
	case program == "make":
		if target := words[1]; !strings.Contains(read(t, "Makefile"), "\n"+target+":") {
			t.Errorf("%s: there is no such target", line)
		}
	case program == "curl":
		if _, body, ok := strings.Cut(line, "-d '"); ok {
			checkJSON(t, strings.TrimSuffix(body, "'"))
		}
	case strings.HasPrefix(program, "build/peers/"), strings.HasPrefix(program, "TOKEN="), program == "printf":
	default:
		t.Errorf("%s: what is this?", line)
	}
}

// The example configuration is valid and shows every key there is.
func TestExampleConfig(t *testing.T) {
	if _, err := loadConfig(filepath.Join(root, "deploy", "waybill.yaml")); err != nil {
		t.Fatal(err)
	}
	example := read(t, "deploy/waybill.yaml")
	keys := yamlKeys(reflect.TypeFor[Config]())
	if !slices.Contains(keys, "in_flight_per_tenant") || !slices.Contains(keys, "file") {
		t.Fatalf("not all keys were found: %v", keys)
	}
	for _, key := range keys {
		if !regexp.MustCompile(`(?m)(^|[\s{])` + key + `:`).MatchString(example) {
			t.Errorf("deploy/waybill.yaml does not mention %s", key)
		}
	}
}

// yamlKeys are the keys of a type and of what it holds.
func yamlKeys(t reflect.Type) []string {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return yamlKeys(t.Elem())
	case reflect.Struct:
		var keys []string
		for i := range t.NumField() {
			f := t.Field(i)
			if key, _, _ := strings.Cut(f.Tag.Get("yaml"), ","); key != "" && key != "-" {
				keys = append(keys, append(yamlKeys(f.Type), key)...)
			}
		}
		return keys
	}
	return nil
}
