"""`mvsplit evaluate RUN_OR_WEIGHTS …`: scores with a passport; `mvsplit evaluate compare A B …`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from mvsplit.cli import evaluate_compare
from mvsplit.cli.bars import progress_bar
from mvsplit.cli.evaluate_again import found_again
from mvsplit.cli.evaluate_settings import Arguments, names_of, options_of_weights
from mvsplit.cli.evaluate_table import show
from mvsplit.cli.subject import find_run, open_subject, sampling_config
from mvsplit.data import Clips, Digits, Shapes
from mvsplit.data.types import Dataset
from mvsplit.errors import UserError
from mvsplit.evaluation.clip_reader import require_frames
from mvsplit.evaluation.clips import evaluate_clips
from mvsplit.evaluation.digits import digit_frechet, evaluate_digits
from mvsplit.evaluation.drawn import DrawnPictures, draw_missing
from mvsplit.evaluation.geneval import evaluate_shapes, geneval_indices, scenes_at
from mvsplit.evaluation.held_out import (
    SERIES,
    HeldOut,
    examples_sha256,
    held_out,
    validation_loss,
)
from mvsplit.evaluation.inception import Network, Reference, evaluate_pictures, load_network
from mvsplit.evaluation.passport import (
    Evaluation,
    passport_head,
    text_sha256,
    values_sha256,
    write_evaluation,
)
from mvsplit.sampling import accelerated
from mvsplit.training import DataConfig, read_experiment
from mvsplit.training.builders import build_data

VALIDATION_SAMPLES = 256
JUDGED = ("digits", "shapes", "clips")  # data sets whose pictures are read
REAL_SHAPES = 2400  # rendered pictures, for the Fréchet distance
Scores = Iterator[tuple[str, float]]


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status, 1 where scores cannot be compared.

    Raises:
        UserError: nothing to score, options that do not fit.
    """
    if arguments and arguments[0] == "compare":
        return evaluate_compare.main(arguments[1:])
    _require_no_misspelt_compare(arguments)
    if (named := list(takewhile(lambda word: not word.startswith("-"), arguments)))[1:]:
        raise UserError(
            f"evaluate scores one run at a time, and here are {len(named)}; to see scores side by "
            f"side: mvsplit evaluate compare {' '.join(named)}"
        )
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit evaluate")
    Evaluating(args, ["evaluate", *arguments]).run()
    return 0


def _require_no_misspelt_compare(arguments: Sequence[str]) -> None:
    word, *rest = arguments or [""]
    if get_close_matches(word, ["compare"], cutoff=0.7) and not Path(word).exists():
        raise UserError(
            f"no run at {word}; did you mean mvsplit evaluate {shlex.join(['compare', *rest])}?"
        )


