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
        if (!node.comfyClass?.startsWith("PixArt") || LiteGraph.vueNodesMode) return;
        const advanced = (node.widgets ?? []).filter(widget => widget.options?.advanced);
        for (const widget of advanced) {
            const usual = widget.value;
            const hides = { advanced: () => isFolded(node, widget, usual) };
            hides.hidden = () => hides.advanced() && !node.showAdvanced; // else its place would stay empty
            for (const [name, get] of Object.entries(hides))
                Object.defineProperty(widget, name, { get, set() {}, configurable: true });
        }
        if (advanced.length) node.setSize([node.size[0], node.computeSize()[1]]);
    },
});
