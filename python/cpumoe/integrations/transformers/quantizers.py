"""Quantizers that leave a checkpoint's routed experts to cpumoe.

transformers calls a quantizer before it reads weights, while the model is on the meta device, and
afterwards. Each class here is transformers' quantizer for a method with one more step before and
after. Before, experts modules are replaced by modules without parameters, so that their tensors
match nothing and are never read. Afterwards, cpumoe packs them from the mapped files.

The quantizers are registered as ``cpumoe-<method>``, beside those of transformers. `enable` also
puts them in the places of transformers' own. There, a model without routed experts must load as
without cpumoe.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from cpumoe.checkpoint import ExpertReader
from cpumoe.integrations.transformers.attention import AttentionModules, swap_attention
from cpumoe.integrations.transformers.completeness import check_scaled
from cpumoe.integrations.transformers.dense import (
    DenseLayers,
    swap_dense,
    take_stored_dense,
    with_dense_chosen,
)
from cpumoe.integrations.transformers.experts_module import CpuExperts
from cpumoe.integrations.transformers.host_files import open_resolved
from cpumoe.integrations.transformers.norms import NormModules, swap_norms
from cpumoe.integrations.transformers.options import HOST, NATIVE, current_options
from cpumoe.integrations.transformers.routers import use_fp32_routers
from cpumoe.integrations.transformers.stored_dense import StoredLinear, pack_stored
from cpumoe.integrations.transformers.swap import (
    EXPERT_KEYS,
    experts_modules,
    pack_all,
    swap_experts,
)

_PREFIX = "cpumoe-"
# The name of the quantizer for checkpoints that have no quantization_config.
UNQUANTIZED = f"{_PREFIX}unquantized"


class ExpertsToCpumoe(HfQuantizer):
    """The common part of the quantizers, a base class before transformers' class."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        """Takes the arguments of transformers' quantizers."""
        super().__init__(quantization_config, **kwargs)
        self._options = current_options()
        self._asked = self._options.dense is not None
        self._reader: ExpertReader | None = None
        self._swapped: list[CpuExperts] = []
        self._stored: list[StoredLinear] = []
        self._all_on_cpu = True
        self.dense_layers = DenseLayers()
        self.norm_modules = NormModules()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsToCpumoe:
        """Returns itself, because transformers copies weight converters that refer to it."""
        return self

    @override
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint_files: list[str] | None = kwargs.get("checkpoint_files")
        by_name = self._by_name()
        self._all_on_cpu = _all_on_cpu(kwargs.get("device_map"))
        if checkpoint_files and any(experts_modules(model)):
            self._reader = open_resolved(checkpoint_files, model.config)
            if by_name:
                check_scaled(self._reader.folder)
            self._swapped = swap_experts(model, self._reader)
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | {EXPERT_KEYS}
            # Weights of the host become dense, because PyTorch multiplies only those on a CPU.
            self.quantization_config.dequantize = True
        elif by_name:
            # Refused before all weights are read in vain.
            raise ValueError(
                f"{type(model).__name__}: expected an experts module of transformers that cpumoe "
                f"supports, got none"
            )
        super()._process_model_before_weight_loading(model, **kwargs)

    @override
    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Takes dense weights from the host here, because only now its conversions are complete."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        by_default = NATIVE if self._by_name() else HOST
        self._options = with_dense_chosen(model, self._options, by_default=by_default)
        dequantizer = self.get_load_operations().get("dequantize")
        if self._reader is not None and self._all_on_cpu and dequantizer is not None:
            self._stored = take_stored_dense(
                model, self._reader, conversions, dequantizer, self._options
            )
        return conversions

    def _by_name(self) -> bool:
        """Whether cpumoe's `from_pretrained` loads the model, and not transformers' own."""
        return str(self.quantization_config.quant_method).startswith(_PREFIX)

    def swap_dense(self, model: Any) -> None:
        """Gives dense layers and norms of a loaded model to cpumoe, as the options say."""
        self.dense_layers = swap_dense(model, self._options, warns=self._asked)
        if self._options.dense not in (HOST, None):
            self.norm_modules = swap_norms(model, self._options.runtime)

    def swap_attention(self, model: Any) -> None:
        """Gives attention of a loaded model to cpumoe, as the options say."""
        wanted = self._options.attention == NATIVE
        self.attention_modules = (
            swap_attention(model, self._options) if wanted else AttentionModules()
        )

    @override
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        if self._reader is None:
            return
        if self._options.fp32_router:
            use_fp32_routers(model)
        with self._reader:
            pack_all(self._swapped, self._reader, self._options)
            pack_stored(self._stored, self._options)
        if not self._by_name():  # `from_pretrained` makes the model ready first
            self.swap_dense(model)
            self.swap_attention(model)
        # transformers drops the quantizer of a dequantized model. With the quantizer,
        # save_pretrained refuses to write a checkpoint, which would lack the experts.
        model.hf_quantizer = self

    @override
    def is_serializable(self) -> bool:
        """Whether the model can be saved, which it cannot without its experts."""
        return not self._swapped and bool(super().is_serializable())

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained, which cpumoe's experts cannot."""
        return not self._swapped and bool(super().is_trainable)


