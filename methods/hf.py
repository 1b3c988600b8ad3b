"""Any tuner of the `peft` package by its own config. Mangrulkar et al., https://github.com/huggingface/peft"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.architectures import role
from methods.base import Adapted, Batch, Method, Unsupported, register


class PeftLayer(Adapted):
    """A layer of `peft` around the frozen linear layer `base`; its weight is read off `peft`'s own merge."""

    base: nn.Linear

    def __init__(self, layer: Any):
        super().__init__(layer.get_base_layer())
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    @torch.no_grad()
    def merged(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias after the merge, which is then undone to the bit; (None, bias) where `peft` cannot merge."""
        base, layer, bias = self.base, self.layer, self.base.bias
        kept = base.weight.data.clone(), None if bias is None else bias.data.clone()
        try:
            layer.merge()
            return base.weight.data.clone(), None if base.bias is None else base.bias.data.clone()
        except NotImplementedError:
            return None, bias
        finally:
            layer.merged_adapters.clear()
            base.weight.data, base.bias = kept[0], bias
            if bias is not None:
                bias.data = kept[1]

    def weight(self) -> Tensor | None:
        return self.merged()[0]

    def bias(self) -> Tensor | None:
        return self.merged()[1]


@register
@dataclass
class HF(Method):
    """`type` is a tuner's name in `peft` (`LORA`, `VERA`, `OFT`, ...), `config` the fields of its config class.

    Target modules that the config leaves open are those of `targets`, a role or regular expression as in `lora`, not
    the library's guess, so that tuners are compared on the same layers. The loss is the model's own.
    """

    lr: ClassVar[float] = 1e-4  # of the library's own comparison of its tuners; give train.lr for a fair one
    family: ClassVar[str] = "library"
    neutral: ClassVar[bool] = False  # some tuners start elsewhere by default

    type: str = "LORA"
    config: dict[str, Any] = field(default_factory=dict)
    targets: str = "query_value"

    def apply(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        peft = _peft()
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = self.build(peft, model)
        head = [p for p in model.parameters() if p.requires_grad]
        model = peft.inject_adapter_in_model(config, model)
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        for p in head:
            p.requires_grad_()
        for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
            if isinstance(module.get_base_layer(), nn.Linear):
                model.set_submodule(name, PeftLayer(module))
        return model

    def build(self, peft: Any, model: nn.Module) -> Any:
        """The config object. Raises ValueError for an unknown type or field, `Unsupported` for a tuner out of reach."""
        classes = {kind.name: cls for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.type not in classes:
            raise ValueError(f"method.type={self.type!r}: peft {peft.__version__} has {', '.join(sorted(classes))}")
        cls = classes[self.type]
        known = {f.name for f in fields(cls)}
        if unknown := set(self.config) - known:
            raise ValueError(
                f"method.config.{min(unknown)} does not exist; {cls.__name__} has {', '.join(sorted(known))}"
            )
        defaults: dict[str, Any] = {}
        if "target_modules" in known:
            defaults["target_modules"] = self.names(model, self.targets)
        if "feedforward_modules" in known:
            defaults["feedforward_modules"] = self.names(model, "mlp_output")
            defaults["target_modules"] = self.names(model, "key_value") + defaults["feedforward_modules"]
        config = cls(**(defaults | self.config))
        tuners = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        if config.is_prompt_learning or config.is_adaption_prompt or self.type in ("ADALORA", "XLORA"):
            raise Unsupported(f"{self.type} acts through peft's own wrapper of the model, not through layers inside it")
        if config.peft_type not in tuners or getattr(tuners[config.peft_type], "uses_shared_state", False):
            raise Unsupported(f"{self.type} keeps state outside the layers, which `peft` cannot put into a plain model")
        return config

    def names(self, model: nn.Module, targets: str) -> list[str]:
        pattern = re.compile(role(model, targets))
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and pattern.search(n)]
        return [n for n, m in linears if not m.weight.requires_grad]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("method=hf needs the peft package: pip install paretune[hf]") from error
    return peft
