"""Claims about clips: the gradient of the writers as frames grow, which mean serves best, and what
the presets draw. docs/video.md is written from the results (benchmarks/video_page.py).

    python benchmarks/video.py frames [--seeds 0 1 2] [--json FILE]

Each part first checks that the network on clips is that of the formulas (benchmarks/video_gates.py)
and writes FILE after every run, so that a killed job keeps what it has.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import video_frames
from video_gates import gates


class Results:
    """What has been found so far, in a file."""

    def __init__(self, path: Path | None, part: str, found: dict[str, Any]) -> None:
        self._path = path
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self._all = {
            "part": part,
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "gpu": gpu,
            "gates": found,
            "runs": [],
        }

    def add(self, row: dict[str, Any]) -> None:
        self._all["runs"].append(row)
        if self._path:
            self._path.write_text(json.dumps(self._all) + "\n", encoding="utf-8")


def frames(args: argparse.Namespace, results: Results) -> None:
    for seed in args.seeds:
        for variant, count in video_frames.plan(args.variants):
            if count > args.most_frames:
                continue
            row = video_frames.run(variant, count, seed, args.depth, args.device, args.steps)
            results.add(row)
            last = row["looks"][-1]
            print(
                f"{variant:24} F={count:2} seed {seed}: loss {row['losses'][-1]:.3f}, similarity "
                f"{last['tcs_deep']:.3f}, G_mean/G_ctr at the start "
                f"{row['looks'][0]['g_mean_attn'] / row['looks'][0]['g_ctr_attn']:.3g}, "
                f"{row['seconds']} s",
                flush=True,
            )


PARTS = {"frames": frames}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--depth", type=int, default=video_frames.DEPTH)
    parser.add_argument("--steps", type=int, default=video_frames.LOOKS[-1])
    parser.add_argument("--most-frames", type=int, default=32)
    parser.add_argument("--variants", nargs="+", default=list(video_frames.VARIANTS))
    args = parser.parse_args()
    results = Results(args.json, args.part, gates(args.device))
    PARTS[args.part](args, results)


if __name__ == "__main__":
    main()
