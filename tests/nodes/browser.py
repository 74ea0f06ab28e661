"""A real browser on ComfyUI's canvas: drop a workflow, change widgets, press keys, queue, wait.

Needs `playwright` and a Chromium: the one that ``LDCP_TEST_CHROMIUM`` names, or one on the path.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from comfy_server import Server

RUN_SECONDS = 600
#: how the templates menu marks its tiles
TILE = "template-workflow-"
LOAD_SECONDS = 180

#: reads the file as a drop from the file manager would give it to the canvas
DROP = """([name, type, bytes]) => {
    const binary = Uint8Array.from(atob(bytes), c => c.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([binary], name, {type}));
    const where = document.querySelector("#graph-canvas");
    const box = where.getBoundingClientRect();
    const at = {clientX: box.x + 700, clientY: box.y + 500, bubbles: true, cancelable: true};
    for (const kind of ["dragenter", "dragover", "drop"])
        where.dispatchEvent(new DragEvent(kind, {...at, dataTransfer: data}));
}"""

#: the canvas is there, and knows this pack
READY = """() => window.LiteGraph?.registered_node_types['LDCPLoadGates'] && window.app?.graph"""

#: what the canvas has: nodes, links whose ends know each other, marks of errors
STATE = """() => {
    const graph = window.app.graph;
    return {
        nodes: graph.nodes.map(n => ({
            id: n.id, type: n.type, title: n.title, mode: n.mode,
            red: !!n.has_errors || n.id in (window.app.lastNodeErrors ?? {}),
            known: n.type in window.LiteGraph.registered_node_types,
            widgets: Object.fromEntries((n.widgets ?? []).map(w => [w.name, w.value])),
        })),
        links: [...graph.links.values()].map(l => {
            const from = graph.getNodeById(l.origin_id)?.outputs[l.origin_slot];
            const to = graph.getNodeById(l.target_id)?.inputs[l.target_slot];
            const whole = !!from && !!to && to.link === l.id && from.links.includes(l.id)
                && window.LiteGraph.isValidConnection(from.type, to.type);
            return {id: l.id, whole};
        }),
        dialogs: [...document.querySelectorAll(".p-dialog")].map(d => d.innerText),
    };
}"""

SET_WIDGETS = """([name, number, values]) => {
    const node = window.app.graph.nodes.filter(n => n.type === name || n.title === name)[number];
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find(w => w.name === name);
        widget.value = value;
        widget.callback?.(value);
    }
    window.app.graph.setDirtyCanvas(true, true);
}"""

#: a node alone on an empty canvas
ADD = """([type]) => {
    const graph = window.app.graph;
    graph.clear();
    const node = window.LiteGraph.createNode(type);
    node.pos = [500, 300];
    graph.add(node);
    Object.assign(window.app.canvas.ds, {scale: 1, offset: [0, 0]});
    window.app.graph.setDirtyCanvas(true, true);
}"""

#: brings a node to the upper left corner; the room it takes there, with title and name of its pack
CORNER = """([type, number]) => {
    const node = window.app.graph.nodes.filter(n => n.type === type)[number];
    const box = document.querySelector("#graph-canvas").getBoundingClientRect();
    const scale = Math.min(1, (box.height - 160) / (node.size[1] + 68));
    const offset = [100 - node.pos[0], 160 - node.pos[1]];
    Object.assign(window.app.canvas.ds, {scale, offset});
    window.app.graph.setDirtyCanvas(true, true);
    return {x: box.x + 88 * scale, y: box.y + 104 * scale,
            width: (node.size[0] + 24) * scale, height: (node.size[1] + 68) * scale};
}"""

#: brings the whole graph into view
FIT = "() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"

#: closes the panel on the right, which newer frontends leave open after a refusal
CLOSE_PANEL = """async () => {
    const name = "Comfy.RightSidePanel.IsOpen";
    if (name in window.app.ui.settings.settingsLookup)
        await window.app.extensionManager.setting.set(name, false);
}"""

#: where the graph in view is on the screen, with a margin
AREA = """() => {
    const {scale, offset} = window.app.canvas.ds, {nodes} = window.app.graph;
    const box = document.querySelector("#graph-canvas").getBoundingClientRect();
    const left = Math.min(...nodes.map(n => n.pos[0])) - 30;
    const top = Math.min(...nodes.map(n => n.pos[1])) - 70;
    const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 30;
    const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 50;
    return {x: box.x + (left + offset[0]) * scale, y: box.y + (top + offset[1]) * scale,
            width: (right - left) * scale, height: (bottom - top) * scale};
}"""

#: where a node's title is on the screen
TITLE = """([type, number]) => {
    const node = window.app.graph.nodes.filter(n => n.type === type)[number];
    const {scale, offset} = window.app.canvas.ds;
    const box = document.querySelector("#graph-canvas").getBoundingClientRect();
    return [box.x + (node.pos[0] + offset[0] + 60) * scale,
            box.y + (node.pos[1] + offset[1] - 15) * scale];
}"""

#: where a widget of a class's first node is on the screen
WIDGET = """([type, name]) => {
    const node = window.app.graph.nodes.find(n => n.type === type);
    const number = node.widgets.findIndex(w => w.name === name);
    if (window.LiteGraph.vueNodesMode) {
        const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
        const row = drawn.querySelectorAll('[data-testid="node-widget"]')[number];
        const {x, y, height} = row.getBoundingClientRect();
        return [x + 30, y + height / 2];
    }
    const {scale, offset} = window.app.canvas.ds;
    const box = document.querySelector("#graph-canvas").getBoundingClientRect();
    return [box.x + (node.pos[0] + offset[0] + 60) * scale,
            box.y + (node.pos[1] + offset[1] + node.widgets[number].last_y + 10) * scale];
}"""

#: turns Nodes 2.0 on or off; whether the page has them (an older frontend hides what it began)
NODES_2 = """async ([on]) => {
    const name = "Comfy.VueNodes.Enabled";
    if (window.app.ui.settings.settingsLookup[name]?.type === "hidden") return !on;
    await window.app.extensionManager.setting.set(name, on);
    return true;
}"""

#: for every node the id, and the room it takes in the graph: left, top, right, bottom
ROOM = """() => window.app.graph.nodes.map(node => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
    const [x, y] = node.pos;
    if (drawn && window.LiteGraph.vueNodesMode)  // in units of the graph, however far it is zoomed
        return [node.id, x, y - 30, x + drawn.offsetWidth, y - 30 + drawn.offsetHeight];
    return [node.id, x, y - 30, x + node.size[0], y + node.size[1]];
})"""

#: the lines that a node's text is drawn in, and by how many pixels they are cut off
TEXT = """([start]) => {
    const has = element => element.innerText?.trim().startsWith(start);
    const found = [...document.querySelectorAll("body div, body p, body span")].filter(has).at(-1);
    if (!found) return null;
    const range = document.createRange();
    range.selectNodeContents(found);
    const bottom = range.getBoundingClientRect().bottom;
    const frame = found.closest(".dom-widget, [data-node-id]");
    let cut = 0;
    for (let part = found; part !== frame.parentElement; part = part.parentElement)
        if (part === frame || getComputedStyle(part).overflowY !== "visible")
            cut = Math.max(cut, bottom - part.getBoundingClientRect().bottom);
    return {lines: found.innerText.trim().split(/\\n+/), cut};
}"""

#: puts the nodes of these classes into one closed subgraph
ENCLOSE = """([types]) => {
    const {graph} = window.app.canvas;
    graph.convertToSubgraph(new Set(graph.nodes.filter(n => types.includes(n.type))));
}"""

#: joins an output to an input; a node is its title or class, and which one of them
CONNECT = """([from, output, to, input]) => {
    const find = ([name, number]) => window.app.graph.nodes.filter(
        n => n.title === name || n.type === name)[number];
    const source = find(from), target = find(to), slot = target.findInputSlot(input);
    if (!source.connect(source.findOutputSlot(output), target, slot))
        throw Error(`${from} ${output} cannot be joined to ${to} ${input}`);
}"""

#: takes all nodes of these classes off the canvas
REMOVE = """([types]) => {
    const {graph} = window.app;
    graph.nodes.filter(n => types.includes(n.type)).forEach(n => graph.remove(n));
}"""

#: a mark of an error stays on a node until the next run that is accepted
FORGIVE = """() => {
    window.app.lastNodeErrors = null;
    window.app.graph.nodes.forEach(n => { n.has_errors = false; });
}"""


def missing() -> str | None:
    """Why no browser can be had here; None when one can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed in ComfyUI's Python"
    if chromium() is None:
        return "no Chromium was found (set LDCP_TEST_CHROMIUM, or put one on the path)"
    return None


