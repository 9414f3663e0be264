package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The users. Their passwords are in NAME.password of the directory.
//
//	gateway   reads and writes the database waybill
//	reader    reads it, and can change no setting; all its queries together
//	          have half of the memory, so that they do not stop the writer
//	default   whom the engine itself logs in as, from loopback and without a
//	          password, which cannot be changed. It may do nothing but start
//	          listeners, and that as often as the two statements at the start
//	          do, in 68 years: its quota is used up before anybody else comes.
//	          What quotas do not count, a SELECT of constants, is too long for
//	          it: a statement of it may have two parts.
const users = `<clickhouse>
  <users>
    <default>
      <password></password>
      <networks><ip>127.0.0.1</ip></networks>
      <profile>boot</profile><quota>boot</quota>
      <grants><query>GRANT SYSTEM LISTEN ON *.*</query></grants>
    </default>
    <gateway>
      <password_sha256_hex>%s</password_sha256_hex>
      <networks><ip>127.0.0.1</ip></networks>
      <profile>default</profile><quota>any</quota>
      <grants>
        <query>GRANT SELECT, INSERT, ALTER, CREATE, DROP, TRUNCATE, OPTIMIZE, SHOW ON waybill.*</query>
        <query>GRANT TABLE ENGINE ON *</query>
        <query>GRANT SELECT ON system.processes</query>
        <query>GRANT SELECT ON system.parts</query>
      </grants>
    </gateway>
    <reader>
      <password_sha256_hex>%s</password_sha256_hex>
      <networks><ip>127.0.0.1</ip></networks>
      <profile>reader</profile><quota>any</quota>
      <grants><query>GRANT SELECT, SHOW ON waybill.*</query></grants>
      <default_database>waybill</default_database>
    </reader>
  </users>
  <profiles>
    <default><implicit_select>0</implicit_select></default>
    <boot>
      <max_ast_elements>2</max_ast_elements>
      <constraints><max_ast_elements><const></const></max_ast_elements></constraints>
    </boot>
    <reader>
      <readonly>1</readonly><implicit_select>0</implicit_select>
      <max_block_size>2048</max_block_size>
      <max_execution_time>300</max_execution_time>
      <max_memory_usage_for_user>%d</max_memory_usage_for_user>
      <max_concurrent_queries_for_user>20</max_concurrent_queries_for_user>
      <cancel_http_readonly_queries_on_client_close>1</cancel_http_readonly_queries_on_client_close>
    </reader>
  </profiles>
  <quotas>
    <any></any>
    <boot><interval><duration>2147000000</duration><queries>2</queries></interval></boot>
  </quotas>
</clickhouse>
`

const server = `<clickhouse>
  <max_server_memory_usage>%d</max_server_memory_usage>
  <mark_cache_size>67108864</mark_cache_size>
  <uncompressed_cache_size>0</uncompressed_cache_size>
  <user_files_path>%s</user_files_path>
  <users_config>users.xml</users_config>
</clickhouse>
`

// configure writes the engine's configuration, with passwords that are made
// once.
func configure(dir, file string, memory int64) error {
	if err := os.MkdirAll(filepath.Join(dir, "none"), 0o700); err != nil {
		return err
	}
	var hashes []any
	for _, user := range []string{"gateway", "reader"} {
		p, err := password(filepath.Join(dir, user+".password"))
		if err != nil {
			return fmt.Errorf("password of %s: %w", user, err)
		}
		hash := sha256.Sum256([]byte(p))
		hashes = append(hashes, hex.EncodeToString(hash[:]))
	}
	return errors.Join(
		write(filepath.Join(dir, "users.xml"), fmt.Sprintf(users, append(hashes, memory/2)...)),
		write(file, fmt.Sprintf(server, memory, escape(filepath.Join(dir, "none")))),
	)
}

func password(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err == nil && len(strings.TrimSpace(string(b))) >= 20 {
		return strings.TrimSpace(string(b)), nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	p := rand.Text()
	return p, write(file, p+"\n")
}

// write makes a file whole or not at all, and for its owner only.
func write(file, text string) error {
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func escape(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(s)
}
