"""What is checked of a library before its step ends, on small files that zig makes for each system."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.compiler.link import binaries, symbols
from mlcbuild.compiler.link.static import write_tar
from mlcbuild.errors import MlcBuildError
from mlcbuild.zig import run_zig

# One name that others can use, one in the file alone, one hidden in what is linked, one wanted from elsewhere.
SOURCE = """
extern int elsewhere(void);
#define SHOWN __attribute__((visibility("default")))
#ifdef _WIN32
#undef SHOWN
#define SHOWN __declspec(dllexport)
int DllMainCRTStartup(void *a, unsigned b, void *c) { return a == c && b; }
int _DllMainCRTStartup(void *a, unsigned b, void *c) { return a == c && b; }
#endif
SHOWN extern const char NAME[];
SHOWN const char NAME[] = TEXT;
static const volatile int own = 1;
#ifdef __wasm__
#define EXPORTED(name) __attribute__((export_name(#name))) int name(void) { return own; }
#ifdef WANTED
__attribute__((import_module("env"), import_name("elsewhere"))) extern int elsewhere(void);
__attribute__((import_module("env"), import_name("__console_log"))) extern int said(void);
__attribute__((export_name("asks"))) int asks(void) { return elsewhere() + said(); }
#endif
EXPORTED(TVMWasmAllocSpace) EXPORTED(TVMWasmFreeSpace) EXPORTED(TVMFFIFunctionGetGlobal)
EXPORTED(TVMFFIFunctionCall) EXPORTED(TVMFFIObjectDecRef)
__attribute__((export_name("name"))) const char *name(void) { return NAME; }
#ifndef INERT
EXPORTED(_initialize)
#endif
#else
__attribute__((visibility("hidden"))) int inside(void) { return own; }
#endif
"""
MAC = ("-shared", "-nostdlib", "-undefined", "dynamic_lookup", "-s", "-Wl,-install_name,@rpath/model.dylib")
SHARED = {
    "x86_64-linux-gnu.2.28": (".so", ("-shared", "-nostdlib", "-s")),
    "aarch64-linux-gnu.2.28": (".so", ("-shared", "-nostdlib", "-s")),
    "aarch64-macos.11.0": (".dylib", MAC),
    "x86_64-macos.11.0": (".dylib", MAC),
    "x86_64-windows-msvc": (".dll", ("-shared", "-nostdlib", "-s")),
    "wasm32-freestanding": (".wasm", ("-nostdlib", "-Wl,--no-entry")),
}


def made(triple: str, folder: Path, name: str = binaries.ENTRY, text: str = "code", *defines: str) -> Path:
    """A library of SOURCE for a zig triple."""
    suffix, flags = SHARED[triple]
    return compiled(triple, folder / f"model{suffix}", [*flags, *defines], name, text)


def compiled(triple: str, output: Path, flags: list[str], name: str, text: str = "code") -> Path:
    source = output.with_name("model.c")
    source.write_text(SOURCE)
    defines = [f"-DNAME={name}", f'-DTEXT="{text}"']
    words = ["-target", triple, *flags, "-g0", "-fno-sanitize=all", *defines, str(source), "-o", str(output)]
    run_zig(["cc", *words], output.parent / "zig")
    return output


@pytest.mark.parametrize("triple", SHARED)
def test_a_library_for_each_system_is_accepted(triple: str, tmp_path: Path) -> None:
    binaries.check(made(triple, tmp_path), triple, [tmp_path])


@pytest.mark.parametrize("triple", [triple for triple in SHARED if "wasm" not in triple])
def test_only_what_others_can_use_is_exported(triple: str, tmp_path: Path) -> None:
    system = "windows" if "windows" in triple else "macos" if "macos" in triple else "linux"
    library = symbols.read(made(triple, tmp_path).read_bytes(), system)
    assert library.machine == triple.split("-")[0]
    assert library.exported - {"__dso_handle", "_mh_dylib_header"} == {binaries.ENTRY}  # those are in every dylib


@pytest.mark.parametrize("triple", SHARED)
def test_the_entry_must_be_a_symbol_and_not_some_text(triple: str, tmp_path: Path) -> None:
    """Its name among the constants is no way in."""
    library = made(triple, tmp_path, "other", binaries.ENTRY, "-DINERT")
    assert binaries.ENTRY.encode() in library.read_bytes()
    entry = "_initialize" if "wasm" in triple else binaries.ENTRY
    with pytest.raises(MlcBuildError, match=f"^{library.name}: exports no {entry}, so no runtime could open it$"):
        binaries.check(library, triple)


@pytest.mark.parametrize(
    ("triple", "wanted", "text"),
    [
        ("aarch64-linux-gnu.2.28", "x86_64-linux-gnu", "the linker made code for aarch64, the target says x86_64"),
        ("x86_64-macos.11.0", "arm64-apple-ios14.0", "the linker made code for x86_64, the target says aarch64"),
        ("aarch64-linux-gnu.2.28", "aarch64-macos.11.0", "no library for aarch64-macos.11.0: not a 64-bit Mach-O file"),
        ("aarch64-macos.11.0", "aarch64-linux-android", "for aarch64-linux-android: not a 64-bit ELF file"),
        ("x86_64-linux-gnu.2.28", "x86_64-pc-windows-msvc", "for x86_64-pc-windows-msvc: not a PE file"),
        ("x86_64-linux-gnu.2.28", "wasm32-unknown-unknown-wasm", "-wasm: not a WebAssembly module"),
    ],
)
def test_another_system_or_processor(triple: str, wanted: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match=f"{text}$"):
        binaries.check(made(triple, tmp_path), wanted)


@pytest.mark.parametrize("triple", SHARED)
def test_a_library_that_is_cut_off(triple: str, tmp_path: Path) -> None:
    library = made(triple, tmp_path)
    library.write_bytes(library.read_bytes()[:100])
    with pytest.raises(MlcBuildError, match=f"^{library.name}: the linker made no library for {triple}: "):
        binaries.check(library, triple)


def test_a_path_of_this_machine(tmp_path: Path) -> None:
    triple = "x86_64-linux-gnu.2.28"
    with pytest.raises(MlcBuildError, match=rf"^model.so: names {tmp_path}, so it would differ on another machine$"):
        binaries.check(made(triple, tmp_path, text=f"{tmp_path}/x.c"), triple, [tmp_path])
    with pytest.raises(MlcBuildError, match=rf"names {Path.home()}/, so it would differ"):
        binaries.check(made(triple, tmp_path, text=f"{Path.home()}/x.c"), triple)


def test_what_no_browser_defines_is_refused(tmp_path: Path) -> None:
    triple = "wasm32-freestanding"
    library = made(triple, tmp_path, binaries.ENTRY, "code", "-DWANTED")
    assert symbols.read(library.read_bytes(), "wasm").imported == {"env.elsewhere", "env.__console_log"}
    with pytest.raises(MlcBuildError, match=r"^model.wasm: wants elsewhere, which no browser's runtime has$"):
        binaries.check(library, triple)


@pytest.mark.parametrize(
    ("zig", "triple"),
    [("aarch64-linux-android", "aarch64-linux-android"), ("aarch64-ios", "arm64-apple-ios14.0")],
)
def test_static_libraries_have_an_entry_of_their_own(zig: str, triple: str, tmp_path: Path) -> None:
    """One member defines it, under the library's prefix; each is looked at."""
    entry, rest = f"mine_{binaries.ENTRY}", "mine_rest"
    objects = [compiled(zig, tmp_path / f"{name}.o", ["-c", "-nostdinc"], name) for name in (entry, rest)]
    archive = tmp_path / "model.tar"
    write_tar(objects, archive, "mine_")
    binaries.check(archive, triple, [tmp_path], "mine_")
    with pytest.raises(MlcBuildError, match=f"^model.tar: exports no yours_{binaries.ENTRY}, so"):
        binaries.check(archive, triple, prefix="yours_")
    write_tar(objects[1:], archive, "mine_")
    with pytest.raises(MlcBuildError, match=f"^model.tar: exports no {entry}, so no runtime could open it$"):
        binaries.check(archive, triple, prefix="mine_")
    objects[1].write_bytes(b"nothing")
    write_tar(objects, archive, "mine_")
    with pytest.raises(MlcBuildError, match=rf"^model.tar: mine_rest.o: the linker made no library for {triple}: "):
        binaries.check(archive, triple, prefix="mine_")
