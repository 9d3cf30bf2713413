"""Run every verb of steppe once and print what came of it: ``python smoke.py``, in any environment.

It needs torch and steppe; with transformers and accelerate the verbs that need those run too. Each
check compares with something that is known, so a verb that only returns is not enough. The last
line of the output is JSON: ``{"verb": "ok" | "ok with …" | "left out: …" | the error}``.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="steppe-smoke-")  # for the thresholds

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import steppe

D_MODEL, D_HIDDEN = 256, 512  # wide enough to be screened
SETTING = "capture_dynamic_output_shape_ops"
# One of these runs where a block is computed by its own modules.
DENSE_OPS = {"aten::relu", "aten::_transformer_encoder_layer_fwd"}
CHECKS: dict[str, Callable[[], None]] = {}


def check(verb: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Enter a check under the name of its verb."""

    def enter(run: Callable[[], None]) -> Callable[[], None]:
        CHECKS[verb] = run
        return run

    return enter


def needs(*packages: str) -> None:
    """Leave a check out where a package is missing.

    Raises:
        LeftOutError: one is.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOutError(f"left out: no {', '.join(missing)}")


class LeftOutError(Exception):
    """A package that a check needs is not there."""


class NeedsSettingError(Exception):
    """All is in order once torch._dynamo.config has `SETTING`."""


class CalledOps(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(str(func.name()))
        return func(*args, **(kwargs or {}))


def encoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two blocks with ReLU, in training mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        D_MODEL, 4, D_HIDDEN, dropout=0.0, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(dtype)


def tokens(number: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[2, number, D_MODEL]``."""
    return torch.randn(2, number, D_MODEL, generator=torch.Generator().manual_seed(1)).to(dtype)


