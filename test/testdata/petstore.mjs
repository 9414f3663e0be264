// What the TypeScript SDK's client sees of the Petstore's tools, as one JSON object. It holds structured content to
// the output schema. Arguments: the endpoint's URL, and the mode of negotiation: auto, or legacy.
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';

const client = new Client({ name: 'waybill-test-petstore', version: '1' }, { versionNegotiation: { mode: process.argv[3] } });
await client.connect(new StreamableHTTPClientTransport(new URL(process.argv[2])));
const seen = { revision: client.getNegotiatedProtocolVersion() };
seen.listed = (await client.listTools()).tools.map((tool) => tool.name);
seen.pet = (await client.callTool({ name: 'getPetById', arguments: { petId: 12 } })).structuredContent;
seen.wrong = (await client.callTool({ name: 'getPetById', arguments: { petId: 'twelve' } })).isError === true;
await client.close();
console.log(JSON.stringify(seen));
