"""Stand-ins for the few things of vLLM that cpumoe's plugin touches."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cpumoe.integrations import vllm as plugin
from cpumoe.integrations.vllm import settings

VERSION = "0.32.0"


class MoEActivation(Enum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SITU = "situ"


class RoutedExperts(torch.nn.Module):
    """As vLLM's: asks a configuration for a method, makes tensors, and loads slices into them."""

    def __init__(
        self,
        config,
        *,
        experts=4,
        hidden=160,
        intermediate=96,
        activation=MoEActivation.SILU,
        has_bias=False,
        ranks=1,
        rank=0,
        experts_of_rank=None,
        dtype=torch.bfloat16,
        limit=None,
        lora=False,
        eplb=False,
        weighted_input=False,
    ):
        super().__init__()
        self.layer_name = "model.layers.0.mlp.experts"
        self.apply_router_weight_on_input = weighted_input
        self.ckpt_gate_proj_name = "gate_proj"
        self.ckpt_up_proj_name = "up_proj"
        self.ckpt_down_proj_name = "down_proj"
        self.local = list(experts_of_rank or range(experts))
        self.expert_map = None
        if experts_of_rank is not None:
            self.expert_map = torch.full((experts,), -1, dtype=torch.int32)
            self.expert_map[self.local] = torch.arange(len(self.local), dtype=torch.int32)
        self.rank = rank
        self.moe_config = SimpleNamespace(
            in_dtype=dtype,
            activation=activation,
            swiglu_limit=limit,
            swiglu_alpha=None,
            swiglu_beta=None,
            hidden_dim=hidden,
            intermediate_size_per_partition=intermediate // ranks,
            has_bias=has_bias,
            is_lora_enabled=lora,
            moe_parallel_config=SimpleNamespace(tp_size=ranks, enable_eplb=eplb),
        )
        self.quant_method = (
            UnquantizedFusedMoEMethod(self.moe_config)
            if config is None
            else config.get_quant_method(self, f"{self.layer_name}.routed_experts")
        )
        sizes = self.quant_method.maybe_roundup_sizes(
            hidden, intermediate // ranks, dtype, self.moe_config.moe_parallel_config
        )
        self.quant_method.create_weights(
            self,
            num_experts=len(self.local),
            hidden_size=sizes[0],
            intermediate_size_per_partition=sizes[1],
            params_dtype=dtype,
            weight_loader=self.weight_loader,
            global_num_experts=experts,
        )

    def _map_global_expert_id_to_local_expert_id(self, expert_id):
        return self.local.index(expert_id) if expert_id in self.local else -1

    def weight_loader(
        self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False
    ):
        if expert_id is None:
            param.data[tuple(map(slice, loaded_weight.shape))].copy_(loaded_weight)
            return True if return_success else None
        expert = self._map_global_expert_id_to_local_expert_id(expert_id)
        if expert < 0:
            return False if return_success else None
        target = param.data[expert]
        if target.dim() == 0 or "shape" in weight_name:
            param.data[expert] = loaded_weight.reshape(target.shape)
            return True if return_success else None
        if target.shape == (2,) and loaded_weight.numel() == 1:
            target[0 if shard_id == "w1" else 1] = loaded_weight.reshape(())
            return True if return_success else None
        if shard_id != "w2":
            half = target.shape[0] // 2
            target = target.narrow(0, 0 if shard_id == "w1" else half, half)
        axis = 1 if shard_id == "w2" else 0
        ranks = self.moe_config.moe_parallel_config.tp_size
        shares_rows = loaded_weight.dim() > 1 and loaded_weight.shape[axis] == 1
        if ranks > 1 and loaded_weight.dim() > axis and not shares_rows:
            size = loaded_weight.shape[axis] // ranks
            loaded_weight = loaded_weight.narrow(axis, size * self.rank, size)
        target[tuple(map(slice, loaded_weight.shape))].copy_(loaded_weight)
        return True if return_success else None

    def forward_modular(self, x, topk_weights, topk_ids):
        return self.quant_method.apply(self, x, topk_weights, topk_ids, None, None)

    def forward(self, x, topk_ids, topk_weights):
        return self.forward_modular(x, topk_weights, topk_ids)


def factory(*, num_experts, hidden_size, intermediate_size, quant_config, swiglu_limit, **_):
    """As vLLM's function that makes a layer, whose experts are one of the layer's parts."""
    experts = RoutedExperts(
        quant_config,
        experts=num_experts,
        hidden=hidden_size,
        intermediate=intermediate_size,
        limit=swiglu_limit,
    )
    return SimpleNamespace(routed_experts=experts)


def load_general_plugins():
    """As vLLM's function, for cpumoe's plugin alone."""
    names = os.environ.get("VLLM_PLUGINS")
    if names is None or "cpumoe" in names.split(","):
        plugin.register()


class CustomOp(torch.nn.Module):
    """As vLLM's, which makes objects of a class that a plugin registers in place of another."""

    def __new__(cls, *_, **__):
        return super().__new__(replaced.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, name):
        return lambda made: replaced.update({name: made})


