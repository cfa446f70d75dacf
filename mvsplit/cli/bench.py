"""`mvsplit bench [NAME] [options of the script]`: runs a script of benchmarks/, shows its result.

The scripts are of the repository, not of the package. What each claims and costs stands in its
docstring; each checks that what it times is right before it takes a time. This command finds them,
says which can run here, and shows the result as a table. It is kept where --json says; else it
lies, named after the GPU and the date, in a temporary folder, which is told.
"""

from __future__ import annotations

import ast
import datetime
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import mvsplit
from mvsplit.cli.listing import listing
from mvsplit.errors import UserError, nearest
from mvsplit.reproduce.workers import run_command

Needs = Literal["CPU", "GPU", "GPUs"]

# What scripts need that do not simply run on a CPU, and arguments without which some do not run.
_NEEDS: dict[str, Needs] = {
    "eight_gpus": "GPU",
    "engine": "GPU",
    "engine_products": "GPU",
    "engine_trace": "GPU",
    "ffn_products": "GPU",
    "fused_ops": "GPU",
    "merge_forms": "GPU",
    "masked_attention": "GPU",
    "parallel_step": "GPUs",
    "recipe": "GPU",
    "reproduce_gpu": "GPU",
    "step_classes": "GPU",
    "step_gpu": "GPU",
    "thousand_layers": "GPU",
    "train_step": "GPU",
    "watch_cost": "GPU",
}
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "depth_on_demand": ("--run", "runs/digits-400l-mvsplit"),
    "policies": ("digits-32",),
    "samplers": ("--run", "runs/shapes-small"),
}
# Whose results performance_page.py shows as tables.
_SHOWN = (
    "engine",
    "ffn_products",
    "fused_ops",
    "masked_attention",
    "recipe",
    "step_classes",
    "thousand_layers",
    "train_step",
)
_PAGE = "performance_page"
_PAGES = (_PAGE, "what_you_get_page")  # both are written from all results
_USAGE = """usage: mvsplit bench [--list]
       mvsplit bench NAME [--json FILE] [options of the script; --help shows them]
       mvsplit bench page [--check]     docs/performance.md and docs/what-you-get.md
                                        from benchmarks/results/
"""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A script.

    Attributes:
        name: of the file.
        claim: the first paragraph of its docstring.
        cost: what its docstring says of it.
        needs: what it runs on.
    """

    name: str
    path: Path
    claim: str
    cost: str
    needs: Needs


def main(arguments: Sequence[str]) -> int:
    """Runs a script and returns its exit status, or lists them.

    Raises:
        UserError: there are no scripts here, no such script, or not the GPU that it needs.
    """
    name, *rest = arguments or ("--list",)
    if name in ("-h", "--help"):
        print(_USAGE + (__doc__ or "").partition("\n")[2])
        return 0
    folder = find_folder()
    if name == "page":
        found = [_run(folder / f"{page}.py", rest, folder) for page in _PAGES]
        return next(filter(None, found), 0)
    known = find_benchmarks(folder)
    if name == "--list":
        print(listing(map(_entry, known.values())))
        return 0
    if name not in known:
        near = nearest(name, ("--list", "--help", "page", *known))
        if not near.startswith("did you mean"):
            near = "mvsplit bench --list shows what there is"
        raise UserError(f"bench {name}: unknown; {near}")
    return _measure(known[name], rest, folder)


def find_folder() -> Path:
    """benchmarks/ beside the package, or in the current folder. Raises UserError without one."""
    for root in (Path(mvsplit.__file__).parents[1], Path.cwd()):
        if (root / "benchmarks" / "train_step.py").exists():
            return root / "benchmarks"
    raise UserError(
        "bench: the scripts are not part of the installed package; clone the project's repository "
        "and give the command in its folder"
    )


def find_benchmarks(folder: Path) -> dict[str, Benchmark]:
    """The scripts of a folder by name: those that measure, not those that write pages."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(text)) or ""
        claim = " ".join(said.partition("\n\n")[0].split())
        cost = re.search(r"Cost[^:\n]*:\s*(.+?)(?:\n\n|$)", said, re.DOTALL)
        page = path.stem.endswith("_page")
        if not page and "__main__" in text and "--json" in text:
            found[path.stem] = Benchmark(
                name=path.stem,
                path=path,
                claim=claim.removeprefix("Claim: "),
                cost=" ".join(cost[1].split()) if cost else "",
                needs=_NEEDS.get(path.stem, "CPU"),
            )
    return found


