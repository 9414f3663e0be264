# What the Python SDK's client of revision 2025-11-25 sees, through a gateway, of everything-server without sessions, as
# one JSON object: "translatedSeen" of translated.go. Argument: a JSON object as for translated.mjs.
import asyncio
import json
import sys
import warnings

from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_types import (
    CreateMessageResult,
    ElicitResult,
    ListRootsResult,
    LoggingMessageNotification,
    ResourceUpdatedNotification,
    Root,
    TextContent,
    ToolListChangedNotification,
)

warnings.simplefilter("ignore")  # that roots, sampling and logging are deprecated is known
INPUTS = ["elicitation", "sampling", "list_roots", "request_state", "multiple_inputs", "multi_round", "tampered_state"]


async def sample(context, params):
    return CreateMessageResult(role="assistant", model="m", content=TextContent(type="text", text="Grüße"))


async def elicit(context, params):
    return ElicitResult(action="accept", content={"name": "Ada", "color": "green", "ok": True, "context": "rain"})


async def list_roots(context):
    return ListRootsResult(roots=[Root(uri="file:///waybill/one", name="one")])


def connect(url, told):
    return Client(
        streamable_http_client(url),
        mode="legacy",
        sampling_callback=sample,
        elicitation_callback=elicit,
        list_roots_callback=list_roots,
        message_handler=told,
    )


async def main(url, odd, **_):
    logs, updates, changes = asyncio.Queue(), asyncio.Queue(), asyncio.Queue()

    async def told(message):
        match message:
            case LoggingMessageNotification(params=params):
                logs.put_nowait(params.data)
            case ResourceUpdatedNotification(params=params):
                updates.put_nowait(str(params.uri))
            case ToolListChangedNotification():
                changes.put_nowait(True)

    async def take(queue, fits=lambda entry: True):
        async with asyncio.timeout(20):
            while not fits(entry := await queue.get()):
                pass
            return entry

    async with connect(url, told) as client:

        async def text(name, **options):
            return (await client.call_tool(name, {}, **options)).content[0].text

        seen = {"Revision": client.protocol_version, "Progress": []}
        seen["Tools"] = len((await client.list_tools()).tools)
        seen["Inputs"] = [await text(f"test_input_required_result_{name}") for name in INPUTS]
        prompt = await client.get_prompt("test_input_required_result_prompt", {})
        seen["Inputs"].append(prompt.messages[0].content.text)

        async def report(done, total, message):
            seen["Progress"].append(done)

        await text("test_tool_with_progress", progress_callback=report)
        await client.set_logging_level("info")
        await text("test_tool_with_logging")
        seen["Logged"] = await take(logs, lambda data: data == "Tool execution completed")
        await text("test_trigger_tool_change")
        seen["Changed"] = await take(changes)
        await client.subscribe_resource("test://watched-resource")
        seen["Updated"] = await take(updates)
        await client.unsubscribe_resource("test://watched-resource")
        seen["Resources"] = len((await client.list_resources()).resources)
        seen["Read"] = (await client.read_resource("test://static-text")).contents[0].text
        try:
            await client.read_resource("test://not-there")
        except MCPError as error:
            seen["Missing"] = error.code

    async with connect(odd, told) as client:
        seen["OddTools"] = [tool.name for tool in (await client.list_tools()).tools]
        seen["Odd"] = (await client.call_tool("list", {})).content[0].text
    print(json.dumps(seen))


asyncio.run(main(**json.loads(sys.argv[1])))
