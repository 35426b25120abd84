"""What a device computes, against float32 on the CPU: the model in every precision, its company, solvers and training.

Needs PyTorch, numpy and safetensors alone, so that it runs on a bare machine too. Weights are random.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...pixart.acceleration.compilation import compile_blocks
from ...pixart.acceleration.guidance_reuse import LINE, GuidanceReuse
from ...pixart.checkpoint import expected_shapes
from ...pixart.config import CONFIGS, PixArtConfig
from ...pixart.controlnet import PixArtControlNet
from ...pixart.data.examples import Example, ListFeatures
from ...pixart.lora import load_lora, merge
from ...pixart.sampling import Captions, Settings, sample_latents
from ...pixart.training.build import make_objective
from ...pixart.training.loop import Trainer
from ...pixart.training.processes import SingleProcess
from ...pixart.training.settings import TrainingSettings
from ...pixart.transformer import PixArt
from ...pixart.weights.quantised.blocks import BLOCK_TYPES
from ...samplers import SAMPLERS
from .parts import Finding, check

PART = "correctness"
TINY = {"hidden_size": 96, "num_heads": 4, "caption_channels": 64, "depth": 3}
BLOCKS = 4  # of the released width
# Relative errors (root mean square) that rounding alone may make. float32 on a GPU sums in another order; half
# precision keeps 11 bits of a number and bfloat16 8, and some ten roundings follow one another in a block.
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
FP8_LIMIT = 6e-2  # 4 bits of a weight, beside bfloat16
SAMPLED_LIMIT = 1e-3  # of float32 after many steps: each is fed with the errors of all before
TRAINED_LIMIT = 1e-3


def make_model(config: PixArtConfig, seed: int = 0) -> PixArt:
    """In float32 on the CPU, every weight random, so that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.08 if config.hidden_size < 200 else 0.02
    weights = {name: torch.randn(shape, generator=generator) * scale for name, shape in expected_shapes(config).items()}
    model = PixArt(config).eval()
    model.load_state_dict(weights, strict=False)
    return model


