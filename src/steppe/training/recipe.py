"""Recipes: YAML files whose every key is also a flag, read by ``HfArgumentParser``."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from steppe.blocks.pattern_values import pattern_from_text
from steppe.blocks.patterns import BlockPattern
from steppe.errors import PatternError, RecipeError
from steppe.files import expanded
from steppe.training.recipe_plugins import named_plugins
from steppe.training.recipe_values import wrong_values

RECIPES = Path(__file__).parents[1] / "recipes"
"""The folder of the recipes that come with steppe."""
ARMS = ("vanilla", "control", "steppe", "threshold")
NORMS_NOT_DECAYED = ("control", "threshold")
"""The arms in which the norms before the MLPs have no weight decay."""
IMAGES, CAUSAL, SPANS = "image-classification", "causal-lm", "span-corruption"
TASKS = (IMAGES, CAUSAL, SPANS)
_NEAREST = 3
_SHOWN = 300  # characters of a message that is not ours
_MOST_BYTES = 1 << 18  # of a recipe
# In place of the Trainer's own: logs of any kind at all, and no search for parameters that a step
# has not used, which the Trainer switches on for every model.
DEFAULTS = {"report_to": "tensorboard", "ddp_find_unused_parameters": False}
_NO_PATHS_YET = ("checkpoint", "tokenizer")  # these may be hub ids
_PATHS = ("data_dir", "cache_dir", "output_dir", *_NO_PATHS_YET)


@dataclass
class ModelArguments:
    """What is trained."""

    task: str = field(metadata={"help": f"One of {', '.join(TASKS)}."})
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of Transformers: vit, gpt2, t5, …"}
    )
    model_config: str = field(
        default="{}", metadata={"help": "Settings of its config; a mapping, as a flag in JSON."}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "Vanilla model to finetune; a folder or a hub id."}
    )
    patterns: list[str] = field(
        default_factory=list,
        metadata={"help": "Of its MLPs where steppe knows none: mappings, or BlockPattern(...)."},
    )
    lora_rank: int = field(default=0, metadata={"help": "LoRA on the attention; 0 for none."})
    lora_targets: list[str] = field(
        default_factory=list, metadata={"help": "Names of the attention's linear layers."}
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, id:config; used where data_dir is not given."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder: IDX files, one of images a class, text, JSON lines, parquet."},
    )
    held_out_split: str | None = field(
        default=None, metadata={"help": "By default the validation or test split."}
    )
    held_out_samples: int = field(
        default=0, metadata={"help": "Evaluate on the first so many; 0 for all."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read as it is asked for."})
    length: int = field(default=512, metadata={"help": "Tokens per sample."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or hub id; by default one is trained and cached."}
    )
    vocab_size: int = field(default=8192, metadata={"help": "Of the tokenizer that is trained."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text."})
    cache_dir: str = field(
        default="~/.cache/steppe", metadata={"help": "Where trained tokenizers are kept."}
    )
    random_resized_crop: bool = field(default=False, metadata={"help": "As for ImageNet."})
    repeated_augmentation: int = field(
        default=1, metadata={"help": "Times that an image is drawn in a row (Hoffer et al., 2020)."}
    )
    rand_augment: int = field(
        default=0, metadata={"help": "Magnitude of RandAugment's two operations, 0 … 30."}
    )
    crop_padding: int = field(default=0, metadata={"help": "Random crop of the padded image."})
    flip: bool = field(default=False, metadata={"help": "Random horizontal flip."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability."})
    mixup: float = field(default=0.0, metadata={"help": "α of the Beta distribution; 0 for none."})
    cutmix: float = field(default=0.0, metadata={"help": "α of the Beta distribution; 0 for none."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share, of classifiers."})


@dataclass
class ArmArguments:
    """What steppe does."""

    arm: str = field(
        default="steppe",
        metadata={
            "help": "vanilla, control (the MLP norms' scales not decayed), steppe, or threshold"
            " (control with the rising threshold)."
        },
    )
    zeroth_bias: bool | None = field(default=None, metadata={"help": "By default as the arm."})
    restricted_norm: bool | None = field(default=None, metadata={"help": "By default as the arm."})
    jumping_squared_relu: bool | None = field(
        default=None, metadata={"help": "By default as the arm."}
    )
    rising_threshold: bool | None = field(default=None, metadata={"help": "By default as the arm."})
    threshold_multiple: float = field(
        default=2.0, metadata={"help": "The threshold at the end, in standard deviations."}
    )
    threshold_ramp: float = field(
        default=0.5, metadata={"help": "Share of the run over which the threshold rises."}
    )
    activation_penalty: float = field(
        default=0.0, metadata={"help": "Strength of an L1 penalty on the activations; 0 for none."}
    )
    penalty_ramp: float = field(
        default=0.0, metadata={"help": "Share of the run over which the penalty rises."}
    )
    plugins: str = field(
        default="{}",
        metadata={"help": "More plug-ins by key, with settings; a mapping, as a flag in JSON."},
    )
    ramp: float = field(
        default=0.0,
        metadata={"help": "Share of the run over which floor and activation change; finetuning."},
    )
    measure_every: int = field(default=50, metadata={"help": "Measure one step in so many."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last whole checkpoint, if there is one."}
    )


@dataclass(frozen=True)
class Recipe:
    """A recipe as it will be run.

    Attributes:
        name: the file's, without its ending.
        model: what is trained.
        data: what on.
        arm: what steppe does.
        training: the Trainer's arguments.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    arm: ArmArguments
    training: TrainingArguments


