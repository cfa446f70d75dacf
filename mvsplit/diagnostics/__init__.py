"""The watch: metrics of a mean-mode collapse, and the probe that reads them as a model runs."""

from mvsplit.diagnostics.detector import Detector
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.logs import read_jsonl
from mvsplit.diagnostics.monitor import Cadence, Monitor, Stopped
from mvsplit.diagnostics.probe import CHEAP_FIELDS, FIELDS, WRITER_FIELDS, LayerProbe
from mvsplit.diagnostics.report import write_report
from mvsplit.diagnostics.structure import TapNames, find_taps
from mvsplit.diagnostics.taps import (
    BranchTap,
    LayerTap,
    ParameterRows,
    gradient_norm_tensors,
    gradient_norms,
    taps_for_dit,
)
from mvsplit.diagnostics.thresholds import Thresholds

__all__ = [
    "CHEAP_FIELDS",
    "FIELDS",
    "WRITER_FIELDS",
    "BranchTap",
    "Cadence",
    "Detector",
    "Event",
    "LayerProbe",
    "LayerTap",
    "Monitor",
    "ParameterRows",
    "Stopped",
    "TapNames",
    "Thresholds",
    "find_taps",
    "gradient_norm_tensors",
    "gradient_norms",
    "read_jsonl",
    "taps_for_dit",
    "write_report",
]
