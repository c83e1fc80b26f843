"""One step at a time: hits, misses, failures, and how far a change reaches."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mlcbuild.cache.action import Damaged
from mlcbuild.cache.store import Store
from mlcbuild.engine.builder import Builder
from mlcbuild.engine.graph import Graph, Input, Step
from mlcbuild.engine.lookup import Lookup
from mlcbuild.engine.process import StepBroke
from mlcbuild.errors import MlcBuildError, StepFailed
from mlcbuild.reporting.events import Event, StepFinished, StepNote, StepProgress
from tests.cache.test_materialise import damage

TOY = "tests.engine.toysteps"


class Toy:
    """download:m -> convert:m (sees only *.json) -> quantize:m (materials: the download)."""

    def __init__(self, folder: Path, tricks: Path) -> None:
        self.tricks = tricks
        self.checkpoint = folder / "checkpoint"
        self.checkpoint.mkdir()
        (self.checkpoint / "config.json").write_text("{}")
        (self.checkpoint / "model.safetensors").write_text("weights")
        self.store = Store(folder / "cache")
        self.fields: dict[str, dict[str, object]] = {"download": {}, "convert": {"a": 1}, "quantize": {"b": {"c": 2}}}
        self.events: list[Event] = []

    def builder(self) -> Builder:
        steps = [
            Step("download", "download:m", f"{TOY}.download", {}, (Input("files", path=self.checkpoint),)),
            Step(
                "convert",
                "convert:m",
                f"{TOY}.convert",
                self.fields["convert"],
                (Input("checkpoint", step="download:m", select=("*.json",)),),
                ("download:m",),
            ),
            Step(
                "quantize",
                "quantize:m",
                f"{TOY}.quantize",
                self.fields["quantize"],
                (Input("convert", step="convert:m"),),
                ("download:m", "convert:m"),
            ),
        ]
        return Builder(Lookup(self.store, Graph({step.name: step for step in steps})), self.events.append)

    def build(self) -> dict[str, str]:
        """What became of each step."""
        self.events.clear()
        self.builder().build("quantize:m")
        return {event.kind: event.outcome for event in self.events if isinstance(event, StepFinished)}


@pytest.fixture
def toy(tmp_path: Path, toys: Path) -> Toy:
    return Toy(tmp_path, toys)


def test_a_second_build_runs_nothing(toy: Toy) -> None:
    assert toy.build() == {"download": "built", "convert": "built", "quantize": "built"}
    assert toy.build() == {}


def test_a_field_reaches_the_steps_that_declare_it(toy: Toy) -> None:
    toy.build()
    toy.fields["quantize"]["b"] = {"c": 3}
    assert toy.build() == {"quantize": "built"}
    toy.fields["quantize"]["b"] = {"c": 2}
    assert toy.build() == {}


def test_a_file_that_no_step_selects_stops_at_the_download(toy: Toy) -> None:
    toy.build()
    (toy.checkpoint / "README.md").write_text("hello")
    assert toy.build() == {"download": "built"}


def test_a_step_that_gives_the_same_bytes_stops_the_change(toy: Toy) -> None:
    """The toys write their fields; a rerun of convert with equal fields but another code version is the same tree."""
    toy.build()
    lookup = toy.builder().lookup
    key = lookup.ingredients("convert:m")
    assert key is not None
    toy.store.forget(key.key)
    assert toy.build() == {"convert": "built"}


def test_a_local_checkpoint_is_not_copied_and_its_change_is_noticed(toy: Toy) -> None:
    toy.build()
    blobs = {path.name for path in toy.store.root.glob("cas/*/*")}
    (config, weights) = toy.builder().lookup.store.action(_key(toy, "download:m")).tree.files.values()  # type: ignore[union-attr]
    assert {f"{config.digest}.at", f"{weights.digest}.at"} <= blobs
    assert not {config.digest, weights.digest} & blobs
    (toy.checkpoint / "config.json").write_text("[]")
    assert toy.build() == {"download": "built", "convert": "built", "quantize": "built"}
    (toy.checkpoint / "config.json").write_text("{}")
    # Known content at an old place: only the record of where it lies is renewed.
    assert toy.build() == {"download": "built"}


def _key(toy: Toy, name: str) -> str:
    ingredients = toy.builder().lookup.ingredients(name)
    assert ingredients is not None
    return ingredients.key


def test_force_runs_the_step_even_so(toy: Toy) -> None:
    toy.build()
    toy.tricks.joinpath("ran.txt").unlink()
    toy.builder().build("convert:m", force=True)
    assert Counter(toy.tricks.joinpath("ran.txt").read_text().split()) == {"convert": 1}


def test_a_lost_blob_is_made_again(toy: Toy) -> None:
    toy.build()
    next(iter(toy.builder().build("convert:m").tree.files.values())).path.unlink()
    assert toy.build() == {"convert": "built"}


def test_damage_in_what_a_step_is_given_is_mended(toy: Toy) -> None:
    """FAULTS.md A2: without it the step failed, and only the next build was well."""
    toy.build()
    (blob,) = {entry.path for entry in toy.builder().build("convert:m").tree.files.values()}
    damage(blob)
    toy.fields["quantize"]["b"] = {"c": 3}
    assert toy.build() == {"convert": "built", "quantize": "built"}
    (text,) = [event.text for event in toy.events if isinstance(event, StepNote) and "damaged" in event.text]
    assert text.startswith(f"{blob}: damaged: its sha256 is ") and text.endswith(": removed; what made it runs again")


def test_only_what_is_damaged_again_and_again_ends_a_build(toy: Toy) -> None:
    """Five files of five steps, each damaged once, are no failing disk; one that is damaged each time is."""
    found = iter([*(f"/cache/{number}: damaged: removed" for number in range(5)), None])

    def work() -> str:
        if text := next(found, "/cache/0: damaged: removed"):
            raise Damaged(text)
        return "done"

    builder = toy.builder()
    assert builder.mending("quantize:m", work) == "done"
    with pytest.raises(
        StepFailed, match=r"^quantize:m: /cache/0: damaged: removed\. It was built again, and is damaged"
    ):
        builder.mending("quantize:m", work)
    assert sum(isinstance(event, StepNote) for event in toy.events) == 5 + 2
    (last,) = [event for event in toy.events if isinstance(event, StepFinished)]
    assert (last.step, last.kind, last.outcome) == ("quantize:m", "quantize", "failed")
    assert last.text == "/cache/0: damaged: removed. It was built again, and is damaged again: check the disk"


def test_a_steps_own_error_is_shown_as_it_is(toy: Toy) -> None:
    (toy.tricks / "convert.fail").touch()
    with pytest.raises(StepFailed) as caught:
        toy.build()
    assert str(caught.value) == "convert:m: convert cannot: the toy was told to fail; take convert.fail away"
    assert not isinstance(caught.value, StepBroke)
    (toy.tricks / "convert.fail").unlink()
    assert toy.build() == {"convert": "built", "quantize": "built"}


def test_a_bug_shows_its_last_lines_and_where_the_log_is(toy: Toy) -> None:
    (toy.tricks / "convert.crash").touch()
    with pytest.raises(StepBroke) as caught:
        toy.build()
    *_, error, place = str(caught.value).splitlines()
    assert error == "ZeroDivisionError: a bug"
    log = Path(place.rpartition("The whole log: ")[2])
    assert "Traceback" in log.read_text()


def test_a_crash_names_the_signal(toy: Toy) -> None:
    (toy.tricks / "convert.kill").touch()
    with pytest.raises(StepBroke, match=r"^convert:m: killed by SIGABRT \(native code gave up\)\. Its log: /"):
        toy.build()


def test_a_step_that_runs_away_or_hangs_is_stopped(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS.md D: steps had no limit of memory, nor of silence."""
    (toy.tricks / "quantize.greedy").write_text("300")
    monkeypatch.setenv("MLCBUILD_STEP_MEMORY", "200M")
    with pytest.raises(StepFailed, match=r"it took more than 0.2 GB of memory, .*MLCBUILD_STEP_MEMORY"):
        toy.build()
    (toy.tricks / "quantize.greedy").write_text("0")
    monkeypatch.setenv("MLCBUILD_STEP_SILENCE", "0.02")
    with pytest.raises(StepFailed, match=r"it gave no sign of life for 1\.2 s and was stopped"):
        toy.build()


