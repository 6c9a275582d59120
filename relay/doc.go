// Package relay moves the bytes of one flow both ways until both sides have
// ended, and passes on how they ended: a half-close stays a half-close (RFC 9293
// §3.6), a reset stays a reset.
//
// It owns nothing beyond that one flow: who got the ends from a capture or an
// outbound closes them. It knows neither: fast paths are optional interfaces,
// found by type assertion, and the plain path works with any flow.Conn. router
// calls it.
package relay
