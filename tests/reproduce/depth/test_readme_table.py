"""The README's table of the bench: what is in it and in which order."""

import pytest

from mvsplit.errors import UserError
from mvsplit.reproduce.depth.page import RESULTS, keep_rows
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES
from mvsplit.reproduce.depth.readme import BEGIN, END, loss_table, write_table
from mvsplit.reproduce.depth.table import cells
from tests.reproduce.depth.test_page import PAGES, RULE, seeds
from tests.reproduce.depth.tiny import TINY, row


def test_it_has_what_has_enough_seeds(tmp_path):
    rows = [
        *seeds("plain", [0.5, 0.6, 0.7]),
        *[row(rate, None, name="plain", depth=3) for rate in TINY.rates],
        *seeds("mvsplit-root", [0.4, 0.5, 0.6], depth=3),
        *seeds("keel", [0.1]),
        row(3.2e-3, 0.5, name="plain", depth=4),
        row(3.2e-3, None, name="mvsplit-root", depth=4),
        *[row(1e-2, 0.6, name="rezero", depth=4, seed=s) for s in range(3)],
    ]
    keep_rows(TINY, RULE, rows, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(readme, tmp_path / RESULTS, TINY)
    assert readme.read_text() == (
        f"before\n{BEGIN}\n"
        "| residual rule | 2 layers | 3 layers | 4 layers | at most above the best |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| ReZero | not run | not run | 0.6 ± 0 at 0.01, the only rate run | – |\n"
        "| plain | 0.6 ± 0.1 at 0.0032 | learns at no rate | "
        "0.5 (**1 seed**) at 0.0032, the only rate run | – |\n"
        "| MV-Split β=1/√L | not run | 0.5 ± 0.1 at 0.0032 | dead at 0.0032, others not run | – |\n"
        "\nOrdered by the last column, how far a mean is above the smallest of its depth where "
        "that is most; what was not run at a depth comes after the others, what died at one "
        "last. This order was chosen with rows in sight.\n\n"
        "Learned at each of these depths: none of them.\n\n"
        "Dead at every rate that was run, so not in the picture: at 3 layers plain "
        f"(at {', '.join(f'{rate:.2g}' for rate in TINY.rates)}); at 4 layers MV-Split β=1/√L "
        "(at 0.0032).\n\n"
        "No rule is best at every depth, and at none is one ahead of all others with 3 seeds.\n\n"
        "The default, MV-Split α=β=1/√L, writers standard, against the best rival of each depth: "
        "cannot tell at 2, 3 and 4, behind it nowhere that can be told.\n"
        f"{END}\nafter\n"
    )
    readme.write_text("no marks")
    with pytest.raises(UserError, match="between which the table goes"):
        write_table(readme, tmp_path / RESULTS, TINY)


def test_the_first_is_the_one_that_loses_least_where_it_loses_most():
    """And not the one that is best at most depths; few seeds set no mark for others."""
    losses = {"plain": (0.4, 0.58), "keel": (0.5, 0.5), "rezero": (0.45, 0.56)}
    rows = [
        each
        for name, pair in losses.items()
        for depth, loss in zip((2, 3), pair, strict=True)
        for each in seeds(name, [loss] * 3, depth=depth)
    ]
    rows += [row(3.2e-3, 0.1, name="deepnorm"), *seeds("deepnorm", [0.6] * 3, depth=3)]
    lines, names, depths = loss_table(cells(TINY, [*ENTRIES, *CANDIDATES], rows), TINY)
    assert depths == [2, 3]
    assert names == ["ReZero", "plain", "DeepNorm", "Keel"]
    assert [line.split(" | ")[-1].rstrip(" |") for line in lines[2:-1]] == [
        "12.5%",
        "16.0%",
        "20.0% (**few seeds**)",
        "25.0%",
    ]


def test_it_is_that_of_the_rows(tmp_path):
    text = (PAGES.parents[1] / "README.md").read_text()
    (tmp_path / "README.md").write_text(text)
    write_table(tmp_path / "README.md", PAGES / RESULTS)
    assert (tmp_path / "README.md").read_text() == text
    assert text.count("The same networks after 1000 steps:") == 1
