"""What reads files: each target makes whole files, and feeds them to a public function.

To add one: a function that makes the files in a folder and names the one to damage, one that reads
the folder as a user would, and a line in `TARGETS`.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import steppe
from data.data_makers import TEXT, words_tokenizer, write_images
from models import gpt2, vit
from steppe.checkpoints.held_out import measure_checkpoints
from steppe.checkpoints.load_by_config import load_checkpoint
from steppe.data.idx import load_idx_folder
from steppe.data.image_data import load_image_data
from steppe.data.rows import open_rows
from steppe.data.sources import Source, open_data
from steppe.measures.measure import measure
from steppe.ops.cpu import remembered
from steppe.report import find_runs, write_report
from steppe.runs import RUN_FILE, Run, write_run
from steppe.training.recipe import read_recipe
from steppe.training.recipe_file import RECIPES
from steppe.training.resuming import MANIFEST, last_whole_checkpoint, seal_checkpoint

BYTES, TREE, FILE, WHOLE = "bytes", "tree", "file", "whole"
"""Kinds of damage: to the bytes, to the values within, to what the file is, or none."""
_ROWS = [
    {"text": f"line {i} of a text", "label": i % 2, "more": [i], "deep": {"a": 0.5}}
    for i in range(20)
]
_SETTINGS: dict[str, object] = {"learning_rate": 0.1, "max_steps": 10}
_IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Target:
    """Something that reads files.

    Attributes:
        make: writes whole files into an empty folder.
        file: the one to damage, within the folder.
        feed: reads the folder, by a public function.
        kinds: of damage that make sense.
        seconds: that reading may take.
    """

    make: Callable[[Path], object]
    file: str
    feed: Callable[[Path], object]
    kinds: tuple[str, ...] = (BYTES, FILE)
    seconds: int = 10


def _lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def _parquet(folder: Path) -> None:
    datasets.Dataset.from_list(_ROWS).to_parquet(folder / "a.parquet")


def _saved(folder: Path) -> None:
    datasets.Dataset.from_list(_ROWS).save_to_disk(folder / "saved")


def _images(folder: Path, ending: str) -> None:
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        path = folder / "images" / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _IMAGE.save(path)


def _idx(folder: Path, packed: bool) -> None:
    for part, number in (("train", 6), ("t10k", 4)):
        images = b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (number, 5, 5))
        labels = b"\0\0\x08\1" + number.to_bytes(4, "big")
        for name, content in (
            ("images-idx3", images + bytes(25 * number)),
            ("labels-idx1", labels + bytes(range(number))),
        ):
            whole = gzip.compress(content) if packed else content
            write(folder, f"idx/{part}-{name}-ubyte{'.gz' * packed}", whole)


def read_data(folder: Path, name: str) -> None:
    """All rows, streamed and prepared, as `steppe measure` and `steppe train` read them."""
    place = str(folder / name)
    for _ in islice(open_rows(Source(place)), 1000):
        pass
    splits = open_data(place, streaming=False).splits
    for split in splits.values():
        split[:1000]


def read_images(folder: Path) -> None:
    data = load_image_data(str(folder / "images"), 8, 3)
    for part in (data.train, data.held_out):
        for index in range(len(part)):  # type: ignore[arg-type]
            part[index]
    for row in open_rows(Source(str(folder / "images"))):
        row["image"].convert("RGB")


def _recipe(folder: Path) -> None:
    write(folder, "r.yaml", (RECIPES / "fashion-mnist-vit.yaml").read_bytes())


def _model(folder: Path, sparse: bool, shard: str = "1GB") -> None:
    model = gpt2()
    if sparse:
        steppe.sparsify_(model, [steppe.ZerothBias(), steppe.JumpingSquaredReLU()])
    model.save_pretrained(folder / "model", max_shard_size=shard)


def _model_of_own_pattern(folder: Path) -> None:
    """A model whose record has a pattern with everything that one can have."""
    own = steppe.BlockPattern(
        family="own",
        norm="ln_2",
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
        dropout="mlp.dropout",
        norm_is_shared=True,
        when=lambda layer: True,
        sequence_first=lambda layer: True,
        act_flags=(("gradient_checkpointing", False),),
    )
    model = gpt2()
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU()], patterns=[own])
    model.save_pretrained(folder / "model")


def _language_model(folder: Path) -> None:
    """A checkpoint of the Trainer's with its tokenizer, and a text."""
    place = folder / "checkpoint-10"
    gpt2().save_pretrained(place)
    words_tokenizer(place)
    state = {"global_step": 10, "log_history": [{"step": 10, "loss": 1.0}]}
    write(place, "trainer_state.json", json.dumps(state).encode())
    write(folder, "a.txt", TEXT.encode() * 9)


def _vision_model(folder: Path) -> None:
    """A checkpoint with its image processor, and images."""
    vit().save_pretrained(folder / "checkpoint-10")
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]
    )
    processor.save_pretrained(folder / "checkpoint-10")
    write_images(folder / "images", ["3", "4"])


def _measure(folder: Path, data: str) -> None:
    source = Source(str(folder / data), max_length=8)
    measure_checkpoints([folder / "checkpoint-10"], source, max_batches=2)