def _all_on_cpu(device_map: Any) -> bool:
    """Whether transformers will put all weights into the CPU's memory."""
    devices = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
    return all(str(device) == "cpu" for device in devices)


class Fp8Quantizer(ExpertsToCpumoe, FineGrainedFP8HfQuantizer):
    """DeepSeek-V4: cpumoe gets the MXFP4 experts, and other FP8 weights if asked to."""

    @override
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized and not torch.accelerator.is_available():
            # transformers would do so as well, but with a warning.
            self.quantization_config.dequantize = True
        super().validate_environment(*args, **kwargs)


class Mxfp4Quantizer(ExpertsToCpumoe, Mxfp4HfQuantizer):
    """gpt-oss: only the experts are quantized."""

    @override
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self.quantization_config.dequantize = True
        super().validate_environment(*args, **kwargs)

    @override
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not torch.accelerator.is_available():
            # Avoids a warning of transformers about dequantizing experts, which are already gone.
            kwargs["use_kernels"] = True
        super()._process_model_before_weight_loading(model, **kwargs)


class CompressedTensorsQuantizer(ExpertsToCpumoe, CompressedTensorsHfQuantizer):
    """Kimi: cpumoe gets the INT4 experts, and other quantized weights if asked to."""


class UnquantizedConfig(QuantizationConfigMixin):
    """Makes transformers ask for a quantizer where a checkpoint has no quantized weights."""

    def __init__(self, **_: Any) -> None:
        """Ignores all arguments."""
        self.quant_method = UNQUANTIZED
        self.dequantize = True


class UnquantizedQuantizer(ExpertsToCpumoe):
    """Most families: cpumoe gets the bf16 experts, and transformers reads the rest as it is."""


QUANTIZERS: dict[str, type[ExpertsToCpumoe]] = {
    "fp8": Fp8Quantizer,
    "mxfp4": Mxfp4Quantizer,
    "compressed-tensors": CompressedTensorsQuantizer,
}
HOST_QUANTIZERS = {method: AUTO_QUANTIZER_MAPPING[method] for method in QUANTIZERS}


def our_method(method: str) -> str:
    """Returns the name under which cpumoe's quantizer of a method is registered."""
    return _PREFIX + method


def _register(method: str, quantizer: type[ExpertsToCpumoe]) -> None:
    name = our_method(method)
    host_config: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[method]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        host_config.__init__(self, *args, **kwargs)
        self.quant_method = name

    # transformers' quantization config under the name of cpumoe's quantizer.
    config = type(f"Cpumoe{host_config.__name__}", (host_config,), {"__init__": init})
    register_quantization_config(name)(config)
    register_quantizer(name)(quantizer)


for _method, _quantizer in QUANTIZERS.items():
    _register(_method, _quantizer)
register_quantization_config(UNQUANTIZED)(UnquantizedConfig)
register_quantizer(UNQUANTIZED)(UnquantizedQuantizer)
