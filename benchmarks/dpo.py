"""Question: how many points more of its held-out captions does a model draw right after
Diffusion-DPO on pairs that the exact reader of shapes has judged, and do its pictures get further
from real ones? (docs/alignment.md)

The world is small: one large object of four shapes and eight colours on black, "a red ring", 32
pixels a side on a GPU and 16 on a CPU. A model is pre-trained until it draws enough right, then
fine-tuned at a tenth of the rate on other scenes (SFT). Then two pictures of each of many captions
of further scenes, DPO on the pairs of which one shows what its caption says, and beside it, for as
many steps, flow matching on real pictures and on the preferred ones. Half of the captions is in no
pair: a quarter is held out, another is the validation. Scored before and after, on both: the share
of captions drawn right, the Fréchet distance, and TCS, ρ, G_mean and G_ctr of every layer. Real
pictures have all captions, in pre-training, SFT and beside the pairs.

Of several settings, and of weights on the straight way between the SFT model and what was aligned,
one is chosen by a rule that was written down before the runs, on the validation alone (`chosen` of
dpo_page.py); the held-out captions are what it is reported on.

Gate: the reader sees in rendered pictures what they show. Rows say whether DPO began at log 2, and
`dpo_page.py` refuses those that did not. Each row is written when it is there.

    python benchmarks/dpo.py all --seed 0 --json FILE --ways dpo:beta=1000,lr=1e-4,steps=150 real …
    python benchmarks/dpo.py base --save BASE …; python benchmarks/dpo.py align --base BASE …

Cost: for one seed, 11 minutes on one CPU core (nine settings, pictures of 16 pixels), or six
minutes on one H200 shared with a dozen other programs (twelve settings, 32 pixels).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dpo_parts import (
    DRAW,
    SIZE,
    Store,
    Words,
    averaged,
    begin,
    blended,
    draw,
    drawing,
    enlarged,
    experiment,
    learn,
    learn_unwatched,
    load,
    part_of,
    real_store,
    replace_options,
    save,
    say,
    world,
)
from torch import Tensor

from mvsplit.data.render import render
from mvsplit.diagnostics.probe import LayerProbe
from mvsplit.diagnostics.taps import taps_for_dit
from mvsplit.evaluation.frechet import fixed_features, frechet_distance
from mvsplit.evaluation.held_out import SERIES
from mvsplit.evaluation.preference import draw_pairs, judge_of_shapes, points_of_shapes
from mvsplit.evaluation.reader import read_pictures
from mvsplit.evaluation.scores import share
from mvsplit.flow import DPOConfig
from mvsplit.models import DiT
from mvsplit.models.lora import LoRAConfig
from mvsplit.training import Experiment, TuneConfig
from mvsplit.training.objective import piece_losses
from mvsplit.training.step import pieces

OTHER_NOISE = (500, 600, 700)  # added to the seed, where only the noise is another
LAYER_FIELDS = ("tcs", "rho", "g_mean_attn", "g_ctr_attn", "g_mean_ffn", "g_ctr_ffn")


@dataclass(frozen=True)
class Drawn:
    """Pairs in memory."""

    captions: list[str]
    chosen: Tensor
    rejected: Tensor


def score(model: DiT, options: argparse.Namespace) -> dict[str, float]:
    """Of held-out captions and of those of the validation: the share drawn right, that is an
    object of the shape and colour, and the share with nothing else beside it; and the Fréchet
    distance to rendered pictures. Always the same noise for a seed."""
    found: dict[str, float] = {}
    everything = world(SERIES, 0, 6 * options.pictures).scenes()
    for name in ("held", "valid"):
        scenes = [s for s in everything if part_of(s) == name][: options.pictures]
        pictures = draw(model, [scene.caption for scene in scenes], seed=10_000 + options.seed)
        seen = read_pictures(enlarged(pictures))
        points = [points_of_shapes(s, q) for s, q in zip(seen, scenes, strict=True)]
        found |= dict(share(f"{name}_right", [p > 0 for p in points]))
        found |= dict(share(f"{name}_exact", [p > 1 for p in points]))
        table = world(SERIES + 1, 0, 6 * options.pictures)
        rows = [k for k, s in enumerate(table.scenes()) if part_of(s) == name]
        real = render(table, SIZE)[rows[: options.pictures]]
        distance = frechet_distance(fixed_features(pictures), fixed_features(real))
        found[f"{name}_frechet"] = distance
    return {name: round(value, 5) for name, value in found.items()}


def check_reader(device: torch.device) -> None:
    """Exits if the reader does not see in rendered pictures, a little noisy, what they show."""
    table = world(5, 0, 64)
    pictures = render(table, SIZE)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    seen = read_pictures(enlarged(pictures + 0.05 * noise).to(device))
    wrong = sum(points_of_shapes(s, q) < 2 for s, q in zip(seen, table.scenes(), strict=True))
    say(gate="reader", pictures=len(pictures), wrong=wrong)
    if wrong:
        raise SystemExit(f"gate failed: the reader is wrong about {wrong} rendered pictures")


def look(model: DiT, options: argparse.Namespace) -> dict[str, list[float | None]]:
    """The fields of every layer on held-out scenes, always at the same noise and times."""
    wanted = experiment(replace_options(options, batch=256), seed=77)
    store = real_store(replace_options(options, scenes=256, batch=256), 0, series=SERIES)
    model = model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    (piece,) = pieces(store.next_batch(), 0, wanted.train, torch.device(options.device))
    with LayerProbe(taps_for_dit(model), fields=LAYER_FIELDS) as probe:
        piece_losses(model, piece, wanted.train).mean().backward()
    model.requires_grad_(False)
    return {
        name: [None if v is None else float(f"{v:.4g}") for v in values]
        for name, values in probe.arrays().items()
    }


def pairs_of(model: DiT, options: argparse.Namespace) -> tuple[Drawn, dict[str, Any]]:
    """Pairs on captions of the training's series, and what they cost."""
    began = time.perf_counter()
    table = world(0, (3 + options.seed) * 10**8, 2 * options.captions)
    scenes = [s for s in table.scenes() if part_of(s) == "pairs"][: options.captions]
    captions = [scene.caption for scene in scenes]
    config = replace(DRAW, seed=options.seed)
    reader = judge_of_shapes(scenes)

    def judge(pictures: Tensor, places: Sequence[int]) -> list[int]:
        return reader(enlarged(pictures), places)

    shape = (3, SIZE, SIZE)
    found = list(draw_pairs(drawing(model), Words(options.width), captions, shape, config, judge))
    pairs = Drawn(
        captions=[captions[place] for f in found for place in f.places],
        chosen=torch.cat([f.chosen for f in found]),
        rejected=torch.cat([f.rejected for f in found]),
    )
    kinds = Counter(f"{best} over {worst}" for f in found for best, worst in f.points)
    spent = round(time.perf_counter() - began, 1)
    return pairs, {"captions": len(captions), "pairs": kinds.total(), **kinds, "seconds": spent}


