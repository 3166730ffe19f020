"""The command line: verbs, exit codes, one line per refusal, JSON for scripts."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.zoo.conftest import Adder
from zoo.__main__ import main
from zoo.lock import writing
from zoo.progress import Quiet


class Done(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


Zoo = Callable[..., Done]


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Zoo:
    """Runs the command line in this process: imports are paid once."""

    def zoo(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        code = main()
        return Done(code, *capsys.readouterr())

    return zoo


@pytest.fixture
def filled(root: Path, put: Adder, checkpoints: Path, adapter: Path) -> Path:
    """A zoo with a base and an adapter."""
    put("base", checkpoints / "llama")
    put("tuned", adapter)
    return root


def test_a_variants_life(zoo: Zoo, root: Path, checkpoints: Path, adapter: Path, tmp_path: Path):
    done = zoo("--zoo", root, "add", "base", checkpoints / "llama")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("added base (base): 0 units shared, 10 changed, 0 with an attachment\n")
    done = zoo("add", "tuned", adapter, "--zoo", root)
    assert "(lora upon base): 10 units shared, 0 changed, 4 with" in done.stdout
    assert "tuned" in zoo("--zoo", root, "list").stdout
    assert "attention" in zoo("--zoo", root, "show", "tuned").stdout
    assert "0-9" in zoo("--zoo", root, "blocks").stdout
    assert "all good" in zoo("--zoo", root, "verify").stdout
    assert zoo("--zoo", root, "export", "tuned", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert zoo("--zoo", root, "remove", "tuned").returncode == 0
    assert "would delete" in zoo("--zoo", root, "sweep").stdout
    assert "deleted: 18 objects" in zoo("--zoo", root, "sweep", "--yes").stdout


def test_the_zoo_may_be_named_before_or_after_the_verb_or_by_the_home(
    zoo: Zoo, filled: Path, home: Path
):
    first = zoo("--zoo", filled, "list", "--json").stdout
    assert json.loads(first)[0]["name"] == "base"
    assert zoo("list", "--json", "--zoo", filled).stdout == first
    assert zoo("list", "--json").stdout == "[]\n"
    (home / "zoo").symlink_to(filled)
    assert zoo("list", "--json").stdout == first


def test_listings_have_json_with_stable_keys(zoo: Zoo, filled: Path):
    rows = json.loads(zoo("--zoo", filled, "list", "--json").stdout)
    assert [row["name"] for row in rows] == ["base", "tuned"]
    assert rows[1].keys() >= {"kind", "base", "family", "units", "blocks", "own_bytes"}
    detail = json.loads(zoo("--zoo", filled, "show", "tuned", "--json").stdout)
    assert detail["variant"] == rows[1]
    assert [unit["kind"] for unit in detail["chain_units"]][:3] == ["embed", "attention", "mlp"]
    (block,) = json.loads(zoo("--zoo", filled, "blocks", "--json").stdout)
    assert block["variants"] == ["base", "tuned"]
    assert (block["units"], block["first"], block["last"]) == (10, 0, 10)
    stats = json.loads(zoo("--zoo", filled, "stats", "--json").stdout)
    assert stats["by_variant"] == rows
    assert stats["ratio"] > 0
    verdict = json.loads(zoo("--zoo", filled, "verify", "--json").stdout)
    assert (verdict["damages"], verdict["checked"]) == ([], stats["objects"])
    rubbish = json.loads(zoo("--zoo", filled, "sweep", "--json").stdout)
    assert rubbish == {"objects": [], "leftovers": [], "versions": [], "work": [], "bytes": 0}


def test_versions_and_aliases(zoo: Zoo, filled: Path, adapter: Path):
    assert zoo("--zoo", filled, "alias").stdout == "there are no aliases\n"
    assert zoo("--zoo", filled, "alias", "stable", "tuned").stdout == "stable is tuned@1\n"
    assert zoo("--zoo", filled, "add", "tuned", adapter, "--replace").returncode == 0
    rows = json.loads(zoo("--zoo", filled, "versions", "tuned", "--json").stdout)
    assert [(row["reference"], row["is_current"], row["aliases"]) for row in rows] == [
        ("tuned@1", False, ["stable"]), ("tuned@2", True, []),
    ]  # fmt: skip
    assert "current" in zoo("--zoo", filled, "versions", "tuned").stdout
    assert "tuned@1" in zoo("--zoo", filled, "list").stdout
    assert "version tuned@1" in zoo("--zoo", filled, "show", "tuned@1").stdout
    assert json.loads(zoo("--zoo", filled, "alias", "--json").stdout) == [
        {"alias": "stable", "name": "tuned", "number": 1}
    ]
    assert "removed the alias" in zoo("--zoo", filled, "alias", "stable", "--remove").stdout
    done = zoo("--zoo", filled, "alias", "stable")
    assert (done.returncode, "ALIAS --remove" in done.stderr) == (2, True)


def test_fit_answers_from_the_catalog(zoo: Zoo, filled: Path):
    done = zoo("--zoo", filled, "fit", "--memory", "1MB", "--add", "lora:8", "--context", "8")
    assert "2 of 2 variants fit into 1.0 MB" in done.stdout
    assert "lora:8 would add 124.9 kB: 2 like it" in done.stdout
    found = json.loads(zoo("--zoo", filled, "fit", "--memory", "10kB", "--json").stdout)
    assert (found["fitting"], found["addition"], found["context"]) == (0, None, 256)
    assert zoo("--zoo", filled, "fit", "--memory", "lots").returncode == 2


def test_variants_go_to_another_zoo_and_back(zoo: Zoo, filled: Path, tmp_path: Path):
    depot = (tmp_path / "depot").as_uri()
    assert "pushed base, tuned" in zoo("--zoo", filled, "push", depot).stdout
    assert "there already: base" in zoo("--zoo", filled, "push", depot, "base").stdout
    other = tmp_path / "other"
    assert "pulled tuned" in zoo("--zoo", other, "pull", depot, "tuned").stdout
    moved = json.loads(zoo("--zoo", other, "pull", filled, "--json").stdout)
    assert (moved["names"], moved["known"]) == (["base"], ["tuned"])
    assert "all good" in zoo("--zoo", other, "verify").stdout
    assert "base" in zoo("--zoo", other, "list").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command"),
        (("fly",), "No such command 'fly'"),
        (("list", "--fast"), "No such option: --fast"),
        (("add", "x"), "Missing argument 'SOURCE'"),
        (("add", "x", "nowhere at all"), "neither a folder"),
        (("add", "x", "/", "--store", "most"), "exact, delta or equivalent"),
        (("show", "nobody"), "no variant is called 'nobody'"),
        (("remove", "nobody"), "the zoo is empty"),
        (("versions", "nobody"), "no variant is called 'nobody'"),
        (("alias", "x", "nobody"), "no variant is called 'nobody'"),
        (("alias", "x y", "nobody"), "is not a name"),
        (("pull", "nowhere"), "is no zoo's folder"),
        (("pull", "warp://x"), "cannot be reached"),
        (("push", "/no/where", "nobody"), "no variant is called 'nobody'"),
        (("export", "nobody", "out"), "no variant is called"),
    ],
)
def test_wrong_usage_and_input_end_with_2_and_one_line(
    zoo: Zoo, root: Path, arguments: tuple[str, ...], message: str
):
    done = zoo("--zoo", root, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_damage_ends_with_1_and_names_the_variants(zoo: Zoo, filled: Path):
    path = next((filled / "objects").glob("??/??/*.safetensors"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\xaa")
    done = zoo("--zoo", filled, "verify")
    assert done.returncode == 1
    assert f"damaged object {path.stem}: used by" in done.stdout
    assert "1 bad" in done.stdout
    assert "add NAME SOURCE --replace" in done.stdout


def test_a_busy_zoo_is_waited_for_and_then_given_up(zoo: Zoo, filled: Path):
    with writing(filled, 1, Quiet().say):
        done = zoo("--zoo", filled, "remove", "tuned", "--wait", "0.2")
        assert zoo("--zoo", filled, "list").returncode == 0, "readers are not held up"
    assert done.returncode == 1
    assert "waiting for it to finish" in done.stderr
    assert "error: another process has been changing" in done.stderr


def test_listings_load_no_heavy_library(filled: Path):
    code = (
        "import sys, zoo.__main__ as cli\n"
        f"sys.argv = ['zoo', '--zoo', {str(filled)!r}, 'stats']\n"
        "assert cli.main() == 0\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_exit_code_reaches_the_shell(root: Path):
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "--zoo", str(root), "show", "nobody"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no variant is called 'nobody'")
