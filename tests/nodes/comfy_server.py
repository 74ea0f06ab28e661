"""A real ComfyUI server in a folder of its own, and what a browser does with it."""

from __future__ import annotations

import asyncio
import html
import json
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CLIENT = "ldcp-tests"
TEXT_EVENT = 3  # ComfyUI's protocol.BinaryEventTypes.TEXT: the line that a node shows
START_SECONDS = 300
RUN_SECONDS = 600
#: never through a proxy: the server is on this machine
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(Exception):
    """The server found mistakes before the run; the message is what the nodes then show."""


class Failed(Exception):
    """A node raised while the prompt ran; the message is what the dialog then shows."""


@dataclass
class Result:
    #: prefix of the file name -> content of the image or latent
    files: dict[str, bytes] = field(default_factory=dict)
    #: node id -> what it shows at the end
    status: dict[str, str] = field(default_factory=dict)


def prepare_folder(base: Path, pack: Path, checkpoint: Path) -> None:
    """A fresh ComfyUI user's folder: this pack, one checkpoint; tutorial done, nothing on top.

    Text is drawn however small it is.
    """
    for folder in ("custom_nodes", "models/checkpoints", "models/ldcp_gates", "user/default"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "LDCP").symlink_to(pack, target_is_directory=True)
    (base / "models/checkpoints/v1-5-pruned-emaonly.safetensors").symlink_to(checkpoint)
    settings = base / "user" / "default" / "comfy.settings.json"
    hidden = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
    drawn = {"LiteGraph.Canvas.MinFontSizeForLOD": 0}
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True, **hidden, **drawn}))


class Server:
    """``with Server(comfyui, base) as server``: runs on the CPU at a free port until the end."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.log = base / "server.log"
        self.address = f"127.0.0.1:{free_port()}"
        self._command = [sys.executable, "main.py", "--cpu", "--base-directory", str(base)]
        self._command += ["--listen", "127.0.0.1", "--port", self.address.split(":")[1]]
        self._command += ["--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
        self._comfyui = comfyui

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._comfyui, stdout=log, stderr=log
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        tail = self.log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"ComfyUI's server did not start; the end of its log:\n{tail}")

    def get(self, path: str, **query: str) -> bytes:
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(query)}"
        with OPENER.open(url, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: dict[str, Any]) -> None:
        url, kind = f"http://{self.address}{path}", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), kind)
        with OPENER.open(request, timeout=60):
            pass

    def schemas(self) -> dict[str, dict[str, Any]]:
        """Class -> its inputs, as the browser learns them."""
        known = json.loads(self.get("/object_info"))
        return {name: node["input"] for name, node in known.items()}

    def run(self, prompt: dict[str, Any]) -> Result:
        """Queue a prompt and wait for its end. Raises Refused or Failed."""
        return asyncio.run(asyncio.wait_for(self._run(prompt), RUN_SECONDS))

    async def _run(self, prompt: dict[str, Any]) -> Result:
        result = Result()
        async with aiohttp.ClientSession(f"http://{self.address}") as session:
            async with session.ws_connect("/ws", params={"clientId": CLIENT}) as events:
                queued = {"prompt": prompt, "client_id": CLIENT}
                async with session.post("/prompt", json=queued) as answer:
                    body = await answer.json()
                # also where other outputs of the prompt are fine, and run
                if answer.status == 200:
                    await follow(events, body["prompt_id"], result)
                if body["node_errors"]:
                    raise Refused(refusal(body))
        history = json.loads(self.get(f"/history/{body['prompt_id']}"))[body["prompt_id"]]
        for output in history["outputs"].values():
            for saved in output.get("images", []) + output.get("latents", []):
                prefix = saved["filename"].rsplit("_", 2)[0]  # LDCP_basic_00001_.png
                result.files[prefix] = self.get("/view", **saved)
        return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(body: dict[str, Any]) -> str:
    errors = [error for node in body["node_errors"].values() for error in node["errors"]]
    return "\n".join(f"{error['message']}: {error['details']}" for error in errors)


async def follow(events: aiohttp.ClientWebSocketResponse, prompt_id: str, result: Result) -> None:
    """Read the server's events until this prompt has ended; collects what nodes show."""
    async for event in events:
        if event.type == aiohttp.WSMsgType.BINARY:
            kind, length = struct.unpack(">II", event.data[:8])
            if kind == TEXT_EVENT:
                node, line = event.data[8 : 8 + length], event.data[8 + length :]
                # as both frontends draw it: line breaks and references undone
                shown = html.unescape(line.decode()).replace("  \n", "\n")
                result.status[node.decode()] = shown
            continue
        message = event.json()
        if message["data"].get("prompt_id") != prompt_id:
            continue
        if message["type"] == "execution_error":
            raise Failed(message["data"]["exception_message"])
        if message["type"] == "executing" and message["data"]["node"] is None:
            return
    raise ConnectionError("the server closed the connection before the prompt had ended")
