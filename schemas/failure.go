package schemas

// Failure says why the gateway has no answer for a call. The set is closed;
// each adapter maps it to its protocol's errors in one table. What matters
// most to a caller is whether the upstream may have acted.
type Failure string

const (
	// Never carried out.
	FailExpired     Failure = "expired"     // the deadline passed before the upstream was called
	FailUnavailable Failure = "unavailable" // the upstream cannot be reached, or its circuit is open
	FailOverloaded  Failure = "overloaded"  // a limit of the gateway or the upstream; try again later
	FailInvalid     Failure = "invalid"     // cannot be sent as it is
	FailUndecodable Failure = "undecodable" // an event of the call cannot be read; it is kept as a dead letter

	// Idempotent, so it may be asked again.
	FailTimeout Failure = "timeout" // called, no answer by the deadline

	// Perhaps carried out: never repeated, never reported as success.
	FailUnknown Failure = "unknown"

	// The upstream acted, or at least answered.
	FailBadAnswer Failure = "bad_answer" // what it said is not the protocol
	FailTooLarge  Failure = "too_large"  // its answer passes the limit
	FailWithheld  Failure = "withheld"   // its answer is kept back: a rule for answers, or a guard, says so

	FailInternal Failure = "internal" // a fault of the gateway, after which it gave up
)

// Failures lists the closed set.
func Failures() []Failure {
	return []Failure{
		FailExpired, FailUnavailable, FailOverloaded, FailInvalid, FailUndecodable,
		FailTimeout, FailUnknown, FailBadAnswer, FailTooLarge, FailWithheld, FailInternal,
	}
}
