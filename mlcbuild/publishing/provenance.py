"""Provenance and bill of materials of a package, in the forms that other tools read; the same bytes every time.

The statement is in-toto's (https://in-toto.io/Statement/v1) with SLSA's provenance 1.0 as its predicate, the bill of
materials CycloneDX 1.6. Nothing of it is signed here: sign the statement with what your readers trust.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from typing import Any

from mlcbuild.cache.tree import canonical, digest_json
from mlcbuild.errors import MlcBuildError
from mlcbuild.publishing.origin import Origin
from mlcbuild.publishing.package import Package

STATEMENT, MATERIALS = "provenance.intoto.json", "sbom.cdx.json"
_SLSA = "https://slsa.dev/provenance/v1"
_BUILD = "https://github.com/mlcbuild/mlcbuild/recipe@v1"  # what the parameters mean
_NAMES = uuid.UUID("6f1c7a52-3c3e-5b8e-9a55-0b1d5f6c4e11")  # of serial numbers that follow from content
_LONG_AGO = datetime(1980, 1, 1, tzinfo=UTC)


def statement(package: Package, origin: Origin) -> bytes:
    """The in-toto statement: every file by its sha256, made from the checkpoint's files by this recipe."""
    try:
        from google.protobuf.json_format import MessageToDict
        from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
        from in_toto_attestation.v1.statement import Statement
    except ImportError:
        raise _missing() from None
    manifest = package.manifest
    subjects = [
        ResourceDescriptor(name=name, digest={"sha256": file["sha256"]}).pb for name, file in manifest["files"].items()
    ]
    sources: list[dict[str, Any]] = [
        {"uri": f"https://huggingface.co/{name}", "digest": {"gitCommit": commit}}
        for name, commit in origin.repositories.items()
    ]
    sources += [
        {"name": f"{kind}/{name}", "digest": {"sha256": digest}}
        for kind in ("checkpoint", "delta_of", "lora", "tokenizer_from")
        for name, digest in manifest.get(kind, {}).items()
    ]
    predicate = {
        "buildDefinition": {
            "buildType": _BUILD,
            "externalParameters": {"recipe": json.loads(canonical(manifest["recipe"]))},
            "internalParameters": {"steps": {kind: step["key"] for kind, step in manifest["steps"].items()}},
            "resolvedDependencies": sources,
        },
        "runDetails": {
            "builder": {
                "id": "https://github.com/mlcbuild/mlcbuild",
                "version": {"mlcbuild": manifest["mlcbuild"], **manifest["tools"]},
            },
            "metadata": {"invocationId": digest_json(manifest["steps"])},
        },
    }
    made = Statement(subjects, _SLSA, predicate)
    made.validate()
    return _text(MessageToDict(made.pb))


def bill_of_materials(package: Package, origin: Origin) -> bytes:
    """The CycloneDX bill of materials: the model, its base, and the tools that made it."""
    try:
        from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
        from packageurl import PackageURL
    except ImportError:
        raise _missing() from None
    manifest = package.manifest
    serial = uuid.uuid5(_NAMES, digest_json(manifest["files"]))
    root = Component(
        name=package.weights.name,
        version=package.weights_tree[:16],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="package",
    )
    bom = Bom(serial_number=serial)
    bom.metadata.timestamp = _LONG_AGO
    bom.metadata.component = root
    parts = []
    for name, file in sorted(manifest["files"].items()):
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=file["sha256"])]
        parts.append(Component(name=name, type=ComponentType.FILE, bom_ref=f"file:{name}", hashes=hashes))
    for name, commit in origin.repositories.items():
        address = XsUri(f"https://huggingface.co/{name}/tree/{commit}")
        base = Component(name=name, version=commit, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref=f"base:{name}")
        base.purl = PackageURL("huggingface", *name.split("/"), commit)
        base.external_references.add(ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=address))
        parts.append(base)
    for name, version in sorted({"mlcbuild": manifest["mlcbuild"], **manifest["tools"]}.items()):
        tool = Component(name=name, version=version, type=ComponentType.LIBRARY, bom_ref=f"tool:{name}")
        tool.purl = PackageURL("pypi", None, name, version)
        parts.append(tool)
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(root, parts)
    return _text(json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()))


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _missing() -> MlcBuildError:
    return MlcBuildError("publishing needs more packages: pip install 'mlcbuild[publish]'")
