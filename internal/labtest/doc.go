// Package labtest builds small real networks for tests: network namespaces
// joined by veth pairs, real programs in them, sockets of the test process in
// them, cgroups, counters, and a check that nothing of all that is left.
//
//	func TestServerIsReached(t *testing.T) {
//		labtest.Need(t, labtest.Root, labtest.Tool("nc"))
//		lab := labtest.New(t)
//		//  client (10.9.0.1) ──── server (10.9.0.2)
//		client, server := lab.Host("client"), lab.Host("server")
//		lab.Link(client, server, "10.9.0.1/24", "10.9.0.2/24")
//		srv := server.ServeExchange(":7000")
//		conn, err := client.Dial("tcp", "10.9.0.2:7000")
//		…
//	}
//
// It owns the namespaces, cgroups and processes that it made, and nothing of
// the machine's own network: no link ends in the namespace that the test was
// started in. It is imported by tests only and imports nothing of cgtun, so
// that a test of any package may use it.
//
// The manual pages behind it: network_namespaces(7), veth(4), setns(2),
// cgroups(7).
package labtest
