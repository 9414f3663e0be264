// Checks a proof of `waybill audit prove`: node verify.mjs PROOF.json KEY, where KEY
// is the public key as audit.pub has it. It needs nothing but Node, and nothing of
// Waybill. RFC 6962 §2.1 (hashes), RFC 9162 §2.1.3.2 (inclusion), C2SP signed-note.
import { createHash, createPublicKey, verify } from "node:crypto";
import { readFileSync } from "node:fs";

const sha256 = (...parts) => parts.reduce((h, p) => h.update(p), createHash("sha256")).digest();
const fail = (why) => {
  console.error(why);
  process.exit(1);
};
const proof = JSON.parse(readFileSync(process.argv[2], "utf8"));
const [, name, encoded] = process.argv[3].match(/^([^+]+)\+[0-9a-f]{8}\+(.+)$/) ?? fail("not a public key");
const key = Buffer.from(encoded, "base64"); // a byte 01 and the key
if (key[0] !== 1 || key.length !== 33) fail("not an Ed25519 key");

// The checkpoint is signed with the key.
const cut = proof.checkpoint.indexOf("\n\n") + 1;
const text = proof.checkpoint.slice(0, cut);
const [origin, sizeLine, rootLine] = text.split("\n");
const id = sha256(name, "\n", key).subarray(0, 4);
const spki = Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), key.subarray(1)]);
const publicKey = createPublicKey({ key: spki, format: "der", type: "spki" });
const signed = proof.checkpoint.slice(cut + 1).split("\n").some((line) => {
  const [dash, who, sig] = line.split(" ");
  if (dash !== "—" || who !== name) return false;
  const b = Buffer.from(sig, "base64");
  return b.subarray(0, 4).equals(id) && verify(null, Buffer.from(text), publicKey, b.subarray(4));
});
if (!signed || origin !== name) fail("the checkpoint is not signed with this key");

// The record is leaf `number` of the tree that the checkpoint is of.
let fn = BigInt(proof.number);
let sn = BigInt(sizeLine) - 1n;
if (fn > sn) fail("the tree has no such leaf");
let r = sha256(Buffer.from([0]), proof.record);
for (const p of proof.path.map((h) => Buffer.from(h, "base64"))) {
  if (sn === 0n) fail("the path is too long");
  if (fn & 1n || fn === sn) {
    r = sha256(Buffer.from([1]), p, r);
    while (!(fn & 1n) && fn !== 0n) [fn, sn] = [fn >> 1n, sn >> 1n];
  } else r = sha256(Buffer.from([1]), r, p);
  [fn, sn] = [fn >> 1n, sn >> 1n];
}
if (sn !== 0n || r.toString("base64") !== rootLine) fail("the record is not in the tree");

// What was said is what the record has the digests of.
const leaf = JSON.parse(proof.record);
const salt = Buffer.from(proof.salt ?? "", "hex");
const size = (s) => Buffer.from(Buffer.byteLength(s).toString(16).padStart(8, "0"), "hex");
const header = Object.entries(proof.header ?? {}).sort(([a], [b]) => (a < b ? -1 : 1));
const headers = header.flatMap(([name, all]) => all.flatMap((v) => [size(name), size(v), name, v]));
if (proof.header !== undefined && sha256(salt, Buffer.from([0]), ...headers).toString("hex") !== leaf.head)
  fail("the headers are not those in the record");
if (proof.body_base64 !== undefined) {
  const body = sha256(salt, Buffer.from([1]), Buffer.from(proof.body_base64, "base64"));
  if (body.toString("hex") !== leaf.body) fail("the body is not the one in the record");
}
const what = leaf.to ? `that ${leaf.stream} had nothing from ${leaf.seq} to ${leaf.to}` : `${leaf.stream} ${leaf.seq}`;
console.log(`proved: ${what} is leaf ${proof.number} of ${sizeLine}`);
