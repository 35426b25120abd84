"""The settings that PixArt's models were published with, as one table."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """One published setting.

    sampler: key of SAMPLERS, with its options. schedule: key of SCHEDULES. guidance: classifier-free guidance scale, 1
    is off. is_sigma: the model's family. base_px: the only size it exists for, or None. distilled: the name of the
    distilled weights it needs, or None.
    """

    sampler: str
    schedule: str
    steps: int
    guidance: float
    is_sigma: bool = False
    base_px: int | None = None
    distilled: str | None = None
    options: dict = field(default_factory=dict)


_ALPHA_DPM = {"order": 2, "lower_order_final": "short_runs"}

# Source: the PixArt repositories' scripts and apps.
PRESETS = {
    "alpha DPM-Solver++ 14": Preset("dpm_solver", "uniform", 14, 4.5, options=_ALPHA_DPM),
    "alpha DPM-Solver++ 20": Preset("dpm_solver", "uniform", 20, 4.5, options=_ALPHA_DPM),
    "alpha SA-Solver 25": Preset("sa_solver", "uniform", 25, 3.0, options={"few_steps": True}),
    "alpha IDDPM 100": Preset("iddpm", "iddpm", 100, 4.5),
    "alpha LCM 4": Preset("lcm", "lcm", 4, 1.0, base_px=1024, distilled="LCM"),
    "alpha DMD 1": Preset("dmd", "dmd", 1, 1.0, base_px=512, distilled="DMD"),
    "sigma DPM-Solver++ 14": Preset(
        "dpm_solver", "uniform", 14, 4.5, is_sigma=True, options={"order": 2, "lower_order_final": "always"}
    ),
}