def chromium() -> str | None:
    named = os.environ.get("LDCP_TEST_CHROMIUM")
    known = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    return next((found for name in known if (found := shutil.which(name))), None)


class Browser:
    """``with Browser(server) as browser``: one page with an empty canvas."""

    def __init__(self, server: Server, size: tuple[int, int] = (1440, 880), scale: float = 1.5):
        self._server = server
        self._view = {"viewport": dict(zip(("width", "height"), size, strict=True))}
        self._view["device_scale_factor"] = scale

    def __enter__(self) -> Browser:
        from playwright.sync_api import sync_playwright

        with ExitStack() as undo:
            playwright = undo.enter_context(sync_playwright())
            arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            launched = playwright.chromium.launch(executable_path=chromium(), args=arguments)
            undo.callback(launched.close)
            self.page = launched.new_page(**self._view)
            self._load()
            self._undo = undo.pop_all()  # a page that did not open leaves nothing behind
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _load(self) -> None:
        self.page.goto(f"http://{self._server.address}/", timeout=1000 * LOAD_SECONDS)
        self.page.wait_for_function(READY, timeout=1000 * LOAD_SECONDS)

    def use_language(self, code: str) -> None:
        """Set the language of the page, such as "zh", for all pages to come."""
        self.page.evaluate(
            "code => window.app.extensionManager.setting.set('Comfy.Locale', code)", code
        )
        self.page.wait_for_timeout(1000)
        self._load()

    def drop(self, path: Path) -> None:
        """Drop a workflow file on the canvas, and wait until all of its nodes are there."""
        kind = {".json": "application/json", ".png": "image/png"}[path.suffix]
        content = base64.b64encode(path.read_bytes()).decode()
        self.page.evaluate(DROP, [path.name, kind, content])
        saved = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        nodes = len(saved.get("nodes", saved))  # a prompt in the API's format is its nodes alone
        self.page.wait_for_function(
            f"() => window.app.graph.nodes.length === {nodes}", timeout=1000 * LOAD_SECONDS
        )
        self.page.wait_for_timeout(500)  # widgets get their values after the nodes

    def state(self) -> dict[str, Any]:
        return self.page.evaluate(STATE)

    def set_widgets(self, node: str, number: int = 0, **values: Any) -> None:
        """Set widgets of the ``number``-th node of a class, or of a title."""
        self.page.evaluate(SET_WIDGETS, [node, number, values])

    def set_all(self, node_type: str, **values: Any) -> None:
        """Set widgets of all nodes of a class."""
        for number in range([n["type"] for n in self.state()["nodes"]].count(node_type)):
            self.set_widgets(node_type, number, **values)

    def use_nodes_2(self, on: bool) -> bool:
        """Draw nodes as Nodes 2.0 or in the classic canvas; False where the page cannot."""
        return self.page.evaluate(NODES_2, [on])

    def room(self) -> list[list[float]]:
        """For every node its id, and left, top, right and bottom of what it takes in the graph."""
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(700)
        return self.page.evaluate(ROOM)

    def text(self, start: str) -> dict[str, Any]:
        """The lines of the text that begins so, as drawn, and by how many pixels they are cut."""
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(700)
        return self.page.evaluate(TEXT, [start])

    def lines(self, start: str) -> list[str]:
        """The same as they are now, whatever is in sight; none where there is no such text."""
        found = self.page.evaluate(TEXT, [start])
        return found["lines"] if found else []

    def show(self, text: str) -> None:
        """Scroll a text into sight."""
        self.page.get_by_text(text).last.scroll_into_view_if_needed()

    def add(self, node_type: str) -> None:
        """Empty the canvas, and put one node on it."""
        self.page.evaluate(ADD, [node_type])
        self.page.wait_for_timeout(500)

    def enclose(self, *node_types: str) -> None:
        """Put the nodes of some classes into one closed subgraph."""
        self.page.evaluate(ENCLOSE, [node_types])
        self.page.wait_for_timeout(500)

    def remove(self, *node_types: str) -> None:
        """Take the nodes of some classes off the canvas."""
        self.page.evaluate(REMOVE, [node_types])

    def connect(
        self, source: tuple[str, int], output: str, target: tuple[str, int], name: str
    ) -> None:
        """Join an output to an input; a node is its title or class, and which one of them."""
        self.page.evaluate(CONNECT, [source, output, target, name])

    def command(self, name: str) -> None:
        """What a menu or a key does, such as "Comfy.BrowseTemplates"."""
        self.page.evaluate("n => window.app.extensionManager.command.execute(n)", name)

    def has_command(self, name: str) -> bool:
        return self.page.evaluate(
            "n => window.app.extensionManager.command.commands.some(c => c.id === n)", name
        )

    def open_templates(self, pack: str) -> None:
        """Open a pack's part of the templates menu."""
        self.command("Comfy.BrowseTemplates")
        self.page.get_by_text(pack, exact=True).first.click(timeout=1000 * LOAD_SECONDS)
        self._tiles().first.wait_for(timeout=1000 * LOAD_SECONDS)

    def tiles(self) -> dict[str, int]:
        """For every tile of the open templates menu its name, and the width of its picture."""
        found = {}
        for tile in self._tiles().all():
            tile.scroll_into_view_if_needed()  # pictures are loaded when they come in sight
            self.page.wait_for_timeout(500)
            width = tile.locator("img").first.evaluate("picture => picture.naturalWidth")
            found[tile.get_attribute("data-testid").removeprefix(TILE)] = width
        self._tiles().first.scroll_into_view_if_needed()
        return found

    def _tiles(self) -> Any:
        return self.page.locator(f'[data-testid^="{TILE}"]')

    def open_template(self, name: str) -> None:
        """Click on a tile of the open templates menu."""
        tile = self.page.get_by_test_id(f"{TILE}{name}")
        tile.scroll_into_view_if_needed()
        self.page.wait_for_timeout(500)  # the menu takes no click while it scrolls
        tile.click()
        self._tiles().first.wait_for(state="hidden", timeout=1000 * LOAD_SECONDS)
        self.page.wait_for_timeout(500)

    def search(self, word: str) -> list[str]:
        """Type a word into the box that adds nodes: the names it offers, best first."""
        self.command("Workspace.SearchBox.Toggle")
        self.page.wait_for_timeout(1000)
        self.page.keyboard.type(word)
        self.page.wait_for_timeout(1500)
        texts = self.page.locator("[role=option]").all_inner_texts()
        return [text.splitlines()[0].strip() for text in texts if text.strip()]

    def choose(self, name: str) -> None:
        """Choose a name that the search has found; its node is then on the canvas."""
        nodes = len(self.state()["nodes"])
        self.page.locator("[role=option]").filter(has_text=name).first.click()
        self.page.wait_for_function("n => window.app.graph.nodes.length > n", arg=nodes)
        self.page.wait_for_timeout(500)
        self.page.mouse.click(240, 250)  # a newer frontend puts it where one clicks
        self.page.wait_for_function("() => !window.app.graph.nodes.some(n => n.flags.ghost)")
        self.page.mouse.move(240, 130)  # no tooltip
        self.page.wait_for_timeout(1000)

    def open_app(self) -> None:
        """Show the workflow in app mode, past its tutorial."""
        self.command("Comfy.ToggleLinear")
        self.page.get_by_role("button", name="Skip").click()
        self.page.wait_for_timeout(1000)

    def app_inputs(self) -> list[str]:
        """The lines beside the inputs of the open app."""
        return self.page.get_by_test_id("linear-widgets").inner_text().splitlines()

    def run_app(self) -> None:
        self.page.get_by_test_id("linear-run-button").get_by_role("button").last.click()

    def app_outputs(self) -> int:
        """How many images the open app shows."""
        shown = self.page.get_by_test_id("linear-center-panel").locator("img")
        drawn = shown.evaluate_all("all => all.filter(i => i.naturalWidth > 0).map(i => i.src)")
        return len(set(drawn))

    def toasts(self) -> list[str]:
        """The texts of the messages that lie over the page, but for the host's own."""
        texts = self.page.locator(".p-toast-message").all_inner_texts()
        return [" ".join(text.split()) for text in texts if "Pruning" in text]

    def open_help(self, node_type: str) -> None:
        """Open the help of a node by the button that appears when it is chosen."""
        self.page.mouse.click(*self.page.evaluate(TITLE, [node_type, 0]))
        self.page.locator('[data-testid="info-button"]').click(timeout=1000 * LOAD_SECONDS)
        self.page.locator(".node-help-content h1").wait_for(timeout=1000 * LOAD_SECONDS)

    def help(self) -> tuple[str, list[int]]:
        """The first headline of the open help page, and the widths of its pictures in pixels."""
        self.page.wait_for_timeout(500)
        pictures = self.page.locator(".node-help-content img")
        widths = pictures.evaluate_all("all => all.map(picture => picture.naturalWidth)")
        return self.page.locator(".node-help-content h1").first.inner_text(), widths

    def tooltip(self, node_type: str, widget: str) -> str:
        """What appears when the mouse rests on a widget."""
        self.page.mouse.move(*self.page.evaluate(WIDGET, [node_type, widget]))
        shown = self.page.locator(".node-tooltip:visible, .p-tooltip:visible")
        shown.wait_for(timeout=1000 * LOAD_SECONDS)
        return shown.inner_text()

    def press(self, keys: str, node_type: str, number: int = 0) -> None:
        """Click on a node's title, and press keys such as "Control+b"."""
        self.page.mouse.click(*self.page.evaluate(TITLE, [node_type, number]))
        self.page.wait_for_timeout(200)
        self.keys(keys)

    def keys(self, keys: str) -> None:
        """Press keys on what is chosen."""
        self.page.keyboard.press(keys)
        self.page.wait_for_timeout(500)

    def close_dialogs(self) -> None:
        """Close the messages of a refusal, and take its marks off the nodes."""
        self.keys("Escape")
        self.forgive()

    def forgive(self) -> None:
        """Take the marks of errors off the nodes."""
        self.page.evaluate(FORGIVE)

    def queue(
        self,
        meanwhile: Callable[[], None] = lambda: None,
        start: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Queue what is on the canvas and wait for its end; the server's record of the run.

        ``meanwhile`` is called again and again while it runs; ``start`` presses another button.
        Raises RuntimeError with the server's message when it was refused or failed.
        """
        known = set(self._history())
        (start or self._queue)()
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            self.page.wait_for_timeout(200)
            meanwhile()
            new = {k: v for k, v in self._history().items() if k not in known}
            if new:
                (run,) = new.values()
                if run["status"]["status_str"] != "success":
                    raise RuntimeError(json.dumps(run["status"])[-2000:])
                self.page.wait_for_timeout(700)  # the last events reach the canvas
                return run
            if any(node["red"] for node in self.state()["nodes"]):
                raise RuntimeError(f"refused: {self._refusal()}")
        raise TimeoutError(f"nothing came back in {RUN_SECONDS} s")

    def send(self) -> Any:
        """Queue what is on the canvas, and wait for no more than the server's answer."""
        with self.page.expect_response("**/prompt") as answer:
            self._queue()
        return answer.value

    def _queue(self) -> None:
        self.page.evaluate("() => window.app.queuePrompt(0)")

    def _refusal(self) -> str:
        """What the page says about a refused graph; newer frontends fold the node's own words."""
        for unfolds in ('button:has-text("View details")', 'button[aria-label^="Info for"]'):
            self.page.wait_for_timeout(1000)
            for button in self.page.locator(unfolds).all():
                button.click()
        self.page.wait_for_timeout(500)
        return self.page.locator("body").inner_text()

    def _history(self) -> dict[str, Any]:
        return json.loads(self._server.get("/history"))

    def images(self, run: dict[str, Any]) -> dict[str, bytes]:
        """Prefix of the file name -> content of every image that a run shows."""
        found = {}
        for output in run["outputs"].values():
            for saved in output.get("images", []):
                found[saved["filename"].rsplit("_", 2)[0]] = self._server.get("/view", **saved)
        return found

    def picture(self, path: Path, node_type: str | None = None) -> Path:
        """A picture of the page, or of one node, once the images on the nodes are drawn."""
        if node_type:
            part = {"clip": self.page.evaluate(CORNER, [node_type, 0])}
        else:
            self.page.evaluate(FIT)
            part = {}
        return self._picture(path, **part)

    def picture_of_graph(self, path: Path) -> Path:
        """A picture of all nodes, without what lies around them."""
        self.page.evaluate(CLOSE_PANEL)
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(1000)
        return self._picture(path, clip=self.page.evaluate(AREA))

    def _picture(self, path: Path, **part: Any) -> Path:
        height = self._view["viewport"]["height"]
        self.page.mouse.move(150, height - 15)  # an empty place: no tooltip
        self.page.wait_for_timeout(1500)
        self.page.screenshot(path=str(path), **part)
        return path