def gpt2() -> nn.Module:
    """A tiny GPT-2 with ReLU."""
    from transformers import GPT2Config, GPT2LMHeadModel  # not in every environment

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    special = {"bos_token_id": 1, "eos_token_id": 2, "activation_function": "relu"}
    return GPT2LMHeadModel(GPT2Config(**sizes, **special))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare, with a tolerance relative to the largest value.

    Raises:
        AssertionError: they differ, or nothing was to be compared.
    """
    largest = expected.double().abs().max().item()
    assert largest > 0, "nothing to compare"
    difference = (got.double() - expected.double()).abs().max().item() / largest
    assert difference <= tolerance, f"differs by {difference:.1e}"


def as_exact_as_dense(got: Tensor, dense: Tensor, exact: Tensor) -> None:
    """Allow twice the rounding errors of the dense computation.

    Raises:
        AssertionError: there are more, or nothing was to be compared.
    """
    largest = exact.abs().max().item()
    assert largest > 0, "nothing to compare"
    error, allowed = ((one.double() - exact).abs().max().item() / largest for one in (got, dense))
    allowed = 2 * allowed + 4 * torch.finfo(got.dtype).eps
    assert error <= allowed, f"{error:.1e} from the exact value, of {allowed:.1e} allowed"


def accelerated_like_dense(number: int, dtype: torch.dtype, trains: bool) -> None:
    """Compare an accelerated encoder with the dense one: outputs, and gradients if it trains."""
    dense = encoder(dtype).train(trains)
    sparse, exact = copy.deepcopy(dense), copy.deepcopy(dense).double()
    steppe.accelerate_(sparse, max_density=1.0, max_candidates=1.0)
    x = tokens(number, dtype)
    inputs = [x.clone().requires_grad_(trains) for _ in range(2)]
    inputs.append(x.double().requires_grad_(trains))
    with torch.set_grad_enabled(trains):
        with CalledOps() as ops:
            outputs = [sparse(inputs[0])]
        outputs += [dense(inputs[1]), exact(inputs[2])]
    assert not ops.names & DENSE_OPS, "the block's own modules ran"
    as_exact_as_dense(*outputs)
    if not trains:
        return
    for output in outputs:
        output.square().mean().backward()
    as_exact_as_dense(*(x.grad for x in inputs))
    for parameters in zip(*(model.parameters() for model in (sparse, dense, exact)), strict=True):
        as_exact_as_dense(*(parameter.grad for parameter in parameters))


@check("kernels")
def _() -> None:
    found = steppe.kernels()
    assert found.name == "native", found.reason


@check("find_blocks")
def _() -> None:
    widths = [(block.d_model, block.d_hidden) for block in steppe.find_blocks(encoder())]
    assert widths == [(D_MODEL, D_HIDDEN)] * 2, widths


def sparsified(plugin: steppe.Plugin) -> None:
    """Put a plug-in in, train two constrained steps with it, take it out: the state dict's keys."""
    model = encoder()
    keys, before = list(model.state_dict()), model(tokens())
    steppe.sparsify_(model, [plugin])
    steppe.restore_(model)
    close(model(tokens()), before, 0.0)
    steppe.sparsify_(model, [plugin])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    constrained = steppe.constrain_(model, optimizer, total_steps=2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(tokens()).square().mean()
        if isinstance(plugin, steppe.ActivationPenalty):
            penalized = steppe.penalize(loss, model)
            assert penalized > loss, "no penalty"
            loss = penalized
        loss.backward()
        optimizer.step()
    if isinstance(plugin, steppe.RestrictedNorm):
        scales = [layer.norm2.weight.min().item() for layer in model.layers]
        assert min(scales) >= 1.0, scales
    constrained.remove()
    steppe.restore_(model)
    assert list(model.state_dict()) == keys


@check("sparsify_, constrain_, restore_: ZerothBias")
def _() -> None:
    sparsified(steppe.ZerothBias(max_tokens=64))


@check("sparsify_, constrain_, restore_: RestrictedNorm")
def _() -> None:
    sparsified(steppe.RestrictedNorm())


@check("sparsify_, constrain_, restore_: JumpingSquaredReLU")
def _() -> None:
    sparsified(steppe.JumpingSquaredReLU())


@check("sparsify_, constrain_, restore_: RisingThreshold")
def _() -> None:
    sparsified(steppe.RisingThreshold())


@check("sparsify_, constrain_, restore_, penalize: ActivationPenalty")
def _() -> None:
    sparsified(steppe.ActivationPenalty(1e-2))


@check("watch")
def _() -> None:
    model = encoder()
    with steppe.watch(model, gradients=True) as monitor:
        model(tokens()).square().mean().backward()
    for block in monitor.report().blocks:
        assert block.tokens == 128, block.tokens
        assert 0.3 < block.density < 0.7, block.density
        assert abs(block.derivative_density_by_identity / block.derivative_density - 1) < 1e-5


@check("measure")
def _() -> None:
    batches = [(tokens(), tokens())]
    report = steppe.measure(
        encoder(), batches, loss=lambda z, batch: (z - batch[1]).square().mean()
    )
    for block in report.blocks:
        assert abs(block.derivative_density_by_identity / block.derivative_density - 1) < 1e-5


@check("measure(curvature=True)")
def _() -> None:
    needs("hessian_eigenthings")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    batches = [(torch.randn(2, 5, 8), torch.randn(2, 5, 8))]
    report = steppe.measure(
        layer,
        batches,
        loss=lambda z, batch: (z - batch[1]).square().mean(),
        curvature=True,
    )
    (found,) = report.curvature  # the loss is a square in the weight of `down`
    assert found.top_eigenvalue_down > 0
    assert found.top_eigenvalue_down_residual < 0.01 * found.top_eigenvalue_down


@check("accelerate_: a dtype without kernels")
def _() -> None:
    # Of the others the default call measures thresholds first, for a minute or more.
    model, x = encoder(torch.float64).eval(), tokens(dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        close(steppe.accelerate_(model)(x), expected, 1e-12)


@check("accelerate_: inference")
def _() -> None:
    accelerated_like_dense(64, torch.float32, trains=False)


@check("accelerate_: few tokens")
def _() -> None:
    accelerated_like_dense(1, torch.float32, trains=False)


@check("accelerate_: training")
def _() -> None:
    accelerated_like_dense(64, torch.float32, trains=True)


@check("accelerate_: bfloat16")
def _() -> None:
    accelerated_like_dense(64, torch.bfloat16, trains=True)


@check("accelerate_, restore_: the model's own modules again")
def _() -> None:
    model = encoder()
    classes = [type(module) for module in model.modules()]
    steppe.restore_(steppe.accelerate_(model, max_density=1.0))
    assert [type(module) for module in model.modules()] == classes
    with CalledOps() as ops:
        model(tokens())
    assert ops.names & DENSE_OPS, "the block's own modules did not run"


def compiled() -> None:
    """Compile an accelerated layer without a graph break, and train a step."""
    layer = encoder().layers[0]
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    expected = layer(x)
    expected.square().mean().backward()
    steppe.accelerate_(layer, max_density=1.0, max_candidates=1.0)
    got = torch.compile(layer, fullgraph=True)(y)
    got.square().mean().backward()
    close(got, expected)
    close(y.grad, x.grad, 1e-4)


@check("torch.compile(fullgraph=True), accelerated")
def _() -> None:
    try:
        compiled()
    except torch._dynamo.exc.Unsupported as error:
        # Older versions want to be told that an op may decide on the length of its output.
        if SETTING not in str(error):
            raise
        with torch._dynamo.config.patch({SETTING: True}):
            compiled()
        raise NeedsSettingError from None


@check("torch.compile(fullgraph=True), all plug-ins")
def _() -> None:
    model = encoder()
    steppe.sparsify_(
        model,
        [
            steppe.ZerothBias(max_tokens=64),
            steppe.RestrictedNorm(),
            steppe.JumpingSquaredReLU(),
            steppe.RisingThreshold(),
        ],
    )
    expected = copy.deepcopy(model)(tokens())
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens()), expected)


