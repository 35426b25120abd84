"""The pack's entry point and its nodes, as ComfyUI gets them."""

import asyncio
import sys


def test_importing_the_folder_imports_nothing_else(comfyui):
    """A failing import inside the entry point can then be shown with its traceback."""
    package = sys.modules["pixart_pack"]
    before = set(sys.modules)
    package.__spec__.loader.exec_module(package)
    assert set(sys.modules) == before
    assert asyncio.iscoroutinefunction(package.comfy_entrypoint)


def test_nodes_have_ids_of_their_own(pack):
    ids = [node.GET_SCHEMA().node_id for node in pack]
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(node_id.startswith("PixArt") for node_id in ids)


def test_every_node_file_is_listed(pack):
    files = [module for name, module in sys.modules.items() if name.startswith("pixart_pack.nodes.")]
    classes = [node for module in files for node in getattr(module, "NODES", ())]
    assert {node.__name__ for node in classes} == {node.__name__ for node in pack}


def test_nodes_explain_themselves(pack):
    for node in pack:
        schema = node.GET_SCHEMA()
        assert schema.display_name, schema.node_id
        assert len(schema.description) > 20, schema.node_id
        assert schema.category.split("/")[0], schema.node_id
        for field in schema.inputs:
            assert field.tooltip, f"{schema.node_id}.{field.id}"


def test_nodes_do_not_collide_with_the_core(pack, core_nodes):
    ours = {node.GET_SCHEMA().node_id: node for node in pack}
    assert all(core_nodes[node_id] is node for node_id, node in ours.items())


def test_a_core_node_runs_in_this_process(run_node):
    (latent,) = run_node("EmptyLatentImage", width=64, height=32, batch_size=2)
    assert latent["samples"].shape == (2, 4, 4, 8)
