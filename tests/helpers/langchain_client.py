"""LangChain's ChatOpenAI against a server: ``langchain_client.py URL IMAGE QUESTION`` prints its answers.

It runs in an environment of LangChain's own; IMAGE is a file that holds a data: URL.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI


def main() -> None:
    """Ask in every way that people do."""
    url, image_file, question = sys.argv[1:]
    image = Path(image_file).read_text()
    chat = ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    shown = {"type": "image_url", "image_url": {"url": image}}
    asked = [HumanMessage([{"type": "text", "text": question}, shown])]
    kind, _, encoded = image.removeprefix("data:").partition(";base64,")
    block = {"type": "image", "mime_type": kind, "base64": encoded}
    fixed = ChatOpenAI(
        model="tiny",
        base_url=f"{url}/v1",
        api_key="none",
        max_tokens=3,
        temperature=0,
        logprobs=True,
        stop=["zzz"],
        seed=1,
        extra_body={"visual_exit": {"policy": "fixed:1"}},
        include_response_headers=True,
    )
    history = [
        SystemMessage("answer"),
        HumanMessage([{"type": "text", "text": "how many ?"}, shown]),
        AIMessage("two"),
        HumanMessage("what color ?"),
    ]
    found: dict[str, Any] = {
        "text": chat.invoke("how many ?").content,
        "image": told(chat.invoke(asked)),
        "block": told(chat.invoke([HumanMessage([{"type": "text", "text": question}, block])])),
        "fixed": told(fixed.invoke(asked)),
        "history": told(chat.invoke(history)),
        "stream": [chunk.content for chunk in chat.stream(asked)],
        "usage": next(
            chunk.usage_metadata for chunk in chat.stream(asked, stream_usage=True) if chunk.usage_metadata
        ),
        "batch": [one.content for one in chat.batch([asked, "how many ?", history])],
        "async": asyncio.run(several(chat, asked)),
    }
    try:
        chat.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke(asked)
    except Exception as error:
        found["tools"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


async def several(chat: ChatOpenAI, asked: list[Any]) -> list[str]:
    """Streams at the same time."""

    async def one() -> str:
        return "".join([chunk.content async for chunk in chat.astream(asked)])

    return list(await asyncio.gather(*(one() for _ in range(4))))


def told(reply: Any) -> dict[str, Any]:
    """What of a reply is compared."""
    logprobs = (reply.response_metadata.get("logprobs") or {}).get("content") or []
    return {
        "content": reply.content,
        "finish_reason": reply.response_metadata.get("finish_reason"),
        "usage": reply.usage_metadata,
        "tokens": [one["token"] for one in logprobs],
        "metadata": {
            k: v for k, v in reply.response_metadata.items() if k not in ("logprobs", "token_usage")
        },
    }


if __name__ == "__main__":
    main()
