"""The `agevlm` command table."""

import sys
import types

import pytest

from agevlm_mlx import __version__, cli


def test_help_lists_every_command_with_one_line(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in cli.COMMANDS.items():
        assert sum(line.split()[:1] == [name] and text in line for line in lines) == 1
    assert max(map(len, lines)) <= 100


def test_no_command_is_an_error_that_shows_the_commands(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "generate" in captured.err


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert cli.main([flag]) == 0
    assert capsys.readouterr().out == f"agevlm {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [("evalute", "did you mean 'evaluate'?"), ("trian", "did you mean 'train'?"), ("xyz", "demo")],
)
def test_an_unknown_command_names_the_closest(typed, said, capsys):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: unknown command '{typed}'; ")
    assert said in error
    assert error.count("\n") == 1


def test_the_rest_of_the_line_and_the_exit_status_pass_through(monkeypatch):
    seen = {}

    def command(argv: list[str] | None) -> int:
        seen["argv"], seen["name"] = argv, sys.argv[0]
        return 7

    fake = types.SimpleNamespace(main=command)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name, package: fake)
    monkeypatch.setattr(sys, "argv", ["agevlm", "train", "--resume", "lr=1"])
    assert cli.main() == 7
    assert seen == {"argv": ["--resume", "lr=1"], "name": "agevlm train"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_with_examples(name, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main([name, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: agevlm {name}")
    assert text.count(f"agevlm {name}") >= 2, "expected an example besides the usage line"
