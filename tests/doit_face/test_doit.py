"""The doit face, through `doit` itself in a workspace of toy steps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.engine.workspace import REPOSITORY, Workspace, make_workspace

ALL = {"convert": 1, "quantize": 2, "lower": 3, "library": 3, "package": 2, "measure": 2, "verify": 2}
ONE = {"convert": 1, "quantize": 1, "lower": 2, "library": 2, "package": 1, "measure": 1, "verify": 1}


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """For tests that build nothing."""
    return make_workspace(tmp_path_factory.mktemp("unbuilt"))


def test_every_recipe_is_built_and_the_second_time_nothing_is_done(workspace: Workspace) -> None:
    workspace.doit()
    assert workspace.ran() == ALL
    assert {path.name for path in workspace.dist.iterdir()} == {"tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"}
    digests = workspace.digests()
    output = workspace.doit("build")
    assert workspace.ran() == {}
    assert output.splitlines()[-1].startswith("0 done, 18 up to date; ")
    assert workspace.digests() == digests


def test_a_build_with_nothing_to_do_imports_nothing_heavy(built: Workspace) -> None:
    built.write("dodo.py", (built.root / "dodo.py").read_text() + "import atexit, sys\n" + REPORT_IMPORTS)
    imported = set(built.doit().split("IMPORTED ")[1].split())
    assert not imported & {"tvm", "numpy", "jsonschema", "tokenizers", "torch", "rich", "huggingface_hub", "yaml"}


REPORT_IMPORTS = """
atexit.register(lambda: print("IMPORTED", *{name.partition(".")[0] for name in sys.modules}))
"""


F16, F32 = "build:tiny-q4f16_1-cpu", "build:tiny-q4f32_1-cpu"


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["build", "recipe=tiny-q4f16_1-cpu"], {F16}),
        (["recipe=tiny-q4f16_1-cpu"], {F16}),
        ([F16], {F16}),
        (["recipe=*f16*"], {F16}),
        (["build:*f16*"], {F16}),
        (["build", "recipe=tiny-q4f16_1-cpu,*f32*"], {F16, F32}),
        (["build:*-cpu"], {F16, F32}),
        (["quantize", "recipe=tiny-q4f16_1-cpu"], {"quantize:tiny-q4f16_1"}),
        (["verify", "recipe=tiny-q4f16_1-cpu"], {"verify:tiny-q4f16_1-cpu"}),
        (["convert:tiny"], {"convert:tiny"}),
    ],
)
@pytest.mark.slow
def test_selection(shared: Workspace, arguments: list[str], last: set[str]) -> None:
    *lines, _ = shared.doit(*arguments).splitlines()
    looked_at = {line.removeprefix("-- ") for line in lines}
    kind = next(iter(last)).partition(":")[0]
    assert {name for name in looked_at if name.startswith(f"{kind}:")} == last
    if kind in ("quantize", "convert"):
        assert not [name for name in looked_at if name.startswith(("library", "package", "verify", "build"))]


def test_a_librarys_task_builds_no_weights_and_no_reference(workspace: Workspace) -> None:
    workspace.doit("library", "recipe=tiny-q4f16_1-cpu")
    assert workspace.ran() == {"lower": 1, "library": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["recipee=tiny-q4f16_1-cpu"], "unknown variable recipee=: did you mean recipe=?"),
        (["recipe=tiny-q4f16_1-cpi"], "did you mean `tiny-q4f16_1-cpu`"),
        (["recipe=nothing*"], "no recipe matches `nothing*`"),
        (["recipe="], "a name is missing"),
        (["build:tiny-q4f16_1-cpi"], "no task is called build:tiny-q4f16_1-cpi: did you mean build:tiny-q4f16_1-cpu?"),
        (["build:nothing*"], "no task is called build:nothing*"),
        (["build:tiny-q4f32_1-cpu", "recipe=tiny-q4f16_1-cpu"], "no task is called build:tiny-q4f32_1-cpu"),
        (["convert:tinny"], "did you mean convert:tiny?"),
        (["nothing"], 'Invalid parameter: "nothing"'),
        (["strict=yes"], "strict=yes: expected strict=1 or strict=0"),
        (["--recipe", "x"], "option --recipe not recognized"),
    ],
)
def test_a_bad_command_line_builds_nothing(unbuilt: Workspace, arguments: list[str], text: str) -> None:
    output = unbuilt.doit(*arguments, status=3)
    assert text in output
    assert "Traceback" not in output
    assert unbuilt.ran() == {}


def test_bad_recipes_build_nothing(workspace: Workspace) -> None:
    workspace.write("recipes/one.yaml", "model: tinny\nquantization: q4f16_1\ntarget: cpu\n")
    workspace.write("recipes/two.yaml", "modell: tiny\nquantization: q4f16_1\ntarget: cpu\n")
    output = workspace.doit(status=3)
    assert "recipes/one.yaml" in output
    assert "recipes/two.yaml" in output
    assert "Traceback" not in output
    workspace.write("recipes/one.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu\n")
    (workspace.root / "recipes/two.yaml").unlink()
    (workspace.root / "recipes/models/tiny/config.json").unlink()
    output = workspace.doit(status=3)
    assert "ERROR: model tiny: " in output
    assert "config.json: no such file" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["-a", "quantize"],
        ["quantize", "-a"],
        ["run", "-a", "quantize"],
        ["quantize", "--always-execute"],
        ["-n", "2", "-a", "quantize"],
        ["-n", "2", "-P", "process", "quantize", "-a"],
    ],
)
@pytest.mark.slow
def test_always_runs_what_the_cache_has(shared: Workspace, arguments: list[str]) -> None:
    shared.doit(*arguments)
    assert shared.ran() == {"convert": 1, "quantize": 2}


def test_always_reaches_everything_that_the_task_needs(built: Workspace) -> None:
    digests = built.digests()
    assert "ok build:tiny-q4f16_1-cpu" in built.doit("build:tiny-q4f16_1-cpu", "-a")
    assert built.ran() == ONE
    assert built.digests() == digests


def test_always_of_one_task(built: Workspace) -> None:
    built.doit("quantize:tiny-q4f16_1", "-a")
    assert built.ran() == {"convert": 1, "quantize": 1}


def test_a_failing_step(workspace: Workspace) -> None:
    workspace.trick("quantize.fail")
    output = workspace.doit(status=1)
    assert "quantize:tiny-q4f16_1: quantize cannot: the toy was told to fail" in output
    assert "Traceback" not in output
    assert not workspace.dist.exists()


def test_a_breaking_step(workspace: Workspace) -> None:
    workspace.trick("quantize.crash")
    assert "ZeroDivisionError: a bug" in workspace.doit(status=2)


def test_continue_does_what_can_be_done(workspace: Workspace) -> None:
    workspace.trick("quantize.fail")
    output = workspace.doit("--continue", "build", status=1)
    assert workspace.ran() == {"convert": 1, "quantize": 2, "lower": 3, "library": 3}
    assert "build:tiny-q4f16_1-cpu: not built, because of quantize:tiny-q4f16_1" in output


def test_info_says_why(built: Workspace) -> None:
    output = built.doit("info", "build:tiny-q4f16_1-cpu")
    assert "hit   verify:tiny-q4f16_1-cpu\nhit   dist/tiny-q4f16_1-cpu\n" in output
    assert "hit   convert:tiny\n" in built.doit("info", "convert:tiny")
    built.doit("forget", "quantize:tiny-q4f16_1")
    output = built.doit("info", "build:tiny-q4f16_1-cpu", status=1)
    assert "miss  quantize:tiny-q4f16_1\n        quantization.model_dtype float32 → float16\n" in output


def test_clean_removes_what_is_in_dist(built: Workspace) -> None:
    built.doit("clean", "-n")
    assert len(list(built.dist.iterdir())) == 2
    built.doit("clean", "build:tiny-q4f16_1-cpu")
    assert [path.name for path in built.dist.iterdir()] == ["tiny-q4f32_1-cpu"]
    built.doit("clean")
    assert not list(built.dist.iterdir())
    built.ran()
    built.doit()
    assert built.ran() == {}


@pytest.mark.slow
def test_forget_names_what_others_share(built: Workspace) -> None:
    output = built.doit("forget", "recipe=tiny-q4f16_1-cpu")
    assert "forgetting convert:tiny, which is shared with tiny-q4f32_1-cpu\n" in output
    assert "forgetting quantize:tiny-q4f16_1\n" in output
    built.doit("recipe=tiny-q4f32_1-cpu")
    assert built.ran() == {"convert": 1, "lower": 1, "library": 1}
    built.doit()
    assert built.ran() == {"quantize": 1, "lower": 1, "library": 1, "package": 1, "measure": 1, "verify": 1}
    built.doit("forget", "quantize:tiny-q4f32_1")
    built.doit()
    assert built.ran() == {"quantize": 1}
    built.doit("forget", "--all")
    built.doit()
    assert built.ran() == ALL


@pytest.mark.slow
def test_a_damaged_package_is_installed_again(built: Workspace) -> None:
    digests = built.digests()
    package = built.dist / "tiny-q4f16_1-cpu"
    for damage in (
        lambda: (package / "quality.json").unlink(),
        lambda: (package / "manifest.json").write_text("{}"),
        lambda: (package / "extra").write_text(""),
        lambda: (package / "package-0.txt").rename(package / "package-9.txt"),
        lambda: rewrite(package / "package-0.txt"),
        lambda: pipe(package / "manifest.json"),  # FAULTS D, a sibling: it was waited for
        lambda: pipe(package / "package-0.txt"),
        lambda: (built.dist / ".new-tiny-q4f16_1-cpu").mkdir(),
    ):
        damage()
        assert "ok build:tiny-q4f16_1-cpu" in built.doit()
        assert built.digests() == digests
    assert built.ran() == {}


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rewrite(path: Path) -> None:
    path.chmod(0o644)
    path.write_text("x" * path.stat().st_size)


def test_a_template_reaches_package_and_verify_only(built: Workspace) -> None:
    built.write("recipes/templates/other.yaml", STOCK_LIKE_TEMPLATE)
    built.write("recipes/models/tiny.yaml", "source: {path: tiny}\ntemplate: other\n")
    built.doit()
    assert built.ran() == {"package": 2, "verify": 2}


def test_a_gate_that_failed_is_opened_without_measuring_again(workspace: Workspace) -> None:
    """FAULTS.md F: a failed verify left nothing, so `gate: report` ran the same minutes again."""
    failing = workspace.trick("verify.fail")
    workspace.doit(status=1)
    assert workspace.ran() == ALL
    failing.unlink()
    workspace.write("recipes/models/tiny.yaml", "source: {path: tiny}\ntemplate: chatml\nverify: {gate: report}\n")
    workspace.doit()
    assert workspace.ran() == {"verify": 2}


@pytest.mark.slow
def test_a_comment_in_a_step_rebuilds_nothing_and_code_rebuilds_what_used_it(workspace: Workspace) -> None:
    for path in (REPOSITORY / "tests/engine/toysteps").glob("*.py"):
        workspace.write(f"mysteps/{path.name}", path.read_text().replace("tests.engine.toysteps", "mysteps"))
    workspace.write("dodo.py", (workspace.root / "dodo.py").read_text().replace("tests.engine.toysteps", "mysteps"))
    place = f"{workspace.root}:{REPOSITORY}"
    workspace.doit("recipe=tiny-q4f16_1-cpu", PYTHONPATH=place)
    assert workspace.ran() == ONE
    step = workspace.root / "mysteps/quantize.py"
    text = step.read_text()
    step.write_text(text.replace("# What the step is for.", "# What else the step is for."))
    workspace.doit("recipe=tiny-q4f16_1-cpu", PYTHONPATH=place)
    assert workspace.ran() == {}
    step.write_text(text.replace("VERSION = 1", "VERSION = 2"))
    assert "miss  quantize:tiny-q4f16_1\n        the code of the step quantize changed\n" in workspace.doit(
        "info", "quantize:tiny-q4f16_1", status=1, PYTHONPATH=place
    )
    workspace.doit("recipe=tiny-q4f16_1-cpu", PYTHONPATH=place)
    assert workspace.ran() == {"quantize": 1}  # it gave the same bytes, so the package stays


STOCK_LIKE_TEMPLATE = """\
system_template: "{system_message}"
system_message: ""
roles: {user: "u", assistant: "a"}
seps: ["\\n"]
role_content_sep: ": "
role_empty_sep: ":"
stop_str: []
stop_token_ids: [2]
"""


def test_recipes_that_mean_the_same_share_everything(workspace: Workspace) -> None:
    workspace.write("recipes/again.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu\n")
    workspace.doit()
    assert workspace.ran() == ALL
    once, again = workspace.dist / "tiny-q4f16_1-cpu", workspace.dist / "again"
    assert (once / "package-0.txt").read_bytes() == (again / "package-0.txt").read_bytes()
    assert json.loads((again / "manifest.json").read_text())["recipe"]["name"] == "again"


@pytest.mark.slow
def test_two_workspaces_give_the_same_bytes(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> None:
    workspace.doit()
    other = make_workspace(tmp_path_factory.mktemp("elsewhere"))
    other.doit("-n", "2", f"cache={other.root / 'other-cache'}")
    assert other.digests() == workspace.digests()
    assert str(workspace.root) not in (workspace.dist / "tiny-q4f16_1-cpu" / "manifest.json").read_text()


@pytest.mark.slow
def test_a_shared_cache(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> None:
    workspace.doit(MLCBUILD_CACHE=str(workspace.root / "shared"))
    other = make_workspace(tmp_path_factory.mktemp("elsewhere"))
    other.doit(f"cache={workspace.root / 'shared'}")
    assert other.ran() == {}
    assert other.digests() == workspace.digests()
    assert not other.cache.exists()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["log_json=log.jsonl"], ["build", "--log-json", "log.jsonl"]])
def test_the_log_for_machines(workspace: Workspace, arguments: list[str]) -> None:
    workspace.doit(*arguments, "recipe=tiny-q4f16_1-cpu")
    events = [json.loads(line) for line in (workspace.root / "log.jsonl").read_text().splitlines()]
    outcomes = [event["outcome"] for event in events if event["event"] == "step_finished"]
    assert outcomes == ["built"] * 10
    assert events[-1]["event"] == "run_finished"
    assert events[-1]["built"] == 11


@pytest.mark.slow
def test_unavailable_recipes_are_reported_and_fail_only_when_asked_for(workspace: Workspace) -> None:
    lacking = """
