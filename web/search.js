// The editor's search puts what is called exactly by the word first, then what begins with it: every id of ours begins
// with PixArt, and the shortest would lead. A single alias, as text in place of a list, counts as such a name.
import { app } from "../../scripts/app.js";

const CALLED = {
    PixArtLoadCheckpoint: "pixart",
    PixArtTextEncode: "pixart",
    PixArtLoadControlNet: "controlnet",
    PixArtScheduler: "scheduler",
    PixArtSamplingPreset: "sigma",
};

function call(defs) {
    for (const [id, word] of Object.entries(CALLED)) {
        if (defs[id]?.search_aliases) defs[id].search_aliases = word;
    }
}

// The second hook is that of the lists' refreshing, which brings the server's definitions anew.
app.registerExtension({ name: "pixart_pack.search", addCustomNodeDefs: call, refreshComboInNodes: call });
