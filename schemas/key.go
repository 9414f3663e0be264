package schemas

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"time"
)

// token32 writes bytes with the characters that a subject allows, in the
// order of the bytes (RFC 4648 §7, lower case).
var token32 = base32.NewEncoding("0123456789abcdefghijklmnopqrstuv").WithPadding(base32.NoPadding)

// NewSessionKey names the session that a principal calls name. It is a hash,
// so that nobody can name the session of another tenant or principal, and
// every replica derives the same.
func NewSessionKey(t Tenant, a Agent, name string) SessionKey {
	h := sha256.New()
	for _, s := range []string{"waybill session", string(t), string(a), name} {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	return SessionKey("s" + token32.EncodeToString(h.Sum(nil)[:16]))
}

// NewCallID mints a call's identity: 48 bits of milliseconds, so that ids sort
// by age, and 80 random bits, so that none can be guessed.
func NewCallID(now time.Time) CallID {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], uint64(now.UnixMilli())<<16)
	_, _ = rand.Read(b[6:]) // never fails (crypto/rand since Go 1.24)
	return CallID("c" + token32.EncodeToString(b[:]))
}

// NewReplica mints the name of an edge process that has none yet.
func NewReplica() Replica {
	var b [5]byte
	_, _ = rand.Read(b[:]) // never fails
	return Replica("e" + token32.EncodeToString(b[:]))
}
