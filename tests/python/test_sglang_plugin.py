"""The plugin for SGLang, with stand-ins for the few things of SGLang that it touches."""

import importlib
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from checkpoint_tools import edit_config
from moe_tools import output_of, refused
from sglang_tools import arguments, checkpoint

import cpumoe
from cpumoe import SwiGLU
from cpumoe.integrations.sglang import kt_kernel, plugin, pythonpath

HOST = "sglang.srt.layers.moe.kt_ep_wrapper"
LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"
ROOT = Path(__file__).parents[2]


@dataclass
class RunnerConfig:
    """As SGLang's MoeRunnerConfig."""

    routed_scaling_factor: float | None = 2.5
    swiglu_limit: float | None = None
    gemm1_alpha: float | None = None
    gemm1_clamp_limit: float | None = None
    inplace: bool = True


@pytest.fixture
def sglang(monkeypatch):
    """Modules of SGLang's names. `hooks` has what was registered."""
    hooks = {}
    registry = ModuleType("sglang.srt.plugins.hook_registry")
    registry.HookType = SimpleNamespace(AROUND="around")
    registry.HookRegistry = SimpleNamespace(
        register=lambda target, hook, kind: hooks.update({target: (hook, kind)})
    )
    context = ModuleType("sglang.srt.runtime_context")
    flags = SimpleNamespace(moe=SimpleNamespace(in_speculative_scope=False))
    context.get_flags = lambda: flags
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (registry, context):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, HOST, raising=False)
    # Whatever the plugin puts there is removed after the test.
    monkeypatch.setitem(sys.modules, "kt_kernel", ModuleType("kt_kernel"))
    monkeypatch.delitem(sys.modules, "kt_kernel")
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    return SimpleNamespace(hooks=hooks, flags=flags)


@contextmanager
def command_line(monkeypatch, *options):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["launch_server", *options])
        yield


def test_a_server_with_kt_options_gets_the_module(sglang, monkeypatch):
    with command_line(monkeypatch, "--kt-weight-path", "/models/experts"):
        plugin.register()
    assert sys.modules["kt_kernel"] is kt_kernel
    assert sglang.hooks == {
        f"{HOST}.KTEPWrapperMethod.create_moe_runner": (plugin.scale_once, "around"),
        f"{HOST}.KTEPWrapperMethod.create_weights": (plugin.tell_swiglu, "around"),
        f"{LAYER}.__init__": (plugin.route_unscaled, "around"),
        f"{HOST}.create_kt_config_from_server_args": (plugin.layer_settings, "around"),
    }


def test_other_servers_are_left_alone(sglang, monkeypatch):
    with command_line(monkeypatch, "--model-path", "m", "--tp", "2"):
        plugin.register()
    assert "kt_kernel" not in sys.modules
    assert not sglang.hooks


@pytest.mark.parametrize(("switch", "used"), [("0", False), ("1", True)])
def test_an_environment_variable_decides(sglang, monkeypatch, switch, used):
    monkeypatch.setenv("CPUMOE_SGLANG", switch)
    with command_line(monkeypatch, *(["--kt-method", "MXFP4"] if switch == "0" else [])):
        plugin.register()
    assert ("kt_kernel" in sys.modules) == used


def test_a_wrong_environment_variable_is_refused(sglang, monkeypatch):
    monkeypatch.setenv("CPUMOE_SGLANG", "yes")
    with refused(ValueError, "CPUMOE_SGLANG: expected 0 or 1, got 'yes'"):
        plugin.register()


