# What the Python SDK's client sees of server-everything in a session of revision 2025-11-25, as one JSON object:
# "legacySeen" of legacy.go, whose comments say what each member is. Argument: a JSON object as for legacy.mjs.
# The SDK does every step itself. URIs come from lists, because an endpoint may rewrite them.
import asyncio
import contextlib
import json
import sys
import warnings

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_types import (
    CreateMessageResult,
    ElicitResult,
    ListRootsResult,
    LoggingMessageNotification,
    PromptReference,
    ResourceListChangedNotification,
    ResourceTemplateReference,
    ResourceUpdatedNotification,
    Root,
    TextContent,
)

warnings.simplefilter("ignore")  # that roots, sampling and logging are deprecated is known
PATIENCE = 20


class Inbox(list):
    """A list that can be waited on."""

    def __init__(self):
        super().__init__()
        self.more = asyncio.Event()

    def put(self, entry):
        self.append(entry)
        self.more.set()

    async def take(self, what, fits=lambda entry: True, start=0, patience=PATIENCE):
        """The first entry from start on that fits."""
        try:
            async with asyncio.timeout(patience):
                while True:
                    self.more.clear()
                    for entry in self[start:]:
                        if fits(entry):
                            return entry
                    await self.more.wait()
        except TimeoutError:
            raise TimeoutError(f"waited for {what}; came: {list(self)}") from None


async def pages(fetch, member):
    """All pages of a list."""
    entries, cursor = [], None
    while True:
        page = await fetch(cursor=cursor)
        entries += getattr(page, member)
        cursor = page.next_cursor
        if cursor is None:
            return entries


def names(entries):
    return [entry.name for entry in entries]


