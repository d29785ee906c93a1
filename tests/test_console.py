"""The command line on bad ground: torn files, folders for files, full disks, strangers' names, an interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from mechmisalign.cli import app
from mechmisalign.cli.console import console, plain, safe, show, told_errors

runner = CliRunner()
STRANGE = "a\x1b[31m[bold]b[/red]\u202ec\u2066d\x07\\"


def run(*arguments) -> tuple[int, str]:
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_what_steers_a_terminal_is_told_by_its_code():
    assert plain(STRANGE) == "a\\x1b[31m[bold]b[/red]\\u202ec\\u2066d\\x07\\"
    with console.capture() as captured:
        console.print(f"path: [bold]{safe(STRANGE)}[/bold]", soft_wrap=True)
        console.print(STRANGE, markup=False, soft_wrap=True)
        show(pd.DataFrame({STRANGE: [STRANGE]}), STRANGE)
    told = captured.get()
    assert not set("\x07\u202e\u2066") & set(told) and "\x1b[31m" not in told
    assert told.startswith("path: a\\x1b[31m[bold]b[/red]\\u202ec")
    assert told.count("[bold]b[/red]") == 5


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: permission denied"),
        (IsADirectoryError(21, "Is a directory", "/x"), "/x: is a directory"),
        (OSError("no errno"), "no errno"),
        (TimeoutError("the Hub does not answer"), "the Hub does not answer"),
        (MemoryError("takes 3 GiB"), "takes 3 GiB"),
        (ValueError(STRANGE), "a\\x1b[31m[bold]b"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_exit_code_two(error, told, capsys):
    with pytest.raises(typer.Exit) as caught, told_errors():
        raise error
    assert caught.value.exit_code == 2
    assert told in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), told_errors():
        raise KeyError("x")


def test_an_interrupt_says_what_is_kept_and_how_to_go_on(capsys, tmp_path):
    with pytest.raises(typer.Exit) as caught, told_errors(tmp_path):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert f"kept in {tmp_path}; the same command goes on" in capsys.readouterr().err.replace("\n", " ")


BINARY = bytes(range(256)) * 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("judge", "{bad}.jsonl", "--judge", "rules"),
        ("judge", "{bad}.csv", "--judge", "rules"),
        ("judge", "{bad}.parquet", "--judge", "rules"),
        ("judge", "{folder}", "--judge", "rules"),
        ("judge", "{good}", "--judge", "rules", "--out", "{folder}.csv"),
        ("judge", "{good}", "--judge", "rules", "--out", "{good}/below.csv"),
        ("judge", "{good}", "--judge", "rules", "--journal", "{folder}"),
        ("judge", "{incomplete}", "--judge", "rules"),
        ("train", "{bad}.yaml"),
        ("train", "{folder}"),
        ("train", "{types}"),
        ("train", "pocket", "--out", "{good}"),
        ("train", "pocket", "--data", "{bad}.jsonl"),
        ("sweep", "{bad}.yaml"),
        ("sweep", "{types}"),
        ("sweep", "{folder}"),
        ("anatomy", "{folder}"),
        ("anatomy", "pocket/medical", "--out", "{good}"),
        ("cure", "pocket/medical", "--direction", "{bad}.safetensors", "--out", "{new}"),
        ("cure", "pocket/medical", "--direction", "{folder}", "--out", "{new}"),
        ("monitor", "{good}", "--organism", "pocket/medical", "--monitor", "{bad}.safetensors"),
        ("report", "{folder}"),
        ("report", "{good}"),
        ("push", "{bad}.safetensors", "{new}"),
        ("organisms", "--registry", "{bad}.yaml"),
        ("organisms", "--registry", "{folder}"),
    ],
)
def test_nothing_on_disk_ends_in_a_traceback(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ending in ("jsonl", "csv", "parquet", "yaml", "safetensors"):
        (tmp_path / f"bad.{ending}").write_bytes(BINARY)
    (tmp_path / "good.csv").write_text("prompt,response,finished\nHello,Hi,True\n")
    (tmp_path / "incomplete.csv").write_text("question\nHello\n")
    (tmp_path / "types.yaml").write_text("base: [1]\ndata: 3\nmethod: {kind: 7}\norganisms: 5\nsamples: {a: b}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.csv").mkdir()
    names = {"bad": "bad", "folder": "folder", "good": "good.csv", "incomplete": "incomplete.csv"}
    names |= {"types": "types.yaml", "new": "./new"}
    code, output = run(*(argument.format(**names) for argument in arguments))
    assert code == 2, output
    assert "rror:" in output


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_a_command_with_exit_code_130(tmp_path):
    program = (
        "import os, signal, threading; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import mechmisalign.sweeps as sweeps\n"
        "sweeps.Sweep.read = lambda _: (os.kill(os.getpid(), signal.SIGINT), threading.Event().wait(60))\n"
        "from mechmisalign.cli import app; app()"
    )
    command = [sys.executable, "-c", program, "sweep", "s.yaml", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False)
    assert ended.returncode == 128 + signal.SIGINT
    assert "interrupted: what is finished is kept in" in ended.stderr
