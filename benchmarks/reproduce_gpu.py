"""The claims of the paper on one GPU, several runs sharing it, without the command line's packages.

    python benchmarks/reproduce_gpu.py --out FOLDER --json FOLDER [--claims NAME …] [--minutes 9]
        [--together start front thousand] [--members N]

First a network of four layers is trained twice on the GPU and must come to the same losses, finite
and falling. Then the claims in the order of the registry, until the minutes are over; the same
command goes on with the same --out. The results of finished claims are copied into --json; on any
machine `mvsplit reproduce all --draw --pages docs/experiments` draws their pages from
docs/experiments/results/.

--together trains the runs of a regime as one network (`mvsplit.reproduce.together`). That is for
claims about losses and the similarity of tokens: collapse, controls, order (start), front and
thousand; the others look into gradients and are trained run by run, --workers at a time. What by
its first steps would not be through before the minutes are over stops there and is trained run by
run, too; --members has fewer in one. Its gate is that of depth_bench.py, and comes first.

Cost: as many minutes as --minutes says, nine by default, on one H200; the same command goes on
later. By the seconds in the kept results all twelve claims are a quarter of an hour, without what
starts and gates take. The twelve runs with a rise of the rate, which delayed, modes, alignment and
extinction, attention-only and alignment-entry share, took 3.5 to 3.7 minutes each, six at a time
(--workers 6): 47 to 82 looks of 1.6 s, from a CUDA graph of their own, are about half of that.
Those of timestep took 0.7 minutes each, three at a time; trained as one (--together start front
thousand), a run of collapse, order and controls 0.17, of front 0.05, of thousand 0.4.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from mvsplit.data.atomic import write_atomically
from mvsplit.reproduce import CLAIMS, Study, get_claim
from mvsplit.reproduce.check import check_training
from mvsplit.reproduce.depth.gate import check_together
from mvsplit.reproduce.depth.plan import get_entries, get_size
from mvsplit.reproduce.sizes import GPU
from mvsplit.residuals import RuleConfig


def check(device: str) -> None:
    """Raises RuntimeError where a short run on the device does not repeat itself, or learn."""
    size = replace(GPU, device=device, precision="bf16" if device == "cuda" else "fp32")
    regime = replace(GPU.regimes["calm"], depth=4, steps=60, warmup=5, probe_every=30)
    # With writers of zeros, as MV-Split started by default when the machines were checked.
    experiment = size.experiment(regime, RuleConfig(name="mvsplit"), seed=0, writers="zero")
    print(check_training(experiment), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", nargs="*", default=list(CLAIMS))
    parser.add_argument("--out", type=Path, required=True, help="runs; kept for the next time")
    parser.add_argument("--json", type=Path, required=True, help="results, CLAIM-gpu.json")
    parser.add_argument("--workers", type=int, default=GPU.workers)
    parser.add_argument("--together", nargs="*", default=[], help="regimes that train as one")
    parser.add_argument("--members", type=int, help="--together: of a network, at most")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--recompute", action="store_true", help="--together: blocks keep less")
    parser.add_argument("--gate", choices=("first", "elsewhere"), default="first")
    parser.add_argument("--check-only", choices=("cpu", "cuda"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if options.gate == "first":
        check(options.check_only or "cuda")
    if options.check_only:
        return
    options.json.mkdir(parents=True, exist_ok=True)
    if options.together and options.gate == "first":
        rules = get_entries(["plain", "mvsplit-1", "layerscale-0.01", "hard-center"])
        check_together(replace(get_size("gpu"), width=GPU.regimes["start"].width), rules)
    study = Study(
        options.out,
        GPU,
        workers=options.workers,
        together=options.together,
        members=options.members,
        recompute=options.recompute or None,
        say=lambda s: print(s, flush=True),
    )
    claims = [get_claim(name) for name in options.claims]
    for claim in claims:  # one after the other, so that a result is kept before the next begins
        for result in study.run([claim], minutes=(end - time.monotonic()) / 60):
            path = options.json / f"{result['claim']}-gpu.json"
            write_atomically(path, json.dumps(result, indent=1) + "\n")
            minutes = sum(row["seconds"] for row in result["runs"]) / 60
            words = f"{result['claim']:15} {result['verdict']:26} {minutes:.1f} minutes of runs"
            print(words, flush=True)
    left = [claim.name for claim in claims if not study.complete(claim)]
    print(f"left: {', '.join(left) or 'nothing'}")


if __name__ == "__main__":
    main()