def _entry(b: Benchmark) -> tuple[str, list[str]]:
    here = "" if _missing(b.needs) is None else " (not here)"
    return f"{b.name}: {b.needs}{here}", [b.claim, *([f"Cost: {b.cost}"] if b.cost else [])]


def _missing(needs: Needs) -> str | None:
    """What this machine lacks."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if needs == "GPU" and count < 1:
        return "a GPU"
    return "several GPUs" if needs == "GPUs" and count < 2 else None


_TRIALS = {"--help", "-h", "--small", "--trial", "--table", "--check-only"}  # run anywhere


def _measure(benchmark: Benchmark, given: list[str], folder: Path) -> int:
    """Runs the script with a file for its result, then shows that as a table."""
    trial = bool(_TRIALS.intersection(given))
    lacks = None if trial else _missing(benchmark.needs)
    if lacks:
        raise UserError(
            f"bench {benchmark.name}: needs {lacks}, which this machine has not; "
            f"mvsplit bench --list shows what can run here"
        )
    arguments = list(given)
    out = _taken(arguments, "--json")
    if not arguments:
        arguments += _ARGUMENTS.get(benchmark.name, ())
    kept = out is not None
    if out is None and not trial:
        out = _temporary_result(benchmark)
    arguments += ["--json", str(out)] if out else []
    status = _run(benchmark.path, arguments, folder, _launcher(benchmark))
    if status == 0 and out is not None and out.exists():
        where = "" if kept else ", in a temporary folder; --json FILE keeps it where you say"
        print(f"result {out}{where}", flush=True)
        if benchmark.name in _SHOWN and not trial:
            table = ["--table", str(out.resolve())]
            status = _run(folder / f"{_PAGE}.py", table, folder)
    return status


def _taken(arguments: list[str], option: str) -> Path | None:
    """The value of an option, which both are taken out of the arguments."""
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            arguments[place : place + 1] = argument.split("=", 1)
    if option not in arguments:
        return None
    place = arguments.index(option)
    if place + 1 == len(arguments):
        raise UserError(f"bench: {option} wants the name of a file")
    value = arguments[place + 1]
    del arguments[place : place + 2]
    return Path(value)


def _temporary_result(benchmark: Benchmark) -> Path:
    """NAME_GPU_DATE.json in a new folder: hours of measuring are not lost for want of --json."""
    device = "cpu"
    if benchmark.needs != "CPU":
        device = torch.cuda.get_device_name().lower().removeprefix("nvidia ").split()[0]
    folder = Path(tempfile.mkdtemp(prefix="mvsplit-bench-"))
    return folder / f"{benchmark.name}_{device}_{datetime.date.today().isoformat()}.json"


def _launcher(benchmark: Benchmark) -> Sequence[str]:
    """What stands between Python and the module that it runs."""
    if benchmark.needs != "GPUs":
        return ()
    processes = max(2, torch.cuda.device_count())
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")


def _run(script: Path, arguments: Sequence[str], folder: Path, launcher: Sequence[str] = ()) -> int:
    """In the caller's folder, with the scripts' package first; a signal ends it and all that it
    began. `mvsplit.cli.script` runs them all and tells a user's mistake from a fault."""
    command = [sys.executable, *launcher, "-m", "mvsplit.cli.script", str(script), *arguments]
    paths = [str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return run_command(command, environment)
