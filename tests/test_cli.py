"""The command line: every public command has help; user errors are one line and exit code 2."""

import pytest

from hiexp import cli

COMMANDS = [
    "quickstart",
    "rollout",
    "index",
    "serve-retriever",
    "distill",
    "build",
    "query",
    "explain",
    "train",
    "eval",
    "report",
    "bench",
    "doctor",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    assert "usage: hiexp" in capsys.readouterr().out


def test_user_error_is_one_line_and_exit_code_2(tmp_path, capsys):
    missing = tmp_path / "missing.jsonl"
    assert cli.main(["distill", str(missing), "--out", str(tmp_path / "hek.sqlite")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hiexp: error: ")
    assert str(missing) in error
    assert len(error.strip().splitlines()) == 1


def test_traceback_shows_where(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["--traceback", "distill", str(tmp_path / "missing.jsonl"), "--out", str(tmp_path / "hek.sqlite")])


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        cli.main(["quickstart", "--step", "5"])
    assert "unrecognized arguments: --step 5" in capsys.readouterr().err
    assert cli.main(["quickstart", "--steps", "0"]) == 2
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err


def test_no_command_prints_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([])
    assert exit_info.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
