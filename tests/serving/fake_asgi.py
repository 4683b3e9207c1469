"""The ASGI target with a fake backend, for a Hypercorn process: `hypercorn --worker-class trio fake_asgi:app`."""

import os
from pathlib import Path

from fake_engine import FakeBackend

from dashinfer.serving.asgi import Application

app = Application(FakeBackend(Path(os.environ["FAKE_FOLDER"])))
