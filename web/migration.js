// Graphs of ComfyUI_ExtraModels: its node ids stand in the server's list for programs that look for them, but the editor
// puts our nodes in their place, which it does for unknown ids alone.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const CATEGORY = "PixArt/deprecated";
const SOON_MS = 50, LATEST_MS = 5000;
const NEVER = 2, BYPASS = 4;
const hidden = new Set();
const oldIds = defs => Object.keys(defs).filter(id => defs[id].deprecated && defs[id].category === CATEGORY);

// A node that the editor put in another's place has that one's size, and was not told that it is in a graph: its text
// boxes are not shown.
function settle(node) {
    let isTold = false;
    const onAdded = node.onAdded;
    node.onAdded = function () {
        isTold = true;
        return onAdded?.apply(this, arguments);
    };
    setTimeout(() => {
        if (isTold || !node.graph) return;
        node.onAdded(node.graph);
        const least = node.computeSize();
        node.setSize([0, 1].map(axis => Math.max(node.size[axis], least[axis])));
        node.graph.setDirtyCanvas(true, true);
    }, SOON_MS);
}

app.registerExtension({
    name: "pixart_pack.migration",
    addCustomNodeDefs(defs) {
        for (const id of oldIds(defs)) {
            hidden.add(id);
            delete defs[id];
        }
    },
    // The editor looks for unknown nodes among those that run. Muted and bypassed ones are to be replaced, too.
    async beforeConfigureGraph(graph, missing) {
        const all = [graph, ...(graph.definitions?.subgraphs ?? [])].flatMap(each => each.nodes ?? []);
        const idle = all.filter(node => [NEVER, BYPASS].includes(node.mode) && hidden.has(node.type));
        const types = [...new Set(idle.map(node => node.type))];
        if (!types.length) return;
        const replacements = await (await api.fetchApi("/node_replacements")).json();
        for (const type of types) {
            const [replacement] = replacements[type] ?? [];
            if (replacement) missing.push({ type, isReplaceable: true, replacement });
        }
    },
    // The editor registers them all before it calls this, but does not wait until that is done.
    async refreshComboInNodes(defs) {
        const ids = oldIds(defs), end = Date.now() + LATEST_MS;
        for (const id of ids) delete defs[id];
        const isRegistered = id => LiteGraph.registered_node_types[id];
        while (!ids.every(isRegistered) && Date.now() < end) await new Promise(done => setTimeout(done, SOON_MS));
        for (const id of ids.filter(isRegistered)) LiteGraph.unregisterNodeType(id);
    },
    nodeCreated(node) {
        if (node.comfyClass?.startsWith("PixArt") || node.comfyClass === "KSampler") settle(node);
    },
});
