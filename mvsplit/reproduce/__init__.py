"""The claims of arXiv 2605.06169, each a few training runs and a verdict by a rule set beforehand.

`rule` says what a verdict is, `sizes` how large the runs are, `trial` trains one, `runlog` reads
it, `claims_*` hold the claims, `study` runs and judges them, `page` writes them up.
"""

from mvsplit.reproduce.claims import CLAIMS, get_claim
from mvsplit.reproduce.sizes import SIZES
from mvsplit.reproduce.study import Study

__all__ = ["CLAIMS", "SIZES", "Study", "get_claim"]
