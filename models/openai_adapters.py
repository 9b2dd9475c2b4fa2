"""Policies on OpenAI-compatible endpoints: adapters of ours, loaded into `vllm serve` while it runs.

The endpoint serves the policy's base and sees the home under the same path:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank 128

A server does not tell which revision of its base it serves: start it with the preset's. vLLM warns that whoever reaches
such a server may load adapters into it: keep it inside a network of your own.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from models.engine import EngineConfigurationError, LocalModel

Ask = Callable[[str, str, dict[str, Any] | None], Awaitable[httpx.Response]]  # method, URL, body

KNOWN = "already been loaded"  # what vLLM says when another request was faster


async def introduce(model: LocalModel, url: str, ask: Ask) -> str:
    """The name under which the endpoint serves this model; its adapter is loaded there, named by its digest.

    Raises:
        EngineConfigurationError: the endpoint serves another base, or does not load the adapter.
    """
    listed = await ask("GET", f"{url}/models", None)
    served = {one["id"]: one.get("root") for one in listed.json()["data"]} if listed.status_code == 200 else {}
    base = next((name for name, root in served.items() if root == model.weights), None)
    if base is None:
        revision = f" --revision {model.ref.revision}" if model.ref.revision else ""
        raise EngineConfigurationError(
            f"{url} serves {sorted(map(str, served.values()))}, but the policy's base is {model.weights!r}; start it "
            f"with `vllm serve {model.weights}{revision}`, where the home has the same path as here"
        )
    name = model.ref.adapter
    if name is None:
        return str(base)
    if name not in served:
        body = {"lora_name": name, "lora_path": model.adapter}
        reply = await ask("POST", f"{url}/load_lora_adapter", body)
        if reply.status_code != 200 and KNOWN not in reply.text:
            raise EngineConfigurationError(
                f"{url} does not load the adapter {model.adapter} (HTTP {reply.status_code}: {_said(reply)}); the "
                "server must see that folder, and be started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora "
                "and a --max-lora-rank that is not below the adapter's"
            )
    return name


def _said(reply: httpx.Response) -> str:
    try:
        return str(json.loads(reply.text)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return reply.text[:300]
