// What a TypeScript SDK v1 client does with tasks of revision 2025-11-25, at whatever server, as one JSON object. Arguments: a
// JSON object with
//   url     the endpoint
//   token   bearer token, or ""
//   calls   a list of {tool, args, cancel, wait}: what is called as a task, and whether it is cancelled as soon as it is one, or
//           its result is waited for without asking how it stands
//   step    "", or "begin": to make the tasks, print them and the session, and leave both as they are, or "end": to go on with them
//   tasks, session   of "begin", for "end"
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { CallToolResultSchema, CreateTaskResultSchema, ElicitRequestSchema } from '@modelcontextprotocol/sdk/types.js';

const { url, token, calls, step, tasks, session } = JSON.parse(process.argv[2]);
const related = 'io.modelcontextprotocol/related-task';

const client = new Client({ name: 'tasks', version: '1' }, { capabilities: { elicitation: {}, tasks: { requests: { elicitation: { create: {} } } } } });
const asked = [];
client.setRequestHandler(ElicitRequestSchema, async (request) => {
  asked.push({ message: request.params.message, task: request.params._meta?.[related]?.taskId });
  const of = request.params.requestedSchema.properties;
  const interpretation = of.interpretation?.oneOf[0].const;
  return { action: 'accept', content: interpretation ? { interpretation } : { name: 'n' + asked.length } };
});
const transport = new StreamableHTTPClientTransport(new URL(url), {
  sessionId: session || undefined, requestInit: token ? { headers: { Authorization: 'Bearer ' + token } } : {},
});
if (session) transport.setProtocolVersion('2025-11-25');
await client.connect(transport);
const experimental = client.experimental.tasks;

const outcome = async (id, out) => {
  try {
    const result = await experimental.getTaskResult(id, CallToolResultSchema);
    out.text = result.content[0].text;
    out.isError = result.isError;
    out.related = result._meta?.[related]?.taskId;
  } catch (e) {
    out.code = e.code;
    out.message = e.message;
  }
};
const begin = ({ tool, args }) => client.request({ method: 'tools/call', params: { name: tool, arguments: args, task: { ttl: 300000 } } }, CreateTaskResultSchema);
const list = async () => {
  const ids = [];
  let cursor;
  do {
    const page = await experimental.listTasks(cursor);
    ids.push(...page.tasks.map((t) => t.taskId));
    cursor = page.nextCursor;
  } while (cursor);
  return ids;
};

const out = { calls: [] };
switch (step) {
  case 'begin':
    out.tasks = [];
    for (const call of calls) out.tasks.push((await begin(call)).task.taskId);
    out.session = transport.sessionId;
    break;
  case 'end':
    for (const task of tasks) {
      const of = { task, status: (await experimental.getTask(task)).status };
      out.calls.push(of);
      await outcome(task, of);
      of.after = (await experimental.getTask(task)).status;
    }
    out.listed = await list();
    break;
  default:
    out.capabilities = client.getServerCapabilities().tasks;
    out.tools = Object.fromEntries((await client.listTools()).tools.map((t) => [t.name, t.execution?.taskSupport]));
    for (const call of calls) {
      const of = { tool: call.tool, statuses: [] };
      out.calls.push(of);
      asked.length = 0;
      if (call.cancel) {
        of.task = (await begin(call)).task.taskId;
        while (call.begun && !(await experimental.getTask(of.task)).statusMessage) await new Promise((again) => setTimeout(again, 50));
        of.statuses.push((await experimental.cancelTask(of.task)).status);
        try {
          await experimental.cancelTask(of.task);
        } catch (e) {
          of.again = e.code;
        }
        await outcome(of.task, of);
        continue;
      }
      if (call.wait) {
        of.task = (await begin(call)).task.taskId;
        await outcome(of.task, of);
        continue;
      }
      for await (const m of experimental.callToolStream({ name: call.tool, arguments: call.args }, CallToolResultSchema, { task: { ttl: 300000 } })) {
        if (m.type === 'taskCreated') of.task = m.task.taskId;
        else if (m.type === 'taskStatus') of.statuses.push(m.task.status);
        else if (m.type === 'result') {
          of.text = m.result.content[0].text;
          of.isError = m.result.isError;
          of.related = m.result._meta?.[related]?.taskId;
        }
      }
      if (!of.text) await outcome(of.task, of); // the SDK's loop does not ask what has failed
      of.asked = asked.map((a) => a.message);
      of.strange = asked.filter((a) => a.task !== of.task).length;
    }
    out.listed = await list();
    try {
      await experimental.getTask('no-such-task');
    } catch (e) {
      out.unknown = e.code;
    }
}
console.log(JSON.stringify(out));
if (step === 'begin') process.exit(0); // without ending the session
await client.close();
