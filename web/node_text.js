// What nodes show: room for their text below the widgets, the text itself where a result comes from the cache, for which
// the server sends no text of progress, and pictures that are no results.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const LEAST_PX = { PixArtModelInfo: [360, 300] };
const PICTURES = "pixart_pictures";

// Only results are in `images`, where other programs look for them. The editor is told of these as of any picture, once
// all have heard the message itself.
api.addEventListener("executed", ({ detail }) => {
    const { [PICTURES]: images, ...output } = detail.output ?? {};
    if (images) setTimeout(() => api.dispatchCustomEvent("executed", { ...detail, output: { ...output, images } }));
});

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
