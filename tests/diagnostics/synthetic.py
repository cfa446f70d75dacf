"""Made-up run folders for the report's tests: a collapse and its healthy twin.

The numbers are drawn from formulas, not from training; they only have the shape of the real thing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

FIELDS = (
    *("tcs", "rho", "mu_eff", "row_div", "retention", "leakage"),
    *(f"{name}_{b}" for b in ("attn", "ffn") for name in ("tr_ratio", "var_gain")),
    *(f"{name}_{b}" for b in ("attn", "ffn") for name in ("g_mean", "g_ctr")),
    *(f"{name}_{b}" for b in ("attn", "ffn") for name in ("amplification", "envelope")),
    *("grad_writer_attn", "grad_writer_ffn", "grad_query", "grad_key"),
)


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(
    folder: Path,
    *,
    collapses: bool,
    layers: int = 48,
    steps: int = 600,
    probe_every: int = 10,
    fields: tuple[str, ...] = FIELDS,
) -> Path:
    """A run folder with every file that the report reads."""
    rng = np.random.default_rng(collapses)
    folder.mkdir(parents=True)
    config = {
        "model": {
            "depth": layers,
            "width": 64,
            "rule": {"name": "plain" if collapses else "mvsplit"},
        },
        "optimiser": {"lr": 1e-3, "warmup": 100},
        "seed": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    entry = int(0.45 * steps) if collapses else 10 * steps
    write_lines(folder / "metrics.jsonl", [_metrics(rng, s, steps, entry) for s in range(steps)])
    probes = range(0, steps, probe_every)
    write_lines(
        folder / "layers.jsonl", [_probe(rng, s, steps, entry, layers, fields) for s in probes]
    )
    write_lines(folder / "events.jsonl", _events(steps, entry, layers))
    (folder / "samples").mkdir()
    for step in range(0, steps, max(1, steps // 4)):
        pixels = rng.integers(0, 255, (16, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "samples" / f"step_{step:08d}.png")
    return folder


def _metrics(rng: np.random.Generator, step: int, steps: int, entry: int) -> dict:
    loss = 0.5 + 1.4 * np.exp(-5 * step / steps)
    spike = np.exp(-(((step - entry) / 6) ** 2))
    gone = 1 / (1 + np.exp(-(step - entry - 8) / 2.0)) if step > entry - 100 else 0.0
    loss = loss * (1 - gone) + 1.9 * gone
    noise = rng.lognormal(0, 0.04, 6)
    fade = 10.0 ** (-4 * gone)
    return {
        "step": step,
        "loss": loss * noise[0],
        "grad_norm": (0.4 + 15 * spike) * noise[1] ** 3,
        "lr": 1e-3 * min(1, step / 100),
        "grad_writer_attn": (0.2 + 12 * spike) * noise[2] ** 3,
        "grad_writer_ffn": (0.2 + 7 * spike) * noise[3] ** 3,
        "grad_query": 6e-3 * fade * noise[4] ** 5,
        "grad_key": 4e-3 * fade * noise[5] ** 5,
    }


def _probe(
    rng: np.random.Generator, step: int, steps: int, entry: int, layers: int, fields: tuple
) -> dict:
    depth = np.arange(layers) / layers  # 0 input, 1 output
    late = (step - entry) / (0.02 * steps)
    aligned = 1 / (1 + np.exp(-np.clip(8 * (depth - 0.3) + 2 * late - 4, -50, 50)))  # the front
    spike = np.exp(-(late**2) / 4) * np.exp(-((depth - 0.7) ** 2) / 0.05)
    wave = 0.5 + 0.5 * np.sin(6 * depth + 3 * step / steps)
    kappa = 0.002 + 0.9 * aligned
    base = {
        "tcs": 0.05 + 0.2 * wave * (1 - aligned) + 0.94 * aligned,
        "rho": 0.2 + 0.2 * wave + 80 * aligned**4,
        "mu_eff": 0.9 - 0.3 * wave - 0.4 * aligned,
        "row_div": 0.6 * wave * (1 - aligned) + 0.02,
        "retention": 0.5 * wave * (1 - aligned) + 0.02,
        "leakage": 0.03 + 0.2 * aligned,
        "tr_ratio": 0.02 + 0.05 * wave + 2 * aligned,
        "var_gain": 0.02 + 0.05 * wave,
        "g_mean": 0.004 * (1 + wave) + 0.9 * spike,
        "g_ctr": 0.006 * (1 + wave),
        "amplification": 1 + 63 * kappa * rng.uniform(0.1, 1, layers),
        "envelope": 63 * kappa,
        "grad_writer": 0.01 + 0.9 * spike,
        "grad_query": 3e-3 * (0.3 + wave) * 10 ** (-4 * aligned),
        "grad_key": 2e-3 * (0.3 + wave) * 10 ** (-4 * aligned),
    }
    line: dict = {"step": step, "layer": list(range(layers))}
    for name in fields:
        stem = name.removesuffix("_attn").removesuffix("_ffn")
        noisy = base[stem] * rng.lognormal(0, 0.03, layers)
        line[name] = [
            float(f"{value:.5g}") for value in np.minimum(noisy, 1.0 if stem == "tcs" else np.inf)
        ]
    return line


def _events(steps: int, entry: int, layers: int) -> list[dict]:
    saves = [
        {"step": s, "level": "info", "event": "saved", "message": f"checkpoint step_{s:08d}"}
        for s in range(steps // 4, steps, steps // 4)
    ]
    if entry >= steps:
        return saves
    alarm = {
        "step": entry - 1,
        "level": "alarm",
        "verdict": "mean-mode",
        "layer": int(0.7 * layers),
        "message": "The mean part of the writer gradient is 140 times its centered part.",
        "evidence": {"g_mean_over_g_ctr": 140.2, "tcs_deep": 0.91, "grad_query_fall": 3.2},
    }
    warning = {**alarm, "step": entry - 12, "level": "warning", "message": "G_mean is rising."}
    return sorted([*saves, warning, alarm], key=lambda event: event["step"])