def test_an_output_must_be_plain_files(toy: Toy) -> None:
    (toy.tricks / "convert.link").touch()
    with pytest.raises(StepBroke, match=r"convert:m: link: the step made something that is not a plain file"):
        toy.build()
    (toy.tricks / "convert.link").rename(toy.tricks / "convert.nothing")
    with pytest.raises(StepBroke, match=r"convert:m: the step ended well but made nothing"):
        toy.build()


def test_a_checkpoint_that_changes_under_the_step_fails_it(toy: Toy) -> None:
    (toy.tricks / "quantize.touch").write_text(str(toy.checkpoint / "model.safetensors"))
    with pytest.raises(
        MlcBuildError, match=r"quantize:m: .*model\.safetensors: changed while it was read: build again"
    ):
        toy.build()
    (toy.tricks / "quantize.touch").unlink()
    assert toy.build() == {"download": "built", "quantize": "built"}


@pytest.mark.parametrize("end", ["crash", "kill", "fail"])
@pytest.mark.parametrize(
    ("change", "text"),
    [("touch", "changed while it was read: build again"), ("remove", "was removed while it was read: bring it back, ")],
)
def test_a_step_that_ends_because_its_checkpoint_changed(toy: Toy, change: str, end: str, text: str) -> None:
    """FAULTS C: it was a bug in the step, or a figure that the gate refused."""
    (toy.tricks / f"quantize.{change}").write_text(str(toy.checkpoint / "model.safetensors"))
    (toy.tricks / f"quantize.{end}").touch()
    with pytest.raises(MlcBuildError, match=rf"quantize:m: .*model\.safetensors: {text}") as error:
        toy.build()
    assert not isinstance(error.value, StepBroke)


