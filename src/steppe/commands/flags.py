"""The command line's flags for the settings that errors of the library name."""

from __future__ import annotations

from steppe.errors import SteppeError

FLAGS: dict[str, dict[str, str]] = {
    "demo": {"out": "--out"},
    "train": {
        "processor": "--tokenizer",
        "max_length": "--length",
        **{
            name: f"--{name}"
            for name in (
                "accelerate",
                "checkpoint",
                "data_dir",
                "gradient_accumulation_steps",
                "gradient_checkpointing",
                "held_out_split",
                "learning_rate",
                "length",
                "lora_targets",
                "max_steps",
                "model_config",
                "output_dir",
                "per_device_train_batch_size",
                "rand_augment",
                "push_to_hub",
                "resume",
                "streaming",
                "text_column",
                "tokenizer",
                "vocab_size",
                "xavier",
            )
        },
    },
    "measure": {
        "data": "--data",
        "json_file": "--json",
        "label_column": "--label-column",
        "labels": "--labels",
        "max_length": "--max-length",
        "processor": "--processor",
        "split": "--split",
        "target_column": "--target-column",
        "text_column": "--text-column",
    },
    "report": {"out": "--out"},
    "bench": {"json_file": "--json", "plot": "--plot"},
    "blocks": {},
    "calibrate": {},
    "study": {"data": "--data", "out": "--out"},
}
"""By command, the flag for each setting. One that is not here cannot be given to the command."""


def in_flags(error: SteppeError, command: str) -> str:
    """The message of an error, with the flags of a command in place of settings.

    Args:
        error: of the library.
        command: one of `FLAGS`.

    Example:
        >>> in_flags(SteppeError("no tokenizer. Name one", {"processor": "FOLDER"}), "train")
        'no tokenizer. Name one: --tokenizer FOLDER'
        >>> in_flags(SteppeError("no tokenizer. Name one", {"processor": "FOLDER"}), "demo")
        'no tokenizer. Name one'
    """
    flags = FLAGS[command]

    def written(name: str, value: object) -> str | None:
        if name not in flags:
            return None
        given = str(value).lower() if isinstance(value, bool) else str(value)
        return f"{flags[name]} {given}"

    return error.with_settings(written)
