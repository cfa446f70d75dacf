"""All claims, by name."""

from __future__ import annotations

from mvsplit.errors import UserError, nearest
from mvsplit.reproduce.claim import Claim
from mvsplit.reproduce.claims_alignment import ALIGNMENT, ENTRY
from mvsplit.reproduce.claims_gradients import ATTENTION, EXTINCTION, MODES
from mvsplit.reproduce.claims_runs import COLLAPSE, CONTROL, DELAYED, ORDER, THOUSAND
from mvsplit.reproduce.claims_states import FRONT, TIMESTEP

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        COLLAPSE,
        MODES,
        ALIGNMENT,
        ENTRY,
        EXTINCTION,
        DELAYED,
        ORDER,
        ATTENTION,
        TIMESTEP,
        FRONT,
        CONTROL,
        THOUSAND,
    )
}


def get_claim(name: str) -> Claim:
    """Raises UserError for an unknown one."""
    if name not in CLAIMS:
        raise UserError(f"claim={name!r} is unknown: {nearest(name, CLAIMS)}")
    return CLAIMS[name]
