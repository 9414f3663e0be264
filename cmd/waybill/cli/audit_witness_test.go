package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What the configuration says of witnesses is checked when it is read.
func TestWitnessConfig(t *testing.T) {
	const (
		one = "one.example+72598a16+BAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB"
		log = "log.example+51aa5f6c+AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB"
	)
	good := `witnesses: [{url: "https://one.example/w/", key: "` + one + `"}]`
	for text, want := range map[string]string{
		good: "",
		good + "\n  quorum: 1\n  witness_every: 1m":                               "",
		good + "\n  quorum: 2":                                                    "audit.quorum: 2 is not one of 0 to 1, as many as there are witnesses",
		"quorum: 1":                                                               "audit.quorum: 1 is not one of 0 to 0",
		good + "\n  quorum: -1":                                                   "audit.quorum: -1 is not",
		good + "\n  witness_every: 10ms":                                          "audit.witness_every: 10ms is not from 1s to 1h",
		good + "\n  witness_every: often":                                         "audit.witness_every: time: invalid duration",
		strings.Replace(good, "https:", "ftp:", 1):                                `audit.witnesses[0].url: "ftp://one.example/w/" is not an http or https URL`,
		strings.Replace(good, "https://one.example/w/", "", 1):                    `audit.witnesses[0].url: "" is not`,
		strings.Replace(good, "//one", "//me:secret@one", 1):                      "audit.witnesses[0].url: it has more than a host and a path",
		strings.Replace(good, "w/\"", "w/?a=b\"", 1):                              "audit.witnesses[0].url: it has more than a host and a path",
		strings.Replace(good, "w/\"", "w/?\"", 1):                                 "audit.witnesses[0].url: it has more than a host and a path",
		strings.Replace(good, "w/\"", "w#\"", 1):                                  "audit.witnesses[0].url: it has more than a host and a path",
		strings.Replace(good, "//one.example", "//:80", 1):                        `audit.witnesses[0].url: "https://:80/w/" is not an http or https URL`,
		strings.Replace(good, "72598a16", "00000000", 1):                          "audit.witnesses[0].key: not a witness's key (cosignature/v1: name+hash+base64 of a byte 04 and an Ed25519 public key): its hash is 72598a16, not \"00000000\"",
		strings.Replace(good, one, log, 1):                                        "audit.witnesses[0].key: not a witness's key (cosignature/v1: name+hash+base64 of a byte 04 and an Ed25519 public key): its type is 1",
		strings.Replace(good, `"}`, `", timeout: 2m}`, 1):                         "audit.witnesses[0].timeout: 2m0s is not up to 1m",
		strings.Replace(good, `"}`, `", timeout: soon}`, 1):                       "audit.witnesses[0].timeout: time: invalid duration",
		strings.Replace(good, `"}`, `", name: x}`, 1):                             `unknown field "name"`,
		strings.Replace(good, "}]", `}, {url: "http://two", key: "`+one+`"}]`, 1): `audit.witnesses[1].key: witness "one.example" is there twice`,
	} {
		_, err := parseConfig([]byte("audit:\n  "+text+"\n"), t.TempDir())
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s\n%v, not %q", text, err, want)
		}
	}
	// Keys are given one by one, or in a file.
	file := filepath.Join(t.TempDir(), "witnesses")
	if err := os.WriteFile(file, []byte("\n"+one+"\n"+one+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	known, err := addWitnesses(nil, file)
	if err == nil {
		known, err = addWitnesses(known, one)
	}
	if err != nil || len(known) != 1 || known[0].Name() != "one.example" {
		t.Errorf("%v %v", known, err)
	}
	if _, err := addWitnesses(nil, file+".pub"); err == nil || !strings.HasPrefix(err.Error(), "no such file, and not a witness's key") {
		t.Error(err)
	}
	if err := os.WriteFile(file, []byte(one+"\n"+log+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := addWitnesses(nil, file); err == nil || !strings.HasPrefix(err.Error(), file+": \""+log+"\": not a witness's key") {
		t.Error(err)
	}
	if _, err := addWitnesses(nil, os.DevNull); err == nil || !strings.Contains(err.Error(), "there is no key in it") {
		t.Error(err)
	}
}
