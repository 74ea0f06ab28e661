// What the canvas alone can do for these nodes, in both of ComfyUI's frontends: open workflows that
// are older than the widget "channels", grey out a sparsity that is not used, and give the text on
// a node the room that it needs.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const APPLY = "LDCPApplyDynamicPruning";
const TEXT = "$$node-text-preview"; // ComfyUI's widget for the text on a node
const MARGIN = 20; // around that widget: above and below, left and right
const HIGHEST = 200; // ComfyUI's own limit; what is longer scrolls

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** A workflow saved without "channels" said all by its sparsity: -1 was "as learned". */
function bringUpToDate(node, saved) {
  const channels = widgetOf(node, "channels");
  const sparsity = widgetOf(node, "sparsity");
  const known = saved.widgets_values?.[node.widgets.indexOf(channels)];
  if (channels.options.values.includes(known)) return;
  const linked = node.inputs?.some((input) => input.name === "sparsity" && input.link != null);
  const asLearned = sparsity.value < 0 && !linked;
  channels.value = asLearned ? "as learned" : "a share";
  if (asLearned) sparsity.value = 0.3;
}

function greyOut(node) {
  const sparsity = widgetOf(node, "sparsity");
  sparsity.disabled = widgetOf(node, "channels").value === "as learned";
  node.setDirtyCanvas?.(true, true);
}

function watchChannels(node) {
  const channels = widgetOf(node, "channels");
  const before = channels.callback;
  channels.callback = function () {
    before?.apply(this, arguments);
    greyOut(node);
  };
  greyOut(node);
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

app.registerExtension({
  name: "LDCP",
  beforeRegisterNodeDef(nodeType, { name }) {
    if (name !== APPLY) return;
    const { onNodeCreated, onConfigure } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      watchChannels(this);
    };
    nodeType.prototype.onConfigure = function (saved) {
      onConfigure?.apply(this, arguments);
      bringUpToDate(this, saved);
      greyOut(this);
    };
  },
  setup() {
    const makeAllRoom = () =>
      app.canvas.graph.nodes.filter((node) => node.type.startsWith("LDCP")).forEach(makeRoom);
    // after ComfyUI's own listener, which makes the widget
    api.addEventListener("progress_text", () => requestAnimationFrame(makeAllRoom));
  },
});
