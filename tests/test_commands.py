"""The manners of all commands: help, exit codes, one line for a mistake, closed pipes, Ctrl-C."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tasn_timm import cli, errors
from tasn_timm.commands import at_least
from tasn_timm.data import synthbirds
from tasn_timm.errors import Interrupted, NumericalError, UserError, run_command
from tasn_timm.files import check_outputs, csv_text, write_text, write_whole

COMMAND = [sys.executable, "-m", "tasn_timm"]
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path), PYTHONUNBUFFERED="")


@pytest.fixture
def code(capsys):
    """Exit code and standard error of a function as a command."""

    def run(error: BaseException) -> tuple[int, str]:
        def fail() -> None:
            raise error

        return run_command(fail), capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_says_what_a_command_does_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert f"usage: python -m tasn_timm {name}" in out and f"python -m tasn_timm {name}" in out.partition("example")[2]
    assert all(len(line) <= 120 for line in out.splitlines() if not line.startswith("usage"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_options_have_one_meaning_and_a_text(name):
    meanings = {
        "--json": Path,
        "--csv": Path,
        "--confusions": Path,
        "--panel": Path,
        "--workers": at_least(0),
        "--batch-size": at_least(1),
    }
    parser = errors.Parser()
    cli.COMMANDS[name].add_arguments(parser)
    for action in parser._actions:
        if name != "run":  # SCRIPT and its arguments are the script's own
            assert action.help, f"{name} {action.dest}"
        for option in action.option_strings:
            assert option not in meanings or meanings[option] is action.type, f"{name} {option}"


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "run"])
def test_unknown_options_point_to_the_commands_own_help(name, capsys):
    required = dict(
        benchmark=["m"],
        export=["m", "f"],
        visualize=["m"],
        predict=["m", "p"],
        prepare=["d"],
        publish=["r", "--repo", "a/b"],
    )
    given = required.get(name, ["x"] if name == "check-data" else [])
    assert run_command(lambda: cli.main([name, *given, "--flp"])) == 2
    expected = f"error: unrecognized arguments: --flp: see python -m tasn_timm {name} --help.\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("visualize m --figure sampling a.png", dict(model="m", figure="sampling", pictures=[Path("a.png")])),
        ("visualize m a.png --parts 2 b.png", dict(model="m", parts=2, pictures=[Path("a.png"), Path("b.png")])),
        ("evaluate m --flip data", dict(names=["m", "data"], flip=True)),
        ("evaluate --flip m data", dict(names=["m", "data"], flip=True)),
        ("evaluate --ensemble a b --flip data", dict(names=["data"], ensemble=["a", "b"], flip=True)),
        ("benchmark a --threads 1 b", dict(models=["a", "b"], threads=1)),
        ("predict m --topk 2 -- -a.png", dict(model="m", topk=2, pictures=["-a.png"])),
        ("demo --share m", dict(model="m", share=True)),
        ("run x.py --flp a", dict(script=Path("x.py"), arguments=["--flp", "a"])),
    ],
)
def test_arguments_and_options_come_in_any_order(line, expected, monkeypatch):
    given = []
    name, *arguments = line.split()
    monkeypatch.setattr(cli.COMMANDS[name], "run", given.append)
    cli.main([name, *arguments])
    assert {key: vars(given[0])[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("line", "strange"),
    [
        ("visualize m --parts 2 a.png --flp", "--flp"),
        ("prepare cub200 --push a/b more", "more"),
        ("run --flp x", "--flp"),
    ],
)
def test_of_wrong_arguments_only_those_are_named(line, strange):
    with pytest.raises(UserError, match=f"^unrecognized arguments: {strange}: see "):
        cli.main(line.split())


def test_exit_codes_tell_what_happened(code, capsys):
    assert run_command(lambda: None) == 0
    assert code(UserError("wrong")) == (2, "error: wrong\n")
    assert code(NumericalError("not finite")) == (3, "error: not finite\n")
    assert code(KeyboardInterrupt()) == (130, "interrupted\n")
    assert code(Interrupted("stopped", signal.SIGTERM)) == (143, "stopped\n")
    with pytest.raises(RuntimeError, match="bug"):
        code(RuntimeError("bug"))


def test_places_without_access_or_space_get_one_line(code):
    denied = PermissionError(errno.EACCES, "Permission denied", "secret/x")
    expected = "error: 'secret/x': Permission denied: give yourself access, or choose another place.\n"
    assert code(denied) == (2, expected)
    full = OSError(errno.ENOSPC, "No space left on device")
    assert code(full)[0] == 2 and "No space left on device: free some space" in code(full)[1]
    with pytest.raises(FileNotFoundError):
        code(FileNotFoundError(errno.ENOENT, "No such file", "x"))  # where commands expect one, they say so


def test_files_are_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    write_whole(file, "old", "--json")
    write_whole(file, b"new", "--json")
    assert file.read_bytes() == b"new"
    check_outputs(json=file, csv=tmp_path / "y.csv", panel=None)
    assert file.read_bytes() == b"new" and not (tmp_path / "y.csv").exists(), "looking changes nothing"
    write_text(None, "nowhere", "--json")
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "No such file"), (file / "x", "Not a dir")):
        with pytest.raises(UserError, match=f"--class-csv '.*' cannot be written .*{reason}.*: give a file"):
            check_outputs(class_csv=path)
        with pytest.raises(UserError, match=f"--csv '.*' cannot be written .*{reason}"):
            write_whole(path, "text", "--csv")
    with pytest.raises(UserError, match="--json and --csv name the same file"):
        check_outputs(json=file, csv=file)
    with pytest.raises(UserError, match="^--json and --class-csv name the same file: give each a file of its own.$"):
        check_outputs(json=Path("-"), csv=None, class_csv=Path("-"), panel=tmp_path / "y.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_csv_quotes_what_needs_it():
    assert csv_text([["a", "b"], ['x, "y"', None], [1, 0.5]]) == 'a,b\n"x, ""y""",\n1,0.5\n'


