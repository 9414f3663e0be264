// What the TypeScript SDK's client is answered at several endpoints, as one JSON array: for each, what "Answered" of
// calls.go holds. Argument: a JSON object with
//   era     "modern": the client finds out the revision by itself; "legacy": it asks for a session
//   visits  of each endpoint its "url", and "calls", each with "tool" and "args"
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';

const { era, visits } = JSON.parse(process.argv[2]);
const seen = [];
for (const { url, calls } of visits) {
  const client = new Client({ name: 'waybill-test-calls', version: '1' }, era === 'modern' ? { versionNegotiation: { mode: 'auto' } } : {});
  const transport = new StreamableHTTPClientTransport(new URL(url));
  await client.connect(transport);
  const answered = { Revision: client.getNegotiatedProtocolVersion(), Texts: [], Failed: [] };
  answered.Tools = (await client.listTools()).tools.map(({ name }) => name);
  for (const { tool, args } of calls) {
    const result = await client.callTool({ name: tool, arguments: args });
    answered.Texts.push(result.content.map(({ text }) => text).join('\n'));
    answered.Failed.push(result.isError === true);
  }
  if (era === 'legacy') await transport.terminateSession();
  await client.close();
  seen.push(answered);
}
console.log(JSON.stringify(seen));