replaced = {}
# Modules of the plugin that import vLLM.
_IMPORTING = ("configs", "decision", "host_layer", "method", "unquantized")


class FusedMoEMethodBase:
    def __init__(self, moe):
        super().__init__()
        self.moe = moe
        self.moe_kernel = None

    def maybe_roundup_sizes(
        self, hidden_size, intermediate_size_per_partition, act_dtype, moe_parallel_config
    ):
        return hidden_size, intermediate_size_per_partition


class UnquantizedFusedMoEMethod(FusedMoEMethodBase, CustomOp):
    is_monolithic = True  # as vLLM's fastest

    def create_weights(self, layer, *sizes, **more):
        layer.created_by_host = True


class HostConfig:
    """As vLLM's configurations, which answer for all layers."""

    ignored_layers = ()
    packed_modules_mapping = {}  # noqa: RUF012
    ignored_layers_match_mode = ""
    store_dtype = None
    is_checkpoint_fp8_serialized = True
    weight_block_size = [128, 128]  # noqa: RUF012
    expert_dtype = "fp4"
    moe_quant_algo = ""
    is_checkpoint_nvfp4_serialized = True
    group_size = 16
    scheme = None

    def get_quant_method(self, layer, prefix):
        return "the host's"

    def is_layer_excluded(self, prefix):
        return prefix in self.ignored_layers

    def _add_fused_moe_to_target_scheme_map(self):
        pass

    def get_scheme_dict(self, layer, name):
        return self.scheme


class Log:
    def __init__(self):
        self.lines = []

    def info(self, text, *arguments):
        self.lines.append(text % arguments)

    info_once = info


def install(monkeypatch, *, version=VERSION, is_cpu=True, checkpoint_dtype="bfloat16"):
    """Puts modules of vLLM's names where imports find them, and returns what tests look at."""
    vllm = SimpleNamespace(log=Log(), registered={}, context={}, additional={})
    config = SimpleNamespace(
        additional_config=vllm.additional,
        model_config=SimpleNamespace(hf_config=SimpleNamespace(dtype=checkpoint_dtype)),
        compilation_config=SimpleNamespace(static_forward_context=vllm.context),
    )
    layers = "vllm.model_executor.layers"

    def get_quantization_config(name):
        return vllm.registered.get(name) or type(f"Host_{name}", (HostConfig,), {})

    _forget()
    replaced.clear()
    plugins = os.environ.get("VLLM_PLUGINS")
    contents = {
        "vllm": {"__version__": version},
        "vllm.envs": {"VLLM_PLUGINS": None if plugins is None else plugins.split(",")},
        "vllm.plugins": {"load_general_plugins": load_general_plugins},
        "vllm.distributed": {
            "init_distributed_environment": lambda *_: None,
            "initialize_model_parallel": lambda **_: None,
        },
        "vllm.logger": {"init_logger": lambda name: vllm.log},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: is_cpu)},
        "vllm.config": {
            "VllmConfig": lambda: config,
            "get_current_vllm_config": lambda: config,
            "set_current_vllm_config": nullcontext,
        },
        "vllm.forward_context": {
            "get_forward_context": lambda: SimpleNamespace(no_compile_layers=vllm.context),
            "set_forward_context": lambda *_: nullcontext(),
        },
        "vllm.model_executor": {},
        "vllm.model_executor.custom_op": {"CustomOp": CustomOp, "op_registry_oot": replaced},
        layers: {},
        f"{layers}.fused_moe": {"RoutedExperts": RoutedExperts},
        f"{layers}.fused_moe.layer": {"FusedMoEFactory": factory},
        f"{layers}.fused_moe.config": {"FUSED_MOE_UNQUANTIZED_CONFIG": "unquantized"},
        f"{layers}.fused_moe.fused_moe_method_base": {"FusedMoEMethodBase": FusedMoEMethodBase},
        f"{layers}.fused_moe.unquantized_fused_moe_method": {
            "UnquantizedFusedMoEMethod": UnquantizedFusedMoEMethod
        },
        f"{layers}.quantization": {
            "get_quantization_config": get_quantization_config,
            "register_quantization_config": lambda name: (
                lambda made: vllm.registered.update({name: made})
            ),
        },
        f"{layers}.quantization.utils": {},
        f"{layers}.quantization.utils.quant_utils": {
            "is_layer_skipped": lambda prefix, ignored_layers, **_: prefix in ignored_layers
        },
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]
    return vllm


@contextmanager
def with_plugin(**options):
    """A process of `install` in which the plugin is registered."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in (plugin.SWITCH, *settings._BINDINGS):
            patch.delenv(variable, raising=False)
        vllm = install(patch, **options)
        plugin.register()
        yield vllm
    _forget()


def _forget():
    """Forgets what was imported, which has classes of the stand-ins of that time."""
    for name in _IMPORTING:
        if module := sys.modules.pop(f"{plugin.__name__}.{name}", None):
            delattr(plugin, name)
            if library := vars(module).get("_LIBRARY"):  # its operator can be defined once
                library._destroy()