def list_recipes() -> dict[str, str]:
    """The recipes that come with steppe: their names and the first lines of their files."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for path in sorted(RECIPES.glob("*.yaml"))
    }


def read_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe with flags in place of some of its values.

    Args:
        recipe: a YAML file, or the name of one that comes with steppe.
        overrides: as on a command line, ``["--learning_rate", "1e-3"]``; any key of the recipe, of
            this module's dataclasses, and of ``TrainingArguments``.

    Returns:
        The recipe; the Trainer's arguments have seen the machine.

    Raises:
        RecipeError: there is no such recipe, it is no YAML mapping, a key is unknown (names the
            nearest), or a value cannot be.
    """
    path, values = read_values(recipe)
    given = {
        flag.removeprefix("--").partition("=")[0].replace("-", "_"): flag
        for flag in overrides
        if flag.startswith("--")
    }
    parser = _Parser(_name_of(path), given)
    known = parser.keys()
    for key, flag in given.items():
        if key not in known:
            raise RecipeError(f"unknown flag {flag}{_nearest(key, known, '--')}")
    for key in values:
        if key not in known:
            raise RecipeError(f"{parser.where}: unknown key {key[:_SHOWN]!r}{_nearest(key, known)}")
    for key, value in DEFAULTS.items():
        if key not in given:
            values.setdefault(key, value)
    if "output_dir" not in given:
        arm = _last_value(overrides, "arm") or values.get("arm", ArmArguments.arm)
        values.setdefault("output_dir", default_folder(path, arm))
    result = Recipe(path.stem, *parser.parse(values, overrides))
    _check(result, parser)
    return result


