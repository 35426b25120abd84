// What nodes show: room for their text below the widgets, the text itself where a result comes from the cache, for which
// the server sends no text of progress, and pictures that are no results.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const LEAST_PX = { PixArtModelInfo: [360, 300] };
const PICTURES = "pixart_pictures";
const TEXT = "$$node-text-preview"; // the editor's name for it
const LINE_PX = 16, LETTER_PX = 6.2, MARGINS_PX = [52, 22]; // as the editor draws it

const outermost = () => app.rootGraph ?? app.graph; // numbers inside a subgraph are others'
const WITH_BAR = [
    "PixArtTrainLoRA", "PixArtTrain", "PixArtDistillLCM", "PixArtDistillDMD", "PixArtTrainControlNet", "PixArtEncodeDataset",
    "PixArtCaptionImages",
];
const STYLE = `[data-pixart-bar] .lg-node-widgets { flex: none !important; }
[data-pixart-bar] img.object-contain { object-position: top; }`;

// Nodes 2.0 reads it as Markdown, which joins lines that do not end so.
const keepLines = text => text.replaceAll(/ *\n/g, "  \n");

// In the classic renderer, as high as its lines: what is left is the picture's, of which the editor takes half.
function fitText(node, widget) {
    const original = widget.computeLayoutSize;
    widget.computeLayoutSize = function () {
        const letters = Math.max(10, (node.size[0] - MARGINS_PX[0]) / LETTER_PX);
        const rows = String(this.value ?? "").split("\n").map(line => Math.max(1, Math.ceil(line.trim().length / letters)));
        const height = LINE_PX * Math.min(10, rows.reduce((sum, count) => sum + count, 0)) + MARGINS_PX[1];
        return { ...original.apply(this, arguments), minHeight: height, maxHeight: height };
    };
}

// In Nodes 2.0 the text and the picture of a node that works share its room by halves: let each begin under the other.
api.addEventListener("executing", ({ detail }) => {
    const node = outermost()?.getNodeById(detail);
    const element = node && document.querySelector(`[data-node-id="${node.id}"]`);
    if (element && WITH_BAR.includes(node.comfyClass)) element.dataset.pixartBar = "";
});

// Only results are in `images`, where other programs look for them. The editor is told of these as of any picture, once
// all have heard the message itself.
api.addEventListener("executed", ({ detail }) => {
    const { [PICTURES]: images, ...output } = detail.output ?? {};
    if (images) setTimeout(() => api.dispatchCustomEvent("executed", { ...detail, output: { ...output, images } }));
});

app.registerExtension({
    name: "pixart_pack.node_text",
    setup() {
        document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
    },
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("PixArt")) return;
        const addCustomWidget = node.addCustomWidget;
        node.addCustomWidget = function (widget) {
            if (widget.name === TEXT) fitText(this, widget);
            return addCustomWidget.apply(this, arguments);
        };
        const least = LEAST_PX[node.comfyClass];
        if (least) node.setSize(least.map((px, axis) => Math.max(px, node.size[axis])));
        const onExecuted = node.onExecuted;
        node.onExecuted = function (output) {
            onExecuted?.apply(this, arguments);
            const text = output?.text?.[0];
            if (!text || this.graph !== outermost()) return;
            api.dispatchCustomEvent("progress_text", { nodeId: String(this.id), text: keepLines(text) });
        };
    },
});
