"""`doit publish`: installed packages of verified recipes, brought to a hub. What is there already is not sent again.

Weights go to NAMESPACE/<model>-<quantization>-MLC, libraries to one repository, under the names of their structures,
so that models share them there as they do here.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from mlcbuild.cache.disk import room_in
from mlcbuild.cache.layout import lock_path
from mlcbuild.cache.locks import locked
from mlcbuild.engine.graph import Step
from mlcbuild.errors import MlcBuildError, StepFailed
from mlcbuild.gguf.checkpoint import local_parts
from mlcbuild.gguf.header import read_header
from mlcbuild.publishing import hub
from mlcbuild.publishing.card import card
from mlcbuild.publishing.lists import lists
from mlcbuild.publishing.origin import Origin, of_folder, of_gguf, of_hub
from mlcbuild.publishing.package import PUBLISHED, Package, installed, read_package
from mlcbuild.publishing.provenance import MATERIALS, STATEMENT, bill_of_materials, statement
from mlcbuild.recipes.files import write_atomically
from mlcbuild.redact import redact
from mlcbuild.reporting.events import StepFinished, StepNote, StepStarted
from mlcbuild.text import amount
from mlcbuild.workspace.install import BESIDE
from mlcbuild.workspace.manifest import NAME as MANIFEST
from mlcbuild.workspace.session import Session

assert {PUBLISHED, STATEMENT, MATERIALS} == set(BESIDE)


@dataclass(frozen=True)
class Place:
    """Where to publish, and whether to do it: without `upload`, it is only said what would be uploaded."""

    namespace: str
    libraries: str  # the name of the repository of libraries
    upload: bool = False
    private: bool = False


class Publisher:
    """Publishes recipes of one session. Several threads may publish; one repository is changed by one at a time."""

    def __init__(self, session: Session, place: Place) -> None:
        self.session = session
        self.place = place
        self.published: list[str] = []
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def publish(self, recipe: str, forced: bool = False) -> None:
        """Bring a recipe's weights and library to the hub. Raises MlcBuildError; what is there stays as it is then."""
        step, started, report = f"publish:{recipe}", time.monotonic(), self.session.builder.report
        report(StepStarted(step, "publish"))
        try:
            with room_in(self.session.dist):
                size = self._publish(recipe)
        except MlcBuildError as error:
            report(StepFinished(step, "publish", "failed", time.monotonic() - started, 0, str(error)))
            raise StepFailed(f"{step}: {error}") from None
        report(StepFinished(step, "publish", "built" if size else "hit", time.monotonic() - started, size))

    def _publish(self, recipe: str) -> int:
        """Bytes that were uploaded."""
        self.session.prove(recipe, f"publish:{recipe}")  # nothing leaves by its size and date alone
        package = read_package(self.session.dist / recipe)
        if not package.passed:
            raise StepFailed(
                f"its verification says `{package.quality.get('status')}`, not `passed`: it is not published. "
                f"dist/{recipe}/quality.json has the figures"
            )
        origin = self._origin(recipe)
        documents = {STATEMENT: statement(package, origin), MATERIALS: bill_of_materials(package, origin)}
        for name, content in documents.items():
            write_atomically(package.folder / name, content.decode())
        where, size = self._where(package), 0
        if where["library_url"]:
            name = self._library_name(package)
            size += self._bring(
                recipe, self.libraries, {name: package.library}, {name: package.digests[package.library.name]}
            )
        weights = self._weights_files(package, origin, documents, where)
        prefix = f"{package.weights.name}/"
        known = {name.removeprefix(prefix): digest for name, digest in package.digests.items() if prefix in name}
        size += self._bring(recipe, where["weights"], weights, known, _is_shard)
        if self.place.upload:
            write_atomically(package.folder / PUBLISHED, _json(where))
            self.published.append(recipe)
        return size

    def finish(self) -> None:
        """The lists that apps read, once the recipes are done. Raises MlcBuildError."""
        if not self.published or sys.exc_info()[0] is not None:  # nothing was done, or the build is being ended
            return
        found = lists(installed(self.session.dist))
        for name, content in found.items():
            path = self.session.dist / name
            write_atomically(path, content.decode())
        if found:
            self._bring("lists", self.libraries, dict(found), {})

    @cached_property
    def _by_weights(self) -> dict[str, set[str]]:
        """Packages in dist/ by the name of their folder of weights, seen once: each recipe asks for its own."""
        found: dict[str, set[str]] = {}
        for config in self.session.dist.glob("[!.]*/*/mlc-chat-config.json"):
            found.setdefault(config.parent.name, set()).add(config.parent.parent.name)
        return found

    @property
    def libraries(self) -> str:
        return f"{self.place.namespace}/{self.place.libraries}"

    @cached_property
    def _endpoint(self) -> str:
        from huggingface_hub import constants

        return str(constants.ENDPOINT)

    def _bring(
        self,
        recipe: str,
        repository: str,
        files: Mapping[str, hub.Content],
        known: Mapping[str, str],
        owns: Callable[[str], bool] = lambda name: False,
    ) -> int:
        """Bytes that were uploaded, after saying what differs."""
        with self._lock:
            lock = self._locks.setdefault(repository, threading.Lock())
        # Two builds on this machine may publish at once; on two machines the hub refuses the slower one's commit.
        with lock, locked(lock_path(self.session.store.root, f"hub-{repository.replace('/', '--')}")):
            found = hub.changes(repository, files, owns, known)
            for line in hub.lines(found, amount):
                self._say(recipe, line)
            if not found:
                return 0
            if not self.place.upload:
                self._say(recipe, f"{repository}: {amount(found.size)} would be uploaded; upload=1 does it")
                return 0
            commit = hub.upload(found, f"{recipe}, built by mlcbuild", self.place.private)
            self._say(recipe, f"{repository}: {amount(found.size)} uploaded, commit {commit[:12]}")
            return found.size

    def _say(self, recipe: str, text: str) -> None:
        self.session.builder.report(StepNote(f"publish:{recipe}", text))

    def _weights_files(
        self, package: Package, origin: Origin, documents: Mapping[str, bytes], where: Mapping[str, str]
    ) -> dict[str, hub.Content]:
        """What the repository of weights holds: the folder as it is, the card, licences, and where it all came from."""
        with self._lock:
            names = self._by_weights.setdefault(where["name"], set())
            names.add(package.recipe)
            folders = [self.session.dist / name for name in sorted(names)]
        others = [read_package(folder) for folder in folders if (folder / MANIFEST).is_file()]
        same = [each for each in others if each.weights_tree == package.weights_tree and each.passed]
        libraries = {each.recipe: each.published["library_url"] for each in same if each.published}
        libraries = {name: url for name, url in {**libraries, package.recipe: where["library_url"]}.items() if url}
        files: dict[str, hub.Content] = {**origin.files}
        files |= {path.name: path for path in sorted(package.weights.iterdir())}  # proven to be those of the manifest
        files["README.md"] = card(where["weights"], same, origin, libraries).encode()
        beside = {"manifest.json": (package.folder / "manifest.json").read_bytes(), **documents}
        return files | {f"provenance/{package.recipe}/{name}": content for name, content in beside.items()}

    def _where(self, package: Package) -> dict[str, str]:
        weights = f"{self.place.namespace}/{package.weights.name}"
        # A library for this machine's own CPU is of no use to whoever has another.
        native = package.target["device"].get("mcpu") == "native"
        library = "" if native else f"{self._endpoint}/{self.libraries}/resolve/main/{self._library_name(package)}"
        return {
            "name": package.weights.name,
            "weights": weights,
            "weights_url": f"{self._endpoint}/{weights}",
            "library_url": library,
            "model_lib": str(self._library_step(package).fields.get("prefix") or "").rstrip("_"),  # of a static library
        }

    def _library_name(self, package: Package) -> str:
        """`llama-4008c831-q4f16_1-webgpu.wasm`: what it was compiled from, not for which model."""
        return self._library_step(package).name.partition(":")[2] + package.library.suffix

    def _library_step(self, package: Package) -> Step:
        return self.session.graph.steps[self.session.graph.goals[package.recipe].steps["library"]]

    def _origin(self, recipe: str) -> Origin:
        model = self.session.catalog.recipes[recipe].model
        graph, steps = self.session.graph, self.session.graph.goals[recipe].steps
        fetched = [
            graph.steps[steps[kind]].fields for kind in ("download", "base", "lora", "tokenizer") if kind in steps
        ]
        repositories = {fields["repo"]: fields["commit"] for fields in fetched if "repo" in fields}
        if model.source.path is not None:
            path = model.source.path
            found = of_gguf(read_header(local_parts(path)[0]).facts) if model.source.gguf else of_folder(path)
            return Origin(repositories, found.licence, found.carried, found.files)
        try:
            return of_hub(repositories)
        except Exception as error:
            words = redact(" ".join(str(error).split()))[:200]
            raise MlcBuildError(f"{model.source}: its card and licence cannot be read: {words}") from None


def place(namespace: str | None, libraries: str | None, upload: bool, private: bool) -> Place:
    """Where to publish to. Raises MlcBuildError where nothing says whose repositories they are."""
    if not namespace or "/" in namespace:
        raise MlcBuildError(
            "publishing needs a user or organisation of the hub, whose repositories are written: namespace=NAME, or "
            "MLCBUILD_NAMESPACE"
        )
    return Place(namespace, libraries or "mlc-libraries", upload, private)


def _is_shard(name: str) -> bool:
    """Whether a file that is no longer part of the weights is certainly one of ours."""
    return name.startswith("params_shard_") and name.endswith(".bin")


def _json(content: Mapping[str, str]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
