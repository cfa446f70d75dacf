"""Resume is a contract: one object lists everything that must come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from mvsplit.data import Loader
from mvsplit.diagnostics.taps import LayerTap
from mvsplit.errors import UserError
from mvsplit.models import DiT
from mvsplit.models.growth import parameters_of_layers
from mvsplit.models.surgery import gain_names, set_rule
from mvsplit.residuals import RuleConfig, as_recorded
from mvsplit.residuals.mvsplit import written_out
from mvsplit.training.checkpoint import Snapshot
from mvsplit.training.distributed import rank, world
from mvsplit.training.ema import EMA
from mvsplit.training.graphs import Graphs
from mvsplit.training.memory_plan import Planner
from mvsplit.training.objective import FLOW, Objective
from mvsplit.training.optimizer import AdamW, flatten_parameters
from mvsplit.training.randomness import global_states, restore_globals
from mvsplit.training.reactions import Reactions


@dataclass(kw_only=True)
class TrainState:
    """A run between two steps. What comes back after an interruption:

    | what | from |
    |---|---|
    | weights, and the rule if a policy changed it | `model` |
    | averaged weights | `ema`, if the run keeps them |
    | moments and number of updates | `optimizer` |
    | learning rate | a function of `step` and `reactions` |
    | data position | `loader` |
    | noise and times | functions of (seed, `step`) |
    | global random generators | Python, NumPy, PyTorch on every device |
    | what was done about alarms | `reactions` |
    | what the weights came from, if they were not drawn | `base` |
    | which layers came to the network later | `new_layers` |
    | what a preference is measured against | `objective` |
    | step | `step` |

    `taps`, `device`, `planner` and `graphs` are rebuilt; `layout` says how the network lies on
    several processes.
    """

    model: DiT
    optimizer: AdamW
    schedule: Callable[[int], float]
    ema: EMA | None
    loader: Loader
    taps: list[LayerTap]
    device: torch.device
    planner: Planner | None = None
    graphs: Graphs | None = None
    layout: str | None = None
    objective: Objective = FLOW
    step: int = 0
    reactions: Reactions = field(default_factory=Reactions)
    base: str | None = None  # `fingerprint` of the weights that the run started from
    new_layers: list[int] = field(default_factory=list)  # that growth put in

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of each parameter only."""
        return any(group.spread is not None for group in self.optimizer.groups)

    def learning_rate(self, step: int) -> float:
        """Of step n = 1, 2, …: the schedule's, times what an alarm has left of it."""
        return self.schedule(step) * self.reactions.factor(step)

    def snapshot(self) -> Snapshot:
        """All of the above, as views where that is possible; of a run on several ranks, what this
        one holds or, where all hold the same, its part of it. Their global generators are alike,
        and the first rank's stand for all."""
        random_tensors, random_values = global_states()
        tensors = {
            "model": self.optimizer.mine(self.model.state_dict()),
            "optimizer": self.optimizer.moments(),
            **self.objective.tensors(),
        }
        if rank() == 0:
            tensors["random"] = random_tensors
        if self.ema is not None:
            tensors["ema"] = self.ema.parameters()
        values: dict[str, Any] = {
            "rule": dataclasses.asdict(self.model.config.rule),
            "updates": self.optimizer.updates(),
            "reactions": dataclasses.asdict(self.reactions),
            "base": self.base,
            "new_layers": self.new_layers,
            "data": self.loader.state_dict(),
            "embedder": self.loader.embedder.spec(),
            "random": random_values,
        }
        return Snapshot(step=self.step, tensors=tensors, values=values, sharded=world() > 1)

    def restore(self, snapshot: Snapshot) -> None:
        """Becomes what `snapshot` was taken of.

        Raises:
            UserError: the snapshot is of another model, of other data or another text embedder.
        """
        if snapshot.values["embedder"] != self.loader.embedder.spec():
            raise UserError(
                "embedder: the checkpoint's text embedder is not the one that data.dataset "
                "gives now; use the version of mvsplit that wrote it, or start a new run"
            )
        self.set_apart(snapshot.values.get("new_layers", []))
        self._take_rule(snapshot)
        targets = {"model": dict(self.model.state_dict()), "optimizer": self.optimizer.moments()}
        targets |= self.objective.tensors()
        if self.ema is not None:
            targets["ema"] = self.ema.parameters()
        for name, target in targets.items():
            snapshot.copy_to(name, target)
        self.optimizer.set_updates(snapshot.values["updates"])
        self.loader.load_state_dict(snapshot.values["data"])
        restore_globals(dict(snapshot.tensors["random"]), snapshot.values["random"])
        self.reactions = Reactions(**snapshot.values["reactions"])
        self.base = snapshot.values.get("base")
        self.step = snapshot.step

    def set_apart(self, layers: list[int]) -> None:
        """Gives layers that came later moments and a bias correction of their own, both fresh."""
        if layers != self.new_layers:
            self.new_layers = layers
            self.regroup(self.parameters_apart())

    def parameters_apart(self) -> list[str]:
        """The names of the parameters of layers that came later."""
        return parameters_of_layers(self.model, self.new_layers)

    def regroup(self, joined: Collection[str]) -> None:
        """Lays out anew what is laid out by the parameters of the model, after some came or went:
        the optimiser, with those named in `joined` in a group of their own and with fresh moments,
        and the averages, which begin as the parameters are."""
        if self.graphs is not None:
            self.graphs.clear()
        groups = flatten_parameters(self.model, joined, gains_apart=self.optimizer.gains_apart)
        self.optimizer = self.optimizer.regrouped(groups)
        if self.ema is not None:
            self.ema = EMA(groups, self.ema.decay)

    def _take_rule(self, snapshot: Snapshot) -> None:
        """Gives the model the rule that it had when the snapshot was taken."""
        rule = RuleConfig(**as_recorded(snapshot.values["rule"]))
        joined = "joined" in snapshot.values["updates"]
        depth, has = self.model.config.depth, self.model.config.rule
        other = written_out(rule, depth) != written_out(has, depth)
        if other or joined != ("joined" in self.optimizer.updates()):
            if self.sharded:
                raise UserError(
                    f"the checkpoint's network was given the rule {rule.name} while it ran, and is "
                    f"already laid out on {world()} processes; go on with it on one, or with "
                    f"train.parallel.layout=replicate"
                )
            set_rule(self.model, rule)
            apart = gain_names(self.model) if joined else ()
            self.regroup(self.parameters_apart() or apart)
