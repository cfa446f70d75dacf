"""The section of docs/performance.md on the cost of the watch (`performance_page.py`)."""

from __future__ import annotations

from performance_parts import Found, markdown
from watch_cost import shares

from mvsplit.training import TrainConfig

KINDS = {
    "plain": "no watch",
    "tier one": "the first tier: gradient norms of every writer, query and key",
    "probe, cheap": "and a look into every layer, the default fields",
    "probe, all": "and a look into every layer, all fields",
}


def watch(found: Found) -> str:
    """What watching all layers costs at the default cadence, and at that of the file's day.

    Args:
        found: of watch_cost.py, empty where there is none.
    """
    if not found:
        return ""
    seconds, cadence = found["seconds"], TrainConfig(steps=1, batch_size=1).probe_every
    tier, cost = shares(seconds, cadence)
    share = {"tier one": tier, **cost}
    rows = [
        [name, f"{seconds[kind]:.2f}", f"{share[kind]:.2%}" if kind in share else "–"]
        for kind, name in KINDS.items()
    ]
    head = ("a step of 400 layers", "s", f"added, one look in {cadence} steps")
    difference = found["gradient_difference"]
    from_graphs = found.get("looks_from_graphs", 0)
    how = (
        "that is replayed from a graph of its own, for half of the memory was free"
        if from_graphs
        else "launched part by part, and a graph recorded anew whose memory it took; where half\n"
        "of the memory is free, it is replayed from a graph of its own"
    )
    return f"""## The watch

D = 1024, bf16 weights, {found["tokens_per_step"]:,} tokens a step in four pieces, as CUDA graphs; a look costs a piece
{how}. {cadence} is the default of `--probe-every`, and of `Monitor` in calm;
`--probe all` asks for all fields.

{markdown(head, rows)}
Gate: the gradients of a step that is looked into differ from those of one that is not by {difference["probed"]:.1e},
and those of one that is not by {difference["repeated"]:.1e} from themselves (attention's backward adds up in any order).
"""  # noqa: E501
