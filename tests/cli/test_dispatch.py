"""The entry point: which command runs, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from mvsplit import cli
from mvsplit.errors import UserError
from mvsplit.kernels.hopper import driver


@pytest.fixture
def command(monkeypatch):
    """A command `fake` whose behaviour a test sets."""
    module = types.ModuleType("fake_command")
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "does nothing"))
    return module


def test_a_command_gets_the_rest_and_gives_the_status(command):
    seen = []
    command.main = lambda arguments: seen.append(list(arguments)) or 7
    assert cli.main(["fake", "--a", "b"]) == 7
    assert seen == [["--a", "b"]]


def test_a_user_error_is_one_line_without_traceback(command, capsys):
    def fail(arguments):
        raise UserError("depth=0: must be at least 1")

    command.main = fail
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr() == ("", "mvsplit: depth=0: must be at least 1\n")


def test_any_other_error_keeps_its_traceback(command):
    def fail(arguments):
        raise ZeroDivisionError

    command.main = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_an_error_of_the_cuda_driver_is_one_line_with_what_to_do(command, capsys):
    def fail(arguments):
        raise driver.DriverError("launch: too many resources requested (701)")

    command.main = fail
    assert cli.main(["fake"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("mvsplit: launch: too many resources requested (701); give the command")
    assert "CUDA_VISIBLE_DEVICES= before the command" in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("waited", [True, False])
@pytest.mark.parametrize("error", ["CUDA error: unspecified launch failure", "CUDA out of memory"])
def test_a_trap_is_one_line_where_a_kernel_wrote_that_it_waited(
    error, waited, command, capsys, monkeypatch
):
    """Torch is told of a trap, as of any fault."""

    def fail(arguments):
        raise RuntimeError(f"{error}\nSearch for it")

    command.main = fail
    monkeypatch.setattr(driver, "_faults", [torch.tensor([int(waited)], dtype=torch.int32)])
    if not waited or "memory" in error:
        with pytest.raises(RuntimeError, match=error):
            cli.main(["fake"])
        return
    assert cli.main(["fake"]) == 2
    out, err = capsys.readouterr()
    assert "did not end within seconds" in err
    assert "CUDA_VISIBLE_DEVICES= before the command" in err
    assert (out, err.count("\n")) == ("", 1)


def test_another_runtime_error_keeps_its_traceback(command):
    def fail(arguments):
        raise RuntimeError("a bug")

    command.main = fail
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["fake"])


def test_ctrl_c_is_one_line(command, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    command.main = interrupt
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr() == ("", "mvsplit: interrupted\n")


def test_a_warning_is_one_line(command, capsys):
    def warn(arguments):
        warnings.warn("step 7 is damaged", stacklevel=2)
        return 0

    command.main = warn
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["fake"]) == 0
    assert capsys.readouterr().err == "mvsplit: warning: step 7 is damaged\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["smaple"]) == 2
    assert capsys.readouterr().err == "mvsplit: unknown command 'smaple'; did you mean sample?\n"


def test_help_names_every_command_without_importing_torch():
    code = "import sys, mvsplit.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert summary in done.stdout


def test_python_dash_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "mvsplit", "nothing"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mvsplit: unknown command 'nothing'")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_explains_itself(name, capsys):
    try:  # tyro leaves by an exception, a command with actions returns
        status = cli.main([name, "--help"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 0
    assert f"usage: mvsplit {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["app", "--help"]])
def test_where_nobody_reads_the_rest_it_ends_silently(arguments):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as unread:
        done = subprocess.run(
            [sys.executable, "-m", "mvsplit", *arguments], stdout=unread, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (cli.UNREAD, b"")


def test_another_pipe_that_breaks_keeps_its_traceback(command, capfd):
    def fail(arguments):
        raise BrokenPipeError("of a worker")

    command.main = fail
    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.main(["fake"])