def _run(folder: Path) -> None:
    batch = {"input_ids": torch.arange(16).reshape(2, 8)}
    report = measure(gpt2(), [batch], labels="model")
    run = Run(
        name="a",
        model="GPT2LMHeadModel",
        tokens_per_sample=8.0,
        activations=["ReLU", "ReLU"],
        plugins=[{"plugin": "zeroth_bias", "limit": 0.1}],
        settings={"learning_rate": 0.1, "batch": 8},
        versions={"steppe": "0.1.0"},
        steps=[0, 10],
        training=[report, report],
        held_out_steps=[10],
        held_out=[report],
        logs=[{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0, "eval_loss": 1.5}],
        quality={"accuracy": 0.5, "loss": 1.5},
        speed=[
            dict.fromkeys(("density", "candidates", "dense_ms", "ratio", "bound"), 0.5)
            | {"unscreened_ratio": None, "case": "decode", "dtype": "float32"}
            | {"d": 64, "tokens": 1, "threads": 2}
        ],
    )
    (folder / "run").mkdir()
    write_run(run, folder / "run" / RUN_FILE)


def _checkpoint(folder: Path) -> None:
    _model(folder / "run", sparse=False)
    (folder / "run" / "model").rename(folder / "run" / "checkpoint-10")
    seal_checkpoint(folder / "run" / "checkpoint-10", _SETTINGS)


def _thresholds(folder: Path) -> None:
    steps = {False: {1: 0.3, 64: 0.1}, True: {64: 0.05}}
    remembered.write(folder / "t.json", {64: steps, 256: steps}, steps)


def _data(name: str, pack: Callable[[bytes], bytes] = bytes) -> Target:
    """A file of JSON lines."""
    return Target(
        lambda folder: write(folder, name, pack(_lines(_ROWS))),
        name,
        partial(read_data, name=name),
        (BYTES, FILE) if name.count(".") > 1 else (BYTES, TREE, FILE),
    )


def _pictures(ending: str) -> Target:
    return Target(partial(_images, ending=ending), f"images/cat/a.{ending}", read_images)


def _idx_file(packed: bool) -> Target:
    return Target(
        partial(_idx, packed=packed),
        f"idx/train-images-idx3-ubyte{'.gz' * packed}",
        lambda folder: load_idx_folder(folder / "idx"),
    )


def _model_file(name: str, sparse: bool, shard: str = "1GB", *kinds: str) -> Target:
    return Target(
        partial(_model, sparse=sparse, shard=shard),
        f"model/{name}",
        lambda folder: load_checkpoint(folder / "model"),
        kinds or (BYTES, TREE, FILE),
    )


def _measured(name: str, make: Callable[[Path], object], data: str) -> Target:
    """A file of a checkpoint that `steppe measure` reads."""
    return Target(make, f"checkpoint-10/{name}", partial(_measure, data=data), (BYTES, TREE, FILE))


_INDEX = "model.safetensors.index.json"
_SAVED = partial(read_data, name="saved")
TARGETS: Mapping[str, Target] = {
    "jsonl": _data("a.jsonl"),
    "gz": _data("a.jsonl.gz", gzip.compress),
    "xz": _data("a.jsonl.xz", lzma.compress),
    "bz2": _data("a.jsonl.bz2", bz2.compress),
    "json": Target(
        lambda folder: write(folder, "a.json", json.dumps(_ROWS, indent=1).encode()),
        "a.json",
        partial(read_data, name="a.json"),
        (BYTES, TREE, FILE),
    ),
    "text": Target(
        lambda folder: write(folder, "a.txt", "one\n\ntwo ä€\r\nthree".encode() * 20),
        "a.txt",
        partial(read_data, name="a.txt"),
    ),
    "parquet": Target(_parquet, "a.parquet", partial(read_data, name="a.parquet")),
    "arrow": Target(_saved, "saved/data-00000-of-00001.arrow", _SAVED),
    "saved-info": Target(_saved, "saved/dataset_info.json", _SAVED, (BYTES, TREE, FILE)),
    "saved-state": Target(_saved, "saved/state.json", _SAVED, (BYTES, TREE, FILE)),
    "png": _pictures("png"),
    "jpeg": _pictures("jpeg"),
    "gif": _pictures("gif"),
    "webp": _pictures("webp"),
    "tiff": _pictures("tiff"),
    "bmp": _pictures("bmp"),
    "ppm": _pictures("ppm"),
    "idx": _idx_file(packed=False),
    "idx-gz": _idx_file(packed=True),
    "recipe": Target(
        _recipe, "r.yaml", lambda folder: read_recipe(folder / "r.yaml"), (BYTES, TREE, FILE)
    ),
    "step": _measured("trainer_state.json", _language_model, "a.txt"),
    "tokenizer": _measured("tokenizer.json", _language_model, "a.txt"),
    "tokenizer-config": _measured("tokenizer_config.json", _language_model, "a.txt"),
    "processor": _measured("preprocessor_config.json", _vision_model, "images"),
    "config": _model_file("config.json", False),
    "record": _model_file("config.json", True),
    "record-patterns": Target(
        _model_of_own_pattern,
        "model/config.json",
        lambda folder: load_checkpoint(folder / "model"),
        (TREE,),
    ),
    "weights": _model_file("model.safetensors", True, "1GB", BYTES, FILE),
    "shards": _model_file(_INDEX, True, "10KB"),
    "manifest": Target(
        _checkpoint,
        f"run/checkpoint-10/{MANIFEST}",
        lambda folder: last_whole_checkpoint(folder / "run", _SETTINGS),
        (BYTES, TREE, FILE),
    ),
    "report": Target(
        _run,
        f"run/{RUN_FILE}",
        lambda folder: write_report(find_runs([folder / "run"]), folder / "page.html"),
        (BYTES, TREE, FILE),
    ),
    "thresholds": Target(
        _thresholds,
        "t.json",
        lambda folder: remembered.read(folder / "t.json"),
        (BYTES, TREE, FILE),
    ),
}
