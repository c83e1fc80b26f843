"""The lists that apps read: WebLLM's `model_list`, and `mlc-package-config.json` for phones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlcbuild.publishing.memory import memory
from mlcbuild.publishing.package import Package

WEB_LIST = "webllm-model-list.json"
_PHONES = ("iphone", "android", "macabi")  # devices of mlc-package-config.json, and names of targets


def lists(packages: Iterable[Package]) -> dict[str, bytes]:
    """The files, by name, for those of the packages that are published; none where there is nothing to list."""
    published = [package for package in packages if package.published]
    found: dict[str, bytes] = {}
    web = [web_record(package) for package in published if package.library.suffix == ".wasm"]
    if web:
        found[WEB_LIST] = _text({"model_list": web})
    for device in _PHONES:
        of = [
            package
            for package in published
            if str(package.target["name"]).startswith(device) and package.library.suffix == ".tar"
        ]
        records = [phone_record(package) for package in of]
        if records:
            found[f"{device}/mlc-package-config.json"] = _text(
                {"device": device, "model_list": records, **_libraries(of)}
            )
    return found


def web_record(package: Package) -> dict[str, Any]:
    """A record of WebLLM's `prebuiltAppConfig.model_list`."""
    where, needed = _where(package), memory(package)
    record: dict[str, Any] = {
        "model": where["weights_url"],
        "model_id": package.weights.name,
        "model_lib": where["library_url"],
        "vram_required_MB": needed.megabytes,
        "low_resource_required": needed.low_resource,
        "overrides": {"context_window_size": package.config["context_window_size"]},
    }
    if package.quantization["model_dtype"] == "float16":
        record["required_features"] = ["shader-f16"]
    return record


def phone_record(package: Package) -> dict[str, Any]:
    """A record of `mlc-package-config.json`'s `model_list`."""
    record: dict[str, Any] = {
        "model": f"HF://{_where(package)['weights']}",
        "model_id": package.weights.name,
        "estimated_vram_bytes": memory(package).total,
        "overrides": {
            "context_window_size": package.config["context_window_size"],
            "prefill_chunk_size": package.config["prefill_chunk_size"],
        },
    }
    return record | ({"model_lib": prefix} if (prefix := _where(package).get("model_lib")) else {})


def _libraries(packages: Iterable[Package]) -> dict[str, Any]:
    """What `mlc_llm package` is to link: without it, it compiles them anew. Paths are relative to the app's folder, in
    which the files lie by the names that they have on the hub."""
    places = [_where(package) for package in packages]
    known = [place for place in places if place.get("model_lib") and place["library_url"]]
    paths = {place["model_lib"]: place["library_url"].rpartition("/")[2] for place in known}
    return {"model_lib_path_for_prepare_libs": paths} if paths else {}


def _where(package: Package) -> Mapping[str, Any]:
    assert package.published is not None
    return package.published


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