@check("fold_")
def _() -> None:
    model = encoder()
    steppe.sparsify_(model, [steppe.RisingThreshold()])
    model(tokens())
    steppe.project_(steppe.advance_(model, 0.5))
    with torch.no_grad():
        expected = model.eval()(tokens())
        close(steppe.fold_(model)(tokens()), expected)


@check("load_pretrained")
def _() -> None:
    needs("transformers")
    from transformers import AutoModelForCausalLM  # not in every environment

    model = gpt2()
    steppe.sparsify_(
        model, [steppe.ZerothBias(), steppe.RestrictedNorm(), steppe.JumpingSquaredReLU()]
    )
    with torch.no_grad():
        for added in steppe.added_parameters(model).values():
            added.normal_(std=0.1)
    ids = torch.arange(3, 13)[None]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = steppe.load_pretrained(AutoModelForCausalLM.from_pretrained, folder)
    close(loaded.eval()(ids).logits, model.eval()(ids).logits, 0.0)


@check("SteppeCallback in the Trainer")
def _() -> None:
    needs("transformers", "accelerate")
    from transformers import Trainer, TrainingArguments  # not in every environment

    from steppe.training import SteppeCallback

    model, callback = gpt2(), SteppeCallback(every=1)
    steppe.sparsify_(model, [steppe.RestrictedNorm(), steppe.JumpingSquaredReLU()])
    data = [{"input_ids": row, "labels": row} for row in torch.arange(3, 27).view(4, 6)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    assert [entry["step"] for entry in callback.history] == [1, 2], callback.history
    assert 0.0 < callback.training_density < 1.0


def outcome(run: Callable[[], None]) -> str:
    """``ok``, or what went wrong, with the place in steppe or here."""
    try:
        run()
    except LeftOutError as reason:
        return str(reason)
    except NeedsSettingError:
        return f"ok with {SETTING}"
    except Exception as error:
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        return f"{type(error).__name__}: {text} ({os.path.basename(place.filename)}:{place.lineno})"  # noqa: PTH119
    return "ok"


def main() -> None:
    """Run all checks."""
    warnings.simplefilter("ignore")
    print(json.dumps({verb: outcome(run) for verb, run in CHECKS.items()}))


if __name__ == "__main__":
    main()