SCRIPT = """
import sys; sys.path.insert(0, {folder!r})
from errors import UserError, run_command  # alone: without the package, which imports torch
def main():
    for number in range({lines}):
        print("line", number)
    {end}
sys.exit(run_command(main))
"""


@pytest.mark.parametrize(
    ("lines", "end", "code", "told"),
    [(1, "pass", 141, ""), (1, "raise UserError('wrong')", 2, "error: wrong\n"), (100_000, "pass", 141, "")],
)
def test_closed_pipes_and_full_disks_are_no_bugs(lines, end, code, told):
    """Short outputs meet them at the end only, long ones in the middle."""
    command = [sys.executable, "-c", SCRIPT.format(lines=lines, end=end, folder=str(Path(errors.__file__).parent))]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(write)
    assert (result.returncode, result.stderr) == (code, told)
    with open("/dev/full", "w") as disk:
        result = subprocess.run(command, stdout=disk, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_head_may_close_the_pipe_of_a_command():
    line = f"set -o pipefail; '{sys.executable}' -m tasn_timm recipes | head -1"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.stderr == "" and len(result.stdout.splitlines()) == 1
    assert result.returncode in (0, 141), "0 where it had written all before"


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    out.mkdir()
    Image.fromarray(synthbirds.draw("test", 0)).save(photos / "0.png")
    for number in range(1, 5000):
        os.link(photos / "0.png", photos / f"{number}.png")
    command = [*COMMAND, "predict", "tasn_tiny", str(photos), "--workers", "2", "--batch-size", "8", "--cpu"]
    command += ["--json", str(out / "x.json"), "--csv", str(out / "x.csv")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    assert process.stdout.readline(), "it has begun"
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err, list(out.iterdir())) == (130, "interrupted\n", [])