@pytest.mark.parametrize("imported", [False, True])
def test_another_kt_kernel_is_used_unless_cpumoe_is_chosen(sglang, monkeypatch, tmp_path, imported):
    (tmp_path / "kt_kernel.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    if imported:
        monkeypatch.setitem(sys.modules, "kt_kernel", ModuleType("kt_kernel"))
    with command_line(monkeypatch, "--kt-method", "MXFP4"):
        plugin.register()
        assert sys.modules.get("kt_kernel") is not kt_kernel
        assert not sglang.hooks
        monkeypatch.setenv("CPUMOE_SGLANG", "1")
        plugin.register()
    assert sys.modules["kt_kernel"] is kt_kernel


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_the_folder_on_pythonpath_is_not_another_kt_kernel(
    sglang, monkeypatch, tmp_path, imported, linked
):
    folder = pythonpath()
    if linked:
        folder = tmp_path / "linked"
        folder.symlink_to(pythonpath())
    monkeypatch.syspath_prepend(folder)
    if imported:
        importlib.import_module("kt_kernel")
    with command_line(monkeypatch, "--kt-method", "MXFP4"):
        plugin.register()
        plugin.register()
    assert sys.modules["kt_kernel"] is kt_kernel


def test_a_host_that_was_imported_before_gets_the_module(sglang, monkeypatch):
    host = ModuleType(HOST)
    host.KTRANSFORMERS_AVAILABLE = False
    monkeypatch.setitem(sys.modules, HOST, host)
    with command_line(monkeypatch, "--kt-method", "MXFP4"):
        plugin.register()
    assert host.KTRANSFORMERS_AVAILABLE
    assert host.KTMoEWrapper is kt_kernel.KTMoEWrapper


def test_the_gpu_does_not_scale():
    seen = []
    config = RunnerConfig()
    plugin.scale_once(lambda *args: seen.append(args), "method", "layer", config)
    assert seen == [("method", "layer", config)]
    assert config.routed_scaling_factor is None
    assert seen[0][2] is config, "later changes of the layer's object must reach the runner"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RunnerConfig(), SwiGLU()),
        (RunnerConfig(swiglu_limit=10.0), SwiGLU(limit=10.0)),
        (RunnerConfig(swiglu_limit=0.0), SwiGLU()),
        (
            RunnerConfig(gemm1_alpha=1.702, gemm1_clamp_limit=7.0, swiglu_limit=10.0),
            SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0),
        ),
    ],
)
def test_the_module_is_told_the_layers_swiglu(tmp_path, config, expected):
    folder = checkpoint(tmp_path, "kimi-k2")
    edit_config(folder, model_type="new_moe")
    layer = SimpleNamespace(moe_runner_config=config)
    made = []

    def create_weights(method, layer, /, **kwargs):
        made.append(kt_kernel.KTMoEWrapper(**kwargs))

    plugin.tell_swiglu(create_weights, None, layer, **arguments(folder))
    assert made[0]._activation == expected
    create_weights(None, layer, **arguments(folder))
    assert made[1]._activation == SwiGLU()


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_routing_does_not_scale_for_layers_with_experts_on_the_cpu(monkeypatch, on_cpu):
    host = ModuleType(HOST)
    host.KTEPWrapperMethod = type("KTEPWrapperMethod", (), {})
    monkeypatch.setitem(sys.modules, HOST, host)
    layer = SimpleNamespace()

    def make(layer, /, **kwargs):
        layer.quant_method = host.KTEPWrapperMethod() if on_cpu else object()
        layer.should_fuse_routed_scaling_factor_in_topk = True
        layer.arguments = kwargs

    plugin.route_unscaled(make, layer, num_experts=8)
    assert layer.should_fuse_routed_scaling_factor_in_topk == (not on_cpu)
    assert layer.arguments == {"num_experts": 8}


def test_draft_layers_keep_their_experts(sglang):
    def settings(server_args, layer_idx):
        return SimpleNamespace(num_gpu_experts=4, layer_idx=layer_idx)

    assert plugin.layer_settings(settings, "args", 3).layer_idx == 3
    sglang.flags.moe.in_speculative_scope = True
    assert plugin.layer_settings(settings, "args", 3) is None


@pytest.mark.parametrize(("stated", "used"), [(None, 0), (0, 0), (4, 4)])
def test_the_cpu_has_all_experts_unless_the_user_says_otherwise(sglang, stated, used):
    def settings(server_args, layer_idx):
        return SimpleNamespace(num_gpu_experts=stated)

    assert plugin.layer_settings(settings, "args", 3).num_gpu_experts == used
    assert plugin.layer_settings(lambda *args: None, "args", 3) is None


def test_the_metadata_names_the_plugin():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    section = re.search(r'\[project\.entry-points\."sglang\.srt\.plugins"\]\n(.+)\n', text)
    assert section[1] == 'cpumoe = "cpumoe.integrations.sglang.plugin:register"'


def test_importing_the_plugin_does_not_import_pytorch():
    script = "import sys, cpumoe.integrations.sglang.plugin; print('torch' in sys.modules)"
    assert output_of(script, env={"PYTHONPATH": str(Path(cpumoe.__file__).parents[1])}) == "False"
