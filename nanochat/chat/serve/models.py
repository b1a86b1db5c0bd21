"""
The models that the server can answer with: every stage of every tag whose tokenizer still exists.
One is loaded at the start, others on request; at most MOST_LOADED stay in memory.
"""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nanochat.base.common import UserError, out_of_memory
from nanochat.base.runtime import release_memory
from nanochat.base.strangers import read_json
from nanochat.chat.generate import Engine
from nanochat.chat.serve.requests import ApiError, Fields
from nanochat.chat.serve.worker import Worker
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.checkpoint import Checkpoint, list_checkpoints, load_for_inference
from nanochat.model.stages import STAGES, stage_directory, was_set_aside

MOST_LOADED = 2


@dataclass
class Served:
    """A loaded model and the worker that decodes with it."""

    id: str
    stage: str
    tokenizer: Tokenizer
    engine: Engine
    worker: Worker
    fingerprint: str  # of the checkpoint
    used: float = field(default_factory=time.monotonic)

    @property
    def context(self) -> int:
        return self.engine.model.config.sequence_len

    @property
    def prompt_room(self) -> int:
        """Tokens of a truncated prompt: a quarter of the context stays for the answer."""
        return self.context * 3 // 4


class Models:
    """Finds, loads and unloads models. `options` go to load_for_inference (device_type, dtype)."""

    def __init__(self, max_rows: int, kv_bytes: float, **options: Any):
        self.max_rows, self.kv_bytes, self.options = max_rows, kv_bytes, options
        self.default = ""  # id of the model that was loaded at the start
        self._first: dict[str, tuple[str, Checkpoint]] = {}  # its checkpoint, which never changes
        self._loaded: dict[str, Served] = {}
        self._lock = threading.Lock()

    def available(self) -> dict[str, tuple[str, Checkpoint]]:
        """
        id ("tag/stage") -> (stage, newest checkpoint), the last stages first; for the default, the
        checkpoint that was loaded at the start.
        """
        newest = {}
        for stage in reversed(STAGES):
            for run in sorted(stage_directory(stage).glob("*")):
                checkpoints = list_checkpoints(run)
                if not checkpoints or was_set_aside(run):
                    continue
                checkpoint = checkpoints[-1]
                try:
                    tokenizer = read_json(checkpoint.tokenizer_folder() / "meta.json")
                    if tokenizer["fingerprint"] == checkpoint.meta["tokenizer"]:
                        newest[f"{run.name}/{stage}"] = stage, checkpoint
                except (UserError, OSError, ValueError, LookupError, TypeError):
                    continue  # a damaged checkpoint or tokenizer is not offered
        first = {id: entry for id, entry in self._first.items() if entry[1].path.is_dir()}
        return newest | first

    def describe(self) -> list[Fields]:
        """The entries of GET /v1/models, the default model first."""
        entries = []
        for id, (stage, checkpoint) in self.available().items():
            with suppress(OSError):  # a run that saves has deleted it
                entries.append(
                    {
                        "id": id,
                        "object": "model",
                        "created": int(checkpoint.path.stat().st_mtime),
                        "owned_by": "nanochat",
                        "nanochat": {
                            "stage": stage,
                            "step": checkpoint.step,
                            "context": checkpoint.meta["config"]["sequence_len"],
                            "loaded": id in self._loaded,
                        },
                    }
                )
        return sorted(entries, key=lambda entry: entry["id"] != self.default)

    def load(self, stage: str = "auto", tag: str = "", step: int | None = None) -> Served:
        """Load a model; the first one becomes the default. Raises UserError if there is none."""
        loaded = load_for_inference(stage, tag, step, **self.options)
        engine = Engine.of(loaded)
        worker = Worker(engine, self.max_rows, self.kv_bytes)
        id = f"{loaded.checkpoint.tag}/{loaded.stage}"
        fingerprint = loaded.checkpoint.fingerprint
        served = Served(id, loaded.stage, loaded.tokenizer, engine, worker, fingerprint)
        worker.start()
        self._loaded[id] = served
        if not self.default:
            self.default, self._first = id, {id: (loaded.stage, loaded.checkpoint)}
        return served

    def get(self, id: str) -> Served:
        """
        The model of this id ("" for the default), loaded if necessary. Raises ApiError: 404 for an
        unknown id, 503 if it cannot be loaded. May take seconds: call it in a thread.
        """
        with self._lock:
            return self.loaded(id) or self._load_another(id)

    def loaded(self, id: str) -> Served | None:
        """The model of this id ("" for the default) if it is in memory. Returns at once."""
        served = self._loaded.get(id or self.default)
        if served is not None:
            served.used = time.monotonic()
        return served

    def _load_another(self, id: str) -> Served:
        id = id or self.default
        known = self.available()
        if id not in known:
            raise ApiError(
                404,
                f"there is no model {id!r}; this server has {', '.join(known)}",
                "model",
                "model_not_found",
            )
        self._make_room()
        stage, checkpoint = known[id]
        try:
            step = checkpoint.step if id in self._first else None
            return self.load(stage, checkpoint.tag, step)
        except UserError as error:
            why = str(error)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            why = f"there is not enough memory for {id}: choose another model"
        release_memory()  # only now is the traceback gone that kept tensors alive
        raise ApiError(503, why, "model")

    def _make_room(self) -> None:
        """
        Unload the idle model that was used least recently if there are too many. Raises ApiError
        503 if all are busy.
        """
        if len(self._loaded) < MOST_LOADED:
            return
        for served in sorted(self._loaded.values(), key=lambda served: served.used):
            if served.worker.close_if_idle():
                del self._loaded[served.id]
                return
        raise ApiError(
            503,
            "all loaded models are busy: try again later",
            "model",
            headers={"Retry-After": "5"},
        )

    def workers(self) -> list[Worker]:
        # A list, at once: other threads load models meanwhile
        return [served.worker for served in list(self._loaded.values())]

    def close(self, grace_seconds: float = 2.0) -> None:
        """Let running requests finish for `grace_seconds`, then end every worker."""
        workers = self.workers()
        for worker in workers:
            worker.close(grace_seconds)
        for worker in workers:
            worker.join(grace_seconds + 1)
