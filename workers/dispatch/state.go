package dispatch

import (
	"bytes"
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strings"
	"time"

	"waybill.dev/schemas"
	"waybill.dev/schemas/jsonrpc"
)

// A requestState that the gateway gives out goes through the client and so
// through the hands of anybody. It is sealed (AES-256-GCM, each with a key of its
// own that is derived from Options.StateKey and a random salt), and bound to what
// it is for by the additional data: tenant, agent, server, and a digest of the
// method, the name and the arguments. Held against anything else it cannot be
// opened, and looks like one that somebody made up.

// errState: a requestState that is none of ours, or not for this request.
var errState = errors.New("the requestState is not valid for this request")

// errStateOld: one of ours that is for this request, and too late.
var errStateOld = errors.New("the requestState has expired")

// state is what a requestState says.
type state struct {
	Owner   string    `json:"o"`           // the dispatcher that holds the exchange
	ID      string    `json:"i,omitempty"` // of the exchange
	Round   int       `json:"r,omitempty"` // counts what the client was asked in it
	Expires time.Time `json:"e"`

	// Again says instead that the retry makes the call anew, for a server that
	// ended it: with Server as the requestState, its own, if it gave one.
	Again  bool    `json:"a,omitempty"`
	Keep   bool    `json:"k,omitempty"` // inputResponses are for the server
	Server *string `json:"s,omitempty"`
}

const (
	statePrefix = "wb1."
	stateSalt   = 16

	// maxState bounds what is looked at. A server's own state is in it.
	maxState       = 96 << 10
	maxServerState = 64 << 10
)

// mayHoldState tells cheaply of most requests that they have no requestState: its
// name stands there, or one that is written with an escape.
func mayHoldState(body []byte) bool {
	return bytes.Contains(body, []byte("requestState")) || bytes.Contains(body, []byte(`\u`))
}

// binding is what a requestState is for.
type binding struct {
	tenant schemas.Tenant
	agent  schemas.Agent
	server string
	digest [sha256.Size]byte
}

// bind reads it of a call. m is its request.
func bind(c Call, m *jsonrpc.Message) binding {
	return binding{c.Event.Tenant, c.Event.Agent, c.Requested.Server, requestDigest(m)}
}

func (b binding) bytes() []byte {
	// None of the first three can hold a NUL: tokens, and a name of the config.
	head := strings.Join([]string{statePrefix, string(b.tenant), string(b.agent), b.server}, "\x00")
	return append([]byte(head+"\x00"), b.digest[:]...)
}

// requestDigest is of what a request asks for: the same for a retry of it, whose _meta
// and whose input are others. It does not depend on the order of members, nor on
// how a text is escaped, as a client may write its retry anew.
func requestDigest(m *jsonrpc.Message) (sum [sha256.Size]byte) {
	h := sha256.New()
	put(h, 'm', []byte(m.Method()))
	members(h, m.Params(), func(name string) bool {
		return name == "_meta" || name == "inputResponses" || name == "requestState"
	})
	h.Sum(sum[:0])
	return sum
}

// put writes a piece so that no two rows of pieces are the same bytes.
func put(h hash.Hash, kind byte, b []byte) {
	var head [9]byte
	head[0] = kind
	binary.BigEndian.PutUint64(head[1:], uint64(len(b)))
	h.Write(head[:])
	h.Write(b)
}

func members(h hash.Hash, object jsonrpc.Value, but func(name string) bool) {
	type member struct {
		name string
		v    jsonrpc.Value
	}
	var all []member
	for name, v := range object.Members() {
		if but == nil || !but(name) {
			all = append(all, member{name, v})
		}
	}
	slices.SortFunc(all, func(a, b member) int { return cmp.Compare(a.name, b.name) })
	put(h, '{', nil)
	for _, m := range all {
		put(h, 'k', []byte(m.name))
		value(h, m.v)
	}
	put(h, '}', nil)
}

func value(h hash.Hash, v jsonrpc.Value) {
	switch v.Kind() {
	case jsonrpc.Object:
		members(h, v, nil)
	case jsonrpc.Array:
		put(h, '[', nil)
		for e := range v.Elements() {
			value(h, e)
		}
		put(h, ']', nil)
	case jsonrpc.String:
		text, _ := v.Text()
		put(h, 's', []byte(text))
	default:
		put(h, 'v', v.Raw())
	}
}

// sealer seals and opens states. It never changes.
type sealer struct{ key []byte }

// stateKeySize is what Options.StateKey must have.
const stateKeySize = 32

func newSealer(key []byte) (*sealer, error) {
	if key == nil {
		key = make([]byte, stateKeySize)
		_, _ = rand.Read(key) // never fails
	}
	if len(key) != stateKeySize {
		return nil, fmt.Errorf("StateKey has %d bytes, not %d", len(key), stateKeySize)
	}
	return &sealer{slices.Clone(key)}, nil
}

// aead is for one state: with a key for each, there is no number of them after
// which random nonces would be used up.
func (s *sealer) aead(salt []byte) (cipher.AEAD, error) {
	mac := hmac.New(sha256.New, s.key)
	mac.Write([]byte("waybill requestState\x00"))
	mac.Write(salt)
	block, err := aes.NewCipher(mac.Sum(nil))
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func (s *sealer) seal(st state, b binding) (string, error) {
	text, err := json.Marshal(st)
	if err != nil {
		return "", err
	}
	salt := make([]byte, stateSalt, stateSalt+len(text)+64)
	_, _ = rand.Read(salt) // never fails
	aead, err := s.aead(salt)
	if err != nil {
		return "", err
	}
	sealed := aead.Seal(salt, nil, text, b.bytes())
	return statePrefix + base64.RawURLEncoding.EncodeToString(sealed), nil
}

// strict knows one form of each text only: what differs in a byte is another.
var strict = base64.RawURLEncoding.Strict()

// open returns errState for what is not ours, or not for this, whatever is wrong
// with it, and errStateOld with the state.
func (s *sealer) open(text string, b binding, now time.Time) (state, error) {
	encoded, ok := strings.CutPrefix(text, statePrefix)
	if !ok || len(encoded) > maxState || strings.ContainsAny(encoded, "\r\n") {
		return state{}, errState
	}
	sealed, err := strict.DecodeString(encoded)
	if err != nil || len(sealed) < stateSalt {
		return state{}, errState
	}
	aead, err := s.aead(sealed[:stateSalt])
	if err != nil {
		return state{}, errState
	}
	plain, err := aead.Open(nil, nil, sealed[stateSalt:], b.bytes())
	if err != nil {
		return state{}, errState
	}
	var st state
	if err := json.Unmarshal(plain, &st); err != nil {
		return state{}, errState
	}
	if !now.Before(st.Expires) {
		return st, errStateOld
	}
	return st, nil
}
