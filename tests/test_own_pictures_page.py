"""docs/your-own-pictures.md: the commands for a laptop run, with fewer steps than stand there."""

import json
import re
import shlex
from pathlib import Path

from mvsplit.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-pictures.md").read_text(encoding="utf-8")
LAPTOP = PAGE.split("## With the real encoders")[0]
FEWER = {
    "--steps 200": "--steps 2",
    "--steps 300": "--steps 3",
    "--num-images 16": "-n 2 --steps 2",
}


def test_from_a_folder_to_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", LAPTOP, re.DOTALL)
    exec(compile(code, "your-own-pictures.md", "exec"), {})
    assert len(list(Path("pictures").rglob("*.jpg"))) == 200
    blocks = "".join(re.findall(r"```sh\n(.*?)```", LAPTOP, re.DOTALL))
    for long, short in FEWER.items():
        assert blocks.count(long) == 1
        blocks = blocks.replace(long, short)
    names = []
    for program, *arguments in map(shlex.split, blocks.splitlines()):
        assert program == "mvsplit"
        assert main(arguments) == 0, (arguments, capsys.readouterr().err)
        names.append(arguments[0])
    assert names == ["encode", "train", "train", "sample", "report"]
    lines = Path("runs/pictures/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert len(list(Path("runs/pictures/samples").glob("*/0000?.png"))) == 2
