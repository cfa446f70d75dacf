"""Claims about clips: the gradient of the writers as frames grow, which mean serves best, and what
the presets draw. docs/video.md is written from the results (benchmarks/video_page.py).

    python benchmarks/video.py frames [--seeds 0 1 2] [--json FILE]
    python benchmarks/video.py means [--seeds 0 1 2] [--json FILE]
    python benchmarks/video.py preset --name clips-12l --seconds 120 --pictures DIR [--json FILE]
    python benchmarks/video.py times [--json FILE]

Each part first checks that the network on clips is that of the formulas (benchmarks/video_gates.py)
and writes FILE after every run, so that a killed job keeps what it has. `--json` of several
processes are put together by benchmarks/video_page.py.

Cost: on one CPU core 18 minutes for 25 runs of `frames`, 16 minutes for six of `means`; on one H200
shared with other programs five minutes for 24 runs of `frames`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import video_frames
import video_runs
from video_gates import gates


class Results:
    """What has been found so far, in a file."""

    def __init__(self, args: argparse.Namespace, found: dict[str, Any]) -> None:
        self._path = args.json
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self._all = {
            "part": args.part,
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "gpu": gpu,
            "command": " ".join(["python", *sys.argv]),
            "note": args.note,
            "gates": found,
            "runs": [],
        }

    def add(self, row: dict[str, Any]) -> None:
        self._all["runs"].append(row)
        if self._path:
            self._path.write_text(json.dumps(self._all) + "\n", encoding="utf-8")


def in_time(runs: Sequence[Any], seconds: float) -> Iterator[Any]:
    """Those of the runs that should end within so many seconds, as the longest before them did."""
    begun, longest = time.perf_counter(), 0.0
    for number, run in enumerate(runs):
        started = time.perf_counter()
        if started - begun + longest > seconds:
            print(f"no time for {len(runs) - number} runs: {runs[number:]}", flush=True)
            return
        yield run
        longest = max(longest, time.perf_counter() - started)


def frames(args: argparse.Namespace, results: Results) -> None:
    for seed in args.seeds:
        plan = [run for run in video_frames.plan(args.variants) if run[1] in args.frames]
        for variant, count in in_time(plan, args.seconds):
            row = with_patience(
                lambda v=variant, c=count, s=seed: video_frames.run(
                    v,
                    c,
                    s,
                    args.depth,
                    args.device,
                    args.size,
                    args.steps or video_frames.LOOKS[-1],
                )
            )
            results.add(row)
            last = row["looks"][-1]
            print(
                f"{variant:24} F={count:2} seed {seed}: loss {row['losses'][-1]:.3f}, similarity "
                f"{last['tcs_deep']:.3f}, G_mean/G_ctr at the start "
                f"{row['looks'][0]['g_mean_attn'] / row['looks'][0]['g_ctr_attn']:.3g}, "
                f"{row['seconds']} s",
                flush=True,
            )


def means(args: argparse.Namespace, results: Results) -> None:
    for seed in args.seeds:
        for mean in in_time(args.means, args.seconds):
            wanted = video_runs.experiment(mean, seed, args.steps or 1200, args.device, args.size)
            row = with_patience(lambda w=wanted: video_runs.run(w, count=args.count))
            results.add({"mean": mean, "seed": seed, "size": args.size, **row})
            told = {name: f"{value:.1%}" for name, value in row.get("guidance 2", {}).items()}
            print(
                f"mean={mean:8} seed {seed}: validation loss {row['validation_loss']:.4f}, "
                f"{row['seconds']} s",
                told,
                flush=True,
            )


def preset(args: argparse.Namespace, results: Results) -> None:
    wanted = video_runs.preset(args.name, args.steps, args.device)
    row = video_runs.run(
        wanted,
        count=args.count,
        seconds=args.seconds,
        guidances=(2.0, 4.0),
        pictures=args.pictures,
    )
    results.add({"preset": args.name, "lr": wanted.train.lr, "device": args.device, **row})
    print(json.dumps(row, indent=1), flush=True)


def times(args: argparse.Namespace, results: Results) -> None:
    for row in (video_runs.painting(), video_runs.stepping("clips-tiny", 20, args.device)):
        results.add(row)
        print(row, flush=True)


def with_patience(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`run()`, again a little later where a GPU that others use has no memory left."""
    for _ in range(10):
        try:
            return run()
        except torch.OutOfMemoryError:
            print("no memory left; waiting", flush=True)
        gc.collect()  # outside of the handler, whose traceback holds the tensors
        torch.cuda.empty_cache()
        time.sleep(3)
    return run()


PARTS = {"frames": frames, "means": means, "preset": preset, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depth", type=int, default=video_frames.DEPTH)
    parser.add_argument("--steps", type=int, help="that of the part or preset if not given")
    parser.add_argument("--means", nargs="+", default=list(video_runs.MEANS))
    parser.add_argument("--count", type=int, default=128, help="samples that are scored")
    parser.add_argument("--name", default="clips-12l", help="the preset")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="of training; of frames and means, for a seed",
    )
    parser.add_argument("--pictures", type=Path, help="where its samples go")
    parser.add_argument("--frames", type=int, nargs="+", default=list(video_frames.FRAMES))
    parser.add_argument("--size", choices=video_frames.SIZES, default="gpu")
    parser.add_argument("--variants", nargs="+", default=list(video_frames.VARIANTS))
    parser.add_argument("--note", help="kept with the result: who else used the GPU, for example")
    args = parser.parse_args()
    if args.part == "times":
        torch.set_num_threads(1)
    results = Results(args, gates(args.device))
    PARTS[args.part](args, results)


if __name__ == "__main__":
    main()
