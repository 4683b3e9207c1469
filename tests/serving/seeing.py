"""A model that sees, as far as the parent knows one (a checkpoint's small files, a tokenizer of bytes), and pictures."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from dashinfer.config import ServerConfig
from dashinfer.serving.service import TextModel
from dashinfer.sources import ModelSource, TokenizerFiles
from dashinfer.sources.local import resolve_directory
from dashinfer.text.chat_template import ChatTemplate
from dashinfer.text.tokenizer import Tokenizer, byte_alphabet
from dashinfer.vision.model import VisionModel

SPECIAL = ["<|end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
END, START, STOP, IMAGE, VIDEO = range(256, 256 + len(SPECIAL))
TEMPLATE = """\
{%- for message in messages -%}
{{ message.role }}: {% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' and message.role != 'assistant' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in part %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}{% if not loop.last %}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|end|>{% endif %}"""
# Family: architecture, the tower's part of config.json, preprocessor_config.json, video_preprocessor_config.json
SIZES = {"min_pixels": 3136, "max_pixels": 28 * 28 * 100}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {"embed_dim": 32, "hidden_size": 48, "num_heads": 2}, SIZES, None),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "tokens_per_second": 2},
        SIZES,
        None,
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "patch_size": 16},
        {"patch_size": 16, "size": {"shortest_edge": 4096, "longest_edge": 32 * 32 * 100}, "image_mean": [0.5] * 3,
         "image_std": [0.5] * 3},
        {"size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 200}},
    ),
}  # fmt: skip


def write_model(folder: Path, family: str = "qwen2_vl", **image_settings: Any) -> Path:
    """The small files of a checkpoint."""
    architecture, vision, image, video = FAMILIES[family]
    vision = {"depth": 2, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0], **vision}
    config = {
        "architectures": [architecture], "model_type": family, "vision_config": vision, "image_token_id": IMAGE,
        "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": STOP, "vocab_size": 261,
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
        "max_position_embeddings": 32768, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={sign: byte for byte, sign in byte_alphabet().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "config.json": config,
        "tokenizer_config.json": {"eos_token": "<|end|>"},
        "chat_template.json": {"chat_template": TEMPLATE},
        "preprocessor_config.json": {**image, **image_settings},
        **({} if video is None else {"video_preprocessor_config.json": video}),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def source(folder: Path) -> ModelSource:
    return resolve_directory(folder, load_format="dummy", report=lambda *event: None)


def make_text(folder: Path, template: str | None = None, **settings: Any) -> TextModel:
    found = source(folder)
    tokenizer = Tokenizer.from_source(found)
    files = TokenizerFiles(found.tokenizer.tokenizer_json, {}, template or found.tokenizer.chat_template)
    vision = VisionModel.load(ServerConfig(model=str(folder), **settings), found)
    return TextModel(tokenizer, ChatTemplate.from_files(files, tokenizer.special_tokens), {}, vision)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 64, (height, width, 3))
    return Image.fromarray((noise + np.linspace(0, 190, width)[None, :, None]).astype(np.uint8))


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def gif(frames: int = 8, height: int = 56, width: int = 84) -> bytes:
    """Ten pictures a second."""
    first, *rest = (picture(height, width, seed) for seed in range(frames))
    return encode(first, "GIF", save_all=True, append_images=rest, duration=100)


class MediaServer:
    """Attributes:
    files: by path; what is not there is a 404.
    asked: paths in the order of requests.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.hanging = threading.Semaphore(0)  # released for each request to /hang, which gets no answer
        self.left = threading.Event()  # its client is gone

    def add(self, path: str, content: bytes) -> str:
        self.files[path] = content
        return self.url + path


@contextmanager
def media_server() -> Iterator[MediaServer]:
    """On a loopback port, in threads."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            if self.path == "/hang":
                server.hanging.release()
                if not self.connection.recv(1):
                    server.left.set()
                return
            content = server.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("content-length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server = MediaServer(f"http://127.0.0.1:{listener.server_port}")
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        listener.shutdown()
        thread.join()