def base(options: argparse.Namespace) -> DiT:
    """Pre-training until the model draws `--stop-at` of the validation right, then SFT on
    other scenes at a tenth of the rate."""
    began = time.perf_counter()
    store, other = real_store(options, 0), real_store(options, 10**8)
    say(stage="data", seconds=round(time.perf_counter() - began, 1), samples=len(store.data))
    wanted = experiment(options)
    state = begin(wanted, store, load(options) if options.base else None)
    until, right, told = began + options.seconds, 0.0, []
    while state.step < options.steps and right < options.stop_at and time.perf_counter() < until:
        learn_unwatched(state, wanted.train, options.check, until, 1.0)
        right = drawn_right(averaged(state), options)
        told.append([state.step, round(time.perf_counter() - began, 1), round(right, 4)])
        say(step=state.step, seconds=told[-1][1], right=told[-1][2])
    model = averaged(state)
    tuned = experiment(options, lr=options.lr / 10, seed=options.seed + 1000)
    taken, state = state.step, begin(tuned, other, model)
    until = time.perf_counter() + options.sft_seconds
    tuning = learn_unwatched(state, tuned.train, options.sft_steps, until, 0.1)
    model = averaged(state)
    spent = round(time.perf_counter() - began, 1)
    row = {"way": "base", "seed": options.seed, "seconds": spent, "steps": taken}
    note(row | {"sft_steps": tuning, "steps_seconds_right": told}, options)
    if options.save:
        save(model, options.save)
    return model


