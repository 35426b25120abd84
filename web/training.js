// A training node has a button while it runs, which stops it with everything saved, and after that one that goes on.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TRAINERS = ["PixArtTrainLoRA", "PixArtTrain", "PixArtDistillLCM", "PixArtDistillDMD", "PixArtTrainControlNet"];
const WORDS = {
    en: ["Stop and save", "Go on"],
    zh: ["停止并保存", "继续训练"],
    ja: ["停止して保存", "続ける"],
    ko: ["중지하고 저장", "계속하기"],
    ru: ["Остановить и сохранить", "Продолжить"],
    fr: ["Arrêter et enregistrer", "Continuer"],
    es: ["Detener y guardar", "Continuar"],
};
const BUTTON = "pixart_training";
const words = () => WORDS[app.extensionManager?.setting?.get("Comfy.Locale")] ?? WORDS.en;
const outermost = () => app.rootGraph ?? app.graph;

function removeButton(node) {
    const button = node.widgets?.find(widget => widget.name === BUTTON);
    if (!button) return;
    node.removeWidget ? node.removeWidget(button) : node.widgets.splice(node.widgets.indexOf(button), 1);
    if (node.pixartSize) node.setSize(node.pixartSize);
    node.setDirtyCanvas(true, true);
}

function setButton(node, label, press) {
    removeButton(node);
    node.pixartSize = [...node.size];
    const button = node.addWidget("button", BUTTON, null, press, { serialize: false });
    button.label = label;
    button.serialize = false;
    node.setDirtyCanvas(true, true);
}

function showStop(node) {
    node.pixartIsStopped = false;
    setButton(node, words()[0], () => {
        removeButton(node);
        api.interrupt(null);
    });
}

function showGoOn(node) {
    setButton(node, words()[1], () => {
        removeButton(node);
        app.queuePrompt(0);
    });
}

api.addEventListener("executing", ({ detail }) => {
    const running = detail == null ? null : String(detail?.node ?? detail);
    for (const node of outermost()?.nodes ?? []) {
        if (!TRAINERS.includes(node.comfyClass)) continue;
        if (String(node.id) === running) showStop(node);
        else if (!node.pixartIsStopped) removeButton(node);
    }
});

app.registerExtension({
    name: "pixart_pack.training",
    nodeCreated(node) {
        if (!TRAINERS.includes(node.comfyClass)) return;
        const onExecuted = node.onExecuted;
        node.onExecuted = function (output) {
            onExecuted?.apply(this, arguments);
            node.pixartIsStopped = Boolean(output?.text?.[0]?.startsWith("stopped:"));
            if (node.pixartIsStopped) showGoOn(node);
        };
    },
});
