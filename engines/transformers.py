"""Llama 4 of Hugging Face transformers on these kernels: one line in, one line out.

    from llama4_triton.engines.transformers import patch, unpatch

    report = patch(model)          # a loaded model; print(report) says what was replaced
    model.generate(...)
    unpatch(model)                 # the very same objects as before

    with patch(model): ...         # the same for a block
    patch(None)                    # every Llama 4 that is made or loaded from here on

Replaced are the classes of modules (transformers_layers.py) and the attention function and its mask
(transformers_attention.py). Parameters, names and what is saved stay as they are. Llama 4 in
transformers computes every expert for every token; here a token meets its top_k experts only.

Numerics: of transformers, with the roundings of the operators: RMSNorm's two; the routing weight
rounded to the type of x, but applied to the fp32 accumulator of the experts' first product.
Temperature and RoPE stay transformers' own, with its positions.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from llama4_triton.kernels._check import require
from llama4_triton.kernels.expert_weights import QUANTIZERS, Experts, quantize_experts

from . import transformers_attention as _attention
from .transformers_attention import NAME, fallbacks
from .transformers_layers import replacements, why_left

__all__ = ["TESTED", "Report", "patch", "unpatch"]

TESTED = ("5.16.1", "5.19.0", "5.23.0")
SWITCHES = {"Llama4TextMoe": "moe", "Llama4TextMLP": "moe", "Llama4TextRMSNorm": "norm"}
KERNELS = {
    "Llama4TextMoe": "moe, with its shared expert",
    "Llama4TextMLP": "swiglu",
    "Llama4TextRMSNorm": "rms_norm",
}
EXPERTS = "_llama4_triton_experts", "_llama4_triton_shared"  # kernels/layers.py
TEXT_MODEL = "Llama4TextModel"


@dataclass(eq=False)
class Report:
    """What `patch` did to a model, and what transformers' own code has answered since.

    Args:
        version: of transformers.
        replaced: (module, what computes it now).
        left: (module, why it stays as it was).
    """

    version: str
    options: dict[str, Any]
    replaced: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list)
    _before: Counter[str] = field(default_factory=lambda: Counter(fallbacks))

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reason -> calls of any patched model that transformers' own code answered since."""
        return dict(fallbacks - self._before)

    def unpatch(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()

    def _later(self, owner: Any, action: Callable[[Any], object]) -> None:
        """Have `unpatch` call action(owner), unless owner, which is not kept alive, is gone."""
        alive = weakref.ref(owner)

        def undo() -> None:
            found = alive()
            if found is not None:
                action(found)

        self._undo.append(undo)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unpatch()

    def __str__(self) -> str:
        tested = "" if self.version in TESTED else f" (tested: {', '.join(TESTED)})"
        lines = [f"transformers {self.version}{tested}"]
        for what, count in Counter(what for _, what in self.replaced).items():
            lines.append(f"  replaced  {count:4d} x {what}")
        lines += [f"  left      {name}: {why}" for name, why in self.left]
        lines += [f"  own code  {count:4d} x {why}" for why, count in self.fallbacks.items()]
        return "\n".join(lines)


# Llama4TextModel -> its report. What an image-and-text model is patched by is its text model.
_patched: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()
_loading: Report | None = None  # patch(None)


def patch(
    model: nn.Module | None,
    *,
    moe: bool = True,
    attention: bool = True,
    norm: bool = True,
    quantize: str | None = None,
) -> Report:
    """Compute the Llama 4 text layers of `model`, or of all loaded from here on, with the kernels.

    Args:
        model: holds transformers' Llama 4 (text or image and text); None: every one that is made
            from here on, by `from_pretrained` or otherwise.
        moe: MoE layers, and the dense MLPs between them.
        attention: attention and its masks, whatever attn_implementation was.
        norm: RMSNorm.
        quantize: "e4m3_channel", "e4m3_block" or "int4_group": a second copy of the experts, and of
            shared ones, in that format (expert_weights.py). The model's own stay for `unpatch`.
    Returns:
        A report, also a context manager that ends with `unpatch`. The same one if the model is
        patched like this already; one that is patched otherwise is unpatched first.
    Raises:
        ImportError: there is no transformers.
        ValueError: no Llama 4 layers in `model`, an unknown format, or quantize without a model.
        TypeError: quantize for a model in fp32.
    """
    op = "patch"
    hf = _transformers()
    must = f"quantize must be None or one of {', '.join(QUANTIZERS)}"
    require(quantize is None or quantize in QUANTIZERS, op, must, repr(quantize))
    must = "quantize must be None where there is no model yet"
    require(model is not None or quantize is None, op, must, repr(quantize))
    options = dict(moe=moe, attention=attention, norm=norm, quantize=quantize)
    texts = [] if model is None else _text_models(model)
    known = _loading if model is None else _patched.get(texts[0])
    if known is not None and known.options == options:
        return known
    if known is not None:
        known.unpatch()
    report = Report(version=hf.__version__, options=options)
    if model is None:
        _patch_loading(report)
    else:
        try:
            _patch_model(model, texts, report)
        except BaseException:
            report.unpatch()
            raise
    return report


def unpatch(model: nn.Module | None = None) -> None:
    """Undo `patch(model)`; None: `patch(None)`, and every patched model there is."""
    reports = [_loading, *_patched.values()]
    if model is not None:
        reports = [_patched.get(text) for text in _text_models(model)]
    for report in reports:
        if report is not None:
            report.unpatch()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("llama4_triton.engines: run `pip install transformers` first") from None
    return transformers


def _text_models(model: nn.Module) -> list[Any]:
    is_module = isinstance(model, nn.Module)
    texts = [m for m in model.modules() if type(m).__name__ == TEXT_MODEL] if is_module else []
    must = f"model must hold a {TEXT_MODEL} of transformers"
    require(bool(texts), "patch", must, type(model).__name__)
    return texts


def _patch_model(model: nn.Module, texts: list[Any], report: Report) -> None:
    options, ours = report.options, replacements()
    for text in texts:
        _patched[text] = report
        report._later(text, lambda text: _patched.pop(text, None))
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        original = type(module)
        switch = SWITCHES.get(original.__name__) if original in ours else None
        if switch is None or not options[switch] or name in inside:
            continue
        why = why_left(module)
        if why is not None:
            report.left.append((name, why))
            continue
        if options["quantize"] and original.__name__ == "Llama4TextMoe":
            _quantize(module, options["quantize"], report)
        inside = (*inside, f"{name}.shared_expert")  # which a MoE layer computes with the others
        _swap(module, ours[original], report)
        report.replaced.append((name, f"{original.__name__} by {KERNELS[original.__name__]}"))
    if options["attention"]:
        _patch_attention(model, texts, report)


def _swap(module: Any, to: type[nn.Module], report: Report) -> None:
    report._later(module, functools.partial(_become, type(module)))
    _become(to, module)


def _become(to: type[nn.Module], module: Any) -> None:
    module.__class__ = to


def _quantize(module: Any, format: str, report: Report) -> None:
    experts, mlp = module.experts, module.shared_expert
    dtype = experts.gate_up_proj.dtype
    must = "quantize must be None for a model that is not in float16 or bfloat16"
    require(dtype in (torch.float16, torch.bfloat16), "patch", must, dtype, TypeError)
    dense = (getattr(mlp, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))
    plain = (
        Experts.from_hf(experts.gate_up_proj.detach(), experts.down_proj.detach()),
        Experts.dense(*dense),
    )
    for name, each in zip(EXPERTS, plain, strict=True):
        setattr(module, name, quantize_experts(each, format))
    report._later(module, _forget_experts)


def _forget_experts(module: Any) -> None:
    for name in EXPERTS:
        delattr(module, name)


def _patch_attention(model: nn.Module, texts: list[Any], report: Report) -> None:
    _register()
    for config in {id(text.config): text.config for text in texts}.values():
        report._later(config, functools.partial(_attend_by, config._attn_implementation))
        _attend_by(NAME, config)
    for name, module in model.named_modules():
        if type(module).__name__ == "Llama4TextAttention":
            report.replaced.append((name, "attention by attention_prefill, attention_decode"))


def _attend_by(name: str, config: Any) -> None:
    config._attn_implementation = name


def _register() -> None:
    """The attention function and its mask, together: without the mask, None would come.

    The name stays registered, for models that are loaded by `attn_implementation=NAME`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention.attention)
    AttentionMaskInterface.register(NAME, _attention.row_mask)


def _patch_loading(report: Report) -> None:
    """Have text models patch themselves when they are made, before their weights are loaded.

    By their constructor rather than transformers' `register_patch_mapping`, which leaves out models
    that are constructed directly, and before 5.23 imports every module of transformers, and with
    them torchvision, at each load.
    """
    global _loading
    from transformers.models.llama4 import modeling_llama4

    text_model: Any = modeling_llama4.Llama4TextModel
    original = text_model.__init__

    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        report._later(patch(self, **report.options), Report.unpatch)

    def stop() -> None:
        global _loading
        text_model.__init__ = original
        _loading = None

    text_model.__init__ = made
    report.replaced.append((TEXT_MODEL, f"{TEXT_MODEL} as it is made"))
    report._undo.append(stop)
    _loading = report