async def main(url, prefix, unique, token, command, duration, steps, **_):
    seen = {}
    logs, updates, changes = Inbox(), Inbox(), Inbox()
    roots = [Root(uri="file:///waybill/one", name="one")]
    user = {"asked": None, "answer": ElicitResult(action="accept", content={"name": "Ada", "check": True})}

    async def sample(context, params):
        user["asked"] = params.messages[0].content.text
        return CreateMessageResult(
            role="assistant", model="waybill-model", content=TextContent(type="text", text="sampled: grüße")
        )

    async def elicit(context, params):
        user["asked"] = params.message
        return user["answer"]

    async def list_roots(context):
        return ListRootsResult(roots=roots)

    async def told(message):
        match message:
            case LoggingMessageNotification(params=params):
                logs.put(params)
            case ResourceUpdatedNotification(params=params):
                updates.put(str(params.uri))
            case ResourceListChangedNotification():
                changes.put(True)

    async def logged(start, since=0):
        await logs.take(f"log {start}", lambda params: str(params.data).startswith(start), since)

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(30, read=300)) as http,
        Client(
            StdioServerParameters(command=command[0], args=command[1:])
            if command
            else streamable_http_client(url, http_client=http),
            mode="legacy",
            sampling_callback=sample,
            elicitation_callback=elicit,
            list_roots_callback=list_roots,
            message_handler=told,
        ) as client,
    ):

        async def call(name, arguments=None, **options):
            return await client.call_tool(prefix + name, arguments or {}, **options)

        async def text(name, arguments=None, **options):
            return (await call(name, arguments, **options)).content[0].text

        def find(entries, name):
            return next(entry for entry in entries if entry.name in (name, prefix + name))

        seen["Revision"] = client.protocol_version

        # Roots come first: the server asks for them when the session begins, over the GET stream, so what it then logs
        # tells that the stream is open.
        await logged("Roots updated: 1 root")
        seen["Roots"] = [await text("get-roots-list")]
        roots.append(Root(uri="file:///waybill/two", name="two"))
        await client.send_roots_list_changed()
        await logged("Roots updated: 2 root")
        seen["Roots"].append(await text("get-roots-list"))

        seen["Tools"] = names(await pages(client.list_tools, "tools"))
        seen["Echo"] = await text("echo", {"message": "grüße <&> 9007199254740993"})
        seen["Structured"] = (await call("get-structured-content", {"location": "New York"})).structured_content
        seen["Failing"] = (await call("get-resource-reference", {"resourceType": "Text", "resourceId": -1})).is_error
        try:
            seen["Unknown"] = "isError" if (await call("no-such-tool")).is_error else "result"
        except MCPError as error:
            seen["Unknown"] = f"error {error.code}"

        async def operation(duration, steps):
            progress = Inbox()

            async def report(done, total, message):
                progress.put([done, total])

            result = await text(
                "trigger-long-running-operation", {"duration": duration, "steps": steps}, progress_callback=report
            )
            if len(progress) < steps:  # the last may be on its way through the SDK
                with contextlib.suppress(TimeoutError):
                    await progress.take("the last progress", lambda entry: entry[0] == steps, patience=1)
            return result, list(progress)

        seen["Operation"], seen["Progress"] = await operation(0.2, 4)

        # What is logged below the level must not come. One that is above it tells that there is nothing more to wait for.
        resources = await pages(client.list_resources, "resources")
        seen["Resources"] = names(resources)
        document = str(find(resources, "features.md").uri)
        await client.set_logging_level("debug")
        await text("toggle-simulated-logging")
        log = await logs.take(
            "a simulated log message",
            lambda params: "-level-message" in str(params.data).lower().replace(" ", "-"),
        )
        seen["Logged"] = {"Level": log.level, "Data": log.data}
        await text("toggle-simulated-logging")
        await client.subscribe_resource(document)
        await logged("Received Subscribe")
        await text("toggle-subscriber-updates")
        seen["Updated"] = await updates.take("an updated resource") == document
        await text("toggle-subscriber-updates")
        await client.set_logging_level("error")
        await client.unsubscribe_resource(document)
        await client.set_logging_level("info")
        before = len(logs)
        await client.subscribe_resource(str(find(resources, "architecture.md").uri))
        await logged("Received Subscribe", before)
        seen["Quiet"] = not any(str(params.data).startswith("Received Unsubscribe") for params in logs)

        begun = Inbox()

        async def begin(done, total, message):
            begun.put(done)

        task = asyncio.create_task(
            call("trigger-long-running-operation", {"duration": 10, "steps": 100}, progress_callback=begin)
        )
        await begun.take("progress of the operation to be cancelled")
        task.cancel("enough")
        await asyncio.wait([task])
        seen["Cancelled"] = task.cancelled() or task.exception() is not None
        await client.send_ping()
        seen["Pinged"] = True

        seen["Prompts"] = names(await pages(client.list_prompts, "prompts"))
        prompt = await client.get_prompt(prefix + "args-prompt", {"city": "Zürich", "state": "ZH"})
        seen["Prompt"] = prompt.messages[0].content.text

        async def complete(ref, name, value, given=None):
            result = await client.complete(ref, {"name": name, "value": value}, context_arguments=given)
            return result.completion.values

        completable = PromptReference(type="ref/prompt", name=prefix + "completable-prompt")
        seen["Completed"] = [
            await complete(completable, "department", "S"),
            await complete(completable, "name", "", {"department": "Sales"}),
        ]

        templates = await pages(client.list_resource_templates, "resource_templates")
        seen["Templates"] = names(templates)
        read = (await client.read_resource(document)).contents[0]
        seen["Read"], seen["ReadURI"] = read.text, str(read.uri) == document
        template = find(templates, "Dynamic Text Resource").uri_template
        filled = await client.read_resource(template.replace("{resourceId}", "7"))
        seen["Template"] = filled.contents[0].text
        reference = ResourceTemplateReference(type="ref/resource", uri=template)
        seen["Completed"].append(await complete(reference, "resourceId", "7"))

        seen["Sampled"] = await text("trigger-sampling-request", {"prompt": "what is a waybill?"})
        seen["SampledAsked"] = user["asked"]
        elicited = await call("trigger-elicitation-request")
        seen["Elicited"] = "\n".join(block.text for block in elicited.content)
        seen["ElicitedAsked"] = user["asked"]
        user["answer"] = ElicitResult(action="decline")
        seen["Declined"] = await text("trigger-elicitation-request")

        file = f"{unique}.gz"
        await call(
            "gzip-file-as-resource", {"name": file, "data": "data:text/plain,waybill", "outputType": "resourceLink"}
        )
        await changes.take("a changed list of resources")
        added = find(await pages(client.list_resources, "resources"), file)
        seen["Added"] = (await client.read_resource(str(added.uri))).contents[0].blob

        # The tap in between cuts this call's stream after the first progress (tap.go).
        seen["ResumedOperation"], seen["Resumed"] = await operation(duration, steps)
    # Leaving the client ends the session with DELETE, or the program that it has started.
    print(json.dumps(seen))


asyncio.run(main(**json.loads(sys.argv[1])))