def test_progress_and_notes_arrive(toy: Toy) -> None:
    toy.build()
    assert any(isinstance(event, StepProgress) and event.unit == "files" for event in toy.events)
    (toy.tricks / "all.random").touch()
    toy.builder().build("convert:m", force=True)
    notes = [event for event in toy.events if isinstance(event, StepNote)]
    assert notes == [StepNote("convert:m", "gave other bytes than the last time with the same inputs")]


def test_nothing_is_left_in_the_caches_temporary_folders(toy: Toy) -> None:
    toy.build()
    for name in ("tmp", "locks", "logs"):
        assert not list((toy.store.root / name).iterdir())


def test_a_request_holds_exactly_what_was_declared(toy: Toy) -> None:
    tree = toy.builder().build("quantize:m").tree
    seen = json.loads(tree.path("quantize-0.txt").read_text())
    assert seen["fields"] == {"b": {"c": 2}}
    assert set(seen["inputs"]) == {"convert"}


def test_code_that_is_edited_while_it_runs_is_not_taken_for_what_was_keyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "self_editing.py"
    module.write_text(
        "VERSION, edits = 1, 0\nVERSION = 1\nCODE = ()\nTOOLS = ()\n\n"
        "def run(job):\n"
        "    with open(__file__, 'a') as file:\n        file.write('edits += 1\\n')\n"
        "    (job.output / 'file').write_text('made')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    store = Store(tmp_path / "cache")
    steps = {"edit:x": Step("edit", "edit:x", "self_editing", {})}
    with pytest.raises(StepFailed, match="edit:x: the code of the step was edited while it ran: build again"):
        Builder(Lookup(store, Graph(steps)), lambda _: None).build("edit:x")
    assert not list(store.root.glob("ac/*/*"))
