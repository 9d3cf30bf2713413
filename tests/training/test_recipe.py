from __future__ import annotations

from pathlib import Path

import pytest

from steppe.errors import RecipeError
from steppe.training.recipe import read_recipe
from steppe.training.recipe_arguments import model_settings
from steppe.training.recipe_file import RECIPES, list_recipes

FLAGS = ("--bf16", "false", "--use_cpu", "true", "--data_dir", "there")
PAPERS = {
    *("vit-b16-imagenet1k", "vit-b16-imagenet1k-finetune", "vit-cifar10"),
    *("t5-base-c4", "t5-base-c4-finetune"),
}
NAMES = {
    *(*PAPERS, "fashion-mnist-vit", "text-gpt", "text-t5"),
    *("digits", "pydoc", "pydoc-wide", "english-gpt", "english-t5"),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_recipes_are_these_and_each_says_what_it_is() -> None:
    assert set(list_recipes()) == NAMES
    assert all(len(about) > 20 for about in list_recipes().values())


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_recipe_can_be_read(name: str) -> None:
    more = ("--checkpoint", "there") if "finetune" in name else ()
    recipe = read_recipe(name, [*FLAGS, *more])
    assert recipe.name == name
    arm = "steppe" if name in PAPERS else "best"
    assert recipe.training.output_dir == f"runs/{name}/{arm}"
    assert model_settings(recipe.model).get("hidden_act", "relu") == "relu"


def test_the_papers_numbers() -> None:
    vit = read_recipe("vit-b16-imagenet1k", FLAGS)
    assert (vit.training.learning_rate, vit.training.weight_decay) == (3e-3, 0.3)
    assert (vit.training.num_train_epochs, vit.training.max_grad_norm) == (300, 1.0)
    assert 8 * vit.training.per_device_train_batch_size == 2048
    assert (vit.data.label_smoothing, vit.data.mixup, vit.data.cutmix) == (0.11, 0.2, 1.0)
    t5 = read_recipe("t5-base-c4", FLAGS)
    assert (t5.training.learning_rate, t5.training.weight_decay) == (0.01, 0.001)
    assert (t5.training.max_steps, t5.training.warmup_steps) == (100_000, 10_000)
    assert 8 * t5.training.per_device_train_batch_size == 256
    assert t5.data.length == 512
    assert t5.training.optim == "adamw_torch_fused"
    for name, share, rate, decay in (
        ("vit-b16-imagenet1k", 5 / 15, 3e-3, 0.3),
        ("t5-base-c4", 3 / 10, 0.01, 0.001),
    ):
        tuned = read_recipe(f"{name}-finetune", [*FLAGS, "--checkpoint", "there"])
        assert tuned.arm.ramp == pytest.approx(share, abs=1e-3)
        assert tuned.model.lora_rank == 192
        assert (tuned.training.learning_rate, tuned.training.weight_decay) == (rate, decay)
        assert tuned.training.optim == "adamw_torch_fused"
    assert (tuned.training.max_steps, tuned.training.warmup_steps) == (10_000, 1000)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_flags_for_earlier_settings_in_a_recipes_comments_work(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    more = ("--checkpoint", "there") if "finetune" in name else ()
    usual = read_recipe(name, [*FLAGS, *more])
    for line in text.splitlines():
        _, found, flags = line.partition("Before: ")
        if found:
            words = flags.split()
            earlier = read_recipe(name, [*FLAGS, *more, *words])
            for key in (word.removeprefix("--") for word in words[::2]):
                before, now = (getattr(one.training, key) for one in (earlier, usual))
                assert before != now, key


def test_flags_stand_before_the_file_which_stands_before_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "task: causal-lm\nmodel_type: gpt2\nlearning_rate: 1e-4\nlength: 32\n")
    recipe = read_recipe(path, ["--data_dir", "d", "--length=64", "--use_cpu", "true"])
    assert recipe.training.learning_rate == 1e-4
    assert recipe.data.length == 64
    assert recipe.data.vocab_size == 8192
    assert recipe.training.report_to == ["tensorboard"]
    assert read_recipe(path, ["--data_dir", "d", "--arm", "control"]).training.output_dir == (
        "runs/mine/control"
    )


@pytest.mark.parametrize("flag", [("--checkpoint", "there"), ("--checkpoint=there",)])
def test_a_checkpoint_as_a_flag_takes_the_place_of_the_files_new_model(flag: tuple) -> None:
    new = read_recipe("digits", ["--use_cpu", "true"]).model
    assert (new.model_type, new.xavier, new.checkpoint) == ("ijepa", True, None)
    assert model_settings(new)["hidden_size"] == 48
    model = read_recipe("digits", ["--use_cpu", "true", *flag]).model
    assert (model.model_type, model.xavier, model.checkpoint) == (None, False, "there")
    assert model_settings(model) == {}


def test_a_path_to_a_recipe_of_ours_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe("recipes/text-gpt.yaml", FLAGS).name == "text-gpt"
    assert read_recipe(RECIPES / "text-gpt.yaml", FLAGS).name == "text-gpt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--learnin_rate", "1"), r"unknown flag --learnin_rate\. Did you mean --learning_rate"),
        (("--arm", "vanila"), r"arm: expected one of vanilla, .*, best, got"),
        (("--length", "many"), r"argument --length: invalid int value: 'many'"),
        (("--model_config", "{"), r"model_config: not valid JSON"),
        (("--model_config", "[1]"), r"model_config: expected a mapping"),
        (("--streaming", "true", "--max_steps", "-1"), r"a stream has no length"),
        (("--ramp", "2"), r"ramp: expected a share"),
        (("--threshold_multiple", "-1"), r"threshold_multiple: expected at least 0, got -1\.0"),
        (("--threshold_ramp", "0"), r"threshold_ramp: expected a share .* got 0\.0"),
        (("--activation_penalty", "-1"), r"activation_penalty: expected at least 0"),
        (("--penalty_ramp", "2"), r"penalty_ramp: expected a share"),
        (("--lora_rank", "4"), r"expected lora_targets"),
        (("--time_blocks", "-1"), r"time_blocks: expected at least 0"),
        (("--checkpoint", "x", "--model_type", "gpt2"), r"either model_type .* or checkpoint"),
        (("--checkpoint", "x", "--model_config", '{"n_embd": 8}'), r"a checkpoint has its config"),
        (("--checkpoint", "x", "--xavier", "true"), r"a checkpoint has its weights"),
        (("--label_smoothing_factor", "0.1"), r"use label_smoothing"),
        (("--measure_every", "0"), r"measure_every: expected at least 1"),
        (("--task", "chess"), r"task: expected one of image-classification"),
    ],
)
def test_wrong_flags_say_what_is_right(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe("text-gpt", [*FLAGS, *flags])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: causal-lm\nlerning_rate: 1\n", r"unknown key 'lerning_rate'\. Did you mean learni"),
        ("task: causal-lm\ntask: causal-lm\n", "stands twice"),
        ("task: [\n", "not valid YAML"),
        ("just words\n", "expected lines `key: value`"),
        ("task: causal-lm\nmodel_type: gpt2\n", "no data: expected data_dir"),
        ("model_type: gpt2\n", "required: --task"),
        (
            "task: causal-lm\nmodel_type: gpt2\ncheckpoint: there\ndataset: pydoc\n",
            "either model_type .* or checkpoint",
        ),
    ],
)
def test_wrong_files_say_what_is_right(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, text))


def test_a_recipe_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean: steppe train text-gpt"):
        read_recipe("text-gtp")


def test_a_run_that_would_overwrite_its_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path("runs/digits/vanilla/model")
    model.mkdir(parents=True)
    flags = ("--use_cpu", "true", "--arm", "vanilla", "--checkpoint", str(model))
    with pytest.raises(RecipeError, match=r"output_dir: .*vanilla holds the checkpoint") as raised:
        read_recipe("digits", flags)
    assert raised.value.instead == ({"output_dir": "FOLDER"},)
    assert read_recipe("digits", [*flags, "--output_dir", "runs/tuned"]).model.checkpoint
    assert read_recipe("digits", ["--use_cpu", "true", "--checkpoint", str(model)]).name == "digits"
