// What the browser alone can do for these nodes, in both of ComfyUI's frontends: open workflows and
// prompts that are older than the widget "channels" or "corrections", grey out a sparsity that is not used, give the
// text on a node the room that it needs, and say in a toast what a node off the screen cannot.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const APPLY = "LDCPApplyDynamicPruning";
const CALIBRATE = "LDCPCalibrateGates";
const TEXT = "$$node-text-preview"; // ComfyUI's widget for the text on a node
const MARGIN = 20; // around that widget: above and below, left and right
const HIGHEST = 200; // ComfyUI's own limit; what is longer scrolls
const TOAST_SECONDS = 20;

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** Without "channels" the sparsity that was told said it all: -1 was "as learned". */
function readChannels(node, told) {
  const linked = node.inputs?.some((input) => input.name === "sparsity" && input.link != null);
  const asLearned = told < 0 && !linked;
  widgetOf(node, "channels").value = asLearned ? "as learned" : "a share";
  if (asLearned) widgetOf(node, "sparsity").value = 0.3;
}

function greyOut(node) {
  const sparsity = widgetOf(node, "sparsity");
  sparsity.disabled = widgetOf(node, "channels").value === "as learned";
  node.setDirtyCanvas?.(true, true);
}

function afterwards(widget, act) {
  const before = widget.callback;
  widget.callback = function (told) {
    before?.apply(this, arguments); // which brings the value into the widget's range
    act(told);
  };
}

/** A prompt in the API's format tells a new node one widget after the other, sparsity first. */
function watch(node) {
  let known = false; // whether "channels" has been told
  afterwards(widgetOf(node, "channels"), () => {
    known = true;
    greyOut(node);
  });
  afterwards(widgetOf(node, "sparsity"), (told) => {
    if (!known) readChannels(node, told);
    greyOut(node);
  });
  const { onConfigure } = node;
  node.onConfigure = function (saved) {
    onConfigure?.apply(this, arguments);
    const channels = widgetOf(node, "channels");
    const value = saved.widgets_values?.[node.widgets.indexOf(channels)];
    if (!channels.options.values.includes(value))
      readChannels(node, widgetOf(node, "sparsity").value);
    known = true;
    greyOut(node);
  };
  greyOut(node);
}

/** A workflow without "corrections" made none. ComfyUI 0.3.64 may have saved a text in its place. */
function watchCorrections(node) {
  const { onConfigure } = node;
  node.onConfigure = function (saved) {
    onConfigure?.apply(this, arguments);
    const corrections = widgetOf(node, "corrections");
    const value = saved.widgets_values?.[node.widgets.indexOf(corrections)];
    if (typeof value !== "boolean") corrections.value = false;
  };
}

/** Height of a text in the classic canvas, which gives every text two lines. */
function heightOf(text, width) {
  const box = document.createElement("div");
  box.className = "text-xs px-4 py-2 break-all";
  box.style.cssText = `position: absolute; visibility: hidden; white-space: pre-line; width: ${width}px`;
  box.textContent = text.replace(/&#(\d+);/g, (_, code) => String.fromCharCode(code));
  document.body.append(box);
  const height = box.offsetHeight;
  box.remove();
  return Math.min(height, HIGHEST);
}

function makeRoom(node) {
  const text = widgetOf(node, TEXT);
  if (!text || window.LiteGraph.vueNodesMode) return; // Nodes 2.0 makes it itself
  text.options.getMinHeight = () => heightOf(text.value, node.size[0] - MARGIN) + MARGIN;
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas?.(true, true);
}

/** Whether a node is on the canvas; one in a subgraph has the id "outer:inner". */
function onCanvas(id) {
  const path = String(id).split(":");
  const last = path.pop();
  let graph = app.rootGraph ?? app.graph;
  for (const outer of path) graph = graph?.getNodeById(outer)?.subgraph;
  return graph === app.canvas.graph && graph.getNodeById(last)?.type === APPLY;
}

app.registerExtension({
  name: "LDCP",
  beforeRegisterNodeDef(nodeType, { name }) {
    const watcher = { [APPLY]: watch, [CALIBRATE]: watchCorrections }[name];
    if (!watcher) return;
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      watcher(this);
    };
  },
  setup() {
    const makeAllRoom = () =>
      app.canvas.graph.nodes.filter((node) => node.type.startsWith("LDCP")).forEach(makeRoom);
    // after ComfyUI's own listener, which makes the widget
    api.addEventListener("progress_text", () => requestAnimationFrame(makeAllRoom));

    const said = new Set(); // several nodes in a row notice the same
    api.addEventListener("execution_start", () => said.clear());
    api.addEventListener("ldcp.notes", ({ detail: { node, notes } }) => {
      const fresh = onCanvas(node) ? [] : notes.filter((note) => !said.has(note));
      fresh.forEach((note) => said.add(note));
      const severity = "warn", summary = "Apply Dynamic Pruning", life = 1000 * TOAST_SECONDS;
      for (const detail of fresh) app.extensionManager.toast.add({ severity, summary, detail, life });
    });
  },
});
