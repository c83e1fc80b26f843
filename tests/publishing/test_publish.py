"""`doit publish` against a hub on loopback: what goes there, what does not, and what a bad day leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.publishing.origin import front_matter
from mlcbuild.workspace.install import BESIDE
from tests.cache.test_materialise import damage
from tests.checkpoints.hub_server import Fault, serving
from tests.checkpoints.hub_writes import WritableHub
from tests.end_to_end.workspace import Workspace, digests, make_workspace, write_checkpoint

WEIGHTS, LIBRARIES = "me/tiny-q4f16_1-MLC", "me/mlc-libraries"
pytestmark = pytest.mark.slow  # a real package is built, once


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("publishing")
    write_checkpoint(folder / "tiny")
    (folder / "tiny" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\nsecret: no\n---\n# Tiny\n")
    (folder / "tiny" / "LICENSE").write_text("Apache License, version 2.0\n")
    # Random weights lose more to 4 bits than the gate allows, so these bounds are wide.
    workspace = make_workspace(folder / "workspace", folder / "cache", folder / "tiny")
    workspace.model("tiny", folder / "tiny", "verify: {kl: 90, perplexity_increase: 90, perplexity: 9000}\n")
    workspace.recipe("tiny-portable", target="cpu-x86_64")
    workspace.doit("build")
    return workspace


@pytest.fixture
def workspace(built_once: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(built_once.root.parent, tmp_path, dirs_exist_ok=True)
    return Workspace(tmp_path / "workspace", tmp_path / "cache")


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    with serving(WritableHub({}, repo="nobody/nothing")) as hub:
        assert isinstance(hub, WritableHub)
        yield hub


def publish(
    workspace: Workspace,
    hub: WritableHub,
    *words: str,
    check: bool = True,
    token: str | None = None,
    without_xet: bool = True,
) -> Any:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token or hub.writer,
        "HF_HUB_DISABLE_XET": "1" if without_xet else "0",  # 1: as if hf_xet were not installed
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(workspace.root.parent / "hf"),
    }
    return workspace.doit("publish", "namespace=me", *words, check=check, environment=environment)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_it_says_first_and_uploads_when_told(workspace: Workspace, hub: WritableHub) -> None:
    said = publish(workspace, hub).stdout
    assert f"{WEIGHTS}: a new repository" in said and f"{WEIGHTS}: + params_shard_0.bin, " in said
    assert "would be uploaded; upload=1 does it" in said
    assert hub.repos == {} and not (workspace.root / "dist/tiny-cpu/published.json").exists()

    publish(workspace, hub, "upload=1")
    files, package = hub.repos[WEIGHTS], workspace.root / "dist/tiny-cpu/tiny-q4f16_1-MLC"
    for path in package.iterdir():  # the folder as it is
        assert files[path.name] == path.read_bytes()
    assert files["LICENSE"] == b"Apache License, version 2.0\n"
    assert {f"provenance/{recipe}/manifest.json" for recipe in ("tiny-cpu", "tiny-portable")} < set(files)
    # A library for this very CPU is nobody else's; the portable one goes under the name of its structure.
    (library,) = (name for name in hub.repos[LIBRARIES] if name.endswith(".so"))
    assert library.startswith("llama-") and library.endswith("-q4f16_1-cpu-x86_64.so")
    (own,) = (workspace.root / "dist/tiny-portable").glob("*.so")
    assert hub.repos[LIBRARIES][library] == own.read_bytes()

    head = front_matter(files["README.md"].decode())
    assert head["license"] == "apache-2.0" and head["language"] == ["en"] and head["library_name"] == "mlc-llm"
    card, quality = files["README.md"].decode(), json.loads((package.parent / "quality.json").read_bytes())
    for text in (
        f"| KL divergence from the base | {quality['kl']:g} nats per token |",
        f"| perplexity | {quality['perplexity']:g} (base: {quality['reference_perplexity']:g}) |",
        f"mlc_llm chat HF://{WEIGHTS}",
        f'MLCEngine("HF://{WEIGHTS}")',
        "@mlc-ai/web-llm",
        f"[cpu-x86_64]({hub.url}/{LIBRARIES}/resolve/main/{library}); executed before it was shipped: ",
        "Its licence is carried over: apache-2.0.",
        "apache-tvm 0.27",
    ):
        assert text in card, card
    assert "secret" not in card

    commits, requests = dict(hub.commits), len(hub.uploaded)
    again = publish(workspace, hub, "upload=1").stdout
    assert hub.commits == commits and len(hub.uploaded) == requests, again
    assert "0 done" in workspace.doit("build").stdout, "what publishing adds to dist/ is no change of the package"


def test_only_what_changed_is_sent_and_old_shards_go(workspace: Workspace, hub: WritableHub) -> None:
    publish(workspace, hub, "recipe=tiny-cpu", "upload=1")
    hub.repos[WEIGHTS]["params_shard_7.bin"] = b"of an earlier build"
    hub.repos[WEIGHTS]["notes.md"] = b"somebody's own"
    hub.uploaded.clear()
    workspace.model(
        "tiny", workspace.root.parent / "tiny", "verify: {kl: 90, perplexity_increase: 90, perplexity: 9000}\n"
    )
    path = workspace.root / "recipes/models/tiny.yaml"
    path.write_text(path.read_text().replace("chatml", "llama-2"))  # the template is in mlc-chat-config.json alone
    said = publish(workspace, hub, "recipe=tiny-cpu", "upload=1").stdout
    assert f"{WEIGHTS}: ~ mlc-chat-config.json" in said and f"{WEIGHTS}: - params_shard_7.bin" in said
    assert hub.uploaded == [], "no weights"
    assert "params_shard_7.bin" not in hub.repos[WEIGHTS] and hub.repos[WEIGHTS]["notes.md"] == b"somebody's own"
    assert b'"name": "llama-2"' in hub.repos[WEIGHTS]["mlc-chat-config.json"]


def test_what_was_cut_off_goes_on(workspace: Workspace, hub: WritableHub) -> None:
    hub.faults = [Fault("/commit/main", status=500, times=99)]
    failed = publish(workspace, hub, "recipe=tiny-cpu", "upload=1", check=False)
    assert failed.returncode == 1 and "run it again: what has arrived is not sent again" in failed.stdout
    assert "params_shard_0.bin" not in hub.repos[WEIGHTS], "files appear with the commit, or not at all"
    assert not (workspace.root / "dist/tiny-cpu/published.json").exists()
    hub.faults, sent = [], len(hub.uploaded)
    assert sent
    publish(workspace, hub, "recipe=tiny-cpu", "upload=1")
    assert len(hub.uploaded) == sent, "blobs were there already"
    assert "params_shard_0.bin" in hub.repos[WEIGHTS]


@pytest.mark.parametrize(("hub_has_it", "without_xet"), [(True, False), (True, True), (False, False)])
def test_weights_go_by_xet_where_both_sides_have_it(
    workspace: Workspace, hub: WritableHub, tmp_path: Path, hub_has_it: bool, without_xet: bool
) -> None:
    """With hf_xet installed, huggingface_hub does not ask whether the hub knows Xet; then it goes on by LFS."""
    hub.xet = tmp_path / "xet" if hub_has_it else None
    (tmp_path / "xet").mkdir()
    publish(workspace, hub, "recipe=tiny-cpu", "upload=1", without_xet=without_xet)
    package = workspace.root / "dist/tiny-cpu/tiny-q4f16_1-MLC"
    shards = sorted(package.glob("params_shard_*.bin"))
    assert shards and all(hub.repos[WEIGHTS][path.name] == path.read_bytes() for path in shards)
    by_xet = {sha256(path.read_bytes()) for path in shards}.isdisjoint(hub.uploaded)
    assert by_xet is (hub_has_it and not without_xet)
    commits = dict(hub.commits)
    publish(workspace, hub, "recipe=tiny-cpu", "upload=1", without_xet=without_xet)
    assert hub.commits == commits, "nothing has changed"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]  # hf_xet keeps a log, too
    assert not [content for content in written if hub.writer.encode() in content]


def test_what_did_not_pass_is_not_published(workspace: Workspace, hub: WritableHub) -> None:
    workspace.model("tiny", workspace.root.parent / "tiny", "verify: {kl: 0.000001, gate: report}\n")
    failed = publish(workspace, hub, "recipe=tiny-cpu", "upload=1", check=False)
    assert failed.returncode == 1
    assert "its verification says `failed`, not `passed`: it is not published" in failed.stdout
    workspace.model("tiny", workspace.root.parent / "tiny", "verify: {kl: 0.000001}\n")
    failed = publish(workspace, hub, "recipe=tiny-cpu", "upload=1", check=False)
    assert failed.returncode == 1 and "!! verify:tiny-cpu" in failed.stdout
    assert hub.repos == {}


def test_a_token_that_may_not_write_and_no_namespace(workspace: Workspace, hub: WritableHub) -> None:
    failed = publish(workspace, hub, "recipe=tiny-cpu", "upload=1", check=False, token="hf_planted_secret_of_a_reader")
    assert failed.returncode == 1 and "set HF_TOKEN to a token that may write" in failed.stdout
    assert "planted" not in failed.stdout + failed.stderr
    nowhere = workspace.doit("publish", check=False)
    assert nowhere.returncode == 3 and "namespace=NAME, or MLCBUILD_NAMESPACE" in nowhere.stderr


def test_provenance_is_what_other_tools_read_and_the_same_every_time(workspace: Workspace, hub: WritableHub) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    publish(workspace, hub, "recipe=tiny-cpu")  # said only, and yet beside the manifest
    folder = workspace.root / "dist/tiny-cpu"
    before = digests(folder)
    statement: Any = json.loads((folder / "provenance.intoto.json").read_bytes())
    Statement.copy_from_pb(ParseDict(statement, Message())).validate()
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert subjects == {
        name: sha256(path.read_bytes()) for name, path in files.items() if name not in (*BESIDE, "manifest.json")
    }
    sources = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    weights = workspace.root.parent / "tiny/model.safetensors"
    assert {"name": "checkpoint/model.safetensors", "digest": {"sha256": sha256(weights.read_bytes())}} in sources

    bom = (folder / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom) is None
    purls = {part.get("purl") for part in json.loads(bom)["components"]}
    assert any(purl and purl.startswith("pkg:pypi/apache-tvm@0.27") for purl in purls)

    shutil.rmtree(folder)
    publish(workspace, hub, "recipe=tiny-cpu")
    assert digests(folder) == before


def test_what_was_damaged_is_not_published(workspace: Workspace, hub: WritableHub) -> None:
    """Eight bytes of dist/ changed and the date set back, in the cache as well: good bytes leave. FAULTS.md A2."""
    folder = workspace.root / "dist/tiny-cpu"
    (shard,) = folder.glob("*/params_shard_0.bin")
    good = shard.read_bytes()
    digest = sha256(good)
    (blob,) = workspace.root.parent.glob(f"cache/cas/*/{digest}")
    damage(shard)
    if not blob.samefile(shard):
        damage(blob)
    publish(workspace, hub, "recipe=tiny-portable", "upload=1")
    weights = json.loads((folder.parent / "tiny-portable/published.json").read_bytes())["weights"]
    assert hub.repos[weights]["params_shard_0.bin"] == good, "the sound package of the same weights"
    said = publish(workspace, hub, "recipe=tiny-cpu", "upload=1").stdout
    assert f"{shard}: its sha256 is " in said and ": installed again from the cache" in said
    assert f"{blob}: damaged: its sha256 is " in said and "ok quantize:" in said
    assert shard.read_bytes() == blob.read_bytes() == good
    assert hub.repos[weights]["params_shard_0.bin"] == good
    (folder / "manifest.json").chmod(0o644)
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace(digest, "0" * 64))
    publish(workspace, hub, "recipe=tiny-cpu", "upload=1")
    assert digest in hub.repos[weights]["provenance/tiny-cpu/manifest.json"].decode()
