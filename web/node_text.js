// What nodes say below their widgets, as in "15 of 120 tokens": room for it, and the text itself where a result comes
// from the cache, for which the server sends no text of progress.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const LEAST_PX = { PixArtModelInfo: [360, 300] };

app.registerExtension({
    name: "pixart_pack.node_text",
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("PixArt")) return;
        const least = LEAST_PX[node.comfyClass];
        if (least) node.setSize(least.map((px, axis) => Math.max(px, node.size[axis])));
        const onExecuted = node.onExecuted;
        node.onExecuted = function (output) {
            onExecuted?.apply(this, arguments);
            const text = output?.text?.[0];
            const isOutermost = this.graph === (app.rootGraph ?? app.graph); // numbers inside a subgraph are others'
            if (text && isOutermost) api.dispatchCustomEvent("progress_text", { nodeId: String(this.id), text });
        };
    },
});
