"""The section on sampling of docs/performance.md (`performance_page.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from performance_parts import Found, markdown


def engine(results: Sequence[Found]) -> str:
    """Whole pictures and a block alone; each of the latest result that has it, with its date."""

    def latest(stage: str) -> Found:
        return next((r[stage] | {"on": r["date"]} for r in reversed(results) if stage in r), {})

    released = results[0]["released"]
    low, high = released["eager_s_per_picture"]
    rows = [["released code, eager", f"{low}–{high}", "–"]]
    rows.append(["released block in one CUDA graph", f"{released['one_graph_s_per_picture']}", "–"])
    rival = latest("compiled_block_in_one_graph")
    if rival:
        name = "a torch.compile'd block in one CUDA graph"
        rows.append([name, f"{rival['seconds_1']:.2f}", f"{rival['seconds_8']:.2f}"])
    ours = [latest(f"pictures_{n}") for n in (1, 8)]
    rows.append(["the engine", *(f"{o['seconds']:.2f}" if o else "–" for o in ours)])
    head = ("1000 layers, 35 steps, guidance", "one picture, s", "eight, s")
    gate, block = latest("gate"), latest("parts8")
    gate = gate.get("1_at_a_time", gate)
    error = f"{gate['engine']:.4f} (bf16 ops: {gate['plain_bf16']:.4f})" if gate else "not run"
    alone = ""
    if block and ours[1] and block["on"] > ours[1]["on"]:
        times = [f"{block[name]:.0f}" for name in ("block_us", "ordinary_block_us")]
        alone = (
            f"\nThese pictures are of {ours[1]['on']}. Since then ({block['on']}) a block of eight "
            f"takes\n{times[0]} µs alone in a short graph, by the ordinary ops {times[1]}; whole "
            "pictures were not\ntimed again.\n"
        )
    return f"""## Sampling

Gate: distance of the latents to fp32 after 35 steps, {error}.

{markdown(head, rows)}{alone}
[Sampling fast](sampling.md) says how, what did not help and what is left.
"""
