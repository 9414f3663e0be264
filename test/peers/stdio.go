package peers

import "testing"

// The commands of servers over stdio, as an operator writes them into a configuration.

// EverythingCommand is the Go SDK's everything-server, which speaks both eras.
func EverythingCommand(t testing.TB) []string {
	t.Helper()
	return []string{installed(t, "bin", "everything-server")}
}

// ServerEverythingCommand is @modelcontextprotocol/server-everything, which speaks the legacy era only.
func ServerEverythingCommand(t testing.TB) []string {
	t.Helper()
	return []string{Node(t), pkg(t, "@modelcontextprotocol", "server-everything", "dist", "index.js"), "stdio"}
}

// FilesystemCommand is @modelcontextprotocol/server-filesystem, which may read and write below dir.
func FilesystemCommand(t testing.TB, dir string) []string {
	t.Helper()
	return []string{Node(t), pkg(t, "@modelcontextprotocol", "server-filesystem", "dist", "index.js"), dir}
}

// MemoryCommand is @modelcontextprotocol/server-memory. The variable MEMORY_FILE_PATH says where it keeps what it is told.
func MemoryCommand(t testing.TB) []string {
	t.Helper()
	return []string{Node(t), pkg(t, "@modelcontextprotocol", "server-memory", "dist", "index.js")}
}