from mlcbuild.compiler import targets
from mlcbuild.errors import Unavailable

real = targets.resolve

def resolve(target):
    if target.name != "cpu":
        raise Unavailable("this machine lacks a compiler: install it")
    return real(target)

targets.resolve = resolve
"""
    workspace.write("dodo.py", (workspace.root / "dodo.py").read_text() + lacking)
    workspace.write("recipes/foreign.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu-x86_64\n")
    told = "foreign: unavailable: this machine lacks a compiler: install it"
    assert f"?? {told}" in workspace.doit("build", "recipe=foreign*,tiny-q4f16_1-*")
    assert workspace.ran() == ONE
    for arguments in (["recipe=foreign"], ["build:foreign"], ["strict=1"]):
        assert f"ERROR: {told}" in workspace.doit(*arguments, status=3)
    assert workspace.ran() == {}


def test_debug_dump_changes_no_key(shared: Workspace) -> None:
    shared.doit("debug_dump=dump")
    assert shared.ran() == {}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["build", "-n", "2"], "build has no option -n, only -a, --always-execute, --log-json. Options of doit stand "
         "before the task: `doit -n 2 build`"),
        (["build:tiny-q4f16_1-cpu", "--log-json", "x"], "build:tiny-q4f16_1-cpu has no option --log-json, only -a, "),
        (["quantize", "--bogus"], "quantize has no option --bogus, only "),
    ],
)  # fmt: skip
def test_an_option_that_a_task_does_not_have(unbuilt: Workspace, words: list[str], text: str) -> None:
    """FAULTS C: a dump of `CmdOption({…})`."""
    output = unbuilt.doit(*words, status=3)
    assert text in output and "CmdOption" not in output and "Traceback" not in output


def test_the_help_of_a_task_names_the_variable_that_there_is(workspace: Workspace) -> None:
    """FAULTS C: it named MLCBUILDLOG_JSON."""
    assert "MLCBUILD_LOG_JSON" in workspace.doit("help", "build")
    workspace.doit("build:tiny-q4f16_1-cpu", MLCBUILD_LOG_JSON="log.jsonl")
    assert (workspace.root / "log.jsonl").exists()
