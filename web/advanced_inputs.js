// Folds the inputs that a node's schema calls advanced also where the classic renderer draws it, as Nodes 2.0 does by
// itself: "Show Advanced" in the node's menu unfolds them. One that a wire feeds, or that is not as usual, stays.
import { app } from "../../scripts/app.js";

const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets";

function isFolded(node, widget, usual) {
    if (node.getSlotFromWidget?.(widget)?.link != null) return false;
    return widget.value === usual && !app.extensionManager?.setting?.get(ALWAYS);
}

app.registerExtension({
    name: "pixart_pack.advanced_inputs",
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("PixArt")) return;
        const folding = (node.widgets ?? []).filter(widget => widget.options?.advanced);
        if (!folding.length) return;
        let measures = false;
        for (const widget of folding) {
            const usual = widget.value, advanced = () => isFolded(node, widget, usual);
            // Its place is to go too. Nodes 2.0 hides it by its own means, and asks the node for its height alone.
            const hidden = () => (measures || !LiteGraph.vueNodesMode) && advanced() && !node.showAdvanced;
            Object.defineProperty(widget, "advanced", { get: advanced, set() {}, configurable: true });
            Object.defineProperty(widget, "hidden", { get: hidden, set() {}, configurable: true });
        }
        const computeSize = node.computeSize;
        node.computeSize = function () {
            measures = true;
            try {
                return computeSize.apply(this, arguments);
            } finally {
                measures = false;
            }
        };
        node.setSize([node.size[0], node.computeSize()[1]]);
    },
});
