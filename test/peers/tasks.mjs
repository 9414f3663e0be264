// What a TypeScript SDK v1 client does with the tasks of revision 2025-11-25 that server-everything has, as one JSON
// object. Arguments: a JSON object with
//   url     the endpoint
//   prefix  what stands before the names of tools
//   token   bearer token, or ""
//   step    "all", or "begin": to print the task and the session and leave both as they are, or "end": to go on with them
//   task, session   of "begin", for "end"
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { CallToolResultSchema, CreateTaskResultSchema, ElicitRequestSchema } from '@modelcontextprotocol/sdk/types.js';

const { url, prefix, token, step, task, session } = JSON.parse(process.argv[2]);
const tool = prefix + 'simulate-research-query';
const related = 'io.modelcontextprotocol/related-task';

const client = new Client({ name: 'tasks', version: '1' }, { capabilities: { elicitation: {}, tasks: { requests: { elicitation: { create: {} } } } } });
const elicited = [];
client.setRequestHandler(ElicitRequestSchema, async (request) => {
  elicited.push({ message: request.params.message, related: request.params._meta?.[related]?.taskId });
  return { action: 'accept', content: { interpretation: request.params.requestedSchema.properties.interpretation.oneOf[0].const } };
});
const transport = new StreamableHTTPClientTransport(new URL(url), {
  sessionId: session || undefined, requestInit: token ? { headers: { Authorization: 'Bearer ' + token } } : {},
});
if (session) transport.setProtocolVersion('2025-11-25');
await client.connect(transport);

const begin = (args) => client.request({ method: 'tools/call', params: { name: tool, arguments: args, task: { ttl: 300000 } } }, CreateTaskResultSchema);
const finish = async (id) => {
  const result = await client.experimental.tasks.getTaskResult(id, CallToolResultSchema);
  return { text: result.content[0].text, related: result._meta?.[related]?.taskId };
};
const out = {};
switch (step) {
  case 'begin':
    out.task = (await begin({ topic: 'restarts' })).task.taskId;
    out.session = transport.sessionId;
    break;
  case 'end': {
    out.status = (await client.experimental.tasks.getTask(task)).status;
    const { text, related: id } = await finish(task);
    Object.assign(out, { text, related: id });
    break;
  }
  default: {
    // A task that asks, by the SDK's own loop.
    out.statuses = [];
    for await (const m of client.experimental.tasks.callToolStream({ name: tool, arguments: { topic: 'gateways', ambiguous: true } }, CallToolResultSchema, { task: { ttl: 300000 } })) {
      if (m.type === 'taskCreated') out.created = m.task.taskId;
      else if (m.type === 'taskStatus') out.statuses.push(m.task.status);
      else if (m.type === 'result') out.text = m.result.content[0].text;
      else if (m.type === 'error') out.error = String(m.error);
    }
    out.elicited = elicited;
    // The result again, a list, a cancel.
    out.again = await finish(out.created);
    const other = (await begin({ topic: 'cancelled' })).task.taskId;
    out.cancelled = (await client.experimental.tasks.cancelTask(other)).status;
    out.listed = (await client.experimental.tasks.listTasks()).tasks.map((t) => t.taskId).filter((id) => id === out.created || id === other).length;
    try {
      await client.experimental.tasks.getTask('no-such-task');
    } catch (e) {
      out.unknown = e.code;
    }
  }
}
console.log(JSON.stringify(out));
if (step === 'begin') process.exit(0); // without ending the session
await client.close();