class Evaluating:
    """One evaluation, from opening what is scored to writing the scores."""

    def __init__(self, args: Arguments, command: Sequence[str]) -> None:
        self.args, self.subject = args, open_subject(args, args.settings)
        run = find_run(args.source)
        trained = find_run(args.settings) if args.settings else run
        self.data = None if trained is None else read_experiment(trained).data
        if self.subject.kind == "clip" and args.num_images:
            require_frames(self.subject.shape[1])
        if args.num_images == 1 and (self._kind in ("digits", "shapes") or args.reference):
            raise UserError(
                "-n 1 (--num-images): a Fréchet distance needs two pictures or more; give at least "
                "-n 2, or -n 0 for the validation loss alone"
            )
        self.folder = Path("evaluations") if run is None else run / "evaluations"
        self.config = sampling_config(args, self.subject)
        self.held_out = self._held_out()
        self.count = self._count(args.validation_samples)
        by_default = args.validation_samples != 0 and self.count == self._count(None)
        self.names = names_of(args, self.subject, self.config, None if by_default else self.count)
        device = next(self.subject.model.parameters()).device
        weights = {
            "source": str(args.source),
            "step": self.subject.record.get("step"),
            "averaged": args.ema if run is not None else None,
        }
        if args.settings is not None:
            weights["settings"] = str(args.settings)
        self.passport = passport_head(self.subject.model, device, weights, command)
        if own := options_of_weights(args):
            self.passport["options"] = {name: str(value) for name, value in own.items()}
        self.prompts = self._prompts(args.num_images) if args.num_images else []
        self.real: Tensor | None = None
        self.inception: tuple[Reference, Network] | None = None
        self.scores: dict[str, float] = {}
        self.samples: dict[str, list[float]] = {}

    def run(self) -> None:
        """Computes all scores, writes them with the passport, and shows them; those that are there
        already are only shown."""
        self._describe()
        place = self.folder / f"{self.names.scores}.json"
        done = found_again(place, self.passport) if place.exists() else self._score(place)
        if self.args.json is not None:
            write_evaluation(self.args.json, done)
        show([done])
        print(f"scores and passport: {place}")
        if self.args.json is not None:
            print(f"the same in: {self.args.json}")

    def _score(self, place: Path) -> Evaluation:
        with progress_bar(Console(stderr=True), MofNCompleteColumn()) as bar:
            self.scores |= self._validate(bar)
            if self.args.num_images:
                self.scores |= self._judge(self._draw(bar), bar)
        if not self.scores:
            raise UserError(f"{self.args.source}: nothing to score; see mvsplit evaluate --help")
        done = Evaluation(
            name=self.names.scores,
            scores=self.scores,
            passport=self.passport,
            samples=self.samples,
        )
        write_evaluation(place, done)
        return done

    def _describe(self) -> None:
        """Completes the passport, before anything is scored."""
        if self.held_out is not None:
            self.passport["validation"] = {
                "data": self.held_out.name,
                "samples": self.count,
                "seed": self.args.seed,
                "sha256": examples_sha256(self.held_out.dataset, self.count),
            }
        if not self.args.num_images:
            return
        sampling = {name: v for name, v in asdict(self.config).items() if name != "batch_size"}
        self.passport["sampling"] = {
            **sampling,
            "guidance_interval": list(self.config.guidance_interval),
            "pictures": len(self.prompts),
            "prompts_sha256": text_sha256(self.prompts),
        }
        if self._read_as == "digits":
            real = Digits()
            digest = examples_sha256(real, len(real))
            self.passport["reference"] = {"pictures": len(real), "sha256": digest}
        elif self._read_as == "shapes":
            others = self._shapes(SERIES + 1)
            self.real = others.fetch(geneval_indices(others, REAL_SHAPES)).latents
            digest = values_sha256(self.real)
            self.passport["reference"] = {"pictures": len(self.real), "sha256": digest}
        if self.args.reference is not None:
            self._describe_real(self.args.reference)

    def _describe_real(self, path: Path) -> None:
        if self.subject.kind == "clip":
            raise UserError(f"reference={path}: is for pictures, not for clips")
        assert self.args.inception is not None
        device = next(self.subject.model.parameters()).device
        network = load_network(self.args.inception, device, batch_size=self.args.batch_size)
        height, width = self.subject.shape[1:]
        side = height * self.subject.codec.multiple, width * self.subject.codec.multiple
        reference = Reference(path, side)
        self.inception = reference, network
        self.passport["real"] = {
            "sha256": reference.sha256,
            "pictures": reference.count,
            "inception_sha256": network.sha256,
        }

    def _held_out(self) -> HeldOut | None:
        """Samples for the validation loss; None, said aloud, where nobody asked and none are."""
        wanted, path = self.args.validation_samples, self.args.validation_data
        if self.data is None:
            if wanted or path:
                raise UserError(
                    "validation: weights have no data of their own; give --settings RUN, the run "
                    "that they are from"
                )
            return None
        if wanted == 0:
            return None
        try:
            return held_out(self.data, self.subject.model.config.text_width, path)
        except UserError as error:
            if wanted is not None or path is not None:
                raise
            print(f"no validation loss: {error}")
            return None

    def _count(self, wanted: int | None) -> int:
        """Samples of the validation loss, where `wanted` are asked for; fewer are said aloud."""
        if self.held_out is None:
            return 0
        size = self.held_out.dataset.size
        if wanted is not None and size is not None and wanted > size:
            print(
                f"validation_samples={wanted}: there are {size} in {self.held_out.name}, and all "
                "of them are scored"
            )
        wanted = wanted or VALIDATION_SAMPLES
        return wanted if size is None else min(wanted, size)

    def _validate(self, bar: Progress) -> dict[str, float]:
        if self.held_out is None:
            return {}
        dataset, count = self.held_out.dataset, self.count
        task = bar.add_task("validation loss", total=count)
        losses = validation_loss(
            self.subject.model,
            self.held_out.embedder or self.subject.embedder,
            dataset,
            samples=count,
            seed=self.args.seed,
            batch_size=self.args.batch_size,
            on_batch=lambda samples: bar.advance(task, samples),
            on_each=self._keep("validation_loss"),
        )
        return dict(losses)

    def _keep(self, score: str) -> Callable[[list[float]], None]:
        """Keeps what each sample has of a score, for differences of pairs."""
        return partial(self.samples.__setitem__, score)

    def _draw(self, bar: Progress) -> DrawnPictures:
        prompts = self.prompts
        recipe = {
            "weights": self.passport["weights"]["sha256"],
            **self.passport["sampling"],
            **self.passport.get("options", {}),
        }
        frames = self.subject.shape[1] if self.subject.kind == "clip" else None
        drawn = DrawnPictures(self.folder / self.names.pictures, recipe, frames)
        steps = len(prompts) * self.config.steps
        begun = min(drawn.done, len(prompts)) * self.config.steps
        task = bar.add_task("drawing", total=steps, completed=begun)
        embedder = self.subject.embedder
        if self.held_out is not None and self.args.prompts is None:
            embedder = self.held_out.embedder or embedder
        try:
            draw_missing(
                drawn,
                accelerated(self.subject.model),
                embedder,
                prompts,
                self.subject.shape,
                self.config,
                self.subject.codec.decode,
                on_step=lambda *, pictures: bar.advance(task, pictures),
            )
        except KeyboardInterrupt:
            print(
                f"{drawn.done} of {len(prompts)} pictures are in {drawn.folder}; the same command "
                "goes on from there"
            )
            raise
        return drawn

    def _prompts(self, count: int) -> list[str]:
        if self.args.prompts is not None:
            try:
                lines = self.args.prompts.read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise UserError(
                    f"prompts={self.args.prompts}: {error.strerror}; give a file with one prompt "
                    "a line"
                ) from error
            return _in_turn([line for line in lines if line.strip()], count, self.args.prompts)
        if self._kind == "digits":
            return _in_turn(Digits.vocabulary, count, "digits")
        if self._kind == "shapes":
            shapes = self._shapes(SERIES)
            return [s.caption for s in scenes_at(shapes, geneval_indices(shapes, count))]
        if self._kind == "clips":
            return [scene.caption for scene in self._clips().scenes(range(count))]
        if self.held_out is None:
            raise UserError("prompts: give --prompts FILE, one a line, or --num-images 0")
        dataset: Dataset = self.held_out.dataset
        known = min(count, dataset.size or count)
        captions = [dataset.fetch([index]).captions[0] for index in range(known)]
        return _in_turn(captions, count, self.held_out.name)

    def _judge(self, drawn: DrawnPictures, bar: Progress) -> dict[str, float]:
        count = self.args.num_images
        scores: dict[str, float] = {}
        if self._read_as is not None:
            judge: Callable[[DrawnPictures], Scores] = getattr(self, f"_judge_{self._read_as}")
            scores |= dict(judge(drawn))
        if self.inception is not None:
            scores |= dict(self._judge_real(drawn, bar, *self.inception))
        if not scores:
            print(f"{count} pictures are drawn; to score them give --reference and --inception")
        return scores

    def _judge_digits(self, drawn: DrawnPictures) -> Scores:
        pictures = drawn.read(self.args.num_images)
        labels = [k % 10 for k in range(len(pictures))]
        yield from evaluate_digits(pictures, labels, on_each=self._keep("digit_accuracy"))
        yield from digit_frechet(pictures)

    def _judge_shapes(self, drawn: DrawnPictures) -> Scores:
        assert self.real is not None
        shapes = self._shapes(SERIES)
        scenes = scenes_at(shapes, geneval_indices(shapes, self.args.num_images))
        pictures, keep = drawn.read(len(scenes)), self._keep("caption_exact")
        yield from evaluate_shapes(pictures, scenes, self.real, on_each=keep)

    def _judge_clips(self, drawn: DrawnPictures) -> Scores:
        scenes = self._clips().scenes(range(self.args.num_images))
        keep = self._keep("clip_exact")
        yield from evaluate_clips(drawn.read(len(scenes)), scenes, on_each=keep)

    def _judge_real(
        self, drawn: DrawnPictures, bar: Progress, reference: Reference, network: Network
    ) -> Scores:
        total = self.args.num_images + reference.count
        task = bar.add_task("features", total=total)
        yield from evaluate_pictures(
            drawn.paths(self.args.num_images),
            reference,
            network,
            drawn.folder / "features",
            on_batch=lambda pictures: bar.advance(task, pictures),
        )

    @property
    def _kind(self) -> str | None:
        return None if self.data is None else self.data.dataset

    @property
    def _read_as(self) -> str | None:
        """The kind of data whose pictures are read; None where prompts of one's own say what they
        should show, or nothing can read them."""
        return self._kind if self.args.prompts is None and self._kind in JUDGED else None

    def _shapes(self, series: int) -> Shapes:
        assert isinstance(self.data, DataConfig)
        shapes = build_data(replace(self.data, series=series))
        assert isinstance(shapes, Shapes)
        return shapes

    def _clips(self) -> Clips:
        assert isinstance(self.data, DataConfig)
        clips = build_data(replace(self.data, series=SERIES))
        assert isinstance(clips, Clips)
        return clips


def _in_turn(prompts: Sequence[str], count: int, source: Any) -> list[str]:
    if not prompts:
        raise UserError(f"prompts: {source} holds none")
    return [prompts[k % len(prompts)] for k in range(count)]
