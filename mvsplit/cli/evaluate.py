"""`mvsplit evaluate RUN_OR_WEIGHTS …`: scores with a passport; `mvsplit evaluate compare A B …`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from mvsplit.cli import evaluate_compare
from mvsplit.cli.bars import progress_bar
from mvsplit.cli.subject import Options, Subject, find_run, open_subject, sampling_config
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
from mvsplit.evaluation.inception import Reference, evaluate_pictures, load_network
from mvsplit.evaluation.passport import (
    Evaluation,
    passport_head,
    text_sha256,
    values_sha256,
    write_evaluation,
)
from mvsplit.sampling import SamplingConfig, accelerated
from mvsplit.training import DataConfig, read_experiment
from mvsplit.training.builders import build_data

VALIDATION_SAMPLES = 256
JUDGED = ("digits", "shapes", "clips")  # data sets whose pictures are read
REAL_SHAPES = 2400  # rendered pictures, for the Fréchet distance
Scores = Iterator[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Scores a trained run or weights, and writes with the scores a passport: all that they depend
    on. The same command goes on where it was interrupted. `mvsplit evaluate compare A B …` shows
    scores side by side, if their passports agree in everything but the weights.

    Attributes:
        settings: as in mvsplit sample; the run's data are what the weights are scored on, as its
            own would be.
        num_images: pictures drawn for the scores; 0 for none.
        validation_samples: samples of the validation loss; 0 for none; 256, or what there is, if
            not given.
        validation_data: for a run on a cache, another cache, of pictures that it was not trained
            on.
        reference: real pictures, for FID, Inception Score, precision and recall (extra eval): a
            folder, or ADM's .npz.
        inception: the file with the Inception weights of torch-fidelity.
        prompts: file with one prompt a line, which are used in turn; else the captions of held-out
            samples.
        seed: of the noise, for drawing and for the validation loss.
        steps: of the sampler.
        sampler: as in mvsplit sample.
        guidance: as in mvsplit sample.
        guidance_interval: as in mvsplit sample.
        guidance_rescale: as in mvsplit sample.
        shift: as in mvsplit sample.
        batch_size: pictures at a time.
        name: of the evaluation; its settings if not given.
        json: where scores and passport go too, besides RUN/evaluations/NAME.json.
    """

    settings: Path | None = None
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 600
    validation_samples: int | None = None
    validation_data: Path | None = None
    reference: Path | None = None
    inception: Path | None = None
    prompts: Path | None = None
    seed: int = 0
    steps: int = 35
    sampler: str = "euler"
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    shift: float | None = None
    batch_size: int = 64
    name: str | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        for field in ("num_images", "validation_samples"):
            if (getattr(self, field) or 0) < 0:
                raise UserError(f"{field}={getattr(self, field)}: must not be negative")
        if (self.reference is None) != (self.inception is None):
            raise UserError(
                f"reference={self.reference}, inception={self.inception}: FID needs both, real "
                "pictures and the Inception weights"
            )


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status, 1 where scores cannot be compared.

    Raises:
        UserError: nothing to score, options that do not fit.
    """
    if arguments and arguments[0] == "compare":
        return evaluate_compare.main(arguments[1:])
    if (named := list(takewhile(lambda word: not word.startswith("-"), arguments)))[1:]:
        raise UserError(
            f"evaluate scores one run at a time, and here are {len(named)}; to see scores side by "
            f"side: mvsplit evaluate compare {' '.join(named)}"
        )
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit evaluate")
    Evaluating(args, ["evaluate", *arguments]).run()
    return 0


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
        self.name = args.name or _name(args, self.subject, self.config)
        self.held_out = self._held_out()
        device = next(self.subject.model.parameters()).device
        weights = {
            "source": str(args.source),
            "step": self.subject.record.get("step"),
            "averaged": args.ema if run is not None else None,
        }
        if args.settings is not None:
            weights["settings"] = str(args.settings)
        self.passport = passport_head(self.subject.model, device, weights, command)
        self.scores: dict[str, float] = {}
        self.samples: dict[str, list[float]] = {}

    def run(self) -> None:
        """Computes all scores, writes them with the passport, and shows them."""
        with progress_bar(Console(stderr=True), MofNCompleteColumn()) as bar:
            self.scores |= self._validate(bar)
            if self.args.num_images:
                self.scores |= self._judge(self._draw(bar), bar)
        if not self.scores:
            raise UserError(f"{self.args.source}: nothing to score; see mvsplit evaluate --help")
        done = Evaluation(
            name=self.name, scores=self.scores, passport=self.passport, samples=self.samples
        )
        places = [self.folder / f"{self.name}.json", self.args.json]
        for path in filter(None, places):
            write_evaluation(path, done)
        evaluate_compare.show([done])
        print(f"scores and passport: {places[0]}")

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

    def _validate(self, bar: Progress) -> dict[str, float]:
        if self.held_out is None:
            return {}
        dataset = self.held_out.dataset
        wanted = self.args.validation_samples or VALIDATION_SAMPLES
        count = wanted if dataset.size is None else min(wanted, dataset.size)
        self.passport["validation"] = {
            "data": self.held_out.name,
            "samples": count,
            "seed": self.args.seed,
            "sha256": examples_sha256(dataset, count),
        }
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
        prompts = self._prompts(self.args.num_images)
        sampling = {name: v for name, v in asdict(self.config).items() if name != "batch_size"}
        self.passport["sampling"] = {
            **sampling,
            "guidance_interval": list(self.config.guidance_interval),
            "pictures": len(prompts),
            "prompts_sha256": text_sha256(prompts),
        }
        recipe = {"weights": self.passport["weights"]["sha256"], **self.passport["sampling"]}
        frames = self.subject.shape[1] if self.subject.kind == "clip" else None
        drawn = DrawnPictures(self.folder / self.name, recipe, frames)
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
        if self.args.prompts is None and self._kind in JUDGED:
            judge: Callable[[DrawnPictures], Scores] = getattr(self, f"_judge_{self._kind}")
            scores |= dict(judge(drawn))
        if self.args.reference is not None:
            if self.subject.kind == "clip":
                raise UserError(f"reference={self.args.reference}: is for pictures, not for clips")
            scores |= dict(self._judge_real(drawn, bar))
        if not scores:
            print(f"{count} pictures are drawn; to score them give --reference and --inception")
        return scores

    def _judge_digits(self, drawn: DrawnPictures) -> Scores:
        pictures = drawn.read(self.args.num_images)
        real = Digits()
        self.passport["reference"] = {
            "pictures": len(real),
            "sha256": examples_sha256(real, len(real)),
        }
        labels = [k % 10 for k in range(len(pictures))]
        yield from evaluate_digits(pictures, labels, on_each=self._keep("digit_accuracy"))
        yield from digit_frechet(pictures)

    def _judge_shapes(self, drawn: DrawnPictures) -> Scores:
        shapes, others = self._shapes(SERIES), self._shapes(SERIES + 1)
        scenes = scenes_at(shapes, geneval_indices(shapes, self.args.num_images))
        real = others.fetch(geneval_indices(others, REAL_SHAPES)).latents
        self.passport["reference"] = {"pictures": len(real), "sha256": values_sha256(real)}
        pictures, keep = drawn.read(len(scenes)), self._keep("caption_exact")
        yield from evaluate_shapes(pictures, scenes, real, on_each=keep)

    def _judge_clips(self, drawn: DrawnPictures) -> Scores:
        scenes = self._clips().scenes(range(self.args.num_images))
        keep = self._keep("clip_exact")
        yield from evaluate_clips(drawn.read(len(scenes)), scenes, on_each=keep)

    def _judge_real(self, drawn: DrawnPictures, bar: Progress) -> Scores:
        assert self.args.reference is not None
        assert self.args.inception is not None
        device = next(self.subject.model.parameters()).device
        network = load_network(self.args.inception, device, batch_size=self.args.batch_size)
        height, width = self.subject.shape[1:]
        side = height * self.subject.codec.multiple, width * self.subject.codec.multiple
        reference = Reference(self.args.reference, side)
        self.passport["real"] = {
            "sha256": reference.sha256,
            "pictures": reference.count,
            "inception_sha256": network.sha256,
        }
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


def _name(args: Arguments, subject: Subject, config: SamplingConfig) -> str:
    """What is scored and how, in short; the passport says all."""
    ema = "" if args.ema else "_no-ema"
    return (
        f"{subject.name}{ema}_{config.sampler}{config.steps}_g{config.guidance:g}"
        f"_shift{config.shift:g}_seed{config.seed}_n{args.num_images}"
    )


def _in_turn(prompts: Sequence[str], count: int, source: Any) -> list[str]:
    if not prompts:
        raise UserError(f"prompts: {source} holds none")
    return [prompts[k % len(prompts)] for k in range(count)]