def read_values(recipe: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe, and its values by key, as they stand there.

    Args:
        recipe: as `read_recipe` takes it.

    Raises:
        RecipeError: there is no such recipe, or it is no YAML mapping.
    """
    path = _find(recipe)
    return path, _read_yaml(path)


def default_folder(path: Path, arm: str) -> str:
    """Where a run of a recipe is written, unless ``output_dir`` says it.

    Args:
        path: of the recipe.
        arm: of the run.
    """
    return f"runs/{path.stem}/{arm}"


def model_settings(model: ModelArguments) -> dict[str, Any]:
    """The settings of the model's config.

    Args:
        model: of a recipe.

    Raises:
        RecipeError: they are no mapping.
    """
    try:
        settings = json.loads(model.model_config)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"model_config: not valid JSON ({_told(error)}), e.g. '{{\"hidden_size\": 64}}'"
        ) from None
    if not isinstance(settings, dict):
        raise RecipeError(f"model_config: expected a mapping, got {model.model_config[:_SHOWN]}")
    return settings


def patterns_of(model: ModelArguments) -> list[BlockPattern]:
    """The patterns of the model's MLPs, none where the built-in ones do.

    Args:
        model: of a recipe.

    Raises:
        RecipeError: one is none.
    """
    try:
        return [pattern_from_text(text) for text in model.patterns]
    except PatternError as error:
        raise RecipeError(f"patterns: {error}") from None


def _find(recipe: str | Path) -> Path:
    """The file of a recipe."""
    path = expanded(recipe)
    if path.is_file():
        return path
    ours = RECIPES / f"{path.stem}.yaml"
    if ours.is_file() and (path.name == path.stem or path.parent.name == "recipes"):
        return ours
    names = ", ".join(list_recipes())
    near = difflib.get_close_matches(path.stem, list_recipes(), n=1)
    raise RecipeError(
        f"{recipe}: there is no such file or recipe; steppe has {names}"
        + (f". Did you mean: steppe train {near[0]}" if near else "")
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """The values of a recipe by key."""
    if path.stat().st_size > _MOST_BYTES:
        raise RecipeError(f"{path}: has more than {_MOST_BYTES >> 10} KiB, and is no recipe")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainYaml)
    except Exception as error:  # of yaml's constructors: a date, a number, a depth
        raise RecipeError(f"{path}: not valid YAML: {_told(error)}") from None
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path}: expected lines `key: value`, got {type(values).__name__}")
    for key, value in values.items():
        if "\0" in str(value):
            raise RecipeError(f"{path}: {key}: expected text, got a zero byte in {value!r}")
    return {str(key): value for key, value in values.items()}


class _PlainYaml(yaml.SafeLoader):
    """Refuses a key that stands twice, and aliases, with which a few lines make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "write it out, without an alias", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                wrong = f"a key is a word, got {str(key)[:_SHOWN]}"
            elif key in seen:
                wrong = f"the key {key!r} stands twice"
            else:
                wrong = ""
            if wrong:
                raise yaml.constructor.ConstructorError(None, None, wrong, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _as_flag(key: str, value: Any) -> list[str]:
    """A value as words of a command line."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}", str(value).lower()]
    if isinstance(value, Mapping):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        words = [json.dumps(one) if isinstance(one, Mapping) else str(one) for one in value]
        return [f"--{key}", *words]
    return [f"--{key}={value}"]


def _last_value(overrides: Sequence[str], key: str) -> str | None:
    """The value that flags give a key."""
    found = None
    for word, following in pairwise([*overrides, ""]):
        if word == f"--{key}":
            found = following
        elif word.startswith(f"--{key}="):
            found = word.partition("=")[2]
    return found


class _Parser(HfArgumentParser):
    """Tells its errors as ours, and takes no abbreviations.

    Args:
        where: the recipe, for errors.
        given: the keys that flags give, of which an error is not the recipe's.
    """

    def __init__(self, where: str, given: Collection[str]) -> None:
        self.where = where
        self._given = given
        kinds: Any = (ModelArguments, DataArguments, ArmArguments, TrainingArguments)
        super().__init__(kinds, allow_abbrev=False, add_help=False)

    def keys(self) -> list[str]:
        """The keys of a recipe."""
        return sorted(
            option.removeprefix("--")
            for action in self._actions
            for option in action.option_strings
            if option.startswith("--") and "-" not in option.removeprefix("--")
        )

    def place_of(self, key: str) -> str:
        """What an error about a key begins with."""
        return "" if key in self._given else f"{self.where}: "

    def parse(self, values: Mapping[str, Any], overrides: Sequence[str]) -> Any:
        """The dataclasses of a recipe's values and of flags in place of them."""
        try:
            flags = [word for key, value in values.items() for word in _as_flag(key, value)]
            *parsed, left = self.parse_args_into_dataclasses(
                [*flags, *overrides], look_for_args_file=False, return_remaining_strings=True
            )
        except RecipeError:
            raise
        except (ValueError, TypeError, ImportError, OSError) as error:  # TrainingArguments' checks
            raise RecipeError(f"{self.where}: {_told(error)}") from None
        except Exception as error:  # it computes with what it is given
            raise RecipeError(f"{self.where}: a value is out of range ({_told(error)})") from None
        if left:
            raise RecipeError(
                f"{' '.join(left)}: expected a flag, which is a key with two dashes, and its value"
            )
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the process."""
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # it names both spellings
        of_flag = re.match(r"argument --(\w+)", message)
        raise RecipeError((self.place_of(of_flag[1] if of_flag else "")) + message[:_SHOWN])


def _name_of(path: Path) -> str:
    """A recipe in errors: the name of one of ours, the path of another."""
    return path.stem if path.parent == RECIPES else str(path)


def _told(error: Exception) -> str:
    """What a library says, in at most some hundred characters."""
    return str(error)[:_SHOWN] or type(error).__name__


def _nearest(key: str, known: Sequence[str], prefix: str = "") -> str:
    """The names most like a wrong one."""
    near = difflib.get_close_matches(key, known, n=_NEAREST)
    listed = ", ".join(prefix + name for name in near)
    return f". Did you mean {listed}?" if near else ". It is no key of a recipe."


def _check(recipe: Recipe, parser: _Parser) -> None:
    """Refuse values that mean nothing, and put homes in place of ``~``."""
    model, data, training = recipe.model, recipe.data, recipe.training
    values = {**vars(model), **vars(data), **vars(recipe.arm), **vars(training)}
    wrong = wrong_values(values)
    for key, names in (("task", TASKS), ("arm", ARMS)):
        if values[key] not in names:
            wrong[key] = f"expected one of {', '.join(names)}, got {values[key]!r}"
    if training.label_smoothing_factor:
        wrong["label_smoothing_factor"] = "it cannot take mixed labels; use label_smoothing"
    for key, what in wrong.items():
        raise RecipeError(f"{parser.place_of(key)}{key}: {what}")
    missing = None
    if (model.model_type is None) == (model.checkpoint is None):
        missing = "expected either model_type (from scratch) or checkpoint (finetuning)"
        way = {"checkpoint": "FOLDER_OR_HUB_ID"}
    elif data.data_dir is None and data.dataset is None:
        missing, way = "no data: expected data_dir or dataset", {"data_dir": "FOLDER"}
    elif data.streaming and training.max_steps < 1:
        missing, way = "a stream has no length: expected max_steps", {"max_steps": "100000"}
    elif model.lora_rank and not model.lora_targets:
        missing, way = "lora_rank: expected lora_targets too", {"lora_targets": "q v"}
    if missing is not None:
        raise RecipeError(f"{parser.where}: {missing}", way)
    model_settings(model)
    patterns_of(model)
    named_plugins(recipe.arm.plugins)
    for key in _PATHS:
        if values[key] == "" and key != "tokenizer":  # which is made of the data then
            raise RecipeError(f"{parser.place_of(key)}{key}: expected a path, got an empty one")
        if str(values[key]).startswith("~"):
            home = str(expanded(values[key]))
            if key in _NO_PATHS_YET:
                setattr(model if key == "checkpoint" else data, key, home)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe, the Trainer's own defaults left out, as JSON values.

    Args:
        recipe: as it is run.
    """
    ours = {**vars(recipe.model), **vars(recipe.data), **vars(recipe.arm)}
    if not recipe.model.patterns:
        del ours["patterns"]  # which runs of before know nothing of
    if recipe.arm.plugins == ArmArguments.plugins:
        del ours["plugins"]
    return {"recipe": recipe.name, **ours}