def note(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Shows a row, and adds it to the file."""
    shown = {name: v for name, v in row.items() if name not in ("layers", "curve")}
    say(**shown, last=row.get("curve", [None])[-1])
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


def drawn_right(model: DiT, options: argparse.Namespace) -> float:
    """The share of captions of the validation that is drawn right, of scenes of their own."""
    everything = world(SERIES + 3, 0, 6 * options.pictures).scenes()
    scenes = [s for s in everything if part_of(s) == "valid"][: options.pictures]
    pictures = draw(model, [scene.caption for scene in scenes], seed=20_000 + options.seed)
    seen = read_pictures(enlarged(pictures))
    right = [points_of_shapes(s, q) > 0 for s, q in zip(seen, scenes, strict=True)]
    return sum(right) / len(right)


def ways(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is tried: `NAME:beta=…,lr=…,steps=…,every=…,what=lora|all,anchor=…,real=…,mix=…`; `real`
    is the weight of real pictures beside the pairs, `mix` are the shares of the way from
    the start that are scored too, as 0.25/0.5."""
    for given in options.ways:
        name, _, fields = given.partition(":")
        yield name, dict(field.split("=") for field in fields.split(",") if field)


def machine(model: DiT, options: argparse.Namespace) -> dict[str, Any]:
    """Where this was measured, and of what."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "way": "machine",
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "note": options.note,
        "model": asdict(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "draw": asdict(DRAW),
    }


def align(start: DiT, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each way from the same weights; first what they score."""
    layers = look(start, options)
    yield machine(start, options)
    yield {"way": "SFT", "scores": score(start, options), "layers": layers}
    for more in OTHER_NOISE:
        other = replace_options(options, seed=options.seed + more)
        yield {"way": "SFT, other noise", "scores": score(start, other), "layers": layers}
    drawn, cost = pairs_of(start, options)
    yield {"way": "pairs", **cost}
    for name, fields in ways(options):
        if time.perf_counter() > options.until:
            say(left_out=name)
            yield {"way": "left out", "name": name, **fields}
            continue
        for steps, row in aligned(start, drawn, name, fields, options):
            way = f"{name}, {steps} steps" if "every" in fields else name
            way += f", {row['share']:.0%} of the way" if "share" in row else ""
            yield {**fields, **row, "way": way, "steps": steps}


def aligned(
    start: DiT, drawn: Drawn, name: str, fields: dict[str, Any], options: argparse.Namespace
) -> Iterator[tuple[int, dict[str, Any]]]:
    """One way, DPO or flow matching on the preferred pictures or on real ones: after each `every`
    of its steps how many these were, and what is known by then; then the same of each share of the
    way from the start that `mix` names."""
    began = time.perf_counter()
    wanted, preference = settings(name, fields, options)
    config = wanted.train
    store = store_of(drawn, name, config.batch_size, options)
    if preference is not None and preference.real:
        store.beside = store_of(drawn, "real", config.batch_size, options)
    state = begin(wanted, store, start, preference)
    steps, kept = int(fields.get("steps", 400)), []
    every = int(fields.get("every", steps))
    if steps % every:
        raise SystemExit(f"{name}: {steps} steps are no multiple of every={every}")
    parts = [float(part) for part in fields.get("mix", "").split("/") if part]
    for until in range(every, steps + 1, every):
        began = began if until == every else time.perf_counter()
        kept += learn(state, config, every)
        spent = round(time.perf_counter() - began, 1)
        model = averaged(state)
        gate = preference is None or abs(first_loss(kept, preference) - math.log(2)) < 0.01
        curve = [{k: float(f"{v:.4g}") for k, v in line.items()} for line in kept]
        yield until, {"seconds": spent, "gate": gate, "curve": curve, **known_of(model, options)}
        for part in parts:
            yield until, {"share": part, **known_of(blended(start, model, part), options)}


def known_of(model: DiT, options: argparse.Namespace) -> dict[str, Any]:
    """What is known of a network."""
    return {"scores": score(model, options), "layers": look(model, options)}


def first_loss(kept: list[dict[str, Any]], preference: DPOConfig) -> float:
    """What the preference minimised before the first step, its anchor left out."""
    return kept[0]["loss"] - preference.anchor * kept[0]["loss_chosen"]


def settings(
    name: str, fields: dict[str, Any], options: argparse.Namespace
) -> tuple[Experiment, DPOConfig | None]:
    """The run of a way, and its preference if it is DPO."""
    wanted = experiment(
        options,
        batch_size=int(fields.get("batch", options.pairs_batch)),
        lr=float(fields.get("lr", 1e-4)),
        warmup=20,
        weight_decay=0.0,
        ema_decay=0.99,
        tune=TuneConfig(what=fields.get("what", "all"), lora=LoRAConfig(rank=16, alpha=32.0)),
    )
    numbers = {key: float(fields[key]) for key in ("beta", "anchor", "real") if key in fields}
    return wanted, DPOConfig(**numbers) if name.lower().startswith("dpo") else None


def store_of(drawn: Drawn, name: str, batch: int, options: argparse.Namespace) -> Store:
    """What a way learns from: pairs, the preferred of them, or other real pictures."""
    if name.startswith("real"):
        return real_store(replace_options(options, batch=batch, scenes=4096), 2 * 10**8)
    return Store(
        drawn.chosen,
        drawn.captions,
        drawn.rejected if name.lower().startswith("dpo") else None,
        width=options.width,
        batch_size=batch,
        seed=options.seed,
        device=torch.device(options.device),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("base", "align", "all"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--scenes", type=int, default=131_072, help="of the training, in memory")
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--sft-steps", type=int, default=10**6)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of pre-training, at most")
    parser.add_argument("--sft-seconds", type=float, default=math.inf)
    parser.add_argument("--stop-at", type=float, default=0.4, help="of the validation")
    parser.add_argument("--check", type=int, default=500, help="steps between two looks at that")
    parser.add_argument("--pictures", type=int, default=1536, help="that are scored")
    parser.add_argument("--captions", type=int, default=8192, help="that are drawn twice")
    parser.add_argument("--pairs-batch", type=int, default=256)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds to begin a way in")
    parser.add_argument("--ways", nargs="*", default=["dpo"])
    parser.add_argument("--base", type=Path, help="weights that `base` has saved")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", type=Path, help="a line for each way")
    parser.add_argument("--note", help="kept with the results: who else used the GPU, for example")
    options = parser.parse_args()
    options.until = time.perf_counter() + options.budget
    torch.set_num_threads(4 if options.device == "cuda" else 1)
    check_reader(torch.device(options.device))
    model = load(options) if options.stage == "align" else base(options)
    if options.stage == "base":
        return
    for row in align(model, options):
        note(row | {"seed": options.seed}, options)


if __name__ == "__main__":
    main()
