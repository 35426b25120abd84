"""Client libraries of the npm registry, without what they do not need here, and a program that runs a graph by one."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

PACKAGES = {"@stable-canvas/comfyui-client": "1.5.9", "@saintno/comfyui-sdk": "0.3.1", "ws": "8.20.0"}
LIMIT_S = 120
BY_CLIENT = """
const { Client } = require("@stable-canvas/comfyui-client");
const client = new Client({ api_host: url.replace("http://", ""), WebSocket: require("ws"), fetch });
client.connect();
const found = (await client.enqueue_polling(graph)).images.map(image => image.data);
"""
BY_SDK = """
const { ComfyApi, PromptBuilder, CallWrapper } = require("@saintno/comfyui-sdk");
const api = new ComfyApi(url).init();
await api.waitForReady();
const builder = new PromptBuilder(graph, [], ["picture"]).setOutputNode("picture", result);
const output = await new CallWrapper(api, builder).onFailed(error => { throw error; }).run();
const found = output.picture.images.map(image => image.filename);
"""
PROGRAM = """
const [url, file] = process.argv.slice(2);
const graph = JSON.parse(require("fs").readFileSync(file, "utf8"));
const result = Object.keys(graph).find(number => graph[number].class_type === "SaveImage");
(async () => {
    %s
    console.log("FOUND " + JSON.stringify(found));
    process.exit(0);
})().catch(error => { console.error(error); process.exit(1); });
"""


def fetched(cache: Path) -> Path:
    """A folder with the packages, which are fetched once. Skips without node and npm, or without the registry."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    for name, version in PACKAGES.items():
        place = cache / "node_modules" / name
        if (place / "package.json").exists() and json.loads((place / "package.json").read_text())["version"] == version:
            continue
        command = ["npm", "pack", f"{name}@{version}", "--pack-destination", str(cache), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot fetch {name}: {done.stderr.strip()[-200:]}")
        for archive in cache.glob("*.tgz"):
            with tarfile.open(archive) as tar:
                tar.extractall(cache / "unpacked", filter="data")
            archive.unlink()
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        (cache / "unpacked" / "package").rename(place)
    return cache


def run(folder: Path, program: str, url: str, graph: dict) -> list[str]:
    """What a client says of the pictures of a graph."""
    (folder / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    (folder / "run.cjs").write_text(PROGRAM % program, encoding="utf-8")
    command = ["node", "run.cjs", url, "graph.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))