def make_inputs(config: PixArtConfig, batch: int, height: int, width: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """A latent of any size with captions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 40, dtype=torch.bool)
    for row in range(1, batch):
        mask[row, 40 // (row + 1) :] = False
    return {
        "latent": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "timestep": torch.linspace(999, 1, batch),
        "caption": torch.randn(batch, 40, config.caption_channels, generator=generator),
        "caption_mask": mask,
    }


@torch.no_grad()
def predict(
    model: PixArt, inputs: dict, device: str = "cpu", dtype: torch.dtype = torch.float32, **more
) -> torch.Tensor:
    """What the model makes of the inputs on a device, as float32 on the CPU."""
    cast = {"latent", "caption"}
    moved = {name: each.to(device, dtype if name in cast else None) for name, each in inputs.items()}
    return model(**moved, **more).float().cpu()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def list_checks(device: str, is_small: bool) -> dict[str, Callable[[], list[Finding]]]:
    """Groups of checks by their names, the most telling first. Each check may fail by itself."""
    torch.backends.cudnn.allow_tf32 = False  # else the patch embedding, a convolution, keeps 11 bits of float32
    wide = TINY if is_small else {"depth": BLOCKS}
    return {
        "model": functools.partial(_models, device, wide),
        "company": functools.partial(_company, device),
        "solvers": functools.partial(_solvers, device),
        "training": functools.partial(_training, device),
        "compile": functools.partial(_compiler, device),  # last, since it takes the longest
    }


def _models(device: str, wide: dict) -> list[Finding]:
    found = []
    for variant, batch, height, width in (("alpha-1024", 2, 33, 20), ("sigma-512", 3, 16, 16), ("sigma-256", 1, 1, 7)):
        config = dataclasses.replace(CONFIGS[variant], **wide)
        model = make_model(config)
        inputs = make_inputs(config, batch, height, width)
        expected = predict(model, inputs)
        size = f"{variant}, latent {height}x{width}, batch {batch}"
        for dtype, limit in LIMITS.items():
            name = f"model {str(dtype).removeprefix('torch.')}, {size}"
            measure = functools.partial(_cast, config, inputs, expected, device, dtype)
            found.append(check(PART, name, measure, limit))
    found.append(check(PART, "model with weights in fp8", lambda: _fp8(device, wide), FP8_LIMIT))
    found.append(check(PART, "model with KV compression", lambda: _compressed(device, wide), LIMITS[torch.float32]))
    return found


def _cast(config: PixArtConfig, inputs: dict, expected: torch.Tensor, device: str, dtype: torch.dtype) -> float:
    return error(predict(make_model(config).to(device, dtype), inputs, device, dtype), expected)


def _fp8(device: str, wide: dict) -> float:
    config = dataclasses.replace(CONFIGS["alpha-512"], **wide)
    inputs, model = make_inputs(config, 2, 16, 16), make_model(config)
    expected = predict(model, inputs)
    for layer in model.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn).to(device).to(torch.bfloat16)
    return error(predict(model.to(device, torch.bfloat16), inputs, device, torch.bfloat16), expected)


def _compressed(device: str, wide: dict) -> float:
    config = dataclasses.replace(CONFIGS["sigma-1024"], **wide, kv_compress_ratio=2, kv_compress_layers=(0, 1))
    inputs = make_inputs(config, 2, 18, 22)
    expected = predict(make_model(config), inputs)
    return error(predict(make_model(config).to(device), inputs, device), expected)


def _company(device: str) -> list[Finding]:
    exact = LIMITS[torch.float32]
    return [
        check(PART, "ControlNet", lambda: _controlnet(device), exact),
        check(PART, "LoRA in the weights", lambda: _lora(device), exact),
        check(PART, "GGUF's blocks as numbers, all types: differences", lambda: _gguf(device), 0, "numbers"),
    ]


def _compiler(device: str) -> list[Finding]:
    name = "compiled blocks over uncompiled ones, three sizes"
    return [check(PART, name, lambda: _compiled(device), LIMITS[torch.float32])]


def _controlnet(device: str) -> float:
    config = dataclasses.replace(CONFIGS["alpha-1024"], **TINY)
    inputs = make_inputs(config, 2, 12, 18)
    torch.manual_seed(0)
    picture = torch.randn(2, 4, 12, 18)
    branch = PixArtControlNet(config, 2).eval()
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    with torch.no_grad():
        base = make_model(config)
        expected = predict(base, inputs, control=branch.attach(base, picture))
        base, branch = base.to(device), branch.to(device)
        return error(predict(base, inputs, device, control=branch.attach(base, picture.to(device))), expected)


def _lora(device: str) -> float:
    config = dataclasses.replace(CONFIGS["alpha-512"], **TINY)
    generator, width = torch.Generator().manual_seed(4), config.hidden_size
    name = "base_model.model.transformer_blocks.{}.attn1.to_q.lora_{}.weight"
    adapter = {}
    for block in range(config.depth):
        adapter[name.format(block, "A")] = torch.randn(4, width, generator=generator)
        adapter[name.format(block, "B")] = torch.randn(width, 4, generator=generator)
    lora = load_lora(adapter, {"r": 4, "lora_alpha": 4}, config=config)
    model, inputs = make_model(config), make_inputs(config, 2, 12, 12)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(merge(weights, lora))
    expected = predict(model, inputs)
    moved = make_model(config).to(device)
    moved.load_state_dict(merge({key: tensor.to(device) for key, tensor in weights.items()}, lora))
    return error(predict(moved, inputs, device), expected)


def _gguf(device: str) -> float:
    """Numbers that differ: a device expands blocks to the bits of the CPU's."""
    generator, differ = torch.Generator().manual_seed(5), 0
    for kind in BLOCK_TYPES.values():
        blocks = torch.randint(0, 256, (64, kind.size), dtype=torch.uint8, generator=generator)
        differ += int((kind.expand(blocks).nan_to_num() != kind.expand(blocks.to(device)).cpu().nan_to_num()).sum())
    return differ


def _compiled(device: str) -> float:
    config = dataclasses.replace(CONFIGS["alpha-1024"], **TINY)
    eager, compiled = make_model(config).to(device), make_model(config).to(device)
    compiled.compiled = compile_blocks(compiled)
    errors = []
    for height, width in ((12, 12), (18, 10), (8, 16)):
        inputs = make_inputs(config, 2, height, width)
        errors.append(error(predict(compiled, inputs, device), predict(eager, inputs, device)))
    return max(errors)


def _solvers(device: str) -> list[Finding]:
    config = dataclasses.replace(CONFIGS["alpha-512"], **TINY)

    def sample(solver: str, where: str, reuse: GuidanceReuse | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(6)
        captions = [
            Captions.of([torch.randn(n, config.caption_channels, generator=generator) for n in lengths])
            for lengths in ((7, 20), (3, 1))
        ]
        captions = [Captions(each.states.to(where), each.mask.to(where)) for each in captions]
        settings = Settings(solver, steps=8, guidance=3.0)
        if solver == "dmd":
            settings = Settings(solver, schedule="dmd", steps=1, guidance=1.0)
        model = make_model(config).to(where)
        return sample_latents(model, *captions, 96, 128, [1, 2], settings, keep=True, reuse=reuse).cpu()

    def measure(solver: str, reuse: GuidanceReuse | None = None) -> float:
        return error(sample(solver, device, reuse), sample(solver, "cpu", reuse))

    found = [check(PART, f"solver {name}", lambda n=name: measure(n), SAMPLED_LIMIT) for name in SAMPLERS]
    reuse = GuidanceReuse(2, LINE)
    return [*found, check(PART, "guidance reuse", lambda: measure("dpm_solver", reuse), SAMPLED_LIMIT)]


def make_features(config: PixArtConfig) -> ListFeatures:
    generator = torch.Generator().manual_seed(7)

    def tensor(*shape):
        return torch.randn(shape, generator=generator)

    examples = [
        Example(tensor(4, h, w) * 5, tensor(3 + index, config.caption_channels), (h * 8, w * 8), h / w)
        for index, (h, w) in enumerate([(8, 8), (6, 10)] * 3)
    ]
    return ListFeatures(examples, null_caption=tensor(1, config.caption_channels))


def _training(device: str) -> list[Finding]:
    config = dataclasses.replace(CONFIGS["alpha-512"], **TINY)

    def train(kind: str, where: str, stops: Sequence[int] = (6,), **more) -> dict[str, torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            for steps in stops:
                settings = TrainingSettings(
                    kind=kind, steps=steps, batch_size=2, rank=4, learning_rate=1e-3, tensorboard=False, **more
                )
                objective = make_objective(make_model(config), settings, where)
                trainer = Trainer(objective, make_features(config), settings, Path(folder), SingleProcess(where))
                trainer.run()
            return {name: tensor.float().cpu() for name, tensor in trainer.trained_weights().items()}

    def against_cpu(kind: str) -> float:
        own, expected = train(kind, device), train(kind, "cpu")
        return max(error(own[name], expected[name]) for name in own)

    def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return sum(int((one[name] != other[name]).sum()) for name in one)

    def resumed(kind: str, **more) -> float:
        return differences(train(kind, device, **more), train(kind, device, (3, 6), **more))

    def recomputed() -> float:
        return differences(train("lora", device), train("lora", device, checkpointing=True))

    tests: list[tuple[str, Callable[[], float], float, str]] = [
        ("LoRA, six steps", lambda: against_cpu("lora"), TRAINED_LIMIT, ""),
        ("full fine-tuning, six steps", lambda: against_cpu("full"), TRAINED_LIMIT, ""),
        ("LoRA stopped and continued: differences", lambda: resumed("lora"), 0, "numbers"),
        ("LoRA in bf16, stopped and continued: differences", lambda: resumed("lora", dtype="bf16"), 0, "numbers"),
        ("LoRA with recomputed blocks: differences", recomputed, 0, "numbers"),
    ]
    return [check(PART, f"training: {name}", measure, limit, unit) for name, measure, limit, unit in tests]
